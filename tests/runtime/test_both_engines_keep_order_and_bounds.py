"""Engine and CppEngine alike: answers in order, bounded reading and waiting, errors that are one image's, clean endings."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from edgedistill.errors import ArtifactError, EdgedistillError, ModelError, UsageError
from edgedistill.runtime import CppEngine, Engine, Frame
from edgedistill.runtime.bundle import ThroughputSettings

pytestmark = pytest.mark.timeout(120)
EngineClass = type[Engine] | type[CppEngine]


@pytest.fixture(params=[Engine, pytest.param(CppEngine, marks=pytest.mark.cpp)], ids=["Engine", "CppEngine"])
def engine_class(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> EngineClass:
    if request.param is CppEngine:
        pytest.importorskip("edgedistill_cpp", reason="needs the module that 'make cpp-python' builds")
        monkeypatch.setenv("EDGEDISTILL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    engine: EngineClass = request.param
    return engine


def numbered(number: int) -> Frame:
    return Frame(str(number), np.full((32, 32, 3), number % 256, np.uint8))


def test_sources_are_read_no_further_ahead_than_the_queue(engine_class: EngineClass, make: Any) -> None:
    taken = 0

    def endless() -> Iterator[Frame]:
        nonlocal taken
        while True:
            taken += 1
            yield numbered(taken)

    with engine_class(make.deployable(), streams=2, queue_size=5) as engine:
        answers = engine.map(endless())
        assert taken == 0
        for given in range(1, 60):
            assert next(answers).name == str(given)
            assert taken <= given + 5
        answers.close()
        assert next(engine.map([make.picture("red")])).label == "red"


def test_a_slow_source_does_not_hold_answers_back(engine_class: EngineClass, make: Any) -> None:
    pulled = 0

    def slow() -> Iterator[Frame]:
        nonlocal pulled
        for number in range(4):
            pulled += 1
            yield numbered(number)
            time.sleep(0.3)

    with engine_class(make.deployable()) as engine:
        list(engine.map([numbered(0)]))
        assert next(engine.map(slow())).name == "0"
        assert pulled <= 2


def test_an_error_in_the_source_reaches_the_caller_and_the_engine_lives_on(
    engine_class: EngineClass, make: Any
) -> None:
    def failing() -> Iterator[Frame]:
        yield numbered(1)
        raise OSError("the camera was unplugged")

    with engine_class(make.deployable()) as engine:
        with pytest.raises(OSError, match="unplugged"):
            list(engine.map(failing()))
        assert next(engine.map([make.picture("green")])).label == "green"


SCRIPT = """
import itertools, signal, sys
import numpy as np
from edgedistill import runtime
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
engine = getattr(runtime, sys.argv[3])(sys.argv[1])
frame = np.zeros((32, 32, 3), np.uint8)
if sys.argv[2] == "wait":  # for an answer that never comes
    print("running", flush=True)
    next(engine.results())
for number, answer in enumerate(engine.map(itertools.repeat(frame))):
    if number == 20:
        print("running", flush=True)
        if sys.argv[2] == "leave":
            sys.exit(3)
"""


def test_leaving_python_with_a_running_engine_is_clean(engine_class: EngineClass, make: Any) -> None:
    command = [sys.executable, "-c", SCRIPT, str(make.deployable()), "leave", engine_class.__name__]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (result.returncode, result.stderr) == (3, "")


@pytest.mark.parametrize("doing", ["map", "wait"])
def test_control_c_ends_a_running_engine(engine_class: EngineClass, make: Any, doing: str) -> None:
    command = [sys.executable, "-c", SCRIPT, str(make.deployable()), doing, engine_class.__name__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "running\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors and process.returncode in (1, 130, -signal.SIGINT)


def test_submitted_images_come_out_in_order(engine_class: EngineClass, make: Any) -> None:
    with engine_class(make.deployable()) as engine:
        names: list[str] = []
        consumer = threading.Thread(target=lambda: names.extend(answer.name for answer in engine.results()))
        consumer.start()
        for number in range(200):
            assert engine.submit(17 if number == 77 else numbered(number))  # type: ignore[arg-type]
        engine.finish()
        consumer.join(20)
        assert names == ["" if number == 77 else str(number) for number in range(200)] and engine.dropped == 0
        with pytest.raises(ModelError, match="finish"):
            engine.submit(numbered(1))


def test_several_readers_share_the_answers(engine_class: EngineClass, make: Any) -> None:
    with engine_class(make.deployable(), streams=2) as engine:
        names: list[str] = []
        readers = [
            threading.Thread(target=lambda: names.extend(answer.name for answer in engine.results())) for _ in range(3)
        ]
        for reader in readers:
            reader.start()
        for number in range(150):
            engine.submit(numbered(number))
        engine.finish()
        for reader in readers:
            reader.join(20)
        assert sorted(map(int, names)) == list(range(150))


def test_a_full_engine_makes_submit_wait(engine_class: EngineClass, make: Any) -> None:
    with engine_class(make.deployable(), streams=1, queue_size=3) as engine:
        assert all(engine.submit(numbered(number), timeout_s=1) for number in range(3))
        started = time.monotonic()
        assert not engine.submit(numbered(3), timeout_s=0.05)
        assert time.monotonic() - started >= 0.05
        results = engine.results()
        assert next(results).name == "0"
        assert engine.submit(numbered(4), timeout_s=5)
        engine.finish()
        assert [answer.name for answer in results] == ["1", "2", "4"]


def test_many_maps_and_submissions_at_once_do_not_mix(engine_class: EngineClass, make: Any) -> None:
    with engine_class(make.deployable(), streams=2, queue_size=3) as engine:
        wrong: list[str] = []

        def ask(colour: str) -> None:
            frame = make.picture(colour)
            wrong.extend(a.label for a in engine.map(itertools.repeat(frame, 100)) if a.label != colour)

        def submit() -> None:
            for _ in range(100):
                engine.submit(make.picture("red"))
            engine.finish()

        def read() -> None:
            wrong.extend(answer.label for answer in engine.results() if answer.label != "red")

        threads = [threading.Thread(target=ask, args=(colour,)) for colour in make.labels]
        threads += [threading.Thread(target=submit), threading.Thread(target=read)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert wrong == [] and not any(thread.is_alive() for thread in threads)


def test_what_is_no_image_is_dropped_like_any_other(engine_class: EngineClass, make: Any) -> None:
    with engine_class(make.deployable(), streams=1, queue_size=3, policy="drop_oldest") as engine:
        for _ in range(20):
            engine.submit(17)  # type: ignore[arg-type]
        engine.submit(numbered(1))
        engine.finish()
        assert [answer.name for answer in engine.results()] == ["", "", "1"] and engine.dropped == 18


def test_a_number_is_no_image_with_or_without_a_name(engine_class: EngineClass, make: Any) -> None:
    with engine_class(make.deployable()) as engine, (make.folder / "open").open("wb") as file:
        for source in (17, file.fileno(), Frame("number", 17), Frame("number", file.fileno())):  # type: ignore[arg-type]
            (answer,) = engine.map([source])
            assert answer.name == ("number" if isinstance(source, Frame) else "")
            assert answer.error is not None and "int: expected a path" in answer.error
        os.fstat(file.fileno())  # nobody closed it


@pytest.mark.parametrize(
    ("options", "engines_error"),
    [
        ({"streams": 0}, ModelError),
        ({"threads": 0}, ModelError),
        ({"threads": 1, "streams": 2}, ModelError),
        ({"batch": 0}, ModelError),
        ({"batch": 4097}, ModelError),
        ({"policy": "newest"}, ModelError),
        ({"queue_size": 2, "streams": 2}, ModelError),
        ({"decode": "half"}, ModelError),
        ({"precision": "fp16"}, ArtifactError),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(
    engine_class: EngineClass, make: Any, options: dict[str, Any], engines_error: type[EdgedistillError]
) -> None:
    # What C++ alone refuses is a UsageError there.
    expected = engines_error if engine_class is Engine else EdgedistillError
    with pytest.raises(expected, match=next(iter(options))):
        engine_class(make.deployable(), **options)


def test_threads_limit_the_streams(engine_class: EngineClass, make: Any) -> None:
    for settings in (ThroughputSettings(), ThroughputSettings(streams=4096)):
        with engine_class(make.deployable(throughput=settings), threads=1) as engine:
            assert engine.streams == 1
    with engine_class(make.deployable(), threads=3, streams=2) as engine:
        assert engine.streams == 2


def test_a_single_image_is_no_list(engine_class: EngineClass, make: Any) -> None:
    with engine_class(make.deployable()) as engine:
        for source in ("photo.jpg", b"data", make.picture("red"), numbered(1)):
            with pytest.raises(UsageError, match="many images"):
                engine.map(source)
        assert len(list(engine.map(np.zeros((3, 32, 32, 3), np.uint8)))) == 3


@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({}, (16, 32)),
        ({"policy": "drop_oldest"}, (8, 8)),
        ({"policy": "drop_oldest", "queue_size": 4}, (1, 1)),
        ({"queue_size": 21}, (10, 10)),
        ({"policy": "drop_oldest", "batch": 16}, (16, 16)),
    ],
)
def test_a_tuned_batch_fits_the_queue_and_the_camera(
    engine_class: EngineClass, make: Any, options: dict[str, Any], batches: tuple[int, int]
) -> None:
    root = make.cascade(exit_threshold=0.8, throughput=ThroughputSettings(batch=16, later_batch=32))
    with engine_class(root, streams=2, **options) as engine:
        assert (engine.batch, engine.later_batch) == batches
        answers = engine.map([numbered(1)] * 3) if "policy" not in options else ()
        assert all(answer.error is None for answer in answers)
