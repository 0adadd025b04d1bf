"""What a network answers: one or several heads over one output vector. Needs numpy only.

The network gives one vector of D outputs per image, its heads side by side: a softmax head has a logit for each class of
one attribute, a sigmoid head a logit for each label that may apply, a regression head one value in units of the training
images' standard deviation. Training, export and the runtime read it with the same code.

Everywhere: ``logits`` float [N, D]; ``probabilities`` float64 [N, D], where a regression head's column holds the value in
its own units; ``values`` float32 [N, V], what is true: a softmax head has one column with the class's number, a sigmoid
head one for each label from 0 to 1, a regression head one in its own units; NaN where the label is missing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgedistill.errors import ArtifactError

HeadKind = Literal["softmax", "sigmoid", "regression"]
KINDS = ("softmax", "sigmoid", "regression")
SINGLE = "label"
MANY = "labels"
MAX_LABEL_CHARACTERS = 1_000
HEAD_NAME = re.compile(r"[^\s:=|@]([^:=|@]{0,98}[^\s:=|@])?")
Floats = npt.NDArray[np.floating[Any]]
Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Head:
    """One question that the network answers.

    ``classes``: of a softmax head, or the labels of a sigmoid head; () for regression. ``weight``: of its loss.
    ``mean`` and ``std``: of the training images' values, regression only. ``threshold``: the probability from which a
    sigmoid head's labels apply, one number or one for each label (a number again where all are equal). Raises ArtifactError for values that cannot be.
    """

    name: str
    kind: HeadKind
    classes: tuple[str, ...] = ()
    weight: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    threshold: float | tuple[float, ...] = 0.5

    def __post_init__(self) -> None:
        if not HEAD_NAME.fullmatch(self.name) or not self.name.isprintable():
            raise ArtifactError(f"head {self.name[:60]!r}: expected a name of 1 to 100 characters without : = | @")
        if self.kind not in KINDS:
            raise ArtifactError(f"head {self.name}: kind {self.kind!r}, expected one of {', '.join(KINDS)}")
        least = {"softmax": 2, "sigmoid": 1, "regression": 0}[self.kind]
        if len(self.classes) < least or (self.kind == "regression" and self.classes):
            raise ArtifactError(f"head {self.name}: {len(self.classes)} classes, {self.kind} needs {least} or more")
        if not all(self.classes) or len(set(self.classes)) != len(self.classes):
            raise ArtifactError(f"head {self.name}: a class name is empty or stands twice")
        thresholds = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        numbers = (self.weight, self.mean, self.std, *thresholds)
        if not all(math.isfinite(number) for number in numbers) or self.weight < 0 or self.std <= 0:
            raise ArtifactError(f"head {self.name}: weight, mean, std or threshold out of range ({numbers})")
        if not all(0 <= threshold <= 1 for threshold in thresholds):
            raise ArtifactError(f"head {self.name}: threshold {self.threshold}, expected 0 to 1")
        if isinstance(self.threshold, tuple):
            if self.kind != "sigmoid" or len(thresholds) != self.width:
                raise ArtifactError(f"head {self.name}: {len(thresholds)} thresholds, expected one or {self.width}")
            if len(set(thresholds)) == 1:
                object.__setattr__(self, "threshold", thresholds[0])

    @property
    def width(self) -> int:
        """Outputs of the network."""
        return max(1, len(self.classes))

    @property
    def column_count(self) -> int:
        """Columns of ``values``."""
        return self.width if self.kind == "sigmoid" else 1

    @property
    def thresholds(self) -> tuple[float, ...]:
        """One for each output."""
        return self.threshold if isinstance(self.threshold, tuple) else (self.threshold,) * self.width

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {"name": self.name, "kind": self.kind, "classes": list(self.classes)}
        values["weight"] = self.weight
        if self.kind == "regression":
            values |= {"mean": self.mean, "std": self.std}
        if self.kind == "sigmoid":
            values["threshold"] = list(self.threshold) if isinstance(self.threshold, tuple) else self.threshold
        return values


@dataclass(frozen=True)
class Task:
    """The heads of a network, in the order of its outputs. Raises ArtifactError for none or two of one name."""

    heads: tuple[Head, ...]

    def __post_init__(self) -> None:
        names = [head.name for head in self.heads]
        if not names or len(set(names)) != len(names):
            raise ArtifactError(f"heads {', '.join(names) or 'none'}: expected one or more with names of their own")
        kinds = [head.kind == "regression" for head in self.heads]
        if kinds[0] or kinds != sorted(kinds):
            raise ArtifactError("a regression head stands first or alone; expected it behind heads of classes")
        if len(set(self.outputs)) != len(self.outputs):
            raise ArtifactError("two outputs have the same name; rename a head or a class")

    @classmethod
    def single(cls, classes: Sequence[str]) -> Task:
        """One label per image: the task of a network that says nothing else."""
        return cls((Head(SINGLE, "softmax", tuple(classes)),))

    @property
    def is_single(self) -> bool:
        return len(self.heads) == 1 and self.heads[0].kind == "softmax" and self.heads[0].name == SINGLE

    @property
    def is_multi_label(self) -> bool:
        """One sigmoid head and nothing else."""
        return len(self.heads) == 1 and self.heads[0].kind == "sigmoid"

    @property
    def class_heads(self) -> tuple[Head, ...]:
        return tuple(head for head in self.heads if head.kind != "regression")

    @property
    def width(self) -> int:
        """D, the network's outputs."""
        return sum(head.width for head in self.heads)

    @property
    def column_count(self) -> int:
        """V, the columns of ``values``."""
        return sum(head.column_count for head in self.heads)

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """A name for each of the D outputs: the class alone where there is one head, else HEAD=CLASS."""
        if len(self.heads) == 1:
            return self.heads[0].classes
        return tuple(
            f"{head.name}={name}" if head.classes else head.name
            for head in self.heads
            for name in (head.classes or ("",))
        )

    def slices(self) -> Iterator[tuple[Head, slice]]:
        """Each head with its part of the outputs."""
        start = 0
        for head in self.heads:
            yield head, slice(start, start + head.width)
            start += head.width

    def columns(self) -> Iterator[tuple[Head, slice]]:
        """Each head with its columns of ``values``."""
        start = 0
        for head in self.heads:
            yield head, slice(start, start + head.column_count)
            start += head.column_count

    def parts(self, scores: Floats, values: Values) -> Iterator[tuple[Head, Floats, Values]]:
        """(head, its part of [N, D], its columns of ``values``) of every head."""
        for (head, outputs), (_, columns) in zip(self.slices(), self.columns(), strict=True):
            yield head, scores[:, outputs], values[:, columns]

    def probabilities(self, logits: Floats, temperature: float = 1.0) -> npt.NDArray[np.float64]:
        """float64 [N, D]: softmax or sigmoid of logits / temperature, regression in its own units."""
        return np.concatenate(
            [probabilities_of(head, logits[:, part], temperature) for head, part in self.slices()], axis=1
        )

    def answers(self, probabilities: Floats) -> npt.NDArray[np.int64]:
        """int64 [N, A]: a softmax head's class, and 0 or 1 for each label of a sigmoid head; regression has none."""
        return np.concatenate(
            [answers_of(head, probabilities[:, part]) for head, part in self.slices() if head.kind != "regression"],
            axis=1,
        )

    def right(self, probabilities: Floats, values: Values) -> npt.NDArray[np.bool_]:
        """bool [N]: every known label of the image is answered rightly; missing ones do not count."""
        right = np.ones(len(values), bool)
        for head, own, truth in self.parts(probabilities, values):
            if head.kind != "regression":
                wanted = truth if head.kind == "softmax" else truth >= 0.5
                right &= ((answers_of(head, own) == wanted) | np.isnan(truth)).all(axis=1)
        return right

    def judged(self, values: Values) -> npt.NDArray[np.bool_]:
        """bool [N]: some label of a class is known of the image; of the others nothing can be right or wrong."""
        known = np.zeros(len(values), bool)
        for head, columns in self.columns():
            if head.kind != "regression":
                known |= ~np.isnan(values[:, columns]).all(axis=1)
        return known

    def comparable(self, probabilities: Floats) -> npt.NDArray[np.float64]:
        """Probabilities with the values of regression heads in standard deviations: differences of one scale."""
        scaled = probabilities.astype(np.float64)
        for head, part in self.slices():
            if head.kind == "regression":
                scaled[:, part] = (scaled[:, part] - head.mean) / head.std
        return scaled

    @property
    def layout(self) -> tuple[Any, ...]:
        """What two networks must share to stand in for each other: of each head name, kind, classes and scale. How they were
        trained, and from what probability on a label applies, are each one's own."""
        return tuple((head.name, head.kind, head.classes, head.mean, head.std) for head in self.heads)

    def score(self, logits: Floats, values: Values, temperature: float = 1.0) -> float:
        """The share of images on which every known label is right: of one label per image, the accuracy. ``temperature``:
        the fitted one, to which thresholds belong."""
        return float(self.right(self.probabilities(logits, temperature), values).mean())

    def margins(self, logits: Floats, temperature: float = 1.0) -> npt.NDArray[np.float64]:
        """float64 [N]: how far the logits are from another answer in any head: the gap between a softmax head's two
        largest, the distance of a sigmoid head's logits from their thresholds."""
        margins = np.full(len(logits), np.inf)
        for head, part in self.slices():
            own = logits[:, part].astype(np.float64)
            if head.kind == "softmax":
                top2 = np.sort(own, axis=1)[:, -2:]
                margins = np.minimum(margins, top2[:, 1] - top2[:, 0])
            elif head.kind == "sigmoid":
                share = np.array(head.thresholds)
                with np.errstate(divide="ignore"):  # no logit reaches a threshold of 0 or 1
                    edges = temperature * (np.log(share) - np.log1p(-share))
                margins = np.minimum(margins, np.abs(own - edges).min(axis=1))
        return margins

    def divergence(self, reference: Floats, logits: Floats) -> npt.NDArray[np.float64]:
        """float64 [N]: KL(reference || other) in nats, summed over heads (labels of a sigmoid head are each a coin;
        regression counts as a normal distribution of the training images' standard deviation)."""
        total = np.zeros(len(logits))
        for head, part in self.slices():
            one, other = reference[:, part], logits[:, part]
            if head.kind == "regression":
                total += 0.5 * ((one - other) ** 2).sum(axis=1)
                continue
            p, q = (np.clip(probabilities_of(head, own), 1e-12, 1.0) for own in (one, other))
            total += np.sum(p * (np.log(p) - np.log(q)), axis=1)
            if head.kind == "sigmoid":
                p, q = (np.clip(probabilities_of(head, -own), 1e-12, 1.0) for own in (one, other))
                total += np.sum(p * (np.log(p) - np.log(q)), axis=1)
        return total

    @cached_property
    def mark_names(self) -> tuple[str, ...]:
        """A name for each column of ``marks``."""
        if len(self.heads) == 1:
            return tuple(f"class {name!r}" for name in self.heads[0].classes)
        return tuple(f"class {name!r} of {head.name!r}" for head in self.class_heads for name in head.classes)

    def marks(self, values: Values) -> npt.NDArray[np.bool_]:
        """bool [N, classes of all heads]: which of them are true of each image."""
        parts = []
        for head, columns in self.columns():
            if head.kind == "softmax":
                parts.append(values[:, columns] == np.arange(head.width, dtype=np.float32))
            elif head.kind == "sigmoid":
                parts.append(values[:, columns] >= 0.5)
        return np.concatenate(parts, axis=1)

    def joint_label(self, values: Values) -> str:
        """What is true of one image ([V]) as one text: 'ok, female, old', 'cat|dog'; regression is left out."""
        texts = []
        for head, columns in self.columns():
            own = values[columns]
            if head.kind == "softmax":
                texts.append("?" if math.isnan(own[0]) else head.classes[int(own[0])])
            elif head.kind == "sigmoid":
                unknown = "?" if np.isnan(own).all() else "none"
                texts.append("|".join(head.classes[n] for n in np.flatnonzero(own >= 0.5)) or unknown)
        return ", ".join(texts)

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain JSON values."""
        return [head.to_dict() for head in self.heads]

    @classmethod
    def from_dict(cls, values: Any) -> Task:
        """Raises ArtifactError for anything that ``to_dict`` does not write."""
        if not isinstance(values, list) or not all(isinstance(entry, Mapping) for entry in values):
            raise ArtifactError("heads: expected a list of objects")
        return cls(tuple(_head(entry) for entry in values))


def unfit_label(label: str) -> str:
    """What is wrong with the name of a class or output: the runtimes, which print it, take none such. '' where nothing is."""
    expected = f"expected 1 to {MAX_LABEL_CHARACTERS} printable characters"
    if not 0 < len(label) <= MAX_LABEL_CHARACTERS:
        return f"{len(label)} characters, {expected}"
    strange = next((character for character in label if not character.isprintable()), "")
    return f"U+{ord(strange):04X} in it, {expected}" if strange else ""


def _head(entry: Mapping[str, Any]) -> Head:
    unknown = sorted(map(str, set(entry) - {"name", "kind", "classes", "weight", "mean", "std", "threshold"}))
    classes = entry.get("classes", [])
    texts = [entry.get("name"), entry.get("kind"), *(classes if isinstance(classes, list) else [None])]
    numbers = {name: entry[name] for name in ("weight", "mean", "std", "threshold") if name in entry}
    listed = numbers.pop("threshold") if isinstance(numbers.get("threshold"), list) else None
    wrong = [
        name
        for name, number in [*numbers.items(), *(("threshold", one) for one in listed or ())]
        if not _number(number)
    ]
    if unknown or wrong or not all(isinstance(text, str) for text in texts):
        raise ArtifactError(f"head {str(entry.get('name'))[:60]!r}: {unknown or wrong or 'not text'} cannot be read")
    try:
        values: dict[str, Any] = {name: float(number) for name, number in numbers.items()}
        if listed is not None:
            values["threshold"] = tuple(float(number) for number in listed)
    except OverflowError as error:
        raise ArtifactError(f"head {str(entry.get('name'))[:60]!r}: a number is out of range") from error
    return Head(texts[0], texts[1], tuple(classes), **values)  # type: ignore[arg-type]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def softmax(logits: Floats, temperature: float = 1.0) -> npt.NDArray[np.float64]:
    """softmax(logits / temperature) over the last axis, float64."""
    scaled = np.asarray(logits, np.float64) / temperature
    exponents = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return exponents / exponents.sum(axis=-1, keepdims=True)


def sigmoid(logits: Floats, temperature: float = 1.0) -> npt.NDArray[np.float64]:
    """sigmoid(logits / temperature), float64, without overflow."""
    scaled = np.asarray(logits, np.float64) / temperature
    small = np.exp(-np.abs(scaled))
    return np.where(scaled >= 0, 1.0, small) / (1.0 + small)


def probabilities_of(head: Head, logits: Floats, temperature: float = 1.0) -> npt.NDArray[np.float64]:
    """float [N, width] of one head -> its part of ``probabilities``."""
    if head.kind == "softmax":
        return softmax(logits, temperature)
    if head.kind == "sigmoid":
        return sigmoid(logits, temperature)
    return np.asarray(logits, np.float64) * head.std + head.mean


def answers_of(head: Head, probabilities: Floats) -> npt.NDArray[np.int64]:
    """int64 [N, 1] classes of a softmax head, [N, C] 0 or 1 of a sigmoid head."""
    if head.kind == "softmax":
        return probabilities.argmax(axis=1)[:, None].astype(np.int64)
    # In float32, as the runtimes compare.
    return (probabilities.astype(np.float32) >= np.array(head.thresholds, np.float32)).astype(np.int64)
