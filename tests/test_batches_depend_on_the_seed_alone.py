"""What a batch holds depends on (seed, epoch, step): not on workers, on the cache, or on where a run goes on."""

import re
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgedistill.data.augment import Augment, AugmentSettings
from edgedistill.errors import ImageError
from edgedistill.images import InputSpec, load_image
from edgedistill.training.loader import Draw, Schedule, batches, open_store, prepared_spec

SPEC = InputSpec(height=32, width=40)


@pytest.fixture
def paths(tmp_path):
    rng = np.random.default_rng(0)
    files = []
    for number in range(20):
        noise = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
        file = tmp_path / f"{number:02d}.{'jpg' if number % 2 else 'png'}"
        cv2.imwrite(str(file), cv2.GaussianBlur(noise, (0, 0), 2))
        files.append(str(file))
    return np.array(files)


def draw(count=20, batch_size=4, balanced=False, seed=3):
    labels = (np.arange(count) % 5 == 0).astype(np.int32)
    return Draw(np.arange(count), labels, batch_size, balanced, seed)


def collect(paths, *, workers=0, cache_gib=None, start=(0, 0), epochs=2, seed=3, strength="standard"):
    store = open_store(paths, prepared_spec(SPEC), cache_gib=cache_gib)
    augment = Augment(AugmentSettings(strength=strength), SPEC.height, SPEC.width)
    schedule = Schedule([draw(seed=seed)] * epochs, *start)
    stream = batches(store, schedule, augment, spec=SPEC, seed=seed, workers=workers)
    return [(batch.images.copy(), batch.rows.copy()) for batch in stream]


def same(left, right):
    return len(left) == len(right) and all(
        np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]) for a, b in zip(left, right, strict=True)
    )


def test_workers_and_cache_change_no_pixel(paths):
    reference = collect(paths)
    assert len(reference) == 10
    assert reference[0][0].shape == (4, 32, 40, 3)
    assert same(reference, collect(paths, workers=2))
    assert same(reference, collect(paths, cache_gib=0))
    assert not same(reference, collect(paths, seed=4))


def test_a_run_goes_on_with_the_batches_it_would_have_seen(paths):
    reference = collect(paths)
    assert same(reference[3:], collect(paths, start=(0, 3)))
    assert same(reference[7:], collect(paths, start=(1, 2), workers=2))


def test_a_slow_consumer_never_sees_a_batch_change(paths):
    store = open_store(paths, prepared_spec(SPEC), cache_gib=None)
    augment = Augment(AugmentSettings(), SPEC.height, SPEC.width)
    for batch in batches(store, Schedule([draw()] * 3), augment, spec=SPEC, seed=3, workers=2):
        before = batch.images.copy()
        time.sleep(0.02)
        assert np.array_equal(before, batch.images)


def test_pixels_are_rgb_and_both_decoders_are_drawn(paths):
    wide = prepared_spec(SPEC)
    full = {tuple(load_image(p, wide, decode="full")[:, :, ::-1].ravel()[:300]) for p in paths[1::2]}
    reduced = {tuple(load_image(p, wide, decode="reduced")[:, :, ::-1].ravel()[:300]) for p in paths[1::2]}
    assert not full & reduced
    store = open_store(paths, wide, cache_gib=None)
    whole = Augment(AugmentSettings(strength="none"), wide.height, wide.width)
    seen = {
        tuple(image.ravel()[:300])
        for batch in batches(store, Schedule([draw()] * 6), whole, spec=wide, seed=3, workers=0)
        for image, row in zip(batch.images, batch.rows, strict=True)
        if row % 2
    }
    assert seen <= full | reduced
    assert seen & full
    assert seen & reduced


def test_plain_epochs_use_each_image_at_most_once():
    plan = draw(count=22)
    assert plan.steps == 5
    for epoch in range(3):
        rows = plan.epoch(epoch)
        assert rows.shape == (5, 4)
        assert len(set(rows.ravel().tolist())) == 20
    assert not np.array_equal(plan.epoch(0), plan.epoch(1))
    assert np.array_equal(plan.epoch(1), draw(count=22).epoch(1))


def test_balanced_epochs_give_classes_and_their_images_equal_shares():
    plan = draw(count=50, batch_size=10, balanced=True)
    drawn = np.concatenate([plan.epoch(epoch).ravel() for epoch in range(40)])
    minority = drawn % 5 == 0
    assert minority.mean() == pytest.approx(0.5, abs=0.01)
    counts = np.bincount(drawn, minlength=50)
    assert np.ptp(counts[0::5]) <= 10  # 100 draws each
    assert np.ptp(np.delete(counts, np.arange(0, 50, 5))) <= 5  # 25 draws each


def test_a_batch_larger_than_the_data_repeats_nothing_it_need_not():
    plan = draw(count=6, batch_size=6)
    assert plan.steps == 1
    assert sorted(plan.epoch(0).ravel().tolist()) == list(range(6))


@pytest.mark.parametrize(("cache_gib", "workers"), [(None, 0), (0, 0), (0, 2)])
def test_a_damaged_image_stops_the_job_by_its_name(paths, cache_gib, workers):
    with Path(paths[7]).open("r+b") as file:
        file.truncate(300)
    with pytest.raises(ImageError, match=r"07\.jpg") as caught:
        collect(paths, cache_gib=cache_gib, workers=workers)
    assert "Traceback" not in str(caught.value)


KILLED_LOADER = """
import os, signal, sys
import numpy as np
from edgedistill.data.augment import Augment, AugmentSettings
from edgedistill.images import InputSpec
from edgedistill.training import loader
from edgedistill.training.loader import Draw, Schedule, batches, open_store, prepared_spec
made = loader._BatchMaker.__getitem__
def killed_at_the_tenth(self, step):
    if step.number == 10:
        frame = sys._getframe()
        while holding and frame.f_code.co_name != "_worker_loop":
            frame = frame.f_back
        if holding:
            theirs = frame.f_locals
            locks = [theirs["index_queue"]._rlock, theirs["data_queue"]._wlock]
            locks += [theirs["done_event"]._cond] if hasattr(theirs["done_event"], "_cond") else []
            print("held", [lock.acquire(timeout=9) for lock in locks], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return made(self, step)
loader._BatchMaker.__getitem__ = killed_at_the_tenth
holding = sys.argv[1] == "holding"
spec, paths = InputSpec(height=32, width=40), np.array(sys.argv[2:])
rows = np.arange(len(paths))
schedule = Schedule([Draw(rows, (rows % 5 == 0).astype(np.int32), 4, False, 3)] * 50)
store = open_store(paths, prepared_spec(spec), cache_gib=None)
try:
    list(batches(store, schedule, Augment(AugmentSettings(), 32, 40), spec=spec, seed=3, workers=1))
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("lock", ["free", "holding"])
def test_a_killed_loader_process_is_told_with_its_remedy(paths, lock):
    # In a process of its own: torch reports a dead loader through a signal, which also ends a test runner's worker.
    # "holding" all locks that a loader process ever holds.
    command = [sys.executable, "-c", KILLED_LOADER, lock, *paths.tolist()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert re.search(r"DataError a loader process ended .*go on with --resume", result.stdout), result.stderr
    assert result.returncode == 0, result.stderr
    assert lock == "free" or re.search(r"^held \[(True, )+True\]$", result.stdout, re.MULTILINE)
