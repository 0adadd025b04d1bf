"""What teacher and student settings share; each field is one command-line flag.

Where a wish is judged, from the sternest to the mildest. A new option needs a line in the first that fits:

- ``checks``: one field alone, such as a share of 0 to 1. UsageError when the settings are made.
- ``contradictions``: fields that undo each other. UsageError when the settings are made.
- ``refuse_for``, ``single_label_only``: what the data's heads cannot be trained by. UsageError once the data are known.
- ``only_with``: fields that change nothing without another, said as warnings by ``doubts``, with what is allowed but seldom
  wanted. Where one command line sets several networks, nobody is told of a flag that another of them ``heeds``
  (pipeline.refuse_early).
- options.idle_options: flags of the command line that no network of the run has a use for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch

from edgedistill.artifacts import settings_dict
from edgedistill.data.augment import CROP, STANDARD_JITTER, Augment, AugmentSettings, Strength
from edgedistill.data.manifest import Dataset
from edgedistill.errors import ArtifactError, UsageError
from edgedistill.images import InputSpec
from edgedistill.tasks import Task, Values
from edgedistill.training.classifier import ClassifierName, ClassifierSettings, PoolName
from edgedistill.training.loader import head_sampling_weights, parse_oversample, sampling_weights
from edgedistill.training.losses import (
    CLASS_WEIGHTS,
    HARD_LOSSES,
    ClassWeights,
    HardLoss,
    HardLossName,
    class_weights,
    label_weights,
    ldam_margins,
)
from edgedistill.training.mixing import Mixing

ScheduleName = Literal["cosine", "exponential", "constant"]

TORCH_OPTIMIZERS = ("radam", "adam", "adamw", "sgd")  # built by torch; any other name is timm's
# Fields of ClassifierSettings, and what they are called here.
CLASSIFIER_FIELDS = {
    "pool": "pool",
    "hidden_units": "hidden_units",
    "dropout": "classifier_dropout",
    "dropout_samples": "dropout_samples",
    "classifier": "classifier",
}
# What older work, which does not name them, was made with, where that is not the default: crops had one size.
AVERAGES = ("extra_epochs", "swa_start", "ema_decay")  # of weights
BEFORE_THEY_EXISTED = {"crop_max": CROP[0]}
# What may differ between a run and its resumption: where and how fast it runs, not what it computes.
FREE_FIELDS = frozenset({"workers", "cache_gib", "checkpoint_minutes", "tensorboard", "fold", "soft_label_store"})


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One training of one network.

    ``name``: a timm or short name. ``weights``: 'auto', 'none', a file or 'packaged:NAME' (see models.locate_weights).
    ``test_size``: evaluate, label and deploy at this resolution in place of ``image_size``, after ``fixres_epochs`` of
    fine-tuning of the last layers there (see training.fixres).
    ``optimizer``: radam, adam, adamw, sgd, ranger, over9000, any name of timm.optim, or lookahead_NAME.
    ``lr`` is reached after ``warmup_epochs`` of linear rise. ``schedule``: 'cosine' per step, to ``lr * final_lr``;
    'exponential', ``lr * lr_decay**epoch``; 'constant'.
    ``hard_loss``, ``focal_gamma``, ``focal_alpha``: see losses.HardLoss. ``class_weights``: 'none', 'inverse' frequency
    or 'class-balanced' with ``class_weight_beta``, which count after the share ``defer_weights`` of the epochs (DRW).
    ``augment`` to ``coarse_dropout``: see data.augment.AugmentSettings. ``balanced_sampling`` draws every class equally
    often; ``sample_power``, ``oversample`` (CLASS=FACTOR): see loader.sampling_weights and, for several heads,
    loader.head_sampling_weights. ``cutmix_probability`` and
    ``mixup_probability`` are per batch; the last ``plain_epochs`` of all mix nothing.
    ``pool``, ``hidden_units``, ``classifier_dropout``, ``dropout_samples``, ``classifier``: see
    classifier.ClassifierSettings.
    Averaging is one of three: ``extra_epochs`` more at a constant ``lr * extra_lr``, whose weights are averaged;
    ``swa_start``, the share of ``epochs`` after which the rate stays at ``lr * swa_lr`` and the weights at the end of
    each epoch are averaged (SWA, 1803.05407); ``ema_decay``, an exponential average over steps, for which the decay
    rises with (1 + n) / (10 + n).
    ``workers``: loader processes (None: chosen for the device). ``cache_gib``: memory for prepared images (None: half
    of what is free). ``checkpoint_minutes``: the longest stretch of work that a kill can cost; 0 writes a checkpoint
    after each step.
    """

    role: ClassVar[str] = "training"  # what errors call these settings

    name: str
    weights: str = "auto"
    image_size: int = 224
    test_size: int | None = None
    fixres_epochs: int = 1
    resize: Literal["squash", "center-crop"] = "squash"
    epochs: int = 10
    batch_size: int = 32
    optimizer: str = "radam"
    lr: float = 1e-3
    final_lr: float = 0.01
    weight_decay: float = 1e-4
    warmup_epochs: float = 0.0
    schedule: ScheduleName = "cosine"
    lr_decay: float = 0.995
    grad_clip: float | None = None
    label_smoothing: float = 0.0
    hard_loss: HardLossName = "ce"
    focal_gamma: float = 2.0
    focal_alpha: float = 1.0
    class_weights: ClassWeights = "none"
    class_weight_beta: float = 0.999
    defer_weights: float = 0.0
    balanced_sampling: bool = True
    sample_power: float = 0.0
    oversample: tuple[str, ...] = ()
    cutmix_alpha: float = 1.0
    cutmix_probability: float = 0.5
    mixup_alpha: float = 1.0
    mixup_probability: float = 0.0
    plain_epochs: int = 0
    augment: Strength = "light"
    horizontal_flip: bool = True
    any_way_up: bool = False
    crop_min: float = CROP[0]
    crop_max: float = CROP[1]
    color_jitter: float = 0.0
    auto_augment: str = "none"
    grayscale: float = 0.0
    gridmask: float = 0.0
    cutout: float = 0.0
    coarse_dropout: float = 0.0
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    pool: PoolName = "avg"
    hidden_units: int = 0
    classifier_dropout: float = 0.0
    dropout_samples: int = 1
    classifier: ClassifierName = "linear"
    extra_epochs: int = 0
    extra_lr: float = 0.1
    ema_decay: float = 0.0
    swa_start: float = 0.0
    swa_lr: float = 0.5
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
            raise UsageError(f"{self.role}: " + "; ".join(problems))
        object.__setattr__(self, "oversample", tuple(self.oversample))  # JSON gives it back as a list
        for text in self.oversample:
            parse_oversample(text)
        contradictions = [text for wrong, text in self.contradictions() if wrong]
        if contradictions:
            raise UsageError(f"{self.role}: " + self.in_own_flags("; ".join(contradictions)))
        self.augment_settings()

    @staticmethod
    def in_own_flags(advice: str) -> str:
        """``advice`` with the flags that set these settings in place of the student's."""
        return advice

    def contradictions(self) -> list[tuple[bool, str]]:
        """(whether they are asked for together, which options contradict each other and what to do)."""
        smoothed, weighted = self.label_smoothing > 0, self.class_weights != "none"
        mixed = self.cutmix_probability > 0 or self.mixup_probability > 0
        averages = [f"{flag_of(name, value)} {value:g}" for name in AVERAGES if (value := getattr(self, name)) > 0]
        return [
            (
                weighted and self.balanced_sampling,
                f"--class-weights {self.class_weights} with balanced sampling counts rare classes twice; "
                "give --no-balanced or --class-weights none",
            ),
            (
                weighted and self.weighs_draws,
                f"--class-weights {self.class_weights} with --sample-power or --oversample counts rare classes twice; "
                "choose one of them",
            ),
            (
                self.balanced_sampling and self.weighs_draws,
                "--sample-power and --oversample have no say in balanced sampling; give --no-balanced",
            ),
            (
                self.defer_weights > 0 and not weighted,
                "--defer-weights without class weights defers nothing; give --class-weights class-balanced",
            ),
            (
                self.hard_loss == "soft-f1" and weighted,
                "--hard-loss soft-f1 weighs all classes alike already; give --class-weights none",
            ),
            (
                self.hard_loss in ("focal", "ldam") and smoothed,
                f"--hard-loss {self.hard_loss} with label smoothing: one sharpens the target that the other softens; "
                "give --label-smoothing 0",
            ),
            (
                self.cutmix_probability + self.mixup_probability > 1,
                f"--cutmix {self.cutmix_probability:g} and --mixup {self.mixup_probability:g} are shares of the batches, "
                "and together more than all; lower one of them",
            ),
            (
                len(averages) > 1,
                f"{' and '.join(averages)} each average the weights; leave one of them above 0"
                + (" (--extra-epochs 0 for one of the others)" if self.extra_epochs else ""),
            ),
            (
                self.hard_loss == "ldam" and self.classifier != "cosine",
                "the margins of --hard-loss ldam are angles; give --classifier cosine",
            ),
            (
                self.dropout_samples > 1 and not self.classifier_dropout,
                "--dropout-samples without dropout repeats one answer; give --classifier-dropout",
            ),
            (
                self.hard_loss == "ldam" and mixed,
                "ldam needs one true class per image, and mixed images have two; give --cutmix 0 and --mixup 0",
            ),
        ]

    def single_label_only(self) -> list[tuple[bool, str]]:
        """(whether it is asked for, its flag) of what needs exactly one label per image."""
        return []

    def refuse_for(self, task: Task | None) -> None:
        """Raises UsageError for what a network of several heads cannot learn by. ``task``: None where it has one."""
        if task is None:
            return
        many = [head.name for head in task.heads if head.kind == "sigmoid"]
        if self.hard_loss == "ldam" and many:
            advice = (
                f"--hard-loss ldam sets a class apart from the others of its head, and the labels of {many[0]!r} do not "
                "exclude each other; give --hard-loss focal, or --class-weights class-balanced"
            )
            raise UsageError(f"{self.role}: {self.in_own_flags(advice)}")
        found = [flag for asked, flag in self.single_label_only() if asked]
        if found:
            heads = ", ".join(head.name for head in task.heads)
            raise UsageError(
                f"{', '.join(found)}: for one label per image, and these images have {heads}; leave that away"
            )

    def only_with(self) -> list[tuple[tuple[str, ...], bool, str]]:
        """(fields, whether they have an effect here, what else they would need)."""
        mixes = self.cutmix_probability + self.mixup_probability > 0
        jitters = self.augment != "standard" or self.color_jitter >= STANDARD_JITTER
        picture = ("crop_min", "crop_max", "horizontal_flip", "any_way_up", "color_jitter")
        return [
            (("fixres_epochs",), self.test_size is not None, "--test-size"),
            (("lr_decay",), self.schedule == "exponential", "--schedule exponential"),
            (
                ("final_lr",),
                self.schedule == "cosine" and not self.swa_start,
                "--schedule cosine, and without --swa-start",
            ),
            (("focal_gamma", "focal_alpha"), self.hard_loss == "focal", "--hard-loss focal"),
            (("class_weight_beta",), self.class_weights == "class-balanced", "--class-weights class-balanced"),
            (("cutmix_alpha",), self.cutmix_probability > 0, "--cutmix above 0"),
            (("mixup_alpha",), self.mixup_probability > 0, "--mixup above 0"),
            (("plain_epochs",), mixes, "--cutmix or --mixup above 0"),
            (
                ("class_weights", "defer_weights"),
                not self.defer_weights or (self.total_epochs - 1) / self.total_epochs >= self.defer_weights,
                f"epochs after that share of all {self.total_epochs}: give more of them, or a smaller --defer-weights",
            ),
            (("extra_lr",), self.extra_epochs > 0, "--extra-epochs above 0"),
            (("swa_lr",), self.swa_start > 0, "--swa-start"),
            (picture, self.augment != "none", "--augment light or standard"),
            (("color_jitter",), jitters, f"a value above {STANDARD_JITTER:g}, which --augment standard has anyway"),
        ]

    def heeds(self) -> set[tuple[str, Any]]:
        """(field, value) of what has an effect here."""
        idle = {name for names, effective, _ in self.only_with() if not effective for name in names}
        return {(each.name, getattr(self, each.name)) for each in fields(self) if each.name not in idle}

    def doubts(self, known: Collection[tuple[str, Any]] = ()) -> list[str]:
        """What is allowed and seldom wanted: one warning each. ``known``: (field, value) of which it need not be said that
        they change nothing here, since another network of the run heeds them or has said so."""
        found = []
        drawn = "balanced sampling" if self.balanced_sampling else "--sample-power or --oversample"
        if self.hard_loss in ("ldam", "soft-f1") and (self.balanced_sampling or self.weighs_draws):
            instead = "; consider --no-balanced" if self.balanced_sampling else ""
            found.append(f"--hard-loss {self.hard_loss} and {drawn} both favour rare classes{instead}")
        if self.test_size is not None and self.test_size <= self.image_size:
            found.append(
                f"--test-size {self.test_size} is not above --image-size {self.image_size}; FixRes gains by looking closer "
                "than in training"
            )
        if self.hard_loss == "soft-f1" and self.batch_size < 32:
            found.append(f"soft-f1 counts within a batch, and batches of {self.batch_size} hold few of each class")
        if self.cutmix_probability + self.mixup_probability > 0 and self.plain_epochs >= self.total_epochs:
            found.append(
                f"--plain-epochs {self.plain_epochs} of {self.total_epochs} epochs leave none that mixes; give fewer, or "
                "--cutmix 0 and --mixup 0"
            )
        set_apart = {each.name: getattr(self, each.name) for each in fields(self)}
        set_apart = {name: value for name, value in set_apart.items() if value != defaults_of(type(self)).get(name)}
        for names, effective, needed in self.only_with():
            idle = [name for name in names if name in set_apart and (name, set_apart[name]) not in known]
            if idle and not effective:
                flags = ", ".join(flag_of(name, set_apart[name]) for name in idle)
                found.append(f"{flags} {'change' if len(idle) > 1 else 'changes'} nothing without {needed}")
        return found

    def mixing(self) -> Mixing:
        return Mixing(self.cutmix_probability, self.cutmix_alpha, self.mixup_probability, self.mixup_alpha)

    @property
    def weighs_draws(self) -> bool:
        """Whether classes have chances of their own in the draw."""
        return self.sample_power > 0 or bool(self.oversample)

    def sampling_weights(self, labels: npt.NDArray[np.int32], class_names: Sequence[str]) -> tuple[float, ...]:
        """Of loader.Draw, where each image has one label. Raises UsageError for a class that the data does not have."""
        try:
            return sampling_weights(labels, class_names, power=self.sample_power, oversample=self.oversample)
        except UsageError as error:
            raise UsageError(self.in_own_flags(str(error))) from error

    def sampling(
        self, dataset: Dataset, rows: npt.NDArray[np.integer[Any]]
    ) -> tuple[npt.NDArray[np.int32], tuple[float, ...]]:
        """(``labels`` int32 [len(rows)], ``weights``) of loader.Draw for rows of the data set. Where images carry several
        labels and have chances of their own, those of equal chance are one class of the draw.

        Raises UsageError for a class that the data does not have.
        """
        if not self.weighs_draws:
            return dataset.sampling_labels[rows], ()
        labels = dataset.labels[rows]
        if dataset.task is None or dataset.values is None:
            return labels, self.sampling_weights(labels, dataset.class_names)
        values, names = dataset.values[rows], dataset.class_names
        try:
            chances = head_sampling_weights(
                dataset.task, values, labels, names, power=self.sample_power, oversample=self.oversample
            )
        except UsageError as error:
            raise UsageError(self.in_own_flags(str(error))) from error
        weights, codes = np.unique(np.round(chances, 12), return_inverse=True)
        return codes.astype(np.int32), tuple(weights.tolist())

    def loss_against(self, labels: npt.NDArray[np.int32], class_count: int) -> HardLoss:
        """The loss against hard labels when training on ``labels``, int32 [N]: margins and weights come from them."""
        counts = np.bincount(labels, minlength=class_count)
        return HardLoss(
            self.hard_loss,
            self.focal_gamma,
            self.focal_alpha,
            ldam_margins(counts) if self.hard_loss == "ldam" else (),
            class_weights(counts, self.class_weights, beta=self.class_weight_beta),
            self.defer_weights,
        )

    def loss_against_heads(self, task: Task, values: Values) -> HardLoss:
        """The same for several heads, ``values``: float32 [N, V]. Each head has margins and weights of its own, one for
        each output; of a sigmoid head they are pos_weights (see losses.label_weights)."""
        margins: list[float] = []
        weights: list[float] = []
        for head, columns in task.columns():
            own = values[:, columns]
            if head.kind == "softmax":
                counts = np.bincount(own[~np.isnan(own)].astype(np.int64), minlength=head.width)
                margins += ldam_margins(counts) if self.hard_loss == "ldam" else ()
                weights += class_weights(counts, self.class_weights, beta=self.class_weight_beta)
                continue
            margins += [0.0] * head.width if self.hard_loss == "ldam" else []
            if head.kind == "sigmoid":
                applies = np.asarray(np.nansum(own, axis=0, dtype=np.float64))
                known = (~np.isnan(own)).sum(axis=0)
                weights += label_weights(applies, known, self.class_weights, beta=self.class_weight_beta)
            else:
                weights += [1.0] * head.width if self.class_weights != "none" else []
        return HardLoss(
            self.hard_loss, self.focal_gamma, self.focal_alpha, tuple(margins), tuple(weights), self.defer_weights
        )

    def augment_settings(self) -> AugmentSettings:
        return AugmentSettings(
            strength=self.augment,
            horizontal_flip=self.horizontal_flip,
            any_way_up=self.any_way_up,
            crop_min=self.crop_min,
            crop_max=self.crop_max,
            color_jitter=self.color_jitter,
            auto_augment=self.auto_augment,
            grayscale=self.grayscale,
            gridmask=self.gridmask,
            cutout=self.cutout,
            coarse_dropout=self.coarse_dropout,
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
            "classifier": self.classifier_settings(),
        }

    def classifier_settings(self) -> ClassifierSettings:
        return ClassifierSettings(**{name: getattr(self, field) for name, field in CLASSIFIER_FIELDS.items()})

    @property
    def main_epochs(self) -> int:
        """The epochs before SWA."""
        return round(self.epochs * self.swa_start) if 0 < self.swa_start < 1 else self.epochs

    @property
    def total_epochs(self) -> int:
        return self.epochs + self.extra_epochs

    @property
    def fine_tunes(self) -> bool:
        """Whether the last layers learn at ``test_size`` after all else (see training.fixres)."""
        return self.test_size is not None and self.fixres_epochs > 0

    @property
    def averages(self) -> bool:
        """Whether the trained weights are an average, for which batch-norm statistics are to be measured anew."""
        return any(getattr(self, name) for name in AVERAGES)

    @property
    def mixes_to_the_end(self) -> bool:
        """Whether the running batch-norm statistics are those of mixed images, which deployment never sees."""
        return self.cutmix_probability + self.mixup_probability > 0 and self.plain_epochs == 0

    def checks(self) -> list[tuple[str, bool, str]]:
        """(field, whether its value is allowed, what is)."""
        return [
            ("name", bool(self.name), "a network, such as mbv3s"),
            ("image_size", 16 <= self.image_size <= 2048, "16 to 2048 pixels"),
            ("test_size", self.test_size is None or 16 <= self.test_size <= 2048, "16 to 2048 pixels, or None"),
            ("fixres_epochs", 0 <= self.fixres_epochs <= 1000, "0 or more"),
            ("resize", self.resize in ("squash", "center-crop"), "'squash' or 'center-crop'"),
            ("epochs", 1 <= self.epochs <= 100_000, "1 or more"),
            ("batch_size", 2 <= self.batch_size <= 65_536, "2 or more (batch normalisation needs two)"),
            ("optimizer", bool(self.optimizer), "an optimizer, such as radam"),
            ("lr", 0 < self.lr < 100, "a number above 0"),
            ("final_lr", 0 <= self.final_lr <= 1, "a share of lr, 0 to 1"),
            ("weight_decay", 0 <= self.weight_decay < 10, "0 or more"),
            ("warmup_epochs", 0 <= self.warmup_epochs < self.main_epochs, "0 to less than epochs"),
            ("schedule", self.schedule in ("cosine", "exponential", "constant"), "cosine, exponential or constant"),
            ("lr_decay", 0 < self.lr_decay <= 1, "a factor per epoch, above 0 to 1"),
            ("grad_clip", self.grad_clip is None or self.grad_clip > 0, "a norm above 0, or None"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "0 to less than 1"),
            ("hard_loss", self.hard_loss in HARD_LOSSES, f"one of {', '.join(HARD_LOSSES)}"),
            ("focal_gamma", 0 <= self.focal_gamma <= 20, "0 to 20"),
            ("focal_alpha", 0 < self.focal_alpha <= 100, "above 0"),
            ("class_weights", self.class_weights in CLASS_WEIGHTS, f"one of {', '.join(CLASS_WEIGHTS)}"),
            ("class_weight_beta", 0 <= self.class_weight_beta < 1, "0 to less than 1"),
            ("defer_weights", 0 <= self.defer_weights < 1, "a share of the epochs, 0 to less than 1"),
            ("sample_power", 0 <= self.sample_power <= 2, "0 to 2"),
            ("cutmix_alpha", 0 < self.cutmix_alpha <= 1000, "a number above 0, at most 1000"),
            ("cutmix_probability", 0 <= self.cutmix_probability <= 1, "0 to 1"),
            ("mixup_alpha", 0 < self.mixup_alpha <= 1000, "a number above 0, at most 1000"),
            ("mixup_probability", 0 <= self.mixup_probability <= 1, "0 to 1"),
            ("plain_epochs", 0 <= self.plain_epochs <= self.total_epochs, "0 to all epochs"),
            ("drop_rate", 0 <= self.drop_rate < 1, "0 to less than 1"),
            ("drop_path_rate", 0 <= self.drop_path_rate < 1, "0 to less than 1"),
            *((CLASSIFIER_FIELDS[name], good, text) for name, good, text in self.classifier_settings().checks()),
            ("extra_epochs", 0 <= self.extra_epochs <= 1000, "0 or more"),
            ("extra_lr", 0 < self.extra_lr <= 1, "a share of lr, above 0 to 1"),
            ("ema_decay", 0 <= self.ema_decay < 1, "0 (none) to less than 1"),
            (
                "swa_start",
                self.swa_start == 0 or 0 < self.main_epochs < self.epochs,
                f"0 (none), or a share of the {self.epochs} epochs that leaves one or more before and after",
            ),
            ("swa_lr", 0 < self.swa_lr <= 1, "a share of lr, above 0 to 1"),
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


def flag_of(name: str, value: Any) -> str:
    """'horizontal_flip', False -> '--no-horizontal-flip', for fields whose flag has their name."""
    return f"--{'no-' if value is False else ''}{name.replace('_', '-')}"


def defaults_of(kind: type[TrainSettings]) -> dict[str, Any]:
    """The defaults of a stage's settings by field, as settings_dict has them."""
    return {
        field.name: list(field.default) if isinstance(field.default, tuple) else field.default
        for field in fields(kind)
        if field.default is not MISSING
    }


def refuse_other_settings(
    path: object, saved: dict[str, Any], current: dict[str, Any], kind: type[TrainSettings]
) -> None:
    """Raises ArtifactError that names the first fields in which the saved work differs from what is asked now.

    Both are identities; ``kind``: the class of the settings that they come from.
    """
    keys = sorted(saved.keys() | current.keys())
    # What older work does not name did not exist yet: it was made with the default, or as it was before.
    before = defaults_of(kind) | BEFORE_THEY_EXISTED
    saved = {key: value for key, value in before.items() if key in current} | saved
    different = [key for key in keys if saved.get(key) != current.get(key)]
    if different:
        shown = ", ".join(f"{key}={saved.get(key)!r} (now {current.get(key)!r})" for key in different[:3])
        raise ArtifactError(
            f"{path}: made with {shown}; resume with the same settings and data, or start anew with another --out"
        )


def refuse_other_wishes(path: object, saved: Mapping[str, Any], settings: TrainSettings) -> None:
    """The same for the settings alone, before it is known what else decides the weights. ``saved``: an identity."""
    current = identity(settings)
    refuse_other_settings(path, {key: saved[key] for key in current if key in saved}, current, type(settings))


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
