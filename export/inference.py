"""The same logits from torch, ONNX Runtime and OpenVINO; and a timer that lets two networks take turns."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import openvino as ov
import torch
from openvino import opset8
from torch import nn

from edgedistill.errors import ModelError
from edgedistill.images import ImageU8, InputSpec, normalize

Logits = npt.NDArray[np.float32]
BATCH = 16


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """torch's thread count is a global of its own: set for a block, then as it was."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def torch_logits(module: nn.Module, pixels: ImageU8, spec: InputSpec) -> Logits:
    """``pixels``: uint8 [N, H, W, 3] BGR -> float32 [N, C]."""
    with torch.no_grad():
        parts = [module(torch.from_numpy(normalize(batch, spec))).numpy() for batch in _batches(pixels)]
    return np.concatenate(parts).astype(np.float32)


def open_onnx(path: Path, *, threads: int | None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def onnx_logits(session: onnxruntime.InferenceSession, pixels: ImageU8, spec: InputSpec) -> Logits:
    """``pixels``: uint8 [N, H, W, 3] BGR -> float32 [N, C]."""
    return np.concatenate([session.run(["logits"], {"image": normalize(b, spec)})[0] for b in _batches(pixels)])


def compile_ir(model: ov.Model | Path, *, threads: int | None, profile: bool = False) -> ov.CompiledModel:
    """On the CPU with true FP32 (OpenVINO's own default is bfloat16 where the CPU has it); INT8 layers stay INT8."""
    properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        properties["INFERENCE_NUM_THREADS"] = threads
    if profile:
        properties["PERF_COUNT"] = True
    try:
        return ov.Core().compile_model(str(model) if isinstance(model, Path) else model, "CPU", properties)
    except RuntimeError as error:
        raise ModelError(f"OpenVINO cannot compile the network: {str(error).strip().splitlines()[-1]}") from error


@functools.cache
def sums_saturate() -> bool:
    """Whether INT8 layers add pairs of products in 16 bits here, which saturate: AVX2, and AVX-512 without VNNI.

    Asked of OpenVINO itself, by a convolution of the largest values: such a CPU gives half of their sum.
    """
    channels, top, weight = 64, 255.0, 127
    image = opset8.parameter([1, channels, 4, 4], np.float32)
    quantised = opset8.fake_quantize(image, *(np.float32(limit) for limit in (0, top, 0, top)), levels=256)
    weights = opset8.convert(opset8.constant(np.full((32, channels, 1, 1), weight, np.int8)), "f32")
    sums = opset8.convolution(quantised, opset8.multiply(weights, np.float32(1)), [1, 1], [0, 0], [0, 0], [1, 1])
    compiled = compile_ir(ov.Model([sums], [image]), threads=1)
    found = compiled(np.full((1, channels, 4, 4), top, np.float32))[0]
    return bool(found.max() < 0.9 * channels * top * weight)


def ir_logits(compiled: ov.CompiledModel, pixels: ImageU8, spec: InputSpec) -> Logits:
    """One image at a time, as the static IR wants it: uint8 [N, H, W, 3] BGR -> float32 [N, C]."""
    request = compiled.create_infer_request()
    rows = []
    for number in range(len(pixels)):
        request.infer({0: normalize(pixels[number : number + 1], spec)})
        rows.append(np.array(request.get_output_tensor(0).data[0], dtype=np.float32))
    return np.stack(rows)


def interleaved_fps(candidates: Sequence[ov.CompiledModel], *, rounds: int, seconds: float) -> list[list[float]]:
    """FPS of each candidate in each round, one image at a time; they take turns, so that noise hurts all alike.

    ``seconds``: length of one turn. One turn of each is warm-up and left out.
    """
    requests = [compiled.create_infer_request() for compiled in candidates]
    image = np.zeros(tuple(candidates[0].inputs[0].shape), np.float32)
    results: list[list[float]] = [[] for _ in requests]
    for turn in range(rounds + 1):
        for request, fps in zip(requests, results, strict=True):
            count, start = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - start) < seconds or count == 0:
                request.infer({0: image})
                count += 1
            if turn:
                fps.append(count / elapsed)
    return results


def speed_ratio(
    candidate: ov.CompiledModel, reference: ov.CompiledModel, *, rounds: int, seconds: float
) -> dict[str, float]:
    """Median over rounds of candidate FPS / reference FPS, with the two medians in images a second.

    ``ratio_low`` to ``ratio_high``: a 95% interval of the median, by order statistics (a sign test turned round).
    """
    first, second = interleaved_fps([candidate, reference], rounds=rounds, seconds=seconds)
    ratios = sorted(a / b for a, b in zip(first, second, strict=True))
    outside = max(0, math.floor(0.5 * len(ratios) - 0.98 * math.sqrt(len(ratios))))
    return {
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[outside],
        "ratio_high": ratios[-1 - outside],
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "fps": statistics.median(first),
        "reference_fps": statistics.median(second),
    }


def _batches(pixels: ImageU8) -> Iterator[ImageU8]:
    return (pixels[start : start + BATCH] for start in range(0, len(pixels), BATCH))
