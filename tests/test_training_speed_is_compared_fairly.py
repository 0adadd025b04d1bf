"""The throughput benchmark gives both trainers the same work and takes ratios inside rounds."""

import cv2
import numpy as np
import pytest

from edgedistill.benchmarks import train_throughput as bench
from edgedistill.benchmarks.train_throughput import Measured
from edgedistill.errors import UsageError

LOG = """\
Train: 0 [   0/3 (  0%)]  Loss: 0.700 (0.700)  Time: 9.000s,    7.11/s  (9.000s,    7.11/s)  LR: 2.000e-03  Data: 8.000 (8.000)
Train: 1 [   0/3 (  0%)]  Loss: 0.700 (0.700)  Time: 1.000s,   64.00/s  (1.000s,   64.00/s)  LR: 2.000e-03  Data: 0.900 (0.900)
Train: 1 [   2/3 (100%)]  Loss: 0.690 (0.695)  Time: 0.400s,  160.00/s  (0.500s,  128.00/s)  LR: 2.000e-03  Data: 0.001 (0.100)
Test: [   0/0]  Time: 0.1 (0.1)  Loss:   0.695 ( 0.695)  Acc@1:  50.000 ( 50.000)  Acc@5: 100.000 (100.000)
Train: 2 [   2/3 (100%)]  Loss: 0.690 (0.695)  Time: 0.400s,  160.00/s  (0.300s,  213.33/s)  LR: 2.000e-03  Data: 0.001 (0.020)
"""


@pytest.fixture
def args(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("print('nothing')")
    return bench.arguments(
        ["--model", "mbv3s", "--size", "96", "--batch-size", "64", "--epochs", "3"]
        + ["--timm-train", str(script), "--out", str(tmp_path / "out.json")]
    )


def test_whole_epochs_count_and_the_first_does_not(args, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_run", lambda command, environment: LOG)
    measured = bench.run_theirs(args, tmp_path, tmp_path, bench.Candidate("timm", 1), 2)
    assert measured.images_per_s == pytest.approx(64 / 0.4)  # the mean of 0.5 and 0.3 s a step
    assert measured.wait_fraction == pytest.approx(0.06 / 0.4)


def test_both_sides_get_the_same_work(args, tmp_path):
    ours = bench.our_command(args, tmp_path, tmp_path / "a")
    theirs = bench.their_command(args, tmp_path, tmp_path / "b", classes=2, workers=1)
    for flag in ("--batch-size", "--epochs"):
        assert ours[ours.index(flag) + 1] == theirs[theirs.index(flag) + 1]
    assert ours[ours.index("--image-size") + 1] == "96"
    start = theirs.index("--input-size")
    assert theirs[start + 1 : start + 4] == ["3", "96", "96"]
    assert theirs[theirs.index("--model") + 1] == "mobilenetv3_small_100"
    assert "--channels-last" in theirs


def test_ratios_are_taken_inside_rounds_against_the_best(args):
    results = {
        "edgedistill": [Measured(100, 0.01), Measured(50, 0.02), Measured(200, 0.01)],
        "timm, 1 workers": [Measured(80, 0.1), Measured(40, 0.1), Measured(100, 0.1)],
        "timm, 2 workers": [Measured(10, 0.1), Measured(10, 0.1), Measured(300, 0.1)],
    }
    written = bench.record(args, results, images=640, classes=2)
    assert written["best_timm"] == "timm, 1 workers"
    assert written["ratio_to_best_timm"] == {"median": 1.25, "min": 1.25, "max": 2.0}
    assert written["results"]["edgedistill"]["images_per_s"]["median"] == 100


def test_the_images_become_one_folder_per_class(tmp_path):
    for number in range(80):
        file = tmp_path / "source" / ("cat" if number % 2 else "dog") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), np.full((8, 8, 3), number, np.uint8))
    count, names = bench.make_folders(str(tmp_path / "source"), tmp_path / "out", limit=8)
    assert (count, names) == (8, ["cat", "dog"])
    for split, expected in (("train", 4), ("val", 16), ("test", 16)):
        for name in names:
            assert len(list((tmp_path / "out" / split / name).iterdir())) == expected


def test_a_trainer_that_fails_is_quoted(args, tmp_path, monkeypatch):
    args.timm_train.write_text("raise SystemExit('no such model')")
    with pytest.raises(UsageError, match="no such model"):
        bench.run_theirs(args, tmp_path, tmp_path, bench.Candidate("timm", 1), 2)
    monkeypatch.setattr(bench, "_run", lambda command, environment: "usage: something else")
    with pytest.raises(UsageError, match="printed no training lines"):
        bench.run_theirs(args, tmp_path, tmp_path, bench.Candidate("timm", 1), 2)
