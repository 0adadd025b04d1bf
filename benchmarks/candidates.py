"""Our own classifier and engine as candidates, and the process in which one candidate of any kind lives.

    python -m edgedistill.benchmarks.candidates

One process serves all scopes, modes and inputs of its candidate, so that no two libraries share a thread pool.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import openvino as ov

from edgedistill.benchmarks.peers import Naive, OnnxRuntime, Torch, side_by_side, softmax
from edgedistill.benchmarks.serve import Case, serve
from edgedistill.benchmarks.target import BASE, OWN
from edgedistill.errors import ModelError
from edgedistill.images import InputSpec, decode_image, load_image
from edgedistill.runtime import Classifier, Engine
from edgedistill.runtime.network import Network


class Candidate(Protocol):
    """Loads on first use and keeps what it loaded for further scopes and inputs."""

    def prepare(self, request: dict[str, Any], images: Sequence[Path], spec: InputSpec) -> Case: ...


class Ours:
    """``Classifier`` for latency and ``Engine`` for throughput, as a user would make them."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.path = request["deployable"]
        self.precision = request["precision"]

    @cached_property
    def classifier(self) -> Classifier:
        return Classifier(self.path, precision=self.precision)

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.path, precision=self.precision)

    def prepare(self, request: dict[str, Any], images: Sequence[Path], spec: InputSpec) -> Case:
        latency = request["mode"] == "latency"
        networks = (self.classifier.network,) if latency else self.engine.networks
        network = networks[0]
        settings = network_settings(networks) | {"decode": network.decode, "opencv_threads": cv2.getNumThreads()}
        if request["scope"] == "model":
            return self._model_case(networks, images, spec, settings)
        encoded = [path.read_bytes() for path in images]
        sources: list[Any] = encoded if request["scope"] == "files" else [decode_image(data) for data in encoded]
        answer = self.classifier.classify(sources[0]).probabilities.tolist() if latency else []
        if latency:
            classify, source = self.classifier.classify, itertools.cycle(sources)
            return Case(lambda: classify(next(source)), None, network.precision, settings, answer)
        return Case(None, self._stream(sources), network.precision, settings, answer)

    def _stream(self, sources: Sequence[Any]) -> Callable[[float], int]:
        """Feeds the engine until the time is up and waits for its last answer. Raises ModelError for a failed image."""
        engine = self.engine

        def run(seconds: float) -> int:
            count = 0
            for prediction in engine.map(until(time.perf_counter() + seconds, sources)):
                if prediction.error is not None:
                    raise ModelError(prediction.error)
                count += 1
            return count

        return run

    def _model_case(
        self, networks: Sequence[Network], images: Sequence[Path], spec: InputSpec, settings: dict[str, Any]
    ) -> Case:
        """Only the networks, fed as benchmark_app does: inputs filled once, one request for each."""
        stages = [network.stages[-1] for network in networks]
        pixels = np.repeat(load_image(images[0], spec)[None], stages[0].batch, axis=0)
        requests = [stage.compiled.create_infer_request() for stage in stages]
        for request in requests:
            request.set_input_tensor(ov.Tensor(pixels.copy()))
            request.infer(share_outputs=True)
        logits = requests[0].get_output_tensor().data[:1]
        answer = softmax(logits, stages[0].settings.temperature).tolist()
        steps = [functools.partial(request.infer, share_outputs=True) for request in requests]
        if len(steps) == 1:
            return Case(steps[0], None, networks[0].precision, settings, answer)
        rounds, batch = side_by_side(steps), stages[0].batch
        return Case(None, lambda seconds: rounds(seconds) * batch, networks[0].precision, settings, answer)


def until(deadline: float, sources: Sequence[Any]) -> Iterator[Any]:
    """The sources over and over until ``time.perf_counter()`` reaches the deadline, at least one."""
    for source in itertools.cycle(sources):
        yield source
        if time.perf_counter() >= deadline:
            return


def network_settings(networks: Sequence[Network]) -> dict[str, Any]:
    """What OpenVINO really runs with, read back from the compiled networks, which work side by side."""
    stages = [network.stages[-1] for network in networks]
    compiled = stages[0].compiled
    streams = sum(int(stage.compiled.get_property("NUM_STREAMS")) for stage in stages)
    return {
        "threads": sum(int(stage.compiled.get_property("INFERENCE_NUM_THREADS")) for stage in stages),
        "streams": streams,
        "requests": streams,
        "batch": stages[0].batch,
        "pinning": bool(compiled.get_property("ENABLE_CPU_PINNING")),
        "inference_precision": compiled.get_property("INFERENCE_PRECISION_HINT").to_string(),
    }


def naive_default(request: dict[str, Any]) -> Naive:
    return Naive(request | {"precision": None})


KINDS: dict[str, Callable[[dict[str, Any]], Candidate]] = {
    OWN: Ours,
    BASE: Naive,
    "naive-default": naive_default,
    "onnxruntime": OnnxRuntime,
    "torch": Torch,
}


def main() -> None:
    candidates: dict[str, Candidate] = {}

    def prepare(request: dict[str, Any]) -> Case:
        kind = request["candidate"]
        if kind not in candidates:
            candidates[kind] = KINDS[kind](request)
        images = [Path(path) for path in request["images"]]
        return candidates[kind].prepare(request, images, InputSpec.from_dict(request["input_spec"]))

    serve(prepare)


if __name__ == "__main__":
    main()
