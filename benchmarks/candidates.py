"""Our own classifier and engine as candidates, and the process in which one candidate of any kind lives.

    python -m edgedistill.benchmarks.candidates

One process serves all scopes, modes and inputs of its candidate, so that no two libraries share a thread pool.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
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
from edgedistill.images import DecodeBuffer, DecodeMode, EncodedImage, ImageU8, InputSpec, decode_image, load_image
from edgedistill.runtime import Classifier, Engine
from edgedistill.runtime.network import Network, Prediction, Worker, as_frame

TIMED_IMAGES = 12


class Candidate(Protocol):
    """Loads on first use and keeps what it loaded for further scopes and inputs."""

    def prepare(self, request: dict[str, Any], images: Sequence[Path], spec: InputSpec) -> Case: ...


class Ours:
    """``Classifier`` for latency and ``Engine`` for throughput, as a user would make them."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.path = request["deployable"]
        self.precision = request["precision"]
        self.cache_dir = request.get("cache_dir")

    @cached_property
    def classifier(self) -> Classifier:
        return Classifier(self.path, precision=self.precision, cache_dir=self.cache_dir)

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.path, precision=self.precision, cache_dir=self.cache_dir)

    def prepare(self, request: dict[str, Any], images: Sequence[Path], spec: InputSpec) -> Case:
        latency = request["mode"] == "latency"
        networks = (self.classifier.network,) if latency else self.engine.networks
        network = networks[0]
        settings = network_settings(networks) | {"decode": network.decode, "opencv_threads": cv2.getNumThreads()}
        if request["scope"] == "model":
            return self._model_case(networks, images, spec, settings)
        if len(network.precisions) > 1:
            settings["stage_precisions"] = list(network.precisions)
        sources: list[Any] = [(_encoded if request["scope"] == "files" else _decoded)(path) for path in images]
        if request["scope"] == "files":
            settings |= preparation_us(sources, network.spec, network.decode)
        if request.get("stage_costs") and len(network.stages) > 1:
            settings["cascade"] = cascade_record(network, sources)
        answer = self.classifier.classify(sources[0]).probabilities.tolist() if latency else []
        if latency:
            classify, source = self.classifier.classify, itertools.cycle(sources)
            return Case(lambda: classify(next(source)), None, network.precision, settings, answer)
        return Case(None, self._stream(sources), network.precision, settings, answer)

    def _stream(self, sources: Sequence[Any]) -> Callable[[float], int]:
        """Feeds the engine until the time is up and waits for its last answer; the next slice goes on with the images that
        follow. Were it to begin anew, a slow board would see the same few in every slice, and what a cascade passes on of
        them would be its share. Raises ModelError for a failed image."""
        engine, endless = self.engine, itertools.cycle(sources)

        def run(seconds: float) -> int:
            count = 0
            for prediction in engine.map(until(time.perf_counter() + seconds, endless)):
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
            return Case(steps[0], None, networks[0].precisions[-1], settings, answer)
        rounds, batch = side_by_side(steps), stages[0].batch
        return Case(None, lambda seconds: rounds(seconds) * batch, networks[0].precisions[-1], settings, answer)


@functools.cache
def _encoded(path: Path) -> bytes:
    """Read once for all cases of this process: a heat of the tuner holds twenty that are fed the same photographs."""
    return path.read_bytes()


@functools.cache
def _decoded(path: Path) -> ImageU8:
    return decode_image(path.read_bytes(), name=str(path))


def preparation_us(encoded: Sequence[bytes], spec: InputSpec, decode: DecodeMode) -> dict[str, float]:
    """{'decode_us', 'resize_us'}: what an image costs in one thread before the first network sees it; medians.

    ``resize_us`` holds everything after decoding: area reduction, crop, bilinear resize.
    """
    buffer, out = DecodeBuffer(), np.empty((spec.height, spec.width, 3), np.uint8)
    whole, resize = [], []
    for data in (*encoded[:1], *encoded[:TIMED_IMAGES]):  # the first one warms up
        start = time.perf_counter()
        image = EncodedImage(data, decode=decode, buffer=buffer)
        image.pixels(spec, out=out)
        middle = time.perf_counter()
        image.pixels(spec, out=out)
        whole.append(middle - start)
        resize.append(time.perf_counter() - middle)
    spent = statistics.median(resize[1:])
    decoding = max(0.0, statistics.median(whole[1:]) - spent)
    return {"decode_us": round(decoding * 1e6, 1), "resize_us": round(spent * 1e6, 1)}


def cascade_record(network: Network, sources: Sequence[Any]) -> dict[str, Any]:
    """How a cascade of two stages spends its time on these images, in one thread, in batches as it is deployed.

    ``shares``: of the images, answered by each stage. ``stage_ms``: c1, the fast stage with reading and decoding, and
    c2, what passing an image on adds. ``expected_ms``: c1 + r * c2.
    """
    counts = [0] * len(network.stages)
    for answer in _answers(Worker(network), sources):
        counts[answer.stage] += 1
    shares = [count / len(sources) for count in counts]
    first = _mean_ms(_always(network, exits=True), sources)
    both = _mean_ms(_always(network, exits=False), sources)
    cost = [first, max(0.0, both - first)]
    return {
        "shares": [round(share, 4) for share in shares],
        "stage_ms": [round(value, 4) for value in cost],
        "expected_ms": round(cost[0] + (1 - shares[0]) * cost[1], 4),
    }


def _always(network: Network, *, exits: bool) -> Worker:
    """The same stages where the first one answers every image, or none."""
    stages = network.bundle.config.stages
    # At temperature 1000 no network is sure of anything.
    first = dataclasses.replace(stages[0], temperature=1000.0, exit_threshold=0.0 if exits else 1.0)
    config = dataclasses.replace(network.bundle.config, stages=(first, *stages[1:]), reject_below=None)
    bundle = dataclasses.replace(network.bundle, config=config)
    properties = {"NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False}
    return Worker(
        Network(
            bundle,
            precisions=network.precisions,
            decode=network.decode,
            batch=network.stages[0].batch,
            later_batch=network.stages[1].batch,
            properties=properties,
            cache_dir=False,
        )
    )


def _mean_ms(worker: Worker, sources: Sequence[Any]) -> float:
    """Of an image in full batches."""
    batch = worker.batches[0]
    fed = list(itertools.islice(itertools.cycle(sources), -(-len(sources) // batch) * batch))
    worker.answer([as_frame(source) for source in fed[:batch]])
    start = time.perf_counter()
    for _ in _answers(worker, fed):
        pass
    return (time.perf_counter() - start) * 1e3 / len(fed)


def _answers(worker: Worker, sources: Sequence[Any]) -> Iterator[Prediction]:
    batch = worker.batches[0]
    for start in range(0, len(sources), batch):
        yield from worker.answer([as_frame(source) for source in sources[start : start + batch]])


def until(deadline: float, endless: Iterator[Any]) -> Iterator[Any]:
    """The next ones of an endless iterator until ``time.perf_counter()`` reaches the deadline, at least one."""
    for source in endless:
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
