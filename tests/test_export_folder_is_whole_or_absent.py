"""export/folder.py: a result folder is the old one or the whole new one; other people's files are never touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from edgedistill.errors import ArtifactError, UsageError
from edgedistill.export import folder
from edgedistill.export.folder import building, check_target, put_in_place


def fill(temporary: Path, text: str) -> None:
    (temporary / "stages").mkdir()
    (temporary / "stages" / "model.xml").write_text(text)
    (temporary / "deploy.json").write_text(text)


def content(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("exchange", [True, False])
def test_new_replaces_old_and_keeps_what_others_put_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(folder, "_exchange", lambda first, second: False)
    out = tmp_path / "openvino"
    for text in ("old", "new"):
        with building(out) as temporary:
            fill(temporary, text)
            put_in_place(temporary, out)
        if text == "old":
            (out / "stages" / "stale.xml").write_text("stale")
            (out / "val.csv").write_text("the tuner's")
            for name in ("tune.json", "pareto.png", "deploy.before-tune.json", "bench.json", "bench-2.json"):
                (out / name).write_text("about networks that are gone")
            (out / "notes").mkdir()
            (out / "notes" / "a.txt").write_text("the user's")
    expected = {"stages/model.xml": "new", "deploy.json": "new", "val.csv": "the tuner's", "notes/a.txt": "the user's"}
    assert content(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["openvino"]


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "openvino"
    with building(out) as temporary:
        fill(temporary, "old")
        put_in_place(temporary, out)
    with pytest.raises(KeyboardInterrupt), building(out) as temporary:
        (temporary / "deploy.json").write_text("half")
        raise KeyboardInterrupt
    assert content(out) == {"stages/model.xml": "old", "deploy.json": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["openvino"]


def test_a_killed_export_leaves_old_or_new_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    out = tmp_path / "openvino"
    code = textwrap.dedent(
        f"""
        import time
        from pathlib import Path
        from edgedistill.export.folder import building, put_in_place
        out = Path({str(out)!r})
        with building(out) as temporary:
            (temporary / "deploy.json").write_text("half")
            print("ready", flush=True)
            time.sleep(60)
        """
    )
    with building(out) as temporary:
        fill(temporary, "old")
        put_in_place(temporary, out)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    with pytest.raises(UsageError, match="another export is writing"), building(out):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert content(out)["deploy.json"] == "old" and (tmp_path / ".openvino.new" / "deploy.json").exists()
    with building(out) as temporary:
        assert not list(temporary.iterdir())
        fill(temporary, "new")
        put_in_place(temporary, out)
    assert content(out)["deploy.json"] == "new" and [path.name for path in tmp_path.iterdir()] == ["openvino"]


@pytest.mark.slow
def test_killed_in_the_middle_of_exchanges_the_folder_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "openvino"
    code = textwrap.dedent(
        f"""
        from pathlib import Path
        from edgedistill.export.folder import building, put_in_place
        out = Path({str(out)!r})
        for number in range(10**9):
            with building(out) as temporary:
                (temporary / "deploy.json").write_text(str(number))
                (temporary / "stages").mkdir()
                (temporary / "stages" / "model.xml").write_text(str(number))
                put_in_place(temporary, out)
            if number == 0: print("ready", flush=True)
        """
    )
    for attempt in range(5):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.1 + 0.037 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert sorted(path.name for path in out.iterdir()) == ["deploy.json", "stages"]
        assert (out / "deploy.json").read_text() == (out / "stages" / "model.xml").read_text()


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        check_target(tmp_path)
    check_target(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty")
    with pytest.raises(UsageError, match="is a file"):
        check_target(tmp_path / "thesis.tex")


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a small tmpfs needs root on Linux")
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this machine does not let tests mount a tmpfs")
    try:
        with pytest.raises(ArtifactError, match="the disk is full"), building(tmp_path / "openvino") as temporary:
            (temporary / "model.bin").write_bytes(bytes(1_000_000))
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="choose another --out"), building(tmp_path / "file" / "openvino"):
        pass
