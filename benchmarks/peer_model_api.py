"""OpenVINO Model API as a candidate. Runs under the python of the peers' environment, where edgedistill is not installed:

    .venv-peers/bin/python benchmarks/peer_model_api.py

Needs numpy, OpenCV, openvino and model_api; the timing loop is the sibling file ``serve.py``, loaded by its path.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np


def load_sibling(name: str) -> Any:
    """The module NAME.py beside this file."""
    spec = importlib.util.spec_from_file_location(f"edgedistill_{name}", Path(__file__).with_name(f"{name}.py"))
    if spec is None or spec.loader is None:
        raise ImportError(f"{name}.py is not beside {__file__}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class ModelApi:
    """One compiled wrapper per mode, as `ClassificationModel.create_model` builds it, with the precision set.

    Built from the adapter because ``create_model`` has no way to pass the precision. Whole images are given: resizing,
    mean and scale run inside the network, which is Model API's own way.
    """

    def __init__(self) -> None:
        self.models: dict[str, Any] = {}

    def model(self, request: dict[str, Any]) -> Any:
        from model_api.adapters import OpenvinoAdapter, create_core  # type: ignore[import-not-found]
        from model_api.models import ClassificationModel  # type: ignore[import-not-found]

        mode = request["mode"]
        if mode not in self.models:
            hints = {"PERFORMANCE_HINT": "LATENCY" if mode == "latency" else "THROUGHPUT"}
            adapter = OpenvinoAdapter(
                create_core(),
                request["model"],
                device="CPU",
                plugin_config=hints | {"INFERENCE_PRECISION_HINT": request["precision"]},
                max_num_requests=1 if mode == "latency" else 0,  # 0: as many as OpenVINO finds best
                model_parameters={},
            )
            self.models[mode] = ClassificationModel(adapter, {}, preload=True)
        return self.models[mode]

    def case(self, request: dict[str, Any], case_type: Any) -> Any:
        model = self.model(request)
        encoded = [np.frombuffer(Path(path).read_bytes(), np.uint8) for path in request["images"]]
        frames = [cv2.imdecode(data, cv2.IMREAD_COLOR) for data in encoded]

        def frame(number: int) -> Any:
            index = number % len(encoded)
            return cv2.imdecode(encoded[index], cv2.IMREAD_COLOR) if request["scope"] == "files" else frames[index]

        compiled = model.inference_adapter.compiled_model
        common = {
            "precision": compiled.get_property("INFERENCE_PRECISION_HINT").to_string(),
            "settings": {
                "threads": int(compiled.get_property("INFERENCE_NUM_THREADS")),
                "streams": int(compiled.get_property("NUM_STREAMS")),
                "requests": len(model.inference_adapter.async_queue),
                "opencv_threads": cv2.getNumThreads(),
            },
        }
        if request["mode"] == "latency":
            numbers = itertools.count()
            return case_type(step=lambda: model(frame(next(numbers))), **common)
        ahead = int(request["threads"])
        return case_type(run=lambda seconds: pipeline(model, frame, seconds, ahead=ahead), **common)


def pipeline(model: Any, frame: Callable[[int], Any], seconds: float, *, ahead: int) -> int:
    """Asynchronous requests, with images decoded ahead by a thread per core; returns the number answered."""
    answered = itertools.count()
    model.set_callback(lambda result, number: next(answered))
    deadline = time.perf_counter() + seconds
    with ThreadPoolExecutor(ahead) as pool:
        numbers = itertools.count()
        decoded = [pool.submit(frame, next(numbers)) for _ in range(2 * ahead)]
        while True:
            image = decoded.pop(0).result()
            decoded.append(pool.submit(frame, next(numbers)))
            model.infer_async(image, 0)
            if time.perf_counter() >= deadline:
                break
        model.await_all()
    return next(answered)


def main() -> None:
    serve = load_sibling("serve")
    peer = ModelApi()
    serve.serve(lambda request: peer.case(request, serve.Case))


if __name__ == "__main__":
    main()
