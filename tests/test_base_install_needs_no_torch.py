"""`pip install .` in an environment of its own: predict and bench-fps work where torch, onnx and timm are not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder bin/ of a fresh virtual environment with the base install, made from a copy of the tracked files."""
    source = tmp_path_factory.mktemp("source") / "edgedistill"
    subprocess.run(["git", "checkout-index", "-a", f"--prefix={source}/"], cwd=ROOT, check=True)
    home = tmp_path_factory.mktemp("base")
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    pip = [str(home / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), str(source)], check=True)
    return home / "bin"


def run(program: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_predict_and_bench_run_without_the_training_extras(
    environment: Path, tiny_run: Path, photos: Path, tmp_path: Path
) -> None:
    listed = run(environment / "pip", "list", "--format", "json", cwd=tmp_path).stdout
    names = {package["name"].lower() for package in json.loads(listed)}
    assert not names & {"torch", "timm", "onnx", "onnxruntime", "nncf", "scikit-learn", "albumentations", "matplotlib"}
    imported = run(environment / "python", "-c", "import edgedistill.runtime as r; print(r.__file__)", cwd=tmp_path)
    assert str(environment.parent) in imported.stdout

    answers = run(environment / "edgedistill", "predict", tiny_run / "openvino", photos / "bar", cwd=tmp_path)
    assert len(answers.stdout.splitlines()) == 30 and "error" not in answers.stdout
    options = ["--rounds", 1, "--seconds", 0.1, "--out", tmp_path / "bench.json", "--json"]
    record = json.loads(run(environment / "bench-fps", tiny_run / "openvino", *options, cwd=tmp_path).stdout)
    assert {row["candidate"] for row in record["results"]} >= {"edgedistill", "naive-f32"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_stage_lands_in_the_top_level_of_site_packages(environment: Path) -> None:
    site = next((environment.parent / "lib").glob("python3*/site-packages"))
    ours = {path.name for path in site.iterdir()} & {"teacher", "student", "export", "runtime", "benchmarks", "tests"}
    assert not ours
    assert {path.name for path in (site / "edgedistill").iterdir()} >= {"runtime", "export", "benchmarks", "py.typed"}


@pytest.mark.slow
def test_training_commands_name_the_extra_that_is_missing(environment: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [str(environment / "distill"), "--data", "elpv", "--out", str(tmp_path / "x")], capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "pip install" in result.stderr and "Traceback" not in result.stderr
