"""export/: one folder of files that answer like torch, say what they are, and are not deployed without proof."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import openvino as ov
import pytest
import sklearn.datasets
import torch
from openvino import opset8
from torch import nn

from edgedistill import __version__
from edgedistill.artifacts import RunDir, read_json
from edgedistill.data.manifest import Dataset, hash_files, write_dataset
from edgedistill.errors import ArtifactError, DataError, ImageError, ModelError, UsageError
from edgedistill.export import ir
from edgedistill.export.audit import audit
from edgedistill.export.certificate import CERTIFICATE_FORMAT, Limits, certify
from edgedistill.export.certify_jpeg import certify_jpeg
from edgedistill.export.cpp_runtime import CppAnswers, CppRuntime
from edgedistill.export.export import ExportSettings, certify_test, export_openvino, exported_forms, read_certificates
from edgedistill.export.inference import compile_ir
from edgedistill.export.network import model_api_labels
from edgedistill.export.samples import find_images
from edgedistill.images import InputSpec, load_image, normalize
from edgedistill.runtime import Bundle, Classifier
from edgedistill.training.checkpoints import read_model, write_model
from edgedistill.training.models import create_model

CLASSES = ("cat", "big dog", "été <&>")
SPLITS = ("train", "train", "val", "test")
SPEC = InputSpec(64, 64)
FAST = {"threads": 1, "timing_rounds": 1, "timing_seconds": 0.001}


def make_run(root: Path, architecture: str, spec: InputSpec, count: int = 32) -> RunDir:
    """PNG and JPEG crops of scikit-learn's two photographs, a manifest, and a network with random but awake weights."""
    folder = Path(sklearn.datasets.__file__).parent / "images"
    photographs = [cv2.imread(str(folder / name)) for name in ("china.jpg", "flower.jpg")]
    random = np.random.default_rng(0)
    ids, labels = [], []
    for number in range(count):
        label = int(random.integers(len(CLASSES)))
        id = f"{CLASSES[label]}/{number}.{'jpg' if number % 3 else 'png'}"
        top, left = random.integers(0, 120), random.integers(0, 200)
        path = root / "photos" / id
        path.parent.mkdir(parents=True, exist_ok=True)
        _, data = cv2.imencode(path.suffix, photographs[number % 2][top : top + 300, left : left + 400])
        path.write_bytes(data.tobytes())
        ids.append(id)
        labels.append(CLASSES[label])
    names = tuple(sorted(CLASSES))
    splits = [SPLITS[number % 4] for number in range(count)]
    dataset = Dataset(
        ids=np.array(ids),
        paths=np.array([str(root / "photos" / id) for id in ids]),
        sha256=hash_files([root / "photos" / id for id in ids]),
        labels=np.array([names.index(label) for label in labels], np.int32),
        groups=np.array([""] * count),
        splits=np.array(splits),
        folds=np.array([0 if split == "train" else -1 for split in splits], np.int16),
        class_names=names,
    )
    run = RunDir(root)
    write_dataset(dataset, run.dataset)
    write_model(
        run.model,
        awake_network(architecture),
        architecture=architecture,
        model_kwargs={"num_classes": 3},
        classes=names,
        input_spec=spec,
        dataset_hash=dataset.hash,
        settings={},
        temperature=1.7,
    )
    return run


def awake_network(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(architecture, class_count=3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    nn.init.normal_(model.get_classifier().weight, std=0.5)
    return model.eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = make_run(tmp_path_factory.mktemp("run"), "mobilenetv3_small_050", SPEC)
    settings = ExportSettings(
        model=run.model, int8="on", int8_max_drop=1.0, embed_preprocessing=True, test_parity=True, **FAST
    )
    assert export_openvino(settings) == run.openvino
    return run


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Not exported yet; a network of 12 convolutions for the tests that export for themselves."""
    return make_run(tmp_path_factory.mktemp("small"), "resnet10t", InputSpec(32, 32))


@pytest.fixture
def stage(run: RunDir) -> Path:
    return run.openvino / "stages" / "mobilenetv3_small_050"


def pixels(size: int = 64, count: int = 1) -> Any:
    return np.random.default_rng(3).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def torch_logits(run: RunDir, images: Any, spec: InputSpec = SPEC) -> Any:
    with torch.no_grad():
        return read_model(run.model).model(torch.from_numpy(normalize(images, spec))).numpy()


def test_the_folder_holds_exactly_what_the_design_says(run: RunDir, stage: Path) -> None:
    files = {path.relative_to(run.openvino).as_posix() for path in run.openvino.rglob("*") if path.is_file()}
    in_stage = {path.removeprefix(f"stages/{stage.name}/") for path in files}
    assert in_stage == {
        "deploy.json", "labels.txt", "model.xml", "model.bin", "model-int8.xml", "model-int8.bin", "model.onnx",
        "model-embedded.xml", "model-embedded.bin", "certificate.json", "certificate-test.json",
    }  # fmt: skip
    assert (run.openvino / "labels.txt").read_text().splitlines() == sorted(CLASSES)
    leftovers = [path.name for path in run.root.iterdir() if path.name.startswith(".")]
    assert not leftovers


def test_certificate_holds_every_column_and_passes(stage: Path) -> None:
    certificate = read_json(stage / "certificate.json", format=CERTIFICATE_FORMAT)
    columns = {column["name"]: column for column in certificate["columns"]}
    assert list(columns) == [
        "torch", "onnxruntime", "ir-fp32", "ir-int8", "python-runtime-files", "python-runtime-frames",
        "python-runtime-int8",
    ]  # fmt: skip
    assert certificate["verdict"] == "pass" and certificate["split"] == "val" and certificate["n"] == 8
    assert [form["name"] for form in certificate["not_run"]] == ["cpp-runtime"], "tests run without it"
    for name in ("onnxruntime", "ir-fp32"):
        assert 0 < columns[name]["max_logit_difference"] < 1e-3
    for name in ("python-runtime-files", "python-runtime-frames"):
        assert 0 < columns[name]["max_probability_difference"] < 1e-3
    assert certificate["files_vs_frames"]["images_with_other_pixels"] > 0, "no JPEG was reduced: the test is too weak"
    assert certificate["fusion"]["folded"] == 34 and certificate["fusion"]["image_kind"] == "real"
    assert certificate["converted_from"] == "torch" and certificate["int8"]["decision"] == "shipped"
    assert {entry["column"] for entry in certificate["worst"]} <= set(columns)
    assert read_json(stage / "certificate-test.json", format=CERTIFICATE_FORMAT)["split"] == "test"


def test_executed_graph_is_clean(stage: Path) -> None:
    graph = read_json(stage / "certificate.json", format=CERTIFICATE_FORMAT)["audit"]
    assert graph["convolutions"] == 53
    assert graph["convolutions_with_fused_activation"] == 42
    assert graph["fused_activations"]["HSwish"] == 19, "hard-swish fell apart"
    assert not graph["unfused_activations"] and graph["reorders"] <= 2


def test_audit_sees_activations_that_fell_apart(stage: Path) -> None:
    """OpenVINO's own reading of the ONNX file is the graph that the direct way from torch avoids."""
    model = ov.convert_model(str(stage / "model.onnx"))
    model.reshape([1, 3, 64, 64])
    graph = audit(model, threads=1, runs=2)
    assert graph["unfused_activations"] == {"HardSigmoid": 9} and graph["reorders"] >= 18
    assert 0 < graph["unfused_activation_share"] <= graph["overhead_share"]


def test_exporting_prints_nothing_and_sends_no_statistics(
    stage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from openvino_telemetry.main import Telemetry

    sent: list[Any] = []
    monkeypatch.delenv("CI", raising=False)
    for name in ("send_event", "start_session", "send_error"):
        monkeypatch.setattr(Telemetry, name, lambda self, *args, **kwargs: sent.append(self.consent))
    ir.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), SPEC, onnx_file=stage)
    assert sent and not any(sent), "the converter believes that it may send"
    assert capsys.readouterr().out == "" and "CI" not in os.environ


class Untraceable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not for tracers")


def test_a_network_that_cannot_be_traced_is_read_from_onnx_or_named(stage: Path, tmp_path: Path) -> None:
    model, source = ir.convert(Untraceable(), SPEC, onnx_file=stage / "model.onnx")
    assert (
        source == "onnx"
        and list(model.inputs[0].shape) == [1, 3, 64, 64]
        and model.outputs[0].get_names() == {"logits"}
    )
    (tmp_path / "broken.onnx").write_bytes(b"not onnx")
    for name in ("missing.onnx", "broken.onnx"):
        with pytest.raises(ModelError, match="not for tracers"):
            ir.convert(Untraceable(), SPEC, onnx_file=tmp_path / name)


def test_ir_describes_itself_for_model_api_and_for_us(run: RunDir, stage: Path) -> None:
    for name in ("model.xml", "model-int8.xml"):
        model = ov.Core().read_model(stage / name)

        def text(*keys: str, model: ov.Model = model) -> str:
            return str(model.get_rt_info(list(keys)).astype(str))

        assert text("model_info", "model_type") == "Classification"
        assert text("model_info", "labels") == "big_dog cat été_<&>"
        assert text("model_info", "resize_type") == "standard"
        assert text("model_info", "reverse_input_channels") == "True" and text("model_info", "multilabel") == "False"
        assert [float(value) for value in text("model_info", "mean_values").split()] == list(SPEC.mean)
        assert [float(value) for value in text("model_info", "scale_values").split()] == list(SPEC.std)
        assert json.loads(text("edgedistill", "labels")) == sorted(CLASSES)
        assert InputSpec.from_dict(json.loads(text("edgedistill", "input_spec"))) == SPEC
        assert float(text("edgedistill", "temperature")) == 1.7 and text("edgedistill", "task") == "single-label"
        assert text("edgedistill", "dataset_hash") == read_model(run.model).dataset_hash
        assert not model.has_rt_info(["model_info", "embedded_processing"])
        assert list(model.inputs[0].shape) == [1, 3, 64, 64] and model.inputs[0].get_names() == {"image"}
        assert list(model.outputs[0].shape) == [1, 3] and model.outputs[0].get_names() == {"logits"}
        assert str(ov.layout_helpers.get_layout(model.inputs[0])) == "[N,C,H,W]"


def test_fp32_is_true_fp32(stage: Path) -> None:
    model = ov.Core().read_model(stage / "model.xml")
    kinds = {str(op.get_element_type()) for op in model.get_ordered_ops() if op.get_type_name() == "Constant"}
    assert "<Type: 'float16'>" not in kinds and "<Type: 'float32'>" in kinds


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 64, 64), (4, 64, 64), (1, 96, 160), (3, 75, 100)])
def test_ir_reshapes_to_other_batches_and_resolutions(
    run: RunDir, stage: Path, batch: int, height: int, width: int
) -> None:
    model = ov.Core().read_model(stage / "model.xml")
    model.reshape([batch, 3, height, width])
    spec = SPEC.resized(height, width)
    images = np.random.default_rng(1).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)
    got = compile_ir(model, threads=1)(normalize(images, spec))[0]
    assert np.abs(got - torch_logits(run, images, spec)).max() < 1e-4


def test_embedded_ir_takes_pixels_and_no_second_normalisation(run: RunDir, stage: Path) -> None:
    model = ov.Core().read_model(stage / "model-embedded.xml")
    assert model.inputs[0].get_element_type() == ov.Type.u8 and list(model.inputs[0].shape) == [1, 64, 64, 3]
    assert not model.has_rt_info(["model_info"])
    assert np.abs(compile_ir(model, threads=1)(pixels())[0] - torch_logits(run, pixels())).max() < 1e-4


def test_onnx_is_opset_17_and_takes_any_batch(run: RunDir, stage: Path) -> None:
    model = onnx.load(stage / "model.onnx")
    assert model.opset_import[0].version >= 17
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("HardSwish") == 19 and "BatchNormalization" not in kinds
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["model_info labels"] == "big_dog cat été_<&>"
    assert json.loads(metadata["edgedistill labels"]) == sorted(CLASSES)


def test_deployed_bundle_answers_like_torch(run: RunDir) -> None:
    bundle = Bundle.load(run.openvino)
    assert bundle.labels == tuple(sorted(CLASSES)) and bundle.config.latency.precision == "int8"
    path = next((run.root / "photos").rglob("*.jpg"))
    classifier = Classifier(run.openvino, precision="f32", threads=1, cache_dir=False)
    logits = torch_logits(run, load_image(path, SPEC)[None])[0] / 1.7
    expected = np.exp(logits) / np.exp(logits).sum()
    assert np.abs(classifier.classify(path).probabilities - expected).max() < 1e-5


def test_jpeg_certificate_covers_scaled_decoding(run: RunDir) -> None:
    result = certify_jpeg(run, [300, 900], limit=3, threads=1)
    assert result["verdict"] == "pass" and set(result["sizes"]) == {"300", "900"}
    assert result["sizes"]["900"]["files_vs_frames"]["images_with_other_pixels"] == 3


def test_a_network_that_differs_fails_and_is_not_deployed(small: RunDir, tmp_path: Path) -> None:
    """The limit is set below rounding noise, so that a sound export is over it."""
    settings = ExportSettings(
        model=small.model, out=tmp_path / "out", int8="off", logit_limit=1e-9, probability_limit=1e-9, **FAST
    )
    with pytest.raises(ModelError, match=r"certificate\.json: the certificate failed: onnxruntime: logits differ"):
        export_openvino(settings)
    assert not (tmp_path / "out" / "deploy.json").exists()
    (certificate,) = read_certificates(tmp_path / "out").values()
    assert certificate["verdict"] == "fail" and any("ir-fp32" in reason for reason in certificate["reasons"])


def test_a_failing_export_leaves_the_standing_one_alone(run: RunDir, small: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "openvino"
    shutil.copytree(run.openvino, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ModelError, match="openvino-failed"):
        export_openvino(ExportSettings(model=small.model, out=out, int8="off", logit_limit=1e-9, **FAST))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "openvino-failed" / "deploy.json").exists()


def test_forms_of_another_network_fail_their_certificate(run: RunDir, tmp_path: Path) -> None:
    """The certificate must be able to fail for what it is there for: swapped colours in the IR, say."""
    network, forms = exported_forms(run.model, run.openvino)
    wrong = ov.Core().read_model(forms.ir)
    swapped = dataclasses.replace(network, spec=dataclasses.replace(network.spec, mean=network.spec.mean[::-1]))
    ir.describe(wrong, swapped)
    ir.save(wrong, tmp_path / "model.xml")
    samples = find_images(network, manifest=run.dataset, data=None).certificate
    result = certify(
        dataclasses.replace(forms, ir=tmp_path / "model.xml", int8=None, int8_shipped=False),
        samples,
        Limits(),
        threads=1,
    )
    assert result["verdict"] == "fail"
    assert {reason.split(":")[0] for reason in result["reasons"]} == {"python-runtime-files", "python-runtime-frames"}


@dataclasses.dataclass
class FakeCpp:
    """A C++ runtime that answers as ours in Python does, plus ``error`` on the first image; it does not read ``unread``."""

    error: float = 0.0
    unread: int | None = None
    fault: str = ""

    def answers(self, model: Path, paths: tuple[Path, ...], *, precision: str, decode: str, threads: int | None) -> Any:
        if self.fault:
            raise ModelError(self.fault)
        classifier = Classifier(model, precision=precision, decode=decode, threads=threads, cache_dir=False)  # type: ignore[arg-type]
        rows = np.array([row for row in range(len(paths)) if row != self.unread], np.intp)
        found = np.stack([classifier.classify(paths[row]).probabilities for row in rows]).astype(np.float64)
        found[0] += [self.error, *[-self.error / 2] * (found.shape[1] - 1)]
        return CppAnswers(rows, found)


@pytest.mark.parametrize(
    ("runtime", "verdict", "reason"),
    [
        (FakeCpp(), "pass", ""),
        (FakeCpp(unread=0), "pass", ""),
        (FakeCpp(error=0.01), "fail", "cpp-runtime-files: probabilities differ by 0.0"),
        (FakeCpp(fault="cannot read what Python reads"), "fail", "cpp-runtime-files: cannot read what Python reads"),
    ],
)
def test_the_cpp_runtime_is_held_to_the_same_limits(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, runtime: FakeCpp, verdict: str, reason: str
) -> None:
    network, forms = exported_forms(run.model, run.openvino)
    samples = find_images(network, manifest=run.dataset, data=None).certificate
    monkeypatch.setattr(CppRuntime, "find", lambda: runtime)
    certificate = certify(dataclasses.replace(forms, int8=None, int8_shipped=True), samples, Limits(), threads=1)
    columns = {column["name"]: column for column in certificate["columns"]}
    assert certificate["not_run"] == [] and (certificate["verdict"]) == verdict, certificate["reasons"]
    assert not reason or any(one.startswith(reason) for one in certificate["reasons"])
    names = {"cpp-runtime-files", "cpp-runtime-frames", "cpp-runtime-int8"}
    assert names & set(columns) == (set() if runtime.fault else names)
    images = {column["images"] for name, column in columns.items() if name in names}
    assert images == (set() if runtime.fault else {len(samples) - (runtime.unread is not None)})


FAKE_CLASSIFY = """#!{python}
import json, sys
if sys.argv[1] == "--version":
    print({version!r}); sys.exit({code})
words = sys.argv[1:]
assert words[words.index("--precision") + 1] == "f32" and words[words.index("--decode") + 1] == "full"
for path in words[1:words.index("--precision")]:
    error = path.endswith((".tif", "torn.png"))
    print(json.dumps({{"image": path, "error": path + ": no"}} if error else {{"image": path, "probabilities": [0.25, 0.75]}}))
sys.exit(1)
"""


def fake_classify(folder: Path, *, version: str = f"edgedistill {__version__}", code: int = 0) -> None:
    program = folder / "edgedistill-classify"
    program.write_text(FAKE_CLASSIFY.format(python=sys.executable, version=version, code=code))
    program.chmod(0o755)


def test_the_cpp_runtime_is_asked_only_where_it_is_of_this_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEDISTILL_CPP_BIN", str(tmp_path))
    assert "is not built; build it with 'make cpp'" in str(CppRuntime.find())
    fake_classify(tmp_path, version="edgedistill 0.0.1")
    assert "says 'edgedistill 0.0.1'" in str(CppRuntime.find())
    fake_classify(tmp_path, code=127)
    assert "does not start" in str(CppRuntime.find())
    fake_classify(tmp_path)
    assert isinstance(CppRuntime.find(), CppRuntime)


def test_what_the_cpp_runtime_cannot_read_is_a_fault_unless_it_is_a_tiff(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_classify(tmp_path)
    monkeypatch.setenv("EDGEDISTILL_CPP_BIN", str(tmp_path))
    monkeypatch.setattr("edgedistill.runtime.cpp_programs.PATHS_AT_ONCE", 2)
    runtime = CppRuntime.find()
    assert isinstance(runtime, CppRuntime)
    names = ("a.png", "b.tif", "c.png", "torn.png")
    for name in names:
        cv2.imwrite(str(tmp_path / name), pixels(16)[0])
    answers = runtime.answers(
        tmp_path / "m.xml", [tmp_path / name for name in names[:3]], precision="f32", decode="full"
    )
    assert answers.rows.tolist() == [0, 2] and answers.probabilities.tolist() == [[0.25, 0.75]] * 2
    with pytest.raises(ModelError, match=r"cannot read what Python reads: .*torn\.png: no"):
        runtime.answers(tmp_path / "m.xml", [tmp_path / name for name in names], precision="f32", decode="full")


@pytest.mark.parametrize("shipped", [True, False])
def test_int8_that_loses_accuracy_fails_only_where_it_is_shipped(
    run: RunDir, stage: Path, tmp_path: Path, shipped: bool
) -> None:
    network, forms = exported_forms(run.model, run.openvino)
    folder = shutil.copytree(stage, tmp_path / "stage")
    wrong = ov.Core().read_model(stage / "model.xml")
    result = wrong.get_results()[0]
    result.input(0).replace_source_output(opset8.negative(result.input_value(0)).output(0))
    ir.save(wrong, folder / "model-int8.xml")
    samples = find_images(network, manifest=run.dataset, data=None).certificate
    answers = torch_logits(run, np.stack([load_image(path, SPEC) for path in samples.paths])).argmax(1)
    samples = dataclasses.replace(samples, labels=answers.astype(np.int32))
    forms = dataclasses.replace(forms, ir=folder / "model.xml", int8=folder / "model-int8.xml", int8_shipped=shipped)
    certificate = certify(forms, samples, Limits(), threads=1)
    columns = {column["name"]: column["top1"] for column in certificate["columns"]}
    assert columns["torch"] == 1 and columns["ir-int8"] == 0
    expected = {"ir-int8", "python-runtime-int8"} if shipped else set()
    assert {reason.split(":")[0] for reason in certificate["reasons"]} == expected


def test_without_images_nothing_is_deployed_unless_asked_for(small: RunDir, tmp_path: Path) -> None:
    lonely = tmp_path / "model.pt"
    lonely.write_bytes(small.model.read_bytes())
    with pytest.raises(ModelError, match=r"was not run \(no images: .*dataset\.csv.*--no-certificate"):
        export_openvino(ExportSettings(model=lonely, **FAST))
    (certificate,) = read_certificates(tmp_path / "openvino").values()
    assert certificate["verdict"] == "not run" and certificate["int8"]["decision"] == "refused"
    assert not (tmp_path / "openvino" / "deploy.json").exists()
    out = export_openvino(ExportSettings(model=lonely, certificate=False, **FAST))
    assert Bundle.load(out).config.latency.precision == "f32"


def test_data_of_another_folder_certifies_too(small: RunDir, tmp_path: Path) -> None:
    lonely = tmp_path / "model.pt"
    lonely.write_bytes(small.model.read_bytes())
    settings = ExportSettings(model=lonely, data=str(small.root / "photos"), int8="off", **FAST)
    (certificate,) = read_certificates(export_openvino(settings)).values()
    assert certificate["source"] == "folder" and 8 < certificate["n"] < 24


def test_any_timm_checkpoint_can_be_exported(small: RunDir, tmp_path: Path) -> None:
    torch.save(read_model(small.model).model.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "labels.txt").write_text("\n".join(sorted(CLASSES)) + "\n")
    settings = ExportSettings(
        architecture="resnet10t",
        weights=tmp_path / "weights.pth",
        labels=tmp_path / "labels.txt",
        data=str(small.root / "photos"),
        image_size=32,
        int8="off",
        **FAST,
    )
    bundle = Bundle.load(export_openvino(settings))
    spec = bundle.metadata[0].input_spec
    assert (spec.resize, spec.crop_fraction, spec.height) == ("center-crop", 0.95, 32)
    assert bundle.metadata[0].labels == tuple(sorted(CLASSES)) and bundle.metadata[0].temperature == 1.0


def test_parity_on_test_is_a_file_of_its_own(run: RunDir, stage: Path) -> None:
    (stage / "certificate-test.json").unlink()
    path = certify_test(run.model, run.openvino)
    certificate = read_json(path, format=CERTIFICATE_FORMAT)
    assert path == stage / "certificate-test.json" and (certificate["split"], certificate["n"]) == ("test", 8)


def test_an_export_of_another_model_is_not_certified(run: RunDir, tmp_path: Path) -> None:
    other = tmp_path / "model.pt"
    write_model(
        other, create_model("mobilenetv3_small_050", class_count=3), architecture="mobilenetv3_small_050",
        model_kwargs={"num_classes": 3}, classes=tuple(sorted(CLASSES)), input_spec=SPEC, dataset_hash="", settings={},
    )  # fmt: skip
    with pytest.raises(ArtifactError, match="exported from another model"):
        exported_forms(other, run.openvino)


def test_a_manifest_of_another_data_set_is_refused(small: RunDir, tmp_path: Path) -> None:
    copied = RunDir(tmp_path)
    copied.model.write_bytes(small.model.read_bytes())
    lines = small.dataset.read_text().splitlines(keepends=True)
    copied.dataset.write_text("".join(lines[:-4]))
    with pytest.raises(ArtifactError, match=r"dataset\.csv: data set .* but the model was trained on"):
        export_openvino(ExportSettings(model=copied.model, **FAST))
    copied.dataset.write_text("".join(lines).replace("big dog,", "wolf,"))
    with pytest.raises(ArtifactError, match="wolf"):
        export_openvino(ExportSettings(model=copied.model, **FAST))
    assert not copied.openvino.exists()


def test_foreign_class_names_and_damaged_images_are_named(small: RunDir, tmp_path: Path) -> None:
    lonely = tmp_path / "model.pt"
    lonely.write_bytes(small.model.read_bytes())
    data = tmp_path / "data"
    for name in ("cat", "wolf"):
        (data / name).mkdir(parents=True)
        for number in range(4):
            (data / name / f"{number}.png").write_bytes(cv2.imencode(".png", pixels()[0])[1].tobytes())
    with pytest.raises(DataError, match="wolf"):
        export_openvino(ExportSettings(model=lonely, data=str(data), **FAST))
    (data / "wolf").rename(data / "big dog")
    for path in data.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ImageError, match=r"\.png"):
        export_openvino(ExportSettings(model=lonely, data=str(data), **FAST))
    assert not (tmp_path / "openvino").exists() and not (tmp_path / ".openvino.new").exists()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("a b", "c"), ("a_b", "c")),
        (("a\tb\x00", "été"), ("a_b_", "été")),
        (("a b", "a_b"), None),
        (("", "b"), None),
    ],
)
def test_labels_survive_a_space_separated_list_or_are_refused(
    names: tuple[str, ...], expected: tuple[str, ...] | None
) -> None:
    if expected is None:
        with pytest.raises(ModelError, match="rename"):
            model_api_labels(names)
    else:
        assert model_api_labels(names) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"model": Path("m.pt"), "architecture": "resnet18"},
        {"architecture": "resnet18", "weights": Path("w.pth")},
        {"model": Path("m.pt"), "int8": "maybe"},
        {"model": Path("m.pt"), "threads": 0},
        {"model": Path("m.pt"), "calibration_images": 0},
        {"model": Path("m.pt"), "image_size": 4},
        {"model": Path("m.pt"), "int8_max_drop": 2.0},
        {"model": Path("m.pt"), "logit_limit": 0.0},
        {"model": Path("m.pt"), "certificate": False, "test_parity": True},
    ],
)
def test_settings_that_contradict_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ExportSettings(**wrong)
