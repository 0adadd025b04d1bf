"""The C++ engine for Python programs: `CppEngine` in the place of `Engine`.

Optional: `make cpp-python` builds the module edgedistill_cpp into the environment. Nothing else needs it.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

import edgedistill
from edgedistill import console
from edgedistill.errors import ArtifactError, EdgedistillError, ImageError, ModelError, UsageError
from edgedistill.images import DecodeMode, InputSpec, read_bytes, to_bgr
from edgedistill.runtime.bundle import Bundle
from edgedistill.runtime.engine import Policy, check_many, check_settings
from edgedistill.runtime.network import CacheDir, Frame, HeadPrediction, Prediction, Source, as_frame, failed
from edgedistill.shard_members import member_of
from edgedistill.tasks import Head

if TYPE_CHECKING:
    import edgedistill_cpp

HOW_TO_BUILD = "in a checkout, 'make cpp-python' or 'pip install ./runtime/cpp/python' builds it"
# So often a thread that waits looks for Ctrl-C.
POLL_MS = 100
_ERRORS: dict[str, type[EdgedistillError]] = {"usage": UsageError, "image": ImageError, "artifact": ArtifactError}


def load_extension() -> ModuleType:
    """The module edgedistill_cpp. Raises UsageError, with the remedy, where it is not built or of another version."""
    try:
        import edgedistill_cpp
    except ImportError as error:
        raise UsageError(f"the C++ engine cannot be loaded ({error}); {HOW_TO_BUILD}") from error
    if edgedistill_cpp.__version__ != edgedistill.__version__:
        raise UsageError(
            f"the C++ engine is of version {edgedistill_cpp.__version__}, edgedistill of {edgedistill.__version__}; "
            f"{HOW_TO_BUILD}"
        )
    return edgedistill_cpp


@dataclass(slots=True, eq=False)
class _Ticket:
    """One image on its way: its ``number`` in the C++ engine, or what it was ``refused`` with."""

    name: str
    number: int = -1
    refused: Prediction | None = None


class CppEngine:
    """`Engine` in C++: the same answers, order and bounds, and less time for each image.

    Paths, bytes and arrays go to C++ threads that never wait for Python's lock; answers are `Engine`'s. Bytes and uint8
    arrays in rows without gaps between pixels are borrowed, not copied, and are let go of when their answer is taken
    (what was given up: at the next call). Other arrays are copied first. TIFF files are refused, image by image.

    Parameters and behaviour are those of `Engine`, but for these: ``map`` is not for an engine that drops images, and
    ``close`` throws away answers that nobody took. ``heads`` do not know their weight in training. The constructor
    returns when the first stream can answer; ``wait_until_ready`` waits for all. Ctrl-C ends every wait but those two
    within a tenth of a second.

    Raises UsageError where the C++ engine is not built, ArtifactError or ModelError when the model cannot be used.
    """

    def __init__(
        self,
        path: str | Path | Bundle,
        *,
        precision: str | None = None,
        streams: int | None = None,
        threads: int | None = None,
        batch: int | None = None,
        policy: Policy = "block",
        queue_size: int | None = None,
        decode: DecodeMode | None = None,
        cache_dir: CacheDir = None,
    ) -> None:
        check_settings(policy, streams=streams, threads=threads, batch=batch)
        if queue_size is not None and not 2 <= queue_size < 2**31:
            raise ModelError(f"queue_size {queue_size}, expected 2 or more")
        if decode not in (None, "full", "reduced"):
            raise ModelError(f"decode {decode!r}, expected 'full' or 'reduced'")
        extension = load_extension()
        self._failure: type[edgedistill_cpp.Error] = extension.Error
        self._policy = policy
        model, memory = _model_of(path)
        try:
            self._core: edgedistill_cpp.Engine = extension.Engine(
                model,
                memory,
                precision=precision or "",
                threads=threads,
                streams=streams,
                batch=batch,
                queue_size=queue_size,
                drop_oldest=policy == "drop_oldest",
                reduced=None if decode is None else decode == "reduced",
                use_cache=cache_dir is not False,
                cache_folder=os.fsencode(cache_dir) if cache_dir else b"",
            )
        except extension.Error as error:
            raise _translated(error) from error
        for warning in self._core.warnings:
            console.warn(warning)
        self.streams, self.batch, self.later_batch = self._core.streams, self._core.batch, self._core.later_batch
        self.queue_size = self._core.queue_size
        self._labels = self._core.labels
        # Re-entrant: the garbage collector may close an engine in a thread that holds it.
        self._changed = threading.Condition(threading.RLock())
        self._taking = threading.Lock()
        self._submitted: deque[_Ticket] = deque()
        self._refused_dropped = 0
        self._finished = False
        # Also at interpreter exit: before Python ends, so that no thread is left inside OpenVINO.
        self._finalizer = weakref.finalize(self, self._core.close)

    @property
    def labels(self) -> tuple[str, ...]:
        return self._labels

    @property
    def spec(self) -> InputSpec:
        """Of the first stage."""
        return InputSpec.from_dict(self._core.spec)

    @property
    def multi_label(self) -> bool:
        return self._core.multi_label

    @property
    def heads(self) -> tuple[Head, ...]:
        """Of a network with several heads, in the order of ``Prediction.heads``; () for others."""
        return tuple(Head(**head) for head in self._core.heads)

    @property
    def precision(self) -> str:
        return self._core.precision

    @property
    def dropped(self) -> int:
        """Images given up under policy 'drop_oldest'."""
        return self._core.dropped + self._refused_dropped

    def wait_until_ready(self) -> None:
        """Until every stream can answer: for measurements. Raises ModelError where a network cannot be compiled."""
        try:
            self._core.wait_until_ready()
        except self._failure as error:
            raise _translated(error) from error

    def close(self) -> None:
        """Ends the threads; images in work are finished first, waiting ones are not. Twice does no harm."""
        self._finalizer()
        with self._changed:
            self._changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _closed(self) -> bool:
        return not self._finalizer.alive

    def map(self, sources: Iterable[Source]) -> Generator[Prediction, None, None]:
        """One Prediction per source, in order. ``sources`` is read lazily, in the caller's thread, never more than
        ``queue_size`` images ahead of what was taken; it may be endless. Closing the iterator early is fine.
        """
        check_many(sources)
        if self._policy == "drop_oldest":
            raise UsageError("map answers every image and policy 'drop_oldest' does not; make an engine with 'block'")
        if self._closed:
            raise ModelError("the engine is closed; make a new one")
        return self._mapped(sources)

    def _mapped(self, sources: Iterable[Source]) -> Generator[Prediction, None, None]:
        pending: deque[_Ticket] = deque()
        try:
            for source in sources:
                pending.append(self._begin(source))
                # Also what is ready although there is room: a slow source must not hold answers back.
                while pending:
                    answer = self._answer(pending[0], wait=len(pending) >= self.queue_size)
                    if answer is not None:
                        pending.popleft()
                        yield answer
                    elif len(pending) < self.queue_size:
                        break
            while pending:
                yield self._waited(pending[0])
                pending.popleft()
        finally:
            self._core.forget([ticket.number for ticket in pending if ticket.refused is None])

    def _begin(self, source: Source) -> _Ticket:
        ticket, frame = _ticket(source)
        while frame is not None and not self._hand_over(ticket, frame, POLL_MS):
            pass
        return ticket

    def submit(self, source: Source, *, timeout_s: float | None = None) -> bool:
        """Hands over one image; its answer comes out of ``results``, in order. An array must not be changed until then.

        False when the engine was still full after ``timeout_s`` seconds (policy 'block'; None waits for ever, so
        somebody else has to be taking results). Under 'drop_oldest' it never waits: ``dropped`` counts.
        """
        ticket, frame = _ticket(source)
        end = None if timeout_s is None else time.monotonic() + timeout_s
        poll_ms = POLL_MS if timeout_s is None else min(POLL_MS, int(timeout_s * 1000))
        with self._changed:
            if self._finished:
                raise ModelError("submit after finish; make a new engine or call submit first")
            if self._policy == "block" and not self._changed.wait_for(self._has_room_locked, timeout_s):
                return False
            if self._closed:
                raise ModelError("the engine is closed; make a new one")
            # Full here means: of images that are being mapped.
            while frame is not None and not self._hand_over(ticket, frame, poll_ms):
                if end is not None and time.monotonic() >= end:
                    return False
            self._submitted.append(ticket)
            self._drop_refused_locked()
            self._changed.notify_all()
        return True

    def _has_room_locked(self) -> bool:
        return self._closed or len(self._submitted) < self.queue_size

    def _drop_refused_locked(self) -> None:
        """What is no image never reached the C++ engine, which gives up none of it."""
        if self._policy == "block" or len(self._submitted) <= self.queue_size:
            return
        refused = next((ticket for ticket in self._submitted if ticket.refused is not None), None)
        if refused is not None:
            self._submitted.remove(refused)
            self._refused_dropped += 1

    def results(self) -> Iterator[Prediction]:
        """The answers to what was submitted, in order, as they come; ends after ``finish`` or ``close``."""
        while (answer := self._next_result()) is not None:
            yield answer

    def _next_result(self) -> Prediction | None:
        with self._taking:
            while (ticket := self._next_submitted()) is not None:
                try:
                    answer = self._waited(ticket)
                except Exception:
                    there = self._remove(ticket)
                    if self._closed:
                        return None
                    if there:
                        raise
                    continue  # a full engine gave it up while we waited
                if self._remove(ticket):
                    return answer
        return None

    def _next_submitted(self) -> _Ticket | None:
        with self._changed:
            self._changed.wait_for(lambda: self._submitted or self._finished or self._closed)
            return self._submitted[0] if self._submitted else None

    def _remove(self, ticket: _Ticket) -> bool:
        """False when it was given up."""
        with self._changed:
            there = ticket in self._submitted
            if there:
                self._submitted.remove(ticket)
                self._changed.notify_all()
            return there

    def finish(self) -> None:
        """No more will be submitted: ``results`` ends after the last answer."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def _hand_over(self, ticket: _Ticket, frame: Frame, timeout_ms: int) -> bool:
        """False: the C++ engine is full. What cannot be an image makes the ticket a refused one."""
        try:
            placed = _submit(self._core, frame.data, timeout_ms)
        except ImageError as error:
            ticket.refused = failed(ticket.name, error)
            return True
        except self._failure as error:
            raise _translated(error) from error
        if placed is None:
            return False
        ticket.number, dropped = placed
        for gone in [one for one in self._submitted if one.number == dropped]:
            self._submitted.remove(gone)
        return True

    def _waited(self, ticket: _Ticket) -> Prediction:
        while (answer := self._answer(ticket, wait=True)) is None:
            pass
        return answer

    def _answer(self, ticket: _Ticket, *, wait: bool) -> Prediction | None:
        """None: not yet. Waits no longer than POLL_MS, after which Python looks for signals."""
        if ticket.refused is not None:
            return ticket.refused
        try:
            answer = self._core.take(ticket.number, POLL_MS if wait else 0)
        except self._failure as error:
            raise _translated(error) from error
        return None if answer is None else _prediction(answer, ticket.name)


def _model_of(path: str | Path | Bundle) -> tuple[bytes, tuple[bytes, bytes] | None]:
    """Where C++ finds the model, and its (xml, bin) where it is in memory. Raises UsageError for a changed Bundle."""
    if not isinstance(path, Bundle):
        return os.fsencode(path), None
    again = Bundle.load(path.source) if path.weights is None else Bundle.from_bytes(*path.weights)
    if again.config != path.config:
        raise UsageError(
            f"{path.source}: the C++ engine reads settings from deploy.json, and this Bundle has others; write them there"
        )
    return os.fsencode(path.source), path.weights


def _ticket(source: Source) -> tuple[_Ticket, Frame | None]:
    """A ticket and what it is for; nothing when ``source`` is no image at all."""
    try:
        frame = as_frame(source)
    except ImageError as error:
        return _Ticket("", refused=failed("", error)), None
    return _Ticket(frame.name), frame


def _submit(core: edgedistill_cpp.Engine, data: Any, timeout_ms: int) -> tuple[int, int | None] | None:
    """Raises ImageError for what cannot be an image, and what the C++ engine raises."""
    if isinstance(data, np.ndarray):
        try:
            return core.submit_pixels(data, timeout_ms)
        except BufferError:
            return core.submit_pixels(to_bgr(data), timeout_ms)
    if isinstance(data, bytes | bytearray | memoryview):
        try:
            return core.submit_bytes(data, b"", timeout_ms)
        except BufferError:
            return core.submit_bytes(bytes(data), b"", timeout_ms)
    path = str(as_frame(data).data)
    if "\0" in path:
        raise ImageError(f"{path!r}: cannot be read (embedded null byte)")
    try:
        if member_of(path) is not None:
            return core.submit_bytes(read_bytes(path)[0], os.fsencode(path), timeout_ms)
        return core.submit_file(os.fsencode(path), timeout_ms)
    except UnicodeEncodeError as error:
        raise ImageError(f"{path!r}: cannot be read ({error})") from error


def _translated(error: Exception) -> EdgedistillError:
    kind, message = error.args
    return _ERRORS.get(kind, ModelError)(message)


def _prediction(answer: edgedistill_cpp.Answer, name: str) -> Prediction:
    if answer.error:
        return failed(name, answer.error)
    return Prediction(
        answer.label,
        answer.index,
        answer.probability,
        answer.probabilities,
        name,
        answer.stage,
        accepted=answer.accepted,
        heads=tuple(_head_prediction(head) for head in answer.heads),
    )


def _head_prediction(head: edgedistill_cpp.HeadAnswer) -> HeadPrediction:
    value = head.value if head.kind == "regression" else None
    return HeadPrediction(head.name, head.label, head.index, head.probability, head.accepted, value)
