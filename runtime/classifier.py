"""One image at a time, as fast as one can be answered: `Classifier`."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any, overload

from edgedistill.errors import ImageError, ModelError
from edgedistill.images import DecodeMode, InputSpec
from edgedistill.runtime.bundle import Bundle
from edgedistill.runtime.network import (
    CacheDir,
    Network,
    Prediction,
    Source,
    Worker,
    as_frame,
    failed,
    resolve_precisions,
    usable_cores,
)
from edgedistill.runtime.processor import settings_here
from edgedistill.tasks import Head


class Classifier:
    """Answers for single images in OpenVINO's latency mode: every core works on the one image.

    ``path``: an openvino/ folder, a deploy.json or a model.xml. ``precision``: 'f32', 'bf16' or 'int8'; by default what
    deploy.json says (given, all stages of a cascade run at it), and so for ``threads`` (None there: all cores) and
    ``decode``. ``cache_dir``: where compiled models are kept between runs; False keeps none. Raises ArtifactError or
    ModelError when the model cannot be used.

    Safe to call from several threads, one of which is answered at a time; for throughput use `Engine`.
    """

    def __init__(
        self,
        path: str | Path | Bundle,
        *,
        precision: str | None = None,
        threads: int | None = None,
        decode: DecodeMode | None = None,
        cache_dir: CacheDir = None,
    ) -> None:
        bundle = path if isinstance(path, Bundle) else Bundle.load(path)
        tuned, _ = settings_here(bundle)
        self._network = Network(
            bundle,
            precisions=resolve_precisions(bundle, precision, tuned),
            decode=decode,
            properties=_latency_properties(threads, tuned.threads),
            cache_dir=cache_dir,
        )
        self._worker = Worker(self._network)
        self._lock = threading.Lock()

    @classmethod
    def from_bytes(
        cls,
        xml: bytes,
        weights: bytes,
        *,
        precision: str | None = None,
        threads: int | None = None,
        decode: DecodeMode | None = None,
        cache_dir: CacheDir = None,
    ) -> Classifier:
        """A model that is in memory: the bytes of model.xml and model.bin (of model-int8.xml and .bin for INT8)."""
        bundle = Bundle.from_bytes(xml, weights)
        return cls(bundle, precision=precision, threads=threads, decode=decode, cache_dir=cache_dir)

    @property
    def labels(self) -> tuple[str, ...]:
        return self._network.bundle.labels

    @property
    def spec(self) -> InputSpec:
        """Of the first stage."""
        return self._network.spec

    @property
    def temperature(self) -> float:
        """Of the first stage."""
        return self._network.stages[0].settings.temperature

    @property
    def multi_label(self) -> bool:
        return self._network.bundle.multi_label

    @property
    def heads(self) -> tuple[Head, ...]:
        """Of a network with several heads, in the order of ``Prediction.heads``; () for others."""
        return self._network.bundle.heads

    @property
    def precision(self) -> str:
        """'int8', or 'int8+f32' where the stages of a cascade differ."""
        return self._network.precision

    @property
    def network(self) -> Network:
        """The compiled networks and their settings, for those who measure them."""
        return self._network

    @overload
    def classify(self, image: Source) -> Prediction: ...
    @overload
    def classify(self, image: list[Any] | tuple[Any, ...]) -> list[Prediction]: ...
    def classify(self, image: Source | list[Any] | tuple[Any, ...]) -> Prediction | list[Prediction]:
        """A path, encoded bytes, an array uint8|uint16 [h, w], [h, w, 3] BGR or [h, w, 4] BGRA, or a list of these.

        A single image that cannot be read raises ImageError; in a list it gets a Prediction whose ``error`` is set.
        """
        if isinstance(image, list | tuple):
            return [self._classify_one(entry) for entry in image]
        prediction = self._classify_one(image)
        if prediction.error is not None:
            raise ImageError(prediction.error)
        return prediction

    def _classify_one(self, image: Source) -> Prediction:
        try:
            frame = as_frame(image)
        except ImageError as error:
            return failed("", error)
        with self._lock:
            return self._worker.answer([frame])[0]


def _latency_properties(threads: int | None, tuned: int | None) -> dict[str, Any]:
    if threads is not None and threads < 1:
        raise ModelError(f"threads {threads}, expected 1 or more")
    properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
    cores = usable_cores()
    count = threads or (min(tuned, cores) if tuned else None)
    # Otherwise OpenVINO's own choice (one per physical core), which does not know of a container's quota.
    if count is None and cores < (os.cpu_count() or 1):
        count = cores
    return properties if count is None else properties | {"INFERENCE_NUM_THREADS": count}
