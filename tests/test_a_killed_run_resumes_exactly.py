"""kill -9 at ten random moments of `distill`, each time resumed: the same weights, bit for bit, as the unbroken run."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgedistill.artifacts import read_array

KILLS = 10
WEIGHTS = ("model.pt", "student-hard-labels/model.pt", "teacher/fold-0/model.pt", "teacher/fold-1/model.pt")


def start(photos: Path, out: Path, options: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "edgedistill", "distill", "--data", str(photos), "--out", str(out), *options]
    return subprocess.Popen([*command, "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_ten_kills_change_no_bit(photos: Path, tmp_path: Path, tiny_options: list[str]) -> None:
    torch = pytest.importorskip("torch")
    options = [*tiny_options, "--checkpoint-minutes", "0"]
    began = time.monotonic()
    finish(start(photos, tmp_path / "whole", options))
    seconds = time.monotonic() - began

    draw = random.Random(time.time_ns())
    kills = 0
    while kills < KILLS:
        process = start(photos, tmp_path / "killed", options)
        # Later and later on the whole, so that the kills fall into every stage: start, teachers, labels, students.
        moment = draw.uniform(0.1, 0.9) * seconds
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors.decode()
        kills += 1
    finish(start(photos, tmp_path / "killed", options))

    for name in WEIGHTS:
        whole, killed = (
            torch.load(tmp_path / run / name, weights_only=True)["state_dict"] for run in ("whole", "killed")
        )
        assert whole.keys() == killed.keys()
        different = [key for key in whole if not torch.equal(whole[key], killed[key])]
        assert not different, f"{name}: {different[:3]}"
    for name in ("soft_labels/label.log_probs.npy", "evaluation/student.probs.npy"):
        assert (read_array(tmp_path / "whole" / name) == read_array(tmp_path / "killed" / name)).all()
    assert not list((tmp_path / "killed").rglob("*.tmp"))
