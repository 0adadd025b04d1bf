"""`doctor` looks at this machine as it is, names what is wrong and the line that mends it, and never falls over itself."""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from edgedistill import doctor, memory
from edgedistill.doctor import DEBIAN_LINE, GIB, Check, run_doctor, satisfies
from edgedistill.training.loader import store_budget


def _only(rows: Any) -> Check:
    (row,) = rows
    assert isinstance(row, Check)
    return row


def test_this_machine_passes_and_every_complaint_has_a_remedy() -> None:
    rows = run_doctor(network=False)
    found = {row.check: row for row in rows}
    assert {"python", "packages", "packages, train", "opencv", "processor", "openvino", "memory", "torch"} <= set(found)
    assert [row for row in rows if row.status == "error"] == []
    assert all(row.remedy for row in rows if row.status in ("warning", "error"))
    assert "FP32" in found["openvino"].detail and "GiB free" in found["memory"].detail


def test_importing_it_needs_none_of_the_heavy_packages() -> None:
    heavy = ("torch", "openvino", "cv2", "timm", "jinja2", "matplotlib")
    code = f"import sys, edgedistill.doctor; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("version", "specifier", "good"),
    [
        ("2.4.6", ">=2.0", True),
        ("1.26.4", ">=2.0", False),
        ("2.13.0+cpu", ">=2.4", True),
        ("2.10", ">=2.9", True),
        ("3.0.0", "<3,>=2.0.8", False),
        ("2.0.8", "<3,>=2.0.8", True),
        ("1.0", "==1.0.0", True),
        ("1.0.1", "!=1.0.1", False),
        ("1.0.0.post1", ">=1.0.0.post1", True),
        ("9", "", True),
    ],
)
def test_versions_are_compared_by_number(version: str, specifier: str, good: bool) -> None:
    assert satisfies(version, specifier) is good


def test_an_old_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "openvino":
            return "2023.1.0"
        if name == "rich":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    base = next(iter(doctor.check_packages()))
    assert (base.status, base.check) == ("error", "packages")
    assert "openvino 2023.1.0, wanted >=2025.0" in base.detail and "missing: rich" in base.detail
    assert base.remedy == "pip install edgedistill --upgrade"


def test_an_extra_that_nobody_installed_is_only_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    base = {name for name, _ in doctor.requirements("")}
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name not in base:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    rows = {row.check: row for row in doctor.check_packages()}
    assert rows["packages"].status == "ok"
    assert rows["packages, train"] == Check(
        "packages, train", "note", "not installed; not needed to run models", "pip install 'edgedistill[train]'"
    )


def test_two_opencv_wheels_of_unlike_versions_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"opencv-python": "4.14.0.94", "opencv-python-headless": "4.10.0.84"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    row = _only(doctor.check_opencv())
    assert row.status == "error" and "share one folder" in row.detail
    assert row.remedy.endswith("opencv-python==4.14.0.94 opencv-python-headless==4.14.0.94")


def test_a_missing_libgl_gives_the_debian_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def broken(name: str) -> Any:
        if name == "cv2":
            raise ImportError("libGL.so.1: cannot open shared object file: No such file or directory")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    row = _only(doctor.check_opencv())
    assert (row.status, row.remedy) == ("error", DEBIAN_LINE)
    assert "libGL.so.1" in row.detail


def test_a_cv2_folder_overwritten_by_another_wheel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", {"opencv-python": "4.14.0.94"}.get)
    monkeypatch.setitem(sys.modules, "cv2", types.SimpleNamespace(__version__="5.0.0"))
    row = _only(doctor.check_opencv())
    assert row.status == "error" and "but cv2 is 5.0.0" in row.detail


def test_a_cpu_without_avx2_and_a_busy_machine_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {
        "cpu": "Old",
        "architecture": "x86_64",
        "cpu_flags": [],
        "cores": 2,
        "cpu_quota": 1.5,
        "load_average_1min": 3.0,
    }
    monkeypatch.setattr("edgedistill.benchmarks.machine.machine_record", lambda: machine)
    cpu, load = doctor.check_processor()
    assert cpu.status == "warning" and "limited to 1.5" in cpu.detail and "AVX2" in cpu.remedy
    assert load.status == "note" and "noisy" in load.detail


def test_little_disk_and_memory_are_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**10, 10**10, 10**6))
    monkeypatch.setattr(doctor, "available_bytes", lambda: 4 * 10**8)
    rows = [*doctor.check_disk(), *doctor.check_memory()]
    assert {row.status for row in rows} == {"warning"} and all(row.remedy for row in rows)


def test_files_that_were_read_once_are_no_memory_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's memory.current counts them until the kernel needs their room."""
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    assert memory.available_bytes() is None
    (tmp_path / "meminfo").write_text("MemTotal: 30000000 kB\nMemAvailable:   20000000 kB\n")
    assert memory.available_bytes() == 20_000_000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{7 * GIB}\n")
    assert memory.available_bytes() == 20_000_000 * 1024
    (tmp_path / "memory.max").write_text(f"{8 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {2 * GIB}\nactive_file {GIB}\ninactive_file {4 * GIB}\n")
    assert memory.available_bytes() == 5 * GIB
    assert store_budget(None, 2) == 5 * GIB / 4
    assert _only(doctor.check_memory()).detail == "5.0 GiB free"


def test_a_hub_out_of_reach_names_the_other_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    row = _only(doctor.check_hub())
    assert row.status == "note" and "Name or service not known" in row.detail
    assert "--teacher-weights FILE" in row.remedy

    monkeypatch.setattr(doctor, "HUB_TIMEOUT_S", -0.9)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: nullcontext(time.sleep(1)))
    assert "no answer in time" in _only(doctor.check_hub()).detail


def test_an_offline_setting_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: pytest.fail("asked the network"))
    assert "HF_HUB_OFFLINE" in _only(doctor.check_hub()).detail


def test_a_check_that_breaks_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("the plugin library is damaged")

    monkeypatch.setattr(doctor, "check_openvino", broken)
    rows = {row.check: row for row in run_doctor(network=False)}
    assert rows["openvino"].status == "error" and "the plugin library is damaged" in rows["openvino"].detail
    assert rows["python"].status == "ok"
