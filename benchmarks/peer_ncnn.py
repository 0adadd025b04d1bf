"""ncnn as a candidate of scope ``model``. Runs under the python of the peers' environment, as peer_model_api.py does:

    .venv-peers/bin/python benchmarks/peer_ncnn.py

model.onnx is converted by pnnx (its program alone; the Python package around it would want torch) with 32-bit weights.
ncnn's Python binding holds the interpreter's lock while it infers, so throughput is a process per core.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

# Before multiprocessing starts this file again as another name.
HERE = Path(__file__).resolve().parent


def load_sibling(name: str) -> Any:
    """The module NAME.py beside this file."""
    spec = importlib.util.spec_from_file_location(f"edgedistill_{name}", HERE / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{name}.py is not beside {__file__}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def converter(folder: Path) -> Path:
    """pnnx's program, which its package may have brought without the right to be run."""
    spec = importlib.util.find_spec("pnnx")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("pnnx is not installed here; run 'make peers' again")
    program = Path(next(iter(spec.submodule_search_locations))) / "pnnx"
    if os.access(program, os.X_OK):
        return program
    copy = Path(shutil.copy(program, folder / "pnnx"))
    copy.chmod(0o755)
    return copy


def convert(onnx: Path, shape: list[int], folder: Path) -> Path:
    """The path of the ncnn network, without .param and .bin."""
    model = folder / "model.onnx"
    shutil.copy(onnx, model)
    wanted = f"inputshape=[{','.join(map(str, shape))}]"
    done = subprocess.run([converter(folder), model, wanted, "fp16=0"], cwd=folder, capture_output=True, text=True)
    if done.returncode != 0 or not (folder / "model.ncnn.param").is_file():
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(f"pnnx cannot convert {onnx.name}: {lines[-1] if lines else 'it says nothing'}")
    return folder / "model.ncnn"


class Network:
    """A network in 32-bit floats with that many threads of its own."""

    def __init__(self, path: Path, tensor: Any, threads: int) -> None:
        import ncnn  # type: ignore[import-not-found]

        self.net = ncnn.Net()
        self.net.opt.num_threads = threads
        self.net.opt.use_vulkan_compute = False
        for name in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
            setattr(self.net.opt, name, False)
        if self.net.load_param(f"{path}.param") or self.net.load_model(f"{path}.bin"):
            raise RuntimeError("ncnn cannot load what pnnx wrote")
        self.array = np.ascontiguousarray(tensor[0])  # ncnn.Mat borrows its memory
        self.tensor = ncnn.Mat(self.array)
        self.names = self.net.input_names()[0], self.net.output_names()[0]

    def infer(self) -> Any:
        extractor = self.net.create_extractor()
        extractor.input(self.names[0], self.tensor)
        return extractor.extract(self.names[1])[1]

    def probabilities(self, temperature: float) -> list[float]:
        logits = np.array(self.infer(), np.float64).reshape(-1) / temperature
        weights = np.exp(logits - logits.max())
        return (weights / weights.sum()).tolist()


def child(pipe: Connection, path: Path, tensor: Any) -> None:
    """Answers a number of seconds with the number of images inferred in them."""
    network = Network(path, tensor, 1)
    network.infer()
    pipe.send("ready")
    while True:
        try:
            deadline = time.perf_counter() + pipe.recv()
        except EOFError:
            return
        count = 0
        while True:
            network.infer()
            count += 1
            if time.perf_counter() >= deadline:
                break
        pipe.send(count)


class Children:
    """A process per core, all at once."""

    def __init__(self, count: int, path: Path, tensor: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            context.Process(target=child, args=(theirs, path, tensor), daemon=True).start()
            theirs.close()
            self.pipes.append(ours)
        for pipe in self.pipes:
            pipe.recv()

    def run(self, seconds: float) -> int:
        for pipe in self.pipes:
            pipe.send(seconds)
        return sum(pipe.recv() for pipe in self.pipes)


def main() -> None:
    serve = load_sibling("serve")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgedistill-bench-")))

        def prepare(request: dict[str, Any]) -> Any:
            if request["scope"] != "model":
                raise ValueError("ncnn is measured in scope model")
            tensor = np.load(request["tensor"])
            path = folder / "model.ncnn"
            if not path.with_suffix(".ncnn.param").is_file():
                path = convert(Path(request["onnx"]), list(tensor.shape), folder)
            threads = int(request["threads"])
            latency = request["mode"] == "latency"
            network = Network(path, tensor, threads if latency else 1)
            settings = {"threads": threads, "processes": 1 if latency else threads}
            common = {
                "settings": settings | {"ncnn": importlib.metadata.version("ncnn")},
                "answer": network.probabilities(request["temperature"]),
            }
            if latency:
                return serve.Case(step=network.infer, **common)
            return serve.Case(run=Children(threads, path, tensor).run, **common)

        serve.serve(prepare)


if __name__ == "__main__":
    main()
