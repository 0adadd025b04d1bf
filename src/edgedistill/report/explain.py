"""Where the student looks: Grad-CAM of right and wrong test images, written beside the evaluation for the report.

Grad-CAM (Selvaraju et al., 1610.02391) from the grad-cam package, at the last layer that still has a map of the image.
Files: evaluation/explain.png (one sheet) and explain.json (what its columns show).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edgedistill.artifacts import RunDir, atomic_path, read_array, read_json, sha256_file, write_json
from edgedistill.data.manifest import Dataset, read_dataset
from edgedistill.errors import ArtifactError, ModelError
from edgedistill.images import ImageU8, InputSpec
from edgedistill.report.explain_section import EXPLAIN_FORMAT, SHEET
from edgedistill.timm_import import import_timm
from edgedistill.training.checkpoints import LoadedModel, read_model
from edgedistill.training.predict import load_pixels, network_input

COLUMNS = 6
TILE_PX = 144
GAP_PX = 8


@dataclass(frozen=True)
class FeatureMap:
    """A layer whose output is a map of the image. ``channels_last``: its output is [N, H, W, C], else [N, C, H, W]."""

    name: str
    layer: nn.Module
    channels_last: bool


def write_explanations(run: RunDir) -> Path:
    """evaluation/explain.png and explain.json of the run's model.pt; returns the sheet.

    Two rows of test images that it got wrong and two that it got right, each image above its Grad-CAM for the class
    that the network answered, the surest first. Raises ArtifactError when the run has no evaluation or its images are
    gone, ModelError for a network without feature maps.
    """
    evaluation = read_json(run.evaluation / "evaluation.json", format="edgedistill-evaluation")
    if "heads" in evaluation:
        raise ModelError("Grad-CAM explains the one label of an image, and this network has several heads")
    main = "student" if "student" in evaluation["models"] else "hard_label_student"
    probabilities = read_array(run.evaluation / f"{main}.probs.npy", mmap=True)
    labels, ids = read_array(run.evaluation / "test_labels.npy"), read_array(run.evaluation / "test_ids.npy")
    if not len(ids) == len(labels) == len(probabilities):
        raise ArtifactError(f"{run.evaluation}: its arrays differ in length; run 'distill --resume' to evaluate again")
    loaded = read_model(run.model)
    wrong, right = choose(probabilities, labels, columns=COLUMNS)
    rows = [*wrong, *right]
    pixels = load_pixels(_paths(read_dataset(run.dataset), [str(ids[row]) for row in rows]), loaded.input_spec)
    predicted = [int(probabilities[row].argmax()) for row in rows]
    layer = last_feature_map(loaded.model, loaded.input_spec)
    overlays = grad_cam(loaded, layer, pixels, predicted)
    sheet = np.vstack([_strip(images[part]) for part in _parts(len(wrong), len(rows)) for images in (pixels, overlays)])
    encoded, png = cv2.imencode(".png", sheet)
    if not encoded:
        raise ArtifactError(f"{run.evaluation / SHEET}: the sheet of {sheet.shape} could not be encoded as PNG")
    with atomic_path(run.evaluation / SHEET) as temporary:
        temporary.write_bytes(png.tobytes())
    columns = [
        {
            "id": str(ids[row]),
            "right": number >= len(wrong),
            "predicted": loaded.classes[predicted[number]],
            "probability": float(probabilities[row].max()),
            "true": loaded.classes[int(labels[row])],
        }
        for number, row in enumerate(rows)
    ]
    values = {"model_sha256": sha256_file(run.model), "method": "Grad-CAM", "layer": layer.name, "images": columns}
    write_json(run.evaluation / "explain.json", values, format=EXPLAIN_FORMAT)
    return run.evaluation / SHEET


def choose(
    probabilities: npt.NDArray[np.float32], labels: npt.NDArray[np.integer[Any]], *, columns: int
) -> tuple[list[int], list[int]]:
    """(wrong, right): rows of the surest answers of each kind, of right ones the surest of each class in turn."""
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    order = np.argsort(-confidence, kind="stable")
    wrong = [int(row) for row in order if predicted[row] != labels[row]][:columns]
    right = [int(row) for row in order if predicted[row] == labels[row]]
    turn: dict[int, int] = {}
    rank = {}
    for row in right:
        turn[int(labels[row])] = turn.get(int(labels[row]), 0) + 1
        rank[row] = turn[int(labels[row])]
    return wrong, sorted(right, key=lambda row: rank[row])[:columns]


def last_feature_map(model: nn.Module, spec: InputSpec) -> FeatureMap:
    """The last layer in the order of execution whose output still has height and width above 1.

    Raises ModelError for a network that has none, such as a vision transformer, which works on tokens.
    """
    outputs: list[tuple[str, nn.Module, torch.Size]] = []

    def remember(name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.ndim in (3, 4):
                outputs.append((name, module, output.shape))

        return hook

    handles = [module.register_forward_hook(remember(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, spec.height, spec.width))
    finally:
        for handle in handles:
            handle.remove()
    features = int(getattr(model, "num_features", 0))
    for name, module, shape in reversed(outputs):
        if len(shape) == 3:  # [N, tokens, C]: after it nothing is a map any more
            break
        channels_last = shape[3] == features != shape[1]
        height, width = (shape[1], shape[2]) if channels_last else (shape[2], shape[3])
        if height > 1 and width > 1:
            return FeatureMap(name, module, channels_last)
    raise ModelError(
        f"{type(model).__name__}: no layer keeps a map of the image at {spec.height} x {spec.width} pixels; "
        "Grad-CAM needs a convolutional network or a larger input"
    )


def grad_cam(loaded: LoadedModel, layer: FeatureMap, pixels: ImageU8, predicted: Sequence[int]) -> ImageU8:
    """uint8 [N, H, W, 3] BGR: the images with a heat map of what spoke for the class ``predicted`` of each."""
    import_timm()  # before grad-cam, which imports torchvision (see timm_import)
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.image import show_cam_on_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    inputs = network_input(torch.from_numpy(pixels).flip(-1), loaded.input_spec)
    turn = (lambda output: output.permute(0, 3, 1, 2)) if layer.channels_last else None
    with GradCAM(loaded.model, [layer.layer], reshape_transform=turn) as explainer:
        heat = explainer(input_tensor=inputs, targets=[ClassifierOutputTarget(index) for index in predicted])
    overlays = [
        show_cam_on_image(image.astype(np.float32) / 255, mask, image_weight=0.55)
        for image, mask in zip(pixels, heat, strict=True)
    ]
    return np.stack(overlays).astype(np.uint8)


def _paths(dataset: Dataset, ids: Sequence[str]) -> npt.NDArray[np.str_]:
    path_of = dict(zip(dataset.ids.tolist(), dataset.paths.tolist(), strict=True))
    lacking = next((name for name in ids if name not in path_of), None)
    if lacking is not None:
        raise ArtifactError(f"evaluation/test_ids.npy: {lacking!r} is not in dataset.csv; evaluate the run again")
    return np.array([path_of[name] for name in ids], dtype=str)


def _parts(wrong: int, count: int) -> list[slice]:
    return [part for part in (slice(0, wrong), slice(wrong, count)) if part.stop > part.start]


def _strip(images: ImageU8) -> ImageU8:
    """One row of the sheet: every image on a tile of its own aspect, white between them."""
    strip = np.full((TILE_PX + GAP_PX, COLUMNS * (TILE_PX + GAP_PX), 3), 255, np.uint8)
    scale = TILE_PX / max(images.shape[1:3])
    size = (max(1, round(images.shape[2] * scale)), max(1, round(images.shape[1] * scale)))
    for column, image in enumerate(images):
        tile = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        left = column * (TILE_PX + GAP_PX)
        strip[: tile.shape[0], left : left + tile.shape[1]] = tile
    return strip
