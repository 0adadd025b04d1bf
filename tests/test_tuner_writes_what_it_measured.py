"""`edgedistill tune` on real tiny networks without torch: what it reads, refuses and writes, and what the runtime makes of it."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from edgedistill import images
from edgedistill.artifacts import RUN_FORMAT, read_json, sha256_file, write_json
from edgedistill.benchmarks.bench_fps import cascade_notes
from edgedistill.benchmarks.candidates import cascade_record, preparation_us
from edgedistill.benchmarks.score import Objective
from edgedistill.benchmarks.tuned_score import fixed_settings, measured, slow_stage, tunings
from edgedistill.benchmarks.tuner import TuneSettings, measure, tune, valset
from edgedistill.benchmarks.tuner.cascade import cascade_answers, exit_curve
from edgedistill.benchmarks.tuner.journal import Journal
from edgedistill.benchmarks.tuner.measure import RealBench
from edgedistill.benchmarks.tuner.picture import draw_pareto
from edgedistill.benchmarks.tuner.space import Deployment, Host, Variant, default_serving
from edgedistill.benchmarks.tuner.students import BEFORE, find_students
from edgedistill.benchmarks.tuner.truth import Truth
from edgedistill.benchmarks.tuner.tune import TUNE_FORMAT, _in_place, _reject_below
from edgedistill.benchmarks.tuner.valset import open_val, write_val
from edgedistill.benchmarks.unused_images import write_unused
from edgedistill.data.manifest import Dataset, hash_files, read_dataset, write_dataset
from edgedistill.errors import ArtifactError, DataError, ModelError, UsageError
from edgedistill.images import EncodedImage, InputSpec, load_image
from edgedistill.metrics import fit_temperature, macro_f1
from edgedistill.runtime import Bundle, Classifier, Engine
from edgedistill.runtime.bundle import (
    DeployConfig,
    LatencySettings,
    Stage,
    ThroughputSettings,
    describe_stage,
    read_deploy,
    write_deploy,
)
from edgedistill.runtime.processor import settings_here

LABELS = ("blue", "green", "red")
SPEC = InputSpec(height=64, width=64)
VAL, TRAIN = 30, 9


def network(gain: float, spec: InputSpec, *, labels: tuple[str, ...] = LABELS, dataset_hash: str = "") -> ov.Model:
    """Logits = gain x mean of each plane, through a few convolutions that take time; works at any size."""
    image = ops.parameter([1, 3, spec.height, spec.width], np.float32, name="image")
    kernel = np.eye(3, dtype=np.float32)[::-1].reshape(3, 3, 1, 1).copy()  # blue, green, red
    mixed = ops.convolution(image, kernel, [1, 1], [0, 0], [0, 0], [1, 1])
    means = ops.reduce_mean(mixed, np.array([2, 3]), False)
    logits = ops.matmul(means, (gain * np.eye(3, len(labels))).astype(np.float32), False, False)
    model = ov.Model([logits], [image], "tiny")
    model.inputs[0].get_node().set_layout(ov.Layout("NCHW"))
    metadata = {
        "format_version": "1",
        "input_spec": json.dumps(spec.to_dict()),
        "temperature": "1.0",
        "thresholds": "null",
        "labels": json.dumps(labels),
        "dataset_hash": dataset_hash,
        "weights_hash": f"{gain}",
        "architecture": "tiny",
        "task": "single-label",
    }
    for key, value in metadata.items():
        model.set_rt_info(value, ["edgedistill", key])
    return model


def photograph(path: Path, label: int, seed: int) -> None:
    """A coloured picture with noise; every fifth is nearly grey, so that a network may be unsure."""
    rng = np.random.default_rng(seed)
    colour = np.full(3, 100.0)
    colour[label] += 6 if seed % 5 == 0 else 60
    pixels = np.clip(colour + rng.normal(0, 12, (160, 150, 3)), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, pixels)[1].tobytes())


def make_run(root: Path, *, students: dict[str, float], data: Path | None = None) -> Path:
    """RUN with dataset.csv, config.json, photographs in root/data and openvino/ with those stages (name: gain)."""
    photos = data or root / "data"
    ids, labels, splits = [], [], []
    for number in range(VAL + TRAIN):
        label = number % 3
        ids.append(f"{LABELS[label]}/{number:03d}.jpg")
        labels.append(label)
        splits.append("val" if number < VAL else "train")
        photograph(photos / ids[-1], label, number)
    paths = [photos / id for id in ids]
    dataset = Dataset(
        ids=np.array(ids),
        paths=np.array([str(path) for path in paths]),
        sha256=hash_files(paths),
        labels=np.array(labels),
        groups=np.array([""] * len(ids)),
        splits=np.array(splits),
        folds=np.array([-1 if split == "val" else 0 for split in splits]),
        class_names=LABELS,
    )
    root.mkdir(parents=True, exist_ok=True)
    write_dataset(dataset, root / "dataset.csv")
    write_json(root / "config.json", {"settings": {"student": {"final_data": "train"}}}, format=RUN_FORMAT)
    make_bundle(root / "openvino", students, dataset_hash=dataset.hash)
    return root


def make_bundle(folder: Path, students: dict[str, float], *, dataset_hash: str = "", **kind: Any) -> Path:
    for name, gain in students.items():
        for file in ("model.xml", "model-int8.xml"):
            (folder / "stages" / name).mkdir(parents=True, exist_ok=True)
            model = network(gain, SPEC, dataset_hash=dataset_hash, **kind)
            ov.save_model(model, folder / "stages" / name / file, compress_to_fp16=False)
    first = next(iter(students))
    stage = describe_stage(folder, f"stages/{first}/model.xml", input_spec=SPEC, temperature=1.0)
    write_deploy(folder / "deploy.json", DeployConfig(stages=(stage,), reject_below=0.05))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tuned run: the command in a process where torch, matplotlib and the other extras cannot be imported."""
    root = make_run(tmp_path_factory.mktemp("tuned") / "run", students={"sharp": 3.0, "dull": 0.4})
    blocker = root.parent / "site"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(BLOCKER)
    options = ["--fps-target", "1e9", "--minutes", "0.5", "--sizes", "32", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "edgedistill", "tune", str(root), *options],
        env=os.environ | {"PYTHONPATH": str(blocker)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    (root / "answer.json").write_text(done.stdout)
    (root / "messages.txt").write_text(done.stderr)
    return root


BLOCKER = """
import sys
BLOCKED = {"torch", "torchvision", "timm", "onnx", "onnxruntime", "sklearn", "matplotlib", "nncf", "albumentations", "scipy"}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", students={"sharp": 3.0})


def test_one_tuning_from_folder_to_deploy_json_in_the_base_install(finished: Path) -> None:
    openvino = finished / "openvino"
    record = read_json(openvino / "tune.json", format=TUNE_FORMAT)
    answer = json.loads((finished / "answer.json").read_text())
    assert answer["chosen"] == record["chosen"]
    assert not (openvino / "pareto.png").exists() and "matplotlib" in (finished / "messages.txt").read_text()
    bundle = Bundle.load(openvino)
    assert bundle.config.cpu == Host.here().cpu and "openvino" in bundle.config.versions
    assert bundle.config.reject_below == 0.05, "whoever set it meant it"
    assert bundle.config.score.fps_target == 1e9
    assert read_deploy(openvino / BEFORE).cpu == "", "the old one is kept"
    assert record["verified"]["other_answers"] <= 0.01
    assert record["val"]["images"] == VAL
    assert {row["student"] for row in record["variants"]} == {"sharp", "dull"}
    assert record["scopes"]["files"]["fps"] > 0


def test_the_runtime_answers_as_the_tuner_promised(finished: Path) -> None:
    record = read_json(finished / "openvino" / "tune.json", format=TUNE_FORMAT)
    val = open_val(find_students([finished]), None)
    with Engine(finished / "openvino") as engine:
        answers = np.array([prediction.index for prediction in engine.map(val.paths)])
    assert float((answers == val.labels).mean()) == pytest.approx(record["chosen"]["metric"], abs=0.034)


def test_the_picture_and_the_report_show_it(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    from edgedistill.artifacts import RunDir
    from edgedistill.report import write_report

    record = read_json(finished / "openvino" / "tune.json", format=TUNE_FORMAT)
    assert draw_pareto(record, tmp_path / "pareto.png")
    assert cv2.imread(str(tmp_path / "pareto.png")) is not None
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    # A short time may end before these are measured.
    record["scopes"] = {scope: {"fps": fps, "settings": {}} for scope, fps in (("model", 900), ("files", 300))}
    write_json(copy / "openvino" / "tune.json", record, format=TUNE_FORMAT)
    page = write_report(RunDir(copy)).read_text()
    assert "Pareto front" in page and "What each step brought" in page and "benchmark_app&#39;s" in page


def test_resume_after_the_end_measures_nothing_again(finished: Path, tmp_path: Path) -> None:
    again = tmp_path / "run"
    shutil.copytree(finished, again)
    journal = again / "openvino" / "tune" / "journal.jsonl"
    before = len(journal.read_text().splitlines())
    settings = TuneSettings((finished,), Objective(fps_target=1e9), minutes=0.5, sizes=(32,), out=again / "openvino")
    result = tune(dataclasses.replace(settings, resume=True))
    assert result.record["resumed"]
    assert len(journal.read_text().splitlines()) - before <= 8, "only what comes after the choice may be new"


def test_measurements_of_another_release_are_not_taken_up(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = tmp_path / "run"
    shutil.copytree(finished, again)
    before = (again / "openvino" / "tune" / "journal.jsonl").read_bytes()
    settings = TuneSettings((finished,), Objective(fps_target=1e9), minutes=0.5, sizes=(32,), out=again / "openvino")
    of_tune = sys.modules["edgedistill.benchmarks.tuner.tune"]
    monkeypatch.setattr(of_tune, "package_versions", lambda names: dict.fromkeys(names, "0"))
    with pytest.raises(UsageError, match="other versions"):
        tune(dataclasses.replace(settings, resume=True))
    assert (again / "openvino" / "tune" / "journal.jsonl").read_bytes() == before


def test_nothing_that_reaches_the_goal_leaves_deploy_json_as_it_was(run: Path) -> None:
    before = (run / "openvino" / "deploy.json").read_bytes()
    settings = TuneSettings((run,), Objective(min_fps=1e9), minutes=0.4, sizes=(64,))
    with pytest.raises(ModelError, match="nothing reaches it"):
        tune(settings)
    assert (run / "openvino" / "deploy.json").read_bytes() == before
    assert not (run / "openvino" / BEFORE).exists()


def test_too_short_a_time_leaves_deploy_json_as_it_was(run: Path) -> None:
    before = (run / "openvino" / "deploy.json").read_bytes()
    with pytest.raises(Exception, match="too short for one round"):
        tune(TuneSettings((run,), Objective(fps_target=10.0), minutes=0.01))
    assert (run / "openvino" / "deploy.json").read_bytes() == before
    assert (run / "openvino" / "tune" / "journal.jsonl").is_file()


# ---- val ----


def test_val_is_val_and_never_anything_else(run: Path) -> None:
    val = open_val(find_students([run]), None)
    assert len(val) == VAL and val.ids[0] == "blue/000.jpg"
    assert val.drawn(25, seed=1).ids == val.drawn(25, seed=1).ids != val.drawn(25, seed=2).ids


def test_a_val_that_was_trained_on_is_refused(run: Path) -> None:
    write_json(run / "config.json", {"settings": {"student": {"final_data": "train+val"}}}, format=RUN_FORMAT)
    with pytest.raises(DataError, match=r"train\+val"):
        open_val(find_students([run]), None)


def test_missing_changed_and_foreign_images_are_named(run: Path, tmp_path: Path) -> None:
    students = find_students([run])
    photo = run / "data" / "red" / "002.jpg"
    content = photo.read_bytes()
    photo.write_bytes(content + b" ")
    with pytest.raises(DataError, match=r"1 of 30 .*sha256.*002\.jpg"):
        open_val(students, None)
    photo.unlink()
    with pytest.raises(DataError, match=r"1 of 30 val images are not .*002\.jpg.*--data"):
        open_val(students, None)
    shutil.move(run / "data", tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "red" / "002.jpg").write_bytes(content)
    assert len(open_val(students, str(tmp_path / "elsewhere"))) == VAL


def test_images_of_ones_own_are_used_and_train_images_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    students, own = find_students([run]), tmp_path / "own"
    with pytest.raises((DataError, UsageError), match="nowhere"):
        open_val(students, str(tmp_path / "nowhere"))
    for number in range(24):
        photograph(own / LABELS[number % 3] / f"mine-{number:03d}.jpg", number % 3, 5000 + number)
    val = open_val(students, str(own))
    assert len(val) == 24 and all(path.is_relative_to(own) for path in val.paths)
    assert "no list says which of these images were kept out of training" in " ".join(capsys.readouterr().err.split())
    moved = tmp_path / "moved" / "deeper"
    shutil.copytree(run / "data", moved / "blue" / "all")  # other ids, the same content
    for path in (moved / "blue" / "all").rglob("*.jpg"):
        target = moved / path.parent.name / f"x-{path.name}"
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    shutil.rmtree(moved / "blue" / "all")
    again = open_val(students, str(moved))
    assert again.hash == open_val(students, None).hash and all(path.is_relative_to(moved) for path in again.paths)
    dataset = read_dataset(run / "dataset.csv")
    for path in moved.rglob("*.jpg"):
        if hash_files([path])[0] in dataset.sha256[dataset.rows("val")]:
            path.unlink()
    with pytest.raises(DataError, match="9 of its images are in the train or test split"):
        open_val(students, str(moved))


def test_val_images_inside_shards_are_found_and_unpacked(run: Path, tmp_path: Path) -> None:
    dataset, shard = read_dataset(run / "dataset.csv"), tmp_path / "photos.tar"
    paths = []
    with tarfile.open(shard, "w") as tar:
        for number, path in enumerate(dataset.paths):
            info = tarfile.TarInfo(f"{number:04d}.jpg")
            content = Path(path).read_bytes()
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            paths.append(f"{shard}!{tar.offset - -(-len(content) // 512) * 512}+{len(content)}/{info.name}")
    write_dataset(dataclasses.replace(dataset, paths=np.array(paths)), run / "dataset.csv")
    shutil.rmtree(run / "data")
    val = open_val(find_students([run]), None)
    assert val.in_shards and len(val) == VAL
    files = val.unpacked(tmp_path / "unpacked")
    assert not files.in_shards and files.hash == val.hash
    assert hash_files(files.paths).tolist() == dataset.sha256[dataset.rows("val")].tolist()
    shard.unlink()
    with pytest.raises(DataError, match="30 of 30 val images are not on this machine"):
        open_val(find_students([run]), None)


def test_a_student_that_got_int8_after_it_was_copied_is_seen_with_it(run: Path) -> None:
    dull = make_bundle(run / "openvino-dull", {"dull": 0.4}, dataset_hash=read_dataset(run / "dataset.csv").hash)
    int8 = [dull / "stages" / "dull" / name for name in ("model-int8.xml", "model-int8.bin")]
    copied = run / "openvino" / "stages" / "dull"
    shutil.copytree(dull / "stages" / "dull", copied)
    for path in int8:
        (copied / path.name).unlink()
    found = {student.name: student for student in find_students([run])}
    assert set(found) == {"sharp", "dull"} and found["dull"].int8_sha256 and found["dull"].root == dull


def test_a_tuning_written_elsewhere_starts_from_the_bundle_it_was_given(run: Path, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "tune", {}, resume=False)
    kept = _in_place(run / "openvino", tmp_path / "elsewhere", journal)
    assert _reject_below(kept) == 0.05 and read_deploy(kept) == read_deploy(run / "openvino" / "deploy.json")


def test_another_export_copied_over_a_tuned_folder_can_be_tuned(run: Path, tmp_path: Path) -> None:
    openvino = run / "openvino"
    shutil.copyfile(openvino / "deploy.json", openvino / BEFORE)  # what a tuning leaves
    old = find_students([run])[0].sha256
    make_bundle(openvino, {"sharp": 3.5}, dataset_hash=read_dataset(run / "dataset.csv").hash)
    assert find_students([run])[0].sha256 != old
    weights = openvino / "stages" / "sharp" / "model.bin"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ArtifactError, match="sha256"):
        find_students([run])


def test_more_val_images_are_none_that_the_run_knows(run: Path, tmp_path: Path) -> None:
    known = set(read_dataset(run / "dataset.csv").sha256)
    for number in range(24):
        photograph(run / "data" / LABELS[number % 3] / f"new-{number:03d}.jpg", number % 3, 1000 + number)
    first = run / "data" / LABELS[0] / "000.jpg"
    for number in range(20):
        (first.parent / f"copy-{number}.jpg").write_bytes(first.read_bytes())
    learnt = tmp_path / "learnt"
    learnt.mkdir()
    shutil.copyfile(run / "data" / LABELS[1] / "new-001.jpg", learnt / "frame.jpg")
    settings = {"student": {"final_data": "train", "unlabelled": str(learnt)}}
    write_json(run / "config.json", {"settings": settings}, format=RUN_FORMAT)
    with pytest.raises(DataError, match="fewer than 8 unused"):
        write_unused(run, str(run / "data"), 8, tmp_path / "more")
    (learnt / "frame.jpg").rename(learnt / "frame.txt")
    assert write_unused(run, str(run / "data"), 8, tmp_path / "more") == 24
    val = open_val(find_students([run]), str(tmp_path / "more" / "val.csv"))
    assert not known & set(hash_files(val.paths))
    assert np.bincount(val.labels).tolist() == [8, 8, 8]
    with pytest.raises(DataError, match="fewer than 9 unused"):
        write_unused(run, str(run / "data"), 9, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    shutil.rmtree(learnt)
    with pytest.raises(DataError, match=r"learnt from .*which is not here"):
        write_unused(run, str(run / "data"), 8, tmp_path / "again")


def test_no_val_images_at_all_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "alone", {"sharp": 3.0})
    with pytest.raises(DataError, match=r"no validation images.*--prepare"):
        open_val(find_students([bundle]), None)


def test_labels_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "alone", {"sharp": 3.0})
    for number in range(30):
        photograph(tmp_path / "data" / ("cat" if number % 2 else "dog") / f"{number}.jpg", 0, number)
    with pytest.raises(DataError, match=r"labels \['cat', 'dog'\] that the model does not have"):
        open_val(find_students([bundle]), str(tmp_path / "data"))


def test_test_images_are_never_used(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "alone", {"sharp": 3.0})
    for number in range(30):
        photograph(tmp_path / "data" / ("train", "test")[number % 2] / LABELS[number % 3] / f"{number}.jpg", 0, number)
    with pytest.raises(DataError, match="no val; the tuner never looks at test"):
        open_val(find_students([bundle]), str(tmp_path / "data"))


def test_images_of_unknown_origin_are_used_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bundle = make_bundle(tmp_path / "alone", {"sharp": 3.0})
    for number in range(30):
        photograph(tmp_path / "data" / LABELS[number % 3] / f"{number}.jpg", number % 3, number)
    assert len(open_val(find_students([bundle]), str(tmp_path / "data"))) == 30
    assert "kept out of training" in capsys.readouterr().err


def test_a_student_that_was_trained_on_this_val_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one = make_run(tmp_path / "one", students={"sharp": 3.0})
    other = make_run(tmp_path / "other", students={"dull": 0.4}, data=tmp_path / "one" / "data")
    text = (other / "dataset.csv").read_text()
    (other / "dataset.csv").write_text(text.replace(",val,-1", ",train,0", 5))
    with pytest.raises(DataError, match="dull was trained on 5 of the 30 val images"):
        open_val(find_students([one, other]), None)
    assert capsys.readouterr().err == ""
    (other / "dataset.csv").unlink()
    open_val(find_students([one, other]), None)
    assert "no dataset.csv says which images dull was trained on" in capsys.readouterr().err


def test_a_prepared_folder_needs_nothing_else(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "board" / "bundle"
    shutil.copytree(run / "openvino", folder)
    val = open_val(find_students([run]), None)
    rows = [
        (id, f"{number}.jpg", LABELS[label], sha256_file(path))
        for number, (id, path, label) in enumerate(zip(val.ids, val.paths, val.labels.tolist(), strict=True))
    ]
    write_val(folder, rows)
    (folder / "val").mkdir()
    for number, path in enumerate(val.paths):
        shutil.copyfile(path, folder / "val" / f"{number}.jpg")
    shutil.rmtree(run)
    found = open_val(find_students([folder]), None)
    assert found.ids == val.ids and found.labels.tolist() == val.labels.tolist()
    shutil.move(folder / "val", tmp_path / "copied")
    assert len(open_val(find_students([folder]), str(tmp_path / "copied"))) == VAL
    (tmp_path / "copied" / "3.jpg").write_bytes(b"other")
    with pytest.raises(DataError, match="not what they were"):
        open_val(find_students([folder]), str(tmp_path / "copied"))


# ---- students ----


def test_students_of_several_folders_get_names_of_their_own(tmp_path: Path) -> None:
    one = make_bundle(tmp_path / "one", {"sharp": 3.0, "dull": 0.4})
    other = make_bundle(tmp_path / "other", {"sharp": 5.0})
    students = find_students([one, other, one])
    assert [student.name for student in students] == ["sharp", "dull", "sharp-2"]
    strange = make_bundle(tmp_path / "strange", {"x": 1.0}, labels=("a", "b", "c"))
    with pytest.raises(DataError, match="tune networks of one data set together"):
        find_students([one, strange])
    with pytest.raises(UsageError, match="export-openvino"):
        find_students([tmp_path])
    with pytest.raises(UsageError, match="no such file"):
        find_students([tmp_path / "nothing"])


# ---- cascades ----


def test_every_threshold_of_the_curve_is_what_the_runtime_would_answer() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 4, 200).astype(np.int32)
    fast, slow = rng.normal(0, 1, (200, 4)), rng.normal(0, 1, (200, 4))
    fast[np.arange(200), labels] += 1.0
    slow[np.arange(200), labels] += 2.0
    temperature, truth = fit_temperature(fast, labels), Truth.single(labels, ("a", "b", "c", "d"))
    for metric in ("accuracy", "macro-f1"):
        curve = exit_curve(fast, slow, truth, temperatures=(temperature, 1.0), metric=metric)
        for point in range(0, len(curve), 17):
            threshold = float(curve.threshold[point])
            answers, stage = cascade_answers(
                fast, slow, (truth.task, truth.task), temperatures=(temperature, 1.0), threshold=threshold
            )
            assert stage.mean() == pytest.approx(curve.passed_on[point])
            assert truth.metric(answers, metric) == pytest.approx(curve.metric[point])
    answers = slow.argmax(axis=1)
    probabilities = np.eye(4)[answers]
    assert truth.metric(answers[:, None], "macro-f1") == pytest.approx(macro_f1(probabilities, labels))


def cascade_bundle(folder: Path, *, threshold: float, slow_px: int = 64) -> Path:
    make_bundle(folder, {"dull": 0.4, "sharp": 3.0})
    spec = SPEC.resized(slow_px)
    stages = (
        describe_stage(
            folder, "stages/dull/model.xml", input_spec=SPEC.resized(32), temperature=1.0, exit_threshold=threshold
        ),
        describe_stage(folder, "stages/sharp/model.xml", input_spec=spec, temperature=1.0),
    )
    write_deploy(folder / "deploy.json", DeployConfig(stages=stages))
    return folder


def test_what_a_case_is_fed_fits_into_memory(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    val, host, seen = open_val(find_students([run]), None), Host.here(), {}
    rows = tuple(reversed(range(len(val))))
    first = Deployment((Variant("any", "f32", (64, 64)),), default_serving(host))
    bench = RealBench([], val, Objective(fps_target=1.0), host, scratch=tmp_path / "scratch")
    sizes = {path: (path.stat().st_size, load_image(path, SPEC).nbytes) for path in val.paths}
    largest = max(encoded for encoded, _ in sizes.values())
    monkeypatch.setattr(measure, "IMAGE_BYTES", (5 * largest, 5 * largest))
    for scope in ("files", "frames"):
        seen[scope] = bench._fed(measure.Case(first, (1.0,), rows, scope))
        assert seen[scope] == [val.paths[row] for row in rows[: len(seen[scope])]]
    assert 5 <= len(seen["files"]) < len(val) and len(seen["frames"]) < len(seen["files"])
    monkeypatch.undo()
    gib = {memory: measure.held_bytes(memory) >> 20 for memory in (None, 1.0, 8.0, 512.0)}
    assert gib == {None: 32, 1.0: 32, 8.0: 128, 512.0: 256}


def test_the_runtime_and_the_stored_logits_agree_on_a_cascade(run: Path, tmp_path: Path) -> None:
    make_bundle(tmp_path / "b", {"dull": 0.4, "sharp": 3.0})
    students, host = find_students([tmp_path / "b"]), Host.here()
    val = open_val(find_students([run]), None)
    bench = RealBench(students, val, Objective(fps_target=1.0), host, scratch=tmp_path / "scratch")
    stages = (Variant("dull", "f32", (32, 32)), Variant("sharp", "f32", (64, 64)))
    logits = [bench.logits(stage, "reduced") for stage in stages]
    temperature = fit_temperature(logits[0], val.labels)
    temperatures = (temperature, 1.0)
    confidence = np.sort(exit_curve(logits[0], logits[1], val.truth, temperatures=temperatures).threshold)
    threshold = float(confidence[len(confidence) // 2])
    deployment = Deployment(stages, default_serving(host), "reduced", threshold)
    from edgedistill.benchmarks.tuner.measure import Case

    answers, stage = bench.answers(Case(deployment, temperatures, (), "files"))
    expected, expected_stage = cascade_answers(
        logits[0], logits[1], (val.truth.task,) * 2, temperatures=temperatures, threshold=threshold
    )
    assert (answers == expected).all() and (stage == expected_stage).all()
    assert 0 < stage.mean() < 1


def test_bench_reports_who_answered_and_what_it_should_cost(run: Path, tmp_path: Path) -> None:
    folder = cascade_bundle(tmp_path / "c", threshold=0.5)
    photos = [path.read_bytes() for path in sorted((run / "data").rglob("*.jpg"))]
    classifier = Classifier(folder, cache_dir=False)
    record = cascade_record(classifier.network, photos)
    stages = [classifier.classify(photo).stage for photo in photos]
    assert record["shares"] == [round(stages.count(0) / len(stages), 4), round(stages.count(1) / len(stages), 4)]
    assert record["expected_ms"] == pytest.approx(
        record["stage_ms"][0] + record["shares"][1] * record["stage_ms"][1], abs=2e-3
    )
    row = {
        "candidate": "edgedistill",
        "precision": "f32",
        "scope": "files",
        "input": "val",
        "settings": {"cascade": record},
    }
    (note,) = cascade_notes([row, row])
    assert f"{record['expected_ms']:.2f} ms" in note
    spent = preparation_us(photos, SPEC, "reduced")
    assert spent["decode_us"] > 0 and spent["resize_us"] > 0


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("decode", ["reduced", "full"])
def test_stages_share_a_decoding_only_where_their_pixels_allow_it(
    tmp_path: Path, suffix: str, decode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"photo{suffix}"
    photograph(path, 1, 3)  # 160 x 150: k = 4 at 32 px, 2 at 64 and 70 px
    decoded = []
    original: Callable[..., Any] = images._decode

    def counting(*arguments: Any, **options: Any) -> Any:
        decoded.append(options.get("k", 1))
        return original(*arguments, **options)

    monkeypatch.setattr(images, "_decode", counting)
    specs = [InputSpec(height=size, width=size) for size in (32, 64, 70)]
    shared = EncodedImage(path, decode=decode, buffer=images.DecodeBuffer())
    found = [shared.pixels(spec) for spec in specs]
    count = len(decoded)
    assert count == (2 if suffix == ".jpg" and decode == "reduced" else 1)
    for spec, pixels in zip(specs, found, strict=True):
        assert np.array_equal(pixels, load_image(path, spec, decode=decode))


def test_a_cascade_in_batches_answers_as_one_image_at_a_time(run: Path, tmp_path: Path) -> None:
    folder = cascade_bundle(tmp_path / "c", threshold=0.45, slow_px=48)
    photos = sorted((run / "data").rglob("*.jpg"))
    classifier = Classifier(folder, cache_dir=False)
    one = [classifier.classify(path) for path in photos]
    with Engine(folder, batch=4, streams=1, cache_dir=False) as engine:
        many = list(engine.map(photos))
    assert {prediction.stage for prediction in one} == {0, 1}
    for a, b in zip(one, many, strict=True):
        assert (a.index, a.stage) == (b.index, b.stage)
        np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-5)


# ---- another machine ----


def test_settings_from_another_cpu_are_left_aside_with_a_warning(run: Path, capsys: pytest.CaptureFixture) -> None:
    openvino = run / "openvino"
    config = dataclasses.replace(
        read_deploy(openvino / "deploy.json"),
        latency=LatencySettings("int8", 1),
        throughput=ThroughputSettings("int8", 1, 1, 4, True),
        cpu="Another CPU @ 1 GHz",
    )
    write_deploy(openvino / "deploy.json", config)
    classifier = Classifier(openvino, cache_dir=False)
    assert classifier.precision == "f32"
    with Engine(openvino, cache_dir=False) as engine:
        assert (engine.precision, engine.batch) == ("f32", 1)
    message = capsys.readouterr().err
    assert "Another CPU @ 1 GHz" in message and "edgedistill tune" in message
    write_deploy(openvino / "deploy.json", dataclasses.replace(config, cpu=Host.here().cpu))
    with Engine(openvino, cache_dir=False) as engine:
        assert (engine.precision, engine.batch) == ("int8", 4)
    assert "measured on" not in capsys.readouterr().err
    old = {"openvino": "2021.4.0"}
    write_deploy(openvino / "deploy.json", dataclasses.replace(config, cpu=Host.here().cpu, versions=old))
    with Engine(openvino, cache_dir=False) as engine:
        assert engine.batch == 4
    assert "OpenVINO 2021.4" in capsys.readouterr().err


def test_settings_from_fewer_cores_leave_none_idle(run: Path, capsys: pytest.CaptureFixture) -> None:
    """The same processor with twice the cores: virtual machines and containers of one kind come in several sizes."""
    deploy, host = run / "openvino" / "deploy.json", Host.here()
    config = dataclasses.replace(
        read_deploy(deploy),
        latency=LatencySettings("int8", 1),
        throughput=ThroughputSettings("int8", 1, 1, 4),
        cpu=host.cpu,
        cores=host.cores + 1,
    )
    write_deploy(deploy, config)
    latency, throughput = settings_here(Bundle.load(run / "openvino"))
    assert latency == LatencySettings("int8") and throughput == ThroughputSettings("int8", batch=4)
    assert f"{host.cores + 1} cores, here {host.cores}" in capsys.readouterr().err
    for same in (host.cores, None):
        write_deploy(deploy, dataclasses.replace(config, cores=same))
        assert settings_here(Bundle.load(run / "openvino")) == (config.latency, config.throughput)
    assert capsys.readouterr().err == ""
    write_deploy(
        deploy, dataclasses.replace(config, latency=LatencySettings("int8"), throughput=ThroughputSettings("int8"))
    )
    assert settings_here(Bundle.load(run / "openvino"))[0].precision == "int8"
    assert capsys.readouterr().err == "", "nothing of it depends on the cores"
    deploy.write_text(json.dumps(json.loads(deploy.read_text()) | {"cores": 0}))
    with pytest.raises(ArtifactError, match="cores 0"):
        Bundle.load(run / "openvino")


def test_a_deployable_that_was_never_tuned_warns_nobody(run: Path, capsys: pytest.CaptureFixture) -> None:
    stage: Stage = read_deploy(run / "openvino" / "deploy.json").stages[0]
    write_deploy(run / "openvino" / "deploy.json", DeployConfig(stages=(stage,), cpu="Another CPU"))
    Classifier(run / "openvino", cache_dir=False)
    assert capsys.readouterr().err == ""


# ---- the training machine's side ----


def test_prepare_writes_all_that_the_target_needs(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    from edgedistill.export.prepare import PrepareSettings, prepare_candidates

    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    settings = PrepareSettings((run,), tmp_path / "bundle", with_images=True, int8=False)
    with pytest.raises(DataError, match=r"val images, expected 20 or more"):
        prepare_candidates(settings)
    assert not (tmp_path / "bundle").exists()
    monkeypatch.setattr(valset, "FEWEST", 5)
    folder = prepare_candidates(settings)
    assert {path.name for path in folder.iterdir()} >= {"stages", "deploy.json", "candidates.json", "val.csv", "val"}
    shutil.rmtree(run)
    val = open_val(find_students([folder]), None)
    assert len(val) == len((folder / "val-images.txt").read_text().splitlines()) >= 5
    assert Bundle.load(folder).config.throughput.precision == "f32"
    with pytest.raises(UsageError, match="--out"):
        PrepareSettings((run,), None)
    with pytest.raises(UsageError, match=r"no model\.pt"):
        prepare_candidates(PrepareSettings((tmp_path,), tmp_path / "again"))


def test_the_tuner_is_compared_with_settings_that_are_what_they_say(run: Path, tmp_path: Path) -> None:
    student, *_ = find_students([run])
    found = fixed_settings(student, tmp_path / "fixed", Host.here())
    assert len({one.deploy for one in found}) == len(found) == 5
    for one in found:
        config = read_deploy(one.deploy)
        assert Bundle.load(one.deploy).config.stages[0].sha256 == student.sha256
        if "f32" in one.name or "onnxruntime" in one.name:
            assert config.throughput.precision == "f32"
        if "int8" in one.name:
            assert config.throughput.precision == "int8"


def test_a_slow_stage_alone_is_served_as_its_cascade_serves_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", students={"fast": 0.4, "slow": 3.0})
    students = find_students([run])
    stages = tuple(
        Stage(one.model, one.sha256, one.spec, one.temperature, threshold, one.int8_sha256)
        for one, threshold in zip(students, (0.5, None), strict=True)
    )
    served = ThroughputSettings("int8", streams=1, threads=1, batch=2, later_batch=4, later_precision="f32")
    deploy = run / "openvino" / "deploy.json"
    write_deploy(deploy, DeployConfig(stages, LatencySettings(), served))
    slow = slow_stage("tuned", deploy, students, tmp_path / "fixed", Host.here())
    assert slow is not None and slow.kind == "slow-stage"
    alone = read_deploy(slow.deploy)
    assert [stage.sha256 for stage in alone.stages] == [students[1].sha256]
    assert alone.throughput == ThroughputSettings("f32", streams=1, threads=1, batch=2)
    write_deploy(deploy, DeployConfig(stages, LatencySettings(), served, decode="full"))
    whole = slow_stage("tuned", deploy, students, tmp_path / "fixed", Host.here())
    assert whole is not None and read_deploy(whole.deploy).decode == "full", "other pixels are another network"
    with pytest.raises(UsageError, match="none of the run's students"):
        slow_stage("tuned", deploy, students[:1], tmp_path / "fixed", Host.here())
    write_deploy(deploy, DeployConfig(stages[1:]))
    assert slow_stage("tuned", deploy, students, tmp_path / "fixed", Host.here()) is None


def test_tunings_are_judged_by_the_metric_that_they_were_tuned_for(tmp_path: Path) -> None:
    for name, metric in (("a/tuned", "accuracy"), ("b/tuned", "accuracy"), ("c/tuned", "macro-f1")):
        write_json(tmp_path / name / "tune.json", {"objective": {"metric": metric, "w": 0.7}}, format=TUNE_FORMAT)
    a, b, c = (tmp_path / name / "tuned" for name in "abc")
    assert list(tunings([a])) == ["tuned (tuned)"] and list(tunings([a, b])) == [f"tuned ({a})", f"tuned ({b})"]
    with pytest.raises(UsageError, match="twice"):
        tunings([a, a])
    with pytest.raises(UsageError, match="unlike things"):
        tunings([a, c])
    labels, answers = np.array([0] * 90 + [1] * 10), np.zeros((100, 1), np.int64)
    truth = Truth.single(labels, ("a", "b"))
    accuracy, margin = measured(answers, truth, "accuracy")
    assert (accuracy, margin) == (0.9, pytest.approx(0.0588))
    f1, margin = measured(answers, truth, "macro-f1")
    assert f1 == pytest.approx(macro_f1(np.eye(2)[answers[:, 0]], labels)) and 0.005 < margin < 0.03
