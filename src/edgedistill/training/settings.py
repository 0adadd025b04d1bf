"""What teacher and student settings share; each field is one command-line flag."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch

from edgedistill.artifacts import settings_dict
from edgedistill.data.augment import Augment, AugmentSettings, Strength
from edgedistill.errors import ArtifactError, UsageError
from edgedistill.images import InputSpec
from edgedistill.tasks import Task

OPTIMIZERS = ("radam", "adamw", "sgd")
# What may differ between a run and its resumption: where and how fast it runs, not what it computes.
FREE_FIELDS = frozenset({"workers", "cache_gib", "checkpoint_minutes", "tensorboard", "fold"})


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One training of one network.

    ``name``: a timm or short name. ``weights``: 'auto', 'none', a file or 'packaged:NAME' (see models.locate_weights).
    ``lr`` is the peak of a cosine per step that ends at ``lr * final_lr``, after ``warmup_epochs`` of linear rise.
    ``augment``, ``horizontal_flip``, ``any_way_up``, ``color_jitter``: see data.augment.AugmentSettings.
    ``balanced_sampling`` draws every class equally often. ``cutmix_probability`` is per batch. ``workers``: loader
    processes (None: chosen for the device). ``cache_gib``: memory for prepared images (None: half of what is free).
    ``checkpoint_minutes``: the longest stretch of work that a kill can cost; 0 writes a checkpoint after each step.
    """

    name: str
    weights: str = "auto"
    image_size: int = 224
    resize: Literal["squash", "center-crop"] = "squash"
    epochs: int = 10
    batch_size: int = 32
    optimizer: str = "radam"
    lr: float = 1e-3
    final_lr: float = 0.01
    weight_decay: float = 1e-4
    warmup_epochs: float = 0.0
    grad_clip: float | None = None
    label_smoothing: float = 0.0
    balanced_sampling: bool = True
    cutmix_alpha: float = 1.0
    cutmix_probability: float = 0.5
    augment: Strength = "light"
    horizontal_flip: bool = True
    any_way_up: bool = False
    color_jitter: float = 0.0
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "f32", "bf16"] = "auto"
    compile: bool = False
    deterministic: bool = True
    workers: int | None = None
    cache_gib: float | None = None
    checkpoint_minutes: float = 5.0
    tensorboard: bool = True

    def __post_init__(self) -> None:
        problems = [
            f"{field}={getattr(self, field)!r}, expected {expected}"
            for field, good, expected in self.checks()
            if not good
        ]
        if problems:
            raise UsageError(f"{type(self).__name__}: " + "; ".join(problems))
        self.augment_settings()

    def augment_settings(self) -> AugmentSettings:
        return AugmentSettings(
            strength=self.augment,
            horizontal_flip=self.horizontal_flip,
            any_way_up=self.any_way_up,
            color_jitter=self.color_jitter,
        )

    def augmentation(self, spec: InputSpec) -> Augment:
        return Augment(self.augment_settings(), spec.height, spec.width)

    def network(self, class_count: int) -> dict[str, Any]:
        """The keywords of models.create_model and models.model_kwargs_for."""
        return {
            "class_count": class_count,
            "image_size": self.image_size,
            "drop_rate": self.drop_rate,
            "drop_path_rate": self.drop_path_rate,
        }

    def checks(self) -> list[tuple[str, bool, str]]:
        """(field, whether its value is allowed, what is)."""
        return [
            ("name", bool(self.name), "a network, such as mbv3s"),
            ("image_size", 16 <= self.image_size <= 2048, "16 to 2048 pixels"),
            ("resize", self.resize in ("squash", "center-crop"), "'squash' or 'center-crop'"),
            ("epochs", 1 <= self.epochs <= 100_000, "1 or more"),
            ("batch_size", 2 <= self.batch_size <= 65_536, "2 or more (batch normalisation needs two)"),
            ("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}"),
            ("lr", 0 < self.lr < 100, "a number above 0"),
            ("final_lr", 0 <= self.final_lr <= 1, "a share of lr, 0 to 1"),
            ("weight_decay", 0 <= self.weight_decay < 10, "0 or more"),
            ("warmup_epochs", 0 <= self.warmup_epochs < self.epochs, "0 to less than epochs"),
            ("grad_clip", self.grad_clip is None or self.grad_clip > 0, "a norm above 0, or None"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "0 to less than 1"),
            ("cutmix_alpha", self.cutmix_alpha > 0, "a number above 0"),
            ("cutmix_probability", 0 <= self.cutmix_probability <= 1, "0 to 1"),
            ("drop_rate", 0 <= self.drop_rate < 1, "0 to less than 1"),
            ("drop_path_rate", 0 <= self.drop_path_rate < 1, "0 to less than 1"),
            ("seed", self.seed >= 0, "0 or more"),
            ("precision", self.precision in ("auto", "f32", "bf16"), "auto, f32 or bf16"),
            ("workers", self.workers is None or 0 <= self.workers <= 256, "0 to 256, or None"),
            ("cache_gib", self.cache_gib is None or self.cache_gib >= 0, "0 or more, or None"),
            ("checkpoint_minutes", self.checkpoint_minutes >= 0, "0 or more"),
        ]


def identity(settings: TrainSettings, *, task: Task | None = None, **more: Any) -> dict[str, Any]:
    """What decides the trained weights, as plain values: a resumed run must agree on all of it."""
    more |= {} if task is None else {"task": task.to_dict()}
    return {key: value for key, value in settings_dict(settings).items() if key not in FREE_FIELDS} | more


def refuse_other_settings(path: object, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises ArtifactError that names the first fields in which the saved work differs from what is asked now."""
    keys = sorted(saved.keys() | current.keys())
    different = [key for key in keys if saved.get(key) != current.get(key)]
    if different:
        shown = ", ".join(f"{key}={saved.get(key)!r} (now {current.get(key)!r})" for key in different[:3])
        raise ArtifactError(
            f"{path}: made with {shown}; resume with the same settings and data, or start anew with another --out"
        )


def choose_device(name: str) -> torch.device:
    """'auto' takes CUDA when it is there. Raises UsageError for a device that is not."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: unknown; expected auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch {torch.__version__} finds no CUDA device; use --device cpu")
    return device


def refuse_several_processes() -> None:
    """Two processes would write the same checkpoints: a launcher's processes get one fold each instead."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count not in ("", "1"):
        raise UsageError(
            f"WORLD_SIZE={count}: one training runs in one process; give each process a fold of its own with --fold K"
        )
