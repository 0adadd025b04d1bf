"""The network to export, from edgedistill's model.pt or from any timm checkpoint."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edgedistill import console
from edgedistill.artifacts import sha256_file
from edgedistill.calibration import Calibration
from edgedistill.errors import ModelError, UsageError
from edgedistill.images import InputSpec
from edgedistill.tasks import Task, unfit_label
from edgedistill.timm_import import import_timm
from edgedistill.training import models
from edgedistill.training.checkpoints import read_model


@dataclass(frozen=True, eq=False)
class Network:
    """A float32 network in eval mode with everything that its files must say about it.

    ``module``: float32 [N, 3, H, W] -> logits float32 [N, C]. ``weights_hash``: sha256 of the file it came from.
    ``settings``: of its training, as model.pt has them; empty for a network that was trained elsewhere. ``heads``: of a
    network with several, whose outputs ``classes`` names. ``calibration``: its reliability curve, if it was measured.
    """

    module: nn.Module
    architecture: str
    classes: tuple[str, ...]
    spec: InputSpec
    temperature: float
    dataset_hash: str
    weights_hash: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    heads: Task | None = None
    calibration: Calibration | None = None

    @property
    def task(self) -> Task:
        return self.heads or Task.single(self.classes)

    def __post_init__(self) -> None:
        if len(self.classes) < 2 and self.heads is None:
            raise ModelError(f"{self.architecture}: {len(self.classes)} classes, a classifier needs at least 2")
        for name in self.classes:
            if wrong := unfit_label(name):
                raise ModelError(f"{self.architecture}: class {name[:60]!r}: {wrong}; rename it")
        model_api_labels(self.classes)
        shape = (1, 3, self.spec.height, self.spec.width)
        try:
            with torch.no_grad():
                logits = self.module(torch.zeros(shape))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ModelError(f"{self.architecture} does not take input {list(shape)}: {error}") from error
        expected = (1, len(self.classes))
        if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != expected:
            got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise ModelError(f"{self.architecture}: output {got} for one image, expected {expected} logits")
        if not torch.isfinite(logits).all():
            raise ModelError(
                f"{self.architecture}: a black image gives logits that are not finite; the weights are broken"
            )


def load_network(path: Path, *, image_size: int | None) -> Network:
    """A model.pt of edgedistill. Raises ArtifactError or ModelError."""
    loaded = read_model(path)
    return Network(
        module=loaded.model.float().eval(),
        architecture=loaded.architecture,
        classes=tuple(loaded.classes),
        spec=loaded.input_spec if image_size is None else loaded.input_spec.resized(image_size),
        temperature=float(loaded.temperature),
        dataset_hash=loaded.dataset_hash,
        weights_hash=sha256_file(path),
        settings=loaded.settings,
        heads=None if loaded.task.is_single else loaded.task,
        calibration=loaded.calibration,
    )


def load_timm_network(name: str, weights: Path, labels: Path, *, image_size: int | None) -> Network:
    """Any timm checkpoint: the network's own input configuration, temperature 1, class names from a text file."""
    architecture = models.resolve_name(name)
    if not weights.is_file():
        raise UsageError(f"--weights {weights}: no such file")
    classes = read_labels(labels)
    spec = timm_input_spec(architecture, image_size=image_size)
    module = models.create_model(architecture, class_count=len(classes), image_size=spec.height)
    models.load_weights(module, architecture, models.Weights(weights), replace_classifier=False)
    return Network(
        module=module.float().eval(),
        architecture=architecture,
        classes=classes,
        spec=spec,
        temperature=1.0,
        dataset_hash="",
        weights_hash=sha256_file(weights),
    )


def timm_input_spec(architecture: str, *, image_size: int | None) -> InputSpec:
    """timm's test-time preprocessing as an InputSpec: the shorter side to size / crop_pct, then the centre."""
    config = import_timm().get_pretrained_cfg(architecture)
    if config is None:
        raise ModelError(f"{architecture}: timm has no input configuration for it; train it with edgedistill instead")
    height, width = tuple(config.test_input_size or config.input_size)[1:]
    fraction = float(config.test_crop_pct or config.crop_pct)
    if config.interpolation != "bilinear":
        console.warn(f"{architecture} was trained with {config.interpolation} resizing; edgedistill resizes bilinearly")
    spec = InputSpec(
        height=height,
        width=width,
        resize="center-crop",
        crop_fraction=min(1.0, fraction),
        mean=tuple(255.0 * value for value in config.mean),
        std=tuple(255.0 * value for value in config.std),
    )
    return spec if image_size is None else dataclasses.replace(spec, height=image_size, width=image_size)


def read_labels(path: Path) -> tuple[str, ...]:
    """One class name on each line, in the order of the logits. Raises UsageError that names the line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--labels {path}: cannot be read ({error}); expected UTF-8 text, one class on each line"
        ) from error
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    for number, name in enumerate(names, start=1):
        if not name:
            raise UsageError(f"--labels {path}: line {number} is empty, expected a class name")
        if name in names[: number - 1]:
            raise UsageError(f"--labels {path}: line {number}: {name!r} stands twice")
    return tuple(names)


def model_api_labels(classes: tuple[str, ...]) -> tuple[str, ...]:
    """Class names as Model API's space separated list can hold them: white space and control characters become '_'.

    Raises ModelError when two names become one, or a name is empty.
    """
    words = ["".join("_" if c.isspace() or unicodedata.category(c)[0] == "C" else c for c in name) for name in classes]
    seen: dict[str, str] = {}
    for name, word in zip(classes, words, strict=True):
        if not word:
            raise ModelError("a class name is empty; rename the class")
        if word in seen:
            raise ModelError(
                f"the class names {seen[word]!r} and {name!r} are both {word!r} in a space separated list; rename one"
            )
        seen[word] = name
    return tuple(words)


def random_images(spec: InputSpec, count: int) -> npt.NDArray[np.float32]:
    """float32 [count, 3, H, W]: stand-ins where there are no real images; the same ones every time."""
    shape = (count, 3, spec.height, spec.width)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
