"""Where the student looks: Grad-CAM of right and wrong test images, written beside the evaluation for the report.

Grad-CAM (Selvaraju et al., 1610.02391) from the grad-cam package, at the last layer that still has a map of the image.
Files: evaluation/explain.png (one sheet) and explain.json (what its columns show).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from edgedistill.tasks import Floats, Head, Task, Values, answers_of
from edgedistill.timm_import import import_timm
from edgedistill.training.checkpoints import LoadedModel, read_model
from edgedistill.training.predict import load_pixels, network_input

COLUMNS = 6
TILE_PX = 144
GAP_PX = 8
MAX_HEADS = 8


@dataclass(frozen=True)
class FeatureMap:
    """A layer whose output is a map of the image. ``channels_last``: its output is [N, H, W, C], else [N, C, H, W]."""

    name: str
    layer: nn.Module
    channels_last: bool


@dataclass(frozen=True)
class Answer:
    """One answer to explain. ``row``: of the test split; ``output``: of the network. ``applies`` False: the answer is that
    this label does not apply. ``predicted``, ``true``: in words; ``head``: its name, '' where there is one label."""

    row: int
    output: int
    right: bool
    predicted: str
    probability: float
    true: str
    head: str = ""
    applies: bool = True


def write_explanations(run: RunDir) -> Path:
    """evaluation/explain.png and explain.json of the run's model.pt; returns the sheet.

    For each head of classes two rows of test images that it got wrong and two that it got right, each image above its
    Grad-CAM for what the network answered, the surest first. Raises ArtifactError when the run has no evaluation or its
    images are gone, ModelError for a network without feature maps.
    """
    evaluation = read_json(run.evaluation / "evaluation.json", format="edgedistill-evaluation")
    main = "student" if "student" in evaluation["models"] else "hard_label_student"
    probabilities = read_array(run.evaluation / f"{main}.probs.npy", mmap=True)
    loaded, ids = read_model(run.model), read_array(run.evaluation / "test_ids.npy")
    values = _truth(run, several=not loaded.task.is_single)
    wanted = (len(ids), loaded.task.width), (len(ids), loaded.task.column_count)
    if (probabilities.shape, values.shape) != wanted:
        raise ArtifactError(f"{run.evaluation}: its arrays differ in length; run 'distill --resume' to evaluate again")
    strips = [strip for strip in answers_of_heads(loaded.task, probabilities, values, columns=COLUMNS) if strip]
    answers = [answer for strip in strips for answer in strip]
    pixels = load_pixels(_paths(read_dataset(run.dataset), [str(ids[one.row]) for one in answers]), loaded.input_spec)
    layer = last_feature_map(loaded.model, loaded.input_spec)
    overlays = grad_cam(loaded, layer, pixels, answers)
    sheet = np.vstack([_strip(images[part]) for part in _parts(strips) for images in (pixels, overlays)])
    encoded, png = cv2.imencode(".png", sheet)
    if not encoded:
        raise ArtifactError(f"{run.evaluation / SHEET}: the sheet of {sheet.shape} could not be encoded as PNG")
    with atomic_path(run.evaluation / SHEET) as temporary:
        temporary.write_bytes(png.tobytes())
    columns = [_described(answer, str(ids[answer.row])) for answer in answers]
    values_written = {
        "model_sha256": sha256_file(run.model),
        "method": "Grad-CAM",
        "layer": layer.name,
        "images": columns,
    }
    write_json(run.evaluation / "explain.json", values_written, format=EXPLAIN_FORMAT)
    return run.evaluation / SHEET


def _truth(run: RunDir, *, several: bool) -> Values:
    """float32 [N, V] of the test images, as ``tasks`` has it."""
    if several:
        return read_array(run.evaluation / "test_values.npy")
    return read_array(run.evaluation / "test_labels.npy").astype(np.float32)[:, None]


def _described(answer: Answer, image_id: str) -> dict[str, Any]:
    values = {"id": image_id, "right": answer.right, "predicted": answer.predicted, "probability": answer.probability}
    return values | {"true": answer.true} | ({"head": answer.head} if answer.head else {})


def answers_of_heads(task: Task, probabilities: Floats, values: Values, *, columns: int) -> list[list[Answer]]:
    """The wrong, then the right answers of each of the first MAX_HEADS heads of classes, at most ``columns`` of a kind.

    Of a sigmoid head wrong are labels that were given and do not apply, or the other way round; right are those that
    were given and do, for of most images most labels do not.
    """
    found = []
    heads = [(head, part) for head, part in task.slices() if head.kind != "regression"][:MAX_HEADS]
    places = dict(zip((head.name for head in task.heads), (part for _, part in task.columns()), strict=True))
    for head, part in heads:
        choice = _labels_of if head.kind == "sigmoid" else _classes_of
        name = "" if task.is_single else head.name
        found += choice(head, part.start, probabilities[:, part], values[:, places[head.name]], name, columns)
    return found


def _classes_of(
    head: Head, start: int, probabilities: Floats, values: Values, name: str, columns: int
) -> list[list[Answer]]:
    known = np.flatnonzero(~np.isnan(values[:, 0]))
    labels = values[known, 0].astype(np.int64)
    strips = []
    for right, rows in zip((False, True), choose(probabilities[known], labels, columns=columns), strict=True):
        strip = []
        for row in rows:
            own = probabilities[known[row]]
            index = int(own.argmax())
            words = head.classes[index], head.classes[int(labels[row])]
            strip.append(Answer(int(known[row]), start + index, right, words[0], float(own[index]), words[1], name))
        strips.append(strip)
    return strips


def _labels_of(
    head: Head, start: int, probabilities: Floats, values: Values, name: str, columns: int
) -> list[list[Answer]]:
    """Of several labels, each label of each image is an answer of its own."""
    given = answers_of(head, probabilities).astype(bool)
    truth, known = values >= 0.5, ~np.isnan(values)
    sure = np.where(given, probabilities, 1 - probabilities)
    strips = []
    for right, kind in ((False, known & (given != truth)), (True, known & given & truth)):
        rows, labels = np.nonzero(kind)
        # The surest of each label in turn, so that one easy label does not fill the row.
        ranks = np.zeros(len(rows), np.int64)
        for label in np.unique(labels):
            own = np.flatnonzero(labels == label)
            ranks[own[np.argsort(-sure[rows[own], label], kind="stable")]] = np.arange(len(own))
        order = np.lexsort((-sure[rows, labels], ranks if right else np.zeros_like(ranks)))[:columns]
        strips.append(
            [
                Answer(
                    int(row),
                    start + int(label),
                    right,
                    _said(head.classes[label], given[row, label]),
                    float(sure[row, label]),
                    _said(head.classes[label], truth[row, label]),
                    name,
                    bool(given[row, label]),
                )
                for row, label in zip(rows[order], labels[order], strict=True)
            ]
        )
    return strips


def _said(label: str, applies: bool) -> str:
    return label if applies else f"not {label}"


def choose(probabilities: Floats, labels: npt.NDArray[np.integer[Any]], *, columns: int) -> tuple[list[int], list[int]]:
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


def grad_cam(loaded: LoadedModel, layer: FeatureMap, pixels: ImageU8, answers: Sequence[Answer]) -> ImageU8:
    """uint8 [N, H, W, 3] BGR: the images with a heat map of what spoke for the answer of each."""
    import_timm()  # before grad-cam, which imports torchvision (see timm_import)
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.image import show_cam_on_image

    inputs = network_input(torch.from_numpy(pixels).flip(-1), loaded.input_spec)
    turn = (lambda output: output.permute(0, 3, 1, 2)) if layer.channels_last else None
    with GradCAM(loaded.model, [layer.layer], reshape_transform=turn) as explainer:
        # A few at a time: of many heads there are more images than a backward pass has memory for.
        parts = [slice(start, start + 2 * COLUMNS) for start in range(0, len(answers), 2 * COLUMNS)]
        heat = np.concatenate(
            [explainer(input_tensor=inputs[part], targets=[_spoke_for(one) for one in answers[part]]) for part in parts]
        )
    overlays = [
        show_cam_on_image(image.astype(np.float32) / 255, mask, image_weight=0.55)
        for image, mask in zip(pixels, heat, strict=True)
    ]
    return np.stack(overlays).astype(np.uint8)


def _spoke_for(answer: Answer) -> Callable[[torch.Tensor], torch.Tensor]:
    """What grad-cam differentiates: the logit of the answer, its negative where the label was said not to apply."""
    return lambda logits: logits[..., answer.output] if answer.applies else -logits[..., answer.output]


def _paths(dataset: Dataset, ids: Sequence[str]) -> npt.NDArray[np.str_]:
    path_of = dict(zip(dataset.ids.tolist(), dataset.paths.tolist(), strict=True))
    lacking = next((name for name in ids if name not in path_of), None)
    if lacking is not None:
        raise ArtifactError(f"evaluation/test_ids.npy: {lacking!r} is not in dataset.csv; evaluate the run again")
    return np.array([path_of[name] for name in ids], dtype=str)


def _parts(strips: Sequence[Sequence[Answer]]) -> list[slice]:
    """The place of each strip among all answers."""
    ends = np.cumsum([len(strip) for strip in strips]).tolist()
    return [slice(end - len(strip), end) for strip, end in zip(strips, ends, strict=True)]


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
