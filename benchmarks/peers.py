"""The programs that people write instead: OpenCV with OpenVINO, ONNX Runtime or torch, each set up as its manual says.

All share the plain preparation of almost every example on the web: decode everything, resize once, float32, normalise.
The scopes: ``files`` starts at the encoded bytes, ``frames`` at decoded pixels, ``model`` at the finished tensor.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from edgedistill.benchmarks.serve import Case
from edgedistill.errors import UsageError
from edgedistill.images import ImageU8, InputSpec, crop_size, load_image, normalize
from edgedistill.timm_import import import_timm

Tensor = npt.NDArray[np.float32]
Infer = Callable[[Tensor], Tensor]
TORCH_BATCH = 16


def plain_decode(data: bytes) -> ImageU8:
    """All pixels of an encoded image: uint8 [h, w, 3] BGR."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)  # type: ignore[return-value]


def plain_tensor(image: ImageU8, spec: InputSpec) -> Tensor:
    """uint8 [h, w, 3] BGR -> float32 [1, 3, H, W] RGB normalised, without our area reduction."""
    if spec.resize == "center-crop" or spec.crop_fraction < 1:
        crop_h, crop_w = crop_size(image.shape[0], image.shape[1], spec)
        top, left = (image.shape[0] - crop_h) // 2, (image.shape[1] - crop_w) // 2
        image = image[top : top + crop_h, left : left + crop_w]
    rgb = cv2.cvtColor(cv2.resize(image, (spec.width, spec.height)), cv2.COLOR_BGR2RGB)
    scaled = (rgb.astype(np.float32) - np.asarray(spec.mean, np.float32)) / np.asarray(spec.std, np.float32)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None])


def plain_tensors(scope: str, images: Sequence[Path], spec: InputSpec) -> Callable[[int], Tensor]:
    """A function from an image's running number to its tensor; what precedes the scope is done here, once."""
    encoded = [path.read_bytes() for path in images]
    if scope == "files":
        return lambda number: plain_tensor(plain_decode(encoded[number % len(encoded)]), spec)
    frames = [plain_decode(data) for data in encoded]
    if scope == "frames":
        return lambda number: plain_tensor(frames[number % len(frames)], spec)
    # Our own pixels, so that in this scope all candidates must give the same answer.
    tensor = normalize(load_image(images[0], spec)[None], spec)
    return lambda number: tensor


def softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Probabilities float32 [C] of logits float32 [1, C]."""
    row = logits.reshape(-1) / np.float32(temperature)
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def top_1(logits: Tensor) -> tuple[int, float]:
    """(class index, probability) of logits float32 [1, C]."""
    probabilities = softmax(logits)
    index = int(probabilities.argmax())
    return index, float(probabilities[index])


def stepper(scope: str, tensor_of: Callable[[int], Tensor], infer: Infer) -> Callable[[], object]:
    """A function that answers the next image at every call; in scope ``model`` it stops at the logits."""
    numbers = itertools.count()
    if scope == "model":
        return lambda: infer(tensor_of(0))
    return lambda: top_1(infer(tensor_of(next(numbers))))


def side_by_side(steps: Sequence[Callable[[], object]]) -> Callable[[float], int]:
    """A thread for each step, over and over until the time is up, at least once; returns the steps done."""

    def run(seconds: float) -> int:
        deadline = time.perf_counter() + seconds

        def loop(step: Callable[[], object]) -> int:
            count = 0
            while True:
                step()
                count += 1
                if time.perf_counter() >= deadline:
                    return count

        with ThreadPoolExecutor(len(steps)) as pool:
            return sum(pool.map(loop, steps))

    return run


class Naive:
    """Plain OpenCV and OpenVINO, one image after the other; ``precision`` None leaves OpenVINO its own defaults."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.model = request["model"]
        self.precision = request["precision"]

    @cached_property
    def compiled(self) -> Any:
        import openvino as ov

        hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": self.precision} if self.precision else {}
        return ov.Core().compile_model(self.model, "CPU", hints)

    def prepare(self, request: dict[str, Any], images: Sequence[Path], spec: InputSpec) -> Case:
        compiled = self.compiled
        output = compiled.output(0)
        tensor_of = plain_tensors(request["scope"], images, spec)
        step = stepper(request["scope"], tensor_of, lambda tensor: compiled(tensor)[output])
        reached = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        settings = {
            "threads": int(compiled.get_property("INFERENCE_NUM_THREADS")),
            "streams": int(compiled.get_property("NUM_STREAMS")),
            "opencv_threads": cv2.getNumThreads(),
        }
        answer = softmax(compiled(tensor_of(0))[output], request["temperature"]).tolist()
        return Case(step=step, precision=reached, settings=settings, answer=answer)


class OnnxRuntime:
    """Latency: every core on one image, full graph optimisation. Throughput: one thread per core, an image each."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.model = request["onnx"]
        self.threads = int(request["threads"])
        self.sessions: dict[int, Any] = {}

    def session(self, threads: int) -> Any:
        import onnxruntime as ort

        if threads not in self.sessions:
            options = ort.SessionOptions()
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
            self.sessions[threads] = ort.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])
        return self.sessions[threads]

    def prepare(self, request: dict[str, Any], images: Sequence[Path], spec: InputSpec) -> Case:
        callers = 1 if request["mode"] == "latency" else self.threads
        threads = self.threads if request["mode"] == "latency" else 1
        session = self.session(threads)
        name = session.get_inputs()[0].name
        tensor_of = plain_tensors(request["scope"], images, spec)

        def infer(tensor: Tensor) -> Tensor:
            return session.run(None, {name: tensor})[0]

        step = stepper(request["scope"], tensor_of, infer)
        settings = {"intra_op_threads": threads, "callers": callers, "opencv_threads": cv2.getNumThreads()}
        answer = softmax(infer(tensor_of(0)), request["temperature"]).tolist()
        if request["mode"] == "latency":
            return Case(step=step, settings=settings, answer=answer)
        return Case(run=side_by_side([step] * callers), settings=settings, answer=answer)


class Torch:
    """Eager torch in channels_last and inference mode, all cores. Throughput: batches of TORCH_BATCH."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.checkpoint = request["checkpoint"]
        self.threads = int(request["threads"])

    @cached_property
    def network(self) -> Any:
        import torch

        torch.set_num_threads(self.threads)
        saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        options = {"num_classes": len(saved["classes"])} | saved["model_kwargs"] | {"pretrained": False}
        timm = import_timm()
        if "classifier" in saved or not timm.is_model(saved["architecture"]):
            raise UsageError(f"{saved['architecture']}: not a network of plain timm, which this peer builds")
        network = timm.create_model(saved["architecture"], **options)
        network.load_state_dict(saved["state_dict"])
        return network.eval().to(memory_format=torch.channels_last)

    def infer(self, tensor: Tensor) -> Tensor:
        import torch

        with torch.inference_mode():
            batch = torch.from_numpy(tensor).contiguous(memory_format=torch.channels_last)
            return self.network(batch).numpy()

    def prepare(self, request: dict[str, Any], images: Sequence[Path], spec: InputSpec) -> Case:
        scope = request["scope"]
        tensor_of = plain_tensors(scope, images, spec)
        batch = 1 if request["mode"] == "latency" else TORCH_BATCH
        settings = {"threads": self.threads, "batch": batch, "opencv_threads": cv2.getNumThreads()}
        answer = softmax(self.infer(tensor_of(0)), request["temperature"]).tolist()
        if batch == 1:
            return Case(step=stepper(scope, tensor_of, self.infer), settings=settings, answer=answer)
        return Case(run=self._batches(scope, tensor_of), settings=settings, answer=answer)

    def _batches(self, scope: str, tensor_of: Callable[[int], Tensor]) -> Callable[[float], int]:
        """Tensors are made by a thread per core (OpenCV lets go of Python's lock), then one batch runs on all cores."""
        fixed = np.concatenate([tensor_of(0)] * TORCH_BATCH) if scope == "model" else None

        def run(seconds: float) -> int:
            deadline = time.perf_counter() + seconds
            with ThreadPoolExecutor(self.threads) as pool:
                for count in itertools.count(TORCH_BATCH, TORCH_BATCH):
                    if fixed is None:
                        tensors = list(pool.map(tensor_of, range(count, count + TORCH_BATCH)))
                        self.infer(np.concatenate(tensors)).argmax(axis=1)
                    else:
                        self.infer(fixed)
                    if time.perf_counter() >= deadline:
                        break
            return count

        return run
