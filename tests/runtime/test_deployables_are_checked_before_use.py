"""bundle.py: what is read from deploy.json and IR files holds together, or one error names the file and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

from edgedistill.errors import ArtifactError, ModelError
from edgedistill.images import InputSpec
from edgedistill.runtime import Classifier
from edgedistill.runtime.bundle import (
    MAX_METADATA_CHARACTERS,
    Bundle,
    DeployConfig,
    LatencySettings,
    ScoreSettings,
    Stage,
    ThroughputSettings,
    describe_stage,
    read_deploy,
    read_metadata,
    write_deploy,
)


def test_a_folder_a_run_a_deploy_json_and_an_ir_all_load(make: Any) -> None:
    root = make.deployable()
    ir = root / "stages" / "tiny" / "model.xml"
    for path in (root, root.parent, root / "deploy.json", ir, ir.parent, str(root)):
        bundle = Bundle.load(path)
        assert bundle.labels == make.labels
        assert bundle.config.stages[0].temperature == 1.5
        assert bundle.metadata[0].architecture == "tiny" and bundle.metadata[0].own


def test_deploy_json_survives_a_round_trip(make: Any) -> None:
    spec = InputSpec(height=48, width=64, resize="center-crop", crop_fraction=0.875)
    config = DeployConfig(
        stages=(Stage("a/model.xml", "0" * 64, spec, 1.25, 0.9, "f" * 64), Stage("b.xml", "1" * 64, spec)),
        latency=LatencySettings("int8", 2, later_precision="f32"),
        throughput=ThroughputSettings(
            "bf16", streams=4, threads=4, batch=2, pinning=False, later_batch=8, later_precision="int8"
        ),
        decode="full",
        reject_below=0.3,
        score=ScoreSettings(0.5, "macro-f1", "frames", 200.0),
        cpu="a processor",
        versions={"openvino": "1"},
    )
    write_deploy(make.folder / "deploy.json", config)
    assert read_deploy(make.folder / "deploy.json") == config


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": "edgedistill-deploy", "version": 1}', b"\xff"])
def test_a_broken_deploy_json_is_named(make: Any, content: bytes) -> None:
    root = make.deployable()
    (root / "deploy.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"deploy\.json"):
        Bundle.load(root)


STAGE_CHANGES: list[dict[str, Any]] = [
    {"model": "../outside/model.xml"},
    {"model": "/etc/model.xml"},
    {"model": "stages\\tiny\\model.xml"},
    {"model": "stages/tiny/model.pt"},
    {"model": 7},
    {"model": "stages/other/model.xml"},
    {"sha256": "0" * 64},
    {"sha256": None},
    {"sha256": "xyz"},
    {"int8_sha256": "0" * 64},
    {"temperature": 0},
    {"temperature": "hot"},
    {"temperature": float("nan")},
    {"exit_threshold": 1.5},
    {"exit_threshold": "0.5"},
    {"input_spec": None},
    {"input_spec": {"height": 32}},
    {"surprise": 1},
]


@pytest.mark.parametrize("change", STAGE_CHANGES, ids=str)
def test_hostile_stages_are_refused(make: Any, change: dict[str, Any]) -> None:
    root = make.deployable()
    values = json.loads((root / "deploy.json").read_text())
    values["stages"][0].update(change)
    (root / "deploy.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError):
        Bundle.load(root)


DEPLOY_CHANGES: list[dict[str, Any]] = [
    {"stages": []},
    {"stages": "all"},
    {"stages": [1]},
    {"latency": {"precision": "fp32", "threads": None}},
    {"latency": {"precision": "f32", "threads": 0}},
    {"latency": {"precision": "f32", "threads": 1e9}},
    {"latency": []},
    {"throughput": {"batch": 0}},
    {"throughput": {"batch": True}},
    {"throughput": {"pinning": "yes"}},
    {"throughput": {"later_batch": 0}},
    # Of the stages after the first, of which there are none.
    {"throughput": {"later_precision": "f32"}},
    {"latency": {"precision": "f32", "later_precision": "f32"}},
    {"throughput": {"later_precision": "fp32"}},
    {"throughput": {"later_precision": ""}},
    {"latency": {"later_precision": 8}},
    {"latency": {"later_precision": ["f32"]}},
    {"decode": "sideways"},
    {"reject_below": -1},
    {"score": {"w": 2}},
    {"score": {"metric": "speed"}},
    {"score": {"scope": "all"}},
    {"score": {"fps_target": 0}},
    {"version": 2},
    {"format": "other"},
    {"extra": 1},
]


@pytest.mark.parametrize("change", DEPLOY_CHANGES, ids=str)
def test_hostile_settings_are_refused(make: Any, change: dict[str, Any]) -> None:
    root = make.deployable()
    values = json.loads((root / "deploy.json").read_text()) | change
    (root / "deploy.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match=r"deploy\.json"):
        Bundle.load(root)


def test_changed_weights_are_noticed(make: Any) -> None:
    root = make.deployable()
    weights = root / "stages" / "tiny" / "model.bin"
    data = bytearray(weights.read_bytes())
    data[0] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.xml: sha256 .* deploy\.json says .* export the model again"):
        Bundle.load(root)
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"model\.bin: cannot be read"):
        Bundle.load(root)


def test_a_link_that_leads_outside_is_refused(make: Any) -> None:
    root = make.deployable()
    (root / "stages").rename(make.folder / "elsewhere")
    (root / "stages").symlink_to(make.folder / "elsewhere")
    with pytest.raises(ArtifactError, match="leads outside"):
        Bundle.load(root)


def test_paths_that_hold_no_deployable_say_what_is_expected(make: Any) -> None:
    (make.folder / "empty").mkdir()
    (make.folder / "model.pt").write_bytes(b"x")
    for name in ("empty", "missing", "model.pt"):
        with pytest.raises(ArtifactError, match=name):
            Bundle.load(make.folder / name)


@pytest.mark.parametrize("damage", ["text", "cut xml", "cut bin", "html"])
def test_a_damaged_ir_is_a_model_error(make: Any, damage: str) -> None:
    path = make.ir(make.folder / "model.xml")
    if damage == "cut bin":
        path.with_suffix(".bin").write_bytes(b"")
    else:
        content = path.read_bytes()
        path.write_bytes({"text": b"hello", "html": b"<html></html>"}.get(damage, content[: len(content) // 2]))
    with pytest.raises(ModelError, match=r"model\.xml: not a readable OpenVINO IR"):
        Bundle.load(path)


HUE = {"name": "hue", "kind": "softmax", "classes": ["red", "green"], "weight": 1.0}
DEPTH = {"name": "depth", "kind": "regression", "classes": [], "weight": 0.1, "mean": 5.0, "std": 2.0}


def heads_metadata(
    *heads: dict[str, Any], labels: tuple[str, ...] = ("hue=red", "hue=green", "depth")
) -> dict[str, str]:
    return {"task": "heads", "heads": json.dumps(heads), "labels": json.dumps(labels)}


METADATA_CHANGES = {
    "no heads": {"task": "heads"},
    "heads that are no list": heads_metadata() | {"heads": '{"a": 1}'},
    "a head that is no object": heads_metadata() | {"heads": '["hue"]'},
    "heads of other labels": heads_metadata(HUE, DEPTH, labels=("red", "green", "depth")),
    "two heads of one name": heads_metadata(HUE, HUE | {"classes": ["red", "blue"]}),
    "a value first": heads_metadata(DEPTH, HUE, labels=("depth", "hue=red", "hue=green")),
    "a head of another kind": heads_metadata(HUE | {"kind": "argmax"}, DEPTH),
    "a head with one class": heads_metadata(HUE | {"classes": ["red"]}, DEPTH),
    "a head with a number for a class": heads_metadata(HUE | {"classes": ["red", 1]}, DEPTH),
    "thresholds of more labels than there are": {"task": "multi-label", "thresholds": "[0.5, 0.5, 0.5, 0.5]"},
    "a threshold above 1": {"task": "multi-label", "thresholds": "[0.5, 1.5, 0.5]"},
    "a threshold that is no number": {"task": "multi-label", "thresholds": '[0.5, "a", true]'},
    "thresholds that are no list": {"task": "multi-label", "thresholds": '{"a": 1}'},
    "a head with a threshold too few": heads_metadata(HUE | {"kind": "sigmoid", "threshold": [0.5]}, DEPTH),
    "a head with a threshold below 0": heads_metadata(HUE | {"kind": "sigmoid", "threshold": [0.5, -0.1]}, DEPTH),
    "a head with no thresholds": heads_metadata(HUE | {"kind": "sigmoid", "threshold": []}, DEPTH),
    "an attribute with thresholds": heads_metadata(HUE | {"threshold": [0.5, 0.4]}, DEPTH),
    "a head with an unknown field": heads_metadata(HUE | {"x": 1}, DEPTH),
    "a head that says =": heads_metadata(HUE | {"name": "a=b"}, DEPTH),
    "a head with a nameless class": heads_metadata(
        HUE | {"classes": ["red", ""]}, DEPTH, labels=("hue=red", "hue=", "depth")
    ),
    "no spread": heads_metadata(HUE, DEPTH | {"std": 0.0}),
    "a mean that is no number": heads_metadata(HUE, DEPTH | {"mean": "5"}),
    "an endless weight": heads_metadata(HUE, DEPTH | {"weight": float("inf")}),
    "two labels": {"labels": '["a", "b"]'},
    "not JSON": {"labels": "a b c"},
    "numbers": {"labels": "[1, 2, 3]"},
    "an object": {"labels": '{"a": 1}'},
    "deep": {"labels": "[" * 100_000},
    "same twice": {"labels": '["a", "a", "b"]'},
    "empty name": {"labels": '["a", "", "b"]'},
    "terminal escapes": {"labels": json.dumps(["a", "b\x1b[2J", "c"])},
    "endless name": {"labels": json.dumps(["a", "b" * 2000, "c"])},
    "cold": {"temperature": "0"},
    "not a number": {"temperature": "nan"},
    "a word": {"temperature": "warm"},
    "two temperatures": {"temperature": "1 2"},
    "future": {"format_version": "2"},
    "other task": {"task": "regression"},
    "no spec": {"input_spec": "null"},
    "spec of another size": {"input_spec": json.dumps(InputSpec().to_dict())},
    "infinite spec": {"input_spec": json.dumps(InputSpec().to_dict()).replace("224", "1e999")},
}


@pytest.mark.parametrize("change", METADATA_CHANGES)
def test_hostile_metadata_are_refused(make: Any, change: str) -> None:
    path = make.ir(make.folder / "model.xml", changes=METADATA_CHANGES[change])
    with pytest.raises(ArtifactError, match=r"model\.xml"):
        Bundle.load(path)


def test_several_heads_are_read(make: Any) -> None:
    metadata = read_metadata(make.describe(make.model(), "edgedistill", make.own_metadata(
        InputSpec(height=32, width=32), **heads_metadata(HUE, DEPTH))), "m.xml")  # fmt: skip
    assert metadata.heads is not None and [head.name for head in metadata.heads.heads] == ["hue", "depth"]
    assert not metadata.multi_label and not metadata.gives_probabilities
    values = make.own_metadata(InputSpec(height=32, width=32), **heads_metadata(HUE, DEPTH))
    with pytest.raises(ArtifactError, match="several heads, but it ends in a Softmax"):
        read_metadata(make.describe(make.model(softmax=True), "edgedistill", values), "m.xml")


def test_a_giant_metadata_string_is_refused(make: Any) -> None:
    values = make.own_metadata(InputSpec(height=32, width=32), architecture="x" * (MAX_METADATA_CHARACTERS + 1))
    with pytest.raises(ArtifactError, match="longer than"):
        read_metadata(make.describe(make.model(), "edgedistill", values), "m.xml")


def test_missing_metadata_are_named(make: Any) -> None:
    values = make.own_metadata(InputSpec(height=32, width=32))
    del values["temperature"]
    with pytest.raises(ArtifactError, match=r"edgedistill\.temperature is missing"):
        read_metadata(make.describe(make.model(), "edgedistill", values), "m.xml")
    with pytest.raises(ModelError, match="says nothing about its labels"):
        read_metadata(make.model(), "m.xml")


MODEL_API = {
    "model_type": "Classification",
    "labels": "red green very_blue",
    "mean_values": "123.675 116.28 103.53",
    "scale_values": [58.395, 57.12, 57.375],
    "resize_type": "standard",
    "reverse_input_channels": "True",
}


def test_a_foreign_ir_describes_itself_through_model_api(make: Any) -> None:
    model = make.describe(make.model(), "model_info", MODEL_API | {"resize_type": "crop"})
    metadata = read_metadata(model, "m.xml")
    assert metadata.labels == ("red", "green", "very_blue") and not metadata.own and not metadata.bgr
    assert metadata.input_spec == InputSpec(height=32, width=32, resize="center-crop")
    bare = make.describe(
        make.model(bgr=True), "model_info", {"labels": "a b c", "mean_values": "[1, 2, 3]", "scale_values": "2"}
    )
    metadata = read_metadata(bare, "m.xml")
    assert metadata.bgr and metadata.input_spec.mean == (3.0, 2.0, 1.0) and metadata.input_spec.std == (2.0, 2.0, 2.0)


MODEL_API_CHANGES: list[dict[str, str]] = [
    {"labels": "one two"},
    {"resize_type": "fit_to_window"},
    {"embedded_processing": "True"},
    {"hierarchical": "True"},
    {"multilabel": "True", "confidence_threshold": "1.5"},
    {"multilabel": "True", "confidence_threshold": "sure"},
    {"mean_values": "a b c"},
    {"mean_values": "1 2"},
    {"scale_values": "0 0 0"},
    {"scale_values": "inf inf inf"},
]


@pytest.mark.parametrize("change", MODEL_API_CHANGES, ids=str)
def test_foreign_metadata_that_do_not_fit_are_refused(make: Any, change: dict[str, str]) -> None:
    with pytest.raises(ArtifactError):
        read_metadata(make.describe(make.model(), "model_info", MODEL_API | change), "m.xml")


def test_several_labels_at_once_are_told_from_one(make: Any) -> None:
    values = make.own_metadata(InputSpec(height=32, width=32), task="multi-label")
    metadata = read_metadata(make.describe(make.model(), "edgedistill", values), "m.xml")
    assert metadata.multi_label and metadata.threshold == 0.5 and not metadata.gives_probabilities
    both = make.describe(make.model(sigmoid=True), "edgedistill", values)
    metadata = read_metadata(make.describe(both, "model_info", {"confidence_threshold": "0.7"}), "m.xml")
    assert metadata.threshold == 0.7 and metadata.gives_probabilities
    foreign = MODEL_API | {"multilabel": "True", "confidence_threshold": "0.25"}
    metadata = read_metadata(make.describe(make.model(), "model_info", foreign), "m.xml")
    assert metadata.multi_label and metadata.threshold == 0.25
    with pytest.raises(ArtifactError, match="ends in a softmax"):
        read_metadata(make.describe(make.model(softmax=True), "edgedistill", values), "m.xml")


def test_each_label_has_its_own_threshold(make: Any) -> None:
    spec, info = InputSpec(height=32, width=32), {"confidence_threshold": "0.7"}
    for said, threshold in (("[0.9, 0.2, 0.5]", (0.9, 0.2, 0.5)), ("[0.5]", 0.7), ("null", 0.7), ("0.3", (0.3,) * 3)):
        values = make.own_metadata(spec, task="multi-label", thresholds=said)
        model = make.describe(make.describe(make.model(), "edgedistill", values), "model_info", info)
        assert read_metadata(model, "m.xml").threshold == threshold
    path = make.ir(make.folder / "model.xml", spec=spec, changes={"task": "multi-label", "thresholds": "[1, 0, 0.5]"})
    accepted = {colour: Classifier(path).classify(make.photo(colour)).accepted for colour in make.labels}
    assert len(set(accepted.values())) == 2 and all(1 in numbers and 0 not in numbers for numbers in accepted.values())
    many = heads_metadata(HUE | {"kind": "sigmoid", "threshold": [0, 1]}, DEPTH)
    answer = Classifier(make.ir(make.folder / "heads.xml", spec=spec, changes=many)).classify(make.photo("green"))
    assert answer.heads[0].accepted == (0,) and answer.heads[0].label == HUE["classes"][0]


def test_labels_that_are_certain_keep_the_order_of_their_logits(make: Any, tmp_path: Path) -> None:
    spec, many = InputSpec(height=32, width=32), heads_metadata(HUE | {"kind": "sigmoid"}, DEPTH)
    path = make.ir(tmp_path / "heads.xml", spec=spec, changes=many | {"temperature": "0.05"})
    yellow = np.full((40, 40, 3), (30, 230, 210), np.uint8)  # BGR: red, and more green
    answer = Classifier(path, cache_dir=False).classify(yellow)
    assert answer.probabilities[:2].tolist() == [1.0, 1.0] and answer.index == answer.heads[0].index == 1


def test_networks_that_are_no_image_classifiers_are_refused(make: Any) -> None:
    dynamic = make.model()
    dynamic.reshape([-1, 3, 32, 32])
    two_outputs = make.model()
    two_outputs.add_outputs([two_outputs.inputs[0].get_node().output(0)])
    flat = make.model()
    flat.reshape([2, 3, 32, 32])
    embedded = make.describe(make.model(), "edgedistill", {"preprocessing_embedded": "True"})
    for model, what in ((dynamic, "static"), (two_outputs, "shapes"), (flat, "input"), (embedded, "embedded")):
        with pytest.raises(ModelError, match=what):
            read_metadata(model, "m.xml")


def test_a_cascade_needs_thresholds_and_one_set_of_labels(make: Any) -> None:
    root = make.cascade(exit_threshold=0.5)
    config = read_deploy(root / "deploy.json")
    with pytest.raises(ArtifactError, match="exit_threshold"):
        DeployConfig(stages=config.stages[::-1])
    spec = config.stages[1].input_spec
    make.ir(root / "slow.xml", spec=spec, changes={"labels": '["x", "y", "z"]'})
    stages = (config.stages[0], describe_stage(root, "slow.xml", input_spec=spec, temperature=1.0))
    write_deploy(root / "deploy.json", DeployConfig(stages=stages))
    with pytest.raises(ArtifactError, match="stage 1 has other labels"):
        Bundle.load(root)
    make.ir(root / "slow.xml", spec=spec, changes={"task": "multi-label"})
    stages = (config.stages[0], describe_stage(root, "slow.xml", input_spec=spec, temperature=1.0))
    write_deploy(root / "deploy.json", DeployConfig(stages=stages))
    with pytest.raises(ArtifactError, match="stage 1 has another task"):
        Bundle.load(root)


def test_each_stage_has_its_own_thresholds(make: Any) -> None:
    """They were fitted on its own outputs; its heads are the same."""
    root, many = make.cascade(exit_threshold=0.5), HUE | {"kind": "sigmoid"}
    fast, slow = read_deploy(root / "deploy.json").stages
    for stage, changes in ((fast, {"threshold": 0.0}), (slow, {"threshold": [1.0, 0.0], "weight": 3.0})):
        make.ir(root / stage.model, spec=stage.input_spec, changes=heads_metadata(many | changes, DEPTH))
    for sure, accepted in ((0.0, (0, 1)), (1.0, (1,))):
        stages = tuple(
            describe_stage(root, stage.model, input_spec=stage.input_spec, temperature=1.0, exit_threshold=exits)
            for stage, exits in ((fast, sure), (slow, None))
        )
        write_deploy(root / "deploy.json", DeployConfig(stages=stages))
        answer = Classifier(root, cache_dir=False).classify(make.photo("green"))
        assert answer.heads[0].accepted == accepted and answer.stage == (1 if sure else 0)
    make.ir(root / slow.model, spec=slow.input_spec, changes=heads_metadata(many, DEPTH | {"std": 9.0}))
    stages = (stages[0], describe_stage(root, slow.model, input_spec=slow.input_spec, temperature=1.0))
    write_deploy(root / "deploy.json", DeployConfig(stages=stages))
    with pytest.raises(ArtifactError, match="stage 1 has another task"):
        Bundle.load(root)


def test_deploy_json_may_change_the_resolution_and_nothing_else(make: Any) -> None:
    root = make.deployable()
    stage = read_deploy(root / "deploy.json").stages[0]
    for spec, fine in (
        (stage.input_spec.resized(48, 40), True),
        (InputSpec(height=32, width=32, mean=(0, 0, 0)), False),
    ):
        changed = Stage(stage.model, stage.sha256, spec, stage.temperature)
        write_deploy(root / "deploy.json", DeployConfig(stages=(changed,)))
        if fine:
            assert list(Bundle.load(root).read_model(0, "f32").inputs[0].shape) == [1, 3, 48, 40]
        else:
            with pytest.raises(ArtifactError, match="differ in more than the resolution"):
                Bundle.load(root)


def test_a_resolution_that_the_network_cannot_take_is_a_model_error(make: Any) -> None:
    from openvino import opset13 as ops

    model = make.model()
    fixed = ops.reshape(model.inputs[0].get_node(), [1, 3, 32, 32], False)
    head = ops.reduce_mean(fixed, [2, 3], False)
    spec = InputSpec(height=32, width=32)
    stiff = make.describe(
        ov.Model([head], [model.inputs[0].get_node()], "stiff"), "edgedistill", make.own_metadata(spec)
    )
    path: Path = make.folder / "model.xml"
    ov.save_model(stiff, path, compress_to_fp16=False)
    stage = describe_stage(make.folder, "model.xml", input_spec=spec.resized(64), temperature=1.5)
    write_deploy(make.folder / "deploy.json", DeployConfig(stages=(stage,)))
    with pytest.raises(ModelError, match="cannot run at 64x64"):
        Bundle.load(make.folder / "deploy.json").read_model(0, "f32")
