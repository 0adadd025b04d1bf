"""CppEngine: the answers, order, bounds and endings of Python's Engine, from C++ threads that borrow Python's memory."""

from __future__ import annotations

import gc
import itertools
import re
import runpy
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
import pytest

from edgedistill.benchmarks.cpp_from_python import check_answers, measure
from edgedistill.benchmarks.inputs import InputSet
from edgedistill.benchmarks.target import Target
from edgedistill.benchmarks.timing import CandidateError
from edgedistill.errors import ArtifactError, ModelError, UsageError
from edgedistill.runtime import Bundle, CppEngine, Engine, Frame, Prediction
from edgedistill.runtime.bundle import LatencySettings, ThroughputSettings
from edgedistill.runtime.predict import PredictSettings, predict

edgedistill_cpp = pytest.importorskip("edgedistill_cpp", reason="needs the module that 'make cpp-python' builds")
pytestmark = [pytest.mark.cpp, pytest.mark.timeout(120)]

TESTS = Path(__file__).resolve().parents[1]
Maker = runpy.run_path(str(TESTS / "runtime" / "conftest.py"))["Maker"]
# TIFF, big-endian, one entry: orientation (0x0112), SHORT, 1 value, 6.
ORIENTATION_6 = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
MODELS = ("single", "multi_label", "heads", "heads_many", "cascade", "model_api/model.xml")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEDISTILL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def make(tmp_path: Path) -> Any:
    return Maker(tmp_path)


def numbered(number: int) -> Frame:
    return Frame(str(number), np.full((32, 32, 3), number % 256, np.uint8))


def odd_images(make: Any) -> list[Any]:
    """Files of every format and orientation, encoded bytes of every type, arrays of every kind, and what is no image."""
    folder, red = make.folder, make.picture("red", 90, 120)
    files = [make.photo(colour, suffix, height=90, width=120) for colour in make.labels for suffix in SUFFIXES]
    PIL.Image.fromarray(red[..., ::-1]).save(folder / "turned.jpg", exif=ORIENTATION_6)
    PIL.Image.fromarray(red[..., ::-1]).convert("CMYK").save(folder / "cmyk.jpg")
    cv2.imwrite(str(folder / "deep.png"), red.astype(np.uint16) * 257)
    cv2.imwrite(str(folder / "alpha.png"), np.dstack([red, red[..., 0]]))
    cv2.imwrite(str(folder / "grey.jpg"), red[..., 1])
    (folder / "broken.jpg").write_bytes(files[0].read_bytes()[:300])
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("hello")
    awkward = folder / "na\xefve \udcff.jpg"
    awkward.write_bytes(files[0].read_bytes())
    names = ("turned.jpg", "cmyk.jpg", "deep.png", "alpha.png", "grey.jpg", "broken.jpg", "empty.png", "text.jpg")
    files += [folder / name for name in (*names, "absent.jpg")] + [
        folder,
        awkward,
        Path("a\0b.jpg"),
        Path("\ud800.jpg"),
    ]
    encoded = files[1].read_bytes()
    shard = folder / "shard.tar"
    shard.write_bytes(b"x" * 7 + encoded)
    members = [f"{shard}!7+{size}/inside.png" for size in (len(encoded), len(encoded) + 1)]
    wide = memoryview(np.repeat(np.frombuffer(encoded, np.uint8), 2))[::2]
    blobs = [encoded, bytearray(encoded), memoryview(encoded), wide, encoded[:50], b""]
    arrays = [red, red[::-1], red[:, ::-1], red[..., ::-1], red[10:50, 20:90], red[::2, ::3], np.asfortranarray(red)]
    arrays += [red[..., 1], red[..., :1], np.dstack([red, red[..., 0]]), red.astype(np.uint16) * 257, red[:1, :1]]
    arrays += [np.broadcast_to(red[:1], red.shape), red.astype(np.int32), red.astype(np.float32), red[:0], red[..., :2]]
    arrays += [np.zeros((4, 4), np.bool_), np.zeros((2, 2, 3, 1), np.uint8), np.zeros(3, np.uint8)]
    named = [Frame("path", files[0]), Frame("bytes", encoded), Frame("pixels", red), Frame("bad", red[:0])]
    return [*files, *map(str, files[:2]), *members, *blobs, *arrays, *named, 17, None]


SUFFIXES = (".jpg", ".png", ".webp", ".bmp")


def assert_same(got: Prediction, expected: Prediction) -> None:
    assert (got.name, got.label, got.index, got.stage) == (
        expected.name,
        expected.label,
        expected.index,
        expected.stage,
    )
    assert got.accepted == expected.accepted
    assert got.probabilities.dtype == np.float32 and got.probabilities.shape == expected.probabilities.shape
    np.testing.assert_allclose(got.probabilities, expected.probabilities, rtol=0, atol=1e-4)
    np.testing.assert_allclose(got.probability, expected.probability, rtol=0, atol=1e-4)
    # The name and what was found; the reason inside brackets is each decoder's own.
    assert str(got.error).split("(")[0] == str(expected.error).split("(")[0]
    for head, other in zip(got.heads, expected.heads, strict=True):
        assert (head.name, head.label, head.index) == (other.name, other.label, other.index)
        assert head.accepted == other.accepted and (head.value is None) == (other.value is None)
        np.testing.assert_allclose(head.probability, other.probability, rtol=0, atol=1e-4)
        np.testing.assert_allclose(head.value or 0.0, other.value or 0.0, rtol=0, atol=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_odd_images_get_pythons_answers_and_errors(make: Any, test_models: Path, model: str) -> None:
    sources = odd_images(make)
    with Engine(test_models / model) as python, CppEngine(test_models / model) as cpp:
        expected, got = list(python.map(sources)), list(cpp.map(sources))
        for name in ("labels", "spec", "multi_label", "precision", "streams", "batch", "later_batch", "queue_size"):
            assert getattr(cpp, name) == getattr(python, name), name
        assert [(h.name, h.kind, h.classes) for h in cpp.heads] == [(h.name, h.kind, h.classes) for h in python.heads]
        assert [(h.mean, h.std, h.threshold) for h in cpp.heads] == [(h.mean, h.std, h.threshold) for h in python.heads]
    assert len(got) == len(sources)
    for answer, reference in zip(got, expected, strict=True):
        assert_same(answer, reference)
    assert {answer.error is None for answer in got} == {True, False}


@pytest.mark.parametrize(
    ("batch", "later_batch", "options", "room"),
    [
        (1, 8, {}, 65),  # as many as two workers can have in hand, four times
        (8, 1, {}, 65),
        (1, 8, {"batch": 2}, 17),
        (1, 8, {"queue_size": 5}, 5),
        (1, 8, {"policy": "block"}, 65),
        (2, 4, {"policy": "block"}, 41),
    ],
)
def test_a_cascades_queue_has_pythons_room(
    make: Any, batch: int, later_batch: int, options: dict[str, Any], room: int
) -> None:
    root = make.cascade(exit_threshold=0.8, throughput=ThroughputSettings(batch=batch, later_batch=later_batch))
    chosen = {"policy": "drop_oldest", "streams": 2} | options
    with Engine(root, **chosen) as python, CppEngine(root, **chosen) as cpp:
        assert (python.batch, python.later_batch) == (cpp.batch, cpp.later_batch)
        assert python.queue_size == cpp.queue_size == room
        assert python.queue_size > 2 * max(python.batch, python.later_batch) or "policy" in options


def test_what_only_python_reads_is_refused_with_the_remedy(make: Any) -> None:
    path = make.photo("red", ".tif")
    with CppEngine(make.deployable()) as engine:
        tiff, number = engine.map([path, Frame("number", 17)])  # type: ignore[arg-type]
    assert str(path) in str(tiff.error) and "does not read TIFF; convert it" in str(tiff.error)
    assert (number.name, str(number.error).split(",")[0]) == ("number", "int: expected a path")


@pytest.mark.parametrize(
    "options", [{}, {"streams": 1}, {"streams": 3}, {"batch": 4}, {"streams": 2, "batch": 3, "queue_size": 7}], ids=str
)
@pytest.mark.parametrize("decode", ["full", "reduced"])
def test_answers_come_in_order(make: Any, options: dict[str, int], decode: Any) -> None:
    root = make.deployable()
    photos = [make.photo(colour, height=h, width=h + 9, seed=h) for colour in make.labels for h in (40, 300)]
    sources = [*photos, make.picture("green"), 17, photos[0].read_bytes()] * 8
    with Engine(root, decode=decode) as python, CppEngine(root, decode=decode, **options) as cpp:
        for _ in range(2):
            for answer, reference in zip(cpp.map(sources), python.map(sources), strict=True):
                assert_same(answer, reference)


@pytest.mark.parametrize("batch", [1, 4])
def test_cascades_ask_the_same_stages(make: Any, batch: int) -> None:
    root = make.cascade(exit_threshold=0.34, slow_size=48, reject_below=0.2)
    sources = [make.photo(c, height=200, width=150) for c in make.labels] * 4 + [numbered(n) for n in range(0, 250, 9)]
    with Engine(root, batch=batch) as python, CppEngine(root, batch=batch) as cpp:
        assert cpp.later_batch == batch
        answers = list(cpp.map(sources))
        for answer, reference in zip(answers, python.map(sources), strict=True):
            assert_same(answer, reference)
    assert {answer.stage for answer in answers} == {0, 1}


def test_a_model_in_memory_and_a_loaded_bundle_are_taken(make: Any) -> None:
    path, photo = make.ir(make.folder / "model.xml"), make.photo("green")
    memory = Bundle.from_bytes(path.read_bytes(), path.with_suffix(".bin").read_bytes())
    for bundle in (memory, Bundle.load(path), Bundle.load(make.deployable())):
        with CppEngine(bundle) as engine:
            assert next(engine.map([photo])).label == "green"
    tuned = make.deployable("tuned", throughput=ThroughputSettings(streams=1, threads=1, batch=2, pinning=False))
    with CppEngine(tuned) as engine:
        assert (engine.streams, engine.batch, engine.precision) == (1, 2, "f32")
    changed = Bundle.load(tuned)
    changed = Bundle(changed.source, changed.root, Bundle.load(make.deployable()).config, changed.metadata)
    with pytest.raises(UsageError, match=re.escape("deploy.json")):
        CppEngine(changed)


def test_warnings_reach_the_console(make: Any, capfd: pytest.CaptureFixture[str]) -> None:
    root = make.deployable(latency=LatencySettings("f32", 1), cpu="a processor of another kind")
    with CppEngine(root):
        assert "a processor of another kind" in "".join(capfd.readouterr())


def test_what_cannot_be_used_is_refused_with_pythons_kind_of_error(make: Any) -> None:
    root = make.deployable()
    for model in (make.folder / "nowhere", make.photo("red")):
        with pytest.raises(ArtifactError, match=re.escape(model.name)):
            CppEngine(model)
    with pytest.raises(ModelError, match="no INT8 form"):
        CppEngine(root, precision="int8")
    (root / "stages" / "tiny" / "model.xml").write_text("<net")
    with pytest.raises(ArtifactError, match="export the model again"):
        CppEngine(root)


def test_what_c_cannot_count_and_a_camera_that_is_mapped_are_refused(make: Any) -> None:
    with pytest.raises(ModelError, match="queue_size"):
        CppEngine(make.deployable(), queue_size=2**31)
    with CppEngine(make.deployable(), policy="drop_oldest") as engine, pytest.raises(UsageError, match="block"):
        engine.map([])


def test_a_frame_is_let_go_with_its_answer(make: Any) -> None:
    with CppEngine(make.deployable(), queue_size=9) as engine:
        borrowed: list[weakref.ref] = []

        def watched() -> Iterator[np.ndarray]:
            for _ in range(40):
                frame = make.picture("red")
                borrowed.append(weakref.ref(frame))
                yield frame

        for given, answer in enumerate(engine.map(watched()), start=1):
            assert answer.label == "red"
            # But for the newest, which the loop over the source still has in its hand.
            assert all(one() is None for one in borrowed[:given][:-1])
        gc.collect()
        assert all(one() is None for one in borrowed)
        frame = make.picture("green")
        kept, held = weakref.ref(frame), sys.getrefcount(frame)
        answers = engine.map([frame, frame])
        del frame
        assert next(answers).label == "green" and kept() is not None
        answers.close()
        assert held > 0


def test_bytes_are_locked_until_their_answer(make: Any) -> None:
    encoded = bytearray(make.photo("red").read_bytes())
    with CppEngine(make.deployable()) as engine:
        engine.submit(encoded)
        with pytest.raises(BufferError):
            encoded.clear()  # or the engine would read memory that is somebody else's by now
        assert next(engine.results()).label == "red"
        encoded.clear()


COPIES = """
import resource, sys
import numpy as np
from edgedistill.runtime import CppEngine
with CppEngine(sys.argv[1], streams=1) as engine:
    list(engine.map([np.zeros((64, 64, 3), np.uint8)]))
    frame = np.zeros((9000, 9000, 3), np.uint8)  # 243 MB that no memory stands behind until somebody writes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answers = list(engine.map([frame, frame[:, 1:-1], frame]))
    assert all(answer.error is None for answer in answers), answers
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_frame_is_never_copied(make: Any) -> None:
    command = [sys.executable, "-c", COPIES, str(make.deployable())]
    grown_kib = int(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)
    assert grown_kib < 60_000


def test_closing_ends_what_waits(make: Any) -> None:
    engine = CppEngine(make.deployable(), streams=1)
    got: list[object] = []

    def consume(answers: Iterator[Prediction]) -> None:
        try:
            for _ in answers:
                pass
            got.append("ended")
        except ModelError as error:
            got.append(str(error))

    mapped = engine.map(numbered(number) for number in itertools.count())
    consumers = [threading.Thread(target=consume, args=(answers,)) for answers in (mapped, engine.results())]
    for consumer in consumers:
        consumer.start()
    time.sleep(0.2)
    engine.close()
    engine.close()
    for consumer in consumers:
        consumer.join(10)
    assert sorted(map(str, got)) == ["ended", "the engine is closed; make a new one"]
    for use in (lambda: engine.map([]), lambda: engine.submit(numbered(1)), engine.wait_until_ready):
        with pytest.raises(ModelError, match="closed"):
            use()
    assert list(engine.results()) == []


def workers() -> set[str]:
    """Names, as threads that a worker's OpenVINO makes have the name of that worker."""
    names = (path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    return {name for name in names if name.startswith("edgedistill-")}


def test_a_forgotten_engine_ends_its_threads(make: Any) -> None:
    assert workers() == set()
    engine = CppEngine(make.deployable(), streams=2)
    list(engine.map([numbered(number) for number in range(20)]))
    deadline = time.monotonic() + 20
    while len(workers()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)  # a thread names itself when it first runs
    assert workers() == {"edgedistill-0", "edgedistill-1"}
    del engine
    gc.collect()
    assert workers() == set()


def test_a_camera_loses_the_oldest_and_keeps_the_newest(make: Any) -> None:
    with CppEngine(make.deployable(), streams=2, queue_size=5, policy="drop_oldest") as engine:
        frames = [np.full((700, 900, 3), number, np.uint8) for number in range(100)]
        borrowed = [weakref.ref(frame) for frame in frames]
        started = time.monotonic()
        for number in range(100):
            assert engine.submit(Frame(str(number), frames.pop(0)))
        assert time.monotonic() - started < 2
        assert sum(one() is not None for one in borrowed) <= 6
        engine.finish()
        names = [int(answer.name) for answer in engine.results()]
        assert names == sorted(set(names)) and names[-1] == 99
        assert len(names) == 5 and engine.dropped == 95


def test_a_waiting_reader_survives_the_drop_of_its_image(make: Any) -> None:
    with CppEngine(make.deployable(), streams=1, queue_size=2, policy="drop_oldest") as engine:
        names: list[int] = []
        consumer = threading.Thread(target=lambda: names.extend(int(answer.name) for answer in engine.results()))
        consumer.start()
        for number in range(300):
            engine.submit(Frame(str(number), np.full((300, 400, 3), number % 256, np.uint8)))
        engine.finish()
        consumer.join(10)
        assert not consumer.is_alive()
        assert names == sorted(set(names)) and names[-1] == 299 and len(names) + engine.dropped == 300


@pytest.mark.parametrize("model", MODELS[:5])
def test_predict_answers_with_either_engine(test_models: Path, model: str) -> None:
    settings = {"sources": (str(test_models / "photos"),), "top_k": 2, "precision": "f32", "decode": "full"}
    python, cpp = (
        list(predict(PredictSettings(test_models / model, engine=engine, **settings)))  # type: ignore[arg-type]
        for engine in ("python", "cpp")
    )
    assert len(python) == len(cpp) == 7
    for answer, reference in zip(cpp, python, strict=True):
        assert (answer.name, answer.labels) == (reference.name, reference.labels)
        assert (answer.error is None) == (reference.error is None)
        for share, other in zip(answer.probabilities, reference.probabilities, strict=True):
            assert share == pytest.approx(other, abs=1e-4)


def test_the_stub_has_just_the_modules_names() -> None:
    stub = (TESTS.parent / "runtime" / "cpp" / "python" / "edgedistill_cpp.pyi").read_text()
    blocks = re.split(r"^class (\w+)", stub, flags=re.M)
    for name, body in zip(blocks[1::2], blocks[2::2], strict=True):
        there = {member for member in vars(getattr(edgedistill_cpp, name)) if not member.startswith("_")}
        assert set(re.findall(r"^    def ([a-z]\w*)", body, re.M)) == there
    public = {name for name in vars(edgedistill_cpp) if not name.startswith("_")}
    assert set(blocks[1::2]) == public


def test_the_module_shows_python_alone() -> None:
    done = subprocess.run(
        ["nm", "-D", "--defined-only", edgedistill_cpp.__file__], capture_output=True, text=True, check=True
    )
    assert [line.split()[-1] for line in done.stdout.splitlines()] == ["PyInit_edgedistill_cpp"]


def test_both_scopes_are_measured_at_batch_1_and_the_tuned_one(test_models: Path) -> None:
    target = Target.open(test_models / "single")
    images = InputSet("large.jpg", (test_models / "photos" / "large.jpg",))
    rows = measure(target, [images], rounds=2, seconds=0.05)
    assert [(row["scope"], row["batch"]) for row in rows] == [("files", 1), ("frames", 1)]
    for row in rows:
        for name in ("gain", "cpu_gain"):
            assert 0 < row[name]["min"] <= row[name]["median"] <= row[name]["max"]
        assert row["image_size_px"] == 32 and row["streams"] >= 1


def test_what_cannot_be_compared_is_refused(test_models: Path) -> None:
    photos = [test_models / "photos" / name for name in ("red.jpg", "green.png")]
    with (
        CppEngine(test_models / "single") as engine,
        pytest.raises(CandidateError, match="C\\+\\+ says green, Python red"),
    ):
        check_answers(*engine.map(photos))
