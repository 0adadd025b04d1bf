"""One training over several processes: each takes its share of every global batch, and their gradients are averaged.

``--processes N``, ``accelerate launch`` or ``torchrun`` start the processes and say in the environment who is who. All of
them run the same code; the main one alone looks at the folders and writes files, and what it finds or decides reaches
the others through ``on_main``. With one process all of this is nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy.typing as npt
import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from edgedistill import console
from edgedistill.errors import EdgedistillError, UsageError

T = TypeVar("T")

# The main process may label or evaluate for hours while the others wait; a launcher ends them all when one fails.
PATIENCE = timedelta(days=7)
HOW = "start them with 'distill --processes N ...' or 'torchrun --nproc_per_node N -m edgedistill distill ...'"


@dataclass(frozen=True)
class Part:
    """This process among all: ``rank`` 0 to ``size`` - 1; 0 is the main one. ``local_size``: of them on this machine."""

    rank: int = 0
    size: int = 1
    local_size: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def of(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The rows of a global batch that are this process's."""
        return rows[self.rank :: self.size]


ALONE = Part()


def part() -> Part:
    """Who this process is; the first call joins the others. Raises UsageError for an environment that is not whole."""
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        _refuse_half_a_launch()
        return ALONE
    lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if lacking:
        raise UsageError(
            f"WORLD_SIZE={size}, but {', '.join(lacking)} missing: {HOW}, or unset WORLD_SIZE and give each process "
            "a fold of its own with --fold K"
        )
    _join()
    return Part(_number("RANK", 0), size, _number("LOCAL_WORLD_SIZE", size))


def on_main(work: Callable[[], T]) -> T:
    """What ``work`` returns in the main process, in every process; an EdgedistillError is raised in all of them."""
    this = part()
    if this.size == 1:
        return work()
    answer: list[tuple[Any, EdgedistillError | None]] = [(None, None)]
    if this.main:
        try:
            answer = [(work(), None)]
        except EdgedistillError as error:
            answer = [(None, error)]
    dist.broadcast_object_list(answer, src=0, group=_join())
    value, failure = answer[0]
    if failure is not None:
        failure.told = not this.main
        raise failure
    return value  # type: ignore[return-value]


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """No other launch works in ``folder`` meanwhile: one that comes later says so and waits. What a killed one held is free.

    Two that trained the same network in one folder would write each other's checkpoints; look after the wait for what
    the other has done.
    """
    with contextlib.ExitStack() as held:
        on_main(lambda: _hold(folder / ".lock", held))
        yield


def _hold(lock: Path, held: contextlib.ExitStack) -> None:
    """``held`` gives it back. A file object, so that a Ctrl-C at any line leaves nothing locked in a process that goes on."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with contextlib.ExitStack() as opened:
            file = opened.enter_context(lock.open("ab"))  # to be written to: NFS locks nothing else
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                console.note(f"{lock.parent}: another process is at work there; waiting until it is done")
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                console.warn(f"{lock.parent}: cannot be locked ({error.strerror}); start no second process on it")
                lock.unlink(missing_ok=True)
                return
            with contextlib.suppress(FileNotFoundError):  # else the one that held it has taken its file away
                if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                    opened.callback(fcntl.flock, file, fcntl.LOCK_UN)  # of forked loader processes too
                    opened.callback(lock.unlink, missing_ok=True)
                    held.push(opened.pop_all())
                    return


def data_parallel(model: nn.Module, this: Part) -> nn.Module:
    """``model``, or a wrapper of it whose backward pass averages the gradients of all processes."""
    return model if this.size == 1 else DistributedDataParallel(model)


def of_all(parts: Sequence[torch.Tensor], this: Part, batch_size: int) -> list[torch.Tensor]:
    """Of each tensor [b, C], this process's rows of the global batch, those of all processes: [batch_size, C] in the batch's
    order. Gradients flow to the own rows alone."""
    if this.size == 1:
        return list(parts)
    columns = [part.shape[1] for part in parts]
    own = torch.cat([part.float() for part in parts], dim=1)
    sent = own.new_zeros((-(-batch_size // this.size), own.shape[1]))  # equal in all processes
    sent[: len(own)] = own.detach()
    received = [torch.empty_like(sent) for _ in range(this.size)]
    dist.all_gather(received, sent)
    whole = own.new_empty((batch_size, own.shape[1]))
    for rank, theirs in enumerate(received):
        count = len(range(rank, batch_size, this.size))
        whole[rank :: this.size] = own if rank == this.rank else theirs[:count]
    return list(whole.split(columns, dim=1))


def check_batch(batch_size: int, this: Part) -> None:
    """Raises UsageError for a global batch that leaves a process fewer than two images."""
    if this.size > 1 and batch_size < 2 * this.size:
        raise UsageError(
            f"batches of {batch_size} for {this.size} processes; expected {2 * this.size} or more (batch "
            "normalisation needs two images in each): raise --batch-size or start fewer processes"
        )


@functools.cache
def _join() -> Any:
    """Meet the other processes; returns the group over which the main one tells what it found. Once per process."""
    local = _number("LOCAL_RANK", 0)
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(local % gpus)
    # NCCL needs a GPU for each; where processes share one or have none, gloo carries the gradients.
    own_gpu = gpus >= _number("LOCAL_WORLD_SIZE", 1) and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if own_gpu else "gloo", timeout=PATIENCE)
    atexit.register(dist.destroy_process_group)
    if _number("RANK", 0):
        console.err.quiet = console.out.quiet = True
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdecimal() or (name == "WORLD_SIZE" and int(text) < 1):
        raise UsageError(f"{name}={text!r}: expected a whole number; {HOW}, or unset {name}")
    return int(text)


def _is_half_a_launch() -> bool:
    """On a CPU 'accelerate launch --num_processes 2' sets an address to meet at and then starts one process alone."""
    if os.environ.get("WORLD_SIZE") or "ACCELERATE_USE_CPU" not in os.environ:
        return False
    return bool(os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT"))


def _refuse_half_a_launch() -> None:
    if _is_half_a_launch():
        raise UsageError(
            "'accelerate launch' was asked for several processes and started one, as it does on a CPU without MPI; say "
            "how many here too: 'accelerate-launch ... -m edgedistill distill --processes N ...'"
        )


def to_start(wanted: int | None) -> int:
    """How many processes this one is to start with its own command; 1: none. ``wanted``: what --processes says.

    Where 'accelerate launch' was asked for several and started this one alone, as many as it was asked for. Raises
    UsageError for another number than that of a launch under way, and where nobody says how many.
    """
    started = _number("WORLD_SIZE", 0)
    if started:
        if wanted not in (None, started):
            raise UsageError(
                f"--processes {wanted} inside a launch of {started}; leave --processes away, or start it without launcher"
            )
        return 1
    if wanted is None and _is_half_a_launch():
        wanted = _asked_of_accelerate()
        if wanted is None:
            _refuse_half_a_launch()
    return wanted or 1


def _asked_of_accelerate() -> int | None:
    """--num_processes on the command line of 'accelerate launch', which is our parent and tells it nowhere else. None: it
    is not there (but in accelerate's own settings), or other machines are to have a share."""
    try:
        command = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return None
    given = {}
    for word, following in zip(command, [*command[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        given[name.replace("-", "_")] = value if equals else following
    count = given.get("__num_processes", "")
    return int(count) if count.isdecimal() and given.get("__num_machines", "1") == "1" else None


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run ``edgedistill ARGUMENTS`` in ``count`` processes of this machine; returns its exit code.

    A signal is passed on to all of them. Each has its share of the processor's threads where OMP_NUM_THREADS says
    nothing.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // count)))
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # accelerate's --cpu
    logging.disable(logging.CRITICAL)  # the processes themselves say what failed
    launcher = ["--standalone", "--nproc_per_node", str(count)]
    try:
        run(parse_args([*launcher, "-m", "edgedistill", *arguments]))
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        if max(codes) > 0:
            return max(codes)
        console.warn(f"a process was ended by {signal.Signals(-min(codes)).name}; all are stopped")
        return 128 - min(codes)
    except SignalException as error:
        return 128 + error.sigval
    return 0
