"""pipeline.py: several students learn from one set of soft labels; each has files, figures and a resumption of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill.artifacts import read_array
from edgedistill.data.manifest import read_dataset
from edgedistill.errors import UsageError
from edgedistill.export.export import ExportSettings
from edgedistill.export.int8 import Skip
from edgedistill.export.int8_training import find_lesson
from edgedistill.export.network import load_network
from edgedistill.export.samples import find_images
from edgedistill.pipeline import DistillSettings, parse_students
from edgedistill.student import StudentSettings
from edgedistill.training.checkpoints import read_model
from edgedistill.training.evaluation import pairs_of

Cli = Callable[..., subprocess.CompletedProcess[str]]
STUDENTS = "mbv3s050,lcnet035@48"


def parsed(names: str, weights: str = "auto") -> list[tuple[str, str, str, int]]:
    students = parse_students(names, weights, StudentSettings(image_size=224))
    return [
        (student.label, student.settings.name, student.settings.weights, student.settings.image_size)
        for student in students
    ]


def test_names_sizes_and_weights_are_read() -> None:
    assert parsed("mbv3s") == [("mbv3s", "mbv3s", "auto", 224)]
    assert parsed("mbv3s, lcnet@160,vit_tiny_patch16_224.augreg_in21k", "none") == [
        ("mbv3s", "mbv3s", "none", 224),
        ("lcnet-160", "lcnet", "none", 160),
        ("vit_tiny_patch16_224.augreg_in21k", "vit_tiny_patch16_224.augreg_in21k", "none", 224),
    ]
    assert [weights for _, _, weights, _ in parsed("mbv3s,lcnet", "a.pth,none")] == ["a.pth", "none"]


@pytest.mark.parametrize(
    ("names", "weights", "words"),
    [
        ("", "auto", "--student"),
        ("mbv3s@", "auto", "NAME@SIZE"),
        ("mbv3s@big", "auto", "NAME@SIZE"),
        ("mbv3s@9", "auto", "image_size"),
        ("mbv3s,lcnet,mbv4s", "a.pth,b.pth", "2 for 3 students"),
    ],
)
def test_what_cannot_be_read_is_named(names: str, weights: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parsed(names, weights)


def settings(names: str, **options: Any) -> DistillSettings:
    first, *others = parse_students(names, "auto", StudentSettings())
    return DistillSettings(
        data=None,  # type: ignore[arg-type]
        out=Path("run"),
        teacher=None,  # type: ignore[arg-type]
        student=first.settings,
        label=first.label,
        others=tuple(others),
        **options,
    )


def test_the_same_student_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="mbv3s twice"):
        settings("mbv3s,lcnet,mbv3s")
    assert len(settings("mbv3s,mbv3s@160").students) == 2


@pytest.mark.parametrize(
    ("baselines", "expected"), [("all", [True, True]), ("first", [True, False]), ("none", [False] * 2)]
)
def test_baselines_are_trained_only_where_asked_for(baselines: Any, expected: list[bool]) -> None:
    asked = settings("mbv3s,lcnet", baselines=baselines)
    assert [asked.has_baseline(student) for student in asked.students] == expected


def test_each_student_is_compared_with_its_own_baseline() -> None:
    names = ["majority", "teacher", "student", "student-b", "hard_label_student-b", "student-c"]
    pairs = pairs_of(names)
    assert ("student-b", "hard_label_student-b") in pairs and ("student-c", "student") in pairs
    assert ("student", "majority") in pairs and ("teacher", "student") in pairs
    assert not any("hard_label_student" in b and a != "student-b" for a, b in pairs)


def test_export_takes_any_of_them(tmp_path: Path) -> None:
    for name, folder in (("model.pt", "openvino"), ("model-lcnet-160.pt", "openvino-lcnet-160")):
        assert ExportSettings(model=tmp_path / name).folder == tmp_path / folder


@pytest.fixture(scope="module")
def two(
    tiny_run: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory, cli: Cli, tiny_options: list[str]
) -> Path:
    """A finished run to which a second student was added."""
    run = tmp_path_factory.mktemp("several") / "run"
    shutil.copytree(tiny_run, run)
    options = [
        STUDENTS if value == "mbv3s050" and tiny_options[at - 1] == "--student" else value
        for at, value in enumerate(tiny_options)
    ]
    result = cli("distill", "--data", photos, "--out", run, *options, "--baselines", "all", "--resume", "--json")
    assert json.loads(result.stdout)["models"] == {
        "mbv3s050": str(run / "model.pt"),
        "lcnet035-48": str(run / "model-lcnet035-48.pt"),
    }
    return run


def test_a_second_student_joins_a_finished_run(two: Path, tiny_run: Path) -> None:
    assert (two / "model.pt").read_bytes() == (tiny_run / "model.pt").read_bytes()
    assert (two / "model-mbv3s050.pt").read_bytes() == (two / "model.pt").read_bytes()
    model = read_model(two / "model-lcnet035-48.pt")
    assert model.architecture == "lcnet_035" and model.input_spec.height == 48 and model.settings["distillation"]
    assert not read_model(two / "student-lcnet035-48-hard-labels" / "model.pt").settings["distillation"]
    assert (two / "student-lcnet035-48" / "metrics.jsonl").stat().st_size
    assert (two / "teacher/fold-0/model.pt").read_bytes() == (tiny_run / "teacher/fold-0/model.pt").read_bytes()


def test_evaluation_and_report_compare_them_all(two: Path, cli: Cli) -> None:
    evaluation = json.loads((two / "evaluation" / "evaluation.json").read_text())
    names = {
        "majority",
        "teacher",
        "student",
        "hard_label_student",
        "student-lcnet035-48",
        "hard_label_student-lcnet035-48",
    }
    assert set(evaluation["models"]) == names
    for name in names:
        assert read_array(two / "evaluation" / f"{name}.probs.npy").shape == (16, 2)
    page = Path(cli("report", two).stdout.strip()).read_text()
    assert "distilled student lcnet035-48" in page and "hard-label student lcnet035-48" in page


def test_a_lost_student_comes_back_the_same(
    two: Path, photos: Path, tmp_path: Path, cli: Cli, tiny_options: list[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(two, run)
    shutil.rmtree(run / "evaluation")
    (run / "model-lcnet035-48.pt").unlink()
    (run / "model-mbv3s050.pt").unlink()
    options = [
        STUDENTS if value == "mbv3s050" and tiny_options[at - 1] == "--student" else value
        for at, value in enumerate(tiny_options)
    ]
    cli("distill", "--data", photos, "--out", run, *options, "--baselines", "all", "--resume")
    for name in ("model.pt", "model-mbv3s050.pt", "model-lcnet035-48.pt", "evaluation/evaluation.json"):
        assert (run / name).read_bytes() == (two / name).read_bytes(), name


def test_dry_run_counts_them_all(photos: Path, tmp_path: Path, cli: Cli, tiny_options: list[str]) -> None:
    options = [
        STUDENTS if value == "mbv3s050" and tiny_options[at - 1] == "--student" else value
        for at, value in enumerate(tiny_options)
    ]
    result = cli("distill", "--data", photos, "--out", tmp_path / "x", *options, "--dry-run", "--json")
    steps = [step["step"] for step in json.loads(result.stdout)["steps"]]
    assert steps[1:] == ["student, mbv3s050", "hard-label student, mbv3s050", "student, lcnet035-48"]


def test_int8_training_takes_up_the_students_own_lesson(two: Path) -> None:
    network = load_network(two / "model-lcnet035-48.pt", image_size=None)
    images = find_images(network, manifest=two / "dataset.csv", data=None)
    lesson = find_lesson(network, two / "dataset.csv", images.calibration)
    assert lesson.settings.name == "lcnet035" and lesson.settings.image_size == 48 and lesson.loss.soft_weight == 0.2
    ids, stored = read_array(two / "soft_labels/ids.npy"), read_array(two / "soft_labels/label.log_probs.npy")
    rows = [ids.tolist().index(id) for id in lesson.samples.ids]
    assert lesson.soft is not None
    assert np.array_equal(lesson.soft.rows(np.arange(len(rows))), stored[rows])
    hard = load_network(two / "student-lcnet035-48-hard-labels" / "model.pt", image_size=None)
    assert find_lesson(hard, two / "dataset.csv", images.calibration).soft is None
    assert len(lesson.samples) == len(read_dataset(two / "dataset.csv").rows("train"))
    with pytest.raises(Skip, match="not those that the network was trained on"):
        find_lesson(network, two / "dataset.csv", images.certificate)
