"""What --help says is what happens: defaults, exit codes, one implementation under two names."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgedistill import cli, pipeline
from edgedistill.artifacts import RUN_FORMAT, RunDir, read_json, write_json
from edgedistill.data.deal import SplitSettings
from edgedistill.data.manifest import Dataset
from edgedistill.options import TRAINING_OPTIONS
from edgedistill.student import StudentSettings
from edgedistill.teacher import TeacherSettings

STUDENT = {
    "epochs": "epochs",
    "batch_size": "batch_size",
    "lr": "lr",
    "soft_weight": "soft_weight",
    "loss": "loss",
    "soft_temperature": "soft_temperature",
    "extra_epochs": "extra_epochs",
    "extra_lr": "extra_lr",
    "cutmix": "cutmix_probability",
    "cutmix_alpha": "cutmix_alpha",
    "mixup_alpha": "mixup_alpha",
}
TEACHER = {"teacher_epochs": "epochs", "teacher_batch_size": "batch_size", "teacher_lr": "lr"}


def promised_default(command: Callable[..., Any], option: str) -> str:
    annotation = inspect.signature(command, eval_str=True).parameters[option].annotation
    text = annotation.__metadata__[0].help
    found = re.search(r"\(default: ([^)]*)\)", text)
    assert found, f"--{option}: its help names no default: {text}"
    return found.group(1)


@pytest.mark.parametrize(("option", "field"), STUDENT.items())
def test_the_help_names_the_students_defaults(option: str, field: str) -> None:
    assert (
        promised_default(cli.distill, option) == f"{getattr(StudentSettings(), field):g}" if field != "loss" else "ce"
    )


@pytest.mark.parametrize("command", [cli.distill, cli.teach])
@pytest.mark.parametrize(("option", "field"), TEACHER.items())
def test_the_help_names_the_teachers_defaults(command: Callable[..., Any], option: str, field: str) -> None:
    assert promised_default(command, option) == f"{getattr(TeacherSettings(), field):g}"


@pytest.mark.parametrize(
    ("option", "settings", "field"),
    [
        ("balanced", StudentSettings, "balanced_sampling"),
        ("optimizer", StudentSettings, "optimizer"),
        ("warmup_epochs", StudentSettings, "warmup_epochs"),
        ("checkpoint_minutes", TeacherSettings, "checkpoint_minutes"),
        ("image_size", StudentSettings, "image_size"),
        ("augment", StudentSettings, "augment"),
        ("resize", StudentSettings, "resize"),
        ("final_lr", StudentSettings, "final_lr"),
        ("deterministic", TeacherSettings, "deterministic"),
        ("tensorboard", StudentSettings, "tensorboard"),
    ],
)
def test_flags_and_settings_have_the_same_defaults(option: str, settings: Any, field: str) -> None:
    assert inspect.signature(cli.distill).parameters[option].default == getattr(settings(), field)


def test_every_setting_of_a_training_has_a_flag() -> None:
    named = {"name": "student", "weights": "student_weights", "distillation": "no_distillation"}
    for settings, role in ((StudentSettings, "student"), (TeacherSettings, "teacher")):
        flags = set(inspect.signature(cli.distill).parameters) | set(inspect.signature(cli.teach).parameters)
        of_field = {option.settings_field: option for option in TRAINING_OPTIONS}
        for field in dataclasses.fields(settings):
            option = of_field.get(field.name)
            flag = named.get(field.name, field.name).replace("student", role) if option is None else option.name
            own = option.twin if option is not None and role == "teacher" else None
            assert flag in flags and (own is None or own in flags), f"{role}: {field.name}"


@pytest.mark.parametrize("name", ["distill", "export-openvino", "bench-fps"])
def test_programs_and_sub_commands_are_one_implementation(name: str) -> None:
    registered = {
        command.name or command.callback.__name__: command.callback for command in cli.app.registered_commands
    }
    assert registered[name] is getattr(cli, name.replace("-", "_"))


def test_a_run_keeps_every_command_that_asked_for_more(
    tiny_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, data, teacher = RunDir(tmp_path), pipeline.DataSettings("photos", SplitSettings()), TeacherSettings()

    def given(line: str, *, resume: bool = True) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [f"/usr/bin/{line.split()[0]}", *line.split()[1:]])
        settings = (
            pipeline.TeachSettings(data, run.root, teacher)
            if " teach " in line
            else pipeline.DistillSettings(data, run.root, teacher, StudentSettings(epochs=line.count("x")))
        )
        pipeline.record(settings, run, tiny_dataset, resume=resume)
        return read_json(run.config, format=RUN_FORMAT)

    first, second = "edgedistill teach --data photos --out run", "distill --data photos --out run --resume --epochs x"
    assert given(first, resume=False)["commands"] == [first]
    assert given(f"{first} --resume")["commands"] == [first]
    both = given(second)
    assert both["commands"] == [first, second] and both["settings"]["student"]["epochs"] == 1
    assert given(second.replace(" --resume", ""))["commands"] == [first, second]
    more = given("__main__.py distill --data photos --out run --epochs xx --resume")
    assert more["commands"][2:] == ["edgedistill distill --data photos --out run --epochs xx --resume"]
    older = {key: value for key, value in more.items() if key != "commands"} | {"command": first}
    write_json(run.config, older, format=RUN_FORMAT)
    assert given(second)["commands"] == [first, second]


def test_every_command_has_help(cli: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    for command in ("distill", "teach", "export-openvino", "bench-fps", "predict", "check-data", "report", "doctor"):
        assert "--json" in cli(command, "--help").stdout
