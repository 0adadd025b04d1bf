"""What a measurement was taken on: processor, memory, kernel, versions and the exact files."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgedistill.artifacts import sha256_file
from edgedistill.runtime.network import usable_cores
from edgedistill.runtime.processor import cpu_info

# The instruction sets that decide which kernels run: vector width, 8-bit dot products, bfloat16, matrix tiles.
FLAGS_X86 = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
)
FLAGS_ARM = ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2")
PACKAGES = (
    "edgedistill",
    "openvino",
    "opencv-python",
    "opencv-python-headless",
    "simplejpeg",
    "isal",
    "numpy",
    "onnxruntime",
    "torch",
    "timm",
)


def machine_record() -> dict[str, Any]:
    """The machine as plain JSON values. What cannot be found out is None."""
    cpu, flags = cpu_info()
    return {
        "cpu": cpu,
        "architecture": platform.machine(),
        "cpu_flags": [flag for flag in (*FLAGS_X86, *FLAGS_ARM) if flag in flags],
        "cores": usable_cores(),
        "logical_cpus": os.cpu_count(),
        "cpu_quota": _cpu_quota(),
        "frequency_governor": _first_line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "memory_gib": memory_gib(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": package_versions(),
    }


def package_versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of those packages that are installed, read from their metadata without importing them."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def artifact_hash(files: Iterable[Path]) -> str:
    """sha256 over the sorted (file name, sha256) pairs: one value for a model of several files."""
    digest = hashlib.sha256()
    for name, value in sorted((path.name, sha256_file(path)) for path in files):
        digest.update(f"{name}\0{value}\n".encode())
    return digest.hexdigest()


def _cpu_quota() -> float | None:
    """CPUs' worth of time that a container's control group grants, or None without a limit."""
    quota, _, period = (_first_line(Path("/sys/fs/cgroup/cpu.max")) or "").partition(" ")
    return round(int(quota) / int(period), 2) if quota.isdigit() and period.isdigit() else None


def memory_gib() -> float | None:
    """Of the machine; None where it does not say."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").splitlines()[0].strip()
    except (OSError, IndexError):
        return None
