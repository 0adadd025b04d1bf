"""Files of tensors: model.pt, which others load, and checkpoint.pt, from which training goes on.

Both hold tensors and plain values only and are read with ``weights_only=True``: no pickle is executed. A model.pt loads
with plain timm in three lines::

    saved = torch.load("model.pt", weights_only=True)
    model = timm.create_model(saved["architecture"], **saved["model_kwargs"])
    model.load_state_dict(saved["state_dict"])

If the network was trained with another pooling or classifier, ``saved["classifier"]`` says which, and one line more is
needed before the last (as is ``import edgedistill.training.networks`` for FcaNet and ShuffleNetV2)::

    equip(model, ClassifierSettings(**saved["classifier"]))  # from edgedistill.training.classifier
"""

from __future__ import annotations

import errno
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import edgedistill
from edgedistill.artifacts import FORMAT_VERSION, atomic_path
from edgedistill.calibration import Calibration
from edgedistill.errors import ArtifactError, EdgedistillError
from edgedistill.images import InputSpec
from edgedistill.tasks import Task
from edgedistill.timm_import import import_timm
from edgedistill.training.classifier import ClassifierSettings, classifier_of, equip
from edgedistill.training.models import MODEL_KWARGS, all_networks, to_channels_last

MODEL_FORMAT = "edgedistill-model"
CHECKPOINT_FORMAT = "edgedistill-checkpoint"
MODEL_KEYS = frozenset(
    {
        "architecture",
        "model_kwargs",
        "state_dict",
        "classes",
        "input_spec",
        "temperature",
        "dataset_hash",
        "settings",
        "versions",
    }
)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A network in eval mode on the CPU, with what is needed to use it."""

    model: nn.Module
    architecture: str
    classes: tuple[str, ...]
    input_spec: InputSpec
    temperature: float
    dataset_hash: str
    settings: dict[str, Any]
    task: Task
    calibration: Calibration | None = None


def save_tensors(path: Path, values: Mapping[str, Any], *, format: str) -> None:
    """Whole or not at all; equal values give equal bytes. Raises ArtifactError on a full disk."""
    # Through a file object: given a name, torch puts that (temporary) name into the file.
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save({"format": format, "version": FORMAT_VERSION} | dict(values), file)
        except RuntimeError as error:  # torch's writer may hide the system's error number
            full = shutil.disk_usage(path.parent).free < 2**20
            raise OSError(errno.ENOSPC if full else errno.EIO, f"{path}: could not be written") from error


def load_tensors(path: Path, *, format: str) -> dict[str, Any]:
    """Raises ArtifactError when the file is missing, damaged, of another format, or holds more than plain values."""
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error})") from error
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"{path}: holds more than tensors and plain values, or is damaged; it was not loaded"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ArtifactError(f"{path}: damaged or not a torch file; make it again") from error
    got = (values.get("format"), values.get("version")) if isinstance(values, dict) else (type(values).__name__, None)
    if got != (format, FORMAT_VERSION):
        raise ArtifactError(
            f"{path}: format {got[0]!r} version {got[1]!r}, expected {format!r} version {FORMAT_VERSION}"
        )
    return dict(values)


def write_model(
    path: Path,
    model: nn.Module,
    *,
    architecture: str,
    model_kwargs: Mapping[str, Any],
    classes: tuple[str, ...],
    input_spec: InputSpec,
    dataset_hash: str,
    settings: Mapping[str, Any],
    temperature: float = 1.0,
    task: Task | None = None,
    calibration: Calibration | None = None,
) -> None:
    """model.pt. ``architecture`` and ``model_kwargs`` are what ``timm.create_model`` takes; how the model was equipped
    (see classifier.equip) is read off it. ``task``: of a network with several heads, whose outputs ``classes`` names. ``calibration``: its
    reliability curves."""
    classifier = classifier_of(model)
    values = {
        "architecture": architecture,
        "model_kwargs": dict(model_kwargs),
        "state_dict": {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()},
        "classes": list(classes),
        "input_spec": input_spec.to_dict(),
        "temperature": float(temperature),
        "dataset_hash": dataset_hash,
        "settings": dict(settings),
        "versions": {
            "edgedistill": edgedistill.__version__,
            "torch": str(torch.__version__),
            "timm": str(import_timm().__version__),
        },
    }
    if not classifier.plain:
        values["classifier"] = classifier.to_dict()
    if task is not None:
        values["task"] = task.to_dict()
    if calibration is not None:
        values["calibration"] = calibration.to_dict()
    save_tensors(path, values, format=MODEL_FORMAT)


def read_model(path: Path) -> LoadedModel:
    """Raises ArtifactError for a file that is not a whole model.pt or whose weights do not fit its architecture."""
    values = load_tensors(path, format=MODEL_FORMAT)
    missing = sorted(MODEL_KEYS - values.keys())
    if missing:
        raise ArtifactError(f"{path}: {', '.join(missing)} missing; write it again with 'edgedistill distill'")
    try:
        model = _build(path, values["architecture"], values["model_kwargs"])
        equip(model, ClassifierSettings.from_dict(values.get("classifier", {}), source=path))
        model.load_state_dict(values["state_dict"])
        classes = tuple(str(name) for name in values["classes"])
        temperature = float(values["temperature"])
        settings = dict(values["settings"])
        task = Task.from_dict(values["task"]) if "task" in values else Task.single(classes)
    except EdgedistillError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArtifactError(f"{path}: its weights and its architecture do not fit ({first})") from error
    if len(classes) != model.num_classes or classes != task.outputs or not temperature > 0:
        heads = "" if task.width == len(classes) else f" and {task.width} outputs in its heads"
        raise ArtifactError(
            f"{path}: {len(classes)} class names{heads} for {model.num_classes} logits, temperature {temperature}; "
            "expected one name each and a temperature above 0"
        )
    return LoadedModel(
        model=to_channels_last(model).eval(),
        architecture=str(values["architecture"]),
        classes=classes,
        input_spec=InputSpec.from_dict(values["input_spec"]),
        temperature=temperature,
        dataset_hash=str(values["dataset_hash"]),
        settings=settings,
        task=task,
        calibration=_calibration(values),
    )


def read_calibration(path: Path) -> Calibration | None:
    """Of a model.pt, without building its network; None where it has none. Raises ArtifactError."""
    return _calibration(load_tensors(path, format=MODEL_FORMAT))


def _calibration(values: Mapping[str, Any]) -> Calibration | None:
    return Calibration.from_dict(values["calibration"]) if "calibration" in values else None


def read_identity(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """(checkpoint.pt of a training's ``folder``, what it was begun with); None where there is none. Raises ArtifactError."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    return path, dict(load_tensors(path, format=CHECKPOINT_FORMAT).get("identity", {}))


def read_settings(path: Path) -> dict[str, Any]:
    """What a model.pt was made with, without building its network. Raises ArtifactError."""
    return dict(load_tensors(path, format=MODEL_FORMAT).get("settings", {}))


def read_input_spec(path: Path) -> InputSpec:
    """Of a model.pt, without building its network. Raises ArtifactError."""
    return InputSpec.from_dict(load_tensors(path, format=MODEL_FORMAT).get("input_spec", {}))


def read_tta(path: Path) -> str:
    """The views by which the teacher of a model.pt answers ('': the whole picture; see training.views), without building
    its network. Raises ArtifactError."""
    return str(read_settings(path).get("tta", ""))


def _build(path: Path, architecture: Any, kwargs: Any) -> Any:
    """timm also takes names and options that download or read other files: a model.pt may not use them."""
    timm = all_networks()
    if not isinstance(architecture, str) or not timm.is_model(architecture) or ":" in architecture:
        raise ArtifactError(f"{path}: architecture {architecture!r} is not one of timm {timm.__version__}")
    unknown = sorted(map(str, set(kwargs) - MODEL_KWARGS))
    if unknown:
        raise ArtifactError(f"{path}: model_kwargs {', '.join(unknown)} not allowed; expected {sorted(MODEL_KWARGS)}")
    return timm.create_model(architecture, **kwargs)
