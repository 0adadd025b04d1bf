"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path

MEMINFO = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")  # of this container, in version 2


def available_bytes() -> int | None:
    """What the machine has available, or what its container's limit leaves where that is less; None where neither is known.

    What a control group uses counts the files that it has read, of which the kernel takes back whatever was not looked at
    lately before it refuses memory: after one look at a data set nearly all of it.
    """
    free = _entry(MEMINFO, "MemAvailable:")
    machine = None if free is None else free * 1024
    limit, used = _number(GROUP / "memory.max"), _number(GROUP / "memory.current")
    if limit is None or used is None:
        return machine
    left = max(0, limit - used + (_entry(GROUP / "memory.stat", "inactive_file") or 0))
    return left if machine is None else min(machine, left)


def _entry(path: Path, name: str) -> int | None:
    """The number behind ``name`` in a file of one pair a line."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return None
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), None)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no container, or 'max': one without a limit
        return None
