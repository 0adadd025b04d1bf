"""Fold batch-norm into the layer before it, and branches into one convolution, with a proof on real images.

What may be folded is read from the data flow of one forward pass, never from the order of names: a norm is folded only
when it is the one reader of one convolution's (or linear layer's) output. A norm with an activation inside (timm's
BatchNormAct2d) loses its norm and keeps its activation.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from edgedistill.errors import ModelError

RELATIVE_LIMIT = 1e-3
REPARAMETERIZERS = ("fuse", "reparameterize", "switch_to_deploy")
_PLAIN_NORMS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "FrozenBatchNorm2d")
_NORMS_WITH_ACTIVATION = ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")


@dataclass(frozen=True)
class FusionReport:
    """What was folded, what was left and why, and the proof.

    ``max_logit_difference`` is the largest absolute difference before and after, ``relative_difference`` the same over
    the largest absolute logit before. ``image_kind`` is 'real' or 'random'.
    """

    folded: int
    reparameterized: int
    kept: tuple[tuple[str, str], ...]
    max_logit_difference: float
    relative_difference: float
    image_count: int
    image_kind: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "folded": self.folded,
            "reparameterized": self.reparameterized,
            "kept": [{"layer": name, "reason": reason} for name, reason in self.kept],
            "max_logit_difference": self.max_logit_difference,
            "relative_difference": self.relative_difference,
            "images": self.image_count,
            "image_kind": self.image_kind,
        }


def fuse(model: nn.Module, images: npt.NDArray[np.float32], *, image_kind: str) -> tuple[nn.Module, FusionReport]:
    """A folded copy of ``model`` (in eval mode, float32) and its report; ``model`` itself is left as it is.

    ``images``: float32 [N, 3, H, W], normalised; the proof runs on all of them. Raises ModelError when the logits move
    by more than 1e-3 of the largest logit.
    """
    inputs = torch.from_numpy(images)
    before = _logits(model, inputs)
    fused, reparameterized, kept = _reparameterize(model, inputs, before)
    folds, not_folded = plan_folds(fused, inputs[:1])
    modules = dict(fused.named_modules())
    for producer, norm in folds:
        fold_norm(modules[producer], modules[norm])
        _replace(fused, modules[norm], _without_norm(modules[norm]))
    difference, relative = _difference(before, _logits(fused, inputs))
    if not relative <= RELATIVE_LIMIT:
        raise ModelError(
            f"fusion moved the logits by {relative:.2g} of the largest logit (limit {RELATIVE_LIMIT:g}; {len(folds)} norms"
            " folded); the batch-norm statistics are probably broken (a variance near 0): re-estimate them and try again"
        )
    report = FusionReport(
        folded=len(folds),
        reparameterized=reparameterized,
        kept=tuple(kept + not_folded),
        max_logit_difference=difference,
        relative_difference=relative,
        image_count=len(images),
        image_kind=image_kind,
    )
    return fused, report


def _logits(model: nn.Module, inputs: torch.Tensor) -> npt.NDArray[np.float64]:
    with torch.no_grad():
        return np.concatenate([model(batch).double().numpy() for batch in inputs.split(16)])


def _difference(before: npt.NDArray[np.float64], after: npt.NDArray[np.float64]) -> tuple[float, float]:
    difference = float(np.max(np.abs(before - after))) if before.shape == after.shape else float("inf")
    return difference, difference / max(float(np.max(np.abs(before))), 1e-30)


def _reparameterize(
    model: nn.Module, inputs: torch.Tensor, before: npt.NDArray[np.float64]
) -> tuple[nn.Module, int, list[tuple[str, str]]]:
    """timm's own re-parameterisation (RepVGG, MobileOne, FastViT, RepViT, ...) on a copy, kept only where it is exact."""
    names = [name for name, part in model.named_modules() if name and any(hasattr(part, m) for m in REPARAMETERIZERS)]
    if not names:
        return copy.deepcopy(model), 0, []
    from timm.utils.model import reparameterize_model

    try:
        candidate = reparameterize_model(model).eval()
        _, relative = _difference(before, _logits(candidate, inputs))
    except Exception as error:  # the model's own code runs here, and may fail in any way
        return copy.deepcopy(model), 0, [(names[0], f"re-parameterisation failed: {error}")]
    if not relative <= RELATIVE_LIMIT:
        return copy.deepcopy(model), 0, [(names[0], f"re-parameterisation moved the logits by {relative:.2g}")]
    return candidate, len(names), []


class _Flow(TorchDispatchMode):
    """Every tensor operation of one forward pass: who reads the outputs that are watched, and how often a weight is used.

    Tensors are told apart by identity; each one whose identity is kept is kept alive, so no identity is used twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.readers: dict[int, list[str]] = {}
        self.weight_uses: Counter[int] = Counter()
        self.weight_of_output: dict[int, int] = {}
        self.current_norm: tuple[str, int] | None = None
        self._alive: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_iter((args, kwargs or {})):
            if isinstance(value, nn.Parameter):
                self.weight_uses[id(value)] += 1
            elif isinstance(value, torch.Tensor) and id(value) in self.readers:
                inside = self.current_norm is not None and self.current_norm[1] == id(value)
                reader = self.current_norm[0] if inside and self.current_norm is not None else f"operation {func}"
                self.readers[id(value)].append(reader)
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default and not args[6]:  # args[6]: transposed
            self.weight_of_output[id(result)] = id(args[1])
            self._alive.append(result)
        return result

    def watch(self, tensor: torch.Tensor) -> None:
        self.readers[id(tensor)] = []
        self._alive.append(tensor)

    def enter_norm(self, name: str, tensor: torch.Tensor) -> None:
        self.current_norm = (name, id(tensor))
        self._alive.append(tensor)


@dataclass
class _Trace:
    """What the hooks saw: the output of each producer and the input of each norm, by module name."""

    flow: _Flow
    outputs: dict[str, int]
    inputs: dict[str, int]
    calls: Counter[str]


def plan_folds(model: nn.Module, example: torch.Tensor) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Pairs (layer, norm) that may be folded, and (norm, reason) for every norm that may not.

    ``example``: float32 [1, 3, H, W]. The model is not changed (the pass runs on a copy).
    """
    traced = copy.deepcopy(model)
    trace, result = _trace(traced, example)
    for value in tree_iter(result):
        if isinstance(value, torch.Tensor) and id(value) in trace.flow.readers:
            trace.flow.readers[id(value)].append("the model's output")
    modules = dict(traced.named_modules())
    owners = Counter(id(parameter) for _, parameter in traced.named_parameters(remove_duplicate=False))
    producer_of = {tensor: name for name, tensor in trace.outputs.items()}
    folds, kept = [], []
    for name in (name for name, module in modules.items() if _is_norm(module)):
        reason = _norm_fault(modules[name], trace.calls[name])
        producer = producer_of.get(trace.inputs.get(name, 0), "")
        if reason is None and not producer:
            reason = "does not follow a convolution or linear layer"
        if reason is None:
            reason = _producer_fault(modules[producer], producer, name, trace, owners)
        if reason is None:
            folds.append((producer, name))
        else:
            kept.append((name, reason))
    return folds, kept


def _trace(model: nn.Module, example: torch.Tensor) -> tuple[_Trace, Any]:
    trace = _Trace(_Flow(), {}, {}, Counter())

    def after_producer(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            trace.calls[name] += 1
            if isinstance(output, torch.Tensor):
                trace.outputs[name] = id(output)
                trace.flow.watch(output)

        return hook

    def before_norm(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            trace.calls[name] += 1
            if args and isinstance(args[0], torch.Tensor):
                trace.inputs[name] = id(args[0])
                trace.flow.enter_norm(name, args[0])

        return hook

    def after_norm(module: nn.Module, args: Any, output: Any) -> None:
        trace.flow.current_norm = None

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
            module.register_forward_hook(after_producer(name))
        elif _is_norm(module):
            module.register_forward_pre_hook(before_norm(name))
            module.register_forward_hook(after_norm)
    with torch.no_grad(), warnings.catch_warnings(), trace.flow:
        warnings.simplefilter("ignore")
        return trace, model(example)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or type(module).__name__ in _PLAIN_NORMS + _NORMS_WITH_ACTIVATION


def _norm_fault(norm: nn.Module, calls: int) -> str | None:
    kind = type(norm).__name__
    if kind not in _PLAIN_NORMS + _NORMS_WITH_ACTIVATION:
        return f"{kind} is not a norm known here"
    if norm.training and isinstance(norm, _BatchNorm):
        return "is in training mode"
    if norm.running_mean is None or norm.running_var is None:
        return "uses the statistics of each batch"
    if calls != 1:
        return "is not used" if calls == 0 else f"is used {calls} times"
    return None


def _producer_fault(module: nn.Module, name: str, norm: str, trace: _Trace, owners: Counter[int]) -> str | None:
    output, weight = trace.outputs[name], module.weight
    readers = set(trace.flow.readers[output])
    if readers != {norm}:
        others = sorted(readers - {norm})
        return f"the output of {name} is read elsewhere too ({', '.join(others)})"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return f"{name} computes its weights"
    plain_linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    if not plain_linear and trace.flow.weight_of_output.get(output) != id(weight):
        return f"{name} ({type(module).__name__}) is no plain convolution or linear layer"
    if trace.calls[name] != 1 or trace.flow.weight_uses[id(weight)] != 1 or owners[id(weight)] != 1:
        return f"{name} shares its weights"
    return None


def fold_norm(layer: Any, norm: Any) -> None:
    """``norm(layer(x)) == layer'(x)``, computed in float64: w' = w * s, b' = (b - mean) * s + beta, s = gamma / sqrt(var + eps)."""
    weight = layer.weight.detach().double()
    bias = torch.zeros(len(weight), dtype=torch.float64) if layer.bias is None else layer.bias.detach().double()
    scale = 1.0 / torch.sqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = 0.0 if norm.bias is None else norm.bias.detach().double()
    folded_bias = (bias - norm.running_mean.double()) * scale + shift
    folded_weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    layer.weight = nn.Parameter(folded_weight.to(layer.weight.dtype), requires_grad=False)
    layer.bias = nn.Parameter(folded_bias.to(layer.weight.dtype), requires_grad=False)


def _without_norm(norm: Any) -> nn.Module:
    """What remains of a norm once it is folded: its drop layer and activation, where it has them."""
    if type(norm).__name__ not in _NORMS_WITH_ACTIVATION:
        return nn.Identity()
    parts = [part for part in (norm.drop, norm.act) if not isinstance(part, nn.Identity)]
    remaining: nn.Module = nn.Sequential(*parts) if len(parts) > 1 else (parts[0] if parts else nn.Identity())
    return remaining.train(norm.training)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new
