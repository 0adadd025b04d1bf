"""Live teachers: the fold teachers of a run judge what the student sees, augmented and mixed, and stay out-of-fold.

Function matching (Beyer et al., 2106.05237) asks the teacher about the student's own view of an image. Each image is
judged by the teachers that did not train on it. CutMix takes its partners from the image's own fold, so that one
held-out teacher may judge the mixed image too; the batch itself is drawn as always, from all folds (whole batches from
one fold would give batch normalisation and each gradient fewer unlike images). Images that no teacher trained on (val,
unlabelled) are judged by all of them together. Networks with several heads are averaged head by head: probabilities of
classes and labels, values as they are.

Views are made at the resolution of the largest teacher and reduced for the student: a teacher of 128 px that was shown
the student's 96 px enlarged saw blur that it had never met, and misled (ELPV, CutMix on every batch: a student of 0.678
instead of 0.742).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edgedistill import console
from edgedistill.artifacts import sha256_file
from edgedistill.data.manifest import Dataset
from edgedistill.errors import ArtifactError, EdgedistillError, UsageError
from edgedistill.images import InputSpec
from edgedistill.tasks import Task
from edgedistill.training.answers import scores_of_shares, shares_of, tempered
from edgedistill.training.checkpoints import read_model
from edgedistill.training.losses import to_device
from edgedistill.training.models import to_channels_last
from edgedistill.training.predict import at_size, network_input
from edgedistill.training.seeds import generator
from edgedistill.training.soft_labels import blend_of, ids_hash, read_folds, read_teachers
from edgedistill.training.views import WHOLE, View, views_of

ENGINE_TOLERANCE = 1e-3  # of a logit, between torch and the engine that stands in for it on a CPU
TRIAL_IMAGES = 4


class Network(Protocol):
    """float32 [B, 3, H, W], normalised, -> float32 logits [B, C] ([B, D] of several heads) on the same device."""

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class Teacher:
    """A network that never saw the images of ``fold``, and the pixels that it expects.

    ``temperature``: its own, under which it is calibrated. ``weight``: its share among the architectures of a fold.
    ``views``: of a photograph, whose mean is its answer; a view that the student is shown is judged as it is.
    """

    fold: int
    network: Network
    spec: InputSpec
    temperature: float = 1.0
    weight: float = 1.0
    views: tuple[View, ...] = (WHOLE,)


@dataclass(frozen=True)
class TeacherFile:
    """A teacher's model.pt and the fold that it holds out. ``weight``: as the soft labels of that fold weigh it."""

    fold: int
    path: Path
    sha256: str
    weight: float = 1.0


def find_teachers(soft_labels: Path, dataset: Dataset) -> list[TeacherFile]:
    """The model.pt files of the teachers that wrote ``soft_labels``, found by their hashes in teacher/ beside it.

    Raises ArtifactError when one is not there, or was not trained on exactly the training images of the other
    folds, UsageError for architectures that do not vote by averaging.
    """
    meta, ids, folds = soft_labels / "meta.json", dataset.ids, read_folds(soft_labels, dataset)
    train = dataset.splits == "train"
    root = soft_labels.parent / "teacher"
    blend = blend_of(soft_labels)
    if blend is not None and (blend["settings"]["vote"] != "soft" or blend["settings"]["override"]):
        raise UsageError(
            f"{meta}: live teachers average what several architectures say; train them with --teacher-vote soft and "
            "without --teacher-override"
        )
    by_hash = {sha256_file(path): path for path in sorted(root.rglob("model.pt"))}
    found = []
    for teacher in read_teachers(soft_labels):
        fold, digest = int(teacher["fold"]), str(teacher["sha256"])
        if digest not in by_hash:
            raise ArtifactError(
                f"{meta}: the teacher of fold {fold} ({digest[:12]}...) does not lie in {root}; give the --soft-labels "
                "of a run whose teachers are still there, or train them again with 'edgedistill teach'"
            )
        if teacher["trained_on"] != ids_hash(ids[train & (folds != fold)]):
            raise ArtifactError(
                f"{meta}: the teacher of fold {fold} did not train on exactly the other folds; train it again"
            )
        found.append(TeacherFile(fold, by_hash[digest], digest, _weight(blend, teacher)))
    missing = sorted(set(folds[dataset.held_out_rows].tolist()) - {teacher.fold for teacher in found})
    if missing:
        raise ArtifactError(f"{meta}: no teacher held out fold {missing[0]}; train it with 'edgedistill teach'")
    return found


def _weight(blend: Mapping[str, Any] | None, teacher: Mapping[str, Any]) -> float:
    """Cross-fitted: what the labels of the teacher's own fold do not know."""
    if blend is None:
        return 1.0
    return float(blend["fold_weights"][int(teacher["fold"])][blend["teachers"].index(teacher["label"])])


def open_teachers(
    files: Sequence[TeacherFile],
    dataset: Dataset,
    *,
    device: torch.device,
    half: bool,
    temperatures: Mapping[str, float] | None = None,
) -> list[Teacher]:
    """Networks ready to judge: on a GPU torch, in bfloat16 if ``half``; on a CPU OpenVINO in f32.

    ``temperatures``: of each teacher by the sha256 of its file; None: 1 for all.

    Measured for EfficientNet-Lite0 at 96 px on two busy cores: batch 32 at 250 images/s by OpenVINO against 34 by
    torch; the same images in five parts of 5 to 8 at 200 against 32. Raises ArtifactError for a teacher of other
    classes or another data set.
    """
    teachers = []
    with console.progress("opening teachers", len(files)) as bar:
        for file in files:
            loaded = read_model(file.path)
            if loaded.classes != dataset.outputs or loaded.dataset_hash != dataset.hash:
                raise ArtifactError(f"{file.path}: trained on other classes or another data set than this run's")
            network = open_network(loaded.model, loaded.input_spec, device=device, half=half, name=str(file.path))
            temperature = 1.0 if temperatures is None else temperatures[file.sha256]
            views = views_of(str(loaded.settings.get("tta", "")))
            teachers.append(Teacher(file.fold, network, loaded.input_spec, temperature, file.weight, views))
            bar.update(bar.task_ids[0], advance=1)
    return teachers


def open_network(model: nn.Module, spec: InputSpec, *, device: torch.device, half: bool, name: str) -> Network:
    """The fastest form of ``model`` on ``device`` that says what torch says."""
    model = to_channels_last(model, device).eval()
    if device.type != "cpu":
        return _TorchNetwork(model, half=half)
    trial = torch.from_numpy(generator(0, "trial").normal(size=(TRIAL_IMAGES, 3, spec.height, spec.width)))
    inputs = trial.float().contiguous(memory_format=torch.channels_last)
    plain = _TorchNetwork(model, half=False)
    try:
        compiled = _OpenVinoNetwork(model, spec)
        difference = float((compiled(inputs) - plain(inputs)).abs().max())
    except (RuntimeError, TypeError, ValueError) as error:  # what conversion raises for a network that it does not know
        console.warn(
            f"{name}: torch judges, which is slower: OpenVINO cannot convert it ({str(error).splitlines()[0]})"
        )
        return plain
    if not difference <= ENGINE_TOLERANCE:
        console.warn(
            f"{name}: torch judges, which is slower: OpenVINO's logits differ from torch's by {difference:.2g}"
        )
        return plain
    return compiled


class _TorchNetwork:
    def __init__(self, model: nn.Module, *, half: bool) -> None:
        self._model, self._half = model, half

    @torch.no_grad()  # inference mode's tensors could not be saved for the student's backward pass
    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self._half):
            return self._model(inputs).float()


class _OpenVinoNetwork:
    """The batch is dynamic: a fold's part of a batch differs in size from step to step."""

    def __init__(self, model: nn.Module, spec: InputSpec) -> None:
        import openvino

        example = torch.zeros(2, 3, spec.height, spec.width)
        converted = openvino.convert_model(model, example_input=example, input=[[-1, 3, spec.height, spec.width]])
        hints = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self._request = openvino.Core().compile_model(converted, "CPU", hints).create_infer_request()

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        answer: Any = self._request.infer([np.ascontiguousarray(inputs.numpy())])[0]
        return torch.from_numpy(np.array(answer, np.float32))


@dataclass(frozen=True, eq=False)
class LiveTeachers:
    """``folds``: int16 [N], for each row of the store the fold that held it out; -1: nobody trained on it.

    ``temperature``: of the probabilities that are returned. ``task``: where the networks have several heads.
    """

    teachers: Sequence[Teacher]
    folds: npt.NDArray[np.int16]
    temperature: float
    task: Task | None = None

    def __call__(self, images: torch.Tensor, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """float32 [B, C] probabilities (of several heads their shares, [B, D]: see training.answers) for [B, H, W, 3] RGB
        images 0-255 on the device, uint8 or float.

        ``rows``: int64 [B], of the store: which image each one shows (its partner lies in the same fold).
        """
        parts, order = [], []
        for fold in np.unique(self.folds[rows]):
            members = np.flatnonzero(self.folds[rows] == fold)
            parts.append(self._judged(images[to_device(members, images.device)], int(fold)))
            order.append(members)
        return torch.cat(parts)[to_device(np.argsort(np.concatenate(order)), images.device)]

    def _judged(self, images: torch.Tensor, fold: int) -> torch.Tensor:
        judges = [teacher for teacher in self.teachers if fold in (-1, teacher.fold) and teacher.weight > 0]
        if not judges:
            raise EdgedistillError(f"live teachers: nobody held out fold {fold}")
        scores = [
            tempered(self.task, judge.network(teacher_view(images, judge.spec)), judge.temperature) for judge in judges
        ]
        if len(scores) > 1:  # the ensemble is a mean of probabilities, as in the evaluation
            weights = [judge.weight / sum(judge.weight for judge in judges) for judge in judges]
            parts = [weight * shares_of(self.task, each) for weight, each in zip(weights, scores, strict=True)]
            scores = [scores_of_shares(self.task, torch.stack(parts).sum(dim=0))]
        return shares_of(self.task, scores[0], self.temperature)


def teacher_view(images: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    """The student's view as a teacher expects it: float32 [B, 3, H, W], resized as deployed, and normalised."""
    return network_input(at_size(images, spec), spec)
