"""The measurements that the search asks for, behind one seam: ``Bench`` is the real one, tests bring simulated ones."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from edgedistill.benchmarks.machine import memory_gib, package_versions
from edgedistill.benchmarks.score import Objective
from edgedistill.benchmarks.target import OWN
from edgedistill.benchmarks.timing import CandidateError, Slice, Worker, WorkerCase
from edgedistill.benchmarks.tuner.space import Deployment, Host, Student, Variant, default_serving
from edgedistill.benchmarks.tuner.truth import Answers, predicted_answers, predicted_logits
from edgedistill.benchmarks.tuner.valset import ValSet
from edgedistill.errors import ArtifactError, ModelError
from edgedistill.images import DecodeMode, EncodedImage, image_size, read_bytes
from edgedistill.runtime import Engine, Prediction
from edgedistill.runtime.bundle import (
    Bundle,
    DeployConfig,
    LatencySettings,
    ScoreSettings,
    Stage,
    ThroughputSettings,
    int8_path,
    write_deploy,
)

Mode = Literal["throughput", "latency"]
# What a case is fed is held in memory, shared by the cases of a heat as far as it is the same: at most so many images,
# and so large a part of the machine's memory. A board with a gigabyte has to bear it; on a larger machine seven
# photographs of 5 MB would be too few to tell what a cascade passes on.
IMAGES = 256
IMAGE_BYTES = (32 << 20, 256 << 20)
MEMORY_PART = 1 / 64
FRAMES = 32
HEADERS = 64
# Cases that one process keeps ready, so that a heat need not compile again what an earlier one had.
HELD = 20


@dataclass(frozen=True)
class Case:
    """One thing to time. ``rows``: val images in the order in which they are fed; a stretch of it passes on the same share
    as the whole, as far as so few images can: of 8, a share below 1/16 is none.

    ``threads``: of the latency mode; None: the runtime's choice.
    """

    deployment: Deployment
    temperatures: tuple[float, ...]
    rows: tuple[int, ...]
    scope: str
    mode: Mode = "throughput"
    threads: int | None = None

    @property
    def label(self) -> str:
        return f"{self.deployment.key} | {self.mode} {self.scope}" + (f" {self.threads}t" if self.threads else "")


class TimedRunner(Protocol):
    """``settings``: what really ran, read back."""

    @property
    def settings(self) -> dict[str, Any]: ...
    def run(self, seconds: float) -> Slice: ...


class Bench(Protocol):
    """What the search needs to know about the world. ``start_s`` and ``prepare_s``: first guesses of what a process and
    a case cost before anything is measured."""

    start_s: float
    prepare_s: float

    @property
    def held(self) -> Set[str]:
        """Labels of the cases that are ready."""
        ...

    def clock(self) -> float: ...
    def logits(self, variant: Variant, decode: DecodeMode) -> npt.NDArray[np.float32]: ...
    def prepared(self, cases: Sequence[Case]) -> Any: ...
    def answers(self, case: Case) -> tuple[Answers, npt.NDArray[np.int64]]: ...
    def shared_decoding(self, fast: Variant, slow: Variant, decode: DecodeMode) -> float: ...
    def decoding_differs(self, variant: Variant) -> bool: ...


def still_held(held: Set[str], wanted: Set[str], *, most: int = HELD) -> set[str]:
    """The prepared cases that stay when others join them: all, or none where that would be too many for one process."""
    return set(held) if len(held | wanted) <= most else set()


def deploy_config(case: Case, students: dict[str, Student], objective: Objective, host: Host) -> DeployConfig:
    """The deploy.json of a case; stage paths are ``stages/STUDENT/model.xml``."""
    deployment, stages = case.deployment, []
    for number, variant in enumerate(deployment.stages):
        student = students[variant.student]
        last = number == len(deployment.stages) - 1
        stages.append(
            Stage(
                model=f"stages/{student.name}/model.xml",
                sha256=student.sha256,
                input_spec=student.spec.resized(*variant.size),
                temperature=case.temperatures[number],
                exit_threshold=None if last else deployment.exit_threshold,
                int8_sha256=student.int8_sha256,
            )
        )
    serving = deployment.serving
    first, second = deployment.stages[0].precision, deployment.stages[-1].precision
    later = None if second == first else second
    return DeployConfig(
        stages=tuple(stages),
        latency=LatencySettings(first, case.threads, later),
        throughput=ThroughputSettings(
            first, serving.streams, serving.threads, serving.batch, serving.pinning, later_precision=later
        ),
        decode=deployment.decode,
        score=ScoreSettings(objective.w, objective.metric, objective.scope, objective.fps_target),
        cpu=host.cpu,
        cores=host.cores,
        versions=package_versions(),
    )


def held_bytes(memory_gib: float | None) -> int:
    """The most that the images of one case may take."""
    least, most = IMAGE_BYTES
    return least if memory_gib is None else int(min(max(MEMORY_PART * memory_gib * 2**30, least), most))


def _decoded_bytes(path: Path) -> int:
    data, name = read_bytes(path)
    height, width, _ = image_size(data, name=name)
    return 3 * height * width


def copy_student(student: Student, folder: Path) -> None:
    """model.xml and .bin, and their INT8 forms, as links where the file system has them. ``folder``: it is made.

    Raises ArtifactError when they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        source = student.root / student.model
        for path in (source, int8_path(source)):
            if path.is_file() and (path == source or student.int8_sha256 is not None):
                for suffix, target in ((".xml", "model"), (".bin", "model")):
                    name = target + ("-int8" if path != source else "") + suffix
                    _link(path.with_suffix(suffix), folder / name)
    except OSError as error:
        raise ArtifactError(
            f"{folder}: cannot be written ({error.strerror}); free some space or name another --out"
        ) from error


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


class RealBench:
    """Measures on this machine. ``scratch``: a folder of its own, deleted by the caller. To be closed."""

    start_s, prepare_s = 2.0, 1.5

    def __init__(
        self, students: Sequence[Student], val: ValSet, objective: Objective, host: Host, *, scratch: Path
    ) -> None:
        self._students = {student.name: student for student in students}
        self._val, self._objective, self._host, self._scratch = val, objective, host, scratch
        self._written = 0
        self._worker: Worker | None = None
        self._ready: dict[str, WorkerCase] = {}
        for student in students:
            copy_student(student, scratch / "stages" / student.name)
        self._reduction = cache(self._reductions)

    def clock(self) -> float:
        return time.perf_counter()

    def logits(self, variant: Variant, decode: DecodeMode) -> npt.NDArray[np.float32]:
        """float32 [N, D]: what the whole runtime answers at temperature 1, from files (see ``predicted_logits``).

        Raises ModelError for a network that cannot run at that size or precision, and for an image that cannot be read.
        """
        deployment = Deployment((variant,), default_serving(self._host), decode)
        predictions = self._predictions(Case(deployment, (1.0,), (), "files"))
        return predicted_logits(self._val.truth.task, predictions)

    def answers(self, case: Case) -> tuple[Answers, npt.NDArray[np.int64]]:
        """(answers int64 [N, A], stage int64 [N]) of the deployable as it is written, over all val images."""
        predictions = self._predictions(case)
        return predicted_answers(self._val.truth.task, predictions), np.array([p.stage for p in predictions])

    def _predictions(self, case: Case) -> list[Prediction]:
        bundle = Bundle.load(self._write(case))
        with Engine(bundle, cache_dir=False) as engine:
            predictions = list(engine.map(self._val.paths))
        for prediction in predictions:
            if prediction.error is not None:
                raise ModelError(f"{prediction.error}; the tuner needs every val image")
        return predictions

    def _write(self, case: Case) -> Path:
        self._written += 1
        path = self._scratch / f"deploy-{self._written}.json"
        write_deploy(path, deploy_config(case, self._students, self._objective, self._host))
        return path

    def close(self) -> None:
        """Ends the process that measures."""
        worker, self._worker, self._ready = self._worker, None, {}
        if worker is not None:
            worker.close()

    def __enter__(self) -> RealBench:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def held(self) -> Set[str]:
        return self._ready.keys()

    @contextmanager
    def prepared(self, cases: Sequence[Case]) -> Iterator[list[WorkerCase | CandidateError]]:
        """Every case compiled and warmed up in one process, which sleeps between its turns; or why one cannot run.

        The process serves later heats too, with what it has compiled, until it holds too much or something fails in it.
        """
        if not still_held(self.held, {case.label for case in cases}):
            self.close()
        worker = self._worker = self._worker or Worker([sys.executable, "-m", "edgedistill.benchmarks.tuner.worker"])
        try:
            runners = [self._ready.get(case.label) or self._prepare(worker, case) for case in cases]
            self._ready |= {runner.key: runner for runner in runners if isinstance(runner, WorkerCase)}
            yield runners
        except BaseException:
            self.close()
            raise
        if worker.failed or any(isinstance(runner, CandidateError) for runner in runners):
            self.close()

    def _prepare(self, worker: Worker, case: Case) -> WorkerCase | CandidateError:
        first = case.deployment.stages[0]
        request = {
            "candidate": OWN,
            "deployable": os.fspath(self._write(case)),
            "precision": None,
            "cache_dir": False,  # a hundred compiled networks would fill the user's cache
            "mode": case.mode,
            "scope": case.scope,
            "images": [os.fspath(path.resolve()) for path in self._fed(case)],
            "input_spec": self._students[first.student].spec.resized(*first.size).to_dict(),
        }
        try:
            return WorkerCase.prepare(worker, case.label, request)
        except CandidateError as error:
            return error

    def _fed(self, case: Case) -> list[Path]:
        """The first of the case's rows that fit into memory, decoded where that is what is held."""
        paths: list[Path] = []
        size, most = 0, held_bytes(memory_gib())
        for row in case.rows[: FRAMES if case.scope == "frames" else IMAGES]:
            path = self._val.paths[row]
            size += _decoded_bytes(path) if case.scope == "frames" else path.stat().st_size
            if paths and size > most:
                break
            paths.append(path)
        return paths

    def shared_decoding(self, fast: Variant, slow: Variant, decode: DecodeMode) -> float:
        """The share of val images that both stages take from one decoding."""
        pairs = zip(self._reduction(fast, decode), self._reduction(slow, decode), strict=True)
        equal = [one == other for one, other in pairs]
        return sum(equal) / len(equal)

    def decoding_differs(self, variant: Variant) -> bool:
        """Whether 'full' and 'reduced' are different pixels for some val image: a JPEG that is reduced at all."""
        return any(k > 1 for k in self._reduction(variant, "reduced"))

    def _reductions(self, variant: Variant, decode: DecodeMode) -> list[int]:
        spec = self._students[variant.student].spec.resized(*variant.size)
        step = max(1, len(self._val) // HEADERS)
        return [EncodedImage(path, decode=decode).decoding_k(spec) for path in self._val.paths[::step]]
