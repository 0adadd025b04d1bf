"""The C++ classifier is Python's: the same answers for the same images, and the same files refused."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openvino as ov
import PIL.Image
import pytest
from openvino import opset13 as ops

from edgedistill.errors import ArtifactError, EdgedistillError, ImageError, ModelError
from edgedistill.images import InputSpec, normalize, prepare
from edgedistill.runtime import Classifier, Prediction
from edgedistill.runtime.bundle import DeployConfig, LatencySettings, Stage, describe_stage, read_deploy, write_deploy

pytestmark = pytest.mark.cpp

TESTS = Path(__file__).resolve().parents[1]
PROGRAM = TESTS.parent / "build" / "cpp" / "bin" / "answer_dump"
# TIFF, big-endian, one entry: orientation (0x0112), SHORT, 1 value, 6.
ORIENTATION_6 = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
# The deployables and the hostile files that the tests of Python's runtime are made of.
Maker = runpy.run_path(str(TESTS / "runtime" / "conftest.py"))["Maker"]
HOSTILE = runpy.run_path(str(TESTS / "runtime" / "test_deployables_are_checked_before_use.py"))
KINDS = {ArtifactError: "artifact", ModelError: "model", ImageError: "image"}


@dataclass(frozen=True)
class Dump:
    """What `answer_dump` said: of the model and of each image. ``error`` is None where the model was loaded."""

    model: dict[str, Any]
    answers: list[dict[str, Any]]
    log: str

    @property
    def error(self) -> str | None:
        return self.model.get("error")

    @property
    def kind(self) -> str:
        return self.model.get("kind", "")


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("EDGEDISTILL_CACHE", str(tmp_path / "cache"))
    return Maker(tmp_path)


def dump(model: Path | str, lines: Sequence[str] = (), *options: str) -> Dump:
    program = Path(os.environ.get("EDGEDISTILL_ANSWER_DUMP", PROGRAM))
    assert program.is_file(), f"{program} is not built; run 'make cpp' first"
    text = "".join(f"{line}\n" for line in lines)
    result = subprocess.run([program, str(model), *options], input=text, capture_output=True, text=True, timeout=120)
    assert result.returncode in (0, 1), f"{model}: ended with {result.returncode}\n{result.stderr}"
    first, *rest = (json.loads(line) for line in result.stdout.splitlines())
    return Dump(first, rest, result.stderr)


def assert_same(got: dict[str, Any], expected: Prediction) -> None:
    assert "error" not in got, got
    assert (got["label"], got["index"], got["stage"]) == (expected.label, expected.index, expected.stage)
    assert tuple(got["accepted"]) == expected.accepted
    np.testing.assert_allclose(got["probabilities"], expected.probabilities, rtol=0, atol=1e-6)
    np.testing.assert_allclose(got["probability"], expected.probability, rtol=0, atol=1e-6)


def assert_same_on_colours(make: Any, model: Path, *options: str) -> list[Prediction]:
    """Files, bytes and pixels of every colour get Python's answers, which are returned."""
    lines: list[str] = []
    sources: list[Any] = []
    for colour in make.labels:
        photo, frame = make.photo(colour, height=90, width=120), make.picture(colour)
        lines += [f"file\t{photo}", f"bytes\t{photo}", pixels_line(make.folder / f"{colour}.raw", frame)]
        sources += [photo, photo.read_bytes(), frame]
    classifier = Classifier(model, precision=options[0] if options else None)
    got, expected = dump(model, lines, *options), classifier.classify(sources)
    assert got.error is None, got.error
    assert tuple(got.model["labels"]) == classifier.labels and got.model["precision"] == classifier.precision
    assert got.model["temperature"] == classifier.temperature and got.model["multi_label"] == classifier.multi_label
    assert got.model["size"] == [classifier.spec.height, classifier.spec.width]
    for answer, reference in zip(got.answers, expected, strict=True):
        assert_same(answer, reference)
    return expected


def pixels_line(path: Path, pixels: np.ndarray, kind: str = "bgr", *, padding: int = 0) -> str:
    """The line that makes answer_dump read these pixels but for ``padding`` columns on the right."""
    path.write_bytes(np.ascontiguousarray(pixels).tobytes())
    height, width = pixels.shape[:2]
    row_bytes = pixels[0].nbytes if padding else 0
    return f"pixels\t{kind}\t{height}\t{width - padding}\t{row_bytes}\t{path}"


def photographs(folder: Path, count: int = 36) -> list[Path]:
    """Solar cells as they come (PNG), and as JPEG of other sizes."""
    import elpv_dataset

    cells = sorted((Path(elpv_dataset.__file__).parent / "data" / "images").glob("*.png"))
    assert len(cells) >= count
    paths = []
    for number, cell in enumerate(cells[:: len(cells) // count][:count]):
        if number % 3 == 0:
            paths.append(cell)
            continue
        image = cv2.imread(str(cell))
        assert image is not None
        paths.append(folder / f"{cell.stem}.jpg")
        cv2.imwrite(str(paths[-1]), cv2.resize(image, (640, 427) if number % 3 == 1 else (1920, 1281)))
    return paths


def random_network(centre: np.ndarray, *, quantised: bool) -> ov.Model:
    """Convolutions with random weights at 64 px; ``centre`` is taken from the logits. ``quantised``: to eight bits."""
    rng = np.random.default_rng(1)

    def in_eight_bits(value: Any, low: float, high: float) -> Any:
        limits = [np.float32(limit) for limit in (low, high, low, high)]
        return ops.fake_quantize(value, *limits, 256) if quantised else value

    image = ops.parameter([1, 3, 64, 64], np.float32, name="image")
    value, channels = in_eight_bits(image, -3.0, 3.0), 3
    for wider in (16, 32, 32):
        weights = rng.standard_normal((wider, channels, 3, 3)) * np.sqrt(2 / (9 * channels))
        constant = ops.constant(weights.clip(-1, 1).astype(np.float32))
        mixed = ops.convolution(value, in_eight_bits(constant, -1.0, 1.0), [2, 2], [1, 1], [1, 1], [1, 1])
        value, channels = in_eight_bits(ops.relu(mixed), 0.0, 6.0), wider
    means = ops.reduce_mean(value, np.array([2, 3]), False)
    scores = ops.matmul(means, (20 * rng.standard_normal((channels, 3))).astype(np.float32), False, False)
    model = ov.Model([ops.subtract(scores, centre.astype(np.float32))], [image], "random")
    model.inputs[0].get_node().set_layout(ov.Layout("NCHW"))
    return model


def random_deployable(make: Any, paths: Sequence[Path]) -> Path:
    """FP32 and INT8 forms of a network that gives these photographs more than one label."""
    spec, root = InputSpec(height=64, width=64), make.folder / "random"
    root.mkdir()
    plain = ov.Core().compile_model(random_network(np.zeros((1, 3)), quantised=False), "CPU")
    pixels = (prepare(cv2.imread(str(path)), spec) for path in paths)  # type: ignore[arg-type]
    centre = np.mean([plain(normalize(image[None], spec))[0] for image in pixels], axis=0)
    for name, quantised in (("model.xml", False), ("model-int8.xml", True)):
        model = make.describe(random_network(centre, quantised=quantised), "edgedistill", make.own_metadata(spec))
        ov.save_model(model, root / name, compress_to_fp16=False)
    stage = describe_stage(root, "model.xml", input_spec=spec, temperature=1.25)
    assert stage.int8_sha256 is not None
    write_deploy(root / "deploy.json", DeployConfig(stages=(stage,)))
    return root


def test_photographs_get_the_same_answers(make: Any) -> None:
    paths = photographs(make.folder)
    root = random_deployable(make, paths)
    by_precision = []
    for precision, decode in (("f32", "reduced"), ("f32", "full"), ("int8", "reduced"), ("int8", "full")):
        expected = Classifier(root, precision=precision, decode=decode).classify(paths)  # type: ignore[arg-type]
        assert len({answer.label for answer in expected}) > 1
        got = dump(root, [f"file\t{path}" for path in paths], precision, decode)
        assert got.model["precision"] == precision and got.model["temperature"] == 1.25
        for answer, reference, path in zip(got.answers, expected, paths, strict=True):
            assert_same(answer, reference)
            assert answer["name"] == str(path)
        by_precision.append(np.stack([answer.probabilities for answer in expected]))
    # Otherwise one precision or one way of decoding would have been compared with itself.
    assert all(np.abs(one - other).max() > 1e-4 for one in by_precision for other in by_precision if one is not other)


def test_pixels_of_every_kind_get_the_same_answers(make: Any) -> None:
    root, lines, sources = make.deployable(), [], []
    for number, (height, width) in enumerate([(40, 56), (32, 32), (7, 301), (700, 513), (1, 1)]):
        bgr = make.picture("green", height, width, seed=number)
        alpha = np.dstack([bgr, np.full((height, width), 7, np.uint8)])
        padded = np.pad(bgr, ((0, 0), (0, 3), (0, 0)))
        for kind, pixels, reference in (
            ("bgr", bgr, bgr),
            ("rgb", bgr[..., ::-1], bgr),
            ("gray", bgr[..., 1], bgr[..., 1]),
            ("bgra", alpha, alpha),
            ("rgba", alpha[..., [2, 1, 0, 3]], alpha),
        ):
            lines.append(pixels_line(make.folder / f"{number}-{kind}.raw", pixels, kind))
            sources.append(reference)
        lines.append(pixels_line(make.folder / f"{number}-padded.raw", padded, padding=3))
        sources.append(bgr)
    expected = Classifier(root).classify(sources)
    for answer, reference in zip(dump(root, lines).answers, expected, strict=True):
        assert_same(answer, reference)


def test_a_bad_image_costs_only_itself_and_says_the_same(make: Any) -> None:
    root, good = make.deployable(), make.photo("red")
    broken, empty, absent = (make.folder / name for name in ("broken.jpg", "empty.png", "absent.jpg"))
    broken.write_bytes(good.read_bytes()[:200])
    empty.touch()
    bad: list[Any] = [broken, empty, absent, make.folder, good.read_bytes()[:50]]
    (make.folder / "cut.raw").write_bytes(bad[-1])
    lines = [*(f"file\t{path}" for path in bad[:-1]), f"bytes\t{make.folder / 'cut.raw'}", f"file\t{good}"]
    *refused, last = dump(root, lines).answers
    for answer, reference in zip(refused, Classifier(root).classify(bad), strict=True):
        assert answer["kind"] == "image" and reference.error is not None
        # The name and what was found; the reason inside brackets is each decoder's own.
        assert answer["error"].split("(")[0] == reference.error.split("(")[0]
    assert last["label"] == "red"


@pytest.mark.parametrize(
    "kind", [{"bgr": True}, {"layout": "NHWC"}, {"layout": "NHWC", "bgr": True}, {"softmax": True}], ids=str
)
def test_foreign_networks_get_the_same_answers(make: Any, kind: dict[str, Any]) -> None:
    info = HOSTILE["MODEL_API"] | {"reverse_input_channels": str(not kind.get("bgr", False)), "resize_type": "crop"}
    model = make.describe(make.model(**kind), "model_info", info)
    ov.save_model(model, make.folder / "model.xml", compress_to_fp16=False)
    assert_same_on_colours(make, make.folder / "model.xml")


@pytest.mark.parametrize(("threshold", "stage"), [(0.0, 0), (0.3, 0), (0.99, 1)])
@pytest.mark.parametrize("slow_size", [32, 48])
def test_cascades_ask_the_same_stage(make: Any, threshold: float, stage: int, slow_size: int) -> None:
    root = make.cascade(exit_threshold=threshold, slow_size=slow_size, reject_below=0.2)
    assert {answer.stage for answer in assert_same_on_colours(make, root)} == {stage}


@pytest.mark.parametrize("precisions", [("int8", "f32"), ("f32", "int8"), ("int8", None)], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.99])
def test_stages_of_unlike_precisions_answer_alike(
    make: Any, precisions: tuple[str, str | None], threshold: float
) -> None:
    first, later = precisions
    settings = LatencySettings(first, later_precision=later)
    root = make.cascade(exit_threshold=threshold, slow_size=48, int8="fast slow", latency=settings)
    found = assert_same_on_colours(make, root)
    name = "fast" if threshold == 0 else "slow"
    alone = Classifier(root / f"{name}.xml", precision=first if threshold == 0 else later or first)
    for answer, colour in zip(found[2::3], make.labels, strict=True):
        np.testing.assert_allclose(answer.probabilities, alone.classify(make.picture(colour)).probabilities, atol=1e-6)
    assert_same_on_colours(make, root, "f32")


def test_a_later_stage_without_that_form_is_refused_alike(make: Any) -> None:
    root = make.cascade(exit_threshold=0.9, int8="fast", latency=LatencySettings("f32", later_precision="int8"))
    with pytest.raises(EdgedistillError, match="no INT8 form"):
        Classifier(root)
    refused = dump(root)
    assert refused.kind == "model" and "slow.xml has no INT8 form" in str(refused.error)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp"])
@pytest.mark.parametrize(("height", "width"), [(90, 120), (200, 260)], ids=["decoded twice", "decoded once"])
def test_the_second_stage_sees_what_python_shows_it(make: Any, suffix: str, height: int, width: int) -> None:
    """As a JPEG the smaller picture is reduced unlike for 32 and 48 pixels, the larger one alike."""
    root = make.cascade(exit_threshold=0.99, slow_size=48)
    photos = [make.photo(colour, suffix, height=height, width=width, seed=3) for colour in make.labels]
    turned = make.folder / "turned.jpg"
    PIL.Image.open(make.photo("red", height=height, width=width)).save(turned, exif=b"Exif\0\0" + ORIENTATION_6)
    broken = make.folder / "broken.jpg"
    broken.write_bytes(turned.read_bytes()[:300])
    got = dump(root, [f"file\t{path}" for path in (*photos, turned, broken)])
    *expected, refused = Classifier(root).classify([*photos, turned, broken])
    assert {answer.stage for answer in expected} == {1}
    for answer, reference in zip(got.answers[:-1], expected, strict=True):
        assert_same(answer, reference)
    assert got.answers[-1]["kind"] == "image" and refused.error is not None


def test_unknown_is_unknown_in_both(make: Any) -> None:
    root = make.deployable(reject_below=0.9)
    line = pixels_line(make.folder / "grey.raw", np.full((40, 40, 3), 120, np.uint8))
    (answer,) = dump(root, [line]).answers
    assert_same(answer, Classifier(root).classify(np.full((40, 40, 3), 120, np.uint8)))
    assert (answer["label"], answer["index"]) == ("unknown", -1)


def test_several_labels_at_once_are_accepted_alike(make: Any) -> None:
    spec, changes = InputSpec(height=32, width=32), {"task": "multi-label"}
    own = make.ir(make.folder / "own" / "model.xml", spec=spec, changes=changes)
    ending = make.ir(make.folder / "ending" / "model.xml", spec=spec, changes=changes, sigmoid=True)
    foreign = make.folder / "foreign.xml"
    info = HOSTILE["MODEL_API"] | {"multilabel": "True", "confidence_threshold": "0"}
    ov.save_model(make.describe(make.model(), "model_info", info), foreign, compress_to_fp16=False)
    accepted = [answer.accepted for path in (own, ending, foreign) for answer in assert_same_on_colours(make, path)]
    assert set(accepted) == {(0,), (1,), (2,), (0, 1, 2)}
    sure = make.ir(make.folder / "sure" / "model.xml", spec=spec, changes=changes, sigmoid=True, gain=500.0)
    assert_same_on_colours(make, sure)
    each = make.ir(make.folder / "each" / "model.xml", spec=spec, changes=changes | {"thresholds": "[1, 0, 0.5]"})
    accepted = [answer.accepted for answer in assert_same_on_colours(make, each)]
    assert set(accepted) == {(1,), (1, 2)}


def test_an_output_that_is_no_number_is_an_error_in_both(make: Any) -> None:
    path = make.ir(make.folder / "model.xml", gain=float("nan"))
    (answer,) = dump(path, [f"file\t{make.photo('red')}"]).answers
    assert answer["error"] == Classifier(path).classify([make.photo("red")])[0].error


def test_a_model_in_memory_answers_as_the_file_does(make: Any) -> None:
    path, photo = make.ir(make.folder / "model.xml"), make.photo("green")
    (answer,) = dump(f"memory:{path}", [f"file\t{photo}"]).answers
    assert_same(answer, Classifier(path).classify(photo))
    refused = dump(f"memory:{path}", (), "int8")
    assert refused.kind == "model" and "no INT8 form" in str(refused.error)
    path.write_bytes(b"<net")
    path.with_suffix(".bin").write_bytes(b"")
    refused = dump(f"memory:{path}")
    assert refused.kind == "model" and "not a readable" in str(refused.error)


def test_int8_takes_its_own_file(make: Any) -> None:
    root = make.folder / "int8"
    make.ir(root / "model.xml")
    make.ir(root / "model-int8.xml", gain=7.0)
    plain, int8 = (assert_same_on_colours(make, root / "model.xml", precision)[0] for precision in ("f32", "int8"))
    assert int8.probability > plain.probability


def test_precision_and_processor_are_chosen_alike(make: Any) -> None:
    tuned = make.deployable("tuned", latency=LatencySettings("bf16"))
    assert_same_on_colours(make, tuned)
    has_bf16 = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert has_bf16 or "bf16" in dump(tuned).log
    elsewhere = make.deployable("elsewhere", latency=LatencySettings("bf16", 1), cpu="a processor of another kind")
    got = dump(elsewhere)
    assert got.model["precision"] == "f32" == Classifier(elsewhere).precision
    assert "a processor of another kind" in got.log
    older = make.deployable("older", latency=LatencySettings("f32", 1), versions={"openvino": "2019.1.3"})
    assert "OpenVINO 2019.1," in dump(older).log
    assert dump(make.deployable("plain")).log == ""


@pytest.mark.parametrize("precision", ["int8", "bf16", "fp16"])
def test_a_precision_that_is_not_there_is_refused(make: Any, precision: str) -> None:
    if precision == "bf16" and "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has bfloat16")
    root = make.deployable()
    with pytest.raises(EdgedistillError):
        Classifier(root, precision=precision)
    assert dump(root, (), precision).kind == ("usage" if precision == "fp16" else "model")


def test_every_way_to_name_a_deployable_works(make: Any) -> None:
    root = make.deployable()
    ir = root / "stages" / "tiny" / "model.xml"
    for path in (root, root.parent, root / "deploy.json", ir, ir.parent, os.path.relpath(root)):
        assert dump(path).model["labels"] == list(make.labels)
    (make.folder / "empty").mkdir()
    (make.folder / "model.pt").write_bytes(b"x")
    for name in ("empty", "missing", "model.pt"):
        assert_refused_alike(make.folder / name, says=name)


def assert_refused_alike(path: Path, *, says: str = "") -> None:
    with pytest.raises(EdgedistillError) as error:
        Classifier(path, cache_dir=False)
    got = dump(path)
    assert got.kind == KINDS[type(error.value)], f"{got.error} instead of {error.value}"
    assert says in str(got.error)


@pytest.mark.parametrize("change", HOSTILE["STAGE_CHANGES"], ids=str)
def test_hostile_stages_are_refused(make: Any, change: dict[str, Any]) -> None:
    root = make.deployable()
    values = json.loads((root / "deploy.json").read_text())
    values["stages"][0].update(change)
    (root / "deploy.json").write_text(json.dumps(values))
    assert_refused_alike(root)


@pytest.mark.parametrize("change", HOSTILE["DEPLOY_CHANGES"], ids=str)
def test_hostile_settings_are_refused(make: Any, change: dict[str, Any]) -> None:
    root = make.deployable()
    values = json.loads((root / "deploy.json").read_text()) | change
    (root / "deploy.json").write_text(json.dumps(values))
    assert_refused_alike(root, says="deploy.json")


BROKEN = {
    "nothing": b"",
    "half": b"{",
    "a list": b"[]",
    "no stages": b'{"format": "edgedistill-deploy", "version": 1}',
    "not UTF-8": b"\xff",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "deep": b"[" * 200_000,
    "deep and whole": b"[" * 200_000 + b"]" * 200_000,
}


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_deploy_json_is_refused(make: Any, content: str) -> None:
    root = make.deployable()
    (root / "deploy.json").write_bytes(BROKEN[content])
    assert_refused_alike(root, says="deploy.json")


@pytest.mark.parametrize("change", HOSTILE["METADATA_CHANGES"])
def test_hostile_metadata_are_refused(make: Any, change: str) -> None:
    path = make.ir(make.folder / "model.xml", changes=HOSTILE["METADATA_CHANGES"][change])
    assert_refused_alike(path, says="model.xml")


@pytest.mark.parametrize("change", HOSTILE["MODEL_API_CHANGES"], ids=str)
def test_foreign_metadata_that_do_not_fit_are_refused(make: Any, change: dict[str, str]) -> None:
    model = make.describe(make.model(), "model_info", HOSTILE["MODEL_API"] | change)
    ov.save_model(model, make.folder / "model.xml", compress_to_fp16=False)
    assert_refused_alike(make.folder / "model.xml", says="model.xml")


LABELS = {
    "bidirectional": ["a", "b\u202e", "c"],
    "no-break space": ["a", "b\u00a0b", "c"],
    "private": ["a", "\ue000", "c"],
    "half a surrogate": ["a", "\ud800", "c"],
    "1001 letters": ["a", "é" * 1001, "c"],
}


@pytest.mark.parametrize("labels", LABELS)
def test_labels_that_cannot_be_shown_are_refused(make: Any, labels: str) -> None:
    path = make.ir(make.folder / "model.xml", changes={"labels": json.dumps(LABELS[labels])})
    assert_refused_alike(path, says="model.xml")


def test_labels_of_every_language_pass(make: Any) -> None:
    labels = ["é" * 1000, "日本語 の", "🙂\u0301"]
    path = make.ir(make.folder / "model.xml", changes={"labels": json.dumps(labels)})
    assert dump(path).model["labels"] == labels == list(Classifier(path).labels)


def test_metadata_beyond_any_use_are_refused(make: Any) -> None:
    limit = HOSTILE["MAX_METADATA_CHARACTERS"]
    path = make.ir(make.folder / "model.xml", changes={"architecture": "x" * limit})
    assert dump(path).error is None
    path = make.ir(make.folder / "model.xml", changes={"architecture": "x" * (limit + 1)})
    assert_refused_alike(path, says="longer than")


def test_networks_that_are_no_image_classifiers_are_refused(make: Any) -> None:
    spec = InputSpec(height=32, width=32)
    dynamic, flat, two, bare, embedded = (make.model() for _ in range(5))
    dynamic.reshape([-1, 3, 32, 32])
    flat.reshape([2, 3, 32, 32])
    two.add_outputs([two.inputs[0].get_node().output(0)])
    make.describe(embedded, "edgedistill", {"preprocessing_embedded": "True"})
    for number, model in enumerate((dynamic, flat, two, bare, embedded)):
        path = make.folder / f"{number}.xml"
        if model is not bare:
            make.describe(model, "edgedistill", make.own_metadata(spec))
        ov.save_model(model, path, compress_to_fp16=False)
        assert_refused_alike(path, says=path.name)


@pytest.mark.parametrize("damage", ["text", "cut xml", "cut bin", "html", "no bin", "deep"])
def test_a_damaged_ir_is_refused(make: Any, damage: str) -> None:
    path = make.ir(make.folder / "model.xml")
    content, weights = path.read_bytes(), path.with_suffix(".bin")
    if damage == "no bin":
        weights.unlink()
    elif damage == "cut bin":
        weights.write_bytes(b"")
    else:
        deep = content.replace(b"<rt_info>", b"<rt_info>" + b"<a>" * 400 + b"</a>" * 400)
        changed = {"text": b"hello", "html": b"<html></html>", "deep": deep}.get(damage, content[: len(content) // 2])
        path.write_bytes(changed)
    got = dump(path)
    assert got.kind == ("artifact" if damage == "no bin" else "model"), got
    assert "model." in str(got.error)


def test_files_that_changed_or_lead_outside_are_refused(make: Any) -> None:
    root = make.deployable()
    weights = root / "stages" / "tiny" / "model.bin"
    data = bytearray(weights.read_bytes())
    data[0] ^= 1
    weights.write_bytes(data)
    assert_refused_alike(root, says="export the model again")
    weights.unlink()
    assert_refused_alike(root, says="model.bin: cannot be read")
    elsewhere = make.deployable("elsewhere")
    (elsewhere / "stages").rename(make.folder / "moved")
    (elsewhere / "stages").symlink_to(make.folder / "moved")
    assert_refused_alike(elsewhere, says="leads outside")


def test_a_pipe_is_not_waited_for(make: Any) -> None:
    root = make.deployable()
    for name in ("deploy.json", "stages/tiny/model.bin"):
        path = root / name
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        assert dump(root / "deploy.json").kind == "artifact"
        path.unlink()
        path.write_bytes(content)


def test_the_resolution_may_change_and_nothing_else(make: Any) -> None:
    root = make.deployable()
    stage = read_deploy(root / "deploy.json").stages[0]

    def rewrite(spec: InputSpec) -> None:
        changed = Stage(stage.model, stage.sha256, spec, stage.temperature)
        write_deploy(root / "deploy.json", DeployConfig(stages=(changed,)))

    rewrite(stage.input_spec.resized(48, 40))
    assert_same_on_colours(make, root)
    rewrite(InputSpec(height=32, width=32, mean=(0, 0, 0)))
    assert_refused_alike(root, says="differ in more than the resolution")


def test_a_cascade_has_one_set_of_labels_and_one_task(make: Any) -> None:
    root = make.cascade(exit_threshold=0.5)
    first, last = read_deploy(root / "deploy.json").stages
    for changes, says in (({"labels": '["x", "y", "z"]'}, "other labels"), ({"task": "multi-label"}, "another task")):
        make.ir(root / "slow.xml", spec=last.input_spec, changes=changes)
        slow = describe_stage(root, "slow.xml", input_spec=last.input_spec, temperature=1.0)
        write_deploy(root / "deploy.json", DeployConfig(stages=(first, slow)))
        assert_refused_alike(root, says=says)
    values = json.loads((root / "deploy.json").read_text())
    values["stages"][0]["exit_threshold"] = None
    (root / "deploy.json").write_text(json.dumps(values))
    assert_refused_alike(root, says="exit_threshold")


def test_each_stage_of_several_heads_has_its_own_thresholds(make: Any) -> None:
    root, of, hue, value = make.cascade(exit_threshold=0.5), HOSTILE["heads_metadata"], HOSTILE["HUE"], HOSTILE["DEPTH"]
    first, last = read_deploy(root / "deploy.json").stages
    for stage, changes in ((first, {"threshold": 0.0}), (last, {"threshold": [1.0, 0.0], "weight": 3.0})):
        make.ir(root / stage.model, spec=stage.input_spec, changes=of(hue | {"kind": "sigmoid"} | changes, value))
    yellow = np.full((40, 40, 3), (30, 230, 210), np.uint8)  # BGR: red, and more green
    line = pixels_line(make.folder / "yellow.raw", yellow)
    for exits, temperature, accepted in ((0.0, 1.0, (0, 1)), (1.0, 1.0, (1,)), (1.0, 0.02, (0, 1))):
        stages = tuple(
            describe_stage(root, stage.model, input_spec=stage.input_spec, temperature=temperature, exit_threshold=end)
            for stage, end in ((first, exits), (last, None))
        )
        write_deploy(root / "deploy.json", DeployConfig(stages=stages))
        expected = Classifier(root, cache_dir=False).classify(yellow)
        assert expected.heads[0].accepted == accepted and expected.index == 1  # at 0.02 both are certain
        assert_same(dump(root, [line]).answers[0], expected)
    make.ir(root / last.model, spec=last.input_spec, changes=of(hue | {"kind": "sigmoid"}, value | {"std": 9.0}))
    slow = describe_stage(root, last.model, input_spec=last.input_spec, temperature=1.0)
    write_deploy(root / "deploy.json", DeployConfig(stages=(stages[0], slow)))
    assert_refused_alike(root, says="another task")


def test_both_languages_share_the_cache_of_compiled_models(make: Any) -> None:
    root, photo, folder = make.deployable(), make.photo("red"), make.folder / "cache" / "openvino"
    expected = Classifier(root).classify(photo)
    blobs = sorted(folder.iterdir())
    assert blobs
    line = f"file\t{photo}"
    assert_same(dump(root, [line]).answers[0], expected)
    assert sorted(folder.iterdir()) == blobs
    for damage in (lambda data: data[: len(data) // 2], lambda data: b"junk"):
        for blob in blobs:
            blob.chmod(0o644)
            blob.write_bytes(damage(blob.read_bytes()))
        assert_same(dump(root, [line]).answers[0], expected)


def test_a_cache_that_cannot_be_written_harms_nothing(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root, line = make.deployable(), f"file\t{make.photo('red')}"
    (make.folder / "file").touch()
    monkeypatch.setenv("EDGEDISTILL_CACHE", str(make.folder / "file"))
    assert dump(root, [line]).answers[0]["label"] == "red"
    monkeypatch.delenv("EDGEDISTILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(make.folder / "xdg"))
    assert dump(root, [line]).answers[0]["label"] == "red"
    assert list((make.folder / "xdg" / "edgedistill" / "openvino").iterdir())
