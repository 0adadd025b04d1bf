"""`edgedistill package`: one archive for a box where nothing is installed: programs, libraries, model.

The libraries are those that the programs name (``ldd``), and what OpenVINO loads by itself: its IR frontend, its CPU
plugin and TBB's binding. glibc stays the box's own. Inside the archive everything finds everything by its place.
"""

from __future__ import annotations

import gzip
import os
import platform
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgedistill import __version__
from edgedistill.artifacts import atomic_path
from edgedistill.errors import ArtifactError, UsageError
from edgedistill.runtime.bundle import Bundle, int8_path
from edgedistill.runtime.cpp_programs import find_cpp_program
from edgedistill.runtime.package_notices import write_notices

PROGRAMS = ("edgedistill-classify", "edgedistill-bench")
# The same archive from the same files, whenever and by whomever it is made.
MTIME = 315_532_800  # 1980-01-01
_GLIBC = re.compile(
    r"(ld-linux|ld64|lib(c|m|dl|rt|pthread|resolv|util|anl|mvec|nsl|nss_[a-z]+|thread_db|BrokenLocale)\.so)"
)
_LDD_LINE = re.compile(r"^\s*(?P<name>\S+)(?: => (?P<path>.+?))?(?: \(0x[0-9a-f]+\))?$")
README = """{name}
{underline}

An image classifier for Linux on {machine} with glibc {glibc} or newer. Nothing has to be installed.

    bin/edgedistill-classify model photo.jpg folder/ --csv answers.csv
    bin/edgedistill-bench model --images folder/

Both say more with --help. The folder can be moved as a whole; about {megabytes} MB. Compiled models are kept in
$EDGEDISTILL_CACHE, else in ~/.cache/edgedistill, so that the second start is fast (--no-cache: never).

bin/       edgedistill {version}
lib/       its libraries, OpenVINO's among them; NOTICE and LICENSES/ say where they come from
model/     the network and deploy.json, which says how it is run. Labels: {labels}
"""


@dataclass(frozen=True)
class PackageSettings:
    """``path``: an openvino/ folder. ``out`` None: RUN-linux-MACHINE.tar.gz beside it. ``programs``: their folder."""

    path: Path
    out: Path | None = None
    programs: Path | None = None

    def __post_init__(self) -> None:
        if self.out is not None and not self.out.name.endswith((".tar.gz", ".tgz")):
            raise UsageError(f"--out {self.out}: expected a name that ends in .tar.gz or .tgz")


@dataclass(frozen=True)
class Package:
    """``files``: the paths inside, without the folder that they lie in."""

    path: Path
    unpacked_bytes: int
    packed_bytes: int
    files: tuple[str, ...]


def package(settings: PackageSettings) -> Package:
    """Writes the archive, whole or not at all.

    Raises ArtifactError when the folder is no deployable, the C++ programs are not built, or a library is missing.
    """
    bundle = _load(settings.path)
    programs = find_programs(settings.programs)
    out = settings.out or default_out(bundle.root)
    name = out.name.removesuffix(".tgz").removesuffix(".tar.gz")
    libraries = needed_libraries(programs)
    with tempfile.TemporaryDirectory(prefix="edgedistill-package-") as temporary:
        root = Path(temporary) / name
        _copy({f"bin/{program.name}": program for program in programs}, root)
        _copy({f"lib/{soname}": path for soname, path in libraries.items()}, root)
        _copy({f"model/{file}": bundle.root / file for file in deployable_files(bundle)}, root)
        (root / "model" / "labels.txt").write_text("".join(f"{label}\n" for label in bundle.labels), encoding="utf-8")
        bind_to_place(root)
        write_notices(root, libraries)
        _write_readme(root, bundle.labels)
        files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        unpacked = sum((root / file).stat().st_size for file in files)
        write_archive(root, out)
    return Package(out, unpacked, out.stat().st_size, tuple(files))


def _load(path: Path) -> Bundle:
    bundle = Bundle.load(path)
    if not (bundle.root / "deploy.json").is_file():
        raise ArtifactError(f"{path}: no deploy.json beside it; give the openvino/ folder that export-openvino wrote")
    return bundle


def default_out(folder: Path) -> Path:
    """runs/cells/openvino -> runs/cells/cells-linux-x86_64.tar.gz."""
    folder = folder.resolve()
    run = folder.parent.name if folder.name == "openvino" else folder.name
    return folder.parent / f"{run or 'model'}-linux-{platform.machine()}.tar.gz"


def deployable_files(bundle: Bundle) -> list[str]:
    """What the runtimes read: deploy.json and the IR files that it names, as paths inside the folder."""
    files = {"deploy.json"}
    for stage in bundle.config.stages:
        model = Path(stage.model)
        for xml in (model, int8_path(model)) if stage.int8_sha256 is not None else (model,):
            files |= {xml.as_posix(), xml.with_suffix(".bin").as_posix()}
    return sorted(files)


def find_programs(folder: Path | None) -> list[Path]:
    """Raises ArtifactError when one is missing."""
    found = {name: folder / name if folder is not None else find_cpp_program(name) for name in PROGRAMS}
    programs = [path for path in found.values() if path is not None and path.is_file()]
    if missing := [name for name, path in found.items() if path not in programs]:
        raise ArtifactError(
            f"{folder or 'C++ programs'}: no {' and no '.join(missing)}; build them with 'make cpp', or name their folder "
            "with --programs"
        )
    return programs


def needed_libraries(programs: Iterable[Path]) -> dict[str, Path]:
    """soname -> file, of everything but glibc that the programs and OpenVINO load."""
    libraries: dict[str, Path] = {}
    for program in programs:
        libraries |= linked_libraries(program)
    openvino = next((path for name, path in libraries.items() if re.match(r"libopenvino\.so", name)), None)
    if openvino is None:
        raise ArtifactError(f"{', '.join(map(str, programs))}: not linked with OpenVINO; build them with 'make cpp'")
    for pattern, required in (
        (f"libopenvino_ir_frontend{openvino.name.removeprefix('libopenvino')}", True),
        ("libopenvino_*_cpu_plugin.so", True),
        ("libtbbbind*.so*", False),
    ):
        found = sorted(openvino.parent.glob(pattern))
        if required and not found:
            raise ArtifactError(f"{openvino.parent}: no {pattern} beside {openvino.name}; build with pip's OpenVINO")
        for path in found:
            libraries |= {path.name: path} | linked_libraries(path)
    return dict(sorted(libraries.items()))


def linked_libraries(file: Path, environment: Mapping[str, str] | None = None) -> dict[str, Path]:
    """soname -> file of what the loader finds for it, directly or not, without glibc."""
    return parse_ldd(_run(["ldd", str(file)], environment), str(file))


def parse_ldd(text: str, name: str) -> dict[str, Path]:
    """Raises ArtifactError that names the libraries which the loader does not find."""
    found, missing = {}, []
    for line in text.splitlines():
        match = _LDD_LINE.match(line)
        if match is None or match["path"] is None or _GLIBC.match(match["name"].rpartition("/")[2]):
            continue
        if match["path"] == "not found":
            missing.append(match["name"])
        else:
            found[match["name"]] = Path(match["path"]).resolve()
    if missing:
        raise ArtifactError(f"{name}: needs {', '.join(missing)}, which is not found here; build it again")
    return found


def _copy(files: Mapping[str, Path], root: Path) -> None:
    for name, source in files.items():
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        target.chmod(0o755 if name.startswith("bin/") else 0o644)


def bind_to_place(root: Path) -> None:
    """Programs look in ../lib, for their libraries' sake too; nothing keeps a path of this machine.

    Raises ArtifactError when something would still be looked for outside.
    """
    programs, libraries = sorted((root / "bin").iterdir()), sorted((root / "lib").iterdir())
    for program in programs:
        # RPATH, not RUNPATH: it holds for libraries that say nothing themselves (libpng looks for libz).
        _run(["patchelf", "--force-rpath", "--set-rpath", "$ORIGIN/../lib", str(program)])
    for library in libraries:
        if _run(["patchelf", "--print-rpath", str(library)]).strip() not in ("", "$ORIGIN"):
            _run(["patchelf", "--force-rpath", "--set-rpath", "$ORIGIN", str(library)])
    for program in programs:
        outside = [
            f"{soname} ({path})"
            for soname, path in linked_libraries(program, {"PATH": os.defpath}).items()
            if path.parent != (root / "lib").resolve()
        ]
        if outside:
            raise ArtifactError(f"{program.name}: would look outside the package for {', '.join(outside)}")


def _run(command: list[str], environment: Mapping[str, str] | None = None) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
    except FileNotFoundError as error:
        raise ArtifactError(f"{command[0]}: not installed here; 'make cpp-packages' installs it") from error
    if result.returncode:
        reason = (result.stderr or result.stdout).strip() or f"exit code {result.returncode}"
        raise ArtifactError(f"{' '.join(command)}: {reason}")
    return result.stdout


def _write_readme(root: Path, labels: tuple[str, ...]) -> None:
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    text = README.format(
        name=root.name,
        underline="=" * len(root.name),
        machine=platform.machine(),
        glibc=platform.libc_ver()[1],
        megabytes=round(size / 1e6),
        version=__version__,
        labels=", ".join(labels[:20]) + (", ..." if len(labels) > 20 else ""),
    )
    (root / "README.txt").write_text(text, encoding="utf-8")


def write_archive(root: Path, out: Path) -> None:
    """The folder as .tar.gz: names sorted, times, owners and modes fixed, so that equal files give equal bytes."""
    with (
        atomic_path(out) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=MTIME) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in (root, *sorted(root.rglob("*"))):
            entry = archive.gettarinfo(path, path.relative_to(root.parent).as_posix())
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = MTIME
            entry.mode = 0o755 if entry.isdir() or path.stat().st_mode & 0o100 else 0o644
            if entry.isreg():
                with path.open("rb") as file:
                    archive.addfile(entry, file)
            else:
                archive.addfile(entry)
