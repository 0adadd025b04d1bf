"""`edgedistill predict`: answers for files, folders and videos."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill import console
from edgedistill.artifacts import atomic_path
from edgedistill.errors import UsageError
from edgedistill.runtime.cpp_engine import CppEngine
from edgedistill.runtime.engine import Engine
from edgedistill.runtime.network import Prediction
from edgedistill.runtime.video import frames
from edgedistill.tasks import Head

ENGINES: dict[str, type[Engine] | type[CppEngine]] = {"python": Engine, "cpp": CppEngine}


@dataclass(frozen=True)
class PredictSettings:
    """``model``: an openvino/ folder, deploy.json or model.xml. ``sources``: images, folders, videos, camera numbers.

    ``top_k``: labels per image. ``precision``, ``decode``: None: what deploy.json says. ``engine``: whose engine
    answers, 'python' or 'cpp'.
    """

    model: Path
    sources: tuple[str, ...]
    top_k: int = 1
    precision: str | None = None
    decode: str | None = None
    engine: str = "python"

    def __post_init__(self) -> None:
        if not self.sources:
            raise UsageError("nothing to classify; give images, folders or videos")
        if self.top_k < 1:
            raise UsageError(f"--top-k {self.top_k}, expected 1 or more")
        if self.precision not in (None, "f32", "bf16", "int8"):
            raise UsageError(f"--precision {self.precision}, expected f32, bf16 or int8")
        if self.decode not in (None, "full", "reduced"):
            raise UsageError(f"--decode {self.decode}, expected full or reduced")
        if self.engine not in ENGINES:
            raise UsageError(f"--engine {self.engine}, expected {' or '.join(ENGINES)}")


@dataclass(frozen=True)
class Answer:
    """One image: ``labels`` and ``probabilities`` from the likeliest down, or ``error``, which names the image.

    Of several labels per image all that apply, in the order of the classes. Of several heads 'HEAD=CLASS' for each
    class that is answered, and 'HEAD=VALUE' with no probability (None) for values. With ``top_k`` above 1 so many of
    the likeliest classes, of each head.
    """

    name: str
    labels: tuple[str, ...] = ()
    probabilities: tuple[float | None, ...] = ()
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        if self.error is not None:
            return {"image": self.name, "error": self.error}
        return {"image": self.name, "labels": list(self.labels), "probabilities": list(self.probabilities)}

    def line(self) -> str:
        if self.error is not None:
            return f"{self.name}\terror: {self.error}"
        pairs = zip(self.labels, self.probabilities, strict=True)
        shown = (label if share is None else f"{label} {share:.4f}" for label, share in pairs)
        return "\t".join([self.name, *shown])


def predict(settings: PredictSettings) -> Iterator[Answer]:
    """The answers in the order of the sources, each as soon as it is known; bounded memory whatever their number.

    An image that cannot be read has its ``error`` set and the rest goes on. Raises ImageError for a source that does
    not exist, ArtifactError or ModelError for a model that cannot be used, UsageError where the C++ engine is not built.
    """
    every_frame = (frame for source in settings.sources for frame in frames(source))
    with (
        ENGINES[settings.engine](settings.model, precision=settings.precision, decode=settings.decode) as engine,  # type: ignore[arg-type]
        closing(engine.map(every_frame)) as predictions,
    ):
        for prediction in predictions:
            yield _answer(prediction, engine, settings.top_k)


def write_answers(answers: Iterable[Answer], path: Path) -> tuple[int, int]:
    """A CSV with the columns image, error, label, probability, label_2, ...; whole or not there.

    Returns how many images there were and how many could not be read.
    """
    images = errors = 0
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,  # names of files are bytes
        console.progress("classifying", None) as bar,
    ):
        writer = csv.writer(file)
        writer.writerow(["image", "error", "label", "probability"])
        for answer in answers:
            pairs = zip(answer.labels, answer.probabilities, strict=True)
            writer.writerow([answer.name, answer.error or "", *(part for pair in pairs for part in pair)])
            images, errors = images + 1, errors + (answer.error is not None)
            bar.update(bar.task_ids[0], advance=1)
    return images, errors


def _answer(prediction: Prediction, engine: Engine | CppEngine, top_k: int) -> Answer:
    if prediction.error is not None:
        return Answer(prediction.name, error=prediction.error)
    labels = engine.labels
    if prediction.index >= 0 and prediction.heads:
        return _heads_answer(prediction, engine.heads, top_k)
    if prediction.index >= 0 and top_k == 1 and engine.multi_label:
        found = prediction.accepted
        shares = tuple(float(prediction.probabilities[number]) for number in found)
        return Answer(prediction.name, tuple(labels[number] for number in found) or ("none",), shares or (None,))
    if top_k == 1 or prediction.index < 0:
        return Answer(prediction.name, (prediction.label,), (float(prediction.probability),))
    best = _likeliest(prediction.probabilities, top_k)
    return Answer(
        prediction.name,
        tuple(labels[index] for index in best),
        tuple(float(prediction.probabilities[index]) for index in best),
    )


def _likeliest(shares: npt.NDArray[np.floating[Any]], count: int) -> npt.NDArray[np.int64]:
    return np.argsort(-shares, kind="stable")[:count]


def _heads_answer(prediction: Prediction, heads: Sequence[Head], top_k: int) -> Answer:
    pairs: list[tuple[str, float | None]] = []
    start = 0
    for head, answer in zip(heads, prediction.heads, strict=True):
        shares = prediction.probabilities[start : start + head.width]
        start += head.width
        if answer.value is not None:
            pairs.append((f"{head.name}={answer.value:.6g}", None))
        elif top_k > 1:
            pairs += [(f"{head.name}={head.classes[n]}", float(shares[n])) for n in _likeliest(shares, top_k)]
        elif head.kind == "softmax":
            pairs.append((f"{head.name}={answer.label}", answer.probability))
        else:
            found = [(f"{head.name}={head.classes[number]}", float(shares[number])) for number in answer.accepted]
            pairs += found or [(f"{head.name}=none", None)]
    return Answer(prediction.name, tuple(label for label, _ in pairs), tuple(share for _, share in pairs))
