"""OpenVINO Model API classifies with our IR unchanged. Its half needs the environment that `make peers` builds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from edgedistill.benchmarks.model_api_parity import _logit_margins, compare
from edgedistill.errors import UsageError
from edgedistill.export.export import ExportSettings, export_openvino
from edgedistill.images import InputSpec
from edgedistill.metrics import softmax
from edgedistill.runtime import Classifier
from edgedistill.training.checkpoints import write_model
from edgedistill.training.models import create_model

PEERS_PYTHON = Path(__file__).resolve().parent.parent / ".venv-peers" / "bin" / "python"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of 12 convolutions with random weights, exported without proof."""
    root = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    network = create_model("resnet10t", class_count=3).eval()
    torch.nn.init.normal_(network.get_classifier().weight, std=0.5)
    write_model(
        root / "model.pt", network, architecture="resnet10t", model_kwargs={"num_classes": 3}, settings={},
        classes=("big dog", "cat", "ox"), input_spec=InputSpec(32, 32), dataset_hash="", temperature=1.5,
    )  # fmt: skip
    return export_openvino(ExportSettings(model=root / "model.pt", int8="off", certificate=False, threads=1))


@pytest.fixture(scope="module")
def images(photos: Path) -> list[tuple[str, Path]]:
    return [(path.name, path) for path in sorted(photos.rglob("*.jpg"))[::6]]


@pytest.mark.benchmark_env
@pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="run `make peers` first")
def test_model_api_gives_our_classes(exported: Path, images: list[tuple[str, Path]]) -> None:
    record = compare(exported, images, peers_python=PEERS_PYTHON, threads=1)
    assert record["verdict"] == "pass" and record["n"] == len(images)
    assert record["resized"] == {
        "disagreement": 0.0,
        "disagreement_above_margin": 0.0,
        "names_match": True,
        "plain_create_model_agrees": True,
        "probabilities_sum_to_one": True,
    }
    assert 0 <= record["original"]["disagreement"] <= 1


def stand_in(tmp_path: Path, answers: str) -> Path:
    """A 'peers' python' that writes these answers, to judge the comparison without the environment."""
    script = tmp_path / "python"
    code = f"import json, sys; n = len(json.load(open(sys.argv[4]))['images']); json.dump({answers}, open(sys.argv[5], 'w'))"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    script.chmod(0o755)
    return script


@pytest.mark.parametrize("wrong", [False, True])
def test_a_class_that_differs_fails_the_comparison(
    exported: Path, images: list[tuple[str, Path]], tmp_path: Path, wrong: bool
) -> None:
    classifier = Classifier(exported, precision="f32", threads=1, cache_dir=False)
    ours = [classifier.classify(path).index for _, path in images]
    given = [(index + 1) % 3 for index in ours] if wrong else ours
    names = [("big_dog", "cat", "ox")[index] for index in given]
    ones = [1.0] * len(ours)
    answers = {"index": given, "label": names, "plain_index": given, "raw_scores_sum": ones, "versions": {}}
    record = compare(exported, images, peers_python=stand_in(tmp_path, repr(answers)), threads=1)
    assert record["verdict"] == ("fail" if wrong else "pass")
    assert record["resized"]["names_match"]
    assert record["resized"]["disagreement"] == record["original"]["disagreement"] == float(wrong)
    assert len(record["differing_ids"]["resized"]) == (len(images) if wrong else 0)


def test_a_missing_or_broken_environment_is_named(
    exported: Path, images: list[tuple[str, Path]], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="make peers"):
        compare(exported, images[:1], peers_python=tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"model_api.*make peers"):
        compare(exported, images[:1], peers_python=Path(sys.executable))


def test_the_peers_half_imports_nothing_of_ours() -> None:
    """It has to start where edgedistill, torch and openvino's tools are not installed."""
    script = Path(sys.modules[compare.__module__].__file__ or "")
    blocked = "('edgedistill', 'torch', 'onnx', 'typer', 'rich')"
    code = (
        f"import sys, runpy\nfor name in {blocked}: sys.modules[name] = None\n"
        f"sys.argv = ['x', '--classify', 'm.xml', 'q.json', 'a.json']\n"
        f"try: runpy.run_path({str(script)!r}, run_name='__main__')\nexcept ImportError as error: print(error.name)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split(".")[0].strip() == "model_api"


def test_margins_are_logit_differences() -> None:
    logits = np.array([[1.0, 3.0, 2.5], [0.0, 0.0005, -4.0]])
    assert np.allclose(_logit_margins(softmax(logits, 2.5), 2.5), [0.5, 0.0005])
