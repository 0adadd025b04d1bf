"""One soft label from several architectures: a weighted vote of what their held-out teachers say of each image.

The weights may be fitted on the out-of-fold answers. They are cross-fitted: the weights that mix the labels of one
fold come from the other folds alone, so that no image's own label had a say in its soft label.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgedistill.errors import DataError, UsageError
from edgedistill.training.soft_labels import FoldResult

Floats = npt.NDArray[np.floating[Any]]

HARD_VOTE_REST = 1e-3  # spread over all classes, so that a class without votes keeps a finite log-probability
LEAST_LIKELIHOOD = 1e-12
EM_STEPS = 2000
EM_TOLERANCE = 1e-7


@dataclass(frozen=True, kw_only=True)
class BlendSettings:
    """How the architectures' answers become one.

    ``weights``: 'oof' (fitted to the least log-loss out of fold), 'score' (in proportion to accuracy out of fold),
    'equal', or numbers with commas between, one for each architecture, scaled to sum to 1. ``vote``: 'soft' averages
    probabilities, 'hard' counts each architecture's first choice. ``override``: 'NAME:0.9' takes that architecture's
    answer alone wherever its largest probability is at least 0.9. Raises UsageError for what cannot be read.
    """

    weights: str = "oof"
    vote: Literal["soft", "hard"] = "soft"
    override: str = ""

    def __post_init__(self) -> None:
        if self.vote not in ("soft", "hard"):
            raise UsageError(f"--teacher-vote {self.vote}: expected soft or hard")
        self.given_weights()
        self.override_parts()

    def given_weights(self) -> tuple[float, ...] | None:
        """The numbers of ``weights``, or None for 'oof', 'score' and 'equal'."""
        if self.weights in ("oof", "score", "equal"):
            return None
        try:
            numbers = tuple(float(part) for part in self.weights.split(","))
        except ValueError as error:
            raise UsageError(
                f"--teacher-blend {self.weights}: expected oof, score, equal, or numbers such as 0.45,0.55"
            ) from error
        if not all(0 <= number < float("inf") for number in numbers) or not sum(numbers) > 0:
            raise UsageError(f"--teacher-blend {self.weights}: expected numbers of 0 or more, one of them above 0")
        return numbers

    def override_parts(self) -> tuple[str, float] | None:
        """(name, threshold) of ``override``, or None."""
        if not self.override:
            return None
        name, _, text = self.override.rpartition(":")
        try:
            threshold = float(text)
        except ValueError:
            threshold = -1.0
        if not name or not 0 < threshold <= 1:
            raise UsageError(
                f"--teacher-override {self.override}: expected NAME:THRESHOLD with a threshold above 0 to 1, "
                "such as swinb:0.9"
            )
        return name, threshold

    def check(self, labels: Sequence[str]) -> None:
        """Raises UsageError unless these settings fit architectures of these names."""
        if len(labels) == 1 and self != BlendSettings():
            raise UsageError(
                "--teacher-blend, --teacher-vote and --teacher-override need several teachers: --teacher effb4,swinb"
            )
        given, override = self.given_weights(), self.override_parts()
        if given is not None and len(given) != len(labels):
            raise UsageError(
                f"--teacher-blend {self.weights}: {len(given)} numbers for {len(labels)} teachers ({', '.join(labels)})"
            )
        if override is not None and override[0] not in labels:
            raise UsageError(
                f"--teacher-override {self.override}: {override[0]} is none of the teachers ({', '.join(labels)})"
            )


@dataclass(frozen=True)
class Blend:
    """A combination that is settled: ``weights`` sum to 1; ``override``: (architecture's number, threshold)."""

    weights: tuple[float, ...]
    vote: Literal["soft", "hard"]
    override: tuple[int, float] | None = None

    def __call__(self, members: Sequence[Floats]) -> npt.NDArray[np.float64]:
        """Probabilities of each architecture, float [N, C], in order -> those of the combination, float64 [N, C]."""
        votes = [_votes(member, self.vote) for member in members]
        mixed = np.zeros(votes[0].shape)
        for weight, vote in zip(self.weights, votes, strict=True):
            mixed += weight * vote
        if self.override is not None:
            number, threshold = self.override
            sure = members[number].max(axis=1) >= threshold
            mixed[sure] = votes[number][sure]
        return mixed


def _votes(probabilities: Floats, vote: str) -> npt.NDArray[np.float64]:
    if vote == "soft":
        return probabilities.astype(np.float64)
    classes = probabilities.shape[1]
    return (1 - HARD_VOTE_REST) * np.eye(classes)[probabilities.argmax(axis=1)] + HARD_VOTE_REST / classes


def fit_blend(
    settings: BlendSettings, labels: Sequence[str], members: Sequence[Floats], truth: npt.NDArray[np.integer[Any]]
) -> Blend:
    """The combination that ``settings`` ask for; 'oof' and 'score' look at ``members`` (float [N, C] each) and ``truth``."""
    given, override = settings.given_weights(), settings.override_parts()
    rows = np.arange(len(truth))
    if given is not None:
        weights = np.array(given)
    elif settings.weights == "equal" or not len(truth):
        weights = np.ones(len(members))
    elif settings.weights == "score":
        weights = np.array([(member.argmax(axis=1) == truth).mean() for member in members])
        weights = weights if weights.sum() > 0 else np.ones(len(members))
    else:
        weights = mixture_weights(np.stack([_votes(member, settings.vote)[rows, truth] for member in members]))
    return Blend(
        weights=tuple(float(weight) for weight in weights / weights.sum()),
        vote=settings.vote,
        override=None if override is None else (list(labels).index(override[0]), override[1]),
    )


def mixture_weights(likelihoods: Floats) -> npt.NDArray[np.float64]:
    """The weights w on the simplex that minimise the mean of -log(sum_a w_a p_a), float64 [A].

    ``likelihoods``: [A, N], the probability that each architecture gave to the right class. The loss is convex; these
    are the EM steps of a mixture whose components stand still (Dempster et al. 1977), the stacking of predictive
    distributions of Yao et al., 1704.02030.
    """
    likelihoods = np.maximum(likelihoods.astype(np.float64), LEAST_LIKELIHOOD)
    weights = np.full(len(likelihoods), 1 / len(likelihoods))
    for _ in range(EM_STEPS):
        joint = weights[:, None] * likelihoods
        better = (joint / joint.sum(axis=0)).mean(axis=1)
        moved = np.abs(better - weights).max()
        weights = better
        if moved < EM_TOLERANCE:
            break
    return weights


@dataclass(frozen=True, eq=False)
class Blended:
    """``folds``: the combined answers of each held-out fold. ``overall``: fitted on all folds, for images of none."""

    folds: list[FoldResult]
    fold_blends: list[Blend]
    overall: Blend

    def to_dict(self, settings: BlendSettings, labels: Sequence[str]) -> dict[str, Any]:
        return {
            "teachers": list(labels),
            "settings": dataclasses.asdict(settings),
            "weights": list(self.overall.weights),
            "fold_weights": [list(blend.weights) for blend in self.fold_blends],
        }


def blend_folds(
    settings: BlendSettings, results: Mapping[str, Sequence[FoldResult]], label_of: Mapping[str, int]
) -> Blended:
    """Combine each fold's answers of all architectures, with weights that come from the other folds.

    ``results``: by name, in the order of the weights, each with the same folds. ``label_of``: class of each image id.
    Raises DataError when the architectures labelled different images.
    """
    names = list(results)
    folds = [_aligned(names, group) for group in zip(*results.values(), strict=True)]
    members = [[np.exp(result.log_probs.astype(np.float64)) for result in group] for group in folds]
    truth = [np.array([label_of[name] for name in group[0].ids.tolist()], np.int64) for group in folds]

    def fit(numbers: Sequence[int]) -> Blend:
        chosen = [np.concatenate([members[number][index] for number in numbers]) for index in range(len(names))]
        return fit_blend(settings, names, chosen, np.concatenate([truth[number] for number in numbers]))

    everything = range(len(folds))
    blends = [fit([other for other in everything if other != number]) for number in everything]
    combined = [
        dataclasses.replace(
            group[0],
            log_probs=_log(blend(probabilities)),
            architecture="+".join(result.architecture for result in group),
            model_sha256="+".join(result.model_sha256 for result in group),
        )
        for group, probabilities, blend in zip(folds, members, blends, strict=True)
    ]
    return Blended(combined, blends, fit(everything))


def _log(probabilities: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    logs = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
    return logs.astype(np.float32)


def _aligned(names: Sequence[str], group: Sequence[FoldResult]) -> list[FoldResult]:
    """The results of one fold with their images in the order of the first."""
    first = group[0].ids.tolist()
    aligned = []
    for name, result in zip(names, group, strict=True):
        row_of = {image: row for row, image in enumerate(result.ids.tolist())}
        if result.fold != group[0].fold or row_of.keys() != set(first):
            raise DataError(f"teachers {names[0]} and {name} labelled different images in fold {group[0].fold}")
        order = [row_of[image] for image in first]
        aligned.append(dataclasses.replace(result, ids=result.ids[order], log_probs=result.log_probs[order]))
    return aligned
