"""The processor that this program runs on, and what deploy.json's settings are worth on another one."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

from edgedistill import console
from edgedistill.runtime.bundle import Bundle, LatencySettings, ThroughputSettings
from edgedistill.runtime.network import usable_cores


@cache
def cpu_info() -> tuple[str, frozenset[str]]:
    """(model name, flags) of the first processor in /proc/cpuinfo (x86 says 'flags', ARM 'Features')."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    model = fields.get("model name") or fields.get("Model") or platform.processor() or platform.machine()
    return model, frozenset((fields.get("flags") or fields.get("Features") or "").split())


def settings_here(bundle: Bundle) -> tuple[LatencySettings, ThroughputSettings]:
    """deploy.json's settings on the CPU that they were measured on; elsewhere safe ones, with a warning.

    Safe is f32 (the form that the certificate proves, and the one that every CPU computes alike), one stream per core,
    one image per inference. Stages and thresholds stay: they are about accuracy. Another number of cores keeps precision
    and batch and has one stream per core; it is warned about, and so is another release of OpenVINO, which keeps
    everything. A deploy.json that names no CPU is taken at its word.
    """
    config = bundle.config
    tuned = (config.latency, config.throughput)
    safe = (LatencySettings(), ThroughputSettings())
    if tuned == safe:
        return safe
    here = cpu_info()[0]
    if config.cpu and config.cpu != here:
        console.warn(
            f"{bundle.source}: its settings were measured on {config.cpu!r}, this is {here!r}: running with safe ones "
            "(f32, one stream per core); 'edgedistill tune' finds this CPU's"
        )
        return safe
    versions = config.versions if isinstance(config.versions, Mapping) else {}
    then, now = _release(versions.get("openvino")), _release(_installed("openvino"))
    if then and now and then != now:
        console.warn(
            f"{bundle.source}: its settings were measured with OpenVINO {then}, this is {now}; "
            "'edgedistill tune' measures again"
        )
    cores = usable_cores()
    if config.cores and config.cores != cores and any((tuned[0].threads, tuned[1].streams, tuned[1].threads)):
        console.warn(
            f"{bundle.source}: its settings were measured on {config.cores} cores, here {cores} are usable: running with "
            "one stream per core; 'edgedistill tune' measures again"
        )
        latency, throughput = tuned
        return replace(latency, threads=None), replace(throughput, streams=None, threads=None)
    return tuned


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _release(version: object) -> str:
    """'2026.4.1' -> '2026.4'; '' for what is no version."""
    return ".".join(version.split(".")[:2]) if isinstance(version, str) else ""
