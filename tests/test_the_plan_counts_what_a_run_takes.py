"""`distill --dry-run`: memory with the pictures that stay decoded, disk with what is written of each image, and of a run
that is resumed what remains."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edgedistill import plan
from edgedistill.artifacts import RunDir
from edgedistill.data.deal import SplitSettings
from edgedistill.data.manifest import Dataset
from edgedistill.data.soft_label_store import label_bytes, parse_store, write_store
from edgedistill.pipeline import DataSettings, DistillSettings, NamedStudent, Rehearsal
from edgedistill.student import StudentSettings
from edgedistill.teacher import Ensemble, NamedTeacher, TeacherSettings
from edgedistill.training.loader import is_jpeg, open_store, prepared_spec, store_bytes
from edgedistill.training.models import input_spec_for

CLASSES, TRAIN, VAL, TEST = 200, 40_000, 5_000, 10_000
MIB = 2**20


@pytest.fixture
def steps(dataset_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, plan.PlanStep]]:
    """The steps of a plan by name, for many images that need not lie there; a network has 10 MiB of weights."""
    count = TRAIN + VAL + TEST
    splits = np.repeat(["train", "val", "test"], [TRAIN, VAL, TEST])
    dataset = dataset_of(
        [f"{number:06d}.{'jpg' if number % 2 else 'png'}" for number in range(count)],
        np.arange(count) % CLASSES,
        splits=splits,
        folds=np.where(splits == "train", np.arange(count) % 4, -1),
        class_names=tuple(map(str, range(CLASSES))),
    )
    monkeypatch.setattr(plan, "_measure", lambda settings, classes: plan._Cost(0.001, 10.0, 50.0))

    def build(
        *,
        teacher: dict[str, Any] | None = None,
        student: dict[str, Any] | None = None,
        others: tuple[NamedStudent, ...] = (),
        teachers: tuple[NamedTeacher, ...] = (),
        unlabelled: int = 0,
    ) -> dict[str, plan.PlanStep]:
        first = StudentSettings(**{"name": "mbv3s050", "image_size": 32, "cache_gib": 9.0} | (student or {}))
        settings = DistillSettings(
            DataSettings("photos", SplitSettings()),
            tmp_path,
            TeacherSettings(**{"name": "mbv3s050", "image_size": 32, "cache_gib": 9.0, "epochs": 2} | (teacher or {})),
            first,
            label="small",
            others=others,
            ensemble=Ensemble(label="first", others=teachers),
        )
        found = {named.label: unlabelled for named in settings.students}
        monkeypatch.setattr(plan, "rehearse", lambda *_, **__: Rehearsal(dataset, found))
        made = plan.make_plan(settings, resume=True)
        assert len({step.step for step in made.steps}) == len(made.steps)
        return {step.step: step for step in made.steps}

    return build


def test_memory_holds_the_pictures_that_stay_decoded(steps: Callable[..., Any]) -> None:
    granted, refused = steps(), steps(teacher={"cache_gib": 0.0}, student={"cache_gib": 0.0})
    prepared = round(32 * 256 / 224) ** 2 * 3  # of each image, and of a JPEG another
    store = TRAIN * 1.5 * prepared / MIB
    for name in granted:
        assert granted[name].memory_mib - refused[name].memory_mib == pytest.approx(store, abs=20), name
    more = steps(student={"final_data": "train+val", "unlabelled": "x"}, unlabelled=20_000)
    added = (VAL * 1.5 + 20_000 * 2) * prepared / MIB
    name = "student, small"
    assert more[name].memory_mib - granted[name].memory_mib == pytest.approx(added, abs=20)
    twice = steps(student={"test_size": 48, "fixres_epochs": 2})
    at_test_size = TRAIN * 1.5 * 48**2 * 3 / MIB
    assert twice[name].memory_mib - granted[name].memory_mib == pytest.approx(at_test_size, abs=20)


def test_a_store_takes_what_the_plan_says(photos: Path, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "once.png"), np.zeros((40, 50, 3), np.uint8))
    paths = np.array([*sorted(map(str, photos.rglob("*.jpg")))[:3], str(tmp_path / "once.png")])
    spec = prepared_spec(input_spec_for("mbv3s050", 32))
    pixels = open_store(paths, spec, cache_gib=1.0).pixels
    assert pixels is not None
    assert sum(images.nbytes for images in pixels.values()) == store_bytes(is_jpeg(paths), spec)


@pytest.mark.parametrize("store", ["float32", "float16", "top-k:5"])
def test_a_soft_label_takes_what_the_plan_says(tmp_path: Path, store: str, heads_dataset: Dataset) -> None:
    scores = np.log(np.random.default_rng(0).dirichlet(np.ones(20), 50)).astype(np.float32)
    write_store(tmp_path, "label", [scores], shape=scores.shape, kind=parse_store(store))
    written = sum(np.load(path).nbytes for path in tmp_path.glob("label.*"))
    assert written == 50 * label_bytes(parse_store(store), 20)
    each = {"float32": 4 * 3 + 4 * 2 + 4, "float16": 2 * 3 + 2 * 2 + 4, "top-k:5": 4 * 3 + 4 * 2 + 4}
    assert label_bytes(parse_store(store), 0, heads_dataset.task) == each[store]


def test_disk_holds_what_teachers_say_of_each_image(steps: Callable[..., Any]) -> None:
    answers, identity = 4 * CLASSES * TRAIN / MIB, 4 * len("000000.jpg") * TRAIN / MIB
    test = 4 * CLASSES * TEST / MIB
    teachers = steps()["4 teachers, mbv3s050"].disk_mib
    assert teachers == pytest.approx(7 * 10 + 2 * (answers + identity) + test, abs=2)  # of each fold, and soft_labels/
    smaller = steps(teacher={"soft_label_store": "float16"})["4 teachers, mbv3s050"].disk_mib
    assert teachers - smaller == pytest.approx(answers / 2, abs=2)
    two = steps(teachers=(NamedTeacher("other", TeacherSettings(name="lcnet035", image_size=32)),))
    first, last = two["4 teachers, mbv3s050"].disk_mib, two["4 teachers, lcnet035"].disk_mib
    assert first == pytest.approx(70 + answers + identity + test, abs=2)
    assert last == pytest.approx(first + answers + identity + test, abs=2)  # and what both say together
    student = steps()
    assert student["student, small"].disk_mib == pytest.approx(50 + 2 * test, abs=2)  # and the majority's
    assert student["hard-label student, small"].disk_mib == pytest.approx(50 + test, abs=2)


def test_disk_holds_fixed_views_once_for_each_size(steps: Callable[..., Any]) -> None:
    plain, viewed = (
        steps(
            student={"views": views, "loss": "kl"},
            others=tuple(
                NamedStudent(name, StudentSettings(name=name, image_size=size, views=views, loss="kl", cache_gib=9.0))
                for name, size in (("lcnet050", 32), ("lcnet075", 64))
            ),
        )
        for views in (0, 3)
    )
    parts_and_whole = TRAIN * 3 * (2 * 2 * CLASSES + 8) / MIB
    added = {name: viewed[name].disk_mib - plain[name].disk_mib for name in plain}
    assert added["student, small"] == pytest.approx(parts_and_whole, abs=2)
    assert added["student, lcnet050"] == added["hard-label student, small"] == 0
    assert added["student, lcnet075"] == pytest.approx(parts_and_whole, abs=2)
    assert viewed["student, lcnet050"].minutes < viewed["student, small"].minutes


def test_of_a_resumed_run_what_remains_is_counted(steps: Callable[..., Any], tmp_path: Path) -> None:
    asked = {"student": {"unlabelled": "x", "calibrate_soft_labels": True}, "unlabelled": 100}
    whole, run = steps(**asked), RunDir(tmp_path)
    for fold in (0, 2):
        run.teacher(fold).mkdir(parents=True)
        (run.teacher(fold) / "fold.json").touch()
    half = steps(**asked)
    name = "4 teachers, mbv3s050"
    evaluated = 4 * TEST
    left = half["2 of 4 teachers, mbv3s050"]
    assert left.images - evaluated == (whole[name].images - evaluated) / 2
    assert left.minutes < whole[name].minutes and left.disk_mib < whole[name].disk_mib
    run.model.touch()
    done = steps(**asked)
    assert list(done) == ["2 of 4 teachers, mbv3s050", "student, small, finished", "hard-label student, small"]
    student = done["student, small, finished"]
    assert (student.images, student.memory_mib < half["student, small"].memory_mib) == (TEST, True)
    for fold in (1, 3):
        run.teacher(fold).mkdir(parents=True)
        (run.teacher(fold) / "fold.json").touch()
    run.hard_label_student.mkdir()
    (run.hard_label_student / "model.pt").touch()
    finished = steps(**asked)
    assert sum(step.images for step in finished.values()) == (4 + 2) * TEST
    another = steps(**asked, others=(NamedStudent("lcnet", StudentSettings(name="lcnet050", unlabelled="x")),))
    assert list(another)[3:] == ["student, lcnet"]  # the photographs without labels have theirs


def test_a_finished_run_has_nothing_left_to_train(
    tiny_run: Path, photos: Path, cli: Callable[..., subprocess.CompletedProcess[str]], tiny_options: list[str]
) -> None:
    line = ["distill", "--data", photos, "--out", tiny_run, *tiny_options, "--resume", "--dry-run", "--json"]
    made = json.loads(cli(*line).stdout)
    names = ["0 of 2 teachers, mbv3s050", "student, mbv3s050, finished", "hard-label student, mbv3s050, finished"]
    assert [step["step"] for step in made["steps"]] == names
    assert sum(step["images"] for step in made["steps"]) == 4 * made["splits"]["test"]
