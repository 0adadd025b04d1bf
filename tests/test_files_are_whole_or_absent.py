"""artifacts.py: a file is the old one or the whole new one; a file of another kind is refused with a remedy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgedistill import artifacts
from edgedistill.artifacts import (
    append_jsonl,
    atomic_path,
    read_array,
    read_json,
    read_jsonl,
    sweep,
    write_array,
    write_json,
)
from edgedistill.errors import ArtifactError


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "config.json"
    write_json(target, {"epochs": 3}, format="x")
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert read_json(target, format="x")["epochs"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_what_a_dead_process_left_is_swept_and_what_a_living_one_writes_is_kept(tmp_path, monkeypatch) -> None:
    """The process of another container, which has our host's name, is none that /proc here knows."""
    nobody = int(Path("/proc/sys/kernel/pid_max").read_text()) + 1
    file, left = tmp_path / "deep" / "answers.json", tmp_path / f".answers.json.{artifacts.OWNER}.{nobody}.left.tmp"
    left.write_text("{")
    monkeypatch.setattr(artifacts.os, "getpid", lambda: nobody)
    with atomic_path(file) as temporary:
        temporary.write_text("{}")
        sweep(tmp_path)
        assert not left.exists() and temporary.read_text() == "{}"
    assert file.read_text() == "{}"
    foreign = tmp_path / f".answers.json.elsewhere.{nobody}.left.tmp"
    foreign.write_text("{")
    sweep(tmp_path)
    assert foreign.exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"format": "y", "version": 1}', b'{"format": "x", "version": 9}', b"\xff\xfe"]
)
def test_json_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "meta.json"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"meta\.json"):
        read_json(path, format="x")


def test_arrays_never_unpickle(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ArtifactError, match=r"ids\.npy"):
        read_array(path)
    write_array(path, np.array(["ä/1.png", "b"]))
    assert read_array(path).tolist() == ["ä/1.png", "b"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match="damaged"):
        read_array(path)


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"epoch": 1})
    with path.open("a") as file:
        file.write('{"epoch": 2, "lo')
    assert read_jsonl(path) == [{"epoch": 1}]


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a small tmpfs needs root on Linux")
def test_a_full_disk_leaves_no_half_file(tmp_path: Path) -> None:
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("this machine does not let tests mount a tmpfs")
    try:
        write_array(tmp_path / "a.npy", np.zeros(1000))
        with pytest.raises(ArtifactError, match=r"a\.npy: the disk is full"):
            write_array(tmp_path / "a.npy", np.zeros(100_000))
        assert [path.name for path in tmp_path.iterdir()] == ["a.npy"] and len(read_array(tmp_path / "a.npy")) == 1000
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
