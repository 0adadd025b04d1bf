"""The promises of the layout: imports go one way, the package list is whole, one OpenCV, nothing heavy at start."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgedistill import pipeline
from edgedistill.cli import app
from edgedistill.training import processes

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
STAGES = ("teacher", "student", "export", "runtime", "benchmarks")


def test_imports_go_one_way() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_package_list_is_complete() -> None:
    folders = {path.parent for path in (ROOT / "src" / "edgedistill").rglob("__init__.py")}
    found = {".".join(folder.relative_to(ROOT / "src").parts) for folder in folders}
    for stage in STAGES:
        for path in (ROOT / stage).rglob("__init__.py"):
            found.add(".".join(("edgedistill", *path.parent.relative_to(ROOT).parts)))
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == found


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_a_folder_that_type_checkers_see(stage: str) -> None:
    link = ROOT / "src" / "edgedistill" / stage
    assert link.is_symlink() and link.resolve() == ROOT / stage
    assert PYPROJECT["tool"]["setuptools"]["package-dir"][f"edgedistill.{stage}"] == stage


def test_both_opencv_wheels_are_one_version() -> None:
    versions = {name: importlib.metadata.version(name) for name in ("opencv-python", "opencv-python-headless")}
    assert len(set(versions.values())) == 1, f"{versions} share the folder cv2; install one version of both"


def test_command_line_starts_without_heavy_imports() -> None:
    code = (
        "import sys, edgedistill.cli; heavy = {'torch', 'timm', 'cv2', 'openvino', 'onnx', 'nncf', 'sklearn',"
        " 'matplotlib', 'albumentations', 'numpy'} & set(sys.modules); print(sorted(heavy))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_runtime_needs_neither_torch_nor_the_training_extras() -> None:
    code = (
        "import sys\n"
        "blocked = ('torch', 'timm', 'onnx', 'onnxruntime', 'nncf', 'sklearn', 'albumentations', 'matplotlib', 'scipy')\n"
        "for name in blocked: sys.modules[name] = None\n"
        "import edgedistill.runtime, edgedistill.benchmarks.bench_fps\n"
        "print('ok')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "ok", result.stderr


def test_nothing_committed_is_a_weight_or_a_data_set() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    wrong = [path for path in files if path.suffix in {".pt", ".pth", ".onnx", ".bin", ".pkl", ".npz", ".safetensors"}]
    large = [path for path in files if path.is_file() and path.stat().st_size > 3_000_000]
    assert not wrong and not large


def code_blocks(path: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / path).read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("page", ["README.md", "runtime/cpp/README.md"])
def test_the_readmes_show_the_line_that_installs_debians_packages(page: str) -> None:
    shown = [line for block in code_blocks(page, "sh") for line in block.splitlines() if "apt-get install" in line]
    run = subprocess.run(["make", "-n", "cpp-packages"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown == re.findall(r"apt-get install [^;\n]*", run)


@pytest.mark.parametrize("page", ["README.md", "runtime/cpp/README.md"])
def test_the_readmes_show_the_consumer_project_that_is_built(page: str) -> None:
    consumer = ROOT / "runtime" / "cpp" / "tests" / "consumer"
    assert (consumer / "main.cpp").read_text() in code_blocks(page, "cpp")
    assert (consumer / "CMakeLists.txt").read_text() in code_blocks(page, "cmake")


def test_the_readmes_trainings_are_settings_that_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = "\n".join(code_blocks("README.md", "sh")).replace("\\\n", " ").splitlines()
    commands = [line.split("#")[0] for line in lines if line.startswith("distill ")]
    commands.remove(next(command for command in commands if command.split() == ["distill", "--help-teacher"]))
    commands += [f"distill --data x --out y {flags}" for flags in re.findall(r"LDAM-DRW: `([^`]+)`", text)]
    assert len(commands) > 6 and "ldam" in commands[-1]
    asked = []
    monkeypatch.setattr(pipeline, "distill", lambda settings, resume: asked.append(settings) or sys.exit(0))
    monkeypatch.setattr(processes, "launch", lambda count, arguments: asked.append((count, arguments)) or 0)
    for command in commands:
        name = re.sub("FILE.toml|NAME", "fast-start", command)
        result = CliRunner().invoke(app, shlex.split(name))
        assert result.exit_code == 0, (command, result.output, result.exception)
    assert len(asked) == len(commands)


def test_cpp_and_python_have_one_version() -> None:
    cpp = ROOT / "runtime" / "cpp"
    header = (cpp / "include" / "edgedistill" / "version.hpp").read_text()
    version = PYPROJECT["project"]["version"]
    assert f'EDGEDISTILL_VERSION_STRING "{version}"' in header
    assert re.findall(r"VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header) == version.split(".")
    assert f"project(edgedistill VERSION {version} " in (cpp / "CMakeLists.txt").read_text()
    assert tomllib.loads((cpp / "python" / "pyproject.toml").read_text())["project"]["version"] == version


def test_cmake_builds_every_source_and_every_test() -> None:
    cpp = ROOT / "runtime" / "cpp"
    library, tests = ((cpp / folder / "CMakeLists.txt").read_text() for folder in ("", "tests"))
    sources = {f"src/{path.name}" for path in (cpp / "src").glob("*.cpp")}
    assert set(re.findall(r"^  (src/\S+\.cpp)$", library, re.M)) == sources
    assert not [path.name for path in (cpp / "tests").glob("*.c*") if path.name.split(".")[0] not in tests]
