"""classifier.py: the right answer from every kind of source, at the precision asked for, with cache and cascade."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

from edgedistill.errors import ImageError, ModelError
from edgedistill.images import InputSpec, load_image, normalize, prepare
from edgedistill.runtime import Bundle, Classifier, Frame
from edgedistill.runtime.network import Network, cache_folder, sigmoid, softmax


def reference(pixels: np.ndarray, spec: InputSpec, *, gain: float = 2.0, temperature: float = 1.5) -> np.ndarray:
    """The tiny network in numpy."""
    scaled = gain * normalize(pixels[None], spec)[0].mean(axis=(1, 2), dtype=np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def test_paths_bytes_arrays_and_lists_are_answered(make: Any) -> None:
    classifier = Classifier(make.deployable())
    assert classifier.labels == make.labels and classifier.temperature == 1.5 and classifier.precision == "f32"
    for index, colour in enumerate(make.labels):
        for suffix in (".jpg", ".png"):
            photo = make.photo(colour, suffix)
            expected = reference(load_image(photo, classifier.spec), classifier.spec)
            for source in (photo, str(photo), photo.read_bytes(), bytearray(photo.read_bytes()), Frame("it", photo)):
                answer = classifier.classify(source)
                assert (answer.label, answer.index, answer.error, answer.stage) == (colour, index, None, 0)
                assert answer.probabilities.dtype == np.float32 and answer.probabilities.shape == (3,)
                np.testing.assert_allclose(answer.probabilities, expected, atol=1e-5)
                assert answer.probability == answer.probabilities.max()
        frame = make.picture(colour)
        answer = classifier.classify(frame)
        np.testing.assert_allclose(
            answer.probabilities, reference(prepare(frame, classifier.spec), classifier.spec), atol=1e-5
        )
    answers = classifier.classify([make.photo("red"), make.picture("green"), Frame("blue", make.picture("very blue"))])
    assert [answer.label for answer in answers] == list(make.labels)
    assert [answer.name for answer in answers] == [str(make.photo("red")), "", "blue"]


def test_odd_frames_are_answered(make: Any) -> None:
    classifier, frame = Classifier(make.deployable()), make.picture("red")
    deep = frame.astype(np.uint16) << 8
    clear = np.dstack([frame, np.zeros(frame.shape[:2], np.uint8)])
    for odd in (deep, clear, frame[::-1], frame[:, ::2]):
        assert classifier.classify(odd).label == "red"
    grey = classifier.classify(np.full((50, 20), 128, np.uint8))
    assert grey.error is None and grey.probability < 0.6


def test_one_bad_image_raises_and_in_a_list_it_costs_only_itself(make: Any) -> None:
    classifier = Classifier(make.deployable())
    (make.folder / "broken.jpg").write_bytes(make.photo("red").read_bytes()[:200])
    for bad, what in (
        (make.folder / "broken.jpg", r"broken\.jpg: damaged"),
        (make.folder / "none.jpg", "No such file"),
        (np.zeros((4, 4, 3)), "float64"),
        (17, "int: expected a path"),
    ):
        with pytest.raises(ImageError, match=what):
            classifier.classify(bad)  # type: ignore[call-overload]
    answers = classifier.classify([make.folder / "broken.jpg", make.photo("red"), 17])
    assert [answer.label for answer in answers] == ["", "red", ""]
    assert "broken.jpg" in str(answers[0].error) and answers[0].probabilities.size == 0 and answers[0].index == -1


@pytest.mark.parametrize(
    "kind", [{"bgr": True}, {"layout": "NHWC"}, {"layout": "NHWC", "bgr": True}, {"softmax": True}], ids=str
)
def test_foreign_networks_see_the_pixels_they_were_made_for(make: Any, kind: dict[str, Any]) -> None:
    """BGR planes, NHWC inputs and a softmax inside: the same probabilities as the plain network, at T = 1."""
    spec = InputSpec(height=32, width=32)
    bgr = kind.get("bgr", False)
    info = {
        "labels": "red green very_blue",
        "mean_values": " ".join(map(str, spec.mean[:: -1 if bgr else 1])),
        "scale_values": " ".join(map(str, spec.std[:: -1 if bgr else 1])),
        "reverse_input_channels": str(not bgr),
    }
    ov.save_model(
        make.describe(make.model(**kind), "model_info", info), make.folder / "model.xml", compress_to_fp16=False
    )
    classifier = Classifier(make.folder / "model.xml")
    for colour in make.labels:
        frame = make.picture(colour)
        expected = reference(prepare(frame, spec), spec, temperature=1.0)
        np.testing.assert_allclose(classifier.classify(frame).probabilities, expected, atol=1e-5)


def test_a_model_in_memory_answers_as_the_file_does(make: Any) -> None:
    path = make.ir(make.folder / "model.xml")
    from_memory = Classifier.from_bytes(path.read_bytes(), path.with_suffix(".bin").read_bytes())
    frame = make.picture("green")
    expected = Classifier(path).classify(frame).probabilities
    np.testing.assert_array_equal(from_memory.classify(frame).probabilities, expected)
    with pytest.raises(ModelError, match="no INT8 form"):
        Classifier.from_bytes(path.read_bytes(), path.with_suffix(".bin").read_bytes(), precision="int8")
    with pytest.raises(ModelError, match="not a readable"):
        Classifier.from_bytes(b"<net", b"")


def test_precision_is_always_set_explicitly(make: Any) -> None:
    root = make.deployable()
    network = Network(Bundle.load(root), precisions=["f32"], properties={}, cache_dir=False)
    assert network.stages[0].compiled.get_property("INFERENCE_PRECISION_HINT") == ov.Type.f32
    with pytest.raises(ModelError, match="no INT8 form"):
        Classifier(root, precision="int8")
    if "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(ModelError, match="no bfloat16"):
            Classifier(root, precision="bf16")


def test_a_deployable_tuned_for_bf16_falls_back_with_a_warning(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    if "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has bfloat16")
    from edgedistill.runtime.bundle import LatencySettings

    assert Classifier(make.deployable(latency=LatencySettings("bf16"))).precision == "f32"
    assert "bf16" in capsys.readouterr().err


def test_int8_takes_its_own_file(make: Any) -> None:
    root = make.folder / "int8"
    make.ir(root / "model.xml")
    make.ir(root / "model-int8.xml", gain=7.0)
    frame = make.picture("red")
    plain, int8 = (Classifier(root / "model.xml", precision=p).classify(frame).probabilities for p in ("f32", "int8"))
    spec = InputSpec(height=32, width=32)
    np.testing.assert_allclose(plain, reference(prepare(frame, spec), spec), atol=1e-5)
    np.testing.assert_allclose(int8, reference(prepare(frame, spec), spec, gain=7.0), atol=1e-5)


def test_threads_and_decode_are_checked(make: Any) -> None:
    root = make.deployable(decode="full")
    for threads in (0, -1):
        with pytest.raises(ModelError, match="threads"):
            Classifier(root, threads=threads)
    with pytest.raises(ModelError, match="decode"):
        Classifier(root, decode="sideways")  # type: ignore[arg-type]
    photo = make.photo("red", height=300, width=400)
    full, reduced = (Classifier(root, threads=1, decode=d).classify(photo).probabilities for d in (None, "reduced"))
    spec = InputSpec(height=32, width=32)
    np.testing.assert_allclose(full, reference(load_image(photo, spec, decode="full"), spec), atol=1e-5)
    np.testing.assert_allclose(reduced, reference(load_image(photo, spec), spec), atol=1e-5)


@pytest.mark.parametrize(("threshold", "stage"), [(0.0, 0), (0.3, 0), (0.99, 1)])
@pytest.mark.parametrize("slow_size", [32, 48])
def test_a_cascade_asks_the_slow_stage_only_when_unsure(
    make: Any, threshold: float, stage: int, slow_size: int
) -> None:
    classifier = Classifier(make.cascade(exit_threshold=threshold, slow_size=slow_size))
    photo = make.photo("very blue", height=100, width=130)
    spec, gain = (
        (InputSpec(height=32, width=32), 0.1) if stage == 0 else (InputSpec(height=slow_size, width=slow_size), 8.0)
    )
    for source, pixels in ((photo, load_image(photo, spec)), (make.picture("very blue"), None)):
        answer = classifier.classify(source)
        assert (answer.label, answer.stage) == ("very blue", stage)
        if pixels is not None:
            np.testing.assert_allclose(answer.probabilities, reference(pixels, spec, gain=gain), atol=1e-5)


def test_an_unsure_last_stage_says_unknown(make: Any) -> None:
    classifier = Classifier(make.deployable(reject_below=0.9))
    answer = classifier.classify(np.full((40, 40, 3), 120, np.uint8))
    assert (answer.label, answer.index, answer.error) == ("unknown", -1, None)
    assert answer.probability == answer.probabilities.max() < 0.9
    assert classifier.classify(make.picture("red")).label == "red"


def test_an_unsure_first_stage_that_answers_says_unknown_too(make: Any) -> None:
    root = make.cascade(exit_threshold=0.34, reject_below=0.9)
    answer = Classifier(root).classify(make.picture("red"))
    assert answer.stage == 0 and 0.34 <= answer.probability < 0.9
    assert (answer.label, answer.index, answer.error) == ("unknown", -1, None)


def test_a_network_that_gives_no_number_is_an_error(make: Any) -> None:
    path = make.ir(make.folder / "model.xml", gain=float("nan"))
    answer = Classifier(path).classify([make.picture("red")])[0]
    assert "not finite" in str(answer.error)


@pytest.mark.parametrize("ends_in_sigmoid", [False, True])
def test_several_labels_at_once_are_accepted(make: Any, ends_in_sigmoid: bool) -> None:
    spec = InputSpec(height=32, width=32)
    changes = {"task": "multi-label", "temperature": "1" if ends_in_sigmoid else "1.5"}
    path = make.ir(make.folder / "model.xml", spec=spec, changes=changes, sigmoid=ends_in_sigmoid)
    classifier = Classifier(path)
    yellow = np.maximum(make.picture("red"), make.picture("green"))
    for frame, accepted in ((yellow, (0, 1)), (make.picture("very blue"), (2,)), (np.zeros_like(yellow), ())):
        scores = 2.0 * normalize(prepare(frame, spec)[None], spec)[0].mean(axis=(1, 2), dtype=np.float64)
        expected = 1 / (1 + np.exp(-scores / classifier.temperature))
        answer = classifier.classify(frame)
        np.testing.assert_allclose(answer.probabilities, expected, atol=1e-5)
        assert answer.accepted == accepted and answer.index == expected.argmax() and classifier.multi_label
        assert answer.probability == answer.probabilities.max()
    assert Classifier(make.deployable()).classify(yellow).accepted == ()


def test_sigmoid_survives_extremes() -> None:
    np.testing.assert_allclose(sigmoid(np.array([3e38, -3e38, 0], np.float32), 0.01), [1, 0, 0.5])


def test_softmax_survives_extremes() -> None:
    np.testing.assert_allclose(softmax(np.array([3e38, -3e38, 0], np.float32), 0.01), [1, 0, 0])
    np.testing.assert_allclose(softmax(np.zeros(4, np.float32), 100.0), [0.25] * 4)


def test_a_second_start_uses_the_cache_and_a_broken_cache_harms_nothing(make: Any) -> None:
    root, frame, folder = make.deployable(), make.picture("red"), make.folder / "cache" / "openvino"
    first = Classifier(root).classify(frame)
    blobs = list(folder.iterdir())
    assert blobs
    again = Classifier(root).classify(frame)
    np.testing.assert_array_equal(first.probabilities, again.probabilities)
    assert list(folder.iterdir()) == blobs
    for blob in blobs:
        blob.write_bytes(blob.read_bytes()[: blob.stat().st_size // 2])
    assert Classifier(root).classify(frame).label == "red"
    for blob in blobs:
        blob.write_bytes(b"junk")
    assert Classifier(root).classify(frame).label == "red"


def test_the_cache_can_be_elsewhere_nowhere_or_unwritable(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    root, frame = make.deployable(), make.picture("red")
    assert Classifier(root, cache_dir=False).classify(frame).label == "red"
    assert not (make.folder / "cache").exists()
    assert Classifier(root, cache_dir=make.folder / "here").classify(frame).label == "red"
    assert list((make.folder / "here").iterdir())
    (make.folder / "file").touch()
    monkeypatch.setenv("EDGEDISTILL_CACHE", str(make.folder / "file"))
    assert cache_folder(None) is None
    assert Classifier(root).classify(frame).label == "red"
    monkeypatch.delenv("EDGEDISTILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(make.folder / "xdg"))
    assert cache_folder(None) == make.folder / "xdg" / "edgedistill" / "openvino"


def test_several_threads_may_share_one_classifier(make: Any) -> None:
    classifier = Classifier(make.deployable())
    wrong: list[str] = []

    def ask(colour: str) -> None:
        frame = make.picture(colour)
        wrong.extend(label for _ in range(50) if (label := classifier.classify(frame).label) != colour)

    threads = [threading.Thread(target=ask, args=(colour,)) for colour in make.labels]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_it_runs_where_no_training_library_is(make: Any) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'timm', 'onnx', 'onnxruntime', 'nncf', 'sklearn', 'albumentations', 'scipy', 'PIL'):\n"
        "    sys.modules[name] = None\n"
        "from edgedistill.runtime import Classifier, Engine, frames\n"
        "root, photo = sys.argv[1:]\n"
        "print(Classifier(root).classify(photo).label)\n"
        "with Engine(root) as engine: print(next(engine.map(frames(photo))).label)\n"
    )
    command = [sys.executable, "-c", code, str(make.deployable()), str(make.photo("green"))]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path("/"), check=False)
    assert result.stdout.split() == ["green", "green"], result.stderr
