"""Everything a run has written so far, read once. A missing file is None; a damaged one is None and a named problem."""

from __future__ import annotations

import importlib.util
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from edgedistill.artifacts import RunDir, commands_of, read_array, read_json, read_jsonl
from edgedistill.calibration import Calibration
from edgedistill.data.label_columns import LabelColumns
from edgedistill.data.manifest import Dataset, read_dataset
from edgedistill.errors import ArtifactError, EdgedistillError
from edgedistill.report.explain_section import Explanation, read_explanation
from edgedistill.tasks import Task

T = TypeVar("T")
Rows = tuple[dict[str, Any], ...]
CHUNK_ROWS = 65_536
TRAINING = ("distill", "teach")  # the commands that config.json records


@dataclass(frozen=True)
class SoftLabelKeys:
    """ids: str [N]; folds: integer [N], the held-out fold whose teacher wrote each image's soft label."""

    ids: npt.NDArray[np.str_]
    folds: npt.NDArray[np.integer]


@dataclass(frozen=True)
class Predictions:
    """One model on the test split: probs is a memory-mapped float32 [N, C], predicted int [N], confidence float32 [N]."""

    probs: npt.NDArray[np.float32]
    predicted: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float32]


@dataclass(frozen=True)
class RunRecord:
    """One run as found on disk. ``outputs``: of networks with several heads, whose ``test_values`` are float32 [N, V], the
    float32 [N, D] of each model on the test split; ``predictions`` is then empty. ``calibration``: of model.pt, on val.
    ``exported``: the full name of the network in openvino/, '' where that holds none or a cascade. ``metrics`` maps 'fold-0',
    ..., 'student', 'student-hard-labels', of further students 'student-NAME' and of further teachers 'teacher-NAME fold-0',
    ... to epoch rows."""

    run: RunDir
    config: dict[str, Any]
    dataset: Dataset | None
    data_report: dict[str, Any] | None
    metrics: dict[str, Rows]
    oof: dict[str, Any] | None
    soft_labels: SoftLabelKeys | None
    evaluation: dict[str, Any] | None
    test_ids: npt.NDArray[np.str_] | None
    test_labels: npt.NDArray[np.integer] | None
    predictions: dict[str, Predictions]
    test_values: npt.NDArray[np.float32] | None
    outputs: dict[str, npt.NDArray[np.float32]]
    calibration: Calibration | None
    deploy: dict[str, Any] | None
    certificates: tuple[tuple[str, dict[str, Any]], ...]
    exported: str
    benches: tuple[tuple[str, dict[str, Any]], ...]
    tune: dict[str, Any] | None
    explanation: Explanation | None
    problems: tuple[str, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        if self.dataset is not None:
            return self.dataset.class_names
        return tuple(str(name) for name in (self.evaluation or {}).get("classes", ()))

    @property
    def main_model(self) -> str:
        """The network that model.pt holds: the distilled student, or the hard-label one of a run without distillation."""
        models = (self.evaluation or {}).get("models", {})
        return "hard_label_student" if "student" not in models and "hard_label_student" in models else "student"

    @property
    def main_task(self) -> Task | None:
        """The heads of the main model, with the thresholds of its labels; None where every image has one label."""
        if self.evaluation is None or "heads" not in self.evaluation:
            return None
        model = self.evaluation["models"].get(self.main_model, {})
        return Task.from_dict(model.get("task", self.evaluation["heads"]))

    @property
    def trains_teachers(self) -> bool:
        """Whether it was asked for teachers of its own, as a run is that has not recorded it."""
        return setting(self.config, "student", "distillation") is not False and not setting(self.config, "soft_labels")

    def command(self, stage: str) -> str:
        """The command line that makes a missing part of this run. ``stage`` 'baseline': the hard-label student."""
        data = data_name(self.config) or "DATA"
        labels = label_flags(self.config)
        asked = _flags(self.config) or ["--data", data, *labels]
        distill = ["distill", *asked, "--out", str(self.run.root), "--resume"]
        unwanted = setting(self.config, "baselines") == "none"
        baseline = [*_without(distill, "--no-baseline"), "--baselines", "first"] if unwanted else distill
        lines = {
            "distill": distill,
            "baseline": baseline,
            "check-data": ["edgedistill", "check-data", data, *labels],
            "export": ["export-openvino", str(self.run.model)],
            "bench": ["bench-fps", str(self.run.openvino)],
            "tune": ["edgedistill", "tune", str(self.run.openvino), "--fps-target", "N"],
        }
        return shlex.join(lines[stage])


def setting(config: dict[str, Any], *path: str) -> Any:
    """A resolved setting, e.g. ``setting(config, 'student', 'model')``; None where the run did not record it."""
    for root in (config.get("settings"), config):
        value: Any = root
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def _flags(config: dict[str, Any]) -> list[str]:
    """What the last of these asked ``distill`` for, without where; [] where that is not known. ``teach`` knows the flags of
    teachers by the same names."""
    try:
        words = shlex.split(commands_of(config)[-1])
    except (IndexError, TypeError, ValueError):
        return []
    stage = next((at for at, word in enumerate(words[:2]) if word in TRAINING), None)
    if stage is None:
        return []
    flags = _without(words[stage + 1 :], "--resume")
    for named in ("--out", "--fold"):
        flags = _without(flags, named, values=1)
    return flags


def _without(words: list[str], flag: str, *, values: int = 0) -> list[str]:
    """``words`` less a flag and its values, as '--flag value' or '--flag=value'."""
    while flag in words:
        at = words.index(flag)
        words = words[:at] + words[at + 1 + values :]
    return [word for word in words if not word.startswith(f"{flag}=")]


def data_name(config: dict[str, Any]) -> str:
    """What --data was, or '' where the run did not record it."""
    return next(
        (value for path in (("data", "data"), ("data",)) if isinstance(value := setting(config, *path), str)), ""
    )


def label_flags(config: dict[str, Any]) -> list[str]:
    """The flags of a command line that name the run's label columns; none where it did not record them."""
    saved = setting(config, "data", "labels")
    try:
        return LabelColumns(**saved).flags() if isinstance(saved, dict) else []
    except (TypeError, ValueError, AttributeError, EdgedistillError):
        return []


def read_record(run: RunDir, *, bench: Path | None = None) -> RunRecord:
    """Raises ArtifactError when there is no such folder, when it is not a run, or when ``bench`` does not exist."""
    _check_is_run(run)
    if bench is not None and not bench.is_file():
        raise ArtifactError(f"{bench}: no such benchmark; make it with 'bench-fps {run.openvino} --out {bench}'")
    problems: list[str] = []
    optional = _optional(problems)
    evaluation = optional(run.evaluation / "evaluation.json", _read_evaluation)
    test_ids = optional(run.evaluation / "test_ids.npy", read_array)
    test_labels = optional(run.evaluation / "test_labels.npy", read_array)
    test_values = optional(run.evaluation / "test_values.npy", read_array)
    return RunRecord(
        run=run,
        config=optional(run.config, _read_object) or {},
        dataset=optional(run.dataset, read_dataset),
        data_report=optional(run.root / "data_report.json", _read_object),
        metrics=_read_metrics(run, optional),
        oof=optional(run.root / "teacher" / "oof.json", lambda path: read_json(path, format="edgedistill-oof")),
        soft_labels=_read_soft_label_keys(run, optional),
        evaluation=evaluation,
        test_ids=test_ids,
        test_labels=test_labels,
        predictions=_read_predictions(run, optional, evaluation, test_labels),
        test_values=test_values,
        outputs=_read_outputs(run, optional, evaluation, test_values),
        calibration=optional(run.model, _read_calibration),
        deploy=optional(run.openvino / "deploy.json", _read_object),
        certificates=tuple(
            (_stage_name(path), values)
            for path, values in _read_all(_certificate_paths(run), optional, "edgedistill-certificate")
        ),
        exported=_exported(run),
        benches=tuple(
            (path.name, values)
            for path, values in _read_all(
                [bench] if bench is not None else sorted(run.openvino.glob("bench*.json")),
                optional,
                "edgedistill-bench",
            )
        ),
        tune=optional(run.openvino / "tune.json", lambda path: read_json(path, format="edgedistill-tune")),
        explanation=optional(run.evaluation / "explain.json", read_explanation),
        problems=tuple(problems),
    )


Optional = Callable[[Path, Callable[[Path], T]], T | None]


def _optional(problems: list[str]) -> Any:
    def read(path: Path, reader: Callable[[Path], T]) -> T | None:
        if not path.exists():
            return None
        try:
            return reader(path)
        except (EdgedistillError, OSError) as error:
            problems.append(str(error))
        except Exception as error:  # whatever a damaged file leads a reader to, the others are read
            problems.append(f"{path}: {type(error).__name__}: {error}; run the command that made it again")
        return None

    return read


def _check_is_run(run: RunDir) -> None:
    if not run.root.is_dir():
        raise ArtifactError(f"{run.root}: no such run folder; make one with 'distill --data DATA --out {run.root}'")
    if not any(path.exists() for path in (run.config, run.dataset, run.model)):
        raise ArtifactError(
            f"{run.root}: not a run (no config.json, dataset.csv or model.pt); "
            f"give the folder that was --out of 'distill'"
        )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ArtifactError(f"{path}: not valid JSON ({error}); run the command that made it again") from error
    if not isinstance(values, dict):
        raise ArtifactError(f"{path}: a JSON {type(values).__name__}, expected an object; make it again")
    return values


def _read_evaluation(path: Path) -> dict[str, Any]:
    values = read_json(path, format="edgedistill-evaluation")
    kinds = {"classes": list, "models": dict, "n": int}
    wrong = [name for name, kind in kinds.items() if not isinstance(values.get(name), kind)]
    if wrong:
        raise ArtifactError(
            f"{path}: {', '.join(wrong)} missing or of another type; run 'distill --resume' to evaluate again"
        )
    return values


def _certificate_paths(run: RunDir) -> list[Path]:
    """Each stage's certificate, then the one of the final evaluation on test where there is one; openvino/, then the
    folders openvino-NAME/ of further students."""
    others = sorted(path for path in run.root.glob("openvino-*") if not path.name.endswith("-failed"))
    return [
        path
        for folder in (run.openvino, *others)
        for path in sorted(folder.glob("stages/*/certificate*.json"), key=lambda path: (path.parent, len(path.name)))
    ]


def _exported(run: RunDir) -> str:
    """RunRecord.exported: other students have folders of their own."""
    stages = [path.name for path in run.openvino.glob("stages/*")]
    return stages[0] if len(stages) == 1 else ""


def _stage_name(path: Path) -> str:
    folder = path.parents[2].name
    stage = path.parent.name + ("" if folder == "openvino" else f" in {folder}")
    return stage + (", on the test split" if path.name == "certificate-test.json" else "")


def _read_all(paths: list[Path], optional: Any, format: str) -> list[tuple[Path, dict[str, Any]]]:
    found = [(path, optional(path, lambda file: read_json(file, format=format))) for path in paths]
    return [(path, values) for path, values in found if values is not None]


def _read_metrics(run: RunDir, optional: Any) -> dict[str, Rows]:
    """The epochs that are done, also while training still runs; an epoch logged again after a resume counts once."""
    folders = sorted((run.root / "teacher").glob("fold-*"), key=lambda path: (len(path.name), path.name))
    students = [run.student, run.hard_label_student]
    students += sorted(path for path in run.root.glob("student-*") if path.is_dir() and path not in students)
    others = sorted(
        (run.root / "teacher").glob("*/fold-*"), key=lambda path: (path.parent.name, len(path.name), path.name)
    )
    named = {path.name: path for path in folders}
    named |= {f"teacher-{path.parent.name} {path.name}": path for path in others}
    named |= {path.name: path for path in students}
    metrics = {}
    for name, folder in named.items():
        rows = optional(folder / "metrics.jsonl", read_jsonl) or []
        unique = {(str(row.get("phase", "")), row.get("epoch")): row for row in rows if isinstance(row, dict)}
        if unique:
            metrics[name] = tuple(unique.values())
    return metrics


def _read_soft_label_keys(run: RunDir, optional: Any) -> SoftLabelKeys | None:
    ids = optional(run.soft_labels / "ids.npy", read_array)
    folds = optional(run.soft_labels / "fold.npy", read_array)
    if ids is None or folds is None or ids.shape != folds.shape or ids.ndim != 1:
        return None
    return SoftLabelKeys(ids, folds)


def _read_predictions(
    run: RunDir, optional: Any, evaluation: dict[str, Any] | None, labels: npt.NDArray[Any] | None
) -> dict[str, Predictions]:
    if evaluation is None or labels is None:
        return {}

    def read(path: Path) -> Predictions:
        probs = _probabilities(path, evaluation, len(labels))
        chunks = [probs[start : start + CHUNK_ROWS] for start in range(0, len(probs), CHUNK_ROWS)]
        predicted = np.concatenate([chunk.argmax(axis=1) for chunk in chunks] or [np.empty(0, np.int64)])
        confidence = np.concatenate([chunk.max(axis=1) for chunk in chunks] or [np.empty(0, np.float32)])
        return Predictions(probs, predicted, confidence)

    return _read_models(run, optional, evaluation, read)


def _read_outputs(
    run: RunDir, optional: Any, evaluation: dict[str, Any] | None, values: npt.NDArray[Any] | None
) -> dict[str, npt.NDArray[np.float32]]:
    if evaluation is None or values is None or "heads" not in evaluation:
        return {}
    return _read_models(run, optional, evaluation, lambda path: _probabilities(path, evaluation, len(values)))


def _read_models(run: RunDir, optional: Any, evaluation: dict[str, Any], read: Callable[[Path], T]) -> dict[str, T]:
    found = {}
    for name in evaluation.get("models", {}):
        values = optional(run.evaluation / f"{Path(str(name)).name}.probs.npy", read)
        if values is not None:
            found[str(name)] = values
    return found


def _probabilities(path: Path, evaluation: dict[str, Any], images: int) -> npt.NDArray[np.float32]:
    probs = read_array(path, mmap=True)
    expected = (images, len(evaluation.get("classes", ())))
    if probs.shape != expected:
        raise ArtifactError(
            f"{path}: shape {list(probs.shape)}, expected {list(expected)}; run 'distill --resume' to evaluate again"
        )
    return probs


def _read_calibration(path: Path) -> Calibration | None:
    """Where torch is not installed nobody can read model.pt, and the page does without its curve."""
    if importlib.util.find_spec("torch") is None:
        return None
    from edgedistill.training.checkpoints import read_calibration

    return read_calibration(path)
