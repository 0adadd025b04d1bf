"""What stands behind the body of any timm network: pooling, extra layer, dropout and the classifier itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from edgedistill.errors import ArtifactError, ModelError
from edgedistill.timm_import import import_timm
from edgedistill.training.losses import LDAM_SCALE

PoolName = Literal["avg", "gem"]
ClassifierName = Literal["linear", "cosine"]
GEM_EXPONENT = 3.0
ATTRIBUTE = "edgedistill_classifier"  # where an equipped network keeps how it was equipped


@dataclass(frozen=True)
class ClassifierSettings:
    """``pool``: the network's average, or 'gem', (mean x^p)^(1/p) with a learned p that starts at 3 (Radenovic et al.,
    1711.02512). ``hidden_units``: of an extra fully connected layer with ReLU; 0: none. ``dropout``: before the
    classifier, behind the extra layer. ``dropout_samples``: masks per image whose logits are averaged (after Inoue,
    1905.09788, who averages their losses). ``classifier``: 'linear', or 'cosine', 30 cos(features, class), for LDAM.
    """

    pool: PoolName = "avg"
    hidden_units: int = 0
    dropout: float = 0.0
    dropout_samples: int = 1
    classifier: ClassifierName = "linear"

    @property
    def plain(self) -> bool:
        """Whether the network stays timm's own."""
        return self == ClassifierSettings()

    def checks(self) -> list[tuple[str, bool, str]]:
        """(field, whether its value is allowed, what is)."""
        return [
            ("pool", self.pool in ("avg", "gem"), "avg or gem"),
            ("hidden_units", isinstance(self.hidden_units, int) and 0 <= self.hidden_units <= 65_536, "0 or more"),
            ("dropout", isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1, "0 to less than 1"),
            ("dropout_samples", isinstance(self.dropout_samples, int) and 1 <= self.dropout_samples <= 64, "1 to 64"),
            ("classifier", self.classifier in ("linear", "cosine"), "linear or cosine"),
        ]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: object) -> ClassifierSettings:
        """Raises ArtifactError that names ``source`` for unknown fields and values that are not allowed."""
        unknown = sorted(map(str, set(values) - {field.name for field in fields(cls)}))
        if unknown:
            raise ArtifactError(
                f"{source}: classifier with unknown {', '.join(unknown)}; it comes from a newer version"
            )
        settings = cls(**values)
        for name, good, expected in settings.checks():
            if not good:
                raise ArtifactError(f"{source}: classifier {name}={getattr(settings, name)!r}, expected {expected}")
        return settings


class GeM(nn.Module):
    """Generalised mean over the positions of [N, C, H, W], or of [N, H, W, C] with ``channels_last``."""

    def __init__(self, *, flatten: bool, channels_last: bool = False) -> None:
        super().__init__()
        self.exponent = nn.Parameter(torch.full((1,), GEM_EXPONENT))
        self.flatten, self.axes = flatten, (1, 2) if channels_last else (2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.clamp(min=1e-6).pow(self.exponent).mean(dim=self.axes, keepdim=not self.flatten)
        return mean.pow(1.0 / self.exponent)


class CosineClassifier(nn.Linear):
    """float32 [N, F] -> LDAM_SCALE * cos(features, class), [N, C]; no bias."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__(features, classes, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return LDAM_SCALE * F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))


class Classifier(nn.Module):
    """Features [N, F] -> logits [N, C]: extra layer, dropout, classifier. In eval mode nothing is dropped."""

    def __init__(self, features: int, classes: int, settings: ClassifierSettings) -> None:
        super().__init__()
        width = settings.hidden_units or features
        self.hidden = nn.Linear(features, width) if settings.hidden_units else None
        self.final = CosineClassifier(width, classes) if settings.classifier == "cosine" else nn.Linear(width, classes)
        if settings.classifier == "linear":
            nn.init.normal_(self.final.weight, std=0.01)
            nn.init.zeros_(self.final.bias)
        self.dropout, self.samples = settings.dropout, settings.dropout_samples

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.hidden is not None:
            x = F.relu(self.hidden(x))
        if not self.training or not self.dropout:
            return self.final(x)
        return torch.stack([self.final(F.dropout(x, self.dropout)) for _ in range(self.samples)]).mean(dim=0)


def equip(model: nn.Module, settings: ClassifierSettings) -> nn.Module:
    """Give ``model`` the pooling and classifier of ``settings``, in place, drawing new weights; returns it.

    The network then carries ``settings``, and write_model puts them into model.pt. Raises ModelError for a network
    whose pooling or classifier cannot be replaced.
    """
    if settings.plain:
        return model
    if settings.pool == "gem":
        _pool_by_gem(model)
    if settings != ClassifierSettings(pool=settings.pool):
        _replace_classifier(model, settings)
    setattr(model, ATTRIBUTE, settings)
    return model


def classifier_of(model: nn.Module) -> ClassifierSettings:
    """How ``model`` was equipped."""
    found: ClassifierSettings = getattr(model, ATTRIBUTE, ClassifierSettings())
    return found


def _pool_by_gem(model: nn.Module) -> None:
    import_timm()
    from timm.layers import SelectAdaptivePool2d
    from timm.layers.adaptive_avgmax_pool import FastAdaptiveAvgPool

    pools = [module for module in model.modules() if isinstance(module, SelectAdaptivePool2d)]
    if len(pools) == 1 and isinstance(pools[0].pool, FastAdaptiveAvgPool):
        fast = pools[0].pool
        pools[0].pool = GeM(flatten=fast.flatten, channels_last=tuple(fast.dim) == (1, 2))
    elif len(pools) == 1 and isinstance(pools[0].pool, nn.AdaptiveAvgPool2d):
        pools[0].pool = GeM(flatten=False)
    else:
        raise ModelError(f"{type(model).__name__} has no global average pooling that GeM could replace; use --pool avg")


def _replace_classifier(model: nn.Module, settings: ClassifierSettings) -> None:
    network: Any = model
    old = network.get_classifier()
    names = [name for name, module in model.named_modules() if module is old]
    if not isinstance(old, nn.Linear) or len(names) != 1:
        raise ModelError(
            f"{type(model).__name__} ends in {type(old).__name__}, not in one linear layer; "
            "leave hidden units, classifier dropout and the cosine classifier away"
        )
    parent, _, name = names[0].rpartition(".")
    setattr(model.get_submodule(parent), name, Classifier(old.in_features, old.out_features, settings))
