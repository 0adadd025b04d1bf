"""Where the bundled libraries come from and under which licences: NOTICE and LICENSES/ of a package."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgedistill import __version__, console

# Header-only libraries that are compiled into the programs.
COMPILED_IN = ("nlohmann-json3-dev", "libcli11-dev")
DOCUMENTS = Path("/usr/share/doc")
_COMMON_LICENSE = re.compile(r"/usr/share/common-licenses/([A-Za-z0-9.+-]*[A-Za-z0-9])")


@dataclass(frozen=True)
class Origin:
    """A package with its version, and its licence files: name in LICENSES/ -> file."""

    package: str
    version: str
    licences: Mapping[str, Path]


def write_notices(root: Path, libraries: Mapping[str, Path]) -> None:
    """``libraries``: name in lib/ -> where it was taken from. A library without a licence text is warned of."""
    own = Origin("edgedistill", __version__, _own_licence())
    taken: dict[str, tuple[Origin, list[str]]] = {own.package: (own, ["bin/*"])}
    for soname, path in libraries.items():
        origin = own if soname.startswith("libedgedistill") else find_origin(path)
        if origin is None or not origin.licences:
            console.warn(f"{soname}: no licence text found here; add it to LICENSES/ before you hand the package on")
            origin = Origin(str(path), "", {})
        taken.setdefault(origin.package, (origin, []))[1].append(f"lib/{soname}")
    for package in COMPILED_IN:
        if (origin := _debian_origin(package)) is not None:
            taken[package] = (origin, ["compiled into bin/* and libedgedistill"])
    (root / "LICENSES").mkdir()
    lines = [
        "What this package holds, unchanged but for search paths, where it was taken from, and the licence texts.",
        "",
    ]
    for origin, files in taken.values():
        _copy_licences(origin.licences, root / "LICENSES")
        lines += [f"{origin.package} {origin.version}".rstrip(), f"    {', '.join(files)}"]
        lines += [f"    LICENSES/{name}" for name in sorted(origin.licences)]
    (root / "NOTICE").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _copy_licences(licences: Mapping[str, Path], folder: Path) -> None:
    """With the common licences that they point to, which the box may not have."""
    for name, path in licences.items():
        shutil.copyfile(path, folder / name)
        for common in set(_COMMON_LICENSE.findall(path.read_text(encoding="utf-8", errors="replace"))):
            source = Path("/usr/share/common-licenses", common)
            if source.is_file():
                shutil.copyfile(source, folder / f"{common}.txt")


def _own_licence() -> dict[str, Path]:
    beside = Path(__file__).resolve().parent.parent / "LICENSE"
    if beside.is_file():
        return {"edgedistill.txt": beside}
    installed = [path for name, path in _distribution("edgedistill").items() if name.endswith("LICENSE")]
    return {"edgedistill.txt": installed[0]} if installed else {}


def find_origin(library: Path) -> Origin | None:
    """pip's openvino, or the Debian package that owns the file; None: from elsewhere."""
    files = _distribution("openvino")
    if library in (path.resolve() for path in files.values() if path.name == library.name):
        licences = {
            f"openvino-{path.name.removesuffix('.txt')}.txt": path
            for name, path in files.items()
            if "licenses/" in name or path.name == "LICENSE"
        }
        return Origin("openvino", importlib.metadata.version("openvino"), licences)
    owner = _dpkg("--search", str(library)) or _dpkg("--search", str(library).removeprefix("/usr"))
    return _debian_origin(owner.partition(":")[0]) if owner else None


def _distribution(name: str) -> dict[str, Path]:
    """Its files as pip recorded them."""
    try:
        files = importlib.metadata.distribution(name).files or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {file.as_posix(): Path(str(file.locate())) for file in files}


def _debian_origin(package: str) -> Origin | None:
    version = _dpkg("--show", "--showformat=${Version}", package)
    text = DOCUMENTS / package / "copyright"
    return (
        Origin(f"Debian's {package}", version, {f"{package}.txt": text} if text.is_file() else {}) if version else None
    )


def _dpkg(*arguments: str) -> str:
    """Its answer, or nothing: not known, or no Debian."""
    try:
        result = subprocess.run(["dpkg-query", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
