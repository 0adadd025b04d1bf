"""One soft label from several architectures: a weighted vote of what their held-out teachers say of each image.

The weights may be fitted on the out-of-fold answers. They are cross-fitted: the weights that mix the labels of one
fold come from the other folds alone, so that no image's own label had a say in its soft label.

With several heads each one is voted on by itself, under one weight for each architecture: a softmax head as a label of
its own, a sigmoid head label by label, a value as the weighted mean. Answers are then [N, D], as ``tasks`` has them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgedistill.data.soft_label_store import row_blocks
from edgedistill.errors import DataError, UsageError
from edgedistill.tasks import Head, Task, Values, answers_of
from edgedistill.training.heads import logs_of, shares_from
from edgedistill.training.soft_labels import FoldResult, Ordered, ScoreTable

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
    answer alone wherever its largest probability is at least 0.9, 'NAME' wherever it exceeds the combination's largest.
    Raises UsageError for what cannot be read.
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

    def override_parts(self) -> tuple[str, float | None] | None:
        """(name, threshold) of ``override``, or None; the threshold is None where the name stands alone."""
        if not self.override:
            return None
        name, colon, text = self.override.rpartition(":")
        if not colon:
            return text, None
        try:
            threshold = float(text)
        except ValueError:
            threshold = -1.0
        if not name or not 0 < threshold <= 1:
            raise UsageError(
                f"--teacher-override {self.override}: expected NAME, such as swinb, or NAME:THRESHOLD with a threshold "
                "above 0 to 1, such as swinb:0.9"
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
    """A combination that is settled: ``weights`` sum to 1; ``override``: (architecture's number, threshold), where None
    stands for the combination's own sureness. ``task``: None where images have one label."""

    weights: tuple[float, ...]
    vote: Literal["soft", "hard"]
    override: tuple[int, float | None] | None = None
    task: Task | None = None

    def __call__(self, members: Sequence[Floats]) -> npt.NDArray[np.float64]:
        """Probabilities of each architecture, float [N, C], in order -> those of the combination, float64 [N, C]; of
        several heads [N, D] -> [N, D]."""
        if self.task is None:
            return self._mixed(members, None)
        parts = [self._mixed([member[:, part] for member in members], head) for head, part in self.task.slices()]
        return np.concatenate(parts, axis=1)

    def _mixed(self, members: Sequence[Floats], head: Head | None) -> npt.NDArray[np.float64]:
        """One head's vote, [N, width] each; ``head``: None where it is the only one."""
        votes = [_votes(member, self.vote, head) for member in members]
        mixed = np.zeros(votes[0].shape)
        for weight, vote in zip(self.weights, votes, strict=True):
            mixed += weight * vote
        if self.override is not None and (head is None or head.kind != "regression"):  # no value says how sure it is
            number, threshold = self.override
            own = _sureness(members[number], head)
            sure = own > _sureness(mixed, head) if threshold is None else own >= threshold
            mixed[sure] = votes[number][sure]
        return mixed


def _votes(probabilities: Floats, vote: str, head: Head | None = None) -> npt.NDArray[np.float64]:
    """[N, width] -> what an architecture adds under its weight; a value has no first choice and stays as it is."""
    if vote == "soft" or (head is not None and head.kind == "regression"):
        return probabilities.astype(np.float64)
    if head is not None and head.kind == "sigmoid":
        return (1 - HARD_VOTE_REST) * answers_of(head, probabilities).astype(np.float64) + HARD_VOTE_REST / 2
    classes = probabilities.shape[1]
    return (1 - HARD_VOTE_REST) * np.eye(classes)[probabilities.argmax(axis=1)] + HARD_VOTE_REST / classes


def _sureness(probabilities: Floats, head: Head | None) -> Floats:
    """[N], the largest probability of each image; of a sigmoid head [N, C], that of each label's yes and no."""
    if head is not None and head.kind == "sigmoid":
        return np.maximum(probabilities, 1 - probabilities)
    return probabilities.max(axis=1)


def fit_blend(
    settings: BlendSettings,
    labels: Sequence[str],
    members: Sequence[Floats],
    truth: npt.NDArray[np.integer[Any]] | Values,
    *,
    task: Task | None = None,
) -> Blend:
    """The combination that ``settings`` ask for; 'oof' and 'score' look at ``members`` (float [N, C] each) and ``truth``.

    ``truth``: classes, int [N]; of several heads, ``task``, values, float32 [N, V], and ``members`` are [N, D] each.
    """
    if task is None:
        return _fitted(settings, labels, Evidence.of(settings.vote, members, truth.astype(np.int64)))
    if settings.weights == "score" and len(truth):
        return _settled(settings, labels, np.array([_score(member, truth, task) for member in members]), task)
    if settings.weights == "oof" and len(truth):
        return _settled(settings, labels, mixture_weights(*_likelihoods(settings.vote, members, truth, task)), task)
    return _settled(settings, labels, np.ones(len(members)), task)


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that weights are fitted on, of images with one label: ``likelihoods``, float64 [A, N], what each architecture's
    vote gives the label, and ``hits``, bool [A, N], whether it is its first choice."""

    likelihoods: npt.NDArray[np.float64]
    hits: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, vote: str, members: Sequence[Floats], truth: npt.NDArray[np.integer[Any]]) -> Evidence:
        """``members``: probabilities, float [N, C] each."""
        rows = np.arange(len(truth))
        return cls(
            np.stack([_votes(member, vote)[rows, truth] for member in members]),
            np.stack([member.argmax(axis=1) == truth for member in members]),
        )

    @classmethod
    def join(cls, parts: Sequence[Evidence]) -> Evidence:
        return cls(
            np.concatenate([part.likelihoods for part in parts], axis=1),
            np.concatenate([part.hits for part in parts], axis=1),
        )


def _fitted(settings: BlendSettings, labels: Sequence[str], evidence: Evidence) -> Blend:
    if settings.weights == "score" and evidence.hits.size:
        return _settled(settings, labels, evidence.hits.mean(axis=1))
    if settings.weights == "oof":
        return _settled(settings, labels, mixture_weights(evidence.likelihoods))
    return _settled(settings, labels, np.ones(len(evidence.hits)))


def _settled(
    settings: BlendSettings, labels: Sequence[str], weights: npt.NDArray[np.float64], task: Task | None = None
) -> Blend:
    """With the weights that the settings give, else with these; where all of them are 0, all are alike."""
    given, override = settings.given_weights(), settings.override_parts()
    weights = weights if given is None else np.array(given)
    weights = weights if weights.sum() > 0 else np.ones(len(weights))
    return Blend(
        weights=tuple(float(weight) for weight in weights / weights.sum()),
        vote=settings.vote,
        override=None if override is None else (list(labels).index(override[0]), override[1]),
        task=task,
    )


def _score(probabilities: Floats, truth: npt.NDArray[Any], task: Task) -> float:
    """The accuracy, mean over the heads of classes, of the labels that are known."""
    shares = []
    for head, own, values in task.parts(probabilities, truth):
        known = ~np.isnan(values)
        if head.kind != "regression" and known.any():
            wanted = values if head.kind == "softmax" else values >= 0.5
            shares.append((answers_of(head, own) == wanted)[known].mean())
    return float(np.mean(shares)) if shares else 0.0


def _likelihoods(vote: str, members: Sequence[Floats], values: npt.NDArray[Any], task: Task) -> tuple[Floats, Floats]:
    """What ``mixture_weights`` takes: the labels that are known, of all heads of classes one after the other.

    A label of a sigmoid head that applies by 0.7 is an event of weight 0.7 and another, that it does not, of 0.3.
    """
    found, counts = [np.zeros((len(members), 0))], [np.zeros(0)]
    for (head, columns), (_, part) in zip(task.columns(), task.slices(), strict=True):
        truth = values[:, columns].astype(np.float64)
        known = ~np.isnan(truth)
        if head.kind == "regression" or not known.any():
            continue
        votes = np.stack([_votes(member[:, part], vote, head) for member in members])
        if head.kind == "softmax":
            rows = np.flatnonzero(known)
            found.append(votes[:, rows, truth[rows, 0].astype(np.int64)])
            counts.append(np.ones(len(rows)))
        else:
            found += [votes[:, known], 1 - votes[:, known]]
            counts += [truth[known], 1 - truth[known]]
    return np.concatenate(found, axis=1), np.concatenate(counts)


def mixture_weights(likelihoods: Floats, counts: Floats | None = None) -> npt.NDArray[np.float64]:
    """The weights w on the simplex that minimise the mean of -log(sum_a w_a p_a), float64 [A].

    ``likelihoods``: [A, N], the probability that each architecture gave to the right class. ``counts``: [N], how much
    each one counts in the mean; None: all alike. The loss is convex; these are the EM steps of a mixture whose
    components stand still (Dempster et al. 1977), the stacking of predictive distributions of Yao et al., 1704.02030.
    Without anything that counts all weights are equal.
    """
    likelihoods = np.maximum(likelihoods.astype(np.float64), LEAST_LIKELIHOOD)
    weights = np.full(len(likelihoods), 1 / len(likelihoods))
    if not likelihoods.size or (counts is not None and not counts.sum() > 0):
        return weights
    for _ in range(EM_STEPS):
        joint = weights[:, None] * likelihoods
        shares = joint / joint.sum(axis=0)
        better = shares.mean(axis=1) if counts is None else shares @ counts / counts.sum()
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
        """What ``blend_from_dict`` reads."""
        heads = {} if self.overall.task is None else {"heads": self.overall.task.to_dict()}
        return heads | {
            "teachers": list(labels),
            "settings": dataclasses.asdict(settings),
            "weights": list(self.overall.weights),
            "fold_weights": [list(blend.weights) for blend in self.fold_blends],
        }


def blend_from_dict(values: Mapping[str, Any]) -> Blend:
    """The combination fitted on all folds, from what ``Blended.to_dict`` wrote."""
    settings = BlendSettings(**values["settings"])
    override = settings.override_parts()
    return Blend(
        weights=tuple(values["weights"]),
        vote=settings.vote,
        override=None if override is None else (values["teachers"].index(override[0]), override[1]),
        task=Task.from_dict(values["heads"]) if "heads" in values else None,
    )


def blend_folds(
    settings: BlendSettings,
    results: Mapping[str, Sequence[FoldResult]],
    label_of: Mapping[str, Any],
    *,
    task: Task | None = None,
) -> Blended:
    """Combine each fold's answers of all architectures, with weights that come from the other folds.

    ``results``: by name, in the order of the weights, each with the same folds. ``label_of``: class of each image id; of
    several heads, ``task``, its values, float32 [V]. Raises DataError when the architectures labelled different images.
    """
    names = list(results)
    folds = [_aligned(names, group) for group in zip(*results.values(), strict=True)]
    everything = range(len(folds))
    fit = (
        _fit_labels(settings, names, folds, label_of)
        if task is None
        else _fit_heads(settings, names, folds, label_of, task)
    )
    blends = [fit([other for other in everything if other != number]) for number in everything]
    combined = [
        dataclasses.replace(
            group[0],
            log_probs=Mixed(tuple(result.log_probs for result in group), blend),
            architecture="+".join(result.architecture for result in group),
            model_sha256="+".join(result.model_sha256 for result in group),
        )
        for group, blend in zip(folds, blends, strict=True)
    ]
    return Blended(combined, blends, fit(everything))


Fit = Callable[[Sequence[int]], Blend]  # the numbers of folds -> the combination fitted on them


def _fit_labels(
    settings: BlendSettings, names: Sequence[str], folds: Sequence[Sequence[FoldResult]], label_of: Mapping[str, Any]
) -> Fit:
    """Of images with one label. Their answers are gone through once, a block at a time, and only where weights are fitted."""
    if settings.weights not in ("oof", "score"):
        return lambda numbers: _settled(settings, names, np.ones(len(names)))

    def found(group: Sequence[FoldResult]) -> Evidence:
        truth = np.array([label_of[name] for name in group[0].ids.tolist()], np.int64)
        parts = [
            Evidence.of(settings.vote, [shares_from(None, result.log_probs[rows]) for result in group], truth[rows])
            for rows in row_blocks(np.arange(len(truth)), group[0].log_probs.shape[1])
        ]
        return Evidence.join(parts)

    evidence = [found(group) for group in folds]
    return lambda numbers: _fitted(settings, names, Evidence.join([evidence[number] for number in numbers]))


def _fit_heads(
    settings: BlendSettings,
    names: Sequence[str],
    folds: Sequence[Sequence[FoldResult]],
    label_of: Mapping[str, Any],
    task: Task,
) -> Fit:
    members = [[shares_from(task, result.log_probs[:]) for result in group] for group in folds]
    truth = [np.array([label_of[name] for name in group[0].ids.tolist()], np.float32) for group in folds]

    def fit(numbers: Sequence[int]) -> Blend:
        chosen = [np.concatenate([members[number][index] for number in numbers]) for index in range(len(names))]
        return fit_blend(settings, names, chosen, np.concatenate([truth[number] for number in numbers]), task=task)

    return fit


@dataclass(frozen=True, eq=False)
class Mixed:
    """ScoreTable of a combination, computed where it is read. ``members``: each architecture's, of the same images."""

    members: tuple[ScoreTable, ...]
    blend: Blend

    @property
    def shape(self) -> tuple[int, ...]:
        return self.members[0].shape

    def __len__(self) -> int:
        return len(self.members[0])

    def __getitem__(self, rows: Any) -> npt.NDArray[np.float32]:
        task = self.blend.task
        return logs_of(task, self.blend([shares_from(task, member[rows]) for member in self.members]))


def _aligned(names: Sequence[str], group: Sequence[FoldResult]) -> list[FoldResult]:
    """The results of one fold with their images in the order of the first."""
    first = group[0].ids.tolist()
    aligned = []
    for name, result in zip(names, group, strict=True):
        row_of = {image: row for row, image in enumerate(result.ids.tolist())}
        if result.fold != group[0].fold or row_of.keys() != set(first):
            raise DataError(f"teachers {names[0]} and {name} labelled different images in fold {group[0].fold}")
        order = np.array([row_of[image] for image in first], np.int64)
        aligned.append(dataclasses.replace(result, ids=result.ids[order], log_probs=Ordered(result.log_probs, order)))
    return aligned
