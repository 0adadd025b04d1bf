"""Many images per second, in order, in bounded memory: `Engine`.

One worker thread per core does everything for one image after the other (read, decode, resize, infer) with its own
compiled network and buffers; OpenCV, libjpeg and OpenVINO release Python's lock meanwhile. In interleaved rounds on a
two-core machine (MobileNetV3-small, f32, JPEG of 640x427 and 1920x1281) one shared network with a stream per worker
reached 0.77 and 0.95 of this rate, two pinned processes 0.72 and 0.80; decoding threads before OpenVINO's asynchronous
queue, batches of four and a third worker all stayed behind the shared network.

What the first stage of a cascade passes on is gathered over all workers and goes through the next stage in batches. On
the same machine (MobileNetV3-small before EfficientNet-lite0, INT8 at 64 px, batches of 8) a cascade that passes on a
fifth reached 1.2 times the rate that it had with a second stage of one image at a time, in C++ 1.3 times; one that
passes on everything 1.6 and 1.5 times.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from edgedistill.errors import ImageError, ModelError, UsageError
from edgedistill.images import DecodeMode, InputSpec
from edgedistill.runtime.bundle import Bundle
from edgedistill.runtime.network import (
    CacheDir,
    Frame,
    Network,
    Outcome,
    PassedOn,
    Prediction,
    Source,
    Worker,
    as_frame,
    failed,
    resolve_precisions,
    usable_cores,
)
from edgedistill.runtime.processor import settings_here
from edgedistill.tasks import Head

Policy = Literal["block", "drop_oldest"]
JOIN_TIMEOUT_S = 10.0
# So many times a later stage's batch is held for it to fill up: where a share of 1/8 or more is passed on, it does.
GATHERED_BATCHES = 8
CAMERA_BATCH = 8


class _ClosedError(ModelError):
    """The engine was closed before an image's turn came."""


class _Ticket:
    """One image on its way. ``done`` is held until its outcome is there. ``passed``: to a stage after the first;
    ``number``: images that were begun before it."""

    __slots__ = ("_outcome", "done", "frame", "number", "passed")

    def __init__(self, frame: Frame | None) -> None:
        self.frame = frame
        self.passed: PassedOn | None = None
        self.number = 0
        self.done = threading.Lock()
        self.done.acquire()
        self._outcome: Prediction | BaseException = _ClosedError("not answered yet")

    def finish(self, outcome: Prediction | BaseException) -> None:
        self._outcome, self.frame, self.passed = outcome, None, None
        self.done.release()

    def wait(self) -> None:
        self.done.acquire()
        self.done.release()

    def result(self) -> Prediction:
        """Waits. Raises what the worker raised."""
        self.wait()
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome


class _Pool:
    """The tickets that wait and the threads that serve them. Threads know the pool, never the engine.

    ``batches``: tickets that one worker takes at once for each stage. Those that wait for a later stage are taken when
    they fill a batch, when ``patience`` images were begun since the oldest of them was, or when there is nothing else.
    """

    def __init__(self, batches: Sequence[int], patience: int) -> None:
        # Re-entrant: the garbage collector may close an engine or a generator in a thread that holds it.
        self.lock = threading.RLock()
        self.closed = False
        self._work = threading.Condition(self.lock)
        self._batches, self._patience = tuple(batches), patience
        self._waiting: list[deque[_Ticket]] = [deque() for _ in batches]  # for each stage
        self._begun = 0

    def put(self, ticket: _Ticket) -> None:
        with self.lock:
            self.put_locked(ticket)

    def put_locked(self, ticket: _Ticket) -> None:
        if self.closed:
            raise _ClosedError("the engine is closed; make a new one")
        self._waiting[0].append(ticket)
        self._work.notify()

    def take(self) -> list[_Ticket]:
        """One to a batch of tickets of one stage, as soon as there is one; none when the pool is closed."""
        with self.lock:
            while (stage := self._stage_locked()) is None and not self.closed:
                self._work.wait()
            if stage is None:
                return []
            waiting = self._waiting[stage]
            tickets = [waiting.popleft() for _ in range(min(self._batches[stage], len(waiting)))]
            if stage == 0:
                for ticket in tickets:
                    ticket.number = self._begun
                    self._begun += 1
            return tickets

    def _stage_locked(self) -> int | None:
        """Whose tickets are next; None: there are none."""
        for stage in range(len(self._waiting) - 1, 0, -1):
            waiting = self._waiting[stage]
            if waiting and (len(waiting) >= self._batches[stage] or self._begun - waiting[0].number >= self._patience):
                return stage
        return next((stage for stage, waiting in enumerate(self._waiting) if waiting), None)

    def pass_on(self, ticket: _Ticket, passed: PassedOn) -> None:
        """To the stage that it was passed on to."""
        with self.lock:
            if not self.closed:
                ticket.passed = passed
                self._waiting[passed.stage].append(ticket)
                self._work.notify()
                return
        ticket.finish(_abandoned())

    def withdraw_locked(self, ticket: _Ticket, *, begun: bool = False) -> bool:
        """False when a worker has it, or had it: ``begun`` also takes back what waits for a later stage."""
        for waiting in self._waiting if begun else self._waiting[:1]:
            try:
                waiting.remove(ticket)
            except ValueError:
                continue
            return True
        return False

    def close(self) -> None:
        with self.lock:
            self.closed = True
            abandoned = [ticket for waiting in self._waiting for ticket in waiting]
            for waiting in self._waiting:
                waiting.clear()
            self._work.notify_all()
        for ticket in abandoned:
            ticket.finish(_abandoned())


def _abandoned() -> _ClosedError:
    return _ClosedError("the engine was closed before this image was answered; make a new one")


def _serve(pool: _Pool, worker: Worker) -> None:
    """A worker thread's life. Whatever goes wrong with an image is handed to whoever waits for it."""
    while tickets := pool.take():
        try:
            outcomes = _outcomes(worker, tickets)
        except BaseException as error:
            for ticket in tickets:
                ticket.finish(error)
        else:
            for ticket, outcome in zip(tickets, outcomes, strict=True):
                if isinstance(outcome, PassedOn):
                    pool.pass_on(ticket, outcome)
                else:
                    ticket.finish(outcome)


def _outcomes(worker: Worker, tickets: Sequence[_Ticket]) -> list[Outcome]:
    passed = [ticket.passed for ticket in tickets if ticket.passed is not None]
    return worker.go_on(passed) if passed else worker.begin([t.frame for t in tickets if t.frame is not None])


def _shut_down(pool: _Pool, threads: Sequence[threading.Thread]) -> None:
    pool.close()
    for thread in threads:
        # The garbage collector may run this in a worker.
        if thread is not threading.current_thread():
            thread.join(JOIN_TIMEOUT_S)


def check_settings(policy: str, *, streams: int | None, threads: int | None, batch: int | None) -> None:
    """Raises ModelError for what no engine takes; None is left to deploy.json."""
    for name, value in {"streams": streams, "threads": threads, "batch": batch}.items():
        if value is not None and not 1 <= value <= 4096:
            raise ModelError(f"{name} {value}, expected 1 to 4096")
    if streams is not None and threads is not None and threads < streams:
        raise ModelError(f"threads {threads}, expected at least one for each of the {streams} streams")
    if policy not in ("block", "drop_oldest"):
        raise ModelError(f"policy {policy!r}, expected 'block' or 'drop_oldest'")


def _fitting_batch(tuned: int, policy: Policy, streams: int, queue_size: int | None) -> int:
    """deploy.json's batch, or less where the queue has no room for it or a camera waits for its answers."""
    most = CAMERA_BATCH if policy == "drop_oldest" else tuned
    if queue_size is not None:
        most = min(most, (queue_size - 1) // streams)
    return max(1, min(tuned, most))


def check_many(sources: object) -> None:
    """Raises UsageError for what is one image."""
    if isinstance(sources, str | Path | bytes | Frame) or (isinstance(sources, np.ndarray) and sources.ndim < 4):
        raise UsageError("Engine.map wants many images: give a list or an iterator of paths, bytes or arrays")


class Engine:
    """A throughput engine: every core busy, answers in order, bounded memory. Use it in a ``with`` block.

    ``path``, ``precision``, ``decode``, ``cache_dir``: as in `Classifier`. ``streams``: images worked on at once (and
    worker threads); ``threads``: OpenVINO's inference threads in all; ``batch``: images per inference, in every stage
    of a cascade. By default what deploy.json says, and one stream and one thread per core where it says nothing; its
    streams no more than ``threads``; its batch no larger than ``queue_size`` has room for, and than 8 under policy
    'drop_oldest': a batch costs the same however few images are in it, and a camera's are to be answered soon.
    ``queue_size``: images held at any moment, waiting, in work or answered but not yet taken.

    What a cascade's first stage passes on waits for a batch of its own, until that is full, nothing else is left to do
    or most of the queue would wait for it.

    ``map`` is for files and anything that can wait. ``submit`` and ``results`` are for cameras: under ``policy``
    'block' a full engine makes ``submit`` wait, under 'drop_oldest' it gives up its oldest image that nobody began,
    else the oldest that no worker has in hand.

    An image that cannot be read gets a Prediction whose ``error`` is set, and the rest goes on. Safe to use from
    several threads. Raises ArtifactError or ModelError when the model cannot be used.
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
        bundle = path if isinstance(path, Bundle) else Bundle.load(path)
        (_, tuned), cores = settings_here(bundle), usable_cores()
        self.streams = streams or min(tuned.streams or cores, threads or cores, cores)
        self.batch, self.later_batch = (
            _fitting_batch(number or tuned.batch, policy, self.streams, queue_size) if batch is None else batch
            for number in (tuned.batch, tuned.later_batch)
        )
        later = self.later_batch if len(bundle.config.stages) > 1 else 1
        # A camera's images are to be new, but more than workers can have in hand, of any stage; anything else can wait
        # for a batch.
        if policy == "drop_oldest":
            room = 4 * self.streams * max(self.batch, later) + 1
        else:
            room = 4 * self.streams * self.batch + 1 + GATHERED_BATCHES * (later - 1)
        self.queue_size = room if queue_size is None else queue_size
        self.dropped = 0
        self._policy = policy
        self._check_room()
        total = threads or max(self.streams, min(tuned.threads or 0, cores))
        # One compiled network per worker, inferring in the worker's own thread: 1.3 times the rate of one network with
        # as many streams, which hands each image to a thread of OpenVINO's and back.
        properties: dict[str, Any] = {
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": total // self.streams,
            "ENABLE_CPU_PINNING": bool(tuned.pinning),  # or OpenVINO pins every worker to the same first core
        }
        precisions = resolve_precisions(bundle, precision, tuned)
        self._networks = tuple(
            Network(
                bundle,
                precisions=precisions,
                decode=decode,
                batch=self.batch,
                later_batch=self.later_batch,
                properties=properties,
                cache_dir=cache_dir,
            )
            for _ in range(self.streams)
        )
        workers = [Worker(network) for network in self._networks]
        # Enough is left to begin for all workers while the gathered ones are answered.
        patience = self.queue_size - min(self.queue_size // 2, 2 * self.streams * self.batch)
        self._pool = _Pool(workers[0].batches, patience)
        self._changed = threading.Condition(self._pool.lock)
        self._submitted: deque[_Ticket] = deque()
        self._finished = False
        self._start(workers)

    def _check_room(self) -> None:
        if self.queue_size <= self.streams * self.batch:
            raise ModelError(
                f"queue_size {self.queue_size}, expected more than streams x batch = {self.streams * self.batch}"
            )

    def _start(self, workers: Sequence[Worker]) -> None:
        threads = [
            threading.Thread(target=_serve, args=(self._pool, worker), name=f"edgedistill-{number}", daemon=True)
            for number, worker in enumerate(workers)
        ]
        # Also at interpreter exit: a daemon thread inside OpenVINO when Python ends would take the process down.
        self._finalizer = weakref.finalize(self, _shut_down, self._pool, threads)
        for thread in threads:
            thread.start()

    @property
    def labels(self) -> tuple[str, ...]:
        return self._networks[0].bundle.labels

    @property
    def spec(self) -> InputSpec:
        """Of the first stage."""
        return self._networks[0].spec

    @property
    def multi_label(self) -> bool:
        return self._networks[0].bundle.multi_label

    @property
    def heads(self) -> tuple[Head, ...]:
        """Of a network with several heads, in the order of ``Prediction.heads``; () for others."""
        return self._networks[0].bundle.heads

    @property
    def precision(self) -> str:
        """'int8', or 'int8+f32' where the stages of a cascade differ."""
        return self._networks[0].precision

    @property
    def networks(self) -> tuple[Network, ...]:
        """One per worker, alike, for those who measure them."""
        return self._networks

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

    def map(self, sources: Iterable[Source]) -> Generator[Prediction, None, None]:
        """One Prediction per source, in order. ``sources`` is read lazily, in the caller's thread, never more than
        ``queue_size`` images ahead of what was taken; it may be endless. Closing the iterator early is fine.
        """
        check_many(sources)
        if self._pool.closed:
            raise _ClosedError("the engine is closed; make a new one")
        return self._mapped(sources)

    def _mapped(self, sources: Iterable[Source]) -> Generator[Prediction, None, None]:
        pending: deque[_Ticket] = deque()
        try:
            for source in sources:
                pending.append(self._begin(source))
                # Also what is ready although there is room: a slow source must not hold answers back.
                while pending and (len(pending) >= self.queue_size or not pending[0].done.locked()):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            with self._pool.lock:
                for ticket in pending:
                    self._pool.withdraw_locked(ticket, begun=True)

    def _begin(self, source: Source) -> _Ticket:
        ticket = self._ticket(source)
        if ticket.frame is not None:
            self._pool.put(ticket)
        return ticket

    def _ticket(self, source: Source) -> _Ticket:
        """A ticket; already answered, and without a frame, when ``source`` is no image at all."""
        try:
            return _Ticket(as_frame(source))
        except ImageError as error:
            ticket = _Ticket(None)
            ticket.finish(failed("", error))
            return ticket

    def submit(self, source: Source, *, timeout_s: float | None = None) -> bool:
        """Hands over one image; its answer comes out of ``results``, in order. An array must not be changed until then.

        False when the engine was still full after ``timeout_s`` seconds (policy 'block'; None waits for ever, so
        somebody else has to be taking results). Under 'drop_oldest' it never waits: ``dropped`` counts.
        """
        ticket = self._ticket(source)
        with self._changed:
            if self._finished:
                raise ModelError("submit after finish; make a new engine or call submit first")
            if self._policy == "drop_oldest" and len(self._submitted) >= self.queue_size:
                self._drop_one_locked()
            elif not self._changed.wait_for(self._has_room_locked, timeout_s):
                return False
            if self._pool.closed:
                raise _ClosedError("the engine is closed; make a new one")
            if ticket.frame is not None:
                self._pool.put_locked(ticket)
            self._submitted.append(ticket)
            self._changed.notify_all()
        return True

    def _has_room_locked(self) -> bool:
        return self._pool.closed or len(self._submitted) < self.queue_size

    def _drop_one_locked(self) -> None:
        """The oldest image that no worker began, else the oldest that waits for a later stage or to be taken.

        There is always one of them: more images are held than workers can have in hand.
        """
        for begun in (False, True):
            for ticket in self._submitted:
                waits = self._pool.withdraw_locked(ticket, begun=begun)
                if waits:
                    ticket.finish(_ClosedError("dropped for a newer image"))
                if waits or (begun and not ticket.done.locked()):
                    self._submitted.remove(ticket)
                    self.dropped += 1
                    return

    def results(self) -> Iterator[Prediction]:
        """The answers to what was submitted, in order, as they come; ends after ``finish`` or ``close``."""
        while (ticket := self._next_submitted()) is not None:
            ticket.wait()
            with self._changed:
                # A full engine may have dropped it while we waited.
                if not self._submitted or self._submitted[0] is not ticket:
                    continue
                self._submitted.popleft()
                self._changed.notify_all()
            try:
                prediction = ticket.result()
            except _ClosedError:
                return
            yield prediction

    def _next_submitted(self) -> _Ticket | None:
        with self._changed:
            self._changed.wait_for(lambda: self._submitted or self._finished or self._pool.closed)
            return self._submitted[0] if self._submitted else None

    def finish(self) -> None:
        """No more will be submitted: ``results`` ends after the last answer."""
        with self._changed:
            self._finished = True
            self._changed.notify_all()
