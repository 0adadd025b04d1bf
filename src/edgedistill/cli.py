"""The command line: parse, call one function, print. Heavy imports happen inside the commands.

``distill``, ``export-openvino`` and ``bench-fps`` are programs of their own and also sub-commands of ``edgedistill``.
Exit codes: 0 ok, 1 the job failed, 2 wrong usage.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from edgedistill import __version__
from edgedistill.errors import EdgedistillError
from edgedistill.image_headers import DEFAULT_MAX_PIXELS
from edgedistill.options import (
    ASK_FOR_TEACHERS,
    EPILOG,
    OF_SOFT_LABELS,
    OF_TEACHERS,
    TEACH_EPILOG,
    TrainingValues,
    given_flags,
    idle_options,
    listed,
    print_teacher_options,
    takes_label_columns,
    takes_training_options,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the work that lies in --out.")]
Out = Annotated[Path, typer.Option("--out", help="Folder of the run, such as runs/cells.")]
Data = Annotated[
    str, typer.Option("--data", help="Folder per class, CSV, 'shards/*.tar', elpv, elpv-4class or fashion-mnist.")
]
Teacher = Annotated[
    str, typer.Option(help="Teacher network: effb4, any timm name, NAME@SIZE; several with commas between vote.")
]
Blend = Annotated[
    str, typer.Option(help="Several teachers' weights: oof (fitted out of fold), score, equal, or 0.45,0.55.")
]
Vote = Annotated[str, typer.Option(help="Several teachers: soft (mean of probabilities) or hard (first choices).")]
Override = Annotated[
    str,
    typer.Option(help="NAME: that teacher alone answers where it is surer than the vote; NAME:0.9: at least so sure."),
]
TeacherWeights = Annotated[
    str, typer.Option(help="auto, none, a file, or packaged:NAME; with several teachers one for all or one for each.")
]
Folds = Annotated[int, typer.Option(help="K teachers; each labels the images that it did not see.")]
TestFraction = Annotated[float, typer.Option(help="Share held out for the final evaluation.")]
ValFraction = Annotated[float | None, typer.Option(help="Share for calibration and tuning (default: 10% to 20%).")]
SmallClasses = Annotated[
    str,
    typer.Option(
        help="A class with fewer images than folds and splits to cut: refuse, train-only (in every training, held out nowhere), or drop."
    ),
]
MaxPixels = Annotated[
    int,
    typer.Option(
        min=1, max=DEFAULT_MAX_PIXELS, help="Refuse images that declare more pixels; no stage reads more than 10^8."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of splits, weights and augmentation.")]
Processes = Annotated[
    int | None, typer.Option(min=1, help="Processes on this machine that share every batch (default: 1).")
]

INTERRUPTED = 130  # the shell's exit code for Ctrl-C
NO_RECIPES_BUSINESS = {"context", "recipe", "data", "out", "resume", "dry_run", "as_json", "help_teacher"}

# What the base install leaves out, and the extra that brings it.
EXTRAS = {
    **dict.fromkeys(
        ("torch", "torchvision", "timm", "albumentations", "sklearn", "imagehash", "PIL", "psutil"), "train"
    ),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript", "nncf"), "export"),
    **dict.fromkeys(("jinja2", "matplotlib", "pytorch_grad_cam"), "report"),
}

app = typer.Typer(
    help="Distil large image classifiers into networks that classify hundreds of frames a second on a CPU.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"edgedistill {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _answer(values: dict[str, Any], as_json: bool, *shown: Any) -> None:
    """The one answer on standard output: a JSON object, or tables and paths for people; of several processes from one."""
    from edgedistill import console

    if console.out.quiet:
        return
    if as_json:
        typer.echo(json.dumps(values, indent=2, default=str))
        return
    for item in shown:
        if isinstance(item, str):
            typer.echo(item)
        else:
            console.out.print(item)


def _data(
    data: str,
    folds: int,
    test_fraction: float,
    val_fraction: float | None,
    *,
    small_classes: str,
    seed: int,
    max_pixels: int,
    labels: Any,
) -> Any:
    from edgedistill.data.deal import SplitSettings
    from edgedistill.pipeline import DataSettings

    split = SplitSettings(
        folds=folds,
        test_fraction=test_fraction,
        val_fraction=val_fraction,
        seed=seed,
        small_classes=small_classes,  # type: ignore[arg-type]
    )
    return DataSettings(data, split, max_pixels, labels)


def _use_recipe(context: typer.Context, name: str | None) -> str | None:
    """The recipe's options become defaults, which flags override; 'list' prints all recipes."""
    if name is None:
        return None
    from edgedistill.recipes import read_recipe

    if name == "list":
        recipes(None, as_json=False)
        raise typer.Exit
    # teach leaves aside what is the student's.
    context.default_map = read_recipe(name, known=_recipe_options()).options
    return name


def _recipe_options() -> set[str]:
    return set(inspect.signature(distill).parameters) - NO_RECIPES_BUSINESS


def _blend(context: typer.Context, recipe: str | None, **given: str) -> Any:
    """How the teachers vote. What a recipe says of its own is no rule for others that --teacher names."""
    from edgedistill.teacher import BlendSettings

    if recipe is not None and given_flags(context, ["teacher"]):
        given = {name: value for name, value in given.items() if given_flags(context, [f"teacher_{name}"])}
    return BlendSettings(**given)  # type: ignore[arg-type]


def _baselines(context: typer.Context, baseline: bool, baselines: str | None) -> str:
    """Which students have a hard-label one. The command line has the last word over a recipe; UsageError for two wishes of
    one origin that contradict each other."""
    from edgedistill.errors import UsageError

    given = given_flags(context, ["baseline", "baselines"])
    if given == ["--baselines"] and baselines is not None:
        return baselines
    if given == ["--no-baseline"]:
        return "none"
    if given == ["--baseline"] and baselines == "none":
        return "first"
    if not baseline and baselines not in (None, "none"):
        raise UsageError(f"--no-baseline and --baselines {baselines} contradict each other; give one of them")
    return (baselines or "first") if baseline else "none"


def _idle(context: typer.Context, *, no_distillation: bool, soft_labels: Path | None) -> list[str]:
    """What stands on the command line and changes nothing. Raises UsageError for what contradicts --no-distillation."""
    from edgedistill.errors import UsageError

    asking = [name for name in ASK_FOR_TEACHERS if context.params.get(name)]
    contradicting = given_flags(context, asking)
    if no_distillation and contradicting:
        raise UsageError(f"--no-distillation and {contradicting[0]} contradict each other; give one of them")
    reasons = [
        (
            no_distillation,
            (*OF_TEACHERS, *OF_SOFT_LABELS),
            "--no-distillation trains no teachers, and learns from labels",
        ),
        (
            soft_labels is not None and not no_distillation,
            OF_TEACHERS,
            f"no teachers are trained, since --soft-labels {soft_labels} has what others said",
        ),
    ]
    return idle_options(context, reasons)


def _warn(doubts: list[str]) -> None:
    from edgedistill import console

    for doubt in doubts:
        console.warn(doubt)


def _share(command: str, context: typer.Context, processes: int | None) -> None:
    """Where several processes are wanted and this one is none of them: run this very command in them, and end as they do."""
    from edgedistill.training.processes import launch, to_start

    count = to_start(processes)
    if count > 1:
        own_program = context.parent is None  # 'distill ...' in place of 'edgedistill distill ...'
        raise typer.Exit(launch(count, [command, *sys.argv[1:]] if own_program else sys.argv[1:]))


RecipeName = Annotated[
    str | None,
    typer.Option("--recipe", callback=_use_recipe, is_eager=True, help="Preset by name, FILE.toml, or list."),
]
HelpTeacher = Annotated[
    bool,
    typer.Option("--help-teacher", callback=print_teacher_options, is_eager=True, help="List the teachers' options."),
]


@app.command(epilog=TEACH_EPILOG)
@takes_training_options(student=False)
@takes_label_columns
def teach(
    context: typer.Context,
    data: Data,
    out: Out,
    training: TrainingValues,
    labels: Any,
    teacher: Teacher = "effb4",
    teacher_weights: TeacherWeights = "auto",
    teacher_blend: Blend = "oof",
    teacher_vote: Vote = "soft",
    teacher_override: Override = "",
    folds: Folds = 5,
    fold: Annotated[
        int | None, typer.Option(help="Train this fold alone (job arrays); the last one writes the soft labels.")
    ] = None,
    test_fraction: TestFraction = 0.2,
    val_fraction: ValFraction = None,
    small_classes: SmallClasses = "refuse",
    teacher_image_size: Annotated[int, typer.Option(help="Teacher's input, pixels.")] = 224,
    max_pixels: MaxPixels = DEFAULT_MAX_PIXELS,
    recipe: RecipeName = None,
    resume: Resume = False,
    processes: Processes = None,
    help_teacher: HelpTeacher = False,
    as_json: Json = False,
) -> None:
    """Train K-fold teachers and store their out-of-fold soft labels: the first half of distill."""
    from edgedistill import pipeline
    from edgedistill.teacher import TeacherSettings

    first, ensemble = pipeline.parse_teachers(
        teacher,
        teacher_weights,
        TeacherSettings(image_size=teacher_image_size, fold=fold, **training.teacher),
        blend=_blend(context, recipe, weights=teacher_blend, vote=teacher_vote, override=teacher_override),
    )
    seed = training.teacher["seed"]
    settings = pipeline.TeachSettings(
        data=_data(
            data,
            folds,
            test_fraction,
            val_fraction,
            small_classes=small_classes,
            seed=seed,
            max_pixels=max_pixels,
            labels=labels,
        ),
        out=out,
        teacher=first,
        ensemble=ensemble,
    )
    _share("teach", context, processes)
    path = pipeline.teach(settings, resume=resume)
    _answer({"path": str(path)}, as_json, str(path))


@takes_training_options(student=True)
@takes_label_columns
def distill(
    context: typer.Context,
    data: Data,
    out: Out,
    training: TrainingValues,
    labels: Any,
    teacher: Teacher = "effb4",
    student: Annotated[
        str, typer.Option(help="Student network: mbv3s, mbv4s, any timm name, NAME@SIZE; several with commas between.")
    ] = "mbv3s",
    teacher_weights: TeacherWeights = "auto",
    teacher_blend: Blend = "oof",
    teacher_vote: Vote = "soft",
    teacher_override: Override = "",
    student_weights: Annotated[
        str,
        typer.Option(help="auto, none, a file, or packaged:NAME; with several students one for all or one for each."),
    ] = "auto",
    folds: Folds = 5,
    test_fraction: TestFraction = 0.2,
    val_fraction: ValFraction = None,
    small_classes: SmallClasses = "refuse",
    image_size: Annotated[int, typer.Option(help="Student's input, pixels.")] = 224,
    teacher_image_size: Annotated[
        int | None, typer.Option(help="Teacher's input, pixels (default: the student's).")
    ] = None,
    no_distillation: Annotated[
        bool, typer.Option("--no-distillation", help="No teachers: the student on hard labels alone.")
    ] = False,
    baseline: Annotated[bool, typer.Option(help="Train the hard-label student too, and compare.")] = True,
    baselines: Annotated[
        str | None, typer.Option(help="Hard-label students of: all students, the first (default), or none.")
    ] = None,
    soft_labels: Annotated[
        Path | None, typer.Option(help="Soft labels of an earlier run, in place of teachers.")
    ] = None,
    max_pixels: MaxPixels = DEFAULT_MAX_PIXELS,
    recipe: RecipeName = None,
    resume: Resume = False,
    processes: Processes = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what will happen, how long and how large.")] = False,
    help_teacher: HelpTeacher = False,
    as_json: Json = False,
) -> None:
    """Train K-fold teachers, store their out-of-fold soft labels, distil them into a student: model.pt."""
    from edgedistill import pipeline
    from edgedistill.student import StudentSettings, live_defaults
    from edgedistill.teacher import TeacherSettings
    from edgedistill.training.processes import on_main

    doubts = _idle(context, no_distillation=no_distillation, soft_labels=soft_labels)
    values = dict(training.student)
    if no_distillation:  # what a recipe asks of teachers is left aside; the command line itself was refused above
        values = {name: value for name, value in values.items() if name not in ASK_FOR_TEACHERS}
        soft_labels = None
    elif values["live_teachers"] or values["views"]:
        values = live_defaults(values.get("loss")) | values
    first, *others = pipeline.parse_students(
        student,
        student_weights,
        StudentSettings(name=student, image_size=image_size, distillation=not no_distillation, **values),
    )
    first_teacher, ensemble = pipeline.parse_teachers(
        teacher,
        teacher_weights,
        TeacherSettings(image_size=teacher_image_size or image_size, **training.teacher),
        blend=_blend(context, recipe, weights=teacher_blend, vote=teacher_vote, override=teacher_override),
    )
    seed = training.student["seed"]
    settings = pipeline.DistillSettings(
        data=_data(
            data,
            folds,
            test_fraction,
            val_fraction,
            small_classes=small_classes,
            seed=seed,
            max_pixels=max_pixels,
            labels=labels,
        ),
        out=out,
        teacher=first_teacher,
        ensemble=ensemble,
        student=first.settings,
        label=first.label,
        others=tuple(others),
        baselines=_baselines(context, baseline, baselines),  # type: ignore[arg-type]
        soft_labels=soft_labels,
    )
    if dry_run:
        from edgedistill.plan import make_plan
        from edgedistill.training.processes import to_start

        _warn(doubts)
        plan = make_plan(settings, resume=resume, processes=to_start(processes))
        _answer(plan.to_dict(), as_json, plan.table())
        return
    _share("distill", context, processes)
    on_main(functools.partial(_warn, doubts))  # of several processes one
    result = pipeline.distill(settings, resume=resume)
    answer = {"path": str(result.model), "models": result.models, "evaluation": result.evaluation}
    _answer(answer, as_json, pipeline.comparison_table(result.evaluation), *map(str, result.models.values()))


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one whole.")] = None,
    as_json: Json = False,
) -> None:
    """List the presets of distill and teach, or print one."""
    from edgedistill import console
    from edgedistill.recipes import read_recipe, recipe_names

    names = recipe_names() if name is None else [name]
    found = [read_recipe(each, known=_recipe_options()) for each in names]
    rows = [(recipe.name, recipe.summary) for recipe in found]
    shown = console.table("recipes", ("name", "what it is"), rows) if name is None else found[0].text
    _answer({recipe.name: {"summary": recipe.summary, "options": recipe.options} for recipe in found}, as_json, shown)


@app.command("check-data")
@takes_label_columns
def check_data(
    data: Annotated[
        str, typer.Argument(help="Folder per class, CSV, 'shards/*.tar', elpv, elpv-4class or fashion-mnist.")
    ],
    labels: Any,
    folds: Folds = 5,
    small_classes: SmallClasses = "refuse",
    max_pixels: MaxPixels = DEFAULT_MAX_PIXELS,
    plot: Annotated[Path | None, typer.Option(help="PNG with the class distribution and the image sizes.")] = None,
    as_json: Json = False,
) -> None:
    """Find what would spoil a training: damaged, huge, duplicate or doubtful images, classes too small."""
    from edgedistill import console
    from edgedistill.data import checks
    from edgedistill.data.deal import SplitSettings
    from edgedistill.data.sources import open_source

    split = SplitSettings(folds=folds, small_classes=small_classes)  # type: ignore[arg-type]
    report = checks.check_data(open_source(data, labels=labels), settings=split, max_pixels=max_pixels)
    if plot is not None:
        checks.plot_data(report, plot)
    title = f"{report.name}: {report.summary()}"
    if report.heads is None:
        classes = console.table(title, ("class", "images"), list(report.class_counts.items()))
    else:
        counted = [(head, name, count) for head, counts in report.heads.items() for name, count in counts.items()]
        classes = console.table(title, ("head", "class", "images"), counted)
    findings = console.table("findings", ("", "what", "found", "files", "remedy"), report.rows())
    shown = [classes, *([findings] if report.findings else []), *([str(plot)] if plot is not None else [])]
    _answer(report.to_dict(), as_json, *shown)
    if report.errors:
        raise typer.Exit(1)


def export_openvino(
    model: Annotated[Path | None, typer.Argument(help="model.pt of a run.")] = None,
    architecture: Annotated[
        str | None, typer.Option("--model", help="A timm network that was trained elsewhere.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Its state dict.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Its class names, one a line.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder (default: openvino/ beside model.pt, openvino-NAME/ beside model-NAME.pt)."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Images (default: dataset.csv beside the model).")] = None,
    image_size: Annotated[int | None, typer.Option(help="Another input size, pixels.")] = None,
    int8: Annotated[str, typer.Option(help="auto (where it pays), on or force (even where slower), off.")] = "auto",
    calibration_images: Annotated[int, typer.Option(help="Training images for INT8.")] = 300,
    int8_max_drop: Annotated[
        float, typer.Option("--int8-max-drop", "--int8-budget", help="Top-1 that INT8 may lose on val.")
    ] = 0.01,
    int8_max_rung: Annotated[
        str, typer.Option(help="Last means to try: plain, ranges, float-layers, accuracy-control or qat.")
    ] = "qat",
    int8_minutes: Annotated[float, typer.Option(help="For all attempts at INT8 together.")] = 20.0,
    int8_weights: Annotated[
        str, typer.Option(help="full; half, for CPUs without 8-bit dot products (VNNI); auto, as this CPU needs.")
    ] = "auto",
    certificate: Annotated[bool, typer.Option(help="Prove that every form answers alike, or fail.")] = True,
    test_parity: Annotated[
        bool, typer.Option("--test-parity", help="Certify on the test split too, once, at the end.")
    ] = False,
    embed_preprocessing: Annotated[
        bool, typer.Option("--embed-preprocessing", help="Also write an IR that takes u8 BGR images.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Threads for everything here (default: all cores).")] = None,
    as_json: Json = False,
) -> None:
    """Fuse, export to ONNX and OpenVINO IR, quantise where it pays, and certify the result."""
    from edgedistill import console
    from edgedistill.export.certificate import table_rows
    from edgedistill.export.export import ExportSettings, read_certificates
    from edgedistill.export.export import export_openvino as export
    from edgedistill.export.int8 import table_rows as ladder_rows

    settings = ExportSettings(
        model=model,
        architecture=architecture,
        weights=weights,
        labels=labels,
        out=out,
        data=data,
        image_size=image_size,
        int8=int8,  # type: ignore[arg-type]
        calibration_images=calibration_images,
        int8_max_drop=int8_max_drop,
        int8_max_rung=int8_max_rung,  # type: ignore[arg-type]
        int8_minutes=int8_minutes,
        int8_weights=int8_weights,  # type: ignore[arg-type]
        certificate=certificate,
        test_parity=test_parity,
        embed_preprocessing=embed_preprocessing,
        threads=threads,
    )
    path = export(settings)
    certificates = read_certificates(path)
    tables = [
        console.table(f"{name}: certificate {values['verdict']}, {values['n']} images", *table_rows(values))
        for name, values in certificates.items()
    ]
    tables += [
        console.table(
            f"{name}: INT8 {values['int8']['decision']}: {values['int8']['reason']}", *ladder_rows(values["int8"])
        )
        for name, values in certificates.items()
        if values["int8"]["rungs"]
    ]
    _answer({"path": str(path), "certificates": certificates}, as_json, *tables, str(path))


def bench_fps(
    path: Annotated[Path, typer.Argument(help="openvino/ folder, deploy.json or model.xml.")],
    scope: Annotated[str, typer.Option(help="model, frames, files (comma between).")] = "model,frames,files",
    vs: Annotated[
        str | None,
        typer.Option(
            help="naive, naive-default, onnxruntime, torch, benchmark_app, model-api, ncnn, edgedistill-cpp; all; none"
            " (default: naive, and edgedistill-cpp where it is built)."
        ),
    ] = None,
    images: Annotated[list[str] | None, typer.Option(help="Files or folders (default: the run's val split).")] = None,
    precision: Annotated[
        str, typer.Option(help="Of our own: f32, bf16, int8 (default: all, and a cascade's as deployed).")
    ] = "",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
    seconds: Annotated[float, typer.Option(help="Per candidate and round.")] = 2.0,
    fps_target: Annotated[float | None, typer.Option(help="Frames a second that score in full.")] = None,
    accuracy: Annotated[float | None, typer.Option(help="Accuracy for the score, 0 to 1.")] = None,
    weight: Annotated[float, typer.Option(help="Weight of the accuracy in the score.")] = 0.7,
    out: Annotated[Path | None, typer.Option(help="JSON record (default: bench.json in the folder).")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG of the figures.")] = None,
    peers_python: Annotated[Path, typer.Option(help="Python of the peers' environment.")] = Path(
        ".venv-peers/bin/python"
    ),
    as_json: Json = False,
) -> None:
    """Measure frames a second in three scopes, interleaved with the peers."""
    from edgedistill.benchmarks.bench_fps import BenchSettings
    from edgedistill.benchmarks.bench_fps import bench_fps as bench
    from edgedistill.benchmarks.target import CPP, CPP_PROGRAM, PEERS
    from edgedistill.runtime.cpp_programs import find_cpp_program

    if vs is None:
        vs = f"naive,{CPP}" if find_cpp_program(CPP_PROGRAM) else "naive"
    peers = tuple(PEERS) if vs == "all" else () if vs == "none" else listed(vs)
    settings = BenchSettings(
        path=path,
        scopes=listed(scope),
        vs=peers,
        images=tuple(images or ()),
        rounds=rounds,
        seconds=seconds,
        precisions=listed(precision),
        fps_target=fps_target,
        accuracy=accuracy,
        weight=weight,
        out=out,
        plot=plot,
        peers_python=peers_python,
    )
    result = bench(settings)
    files = [str(file) for file in (result.out, result.plot) if file is not None]
    _answer(result.record, as_json, *result.tables(), *result.notes, *files)


@app.command()
def tune(
    targets: Annotated[
        list[Path], typer.Argument(help="openvino/ folders or runs; with --prepare model.pt files or runs.")
    ],
    data: Annotated[str | None, typer.Option(help="Val images (default: val.csv or dataset.csv of the first).")] = None,
    minutes: Annotated[float, typer.Option(help="Time for everything.")] = 10.0,
    w: Annotated[float, typer.Option("--w", help="Weight of the accuracy in the score.")] = 0.7,
    fps_target: Annotated[float | None, typer.Option(help="Frames a second that score in full.")] = None,
    metric: Annotated[str, typer.Option(help="accuracy or macro-f1.")] = "accuracy",
    scope: Annotated[str, typer.Option(help="files, frames or model.")] = "files",
    min_fps: Annotated[float | None, typer.Option(help="The most accurate that reaches this.")] = None,
    max_p99_ms: Annotated[float | None, typer.Option(help="The most accurate within this latency.")] = None,
    max_drop: Annotated[float | None, typer.Option(help="The fastest that loses at most this share.")] = None,
    sizes: Annotated[str, typer.Option(help="Resolutions in pixels (default: around each student's own).")] = "",
    images: Annotated[int, typer.Option(help="At most so many val images.")] = 2000,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write (default: the first one's).")] = None,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="On the training machine: write candidates and val.csv to --out.")
    ] = False,
    with_images: Annotated[
        bool, typer.Option("--with-images", help="With --prepare: also copy the val images into OUT/val.")
    ] = False,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Find the deployment with the best score on this machine, by measuring: deploy.json."""
    if prepare:
        from edgedistill.export.prepare import PrepareSettings, prepare_candidates

        path = prepare_candidates(PrepareSettings(tuple(targets), out, data=data, with_images=with_images))
        _answer({"path": str(path)}, as_json, str(path))
        return
    from edgedistill.benchmarks.score import Objective
    from edgedistill.benchmarks.tuner import TuneSettings
    from edgedistill.benchmarks.tuner import tune as find_best
    from edgedistill.errors import UsageError

    if not all(part.isdecimal() for part in listed(sizes)):
        raise UsageError(f"--sizes {sizes}: expected numbers of pixels with commas between")
    result = find_best(
        TuneSettings(
            targets=tuple(targets),
            objective=Objective(w, fps_target, metric, scope, min_fps, max_p99_ms, max_drop),
            data=data,
            minutes=minutes,
            sizes=tuple(int(part) for part in listed(sizes)),
            images=images,
            seed=seed,
            out=out,
            resume=resume,
        )
    )
    files = [result.folder / "deploy.json", result.folder / "tune.json", *([result.picture] if result.picture else [])]
    values = result.record | {"path": str(result.folder / "deploy.json")}
    _answer(values, as_json, result.table(), *result.record["explanation"], *map(str, files))


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="openvino/ folder, deploy.json or model.xml.")],
    sources: Annotated[list[str], typer.Argument(help="Images, folders, videos, or a camera's number.")],
    csv: Annotated[Path | None, typer.Option(help="Write the answers to this file.")] = None,
    top_k: Annotated[int, typer.Option(help="Labels per image.")] = 1,
    precision: Annotated[str | None, typer.Option(help="f32, bf16 or int8 (default: as deployed).")] = None,
    decode: Annotated[str | None, typer.Option(help="reduced or full (default: as deployed).")] = None,
    engine: Annotated[str, typer.Option(help="python, or cpp where 'make cpp-python' built it.")] = "python",
    as_json: Json = False,
) -> None:
    """Classify images, folders and videos. Exit code 1 if an image could not be read."""
    from edgedistill.runtime.predict import PredictSettings, write_answers
    from edgedistill.runtime.predict import predict as answers_of

    settings = PredictSettings(model, tuple(sources), top_k=top_k, precision=precision, decode=decode, engine=engine)
    answers = answers_of(settings)
    errors = 0
    if csv is not None:
        images, errors = write_answers(answers, csv)
        _answer({"path": str(csv), "images": images, "errors": errors}, as_json, str(csv))
    else:
        for answer in answers:
            errors += answer.error is not None
            # Names of files are bytes; in JSON one that is no UTF-8 has \udcXX.
            text = json.dumps(answer.to_dict(), ensure_ascii=False) if as_json else answer.line()
            typer.echo(text.encode("utf-8", "backslashreplace" if as_json else "surrogateescape"))
    if errors:
        raise typer.Exit(1)


@app.command()
def package(
    path: Annotated[Path, typer.Argument(help="openvino/ folder of a run.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Archive to write (default: RUN-linux-MACHINE.tar.gz beside the folder)."),
    ] = None,
    programs: Annotated[
        Path | None, typer.Option(help="Folder of the built C++ programs (default: build/cpp/bin).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Pack model, C++ programs and their libraries into one archive that runs where nothing is installed."""
    from edgedistill.runtime.package import PackageSettings
    from edgedistill.runtime.package import package as pack

    made = pack(PackageSettings(path, out, programs))
    values = {
        "path": str(made.path),
        "unpacked_bytes": made.unpacked_bytes,
        "packed_bytes": made.packed_bytes,
        "files": list(made.files),
    }
    sizes = f"{made.unpacked_bytes / 1e6:.1f} MB unpacked, {made.packed_bytes / 1e6:.1f} MB packed"
    _answer(values, as_json, f"{made.path}: {len(made.files)} files, {sizes}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of the run.")],
    bench: Annotated[Path | None, typer.Option(help="A bench-fps record (default: those in openvino/).")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Compute Grad-CAM of right and wrong test images first (needs torch).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write report.html, one page about the run that opens offline."""
    from edgedistill.artifacts import RunDir
    from edgedistill.report import write_report

    if explain:
        from edgedistill.report.explain import write_explanations

        write_explanations(RunDir(run))
    path = write_report(RunDir(run), bench=bench)
    _answer({"path": str(path)}, as_json, str(path))


@app.command()
def doctor(
    network: Annotated[bool, typer.Option(help="Also ask whether pretrained weights can be downloaded.")] = True,
    as_json: Json = False,
) -> None:
    """Check this machine: versions, OpenCV wheels, processor, memory, disk, network."""
    from edgedistill import console
    from edgedistill.doctor import run_doctor

    checks = run_doctor(network=network)
    rows = [[check.check, check.status, check.detail, check.remedy] for check in checks]
    shown = console.table("doctor", ("check", "status", "found", "remedy"), rows)
    _answer({"checks": [check._asdict() for check in checks]}, as_json, shown)
    if any(check.status == "error" for check in checks):
        raise typer.Exit(1)


app.command(epilog=EPILOG)(distill)
app.command("export-openvino")(export_openvino)
app.command("bench-fps")(bench_fps)


def _program(command: Any, *, epilog: str | None = None) -> typer.Typer:
    """A command as a program of its own."""
    program = typer.Typer(pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None)
    program.command(epilog=epilog)(command)
    return program


def main() -> None:
    _run(app)


def distill_main() -> None:
    _run(_program(distill, epilog=EPILOG))


def export_openvino_main() -> None:
    _run(_program(export_openvino))


def bench_fps_main() -> None:
    _run(_program(bench_fps))


def _run(application: typer.Typer) -> None:
    """Errors a user can act on become one line and an exit code; anything else keeps its traceback."""
    try:
        application()
    except EdgedistillError as error:
        if error.told:
            time.sleep(1)  # a launcher ends all processes with the first; the one that tells is not to be cut short
        else:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        print(f'error: {error.name} is not installed; pip install "edgedistill[{extra}]"', file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as stopped:  # typer makes one of the other
        if isinstance(stopped, SystemExit) and stopped.code != INTERRUPTED:
            raise
        if "RANK" not in os.environ:  # of several processes the one that started them says so
            print("interrupted; distill, teach and tune go on with --resume", file=sys.stderr)
        sys.exit(INTERRUPTED)
