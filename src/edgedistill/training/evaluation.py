"""The one reading of the test split: majority baseline, students and teachers, with intervals and paired tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill import console
from edgedistill.artifacts import RunDir, write_array, write_json
from edgedistill.data.manifest import Dataset
from edgedistill.errors import ArtifactError, DataError
from edgedistill.metrics import (
    MetricName,
    accuracy,
    bootstrap_interval,
    confusion_matrix,
    expected_calibration_error,
    log_loss,
    macro_f1,
    paired_bootstrap_difference,
)
from edgedistill.tasks import Task
from edgedistill.training.checkpoints import LoadedModel, read_model
from edgedistill.training.predict import predict_logits
from edgedistill.training.settings import choose_device
from edgedistill.training.task_evaluation import head_table, priors, task_evaluation
from edgedistill.training.views import WHOLE, predict_probabilities, views_of

EVALUATION_FORMAT = "edgedistill-evaluation"
MAJORITY = "majority"
PAIRED_METRICS: tuple[MetricName, ...] = ("accuracy", "macro_f1")

Probabilities = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Combination:
    """A model made of others: ``members``: their names; ``combine``: their probabilities [N, C] to its own."""

    members: tuple[str, ...]
    combine: Callable[[Sequence[npt.NDArray[Any]]], npt.NDArray[Any]]


def evaluate_test(
    run: RunDir,
    dataset: Dataset,
    models: dict[str, list[Path]],
    *,
    combinations: Mapping[str, Combination] | None = None,
    device: str = "auto",
    batch_size: int = 64,
) -> Path:
    """Write evaluation/evaluation.json, test_ids.npy, test_labels.npy and NAME.probs.npy (float32 [N, C]) per model; with
    several heads test_values.npy (float32 [N, V]) in the place of test_labels.npy, and each head's figures.

    ``models``: 'student', 'hard_label_student', 'teacher', 'student-NAME' ... to their model.pt files; several files are an ensemble
    whose probabilities are averaged. ``combinations``: further models, made of these. The majority baseline comes from the training labels. Raises DataError without a
    test split and ArtifactError for a model of other classes or another data set.
    """
    rows = dataset.rows("test")
    if not len(rows):
        raise DataError(
            "the data set has no test split, so nothing can be evaluated; freeze it again with --test-fraction 0.2"
        )
    labels = dataset.labels[rows]
    probabilities = {MAJORITY: majority(dataset, len(rows))}
    temperatures: dict[str, float] = {}
    tasks: dict[str, Task] = {}
    for name, paths in models.items():
        loaded = [_load(path, dataset) for path in paths]
        members = [
            _probabilities(member, dataset.paths[rows], name=name, device=device, batch_size=batch_size)
            for member in loaded
        ]
        probabilities[name] = np.stack(members).mean(axis=0, dtype=np.float64).astype(np.float32)
        if len(loaded) == 1:
            temperatures[name], tasks[name] = loaded[0].temperature, loaded[0].task
    for name, combination in (combinations or {}).items():
        members = [probabilities[member] for member in combination.members]
        probabilities[name] = combination.combine(members).astype(np.float32)
    for name, values in probabilities.items():
        write_array(run.evaluation / f"{name}.probs.npy", values)
    write_array(run.evaluation / "test_ids.npy", dataset.ids[rows].astype(str))
    if dataset.task is not None and dataset.values is not None:
        write_array(run.evaluation / "test_values.npy", dataset.values[rows])
        pairs = pairs_of(probabilities)
        result = task_evaluation(dataset.task, probabilities, dataset.values[rows], pairs=pairs, own=tasks)
        write_json(run.evaluation / "evaluation.json", result, format=EVALUATION_FORMAT)
        return run.evaluation / "evaluation.json"
    write_array(run.evaluation / "test_labels.npy", labels.astype(np.int32))
    result = {
        "split": "test",
        "n": len(rows),
        "classes": list(dataset.class_names),
        "models": {
            name: _row(values, labels) | ({"temperature": temperatures[name]} if name in temperatures else {})
            for name, values in probabilities.items()
        },
        "paired": [
            _pair(a, b, metric, probabilities, labels) for a, b in pairs_of(probabilities) for metric in PAIRED_METRICS
        ],
    }
    write_json(run.evaluation / "evaluation.json", result, format=EVALUATION_FORMAT)
    return run.evaluation / "evaluation.json"


def pairs_of(names: Iterable[str]) -> list[tuple[str, str]]:
    """Who is compared with whom: each student with the majority, with its own hard-label form and with the first
    student; the teacher with the first student, and of several each architecture with their combination. 'student' is
    the first, 'student-NAME' another."""
    known = list(names)
    pairs = [("student", MAJORITY), ("student", "hard_label_student"), ("teacher", "student")]
    for label in [name.removeprefix("student-") for name in known if name.startswith("student-")]:
        name = f"student-{label}"
        pairs += [(name, MAJORITY), (name, f"hard_label_student-{label}"), (name, "student")]
    pairs += [("teacher", name) for name in known if name.startswith("teacher-")]
    return [(a, b) for a, b in pairs if a in known and b in known]


def majority(dataset: Dataset, count: int) -> Probabilities:
    """The class shares of the training images, for every image: the best answer that looks at none."""
    if dataset.task is not None and dataset.values is not None:
        return priors(dataset.task, dataset.values[dataset.rows("train")], count)
    counts = np.bincount(dataset.labels[dataset.rows("train")], minlength=len(dataset.class_names))
    return np.tile((counts / max(1, counts.sum())).astype(np.float32), (count, 1))


def _load(path: Path, dataset: Dataset) -> LoadedModel:
    loaded = read_model(path)
    if loaded.classes != dataset.outputs or loaded.dataset_hash != dataset.hash:
        raise ArtifactError(
            f"{path}: trained on other classes or another data set than dataset.csv; evaluate it in its own run"
        )
    return loaded


def _probabilities(
    loaded: LoadedModel, paths: npt.NDArray[np.str_], *, name: str, device: str, batch_size: int
) -> Probabilities:
    """float32 [N, C] at the model's own temperature, and for the mean of the views that its settings name."""
    model, title = loaded.model.to(choose_device(device)), f"test images, {name.replace('_', '-')}"
    views = views_of(str(loaded.settings.get("tta", "")))
    if views != (WHOLE,):
        return predict_probabilities(
            model,
            paths,
            loaded.input_spec,
            views=views,
            temperature=loaded.temperature,
            task=loaded.task,
            batch_size=batch_size,
            title=title,
        )
    logits = predict_logits(model, paths, loaded.input_spec, batch_size=batch_size, title=title)
    return loaded.task.probabilities(logits, loaded.temperature).astype(np.float32)


def _row(probabilities: Probabilities, labels: npt.NDArray[np.int32]) -> dict[str, Any]:
    return {
        "accuracy": accuracy(probabilities, labels),
        "accuracy_ci95": list(bootstrap_interval("accuracy", probabilities, labels)),
        "macro_f1": macro_f1(probabilities, labels),
        "macro_f1_ci95": list(bootstrap_interval("macro_f1", probabilities, labels)),
        "log_loss": log_loss(probabilities, labels),
        "ece": expected_calibration_error(probabilities, labels),
        "confusion": confusion_matrix(probabilities, labels).tolist(),
    }


def _pair(
    a: str, b: str, metric: MetricName, probabilities: dict[str, Probabilities], labels: npt.NDArray[np.int32]
) -> dict[str, Any]:
    """a minus b on the same images; the p-value is McNemar's exact test, which exists for accuracy alone."""
    paired = paired_bootstrap_difference(metric, probabilities[a], probabilities[b], labels)
    return {
        "a": a,
        "b": b,
        "metric": metric,
        "difference": paired.difference,
        "ci95": list(paired.ci95),
        "p_value": paired.p_value,
    }


def comparison_table(evaluation: dict[str, Any]) -> Any:
    """evaluation.json as a table for ``console.out.print``."""
    rows = [
        [
            name.replace("_", "-"),
            *(
                f"{values[metric]:.3f} [{values[metric + '_ci95'][0]:.3f}, {values[metric + '_ci95'][1]:.3f}]"
                for metric in ("accuracy", "macro_f1")
            ),
            f"{values['log_loss']:.3f}",
            f"{values['ece']:.3f}",
        ]
        for name, values in evaluation["models"].items()
    ]
    columns = ("model", "accuracy [95%]", "macro-F1 [95%]", "log-loss", "ECE")
    if "heads" in evaluation:
        return head_table(evaluation)
    return console.table(f"test split, {evaluation['n']} images", columns, rows)
