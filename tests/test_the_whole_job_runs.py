"""From a folder of photographs to answers, through the command line only, as a user does it."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgedistill import console
from edgedistill.artifacts import RunDir, read_array
from edgedistill.benchmarks.target import Target
from edgedistill.data.deal import SplitSettings
from edgedistill.data.manifest import Dataset, read_dataset
from edgedistill.errors import ImageError, UsageError
from edgedistill.pipeline import DataSettings, TeachSettings, check_command, freeze, record
from edgedistill.runtime.video import frames
from edgedistill.teacher import TeacherSettings

Cli = Callable[..., subprocess.CompletedProcess[str]]


def test_distill_leaves_every_file_of_the_design(tiny_run: Path) -> None:
    expected = (
        "config.json dataset.csv data_report.json model.pt student/metrics.jsonl student-hard-labels/model.pt"
        " teacher/fold-0/model.pt teacher/fold-1/model.pt teacher/oof.json soft_labels/meta.json soft_labels/ids.npy"
        " soft_labels/fold.npy soft_labels/label.log_probs.npy evaluation/evaluation.json openvino/deploy.json"
        " openvino/labels.txt openvino/stages/mobilenetv3_small_050/model.xml"
        " openvino/stages/mobilenetv3_small_050/model.onnx openvino/stages/mobilenetv3_small_050/certificate.json"
        " openvino/stages/mobilenetv3_small_050/certificate-test.json"
    ).split()
    assert [name for name in expected if not (tiny_run / name).is_file()] == []
    assert not list(tiny_run.rglob("*.tmp"))


def test_the_evaluation_compares_all_four(tiny_run: Path) -> None:
    evaluation = json.loads((tiny_run / "evaluation" / "evaluation.json").read_text())
    assert set(evaluation["models"]) == {"majority", "hard_label_student", "student", "teacher"}
    labels = read_array(tiny_run / "evaluation" / "test_labels.npy")
    for name, row in evaluation["models"].items():
        probabilities = read_array(tiny_run / "evaluation" / f"{name}.probs.npy")
        assert row["accuracy"] == pytest.approx((probabilities.argmax(1) == labels).mean())
        assert row["accuracy_ci95"][0] <= row["accuracy"] <= row["accuracy_ci95"][1]


def test_soft_labels_are_the_held_out_teachers(tiny_run: Path, photos: Path) -> None:
    """Each stored row equals what the teacher of its fold, and no other, says of that image now."""
    torch = pytest.importorskip("torch")
    from edgedistill.training.checkpoints import read_model
    from edgedistill.training.predict import predict_logits

    ids = read_array(tiny_run / "soft_labels" / "ids.npy")
    folds = read_array(tiny_run / "soft_labels" / "fold.npy")
    stored = read_array(tiny_run / "soft_labels" / "label.log_probs.npy")
    for fold in (0, 1):
        paths = np.array([str(photos / name) for name in ids[folds == fold]])
        distance = {}
        for judge in (0, 1):
            teacher = read_model(tiny_run / "teacher" / f"fold-{judge}" / "model.pt")
            logits = predict_logits(teacher.model, paths, teacher.input_spec, batch_size=8)
            log_probs = torch.log_softmax(torch.from_numpy(logits), dim=1).numpy()
            distance[judge] = np.abs(log_probs - stored[folds == fold]).max()
        assert distance[fold] < 1e-5 and distance[1 - fold] > 10 * distance[fold]


def test_predict_names_every_image_and_every_error(tiny_run: Path, photos: Path, tmp_path: Path, cli: Cli) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(photos / "disc", mixed)
    (mixed / "torn.jpg").write_bytes((mixed / "000.jpg").read_bytes()[:500])
    latin = os.fsencode(mixed) + b"/caf\xe9.jpg"  # a name that is no UTF-8
    shutil.copyfile(mixed / "001.jpg", latin)
    answers = tmp_path / "answers.csv"
    result = cli("predict", tiny_run / "openvino", mixed, photos / "bar" / "001.jpg", "--csv", answers, check=False)
    assert result.returncode == 1 and result.stdout.strip() == str(answers)
    rows = list(csv.DictReader(answers.open(errors="surrogateescape")))
    assert [row["label"] != "" for row in rows if os.fsencode(row["image"]) == latin] == [True]
    assert len(rows) == 33 and [Path(row["image"]).name for row in rows if row["error"]] == ["torn.jpg"]
    assert {row["label"] for row in rows if not row["error"]} <= {"bar", "disc"}


def test_a_model_of_the_run_answers_like_torch(tiny_run: Path) -> None:
    certificate = json.loads((tiny_run / "openvino/stages/mobilenetv3_small_050/certificate.json").read_text())
    assert certificate["verdict"] == "pass"
    names = [column["name"] for column in certificate["columns"]]
    assert names[:3] == ["torch", "onnxruntime", "ir-fp32"] and "python-runtime-files" in names


def test_bench_fps_and_report_finish_the_job(tiny_run: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "bench.json"
    options = ["--rounds", 1, "--seconds", 0.1, "--vs", "naive,onnxruntime", "--out", out, "--json"]
    record = json.loads(cli("bench-fps", tiny_run / "openvino", *options).stdout)
    assert record.items() <= json.loads(out.read_text()).items()
    assert {row["scope"] for row in record["results"]} == {"model", "frames", "files"}
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    page = Path(cli("report", run, "--bench", out).stdout.strip())
    text = page.read_text()
    assert "bar" in text and "disc" in text and "http://" not in text.replace("http://www.w3.org", "")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("distill", "--data", "nowhere", "--out", "x"), 2, "nowhere"),
        (("distill", "--data", "elpv"), 2, "--out"),
        (("distill", "--data", "elpv", "--out", "x", "--student", "mbv9"), 2, "mbv9"),
        (("distill", "--data", "elpv", "--out", "x", "--teacher", "effb99"), 2, "effb99"),
        (("distill", "--data", "elpv", "--out", "x", "--student-weights", "nowhere.pth"), 2, "nowhere.pth"),
        (("distill", "--data", "elpv", "--out", "x", "--epochs", "0"), 2, "epochs"),
        (("distill", "--data", "elpv", "--out", "x", "--soft-weight", "2"), 2, "soft_weight"),
        (("export-openvino", "nowhere.pt"), 1, "nowhere.pt"),
        (("export-openvino",), 2, "model.pt"),
        (("bench-fps", "nowhere"), 2, "nowhere"),
        (("bench-fps", "nowhere", "--scope", "x"), 2, "--scope"),
        (("predict", "nowhere", "a.jpg"), 1, "nowhere"),
        (("report", "nowhere"), 1, "nowhere"),
        (("check-data", "nowhere"), 2, "nowhere"),
    ],
)
def test_wrong_usage_is_one_clear_line(
    arguments: tuple[str, ...], code: int, words: str, tmp_path: Path, cli: Cli
) -> None:
    result = cli(
        *(str(tmp_path / "x") if part == "x" and arguments[0] == "distill" else part for part in arguments), check=False
    )
    assert result.returncode == code, result.stderr
    assert words in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "x").exists()


def test_a_second_run_into_the_same_folder_is_refused(
    tiny_run: Path, photos: Path, cli: Cli, tiny_options: list[str]
) -> None:
    before = (tiny_run / "model.pt").stat().st_mtime_ns
    result = cli("distill", "--data", photos, "--out", tiny_run, *tiny_options, check=False)
    assert result.returncode == 2 and "--resume" in result.stderr
    assert (tiny_run / "model.pt").stat().st_mtime_ns == before


def test_teaching_in_a_runs_folder_leaves_what_the_run_was_asked_for(
    tiny_run: Path, photos: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "dataset.csv"):
        shutil.copy(tiny_run / name, tmp_path / name)
    before = (tmp_path / "config.json").read_bytes()
    run = RunDir(tmp_path)
    settings = TeachSettings(
        data=DataSettings(str(photos), SplitSettings()), out=tmp_path, teacher=TeacherSettings(fold=0)
    )
    record(settings, run, read_dataset(run.dataset, data_root=photos), resume=True)
    assert (tmp_path / "config.json").read_bytes() == before


def test_resume_refuses_other_settings(tiny_run: Path, photos: Path, cli: Cli, tiny_options: list[str]) -> None:
    result = cli(
        "distill", "--data", photos, "--out", tiny_run, *tiny_options, "--teacher-lr", 0.5, "--resume", check=False
    )
    assert result.returncode == 1 and "lr" in result.stderr


def test_soft_labels_of_another_data_set_are_refused(
    tiny_run: Path, tmp_path: Path, cli: Cli, make_photos: Callable[..., Path], tiny_options: list[str]
) -> None:
    other = make_photos(tmp_path / "other", seed=5)
    arguments = ["--data", other, "--out", tmp_path / "run", *tiny_options, "--soft-labels", tiny_run / "soft_labels"]
    result = cli("distill", *arguments, check=False)
    assert result.returncode == 1 and "soft_labels" in result.stderr
    assert not (tmp_path / "run").exists()


def test_what_only_the_data_refuse_leaves_the_folder_free(
    photos: Path, tmp_path: Path, cli: Cli, tiny_options: list[str]
) -> None:
    arguments = ["distill", "--data", photos, "--out", tmp_path / "x", *tiny_options]
    for wrong, words in (("--soft-label-store=top-k:2", "has 2 classes"), ("--oversample=cat=3", "cat")):
        extra = [wrong, "--no-balanced"] if "oversample" in wrong else [wrong]
        result = cli(*arguments, *extra, check=False)
        assert result.returncode == 2 and words in result.stderr, result.stderr
        assert not (tmp_path / "x").exists()
    # Which images are tested is known after the split alone: here, that some of the labelled ones are.
    result = cli(*arguments, "--unlabelled", photos, check=False)
    assert result.returncode == 1 and "are in the test split" in result.stderr
    assert not (tmp_path / "x").exists()


def test_dry_run_writes_nothing(photos: Path, tmp_path: Path, cli: Cli, tiny_options: list[str]) -> None:
    plan = json.loads(
        cli("distill", "--data", photos, "--out", tmp_path / "x", *tiny_options, "--dry-run", "--json").stdout
    )
    assert plan["splits"] == {"train": 36, "val": 8, "test": 16}
    assert [step["step"].split(",")[0] for step in plan["steps"]] == ["2 teachers", "student", "hard-label student"]
    assert all(step["minutes"] >= 0 and step["memory_mib"] > 0 for step in plan["steps"])
    assert not (tmp_path / "x").exists()


def test_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console.out.print(
        console.table("of [bold]", ("class", "images"), [("[unknown]", 3), ("km[/h]", 4), ("a [b] c", 5)])
    )
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("of [bold]", "[unknown]", "km[/h]", "a [b] c"))


def test_the_torch_peer_is_the_network_that_was_exported(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run / "openvino", run / "openvino-lcnet")
    (run / "model.pt").write_bytes(b"the first student")
    assert Target.open(run / "openvino-lcnet").checkpoint is None
    shutil.copyfile(tiny_run / "model.pt", run / "model-lcnet.pt")
    assert Target.open(run / "openvino-lcnet").checkpoint == run / "model-lcnet.pt"
    assert Target.open(tiny_run / "openvino").checkpoint == tiny_run / "model.pt"


@pytest.mark.parametrize("source", ["99999999999", "a" * 300])
def test_sources_that_cannot_be_are_errors(source: str) -> None:
    with pytest.raises(ImageError, match=r"camera 99999999999: no camera|no name of a file"):
        frames(source)


def test_more_pixels_than_any_stage_reads_are_not_promised() -> None:
    with pytest.raises(UsageError, match="max_pixels=300000000, expected 1 to 100000000"):
        DataSettings("photos", SplitSettings(), 300_000_000)
    assert check_command(DataSettings("photos", SplitSettings(), 1000)).endswith("photos --max-pixels 1000")


def test_of_two_runs_begun_in_one_folder_the_second_changes_nothing(photos: Path, tmp_path: Path) -> None:
    settings, run = DataSettings(str(photos), SplitSettings()), RunDir(tmp_path / "run")

    def first(_: Dataset) -> None:  # between the second one's look at the folder and its writing
        if not run.dataset.exists():
            freeze(settings, run, resume=False)

    with pytest.raises(UsageError, match="holds a run already"):
        freeze(dataclasses.replace(settings, split=SplitSettings(seed=1)), run, resume=False, refuse=first)
    assert read_dataset(run.dataset).hash == freeze(settings, RunDir(tmp_path / "alone"), resume=False).hash
