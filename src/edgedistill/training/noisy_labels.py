"""Which labels look wrong: where the held-out teacher is confidently of another opinion. Needs numpy only.

Confident learning (Northcutt et al., 1911.00068): class j's threshold is the mean probability of j over the images that
are labelled j; an image is a suspect if another class reaches its own threshold, or the most probable of several that
do. The teacher never saw the image, so it cannot merely have memorised the wrong label.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgedistill.artifacts import atomic_path
from edgedistill.data.manifest import Dataset

COLUMNS = ("id", "label", "suggested", "self_confidence", "suggested_probability", "margin", "suspect")
LARGEST_CLASS_LOSS = 0.5  # of a class's training images: a class that the teachers never learnt must not vanish


@dataclass(frozen=True, eq=False)
class NoisyLabels:
    """The training images, the most doubtful first: suspects, then the others, each by rising margin.

    ``rows``: int64 [N] of the data set. ``suggested``: int32 [N], the class that the teacher prefers to the label.
    ``self_confidence``: float [N], probability of the label. ``margin``: float [N], that minus the probability of
    ``suggested``, -1 to 1. ``suspects``: bool [N].
    """

    rows: npt.NDArray[np.int64]
    suggested: npt.NDArray[np.int32]
    self_confidence: npt.NDArray[np.float64]
    margin: npt.NDArray[np.float64]
    suspects: npt.NDArray[np.bool_]


def find_noisy_labels(dataset: Dataset, log_probs: npt.NDArray[np.float32]) -> NoisyLabels:
    """``log_probs``: what read_soft_labels returns, float32 [len(dataset), C]."""
    rows = dataset.rows("train")
    probabilities = np.exp(log_probs[rows].astype(np.float64))
    labels = dataset.labels[rows]
    everyone = np.arange(len(rows))
    own = probabilities[everyone, labels]
    counts = np.bincount(labels, minlength=probabilities.shape[1])
    sums = np.bincount(labels, weights=own, minlength=probabilities.shape[1])
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)  # nobody is suspected of an empty class
    others = probabilities.copy()
    others[everyone, labels] = -1.0
    confident = np.where(others >= thresholds, others, -1.0)
    suspects = (confident.max(axis=1) >= 0) & (confident.max(axis=1) > own)
    suggested = np.where(suspects, confident.argmax(axis=1), others.argmax(axis=1)).astype(np.int32)
    margin = own - probabilities[everyone, suggested]
    order = np.lexsort((margin, ~suspects))
    return NoisyLabels(rows[order], suggested[order], own[order], margin[order], suspects[order])


def rows_to_drop(noisy: NoisyLabels, dataset: Dataset, share: float) -> npt.NDArray[np.int64]:
    """The most doubtful suspects: at most ``share`` (0 to 1) of the training images and half of any class; ascending."""
    limit = int(share * len(noisy.rows))
    left = np.bincount(dataset.labels[noisy.rows]) * LARGEST_CLASS_LOSS
    dropped: list[int] = []
    for row in noisy.rows[noisy.suspects].tolist():
        label = dataset.labels[row]
        if len(dropped) < limit and left[label] >= 1:
            left[label] -= 1
            dropped.append(row)
    return np.array(sorted(dropped), np.int64)


def write_noisy_labels(path: Path, dataset: Dataset, log_probs: npt.NDArray[np.float32]) -> int:
    """noisy_labels.csv, a line per training image, the most doubtful first; returns the number of suspects."""
    noisy, names = find_noisy_labels(dataset, log_probs), dataset.class_names
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        columns = (noisy.rows, noisy.suggested, noisy.self_confidence, noisy.margin, noisy.suspects)
        for row, suggested, own, margin, suspect in zip(*(column.tolist() for column in columns), strict=True):
            values = (f"{own:.6f}", f"{own - margin:.6f}", f"{margin:.6f}", int(suspect))
            writer.writerow((dataset.ids[row], names[dataset.labels[row]], names[suggested], *values))
    return int(noisy.suspects.sum())
