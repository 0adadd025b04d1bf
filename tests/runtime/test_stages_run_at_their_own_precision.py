"""A cascade whose stages are deployed at unlike precisions: each runs at its own, and says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

from edgedistill.artifacts import read_json
from edgedistill.benchmarks import engine_limit
from edgedistill.benchmarks.bench_fps import BENCH_FORMAT, BenchSettings, bench_fps
from edgedistill.benchmarks.plan import plan_entries
from edgedistill.benchmarks.target import Target
from edgedistill.errors import ArtifactError, ModelError, UsageError
from edgedistill.runtime import Classifier, Engine
from edgedistill.runtime.bundle import (
    Bundle,
    LatencySettings,
    ThroughputSettings,
    precision_name,
    read_deploy,
    stage_precisions,
)

INT8_THEN_F32 = {
    "latency": LatencySettings("int8", later_precision="f32"),
    "throughput": ThroughputSettings("int8", streams=2, batch=2, later_batch=4, later_precision="f32"),
}


def unlike(make: Any, **config: Any) -> Path:
    """The INT8 forms have half the gain, so that every probability tells which form answered."""
    return make.cascade(exit_threshold=0.8, fast_gain=8.0, int8="fast slow", **(INT8_THEN_F32 | config))


def pictures(make: Any) -> list[Any]:
    """Pictures of which the fast stage is sure, and grey ones with a hint of a colour, which it passes on."""
    sure = [make.picture(colour, seed=seed) for seed, colour in enumerate(make.labels)]
    return [*sure, *(np.full((32, 32, 3), colour, np.uint8) for colour in ((128, 128, 140), (130, 140, 128)))] * 6


def test_each_stage_answers_with_the_form_of_its_own_precision(make: Any) -> None:
    root = unlike(make)
    classifier = Classifier(root)
    assert classifier.precision == "int8+f32" and classifier.network.precisions == ("int8", "f32")
    answers = classifier.classify(pictures(make))
    assert {answer.stage for answer in answers} == {0, 1}
    alone = [Classifier(root / "fast.xml", precision="int8"), Classifier(root / "slow.xml", precision="f32")]
    for answer, picture in zip(answers, pictures(make), strict=True):
        expected = alone[answer.stage].classify(picture)
        np.testing.assert_allclose(answer.probabilities, expected.probabilities, atol=1e-6)
    with Engine(root) as engine:
        assert (engine.precision, engine.batch, engine.later_batch) == ("int8+f32", 2, 4)
        many = list(engine.map(pictures(make)))
    assert [(a.label, a.stage) for a in many] == [(a.label, a.stage) for a in answers]
    for answer, other in zip(many, answers, strict=True):
        np.testing.assert_allclose(answer.probabilities, other.probabilities, atol=1e-6)


def test_a_precision_that_is_asked_for_is_every_stages(make: Any) -> None:
    root = unlike(make)
    assert Classifier(root, precision="f32").network.precisions == ("f32", "f32")
    with Engine(root, precision="int8") as engine:
        assert engine.precision == "int8" and engine.networks[0].precisions == ("int8", "int8")


def test_a_file_that_names_no_later_precision_means_what_it_meant(make: Any) -> None:
    root = unlike(make)
    values = json.loads((root / "deploy.json").read_text())
    for part in ("latency", "throughput"):
        del values[part]["later_precision"]
    (root / "deploy.json").write_text(json.dumps(values))
    assert read_deploy(root / "deploy.json").throughput.later_precision is None
    assert Classifier(root).network.precisions == ("int8", "int8")
    with Engine(root) as engine:
        assert engine.precision == "int8"


def test_both_modes_have_their_own(make: Any) -> None:
    root = unlike(make, latency=LatencySettings("f32", later_precision="int8"))
    with Engine(root) as engine:
        assert (Classifier(root).precision, engine.precision) == ("f32+int8", "int8+f32")


def test_a_later_stage_without_that_form_is_named(make: Any) -> None:
    root = make.cascade(exit_threshold=0.8, int8="fast", latency=LatencySettings("f32", later_precision="int8"))
    with pytest.raises(ModelError, match=r"slow\.xml has no INT8 form"):
        Classifier(root)
    assert Classifier(root, precision="f32").precision == "f32"


def test_one_stage_has_none_after_it(make: Any) -> None:
    with pytest.raises(ArtifactError, match="throughput later_precision 'f32' is of the stages after the first"):
        make.deployable(throughput=ThroughputSettings(later_precision="f32"))
    with pytest.raises(ArtifactError, match="later_precision 'fp16', expected one of f32, bf16, int8, null"):
        LatencySettings(later_precision="fp16")


def test_another_processor_runs_all_stages_at_f32(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert Classifier(unlike(make, cpu="another processor")).precision == "f32"
    assert "another processor" in capsys.readouterr().err


def test_openvino_is_told_the_precision_of_each_stage(make: Any) -> None:
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        root = unlike(make, latency=LatencySettings("int8", later_precision="bf16"))
        assert Classifier(root).precision == "int8+f32", "f32 instead of bf16, and of nothing else"
        return
    root = unlike(make, latency=LatencySettings("bf16", later_precision="f32"))
    hints = [stage.compiled.get_property("INFERENCE_PRECISION_HINT") for stage in Classifier(root).network.stages]
    assert [hint.to_string() for hint in hints] == ["bf16", "f32"]


def test_precisions_have_one_name() -> None:
    assert stage_precisions(ThroughputSettings("int8", later_precision="f32"), 3) == ("int8", "f32", "f32")
    assert stage_precisions(LatencySettings("bf16"), 2) == ("bf16", "bf16")
    assert [precision_name(one) for one in (("int8", "f32"), ("f32", "f32"), ("f32",))] == ["int8+f32", "f32", "f32"]


def test_bench_fps_measures_it_as_it_is_deployed(make: Any) -> None:
    root, photo = unlike(make), make.photo("red", height=90, width=120)
    settings = BenchSettings(root, ("files",), (), (str(photo),), rounds=2, seconds=0.05, fps_target=10.0, accuracy=0.5)
    result = bench_fps(settings)
    record = read_json(root / "bench.json", format=BENCH_FORMAT)
    found = {(row["precision"], row["mode"]): row["settings"]["stage_precisions"] for row in record["results"]}
    for mode in ("latency", "throughput"):
        assert found["int8+f32", mode] == ["int8", "f32"]
        assert found["int8", mode] == ["int8", "int8"] and found["f32", mode] == ["f32", "f32"]
    assert record["not_measured"] == [] and record["score"]["precision"] == "int8+f32"
    assert any("cascade (int8+f32, files" in note for note in result.notes)


def test_scope_model_and_a_precision_by_name_leave_the_mixture_out(make: Any) -> None:
    target = Target.open(unlike(make))
    one = BenchSettings(target.path, ("model",), ())
    assert "int8+f32" not in {entry.precision for entry in plan_entries(one, target, [])}
    named = BenchSettings(target.path, ("model",), (), precisions=("f32",))
    assert {entry.precision for entry in plan_entries(named, target, [])} == {"f32"}
    with pytest.raises(UsageError, match=r"runs at int8\+f32; both sides need one precision, give --precision"):
        engine_limit.measure(engine_limit.LimitSettings(target.path, (make.photo("red"),)))


def test_a_single_stage_of_a_cascade_that_is_damaged_is_still_noticed(make: Any) -> None:
    root = unlike(make)
    (root / "slow-int8.bin").write_bytes(b"x")
    with pytest.raises(ArtifactError, match=r"slow-int8\.xml: sha256"):
        Bundle.load(root)
