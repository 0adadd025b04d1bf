"""`edgedistill package`: the right files, the same bytes every time, whole or absent, and errors that name the remedy."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from edgedistill.errors import ArtifactError, UsageError
from edgedistill.runtime import package as packages
from edgedistill.runtime.bundle import Bundle, DeployConfig, describe_stage, int8_path, write_deploy
from edgedistill.runtime.package import PackageSettings, package, parse_ldd, write_archive

LDD = """\
\tlinux-vdso.so.1 (0x00007ffc1c5f2000)
\tlibedgedistill.so.0 => /opt/a folder/lib/libedgedistill.so.0 (0x00007f8d4c000000)
\tlibopenvino.so.2641 => /opt/ov/libopenvino.so.2641 (0x00007f8d4a000000)
\tlibmd.so.0 => /lib/libmd.so.0 (0x00007f8d49f00000)
\tlibm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x00007f8d49e00000)
\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f8d49c00000)
\tlibpthread.so.0 => /lib/x86_64-linux-gnu/libpthread.so.0 (0x00007f8d49b00000)
\t/lib64/ld-linux-x86-64.so.2 (0x00007f8d4d000000)
\tld-linux-x86-64.so.2 => /lib64/ld-linux-x86-64.so.2 (0x00007f8d4d000000)
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with two programs that need nothing but glibc."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in packages.PROGRAMS:
        (folder / name).write_bytes(Path("/bin/true").read_bytes())
        (folder / name).chmod(0o755)
    return folder


def with_int8(root: Path) -> Path:
    xml = root / "stages" / "tiny" / "model.xml"
    for path in (xml, xml.with_suffix(".bin")):
        int8_path(xml).with_suffix(path.suffix).write_bytes(path.read_bytes())
    spec = Bundle.load(xml).metadata[0].input_spec
    stage = describe_stage(root, "stages/tiny/model.xml", input_spec=spec, temperature=1.5)
    write_deploy(root / "deploy.json", DeployConfig(stages=(stage,)))
    return root


def test_everything_that_the_loader_finds_is_taken_but_glibc() -> None:
    found = parse_ldd(LDD, "edgedistill-classify")
    assert list(found) == ["libedgedistill.so.0", "libopenvino.so.2641", "libmd.so.0"]
    assert found["libedgedistill.so.0"] == Path("/opt/a folder/lib/libedgedistill.so.0")


def test_a_library_that_is_not_found_is_named() -> None:
    with pytest.raises(ArtifactError, match=r"edgedistill-bench: needs libopenvino\.so\.2641, which is not found"):
        parse_ldd("\tlibopenvino.so.2641 => not found\n", "edgedistill-bench")


def test_only_what_deploy_json_names_is_packed(make: Any) -> None:
    root = make.deployable()
    (root / "stages" / "tiny" / "model.onnx").write_bytes(b"not needed on the box")
    plain = ["deploy.json", "stages/tiny/model.bin", "stages/tiny/model.xml"]
    assert packages.deployable_files(Bundle.load(root)) == plain
    int8 = ["stages/tiny/model-int8.bin", "stages/tiny/model-int8.xml"]
    assert packages.deployable_files(Bundle.load(with_int8(root))) == sorted(plain + int8)


def test_every_stage_of_a_cascade_is_packed(make: Any) -> None:
    files = packages.deployable_files(Bundle.load(make.cascade(exit_threshold=0.9)))
    assert files == ["deploy.json", "fast.bin", "fast.xml", "slow.bin", "slow.xml"]


def test_programs_that_are_not_built_are_named_with_the_remedy(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no edgedistill-classify and no edgedistill-bench; build.*make cpp"):
        package(PackageSettings(make.deployable(), programs=tmp_path))


def test_a_folder_that_is_no_deployable_is_refused(make: Any, programs: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="run export-openvino first"):
        package(PackageSettings(tmp_path / "bin", programs=programs))
    alone = make.ir(tmp_path / "alone" / "model.xml")
    with pytest.raises(ArtifactError, match=r"no deploy\.json"):
        package(PackageSettings(alone, programs=programs))


def test_programs_without_openvino_are_refused(make: Any, programs: Path) -> None:
    with pytest.raises(ArtifactError, match="not linked with OpenVINO"):
        package(PackageSettings(make.deployable(), programs=programs))


def test_a_damaged_model_is_never_packed(make: Any, programs: Path, tmp_path: Path) -> None:
    root = make.deployable()
    with (root / "stages" / "tiny" / "model.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtifactError, match="damaged or from another export"):
        package(PackageSettings(root, out=tmp_path / "x.tar.gz", programs=programs))
    assert not (tmp_path / "x.tar.gz").exists()


def test_the_name_says_what_it_is(make: Any) -> None:
    with pytest.raises(UsageError, match=r"\.tar\.gz"):
        PackageSettings(Path("x"), out=Path("cells.zip"))
    name = packages.default_out(Path("runs/cells/openvino")).name
    assert name == f"cells-linux-{os.uname().machine}.tar.gz"


def test_a_tool_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, programs: Path) -> None:
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(ArtifactError, match=r"ldd: not installed here; 'make cpp-packages'"):
        packages.linked_libraries(programs / packages.PROGRAMS[0])


def test_equal_files_give_equal_bytes(tmp_path: Path) -> None:
    archives = []
    for number in (1, 2):
        root = tmp_path / str(number) / "cells"
        for name in ("lib/b.so", "bin/a", "README.txt")[:: 1 if number == 1 else -1]:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(name, encoding="utf-8")
            (root / name).chmod(0o755 if name == "bin/a" else (0o600, 0o664)[number - 1])
            os.utime(root / name, (number * 1e6, number * 1e6))
        archives.append(tmp_path / f"{number}.tar.gz")
        write_archive(root, archives[-1])
    assert archives[0].read_bytes() == archives[1].read_bytes()
    with tarfile.open(archives[0]) as archive:
        entries = archive.getmembers()
        assert [entry.name for entry in entries] == [
            "cells", "cells/README.txt", "cells/bin", "cells/bin/a", "cells/lib", "cells/lib/b.so"
        ]  # fmt: skip
        assert {(entry.uid, entry.gid, entry.uname, entry.mtime) for entry in entries} == {(0, 0, "", packages.MTIME)}
        assert archive.getmember("cells/bin/a").mode == 0o755 and archive.getmember("cells/lib/b.so").mode == 0o644


def test_an_archive_is_whole_or_absent(
    make: Any, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "cells.tar.gz"
    monkeypatch.setattr(packages, "needed_libraries", lambda programs: {})
    monkeypatch.setattr(packages, "bind_to_place", lambda root: None)
    monkeypatch.setattr(gzip.GzipFile, "write", lambda *_: (_ for _ in ()).throw(OSError("broken")))
    with pytest.raises(OSError, match="broken"):
        package(PackageSettings(make.deployable(), out=out, programs=programs))
    assert list(out.parent.iterdir()) == []


def test_the_command_says_what_went_wrong_in_one_line(make: Any, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "edgedistill",
        "package",
        str(make.deployable()),
        "--programs",
        str(tmp_path / "no"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and "make cpp" in result.stderr and "Traceback" not in result.stderr
