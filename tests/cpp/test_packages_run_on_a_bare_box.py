"""`edgedistill package` makes one archive that classifies in an empty Debian root, with nothing installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sklearn.datasets

from edgedistill.runtime import Classifier
from edgedistill.runtime.package import Package, PackageSettings, package

pytestmark = [pytest.mark.cpp, pytest.mark.timeout(900)]
SUITE = "bookworm"
# What every box has, in a mount namespace that ends with the command: the loader and TBB ask /proc and /sys.
IN_THE_ROOT = """
mount -t proc proc "$0/proc" && mount -t sysfs sys "$0/sys" && exec chroot "$0" /bin/sh -c 'cd "$0" && exec "$@"' "$@"
"""
MAX_UNPACKED_BYTES = 130_000_000
PHOTO = Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"


@pytest.fixture(scope="module")
def packed(cpp_program: Callable[[str], Path], test_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    programs = cpp_program("edgedistill-classify").parent
    out = tmp_path_factory.mktemp("package") / "box.tar.gz"
    return package(PackageSettings(test_models / "single", out=out, programs=programs))


@pytest.fixture(scope="module")
def debian_root() -> Path:
    """The smallest Debian that there is, made once and kept outside the tree."""
    if shutil.which("debootstrap") is None or subprocess.run(["unshare", "--mount", "true"]).returncode:
        pytest.skip("an empty Debian root needs debootstrap and root's rights")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgedistill" / "test-roots"
    root = cache / f"{SUITE}-minbase"
    if not root.is_dir():
        unfinished = cache / f".{root.name}.{os.getpid()}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        subprocess.run(
            ["debootstrap", "--variant=minbase", SUITE, str(unfinished)], check=True, stdout=subprocess.DEVNULL
        )
        unfinished.replace(root)
    return root


@pytest.fixture
def box(debian_root: Path, packed: Package) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Runs a command in the root, in the folder where the archive was unpacked, with photo.jpg beside it."""
    place = debian_root / "srv" / f"test-{os.getpid()}"
    place.mkdir()
    with tarfile.open(packed.path) as archive:
        archive.extractall(place, filter="data")
    shutil.copy(PHOTO, place / "box" / "photo.jpg")

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        inside = f"/{place.relative_to(debian_root)}/box"
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": inside}
        shell = ["unshare", "--mount", "sh", "-c", IN_THE_ROOT, str(debian_root), inside]
        return subprocess.run([*shell, *command], capture_output=True, text=True, env=environment, timeout=120)

    yield run
    shutil.rmtree(place)


def test_the_box_is_bare(debian_root: Path) -> None:
    found = [path.name for path in (debian_root / "usr" / "lib").rglob("lib*.so*")]
    assert not [
        name
        for name in found
        if name.startswith(("libopenvino", "libtbb", "libjpeg", "libpng", "libdeflate", "libwebp"))
    ]
    assert not list((debian_root / "usr" / "bin").glob("python*"))


def test_a_photograph_is_classified_as_python_does(
    box: Callable[..., subprocess.CompletedProcess[str]], test_models: Path
) -> None:
    expected = Classifier(test_models / "single").classify(PHOTO)
    result = box("bin/edgedistill-classify", "model", "photo.jpg")
    assert result.returncode == 0, result.stderr
    name, answer = result.stdout.rstrip("\n").split("\t")
    label, _, probability = answer.rpartition(" ")
    assert (name, label) == ("photo.jpg", expected.label)
    assert float(probability) == pytest.approx(expected.probability, abs=1.1e-4)


def test_every_library_but_glibc_is_the_packages_own(box: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = box("ldd", "bin/edgedistill-classify")
    assert result.returncode == 0, result.stderr
    paths = [line.split(" => ")[1].split(" (")[0] for line in result.stdout.splitlines() if " => " in line]
    assert any("libopenvino.so" in path for path in paths)
    glibc = ("libc.so", "libm.so", "libdl.so", "libpthread.so", "ld-linux")
    outside = [path for path in paths if "/box/" not in path and not Path(path).name.startswith(glibc)]
    assert not outside


def test_the_benchmark_runs_there(box: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = box("bin/edgedistill-bench", "--help")
    assert result.returncode == 0 and "--rounds" in result.stdout, result.stdout + result.stderr


def test_it_is_small_and_the_same_every_time(
    packed: Package, test_models: Path, tmp_path: Path, cpp_program: Callable[[str], Path]
) -> None:
    assert packed.unpacked_bytes <= MAX_UNPACKED_BYTES and packed.packed_bytes == packed.path.stat().st_size
    programs = cpp_program("edgedistill-classify").parent
    again = package(PackageSettings(test_models / "single", out=tmp_path / "box.tar.gz", programs=programs))
    assert again.path.read_bytes() == packed.path.read_bytes()
    with tarfile.open(packed.path) as archive:
        assert sum(entry.size for entry in archive if entry.isreg()) == packed.unpacked_bytes
