"""engine.py with two stages: what the first passes on is answered in batches, in order, and never waits in vain."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from edgedistill.errors import ModelError
from edgedistill.runtime import Classifier, Engine, Frame, Prediction
from edgedistill.runtime import network as network_module
from edgedistill.runtime.bundle import ThroughputSettings
from edgedistill.runtime.network import Outcome, PassedOn

pytestmark = pytest.mark.timeout(60)
Wait = Callable[[Callable[[], bool]], None]
SURE, UNSURE = (20, 30, 220), (128, 128, 128)


def image(number: int, *, sure: bool) -> Frame:
    """A red picture, of which the fast stage is sure, or a grey one, which it passes on."""
    return Frame(str(number), np.full((32, 32, 3), SURE if sure else UNSURE, np.uint8))


def images(count: int, unsure: Callable[[int], bool]) -> list[Frame]:
    return [image(number, sure=not unsure(number)) for number in range(count)]


def cascade(make: Any, **config: Any) -> Any:
    return make.cascade(exit_threshold=0.8, fast_gain=2.0, **config)


class Steps:
    """What the workers did, in order: (stage, names). A first stage waits until its images are ``allowed``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[tuple[int, list[str]]] = []
        self.allowed = -1
        begin, go_on = network_module.Worker.begin, network_module.Worker.go_on

        def held(worker: network_module.Worker, frames: Sequence[Frame]) -> list[Outcome]:
            self.done.append((0, [frame.name for frame in frames]))
            while int(frames[0].name) > self.allowed:
                time.sleep(0.001)
            return begin(worker, frames)

        def noted(worker: network_module.Worker, passed: Sequence[PassedOn]) -> list[Outcome]:
            self.done.append((1, [one.frame.name for one in passed]))
            return go_on(worker, passed)

        monkeypatch.setattr(network_module.Worker, "begin", held)
        monkeypatch.setattr(network_module.Worker, "go_on", noted)

    def has_begun(self, number: int) -> bool:
        return any(str(number) in names for stage, names in self.done if stage == 0)

    def later(self) -> list[list[str]]:
        return [names for stage, names in self.done if stage == 1]


@pytest.mark.parametrize("slow_size", [32, 48])
@pytest.mark.parametrize("options", [{}, {"streams": 1, "batch": 4}, {"streams": 3, "batch": 8}], ids=str)
@pytest.mark.parametrize("share", [1, 3, 50])
def test_answers_are_the_classifiers_in_order(make: Any, slow_size: int, options: dict[str, int], share: int) -> None:
    root = cascade(make, slow_size=slow_size, reject_below=0.4)
    photos = [make.photo("red", height=200, width=150), make.photo("green", ".png").read_bytes()]
    broken = make.folder / "broken.jpg"
    broken.write_bytes(photos[0].read_bytes()[:300])
    sources = [*images(60, lambda number: number % share == 0), *photos, broken, 17, *photos] * 2
    expected = Classifier(root).classify(sources)
    assert {answer.stage for answer in expected} == {0, 1}
    with Engine(root, **options) as engine:
        answers = list(engine.map(sources))
    assert [(a.name, a.label, a.stage, a.error) for a in answers] == [
        (a.name, a.label, a.stage, a.error) for a in expected
    ]
    for answer, other in zip(answers, expected, strict=True):
        np.testing.assert_allclose(answer.probabilities, other.probabilities, atol=1e-6)


def test_a_batch_is_filled_while_there_is_more_to_begin(
    make: Any, monkeypatch: pytest.MonkeyPatch, wait_for: Wait
) -> None:
    steps = Steps(monkeypatch)
    with Engine(cascade(make), streams=1, batch=4, queue_size=64) as engine:
        frames = images(38, lambda number: number % 4 == 0)
        engine.submit(frames[0])
        wait_for(lambda: steps.has_begun(0))
        for frame in frames[1:]:
            engine.submit(frame)
        engine.finish()
        steps.allowed = 100
        assert [answer.name for answer in engine.results()] == [frame.name for frame in frames]
    # The last one is half full: the input ended.
    assert steps.later() == [["0", "4", "8", "12"], ["16", "20", "24", "28"], ["32", "36"]]


def test_an_idle_engine_keeps_nothing_waiting(make: Any) -> None:
    with Engine(cascade(make), streams=2, batch=8) as engine:
        results = engine.results()
        for number in range(10):
            engine.submit(image(number, sure=False))
            answer = next(results)  # although nobody finishes
            assert (answer.name, answer.stage) == (str(number), 1)


def test_one_image_that_waits_does_not_hold_the_queue_up(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    serving = ThroughputSettings(streams=1, threads=1, batch=1, later_batch=8)
    with Engine(cascade(make, throughput=serving), queue_size=9) as engine:
        assert (engine.batch, engine.later_batch) == (1, 8)
        for frame in images(9, lambda number: number == 0):
            engine.submit(frame)
        steps.allowed = 100
        engine.finish()
        assert len(list(engine.results())) == 9
    assert steps.done[7] == (1, ["0"])  # two are left to begin


def test_an_unforeseen_error_in_a_later_stage_is_raised_at_its_images(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = network_module.Worker.go_on

    def sometimes(worker: network_module.Worker, passed: Sequence[PassedOn]) -> list[Outcome]:
        if any(one.frame.name == "7" for one in passed):
            raise ZeroDivisionError("a bug")
        return original(worker, passed)

    monkeypatch.setattr(network_module.Worker, "go_on", sometimes)
    with Engine(cascade(make), streams=1, batch=1) as engine:
        answers = engine.map(images(30, lambda number: number % 7 == 0))
        assert [next(answers).name for _ in range(7)] == [str(number) for number in range(7)]
        with pytest.raises(ZeroDivisionError, match="a bug"):
            next(answers)
        assert len(list(engine.map(images(50, lambda number: number % 5 == 1)))) == 50


def test_a_full_camera_queue_may_drop_what_waits_for_a_later_stage(
    make: Any, monkeypatch: pytest.MonkeyPatch, wait_for: Wait
) -> None:
    steps = Steps(monkeypatch)
    with Engine(cascade(make), streams=1, batch=2, queue_size=3, policy="drop_oldest") as engine:
        frames = images(5, lambda number: number == 0)
        engine.submit(frames[0])
        wait_for(lambda: steps.has_begun(0))
        engine.submit(frames[1])
        engine.submit(frames[2])
        steps.allowed = 0
        wait_for(lambda: steps.has_begun(1))  # with 2: nothing waits to be begun, and 0 waits for its batch
        engine.submit(frames[3])
        assert engine.dropped == 1
        engine.submit(frames[4])
        assert engine.dropped == 2
        steps.allowed = 100
        engine.finish()
        assert [answer.name for answer in engine.results()] == ["1", "2", "4"]
    assert steps.later() == []


def test_closing_ends_what_waits_for_a_later_stage(make: Any, monkeypatch: pytest.MonkeyPatch, wait_for: Wait) -> None:
    steps = Steps(monkeypatch)
    engine = Engine(cascade(make), streams=1, batch=2, queue_size=9)
    got: list[Prediction] = []
    consumer = threading.Thread(target=lambda: got.extend(engine.results()))
    consumer.start()
    for frame in images(6, lambda number: number == 1):
        engine.submit(frame)
    steps.allowed = 1
    wait_for(lambda: steps.has_begun(3))
    threading.Timer(0.1, setattr, (steps, "allowed", 100)).start()
    engine.close()
    consumer.join(10)
    assert not consumer.is_alive() and [answer.name for answer in got] in ([], ["0"])
    assert steps.later() == []
    with pytest.raises(ModelError, match="closed"):
        engine.submit(image(9, sure=True))


def test_a_reader_that_leaves_takes_its_images_along(make: Any) -> None:
    root = cascade(make)
    with Engine(root, streams=2, batch=8) as engine:
        for _ in range(5):
            answers = engine.map(images(200, lambda number: number % 3 == 0))
            next(answers)
            answers.close()
        assert [a.stage for a in engine.map(images(20, lambda number: number == 3))].count(1) == 1


def test_several_maps_at_once_do_not_mix(make: Any) -> None:
    with Engine(cascade(make), streams=2, batch=4) as engine:
        wrong: list[int] = []

        def ask(share: int) -> None:
            frames = images(150, lambda number: number % share == 0)
            for number, answer in enumerate(engine.map(frames)):
                if (answer.name, answer.stage) != (str(number), int(number % share == 0)):
                    wrong.append(number)

        threads = [threading.Thread(target=ask, args=(share,)) for share in (2, 9, 70)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert wrong == [] and not any(thread.is_alive() for thread in threads)


def test_the_queue_has_room_for_a_batch_to_fill(make: Any) -> None:
    root = cascade(make)
    with Engine(root, streams=2, batch=8) as files, Engine(root, streams=2) as one:
        assert (files.queue_size, one.queue_size) == (4 * 16 + 1 + 56, 9)
    with Engine(root, streams=2, batch=8, policy="drop_oldest") as camera:
        assert camera.queue_size == 65
