"""Tiny deployables and pictures for the C++ tests: networks whose answer is the colour that a picture has most of.

    python make_models.py FOLDER

    FOLDER/single        one stage, 32 px, temperature 1.5; labels red, green, very blue
    FOLDER/cascade       a fast stage (32 px) that is never sure of itself before a slow one (48 px) that always is
    FOLDER/multi_label   one stage with a sigmoid for each label, threshold 0.5
    FOLDER/heads         one stage with several: hue (red, green) and, in the place of the third class, a value
    FOLDER/heads_many    one stage: two labels that may both apply, and a value
    FOLDER/heads_cascade the same in two stages with thresholds of their own, the later one in batches of 8
    FOLDER/model_api     model.xml alone, from elsewhere: BGR planes, softmax inside, Model API's metadata only
    FOLDER/photos        red.jpg, green.png, blue.bmp, red.webp, yellow.png (red and green), large.jpg, broken.jpg

Needs openvino, numpy and cv2. FOLDER is made anew and is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openvino as ov
from openvino import opset13 as ops

LABELS = ("red", "green", "very blue")
BLUENESS = {"name": "blueness", "kind": "regression", "classes": [], "weight": 0.1, "mean": 40.0, "std": 7.5}
HEADS = {
    "softmax": {"name": "hue", "kind": "softmax", "classes": ["red", "green"], "weight": 1.0},
    "sigmoid": {"name": "hues", "kind": "sigmoid", "classes": ["red", "green"], "weight": 1.0, "threshold": [0.6, 0.3]},
}
HEADS["sigmoid_last"] = HEADS["sigmoid"] | {"threshold": [0.2, 0.9]}
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
COLOURS_BGR = {
    "red": (20, 30, 220),
    "green": (30, 200, 40),
    "blue": (230, 60, 20),
    "yellow": (20, 220, 220),
}


def network(*, size: int, gain: float, bgr: bool = False, softmax: bool = False) -> ov.Model:
    """Logits = gain * mean of each normalised plane in RGB order, through a 1 x 1 convolution."""
    image = ops.parameter([1, 3, size, size], np.float32, name="image")
    kernel = np.eye(3, dtype=np.float32)[:: -1 if bgr else 1].reshape(3, 3, 1, 1).copy()
    mixed = ops.convolution(image, kernel, [1, 1], [0, 0], [0, 0], [1, 1])
    means = ops.reduce_mean(mixed, np.array([2, 3]), False)
    scores = ops.matmul(means, (gain * np.eye(3)).astype(np.float32), False, False)
    model = ov.Model([ops.softmax(scores, 1) if softmax else scores], [image], "tiny")
    model.inputs[0].get_node().set_layout(ov.Layout("NCHW"))
    model.inputs[0].set_names({"image"})
    model.outputs[0].set_names({"logits"})
    return model


def input_spec(size: int) -> dict[str, Any]:
    return {
        "height": size,
        "width": size,
        "resize": "squash",
        "crop_fraction": 1.0,
        "color_order": "RGB",
        "mean": list(MEAN),
        "std": list(STD),
    }


def describe(model: ov.Model, size: int, task: str) -> None:
    own = {
        "format_version": "1",
        "input_spec": json.dumps(input_spec(size)),
        "temperature": "1.5",
        "thresholds": "null",
        "labels": json.dumps(LABELS),
        "dataset_hash": "d",
        "weights_hash": "w",
        "architecture": "tiny",
        "task": task,
    }
    if task in HEADS:
        head = HEADS[task]
        own |= {"task": "heads", "heads": json.dumps([head, BLUENESS])}
        own["labels"] = json.dumps([f"{head['name']}={name}" for name in ("red", "green")] + ["blueness"])
    for key, value in own.items():
        model.set_rt_info(value, ["edgedistill", key])
    describe_for_model_api(model, multi_label=task == "multi-label")


def describe_for_model_api(model: ov.Model, *, multi_label: bool = False, bgr: bool = False) -> None:
    values = {
        "model_type": "Classification",
        "labels": " ".join(label.replace(" ", "_") for label in LABELS),
        "mean_values": " ".join(str(value) for value in (MEAN[::-1] if bgr else MEAN)),
        "scale_values": " ".join(str(value) for value in (STD[::-1] if bgr else STD)),
        "resize_type": "standard",
        "reverse_input_channels": str(not bgr),
        "multilabel": str(multi_label),
        "output_raw_scores": "True",
    }
    if multi_label:
        values["confidence_threshold"] = "0.5"
    for key, value in values.items():
        model.set_rt_info(value, ["model_info", key])


def save_stage(root: Path, name: str, *, size: int, gain: float, task: str, exit_threshold: float | None) -> dict:
    """One stage on disk, and its entry of deploy.json."""
    path = root / "stages" / name / "model.xml"
    path.parent.mkdir(parents=True)
    model = network(size=size, gain=gain)
    describe(model, size, task)
    ov.save_model(model, path, compress_to_fp16=False)
    return {
        "model": path.relative_to(root).as_posix(),
        "sha256": hashlib.sha256(path.read_bytes() + path.with_suffix(".bin").read_bytes()).hexdigest(),
        "input_spec": input_spec(size),
        "temperature": 1.5,
        "exit_threshold": exit_threshold,
        "int8_sha256": None,
    }


def deployable(
    root: Path, stages: tuple[dict[str, Any], ...], *, task: str = "single-label", later_batch: int | None = None
) -> None:
    """``stages``: name, size, gain, exit_threshold of each, the fastest first; a task where it is its own."""
    values = {
        "format": "edgedistill-deploy",
        "version": 1,
        "stages": [save_stage(root, stage.pop("name"), **({"task": task} | stage)) for stage in stages],
        "latency": {"precision": "f32", "threads": None},
        "throughput": {"precision": "f32", "streams": None, "threads": None, "batch": 1, "pinning": None},
        "decode": "reduced",
        "reject_below": None,
        "score": {"w": 0.7, "metric": "accuracy", "scope": "files", "fps_target": None},
        "cpu": "",
        "versions": {"openvino": ov.get_version()},
    }
    if later_batch is not None:
        values["throughput"] |= {"later_batch": later_batch}
    (root / "deploy.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (root / "labels.txt").write_text("".join(f"{label}\n" for label in LABELS), encoding="utf-8")


def picture(colour: str, height: int, width: int) -> np.ndarray:
    """uint8 [h, w, 3] BGR: that colour with noise, the same every time."""
    noise = np.random.default_rng(0).integers(-20, 21, (height, width, 3))
    return np.clip(np.array(COLOURS_BGR[colour]) + noise, 0, 255).astype(np.uint8)


def photos(folder: Path) -> None:
    folder.mkdir()
    for name, height, width in (
        ("red.jpg", 40, 56),
        ("green.png", 40, 56),
        ("blue.bmp", 40, 56),
        ("red.webp", 40, 56),
        ("yellow.png", 40, 56),
        ("large.jpg", 1281, 1920),
    ):
        colour = "green" if name == "large.jpg" else Path(name).stem
        cv2.imwrite(str(folder / name), picture(colour, height, width))
    whole = (folder / "red.jpg").read_bytes()
    (folder / "broken.jpg").write_bytes(whole[: len(whole) // 2])


def make(root: Path) -> None:
    single = {"name": "tiny", "size": 32, "gain": 2.0, "exit_threshold": None}
    deployable(root / "single", (dict(single),))
    deployable(root / "multi_label", (dict(single),), task="multi-label")
    deployable(root / "heads", (dict(single),), task="softmax")
    deployable(root / "heads_many", (dict(single),), task="sigmoid")
    fast = {"name": "fast", "size": 32, "gain": 0.1, "exit_threshold": 0.9}
    slow = {"name": "slow", "size": 48, "gain": 8.0, "exit_threshold": None}
    deployable(root / "cascade", (dict(fast), dict(slow)))
    last = slow | {"task": "sigmoid_last"}
    deployable(root / "heads_cascade", (fast, last), task="sigmoid", later_batch=8)
    model = network(size=32, gain=2.0, bgr=True, softmax=True)
    describe_for_model_api(model, bgr=True)
    (root / "model_api").mkdir()
    ov.save_model(model, root / "model_api" / "model.xml", compress_to_fp16=False)
    photos(root / "photos")


def main(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        make(Path(temporary) / "models")
        shutil.rmtree(folder, ignore_errors=True)
        (Path(temporary) / "models").replace(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
