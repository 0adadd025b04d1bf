"""No option is passed over in silence, and what is refused is refused before anything is written."""

import dataclasses
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import typer

from edgedistill import cli, pipeline
from edgedistill.artifacts import RUN_FORMAT, RunDir, read_json
from edgedistill.data.deal import SplitSettings
from edgedistill.data.label_columns import LabelColumns
from edgedistill.errors import DataError, EdgedistillError, UsageError
from edgedistill.options import TRAINING_OPTIONS
from edgedistill.pipeline import DataSettings, DistillSettings, TeachSettings
from edgedistill.runtime import predict
from edgedistill.student import StudentSettings
from edgedistill.tasks import Head
from edgedistill.teacher import TeacherSettings

VIT = "test_vit@160"  # built for one size


@pytest.fixture
def asked(monkeypatch):
    """The settings that a command line makes, caught before the run."""

    def build(*arguments, command="distill"):
        caught = []
        monkeypatch.setattr(pipeline, command, lambda settings, **_: caught.append(settings) or sys.exit(0))
        with pytest.raises(SystemExit):
            cli.app([command, "--data", "x", "--out", "y", *arguments], standalone_mode=False)
        return caught[0]

    return build


@pytest.mark.parametrize(
    ("command", "wrong", "words"),
    [
        ("distill", f"--student mbv3s050,{VIT} --test-size 192", "--test-size 192: test_vit is built for the size"),
        (
            "distill",
            f"--teacher mbv3s050,{VIT} --teacher-test-size 192",
            "--teacher-test-size 192: test_vit is built for the size",
        ),
        ("distill", "--student test_vit@100", "test_vit cannot look at images of 100 pixels (Input height"),
        (
            "distill",
            "--teacher inception",
            "inception cannot look",
        ),
        ("distill", "--student-weights nowhere.pt", "--student-weights nowhere.pt: no such file"),
        ("distill", "--device cuda", "finds no CUDA device"),
        ("distill", "--student-weights WEIGHTS", "not the weights of mobilenetv3_small_050"),
        ("distill", "--final-data train+val --extra-epochs 0", "give --extra-epochs 4, or --final-data train"),
        ("distill", "--oversample cat=3 --no-balanced", "cat"),
        ("distill", "--processes 5 --dry-run", "batches of 8 for 5 processes; expected 10 or more"),
        ("distill", "--processes 2 --live-teachers --dry-run", "--live-teachers judge in one process"),
        ("teach", "--fold 7", "--fold 7: the data set has folds 0 to 1"),
    ],
)
def test_a_refusal_comes_before_anything_is_written_and_a_dry_run_has_it_too(
    photos, tmp_path, tiny_options, command, wrong, words
):
    if "cuda" in wrong and torch.cuda.is_available():
        pytest.skip("a CUDA device is there")
    torch.save({"conv_stem.weight": torch.zeros(1)}, tmp_path / "weights.pt")
    wrong = wrong.replace("WEIGHTS", str(tmp_path / "weights.pt")).split()
    options = tiny_options if command == "distill" else "--teacher mbv3s050 --teacher-weights none --folds 2".split()
    line = [command, "--data", str(photos), "--out", str(tmp_path / "run"), *options, *wrong]
    for more in ([], ["--dry-run"]) if command == "distill" else ([],):
        with pytest.raises(EdgedistillError) as refused:
            cli.app([*line, *more], standalone_mode=False)
        assert words in str(refused.value)
        assert not (tmp_path / "run").exists()


def test_a_dry_run_into_a_folder_that_holds_a_run_is_refused_as_the_run_is(tmp_path, photos, tiny_options):
    (tmp_path / "dataset.csv").write_text("of another run")
    with pytest.raises(UsageError, match="holds a run already; go on with --resume"):
        cli.app(["distill", "--data", str(photos), "--out", str(tmp_path), *tiny_options, "--dry-run"], False)


def test_soft_labels_whose_teachers_are_gone_are_refused_before_the_run_begins(tiny_dataset, taught_run, tmp_path):
    shutil.copytree(taught_run.soft_labels, tmp_path / "soft_labels")

    def settings(**student):
        return DistillSettings(
            data=DataSettings("x", SplitSettings()),
            out=tmp_path / "run",
            teacher=TeacherSettings(),
            student=StudentSettings(**student),
            soft_labels=tmp_path / "soft_labels",
        )

    pipeline._refuse_lesson(settings(), tiny_dataset, tmp_path)
    with pytest.raises(EdgedistillError, match="does not lie in"):
        pipeline._refuse_lesson(settings(live_teachers=True), tiny_dataset, tmp_path)
    without_val = dataclasses.replace(
        tiny_dataset, splits=np.where(tiny_dataset.splits == "val", "test", tiny_dataset.splits)
    )
    with pytest.raises(UsageError, match="no val split; give it one with --val-fraction"):
        pipeline._refuse_lesson(settings(calibrate_soft_labels=True), without_val, tmp_path)


@pytest.mark.parametrize(
    ("asked_for", "doubt"),
    [
        ({"fixres_epochs": 3}, "--fixres-epochs changes nothing without --test-size"),
        ({"lr_decay": 0.9}, "--lr-decay changes nothing without --schedule exponential"),
        (
            {"focal_gamma": 1.0, "focal_alpha": 0.5},
            "--focal-gamma, --focal-alpha change nothing without --hard-loss focal",
        ),
        ({"class_weight_beta": 0.9}, "--class-weight-beta changes nothing without --class-weights class-balanced"),
        (
            {"augment": "none", "crop_min": 0.5, "horizontal_flip": False, "color_jitter": 0.4},
            "--crop-min, --no-horizontal-flip, --color-jitter change nothing without --augment light or standard",
        ),
        ({"augment": "standard", "color_jitter": 0.1}, "--color-jitter changes nothing without a value above 0.2"),
        ({"cutmix_probability": 0.0, "plain_epochs": 2}, "--plain-epochs changes nothing without --cutmix or --mixup"),
        ({"swa_lr": 0.2}, "--swa-lr changes nothing without --swa-start"),
        (
            {
                "epochs": 4,
                "extra_epochs": 0,
                "class_weights": "inverse",
                "balanced_sampling": False,
                "defer_weights": 0.8,
            },
            "--class-weights, --defer-weights change nothing without epochs after that share of all 4",
        ),
        ({"epochs": 2, "extra_epochs": 0, "plain_epochs": 2}, "--plain-epochs 2 of 2 epochs leave none that mixes"),
        ({"unlabelled_share": 0.3}, "--unlabelled-share changes nothing without photographs: give --unlabelled"),
        ({"soft_weight": 0.0}, "--soft-weight 0 leaves the soft labels no say; --no-distillation"),
        (
            {"soft_weight": 1.0, "hard_loss": "focal"},
            "--hard-loss focal: for labels, and this student learns from soft",
        ),
        ({"soft_weight": 1.0, "label_smoothing": 0.1}, "--label-smoothing 0.1: for labels"),
    ],
)
def test_an_option_that_changes_nothing_is_told_with_what_it_needs(asked_for, doubt):
    (told,) = StudentSettings(**asked_for).doubts()
    assert told.startswith(doubt)


@pytest.mark.parametrize(
    "asked_for",
    [
        {},
        {"test_size": 256, "fixres_epochs": 3},
        {"schedule": "exponential", "lr_decay": 0.9},
        {"hard_loss": "focal", "focal_gamma": 1.0},
        {"crop_min": 0.5, "color_jitter": 0.4},
        {"plain_epochs": 2},
        {"epochs": 5, "extra_epochs": 0, "class_weights": "inverse", "balanced_sampling": False, "defer_weights": 0.8},
        {"unlabelled": "photos", "unlabelled_share": 0.3},
        {"soft_weight": 1.0, "hard_loss": "bce"},  # sigmoids learn from soft labels as well
        {"soft_weight": 1.0, "loss": "kl", "soft_temperature": 2.0},
        {"final_data": "train+val"},
        {"final_data": "train+val", "extra_epochs": 0, "swa_start": 0.5},
    ],
)
def test_an_option_that_is_heeded_is_not_doubted(asked_for):
    assert StudentSettings(**asked_for).doubts() == []


def test_views_that_training_never_shows_label_nothing():
    for never in ({"horizontal_flip": False}, {"augment": "none"}):
        with pytest.raises(UsageError, match="no flip where training never flips"):
            TeacherSettings(tta="flip", **never)


def test_a_column_without_a_value_in_training_is_refused(heads_dataset):
    values = heads_dataset.values.copy()
    pipeline.refuse_for(dataclasses.replace(heads_dataset, values=values), [])
    values[heads_dataset.rows("train"), 3] = np.nan
    with pytest.raises(DataError, match="column 'size': no training image has a value"):
        pipeline.refuse_for(dataclasses.replace(heads_dataset, values=values), [])


def test_the_advice_judges_the_data_as_the_run_does(tmp_path):
    labels = LabelColumns(attributes=("kind", "side"), regression=("years",), regression_weight=0.3, missing="ignore")
    settings = DataSettings("my photos.csv", SplitSettings(folds=2, small_classes="drop"), labels=labels)
    command = pipeline.check_command(settings)
    assert command == (
        "edgedistill check-data 'my photos.csv' --label-columns kind,side --regression years --regression-weight 0.3 "
        "--missing-labels ignore --folds 2 --small-classes drop"
    )
    program = typer.main.get_command(cli.app)
    known = {flag for option in program.commands["check-data"].params for flag in option.opts}
    assert {word for word in command.split() if word.startswith("--")} <= known
    assert pipeline.check_command(DataSettings("x", SplitSettings())) == "edgedistill check-data x"
    assert LabelColumns(multi_label=True).flags() == ["--multi-label"]


def test_a_dry_run_counts_what_the_teachers_are_asked(photos, tmp_path, tiny_options, request):
    (tmp_path / "more").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / "more" / f"{number}.png"), pixels)
    more = ["--unlabelled", str(tmp_path / "more"), "--calibrate-soft-labels", "--no-baseline", "--dry-run", "--json"]
    done = request.getfixturevalue("cli")("distill", "--data", photos, "--out", tmp_path / "x", *tiny_options, *more)
    plan = json.loads(done.stdout)
    steps = {step["step"]: step["images"] for step in plan["steps"]}
    assert steps["labelling the unlabelled"] == 2 * 3  # folds times images
    assert steps["calibrating the teachers"] == 2 * plan["splits"]["val"]


def warnings_of(settings, capsys):
    capsys.readouterr()
    pipeline.refuse_early([settings.student, settings.teacher])
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]


def test_one_flag_for_student_and_teachers_is_told_once_and_only_where_nobody_heeds_it(asked, capsys):
    tiny = "--student mbv3s050 --teacher mbv3s050".split()
    (told,) = warnings_of(asked(*tiny, "--augment", "none", "--crop-min", "0.5"), capsys)
    assert "mbv3s050: --crop-min changes nothing" in told
    focal = ("--hard-loss", "focal", "--focal-gamma", "3")
    assert warnings_of(asked(*tiny, *focal, "--teacher-hard-loss", "ce"), capsys) == []
    (told,) = warnings_of(asked(*tiny, "--teacher-focal-gamma", "3"), capsys)
    assert "--teacher-focal-gamma changes nothing without --teacher-hard-loss focal" in told


def test_what_only_teachers_need_is_told_where_none_are_trained(asked, capsys):
    asked("--no-distillation", "--soft-weight", "0.5", "--teacher", "effb0", "--tta", "flip", "--teacher-vote", "soft")
    err = capsys.readouterr().err
    assert "--teacher, --teacher-vote, --tta, --soft-weight change nothing: --no-distillation trains no" in err
    asked("--soft-labels", "other", "--teacher-lr", "0.1", "--soft-weight", "0.5")
    assert "--teacher-lr changes nothing: no teachers are trained, since --soft-labels other" in capsys.readouterr().err
    asked("--no-distillation", "--epochs", "3", "--augment", "standard")
    assert capsys.readouterr().err == ""
    settings = asked(
        "--recipe", "function-matching", "--no-distillation"
    )  # what the recipe asks of teachers is nobody's mistake
    assert capsys.readouterr().err == ""
    assert not settings.student.live_teachers and settings.student.epochs == 100


def test_a_resumed_run_says_that_its_split_stays(tiny_dataset, tmp_path, capsys):
    run = RunDir(tmp_path)

    def settings(folds):
        data = DataSettings("photos", SplitSettings(folds=folds))
        return TeachSettings(data=data, out=tmp_path, teacher=TeacherSettings())

    pipeline.record(settings(2), run, tiny_dataset, resume=False)
    pipeline.record(settings(2), run, tiny_dataset, resume=True)
    assert capsys.readouterr().err == ""
    pipeline.record(settings(4), run, tiny_dataset, resume=True)
    assert "stays as it was made, with folds=2 (now 4); another --out splits anew" in capsys.readouterr().err
    assert read_json(run.config, format=RUN_FORMAT)["settings"]["data"]["split"]["folds"] == 2


@pytest.mark.parametrize("command", ["distill", "teach"])
def test_all_options_of_teachers_can_be_listed_and_help_says_how(command):
    code = (
        "import sys\nfrom edgedistill import cli\n"
        "try:\n    cli.app(sys.argv[1:])\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules\n"
    )
    line = [sys.executable, "-c", code, command]
    listed = subprocess.run([*line, "--help-teacher"], capture_output=True, text=True, check=True).stdout
    for option in TRAINING_OPTIONS:
        flag = option.name.replace("_", "-")
        assert (f"  --teacher-{flag}" in listed) == (option.twin is not None)
        assert (f" --{flag}," in listed.replace("\n", ",") or f" --{flag} " in listed) or option.owner != "both"
    said = subprocess.run([*line, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--help-teacher lists" in " ".join(said.split())
    assert ("(Teachers too.)" in said) == (command == "distill")


def test_an_interrupt_is_told_with_the_way_on(monkeypatch, capsys):
    program = typer.Typer(pretty_exceptions_enable=False)

    @program.command()
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["interrupted"])
    with pytest.raises(SystemExit) as stopped:
        cli._run(program)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "interrupted; distill, teach and tune go on with --resume\n"


def test_top_k_counts_for_each_head():
    heads = (Head("hue", "softmax", ("red", "green", "blue")), Head("marks", "sigmoid", ("dot", "bar")))
    answers = [SimpleNamespace(value=None, label="blue", probability=0.6), SimpleNamespace(value=None, accepted=(1,))]
    shares = np.array([0.1, 0.3, 0.6, 0.2, 0.7], np.float32)
    prediction = SimpleNamespace(name="x.jpg", error=None, index=2, heads=answers, probabilities=shares)
    engine = SimpleNamespace(labels=(), heads=heads, multi_label=False)
    assert predict._answer(prediction, engine, 1).labels == ("hue=blue", "marks=bar")
    best = predict._answer(prediction, engine, 2)
    assert best.labels == ("hue=blue", "hue=green", "marks=bar", "marks=dot")
    assert best.probabilities == pytest.approx((0.6, 0.3, 0.7, 0.2))
