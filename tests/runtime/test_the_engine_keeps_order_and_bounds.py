"""engine.py: answers in order, bounded memory, one image's trouble is its own, and it always comes to an end."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgedistill.errors import ModelError
from edgedistill.images import ImageU8
from edgedistill.runtime import Classifier, Engine, Frame
from edgedistill.runtime import network as network_module
from edgedistill.runtime.bundle import ThroughputSettings

pytestmark = pytest.mark.timeout(60)
Wait = Callable[[Callable[[], bool]], None]


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("edgedistill-")]


class Gate:
    """Holds every worker at its image until it is opened; what got that far is in ``begun``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.begun, self._prepare = threading.Event(), [], network_module.prepare
        monkeypatch.setattr(network_module, "prepare", self)

    def __call__(self, image: ImageU8, spec: Any, *, out: ImageU8) -> ImageU8:
        self.begun.append(int(image[0, 0, 0]))
        assert self.open.wait(20)
        return self._prepare(image, spec, out=out)


def numbered(number: int) -> Frame:
    return Frame(str(number), np.full((32, 32, 3), number, np.uint8))


@pytest.mark.parametrize(
    "options", [{}, {"streams": 1}, {"streams": 3}, {"batch": 4}, {"streams": 2, "batch": 3}], ids=str
)
def test_answers_come_in_order_and_are_the_classifiers(make: Any, options: dict[str, int]) -> None:
    root = make.deployable()
    kinds = [
        make.photo(c, s, height=h, width=h + 9, seed=h) for c in make.labels for s, h in ((".jpg", 300), (".png", 40))
    ]
    broken = make.folder / "broken.jpg"
    broken.write_bytes(kinds[0].read_bytes()[:300])
    sources = [*kinds, kinds[1].read_bytes(), make.picture("green"), broken, 17, *kinds] * 6
    expected = Classifier(root).classify(sources)
    with Engine(root, **options) as engine:
        for _ in range(2):
            answers = list(engine.map(sources))
            assert [answer.name for answer in answers] == [answer.name for answer in expected]
            assert [answer.label for answer in answers] == [answer.label for answer in expected]
            assert [answer.error for answer in answers] == [answer.error for answer in expected]
            for answer, other in zip(answers, expected, strict=True):
                np.testing.assert_allclose(answer.probabilities, other.probabilities, atol=1e-6)


def test_a_cascade_answers_as_in_the_classifier(make: Any) -> None:
    root = make.cascade(exit_threshold=0.99, slow_size=48, reject_below=0.2)
    photos = [make.photo(colour, height=200, width=150) for colour in make.labels] * 5
    with Engine(root, batch=2) as engine:
        assert [(p.label, p.stage) for p in engine.map(photos)] == [
            (p.label, p.stage) for p in Classifier(root).classify(photos)
        ]


def test_an_unforeseen_error_in_a_worker_is_raised_at_its_image(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = network_module.prepare

    def sometimes(image: ImageU8, spec: Any, *, out: ImageU8) -> ImageU8:
        if image[0, 0, 0] == 7:
            raise ZeroDivisionError("a bug")
        return original(image, spec, out=out)

    monkeypatch.setattr(network_module, "prepare", sometimes)
    with Engine(make.deployable()) as engine:
        answers = engine.map(numbered(number) for number in range(30))
        assert [next(answers).name for _ in range(7)] == [str(number) for number in range(7)]
        with pytest.raises(ZeroDivisionError, match="a bug"):
            next(answers)
        assert len(list(engine.map([numbered(1)] * 50))) == 50
        assert len([thread for thread in engine_threads() if thread.is_alive()]) >= engine.streams


def test_closing_ends_the_threads_and_what_waits(make: Any, monkeypatch: pytest.MonkeyPatch, wait_for: Wait) -> None:
    before = len(engine_threads())
    gate = Gate(monkeypatch)
    engine = Engine(make.deployable(), streams=2)
    answers = engine.map(numbered(number) for number in range(9))
    got: list[object] = []

    def consume() -> None:
        try:
            got.extend(answers)
        except ModelError as error:
            got.append(str(error))

    consumer = threading.Thread(target=consume)
    consumer.start()
    wait_for(lambda: len(gate.begun) == 2)
    threading.Timer(0.1, gate.open.set).start()
    engine.close()
    engine.close()
    consumer.join(10)
    assert not consumer.is_alive() and "closed" in str(got[-1])
    assert len(engine_threads()) == before
    with pytest.raises(ModelError, match="closed"):
        engine.map([])
    with pytest.raises(ModelError, match="closed"):
        engine.submit(numbered(1))
    assert list(engine.results()) == []


def test_a_forgotten_engine_ends_its_threads(make: Any, wait_for: Wait) -> None:
    before = len(engine_threads())
    engine = Engine(make.deployable())
    list(engine.map([numbered(1)]))
    assert len(engine_threads()) == before + engine.streams
    del engine
    gc.collect()
    wait_for(lambda: len(engine_threads()) == before)


def test_an_engine_full_of_unanswered_images_makes_submit_wait(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with Engine(make.deployable(), streams=1, queue_size=3) as engine:
        assert all(engine.submit(numbered(number), timeout_s=1) for number in range(3))
        assert not engine.submit(numbered(3), timeout_s=0.05)
        gate.open.set()
        results = engine.results()
        assert next(results).name == "0"
        assert engine.submit(numbered(4), timeout_s=5)
        engine.finish()
        assert [answer.name for answer in results] == ["1", "2", "4"]


def test_a_camera_loses_the_oldest_and_keeps_the_newest(
    make: Any, monkeypatch: pytest.MonkeyPatch, wait_for: Wait
) -> None:
    gate = Gate(monkeypatch)
    with Engine(make.deployable(), streams=2, queue_size=5, policy="drop_oldest") as engine:
        for number in range(2):
            engine.submit(numbered(number))
        wait_for(lambda: len(gate.begun) == 2)
        started = time.monotonic()
        for number in range(2, 100):
            assert engine.submit(numbered(number))
        assert time.monotonic() - started < 2 and engine.dropped == 95
        gate.open.set()
        engine.finish()
        assert [answer.name for answer in engine.results()] == ["0", "1", "97", "98", "99"]


def test_answers_that_nobody_takes_are_dropped_too(make: Any, wait_for: Wait) -> None:
    with Engine(make.deployable(), streams=1, queue_size=3, policy="drop_oldest") as engine:
        for number in range(20):
            engine.submit(numbered(number))
            wait_for(lambda: not any(ticket.done.locked() for ticket in engine._submitted))
        engine.finish()
        assert [answer.name for answer in engine.results()] == ["17", "18", "19"] and engine.dropped == 17


def test_a_waiting_reader_survives_the_drop_of_its_image(
    make: Any, monkeypatch: pytest.MonkeyPatch, wait_for: Wait
) -> None:
    gate = Gate(monkeypatch)
    with Engine(make.deployable(), streams=1, queue_size=2, policy="drop_oldest") as engine:
        names: list[str] = []
        consumer = threading.Thread(target=lambda: names.extend(answer.name for answer in engine.results()))
        consumer.start()
        for number in range(50):
            engine.submit(numbered(number))
            if number == 0:
                wait_for(lambda: len(gate.begun) == 1)
        gate.open.set()
        engine.finish()
        consumer.join(10)
        assert names == ["0", "49"]


def test_deploy_json_decides_streams_and_batch(make: Any) -> None:
    settings = ThroughputSettings(streams=1, threads=1, batch=2, pinning=False)
    with Engine(make.deployable(throughput=settings)) as engine:
        assert (engine.streams, engine.batch, engine.precision) == (1, 2, "f32")
    with Engine(make.deployable(throughput=ThroughputSettings(streams=4096))) as engine:
        assert engine.streams == network_module.usable_cores()
