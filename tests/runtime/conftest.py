"""Tiny deployables without torch: networks whose answer is the colour that a picture has most of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import openvino as ov
import pytest
from openvino import opset13 as ops

from edgedistill.images import InputSpec
from edgedistill.runtime.bundle import DeployConfig, describe_stage, write_deploy

LABELS = ("red", "green", "very blue")
COLOURS_BGR = {"red": (20, 30, 220), "green": (30, 200, 40), "very blue": (230, 60, 20)}


def build_model(
    *,
    size: int = 32,
    gain: float = 2.0,
    classes: int = 3,
    layout: str = "NCHW",
    bgr: bool = False,
    softmax: bool = False,
    sigmoid: bool = False,
) -> ov.Model:
    """Logits = gain * mean of each normalised plane (in RGB order), through a 1 x 1 convolution."""
    shape = [1, 3, size, size] if layout == "NCHW" else [1, size, size, 3]
    image = ops.parameter(shape, np.float32, name="image")
    planes = image if layout == "NCHW" else ops.transpose(image, np.array([0, 3, 1, 2]))
    kernel = np.eye(3, dtype=np.float32)[:: -1 if bgr else 1].reshape(3, 3, 1, 1).copy()
    mixed = ops.convolution(planes, kernel, [1, 1], [0, 0], [0, 0], [1, 1])
    means = ops.reduce_mean(mixed, np.array([2, 3]), False)
    weights = (gain * np.eye(3, classes)).astype(np.float32)
    scores = ops.matmul(means, weights, False, False)
    scores = ops.softmax(scores, 1) if softmax else ops.sigmoid(scores) if sigmoid else scores
    model = ov.Model([scores], [image], "tiny")
    model.inputs[0].get_node().set_layout(ov.Layout(layout))
    model.inputs[0].set_names({"image"})
    model.outputs[0].set_names({"logits"})
    return model


def own_metadata(spec: InputSpec, **changes: str) -> dict[str, str]:
    return {
        "format_version": "1",
        "input_spec": json.dumps(spec.to_dict()),
        "temperature": "1.5",
        "thresholds": "null",
        "labels": json.dumps(LABELS),
        "dataset_hash": "d",
        "weights_hash": "w",
        "architecture": "tiny",
        "task": "single-label",
    } | changes


def describe(model: ov.Model, section: str, values: dict[str, Any]) -> ov.Model:
    for key, value in values.items():
        model.set_rt_info(value, [section, key])
    return model


class Maker:
    """Writes tiny deployables; one per test through the fixture ``make``."""

    labels = LABELS
    colours = COLOURS_BGR
    model = staticmethod(build_model)
    own_metadata = staticmethod(own_metadata)
    describe = staticmethod(describe)

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ir(
        self, path: Path, *, spec: InputSpec | None = None, changes: dict[str, str] | None = None, **kind: Any
    ) -> Path:
        spec = spec or InputSpec(height=32, width=32)
        model = build_model(size=spec.height, **kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        ov.save_model(
            describe(model, "edgedistill", own_metadata(spec, **(changes or {}))), path, compress_to_fp16=False
        )
        return path

    def deployable(self, name: str = "openvino", *, spec: InputSpec | None = None, **config: Any) -> Path:
        """An openvino/ folder with one stage."""
        spec, root = spec or InputSpec(height=32, width=32), self.folder / name
        self.ir(root / "stages" / "tiny" / "model.xml", spec=spec)
        stage = describe_stage(root, "stages/tiny/model.xml", input_spec=spec, temperature=1.5)
        write_deploy(root / "deploy.json", DeployConfig(stages=(stage,), **config))
        return root

    def cascade(
        self, *, exit_threshold: float, slow_size: int = 32, fast_gain: float = 0.1, int8: str = "", **config: Any
    ) -> Path:
        """A fast stage that is never sure of itself (gain 0.1) before a slow one that always is (gain 8).

        ``int8``: the stages ('fast slow') with an INT8 form, whose gain is half.
        """
        root, stages = self.folder / "cascade", []
        for name, size, gain, threshold in (("fast", 32, fast_gain, exit_threshold), ("slow", slow_size, 8.0, None)):
            spec = InputSpec(height=size, width=size)
            self.ir(root / f"{name}.xml", spec=spec, gain=gain)
            if name in int8:
                self.ir(root / f"{name}-int8.xml", spec=spec, gain=gain / 2)
            stages.append(
                describe_stage(root, f"{name}.xml", input_spec=spec, temperature=1.5, exit_threshold=threshold)
            )
        write_deploy(root / "deploy.json", DeployConfig(stages=tuple(stages), **config))
        return root

    def picture(self, colour: str, height: int = 40, width: int = 56, *, seed: int = 0) -> npt.NDArray[np.uint8]:
        """uint8 [h, w, 3] BGR: that colour with noise."""
        noise = np.random.default_rng(seed).integers(-20, 21, (height, width, 3))
        return np.clip(np.array(COLOURS_BGR[colour]) + noise, 0, 255).astype(np.uint8)

    def photo(self, colour: str, suffix: str = ".jpg", **kind: Any) -> Path:
        path = self.folder / "photos" / f"{colour}{kind.get('seed', '')}{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(cv2.imencode(suffix, self.picture(colour, **kind))[1].tobytes())
        return path


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    monkeypatch.setenv("EDGEDISTILL_CACHE", str(tmp_path / "cache"))
    return Maker(tmp_path)


@pytest.fixture
def wait_for() -> Callable[[Callable[[], bool]], None]:
    """Until it is true, or the test fails."""
    import time

    def wait(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end, "waited 10 seconds in vain"
            time.sleep(0.005)

    return wait
