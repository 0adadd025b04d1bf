"""The training options of ``distill`` and ``teach``, declared once: each is a flag there and a field of the settings.

Nothing heavy is imported here: ``--help`` answers at once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer

Owner = Literal["both", "each", "student", "machine"]


@dataclass(frozen=True)
class TrainingOption:
    """One flag. ``field``: of TrainSettings or StudentSettings. A ``default`` of None leaves the settings' own.

    ``owner``: 'both', one flag for student and teachers, with --teacher-NAME where the teachers are to differ; 'each',
    the student's flag and --teacher-NAME beside it; 'student', distill alone; 'machine', where it runs, one for all.
    ``teacher_help``: what --help says of --teacher-NAME; without it that flag works but is not listed.
    """

    name: str
    type: Any
    help: str
    owner: Owner
    field: str = ""
    default: Any = None
    teacher_help: str | None = None
    declarations: tuple[str, ...] = ()

    @property
    def settings_field(self) -> str:
        return self.field or self.name

    @property
    def twin(self) -> str | None:
        """The parameter for the teachers alone."""
        return f"teacher_{self.name}" if self.owner in ("both", "each") else None


@dataclass(frozen=True)
class TrainingValues:
    """Fields of the student's and of the teachers' settings that the command line decides."""

    student: dict[str, Any]
    teacher: dict[str, Any]


def _both(name: str, type: Any, default: Any, help: str, **more: Any) -> TrainingOption:
    return TrainingOption(name, type, help, "both", default=default, **more)


def _each(name: str, type: Any, help: str, **more: Any) -> TrainingOption:
    return TrainingOption(name, type, help, "each", **more)


def _student(name: str, type: Any, help: str, **more: Any) -> TrainingOption:
    return TrainingOption(name, type, help, "student", **more)


def _machine(name: str, type: Any, default: Any, help: str, **more: Any) -> TrainingOption:
    return TrainingOption(name, type, help, "machine", default=default, **more)


TRAINING_OPTIONS: tuple[TrainingOption, ...] = (
    _each(
        "epochs",
        int,
        "Student's epochs before the averaged ones (default: 20).",
        teacher_help="Epochs of each teacher, always all of them (default: 10).",
    ),
    _each("batch_size", int, "Student's batch (default: 256).", teacher_help="Teacher's batch (default: 32)."),
    _each(
        "lr",
        float,
        "Student's peak learning rate (default: 0.002).",
        teacher_help="Teacher's peak learning rate (default: 0.001).",
    ),
    _both("optimizer", str, "radam", "radam, adamw or sgd."),
    _both("warmup_epochs", float, 0.0, "Epochs in which the learning rate rises."),
    _both("grad_clip", float, None, "Largest norm of a gradient (default: no limit)."),
    _student("soft_weight", float, "Share of the soft label in the target (default: 0.2)."),
    _student("loss", str, "ce, kl or js against the soft labels (default: ce)."),
    _student("soft_temperature", float, "Temperature of the soft labels (default: 1)."),
    _student("extra_epochs", int, "Last epochs, whose weights are averaged (default: 4)."),
    _student("final_data", str, "Last epochs on: train (default), or train+val."),
    _each("cutmix", float, "Share of batches with CutMix (default: 0.5).", field="cutmix_probability"),
    _each("balanced", bool, "Draw every class equally often for the student.", field="balanced_sampling", default=True),
    _both("augment", str, "light", "none, light (crop, flip) or standard (also colour, affine)."),
    _both(
        "any_way_up",
        bool,
        False,
        "The subject has no up side: all flips and quarter turns.",
        declarations=("--any-way-up",),
    ),
    _both("resize", str, "squash", "squash, or center-crop (throws the borders away)."),
    _machine("seed", int, 0, "Seed of splits, weights and augmentation."),
    _machine("device", str, "auto", "auto, cpu or cuda."),
    _machine("precision", str, "auto", "Training in auto, f32 or bf16."),
    _machine("compile", bool, False, "torch.compile the networks.", declarations=("--compile",)),
    _machine("workers", int, None, "Loader processes (default: chosen for the device)."),
    _machine("cache_gib", float, None, "Memory for prepared images (default: half of what is free)."),
    _machine("checkpoint_minutes", float, 5.0, "The most work that a kill may cost."),
)


def takes_training_options(*, student: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command with the parameter ``training: TrainingValues`` gets the flags above in its place.

    ``student`` False (``teach``): without the student's own, but with the teachers'.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters = _parameters(student=student)
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "training"]

        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            given = {parameter.name: values.pop(parameter.name) for parameter in parameters}
            command(**values, training=_split(given))

        required = [p.replace(kind=p.KEYWORD_ONLY) for p in own]
        wrapper.__signature__ = inspect.Signature([*required, *parameters])  # type: ignore[attr-defined]
        return wrapper

    return decorate


def _parameters(*, student: bool) -> list[inspect.Parameter]:
    found = []
    for option in TRAINING_OPTIONS:
        if student or option.owner in ("both", "machine"):
            found.append(_parameter(option.name, option, option.default, option.help, option.declarations))
        if option.twin is not None:
            flag = option.name.replace("_", "-")
            text = option.teacher_help or f"--{flag} for the teachers alone."
            hidden = option.teacher_help is None
            found.append(_parameter(option.twin, option, None, text, (), hidden=hidden))
    return found


def _parameter(
    name: str, option: TrainingOption, default: Any, text: str, declarations: tuple[str, ...], *, hidden: bool = False
) -> inspect.Parameter:
    kind = option.type if default is not None else option.type | None
    annotation = Annotated[kind, typer.Option(*declarations, help=text, hidden=hidden)]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _split(given: dict[str, Any]) -> TrainingValues:
    """What was given, by field. A flag for both reaches the teachers unless they have one of their own."""
    student, teacher = {}, {}
    for option in TRAINING_OPTIONS:
        field, value = option.settings_field, given.get(option.name)
        if value is not None:
            student[field] = value
            if option.owner in ("both", "machine"):
                teacher[field] = value
        if option.twin is not None and given[option.twin] is not None:
            teacher[field] = given[option.twin]
    return TrainingValues(student, teacher)
