"""OpenVINO Model API classifies with our IR unchanged. Its half needs the environment that `make peers` builds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from edgedistill.benchmarks.model_api_parity import _logit_margins, compare
from edgedistill.errors import UsageError
from edgedistill.export import ir
from edgedistill.export.export import ExportSettings, export_openvino
from edgedistill.export.metadata import sections
from edgedistill.export.network import Network
from edgedistill.images import InputSpec, load_image, normalize
from edgedistill.metrics import softmax
from edgedistill.runtime import Classifier, Prediction
from edgedistill.tasks import Head, Task
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


# ---- several heads ----

ONE = Head("label", "softmax", ("big dog", "cat", "ox"))
COLOR, SHAPE = Head("color", "softmax", ("blue", "green", "red")), Head("shape", "softmax", ("bar", "disc"))
MANY = Head("labels", "sigmoid", ("a b", "c", "d"))
SIZE, AGE = Head("size", "regression", mean=10.0, std=4.0), Head("age of it", "regression", mean=30.0, std=9.0)
TASKS = {
    "attributes": (COLOR, SHAPE),
    "attributes and a value": (COLOR, SHAPE, SIZE),
    "attributes and two values": (COLOR, SHAPE, SIZE, AGE),
    "one label and a value": (ONE, SIZE),
    "one label and two values": (ONE, SIZE, AGE),
    "several labels": (MANY,),
    "several labels and a value": (MANY, SIZE),
    "several labels and two values": (MANY, SIZE, AGE),
    "an attribute, several labels and a value": (COLOR, MANY, SIZE),
    "one label of a set and a value": (Head("labels", "sigmoid", ("c",)), SIZE),
}
# Runs where edgedistill is not installed: what Model API says of each image, and what it warned of.
ASK_MODEL_API = """
import io, json, logging, sys
import cv2
from model_api.models import Model
question = json.load(open(sys.argv[1]))
said = io.StringIO()
logging.getLogger().addHandler(logging.StreamHandler(said))
images = [cv2.imread(path) for path in question["images"]]
answers = {}
for name, path in question["models"].items():
    for kind in ("greedy", "probabilistic"):
        model = Model.create_model(path, configuration={"hierarchical_postproc": kind})
        found = [[[int(label.id), str(label.name), float(label.confidence)] for label in model(image).top_labels] for image in images]
        answers.setdefault(name, {})[kind] = found
json.dump({"answers": answers, "said": said.getvalue()}, open(sys.argv[2], "w"))
"""


def network_of(heads: tuple[Head, ...]) -> Network:
    """Random weights."""
    task = Task(heads)
    torch.manual_seed(1)
    module = create_model("resnet10t", class_count=task.width).eval()
    torch.nn.init.normal_(module.get_classifier().weight)
    return Network(
        module=module, architecture="resnet10t", classes=task.outputs, spec=InputSpec(32, 32), temperature=1.0,
        dataset_hash="", weights_hash="", heads=None if task.is_single else task,
    )  # fmt: skip


def answering_variously(network: Network, photos: list[Path]) -> Network:
    """Every logit is 0 on average over the photographs, with a standard deviation of 2."""
    pixels = np.stack([load_image(path, network.spec) for path in photos])
    with torch.no_grad():
        logits = network.module(torch.from_numpy(normalize(pixels, network.spec)))
        layer = network.module.get_classifier()
        scale = 2 / logits.std(dim=0)
        layer.weight *= scale[:, None]
        layer.bias.copy_(scale * (layer.bias - logits.mean(dim=0)))
    return network


def expected_names(task: Task, answer: Prediction) -> list[str]:
    """The labels that hold of the image, as Model API writes them."""
    if task.is_multi_label:
        names = [task.heads[0].classes[number] for number in answer.accepted]
    else:
        classes = {head.name: head.classes for head in task.heads}
        names = [
            f"{head.name}={classes[head.name][number]}"
            for head in answer.heads
            if head.value is None
            for number in (head.accepted if task_kind(task, head.name) == "sigmoid" else (head.index,))
        ]
    return sorted(name.replace(" ", "_") for name in names)


def task_kind(task: Task, name: str) -> str:
    return next(head.kind for head in task.heads if head.name == name)


@pytest.fixture(scope="module")
def models(images: list[tuple[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """model.xml of each of ``TASKS``."""
    root = tmp_path_factory.mktemp("tasks")
    paths = {}
    for number, (name, heads) in enumerate(TASKS.items()):
        network = answering_variously(network_of(heads), [path for _, path in images])
        model, _ = ir.convert(network.module, network.spec, onnx_file=root / "none.onnx")
        ir.describe(model, network)
        paths[name] = root / f"{number}.xml"
        ir.save(model, paths[name])
    return paths


@pytest.mark.benchmark_env
@pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="run `make peers` first")
def test_model_api_gives_every_heads_labels(
    models: dict[str, Path], images: list[tuple[str, Path]], tmp_path: Path
) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(len(images))]
    for path, (_, image) in zip(paths, images, strict=True):
        cv2.imwrite(str(path), load_image(image, InputSpec(32, 32)))
    question = {"images": [str(path) for path in paths], "models": {name: str(path) for name, path in models.items()}}
    (tmp_path / "question.json").write_text(json.dumps(question))
    command = [str(PEERS_PYTHON), "-c", ASK_MODEL_API, str(tmp_path / "question.json"), str(tmp_path / "answer.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert "Inserted 'other'" not in answer["said"] + done.stderr
    for name, heads in TASKS.items():
        task = Task(heads)
        classifier = Classifier(models[name], precision="f32", threads=1, cache_dir=False)
        ours = [classifier.classify(path) for path in paths]
        wanted = [expected_names(task, one) for one in ours]
        assert len({tuple(names) for names in wanted}) > 1, f"{name}: every image has the same labels"
        outputs = [output.replace(" ", "_") for output in task.outputs]
        for kind, found in answer["answers"][name].items():
            assert [sorted(label for _, label, _ in labels) for labels in found] == wanted, f"{name}, {kind}"
            for labels, one in zip(found, ours, strict=True):
                for index, label, confidence in labels:
                    assert outputs[index] == label
                    assert confidence == pytest.approx(one.probabilities[index], abs=1e-4)


def test_every_output_has_a_name_for_model_api() -> None:
    for name, heads in TASKS.items():
        network = network_of(heads)
        found = sections(network)["model_info"]
        assert found["labels"].split() == [output.replace(" ", "_") for output in network.task.outputs], name
        assert found["multilabel"] == str(name == "several labels")
        assert ("hierarchical_config" in found) == (name != "several labels")
    config = json.loads(sections(network_of(TASKS["attributes and two values"]))["model_info"]["hierarchical_config"])
    info = config["cls_heads_info"]
    assert info["head_idx_to_logits_range"] == {"0": [0, 3], "1": [3, 5]} and config["label_tree_edges"] == []
    assert info["all_groups"][1] == ["shape=bar", "shape=disc"] and len(info["all_groups"]) == 2


def test_values_beside_several_labels_hang_below_a_label_that_is_never_given() -> None:
    info = sections(network_of(TASKS["several labels and two values"]))["model_info"]
    config = json.loads(info["hierarchical_config"])
    heads = config["cls_heads_info"]
    assert heads["num_multilabel_classes"] == 5 and heads["num_single_label_classes"] == 0
    never = {parent for _, parent in config["label_tree_edges"]}
    assert [child for child, _ in config["label_tree_edges"]] == ["size", "age_of_it"] and len(never) == 1
    assert never.isdisjoint(label for group in heads["all_groups"] for label in group)
    assert never.isdisjoint(info["labels"].split()) and never <= set(heads["label_to_idx"])


@pytest.mark.parametrize("heads", [(Head("labels", "sigmoid", ("c",)),), (MANY, COLOR)])
def test_what_model_api_cannot_read_says_nothing_to_it(heads: tuple[Head, ...]) -> None:
    found: dict[str, Any] = sections(network_of(heads))
    assert set(found) == {"edgedistill"} and json.loads(found["edgedistill"]["labels"]) == list(Task(heads).outputs)
