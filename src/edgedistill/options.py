"""Options that several commands have, declared once: training options, each a flag and a field of the settings, and the
label columns of a CSV.

Nothing heavy is imported here: ``--help`` answers at once.
"""

from __future__ import annotations

import copy
import functools
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer

Owner = Literal["both", "each", "student", "teacher", "machine"]


@dataclass(frozen=True)
class TrainingOption:
    """One flag. ``field``: of StudentSettings or TeacherSettings. A ``default`` of None leaves the settings' own.

    ``owner``: 'both', one flag for student and teachers, with --teacher-NAME where the teachers are to differ; 'each',
    the student's flag and --teacher-NAME beside it; 'student', distill alone; 'teacher', the teachers alone; 'machine',
    where it runs, one for all.
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


def _teacher(name: str, type: Any, default: Any, help: str, **more: Any) -> TrainingOption:
    return TrainingOption(name, type, help, "teacher", default=default, **more)


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
    _each(
        "test_size",
        int,
        "Student is fine-tuned, evaluated and deployed at this size after training, pixels.",
        teacher_help="Teachers are fine-tuned and label at this size after training, pixels.",
    ),
    _both("fixres_epochs", int, 1, "Epochs of classifier and last batch-norm at the test size, where there is one."),
    _teacher("tta", str, "", "Teachers answer for the mean of views: flip, five-crop, scales."),
    _teacher("soft_label_store", str, "float32", "Soft labels on disk: float32, float16, or top-k:N of each image."),
    _both("optimizer", str, "radam", "radam, adam, adamw, sgd, ranger, any of timm's, lookahead_NAME."),
    _both("warmup_epochs", float, 0.0, "Epochs in which the learning rate rises."),
    _both("schedule", str, "cosine", "Learning rate: cosine per step, exponential per epoch, or constant."),
    _both("lr_decay", float, 0.995, "Factor per epoch of the exponential schedule."),
    _both("final_lr", float, 0.01, "Where the cosine schedule ends, a share of the peak."),
    _both("grad_clip", float, None, "Largest norm of a gradient (default: no limit)."),
    _both("label_smoothing", float, 0.0, "Share of the label that is spread over all classes."),
    _both("hard_loss", str, "ce", "Against labels: ce, focal, ldam, soft-f1 or bce (one sigmoid per class)."),
    _both("focal_gamma", float, 2.0, "Focal loss: exponent on the share of the error."),
    _both("focal_alpha", float, 1.0, "Focal loss: factor."),
    _both("class_weights", str, "none", "Of the loss: none, inverse (frequency) or class-balanced."),
    _both("class_weight_beta", float, 0.999, "Of class-balanced weights."),
    _both("defer_weights", float, 0.0, "Share of the epochs before class weights count (DRW)."),
    _student("soft_weight", float, "Share of the soft label in the target (default: 0.2)."),
    _student("loss", str, "ce, kl or js against the soft labels (default: ce)."),
    _student("soft_temperature", float, "Temperature of the soft labels (default: 1)."),
    _student(
        "live_teachers",
        bool,
        "Held-out teachers judge the student's own augmented, mixed view; then --loss kl --soft-weight 1"
        " --soft-temperature 2 unless given.",
        default=False,
    ),
    _student(
        "views",
        int,
        "Augmented views per image, drawn and labelled once by held-out teachers; the student sees only these, and the"
        " loss has --live-teachers' defaults.",
        default=0,
    ),
    _student("calibrate_soft_labels", bool, "Each teacher at the temperature that fits val.", default=False),
    _student(
        "drop_noisy",
        float,
        "Leave out at most this share of the training images: labels that look wrong.",
        default=0.0,
    ),
    _student(
        "unlabelled", str, "Folder of images and videos without labels, which all teachers label together.", default=""
    ),
    _student("unlabelled_share", float, "Unlabelled images' share of each batch.", default=0.5),
    _student(
        "unlabelled_min_confidence",
        float,
        "Least probability of the teachers' answer for an unlabelled image to be used.",
        default=0.5,
    ),
    _student(
        "unlabelled_class_cap",
        float,
        "Most unlabelled images of one class, in times the mean over classes.",
        default=3.0,
    ),
    _student("unlabelled_frame_step", int, "Every so many frames of a video become images.", default=30),
    _each("extra_epochs", int, "Last epochs, whose weights are averaged (default: 4)."),
    _each("extra_lr", float, "Their constant rate, a share of the peak (default: 0.1)."),
    _each("swa_start", float, "SWA from this share of the epochs on, in place of extra epochs (default: none)."),
    _each("swa_lr", float, "SWA's constant rate, a share of the peak (default: 0.5)."),
    _each("ema_decay", float, "Average the weights over steps, in place of extra epochs (default: none)."),
    _student("final_data", str, "Last epochs on: train (default), or train+val."),
    _each("cutmix", float, "Share of batches with CutMix (default: 0.5).", field="cutmix_probability"),
    _each("cutmix_alpha", float, "CutMix: area from Beta(alpha, alpha) (default: 1)."),
    _each("mixup", float, "Share of batches with MixUp (default: 0).", field="mixup_probability"),
    _each("mixup_alpha", float, "MixUp: share from Beta(alpha, alpha) (default: 1)."),
    _each("plain_epochs", int, "Last of all epochs, in which nothing is mixed (default: 0)."),
    _each("balanced", bool, "Draw every class equally often for the student.", field="balanced_sampling", default=True),
    _each("sample_power", float, "Draw by inverse frequency to this power: 0 as it is, 1 balanced (default: 0)."),
    _each(
        "oversample",
        list[str],
        "Draw a class more often: CLASS=FACTOR, such as defective=3, or HEAD=CLASS=FACTOR; may be repeated.",
    ),
    _both("augment", str, "light", "none, light (crop, flip) or standard (also colour, affine)."),
    _both(
        "any_way_up",
        bool,
        False,
        "The subject has no up side: all flips and quarter turns.",
        declarations=("--any-way-up",),
    ),
    _both("crop_min", float, 0.875, "Smallest share of height and width that a crop keeps (light and standard)."),
    _both("crop_max", float, 1.0, "Largest; crop-min's value as in 'resize to 256, crop 224'."),
    _both("horizontal_flip", bool, True, "Mirror half of the images (light and standard)."),
    _both("color_jitter", float, 0.0, "Largest change of brightness, contrast and saturation, 0 to 1."),
    _both("auto_augment", str, "none", "autoaugment, randaugment, augmix, or timm's configuration (rand-m5-n1)."),
    _both("grayscale", float, 0.0, "Share of the images without colour."),
    _both("gridmask", float, 0.0, "Share of the images under GridMask."),
    _both("cutout", float, 0.0, "Share of the images with one large square erased."),
    _both("coarse_dropout", float, 0.0, "Share of the images with up to eight small squares erased."),
    _each(
        "drop_rate",
        float,
        "Dropout of the network itself (default: 0).",
        teacher_help="Teacher's dropout (default: 0.2).",
    ),
    _each("drop_path_rate", float, "Stochastic depth (default: 0)."),
    _each("pool", str, "Global pooling: avg or gem (default: avg)."),
    _each("hidden_units", int, "Width of an extra fully connected layer (default: none)."),
    _each("classifier_dropout", float, "Dropout before the classifier, behind the extra layer (default: 0)."),
    _each("dropout_samples", int, "Dropout masks per image, logits averaged (default: 1)."),
    _both("classifier", str, "linear", "linear, or cosine (for ldam)."),
    _both("weight_decay", float, 1e-4, "Weight decay of matrices and kernels."),
    _both("resize", str, "squash", "squash, or center-crop (throws the borders away)."),
    _machine("seed", int, 0, "Seed of splits, weights and augmentation."),
    _machine("device", str, "auto", "auto, cpu or cuda."),
    _machine("precision", str, "auto", "Training in auto, f32 or bf16."),
    _machine("deterministic", bool, True, "On a GPU: the same weights again, at some cost in speed."),
    _machine("compile", bool, False, "torch.compile the networks.", declarations=("--compile",)),
    _machine("workers", int, None, "Loader processes (default: chosen for the device)."),
    _machine("cache_gib", float, None, "Memory for prepared images (default: half of what is free)."),
    _machine("checkpoint_minutes", float, 5.0, "The most work that a kill may cost."),
    _machine("tensorboard", bool, True, "Write curves for TensorBoard."),
)


# Parameters of distill that say nothing but how teachers are trained and answer.
OF_TEACHERS: tuple[str, ...] = (
    *("teacher", "teacher_weights", "teacher_blend", "teacher_vote", "teacher_override", "teacher_image_size"),
    *(option.name for option in TRAINING_OPTIONS if option.owner == "teacher"),
    *(option.twin for option in TRAINING_OPTIONS if option.twin is not None),
)
# Those that ask for teachers, and those that only say how a student learns from what teachers said.
ASK_FOR_TEACHERS = ("live_teachers", "views", "calibrate_soft_labels", "drop_noisy", "unlabelled", "soft_labels")
OF_SOFT_LABELS = (
    *("loss", "soft_weight", "soft_temperature", "baselines"),
    *(option.name for option in TRAINING_OPTIONS if option.name.startswith("unlabelled_")),
)
EPILOG = (
    "Options that say 'Teachers too' reach student and teachers; --teacher-NAME, which --help-teacher lists, sets the "
    "teachers apart. Where it runs (--seed to --checkpoint-minutes) is one for all. All else is the student's."
)
TEACH_EPILOG = "What is said here reaches all teachers; --help-teacher lists the same options by distill's names."


def given_flags(context: typer.Context, names: Sequence[str]) -> list[str]:
    """The flags of ``names`` that stand on the command line itself, not in a recipe."""
    found = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is not None and source.name == "COMMANDLINE":
            off = context.params.get(parameter.name) is False and parameter.secondary_opts
            found.append((parameter.secondary_opts if off else parameter.opts)[0])
    return found


def idle_options(context: typer.Context, reasons: Sequence[tuple[bool, Sequence[str], str]]) -> list[str]:
    """One doubt for each reason that holds: (whether it holds, parameters that then change nothing, why)."""
    doubts = []
    for holds, names, why in reasons:
        flags = given_flags(context, names) if holds else []
        if flags:
            doubts.append(f"{', '.join(flags)} {'change' if len(flags) > 1 else 'changes'} nothing: {why}")
    return doubts


def print_teacher_options(context: typer.Context, wanted: bool) -> None:
    """``--help-teacher``: all options of the teachers, also those that --help does not list."""
    if not wanted:
        return
    formatter = context.make_formatter()
    with formatter.section("Options of the teachers alone"):
        records = []
        for parameter in context.command.params:
            if parameter.name in OF_TEACHERS:
                shown = copy.copy(parameter)
                shown.hidden = False  # type: ignore[attr-defined]
                records.append(shown.get_help_record(context))
        formatter.write_dl([record for record in records if record is not None])
    both = (f"--{option.name.replace('_', '-')}" for option in TRAINING_OPTIONS if option.owner == "both")
    with formatter.section("These reach the teachers too, unless --teacher-NAME is given"):
        lines = textwrap.wrap(", ".join(both), width=formatter.width - 2, break_on_hyphens=False)
        formatter.write("".join(f"  {line}\n" for line in lines))
    typer.echo(formatter.getvalue().rstrip())
    raise typer.Exit


LABEL_OPTIONS: dict[str, tuple[Any, Any]] = {
    "label_columns": (
        Annotated[str, typer.Option(help="CSV columns, one attribute each, with commas between: mask,gender,age.")],
        "",
    ),
    "multi_label": (
        Annotated[
            bool,
            typer.Option("--multi-label", help="The CSV column label holds several labels per image: a|b; | for none."),
        ],
        False,
    ),
    "one_hot_columns": (Annotated[str, typer.Option(help="CSV columns with 0 or 1, a label each: a,b,c.")], ""),
    "regression": (Annotated[str, typer.Option(help="CSV columns of numbers to learn beside: age.")], ""),
    "regression_weight": (Annotated[float, typer.Option(help="Weight of their loss.")], 0.1),
    "missing_labels": (
        Annotated[str, typer.Option(help="error, or ignore: images without a label are left out of its loss.")],
        "error",
    ),
}


def takes_training_options(*, student: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command with the parameter ``training: TrainingValues`` gets the flags above in its place.

    ``student`` False (``teach``): without the student's own, but with the teachers'.
    """

    gathered = _split if student else _split_for_teachers
    return lambda command: _with_flags(command, "training", _parameters(student=student), gathered)


def takes_label_columns(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the parameter ``labels`` (a LabelColumns) gets the flags for it in its place."""
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in LABEL_OPTIONS.items()
    ]
    return _with_flags(command, "labels", parameters, _label_columns)


def _with_flags(
    command: Callable[..., None],
    name: str,
    parameters: Sequence[inspect.Parameter],
    gathered: Callable[[dict[str, Any]], Any],
) -> Callable[..., None]:
    """``command`` with ``parameters`` in the place of its parameter ``name``, which becomes what they gather to."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != name]

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        given = {parameter.name: values.pop(parameter.name) for parameter in parameters}
        command(**values, **{name: gathered(given | {"context": values.get("context")})})

    required = [p.replace(kind=p.KEYWORD_ONLY) for p in own]
    wrapper.__signature__ = inspect.Signature([*required, *parameters])  # type: ignore[attr-defined]
    return wrapper


def _label_columns(given: dict[str, Any]) -> Any:
    from edgedistill.data.label_columns import LabelColumns

    return LabelColumns(
        attributes=listed(given["label_columns"]),
        multi_label=given["multi_label"],
        one_hot=listed(given["one_hot_columns"]),
        regression=listed(given["regression"]),
        regression_weight=given["regression_weight"],
        missing=given["missing_labels"],
    )


def listed(text: str) -> tuple[str, ...]:
    """'a, b' -> ('a', 'b')."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _parameters(*, student: bool) -> list[inspect.Parameter]:
    found = []
    for option in TRAINING_OPTIONS:
        if student or option.owner in ("both", "teacher", "machine"):
            text = option.help + (" (Teachers too.)" if student and option.owner == "both" else "")
            found.append(_parameter(option.name, option, option.default, text, option.declarations))
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


def _split_for_teachers(given: dict[str, Any]) -> TrainingValues:
    """Of ``teach``, where a flag of the command line reaches all teachers, whatever a recipe says of them alone."""
    twins = {option.name: option.twin for option in TRAINING_OPTIONS if option.twin is not None}
    said = {name for name in (*twins, *twins.values()) if given_flags(given["context"], [name])}
    idle = {twin: None for name, twin in twins.items() if name in said and twin not in said}
    return _split(given | idle)


def _split(given: dict[str, Any]) -> TrainingValues:
    """What was given, by field. A flag for both reaches the teachers unless they have one of their own."""
    student, teacher = {}, {}
    for option in TRAINING_OPTIONS:
        field, value = option.settings_field, given.get(option.name)
        if value is not None and value != []:
            if option.owner != "teacher":
                student[field] = value
            if option.owner in ("both", "teacher", "machine"):
                teacher[field] = value
        if option.twin is not None and given[option.twin] not in (None, []):
            teacher[field] = given[option.twin]
    for values in (student, teacher):
        values.update({key: tuple(value) for key, value in values.items() if isinstance(value, list)})
    return TrainingValues(student, teacher)
