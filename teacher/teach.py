"""K teachers, each trained on all folds but one, label the images of the fold that they never saw.

Each trains a fixed number of epochs and is never selected on its held-out fold. Files: teacher/fold-K/{checkpoint.pt,
metrics.jsonl, model.pt, held_out_ids.npy, held_out.log_probs.npy, fold.json}, teacher/oof.json, soft_labels/. Further
architectures train in the same folds and lie in teacher/NAME/fold-K; the soft labels are then a combination of all.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edgedistill import console
from edgedistill.artifacts import RunDir, read_array, read_json, sha256_file, write_array, write_json
from edgedistill.data.manifest import Dataset
from edgedistill.data.soft_label_store import check_store, kind_for, parse_store, row_blocks, write_blocks
from edgedistill.errors import ArtifactError, DataError, UsageError
from edgedistill.images import InputSpec
from edgedistill.metrics import Judged
from edgedistill.task_metrics import Scored, summary
from edgedistill.tasks import Task
from edgedistill.teacher.ensemble import Blend, BlendSettings, blend_folds, blend_from_dict
from edgedistill.training.checkpoints import read_identity, write_model
from edgedistill.training.fixres import adapt, deployed_spec
from edgedistill.training.heads import make_task_targets
from edgedistill.training.loader import Draw, ImageStore, open_store, prepared_spec
from edgedistill.training.loop import Job, Validation, open_validation, train
from edgedistill.training.losses import LossSettings, TargetSource, targets_of
from edgedistill.training.models import (
    Weights,
    create_model,
    input_spec_for,
    locate_weights,
    model_kwargs_for,
    resolve_name,
)
from edgedistill.training.optimizers import make_phases
from edgedistill.training.predict import BATCH_NORM_IMAGES, reestimate_batch_norm
from edgedistill.training.processes import alone_in, on_main
from edgedistill.training.seeds import derive
from edgedistill.training.settings import (
    TrainSettings,
    choose_device,
    identity,
    refuse_other_settings,
    refuse_other_wishes,
)
from edgedistill.training.soft_labels import (
    FoldResult,
    StoredTable,
    blend_of,
    ids_hash,
    prove_out_of_fold,
    read_heads,
    write_soft_labels,
)
from edgedistill.training.views import label_batches, views_of

FOLD_FORMAT = "edgedistill-teacher-fold"
OOF_FORMAT = "edgedistill-oof"
METRICS = ("accuracy", "macro_f1", "log_loss", "ece")

Quality = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(TrainSettings):
    """TrainSettings with a teacher's defaults.

    ``fold``: train this fold alone (job arrays); None: all that remain. ``tta``: views whose mean answer is the soft
    label and the teacher's answer on test, such as 'flip,five-crop,scales' (see training.views); '' for none.
    ``soft_label_store``: 'float32', 'float16' or 'top-k:N' (see data.soft_label_store).
    """

    role: ClassVar[str] = "teacher"

    name: str = "effb4"
    epochs: int = 10
    batch_size: int = 32
    balanced_sampling: bool = False
    cutmix_probability: float = 0.0
    drop_rate: float = 0.2
    fold: int | None = None
    tta: str = ""
    soft_label_store: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        views_of(self.tta)
        parse_store(self.soft_label_store)

    @staticmethod
    def in_own_flags(advice: str) -> str:
        return re.sub(r"--(no-)?(?=[a-z])", r"--\1teacher-", advice)

    def checks(self) -> list[tuple[str, bool, str]]:
        return [
            *super().checks(),
            ("fold", self.fold is None or self.fold >= 0, "0 or more, or None"),
            (
                "tta",
                "flip" not in self.tta or (self.horizontal_flip and self.augment != "none"),
                "no flip where training never flips (--teacher-horizontal-flip and --teacher-augment light flip)",
            ),
        ]


@dataclass(frozen=True)
class NamedTeacher:
    """An architecture and its ``label``: its name in files and tables, such as 'swinb' or, at a size of its own,
    'effb4-300'."""

    label: str
    settings: TeacherSettings


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """What joins the first architecture: ``label`` is the first one's own name, ``others`` the rest.

    Raises UsageError for two of one name and for ``blend`` settings that do not fit them.
    """

    label: str = "teacher"
    others: tuple[NamedTeacher, ...] = ()
    blend: BlendSettings = field(default_factory=BlendSettings)

    def __post_init__(self) -> None:
        twice = sorted({label for label in self.labels if self.labels.count(label) > 1})
        if twice:
            raise UsageError(
                f"--teacher names {', '.join(twice)} twice; name each once, or with another size: NAME@300"
            )
        self.blend.check(self.labels)

    @property
    def labels(self) -> tuple[str, ...]:
        return (self.label, *(other.label for other in self.others))


@dataclass(frozen=True, eq=False)
class _Member:
    """One architecture of the run; ``folder``: '' for the first, whose folds lie in teacher/ itself."""

    label: str
    folder: str
    settings: TeacherSettings


@dataclass(frozen=True, eq=False)
class _Shared:
    """What all folds of an architecture have in common; ``rows`` of the data set are the rows of ``store``."""

    member: _Member
    dataset: Dataset
    rows: np.ndarray[Any, np.dtype[np.int64]]
    store: ImageStore
    spec: InputSpec
    weights: Weights | None
    validation: Validation | None


def train_teachers(
    settings: TeacherSettings, dataset: Dataset, run: RunDir, *, resume: bool, ensemble: Ensemble | None = None
) -> Path:
    """Train what remains of the folds, then write teacher/oof.json and soft_labels/.

    ``ensemble``: further architectures, trained in the same folds. Returns the soft_labels folder; with
    ``settings.fold`` and other folds still missing, that fold's folder. Every process of a launch calls it (see
    training.processes). Raises UsageError if the folders hold work and ``resume`` is False, ArtifactError if that work
    was made with other settings or data, ImageError for a damaged image.
    """
    ensemble = ensemble or Ensemble()
    settings.refuse_for(dataset.task)
    check_store(parse_store(settings.soft_label_store), len(dataset.class_names), dataset.task)
    members = _members(settings, ensemble)
    wanted = _wanted_folds(settings, dataset)
    if not resume:
        on_main(lambda: _refuse_existing_work(run, members, wanted))
    for member in members:
        _train_member(member, dataset, run, wanted, resume=resume)
    return on_main(lambda: _finish(ensemble, members, dataset, run, wanted))


def _members(settings: TeacherSettings, ensemble: Ensemble) -> list[_Member]:
    first = _Member(ensemble.label, "", settings)
    return [first, *(_Member(other.label, other.label, other.settings) for other in ensemble.others)]


def refuse_other_work(
    settings: TeacherSettings, ensemble: Ensemble, dataset: Dataset, run: RunDir, *, taught: bool
) -> None:
    """Raises ArtifactError where teachers of the run were made with other settings or, if students were ``taught`` by its
    soft labels, where those would become others: before anything of a resumed run is trained or written."""
    members = _members(settings, ensemble)
    for member in members:
        for fold in range(dataset.fold_count):
            if not _is_done(member, dataset, run, fold):
                begun = read_identity(run.teacher(fold, member.folder))
                if begun is not None:
                    refuse_other_wishes(*begun, member.settings)
    meta = run.soft_labels / "meta.json"
    if taught and meta.exists():
        now = _asked_labels(settings, ensemble, dataset.task)
        then = _made_labels(run)
        different = [name for name in now if now[name] != then[name]]
        if different:
            shown = ", ".join(f"{name} {then[name]} (now {now[name]})" for name in different)
            raise ArtifactError(
                f"{meta}: made with {shown}, and students have learned from it; resume with the same, or start anew with "
                "another --out"
            )


def _asked_labels(settings: TeacherSettings, ensemble: Ensemble, task: Task | None) -> dict[str, str]:
    """What decides soft labels beside the teachers' own settings, by flag."""
    kind = parse_store(settings.soft_label_store)
    stores = [str(kind)] if task is None else [str(kind_for(head, kind)) for head in task.heads]
    several = len(ensemble.labels) > 1
    return {
        "--teacher": ",".join(ensemble.labels) if several else "one network",
        "--soft-label-store": ",".join(dict.fromkeys(stores)),
        **_blend_flags(asdict(ensemble.blend) if several else {}),
    }


def _made_labels(run: RunDir) -> dict[str, str]:
    heads, blend = read_heads(run.soft_labels), blend_of(run.soft_labels)
    return {
        "--teacher": "one network" if blend is None else ",".join(blend["teachers"]),
        "--soft-label-store": ",".join(dict.fromkeys(str(head.get("store", "float32")) for head in heads.values())),
        **_blend_flags({} if blend is None else blend["settings"]),
    }


def _blend_flags(blend: Mapping[str, Any]) -> dict[str, str]:
    flags = {"weights": "--teacher-blend", "vote": "--teacher-vote", "override": "--teacher-override"}
    return {flag: str(blend.get(name, "")) or "none" for name, flag in flags.items()}


def _finish(
    ensemble: Ensemble, members: Sequence[_Member], dataset: Dataset, run: RunDir, wanted: Sequence[int]
) -> Path:
    """The soft labels, once all folds are there; until then the last trained fold's folder."""
    missing = [
        fold
        for fold in range(dataset.fold_count)
        if not all((run.teacher(fold, member.folder) / "fold.json").exists() for member in members)
    ]
    if missing:
        console.note(f"folds still to train: {', '.join(map(str, missing))}; the last one writes the soft labels")
        return run.teacher(wanted[-1])
    for member in members:
        for fold in range(dataset.fold_count):
            _is_done(member, dataset, run, fold)  # folds trained elsewhere must have the same settings
    return _write_labels(ensemble, members, dataset, run)


def read_blend(run: RunDir) -> Blend | None:
    """The combination of the architectures as fitted on all folds, for images of none; None where there is but one."""
    values = read_json(run.root / "teacher" / "oof.json", format=OOF_FORMAT).get("blend")
    return None if values is None else blend_from_dict(values)


def _wanted_folds(settings: TeacherSettings, dataset: Dataset) -> list[int]:
    count = dataset.fold_count
    if count < 2:
        raise DataError(f"the data set has {count} folds; teachers need 2 or more: freeze it again with --folds 5")
    if settings.fold is None:
        return list(range(count))
    if settings.fold >= count:
        raise UsageError(f"--fold {settings.fold}: the data set has folds 0 to {count - 1}")
    return [settings.fold]


def _refuse_existing_work(run: RunDir, members: Sequence[_Member], folds: Sequence[int]) -> None:
    for folder in (run.teacher(fold, member.folder) for member in members for fold in folds):
        if any((folder / name).exists() for name in ("fold.json", "checkpoint.pt", "model.pt")):
            raise UsageError(f"{folder}: holds work already; go on with --resume, or choose another --out")


def _train_member(member: _Member, dataset: Dataset, run: RunDir, wanted: Sequence[int], *, resume: bool) -> None:
    """What remains of one architecture's folds; its images leave the memory when it returns."""

    def left(folds: Sequence[int]) -> list[int]:
        return on_main(lambda: [fold for fold in folds if not _is_done(member, dataset, run, fold)])

    todo = left(wanted)
    if todo:
        shared = _prepare(member, dataset)
        for fold in todo:
            with alone_in(run.teacher(fold, member.folder)):
                if left([fold]):  # else another process has trained it by now, with --fold
                    _train_fold(shared, run, fold, resume=resume)


def _identity(settings: TeacherSettings, dataset: Dataset, fold: int) -> dict[str, Any]:
    """What a teacher's weights depend on beyond its settings: the images that it may see."""
    seen = dataset.ids[(dataset.splits == "train") & (dataset.folds != fold)]
    return identity(
        settings, task=dataset.task, dataset_hash=dataset.hash, held_out_fold=fold, trained_on=ids_hash(seen)
    )


def _is_done(member: _Member, dataset: Dataset, run: RunDir, fold: int) -> bool:
    path = run.teacher(fold, member.folder) / "fold.json"
    if not path.exists():
        return False
    saved = read_json(path, format=FOLD_FORMAT)["identity"]
    refuse_other_settings(path, saved, _identity(member.settings, dataset, fold), TeacherSettings)
    return True


def _prepare(member: _Member, dataset: Dataset) -> _Shared:
    settings = member.settings
    choose_device(settings.device)  # a device that is not there is told before images are read
    spec = input_spec_for(settings.name, settings.image_size, resize=settings.resize)
    deployed_spec(settings, spec)  # refused before images are read where the network cannot change its size
    weights = on_main(lambda: locate_weights(settings.name, settings.weights, flag="--teacher-weights"))
    rows = dataset.rows("train")
    store = open_store(dataset.paths[rows], prepared_spec(spec), cache_gib=settings.cache_gib)
    return _Shared(member, dataset, rows, store, spec, weights, open_validation(dataset, spec, seed=settings.seed))


def _train_fold(shared: _Shared, run: RunDir, fold: int, *, resume: bool) -> None:
    """One teacher, and what it says of its held-out fold; fold.json is written last and marks the fold as done."""
    settings, dataset = shared.member.settings, shared.dataset
    job = _job(shared, run.teacher(fold, shared.member.folder), fold)
    torch.manual_seed(derive(settings.seed, "initial weights", fold))
    network = settings.network(len(dataset.outputs))
    model = create_model(settings.name, pretrained=shared.weights, **network)
    model = adapt(job, train(job, model, resume=resume), resume=resume)
    on_main(lambda: _label(job, model, shared, fold))


def _label(job: Job, model: nn.Module, shared: _Shared, fold: int) -> None:
    """model.pt, what it says of the held-out fold, and fold.json."""
    settings, dataset, folder = shared.member.settings, shared.dataset, job.folder
    network = settings.network(len(dataset.outputs))
    stale = settings.averages or settings.mixes_to_the_end
    if stale and settings.test_size is None:  # else training.fixres has measured the statistics
        seen = dataset.paths[shared.rows[dataset.folds[shared.rows] != fold]]
        reestimate_batch_norm(
            model, seen, shared.spec, batch_size=settings.batch_size, limit=BATCH_NORM_IMAGES, seed=settings.seed
        )
    write_model(
        folder / "model.pt",
        model,
        architecture=resolve_name(settings.name),
        model_kwargs=model_kwargs_for(settings.name, **network),
        classes=dataset.outputs,
        input_spec=deployed_spec(settings, shared.spec),
        dataset_hash=dataset.hash,
        settings=dict(job.identity),
        task=dataset.task,
    )
    held_out = shared.rows[dataset.folds[shared.rows] == fold]
    answers = label_batches(
        model,
        dataset.paths[held_out],
        deployed_spec(settings, shared.spec),
        tta=settings.tta,
        task=dataset.task,
        title=f"labelling fold {fold + 1}",
    )
    shape = (len(held_out), len(dataset.outputs))
    write_array(folder / "held_out_ids.npy", dataset.ids[held_out].astype(str))
    write_blocks(folder / "held_out.log_probs.npy", answers, shape=shape)
    values = {
        "fold": fold,
        "identity": dict(job.identity),
        "trained_on": job.identity["trained_on"],
        "epochs_planned": settings.total_epochs,
        "epochs_done": len(job.epochs),
        "architecture": resolve_name(settings.name),
        "model_sha256": sha256_file(folder / "model.pt"),
    }
    write_json(folder / "fold.json", values, format=FOLD_FORMAT)
    shutil.rmtree(folder / "fixres", ignore_errors=True)
    job.checkpoint.unlink(missing_ok=True)  # three times the model's size, and nothing is left to resume


def _job(shared: _Shared, folder: Path, fold: int) -> Job:
    settings, dataset, rows = shared.member.settings, shared.dataset, shared.rows
    smoothing = settings.label_smoothing
    seen = np.flatnonzero(dataset.folds[rows] != fold)
    if dataset.task is None or dataset.values is None:
        labels = dataset.labels[rows]
        targets: TargetSource = targets_of(labels, len(dataset.class_names), label_smoothing=smoothing)
        hard = settings.loss_against(labels[seen], len(dataset.class_names))
    else:
        values = dataset.values[rows]
        targets = make_task_targets(dataset.task, values, label_smoothing=smoothing)
        hard = settings.loss_against_heads(dataset.task, values[seen])
    drawn, weights = settings.sampling(dataset, rows[seen])
    draw = Draw(
        rows=seen,
        labels=drawn,
        batch_size=min(settings.batch_size, len(seen)),
        balanced=settings.balanced_sampling,
        seed=derive(settings.seed, "fold", fold),
        weights=weights,
    )
    return Job(
        title=f"{shared.member.folder or 'teacher'} {fold + 1}/{dataset.fold_count}",
        folder=folder,
        settings=settings,
        identity=_identity(settings, dataset, fold),
        store=shared.store,
        targets=targets,
        phases=make_phases("teacher", settings, draw),
        loss=LossSettings(hard=hard),
        spec=shared.spec,
        augment=settings.augmentation(shared.spec),
        validation=shared.validation,
        task=dataset.task,
    )


def _read_fold(folder: Path) -> FoldResult:
    values = read_json(folder / "fold.json", format=FOLD_FORMAT)
    return FoldResult(
        fold=values["fold"],
        ids=read_array(folder / "held_out_ids.npy"),
        log_probs=StoredTable(folder / "held_out.log_probs.npy"),
        trained_on=values["trained_on"],
        epochs_planned=values["epochs_planned"],
        epochs_done=values["epochs_done"],
        architecture=values["architecture"],
        model_sha256=values["model_sha256"],
    )


def _write_labels(ensemble: Ensemble, members: Sequence[_Member], dataset: Dataset, run: RunDir) -> Path:
    """teacher/oof.json and soft_labels/, proven out-of-fold for each architecture; their quality as a table."""
    results = {
        member.label: [_read_fold(run.teacher(fold, member.folder)) for fold in range(dataset.fold_count)]
        for member in members
    }
    store = members[0].settings.soft_label_store
    if len(members) == 1:
        (folds,) = results.values()
        _write_quality(run, _fold_rows(folds, dataset))
        return write_soft_labels(run.soft_labels, dataset, folds, store=store)
    for folds in results.values():
        prove_out_of_fold(dataset, folds)
    truth = dataset.labels.tolist() if dataset.values is None else dataset.values
    label_of = dict(zip(dataset.ids.tolist(), truth, strict=True))
    blended = blend_folds(ensemble.blend, results, label_of, task=dataset.task)
    blend = blended.to_dict(ensemble.blend, ensemble.labels)
    rows = {label: _fold_rows(folds, dataset) for label, folds in results.items()}
    _write_quality(run, _fold_rows(blended.folds, dataset), architectures=rows, blend=blend)
    teachers = [result.teacher() | {"label": label} for label, folds in results.items() for result in folds]
    return write_soft_labels(run.soft_labels, dataset, blended.folds, teachers=teachers, blend=blend, store=store)


def _fold_rows(results: Sequence[FoldResult], dataset: Dataset) -> tuple[list[Quality], Quality]:
    """The quality of each fold's answers, and of all together."""
    row_of = {name: row for row, name in enumerate(dataset.ids.tolist())}
    places = [np.array([row_of[name] for name in result.ids.tolist()], np.int64) for result in results]
    if dataset.task is None:
        judged = [_judged(result, dataset.labels[rows]) for result, rows in zip(results, places, strict=True)]
        folds = [{"fold": result.fold} | _figures(one) for result, one in zip(results, judged, strict=True)]
        return folds, _figures(Judged.join(judged))
    scores = [result.log_probs[:] for result in results]
    folds = [
        {"fold": result.fold} | _quality_of_heads(dataset, own, rows)
        for result, own, rows in zip(results, scores, places, strict=True)
    ]
    return folds, _quality_of_heads(dataset, np.concatenate(scores), np.concatenate(places))


def _judged(result: FoldResult, labels: npt.NDArray[np.int32]) -> Judged:
    blocks = row_blocks(np.arange(len(labels)), result.log_probs.shape[1])
    return Judged.join([Judged.of(np.exp(result.log_probs[rows]), labels[rows]) for rows in blocks])


def _figures(judged: Judged) -> Quality:
    """Of images, by what their held-out teachers said of them."""
    return {
        "n": len(judged.labels),
        "accuracy": judged.accuracy,
        "macro_f1": judged.macro_f1,
        "log_loss": judged.log_loss,
        "ece": judged.calibration_error(),
    }


def _quality_of_heads(dataset: Dataset, scores: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> Quality:
    """The same of several heads, of the images ``rows`` of the data set."""
    if dataset.task is None or dataset.values is None:
        raise ValueError("a data set without heads")
    return summary(Scored(dataset.task, dataset.task.probabilities(scores), dataset.values[rows]))


def _write_quality(
    run: RunDir,
    labels: tuple[list[Quality], Quality],
    *,
    architectures: Mapping[str, tuple[list[Quality], Quality]] | None = None,
    blend: Mapping[str, Any] | None = None,
) -> None:
    """teacher/oof.json and a table: the soft labels per fold and over all training images, and each architecture."""
    folds, everything = labels
    values: dict[str, Any] = {"folds": folds, "all": everything}
    shown = [(str(row["fold"]), row) for row in folds] + [("all", everything)]
    if architectures is not None and blend is not None:
        values["architectures"] = [
            {"label": label, "folds": own_folds, "all": own} for label, (own_folds, own) in architectures.items()
        ]
        values["blend"] = dict(blend)
        shown = [(label, own) for label, (_, own) in architectures.items()]
        weights = " + ".join(
            f"{weight:.2f} {label}" for label, weight in zip(architectures, blend["weights"], strict=True)
        )
        shown.append((weights, everything))
    write_json(run.root / "teacher" / "oof.json", values, format=OOF_FORMAT)
    rows = [[name, row["n"], *(f"{row[metric]:.4f}" for metric in METRICS)] for name, row in shown]
    title = "fold" if architectures is None else "teacher"
    console.err.print(console.table("teachers, out of fold", (title, "images", *METRICS), rows))
