"""bench-fps as a whole on tiny networks: peers compute our network, records are complete, bad input is one clear error."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from edgedistill.artifacts import read_json, sha256_file
from edgedistill.benchmarks import candidates
from edgedistill.benchmarks.bench_fps import BENCH_FORMAT, BenchSettings, bench_fps
from edgedistill.benchmarks.inputs import input_sets, synthetic_photo
from edgedistill.benchmarks.peers import plain_tensor
from edgedistill.benchmarks.python_runtime import Figure, help_figure, photographs
from edgedistill.benchmarks.target import Target
from edgedistill.benchmarks.timing import Spread
from edgedistill.data.manifest import Dataset, write_dataset
from edgedistill.errors import ModelError, UsageError
from edgedistill.images import InputSpec, normalize
from edgedistill.runtime.bundle import DeployConfig, describe_stage, write_deploy

SPEC = InputSpec(height=32, width=32)
LABELS = ["cat", "guinea pig", "dog"]
PEERS_PYTHON = Path(os.environ.get("PEERS_PYTHON", ".venv-peers/bin/python"))


def describe(model: ov.Model, spec: InputSpec) -> None:
    """The metadata of the design's section on artefacts."""
    model_api = {
        "model_type": "Classification",
        "labels": " ".join(label.replace(" ", "_") for label in LABELS),
        "mean_values": " ".join(map(str, spec.mean)),
        "scale_values": " ".join(map(str, spec.std)),
        "resize_type": "standard",
        "reverse_input_channels": "True",
        "multilabel": "False",
        "output_raw_scores": "True",
    }
    own = {
        "format_version": "1",
        "input_spec": json.dumps(spec.to_dict()),
        "temperature": "1.0",
        "thresholds": "null",
        "labels": json.dumps(LABELS),
        "dataset_hash": "0" * 64,
        "weights_hash": "1" * 64,
        "architecture": "tiny",
        "task": "single-label",
    }
    for section, values in (("model_info", model_api), ("edgedistill", own)):
        for key, value in values.items():
            model.set_rt_info(value, [section, key])


def tiny_ir() -> ov.Model:
    """A convolution and a classifier whose answer depends on colour order, mean and scale."""
    rng = np.random.default_rng(7)
    image = ops.parameter([1, 3, SPEC.height, SPEC.width], np.float32, name="image")
    image.output(0).set_names({"image"})
    kernel = rng.normal(0, 0.5, (8, 3, 3, 3)).astype(np.float32)
    features = ops.relu(ops.convolution(image, kernel, [2, 2], [1, 1], [1, 1], [1, 1]))
    pooled = ops.reduce_mean(features, np.array([2, 3]), keep_dims=False)
    logits = ops.matmul(pooled, rng.normal(0, 2, (8, len(LABELS))).astype(np.float32), False, False)
    logits.output(0).set_names({"logits"})
    model = ov.Model([logits], [image], "tiny")
    model.get_parameters()[0].set_layout(ov.Layout("NCHW"))
    describe(model, SPEC)
    return model


@pytest.fixture
def deployable(tmp_path: Path) -> Path:
    """A run's openvino/ folder with an FP32 form only."""
    root = tmp_path / "run" / "openvino"
    stage = root / "stages" / "tiny"
    stage.mkdir(parents=True)
    ov.save_model(tiny_ir(), str(stage / "model.xml"), compress_to_fp16=False)
    write_deploy(
        root / "deploy.json",
        DeployConfig(stages=(describe_stage(root, "stages/tiny/model.xml", input_spec=SPEC, temperature=1.0),)),
    )
    return root


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    cv2.imwrite(str(path), synthetic_photo(90, 120, seed=3))
    return path


def quick(path: Path, **options: Any) -> BenchSettings:
    return dataclasses.replace(BenchSettings(path=path, rounds=2, seconds=0.05), **options)


def test_one_run_leaves_a_complete_record(deployable: Path, photo: Path, tmp_path: Path) -> None:
    settings = quick(
        deployable,
        vs=("naive", "naive-default", "onnxruntime", "torch", "model-api"),
        images=(str(photo),),
        fps_target=1e9,
        accuracy=0.8,
        command="bench-fps run/openvino",
        peers_python=tmp_path / "no-python",
    )
    result = bench_fps(settings)
    record = read_json(deployable / "bench.json", format=BENCH_FORMAT)
    assert result.out == deployable / "bench.json"
    assert record["command"] == "bench-fps run/openvino"
    assert set(record) >= {"machine", "artifact", "settings", "rounds", "results", "not_measured", "score", "warnings"}
    measured = {(row["candidate"], row["scope"], row["mode"]) for row in record["results"]}
    for scope in ("model", "frames", "files"):
        assert {("edgedistill", scope, "latency"), ("edgedistill", scope, "throughput")} <= measured
        assert {("naive-f32", scope, "latency"), ("naive-default", scope, "latency")} <= measured
    for row in record["results"]:
        assert row["precision"] in ("f32", "bf16")
        assert 0 < row["fps"]["min"] <= row["fps"]["median"] <= row["fps"]["max"]
        assert len(row["fps"]["rounds"]) == 2
        assert (row["latency_ms"] is not None) == (row["mode"] == "latency")
        assert row["ratio_to_naive_f32"]["median"] > 0
        assert row["settings"]["threads"] >= 1
    own = [row for row in record["results"] if row["candidate"] == "edgedistill"]
    assert any(row["precision"] == "f32" for row in own)
    assert all(row["settings"]["inference_precision"] == row["precision"] for row in own), "FP32 has to mean f32"
    reasons = {row["candidate"]: row["reason"] for row in record["not_measured"]}
    assert set(reasons) == {"onnxruntime", "torch", "model-api"}
    assert "make peers" in reasons["model-api"]
    assert not any("other probabilities" in warning for warning in record["warnings"]), "naive is set up wrongly"
    assert record["score"]["value"] == pytest.approx(0.7 * 0.8, abs=1e-4)
    assert len(result.tables()) == 3


# Speaks the protocol as edgedistill-bench --serve does.
FAKE_BENCH = """#!{python}
import sys
from edgedistill.benchmarks import candidates, serve
from edgedistill.images import InputSpec
from pathlib import Path
assert sys.argv[1:] == ["--serve"]
ours = {{}}
def prepare(request):
    one = ours.setdefault(request["precision"], candidates.Ours(request))
    images = [Path(path) for path in request["images"]]
    case = one.prepare(request, images, InputSpec.from_dict(request["input_spec"]))
    case.answer[:] = [value + {error} for value in case.answer]
    return case
serve.serve(prepare)
"""


@pytest.mark.parametrize(("error", "warned"), [(0.0, False), (0.02, True)])
def test_the_cpp_runtime_is_measured_beside_ours_and_its_answers_are_checked(
    deployable: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float, warned: bool
) -> None:
    program = tmp_path / "bin" / "edgedistill-bench"
    program.parent.mkdir()
    program.write_text(FAKE_BENCH.format(python=sys.executable, error=error))
    program.chmod(0o755)
    monkeypatch.setenv("EDGEDISTILL_CPP_BIN", str(program.parent))
    settings = quick(deployable, scopes=("model", "files"), vs=("edgedistill-cpp",), images=(str(photo),))
    record = bench_fps(settings).record
    assert record["not_measured"] == []
    rows = {(row["candidate"], row["scope"], row["mode"], row["precision"]) for row in record["results"]}
    ours = {row[1:] for row in rows if row[0] == "edgedistill"}
    assert {row[1:] for row in rows if row[0] == "edgedistill-cpp"} == ours and len(ours) >= 4
    assert any("answers otherwise than Python" in warning for warning in record["warnings"]) == warned


def test_a_cpp_runtime_that_is_not_built_is_named_with_the_remedy(deployable: Path, photo: Path) -> None:
    record = bench_fps(quick(deployable, scopes=("files",), vs=("edgedistill-cpp",), images=(str(photo),))).record
    assert {row["candidate"] for row in record["not_measured"]} == {"edgedistill-cpp"}
    assert "make cpp" in record["not_measured"][0]["reason"]


@pytest.fixture(scope="module")
def timm_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with model.pt, model.onnx and IR of one small timm network, made without our own export."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    from edgedistill.timm_import import import_timm

    torch.manual_seed(0)
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("run")
    stage = root / "openvino" / "stages" / "small"
    stage.mkdir(parents=True)
    network = import_timm().create_model("mobilenetv3_small_050", pretrained=False, num_classes=len(LABELS)).eval()
    example = torch.zeros(1, 3, SPEC.height, SPEC.width)
    torch.onnx.export(
        network, (example,), str(stage / "model.onnx"), opset_version=18, dynamo=True, external_data=False
    )
    model = ov.convert_model(network, example_input=example, input=list(example.shape))
    model.inputs[0].get_tensor().set_names({"image"})
    model.get_parameters()[0].set_layout(ov.Layout("NCHW"))
    describe(model, SPEC)
    saved = {
        "format": "edgedistill-model",
        "version": 1,
        "architecture": "mobilenetv3_small_050",
        "model_kwargs": {},
        "state_dict": network.state_dict(),
        "classes": LABELS,
    }
    torch.save(saved, root / "model.pt")
    model.set_rt_info(sha256_file(root / "model.pt"), ["edgedistill", "weights_hash"])
    ov.save_model(model, str(stage / "model.xml"), compress_to_fp16=False)
    return stage / "model.xml"


@pytest.mark.slow
def test_every_peer_computes_our_network(timm_run: Path, photo: Path, tmp_path: Path) -> None:
    names = ("naive", "naive-default", "onnxruntime", "torch", "benchmark_app")
    out = tmp_path / "bench.json"
    result = bench_fps(quick(timm_run, scopes=("model",), vs=names, images=(str(photo),), out=out))
    assert result.record["not_measured"] == []
    measured = {(row["candidate"], row["mode"]) for row in result.record["results"]}
    both = {(name, mode) for name in ("onnxruntime", "torch", "benchmark_app") for mode in ("latency", "throughput")}
    assert both <= measured
    assert not any("other probabilities" in warning for warning in result.record["warnings"])
    assert not (timm_run.parent / "bench.json").exists(), "a bare model.xml got a file that nobody asked for"


@pytest.mark.benchmark_env
@pytest.mark.slow
@pytest.mark.skipif(not PEERS_PYTHON.is_file(), reason="run `make peers` first")
def test_ncnn_computes_our_network(timm_run: Path, photo: Path, tmp_path: Path) -> None:
    settings = quick(timm_run, scopes=("model",), vs=("ncnn",), images=(str(photo),), out=tmp_path / "bench.json")
    record = bench_fps(dataclasses.replace(settings, peers_python=PEERS_PYTHON)).record
    assert record["not_measured"] == []
    assert {row["mode"] for row in record["results"] if row["candidate"] == "ncnn"} == {"latency", "throughput"}
    assert not any("other probabilities" in warning for warning in record["warnings"])


@pytest.mark.benchmark_env
@pytest.mark.slow
@pytest.mark.skipif(not PEERS_PYTHON.is_file(), reason="run `make peers` first")
def test_model_api_loads_our_ir_and_is_measured(deployable: Path, photo: Path) -> None:
    settings = quick(deployable, vs=("model-api",), images=(str(photo),), peers_python=PEERS_PYTHON)
    result = bench_fps(settings)
    assert result.record["not_measured"] == []
    rows = [row for row in result.record["results"] if row["candidate"] == "model-api"]
    assert {(row["scope"], row["mode"]) for row in rows} == {
        (scope, mode) for scope in ("frames", "files") for mode in ("latency", "throughput")
    }
    assert {row["precision"] for row in rows} == {"f32"}


BLOCKER = """
import sys
BLOCKED = {"torch", "torchvision", "timm", "onnx", "onnxruntime", "sklearn", "matplotlib", "nncf", "albumentations", "scipy"}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""

BASE_RUN = """
import sys
from pathlib import Path
from edgedistill.benchmarks.bench_fps import BenchSettings, bench_fps
settings = BenchSettings(path=Path(sys.argv[1]), scopes=("files",), images=(sys.argv[2],), rounds=1, seconds=0.05)
rows = bench_fps(settings).record["results"]
print(sum(row["precision"] == "f32" for row in rows))  # a CPU with bfloat16 has rows for that too
"""


def test_it_runs_in_the_base_install(deployable: Path, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    done = subprocess.run(
        [sys.executable, "-c", BASE_RUN, str(deployable), str(photo)],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "3"), done.stderr


def test_paths_that_are_no_deployable_are_refused(tmp_path: Path, deployable: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        Target.open(tmp_path / "nothing")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match="not an OpenVINO IR"):
        Target.open(tmp_path / "weights.bin")
    with pytest.raises(UsageError, match="export-openvino"):
        Target.open(tmp_path)
    (tmp_path / "model.xml").write_text("<html>not a network</html>")
    with pytest.raises(ModelError, match=r"model\.xml"):
        Target.open(tmp_path / "model.xml")
    assert Target.open(deployable).spec == Target.open(deployable / "deploy.json").spec == SPEC


def test_unreadable_images_are_named_and_left_out(tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "good.jpg").write_bytes(photo.read_bytes())
    (folder / "torn.jpg").write_bytes(photo.read_bytes()[:600])
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    (one,), _ = input_sets([str(folder)], dataset=None, scratch=tmp_path)
    assert [path.name for path in one.paths] == ["good.jpg"]
    warnings = capsys.readouterr().err
    assert "torn.jpg" in warnings and "empty.png" in warnings and "notes.txt" not in warnings
    (folder / "good.jpg").unlink()
    with pytest.raises(UsageError, match="none of its 2 images can be read"):
        input_sets([str(folder)], dataset=None, scratch=tmp_path)


def test_inputs_of_one_name_are_told_apart(tmp_path: Path, photo: Path) -> None:
    folders = [tmp_path / str(number) / "val" for number in range(3)]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "photo.jpg").write_bytes(photo.read_bytes())
    sets, origin = input_sets([str(folder) for folder in folders], dataset=None, scratch=tmp_path)
    name = sets[0].name
    assert [one.name for one in sets] == [name, f"{name} (2)", f"{name} (3)"] and f"{name} (3)" in origin
    assert [one.paths for one in sets] == [(folder / "photo.jpg",) for folder in folders]


@pytest.mark.parametrize("name", ["missing.jpg", "empty"])
def test_no_images_is_an_error_and_not_a_silent_default(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=name):
        input_sets([str(tmp_path / name)], dataset=None, scratch=tmp_path)


def test_the_runs_own_val_images_are_the_default(tmp_path: Path, photo: Path) -> None:
    manifest = tmp_path / "dataset.csv"
    dataset = Dataset(
        ids=np.array(["a.jpg", "b.jpg"]),
        paths=np.array([str(photo), str(tmp_path / "train.jpg")]),
        sha256=np.array(["0" * 64, "1" * 64]),
        labels=np.array([0, 1]),
        groups=np.array(["", ""]),
        splits=np.array(["val", "train"]),
        folds=np.array([-1, 0]),
        class_names=("x", "y"),
    )
    write_dataset(dataset, manifest)
    (one,), origin = input_sets((), dataset=manifest, scratch=tmp_path)
    assert one.paths == (photo,)
    assert "val split" in origin
    photo.unlink()
    sets, origin = input_sets((), dataset=manifest, scratch=tmp_path)
    assert "generated" in origin and len(sets) == 2, "a model on another machine is measured on generated images"


def test_generated_photographs_say_so_and_weigh_what_photographs_weigh(tmp_path: Path) -> None:
    sets, origin = input_sets((), dataset=None, scratch=tmp_path)
    assert "generated" in origin
    for one, (height, width), lightest, heaviest in zip(
        sets, ((427, 640), (1281, 1920)), (45_000, 230_000), (200_000, 1_200_000), strict=True
    ):
        assert one.name == f"synthetic {width}x{height} JPEG"
        assert cv2.imread(str(one.paths[0])).shape == (height, width, 3)
        # scikit-learn's two photographs, at this quality: 49 and 100 KB, enlarged 238 and 467 KB.
        assert lightest < one.paths[0].stat().st_size < heaviest
    assert np.array_equal(synthetic_photo(64, 80, seed=1), synthetic_photo(64, 80, seed=1))
    assert not np.array_equal(synthetic_photo(64, 80, seed=1), synthetic_photo(64, 80, seed=2))


def test_the_naive_tensor_is_ours_where_nothing_is_resized() -> None:
    image = synthetic_photo(SPEC.height, SPEC.width, seed=5)
    np.testing.assert_allclose(plain_tensor(image, SPEC), normalize(image[None], SPEC), rtol=1e-5, atol=1e-5)


def test_figures_are_judged_on_the_right_side() -> None:
    assert Figure("speed", Spread(1.9, 1.7, 2.0), 1.8).reached
    assert not Figure("speed", Spread(1.7, 1.7, 2.0), 1.8).reached
    assert Figure("help", Spread(0.4, 0.3, 0.9), 0.5, unit="s", at_most=True).reached
    assert not Figure("help", Spread(0.6, 0.3, 0.9), 0.5, unit="s", at_most=True).reached
    assert help_figure(runs=1).value.median > 0.02, "nothing starts Python that fast: the command did not run"


def test_the_runtimes_figures_need_two_photographs(tmp_path: Path, photo: Path) -> None:
    with pytest.raises(UsageError, match="expected two"):
        photographs([str(photo)], tmp_path)
    sets, _ = photographs([str(photo), str(photo)], tmp_path)
    assert len(sets) == 2
    sets, origin = photographs([], tmp_path)
    sizes = [cv2.imread(str(one.paths[0])).shape[1::-1] for one in sets]
    assert sizes == [(640, 427), (1920, 1281)], origin


def test_a_slice_goes_on_with_the_images_that_follow_the_last_one() -> None:
    """Else a slow machine sees the same few in every slice, and a cascade is judged by what it passes on of those."""
    seen: list[int] = []

    class Answers:
        def map(self, sources: Iterator[int]) -> Iterator[SimpleNamespace]:
            for source in sources:
                seen.append(source)
                yield SimpleNamespace(error=None)

    ours = candidates.Ours({"deployable": "", "precision": None})
    ours.__dict__["engine"] = Answers()
    run = ours._stream([0, 1, 2])
    assert [run(0.0) for _ in range(5)] == [1] * 5
    assert seen == [0, 1, 2, 0, 1]
