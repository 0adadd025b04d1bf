"""Several processes train what one would: each takes its share of every batch, one writes, all stop at one error."""

import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from edgedistill.artifacts import RunDir, read_jsonl
from edgedistill.data.manifest import read_dataset
from edgedistill.errors import UsageError
from edgedistill.images import InputSpec
from edgedistill.student import StudentSettings, distil, refuse_several_processes
from edgedistill.tasks import Head, Task
from edgedistill.training import processes
from edgedistill.training.checkpoints import load_tensors
from edgedistill.training.heads import task_loss
from edgedistill.training.loader import Draw, ImageStore, Schedule, batches, shared_images
from edgedistill.training.losses import HardLoss, LossSettings, Targets, loss_of
from edgedistill.training.processes import ALONE, Part, alone_in, check_batch, of_all, on_main, part, to_start
from edgedistill.training.soft_labels import read_soft_labels

LAUNCHES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU")
# Without batch statistics, dropout and mixing, and without an optimiser that divides by small numbers, nothing but the
# order of additions differs between one process and two.
OPTIONS = (
    "--teacher test_convnext --student test_convnext --teacher-weights none --student-weights none --folds 2"
    " --image-size 32 --teacher-epochs 1 --epochs 2 --extra-epochs 1 --batch-size 7 --teacher-batch-size 6"
    " --test-fraction 0.25 --cutmix 0 --optimizer sgd --lr 0.01 --teacher-lr 0.01 --no-baseline --device cpu"
    " --checkpoint-minutes 0 --workers 0 --no-balanced --class-weights inverse"  # of which each share has another sum
).split()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in LAUNCHES:
        monkeypatch.delenv(name, raising=False)


def test_shares_are_disjoint_and_weigh_as_the_whole():
    rows = np.arange(7)
    parts = [Part(rank, 3, 3) for rank in range(3)]
    assert sorted(np.concatenate([this.of(rows) for this in parts]).tolist()) == rows.tolist()
    assert ALONE.main


HEADS = Task((Head("a", "softmax", ("x", "y", "z")), Head("b", "sigmoid", ("s", "t")), Head("c", "regression")))
UNEQUAL = {
    "class weights": (None, LossSettings("ce", 0.3, 1.0, HardLoss(class_weights=(1.0, 9.0, 1.0, 0.5, 2.0, 1.0)))),
    "soft-F1": (None, LossSettings(hard=HardLoss("soft-f1"))),
    "unknown labels": (HEADS, LossSettings("kl", 0.4, 2.0)),
    "unknown labels that weigh": (HEADS, LossSettings(hard=HardLoss(class_weights=(1.0, 3.0, 2.0, 1.5, 4.0, 1.0)))),
}


@pytest.mark.parametrize("name", UNEQUAL)
def test_gradients_of_all_shares_are_those_of_the_whole_batch(monkeypatch, name):
    task, settings = UNEQUAL[name]
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(7, 6))).float()
    hard = torch.softmax(torch.from_numpy(rng.normal(size=(7, 6))).float(), dim=1)
    soft = torch.softmax(torch.from_numpy(rng.normal(size=(7, 6))).float(), dim=1)
    if task is not None:
        hard[[0, 3, 6], :3], hard[[1, 2], 3:5], hard[4, 5] = np.nan, np.nan, np.nan
        soft[6, :3] = np.nan

    def loss(whole, hard, soft):
        targets = Targets(hard, soft)
        return loss_of(whole, targets, settings) if task is None else task_loss(whole, targets, settings, task)

    expected = logits.clone().requires_grad_()
    value = loss(expected, hard, soft)
    value.backward()
    parts = [Part(rank, 3, 3) for rank in range(3)]
    own = [[tensor[this.rank :: 3].clone() for tensor in (logits, hard, soft)] for this in parts]
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(processes.dist, "all_gather", lambda received, mine: sent.append(mine))
    for each, this in zip(own, parts, strict=True):
        of_all(each, this, 7)

    def answered(received, mine):
        for place, theirs in zip(received, sent, strict=True):
            place.copy_(theirs)

    monkeypatch.setattr(processes.dist, "all_gather", answered)
    for each, this in zip(own, parts, strict=True):
        share = each[0].requires_grad_()
        mine = loss(*of_all(each, this, 7))
        assert mine.item() == pytest.approx(value.item(), rel=1e-6)
        mine.backward()
        assert torch.allclose(share.grad, expected.grad[this.rank :: 3], atol=1e-7)
    assert all(one is other for one, other in zip(of_all(own[0], ALONE, 7), own[0], strict=True))


def test_the_shares_of_a_batch_are_what_one_process_would_see():
    spec = InputSpec(height=8, width=8)
    pixels = shared_images(20, spec)
    pixels[:] = np.random.default_rng(0).integers(0, 256, pixels.shape)
    store = ImageStore(np.array([f"{n}.png" for n in range(20)]), spec, {"full": pixels}, np.full(20, -1))
    draw = Draw(rows=np.arange(20), labels=np.zeros(20, np.int32), batch_size=5, balanced=False, seed=3)

    def augment(image, seed):
        return image ^ np.uint8(seed % 251)

    def all_batches(this):
        stream = batches(store, Schedule([draw, draw]), augment, spec=spec, seed=1, workers=0, part=this)
        return [(batch.images.copy(), batch.rows.copy()) for batch in stream]

    whole, first, second = all_batches(ALONE), all_batches(Part(0, 2, 2)), all_batches(Part(1, 2, 2))
    assert len(whole) == len(first) == len(second) == 8
    for (images, rows), (a, rows_a), (b, rows_b) in zip(whole, first, second, strict=True):
        assert np.array_equal(rows[0::2], rows_a) and np.array_equal(rows[1::2], rows_b)
        assert np.array_equal(images[0::2], a) and np.array_equal(images[1::2], b)


def test_one_process_is_alone(monkeypatch):
    assert part() == ALONE
    assert on_main(lambda: 7) == 7
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert part() == ALONE


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT missing: start them with 'distill --processes N"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "x"}, "but MASTER_PORT missing"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE='many': expected a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0': expected a whole number"),
        (
            {"ACCELERATE_USE_CPU": "False", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            "asked for several processes and started one.*--processes N",
        ),
    ],
)
def test_half_a_launch_is_a_usage_error(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        part()


def test_a_batch_too_small_to_share_is_refused():
    check_batch(2, ALONE)
    check_batch(4, Part(0, 2, 2))
    with pytest.raises(UsageError, match="batches of 3 for 2 processes; expected 4 or more"):
        check_batch(3, Part(1, 2, 2))


def test_live_teachers_want_one_process(monkeypatch):
    settings = StudentSettings(live_teachers=True)
    refuse_several_processes(settings)
    monkeypatch.setattr(distil, "part", lambda: Part(0, 2, 2))
    with pytest.raises(UsageError, match="--live-teachers judge in one process"):
        refuse_several_processes(settings)
    refuse_several_processes(StudentSettings())


def test_several_processes_are_started_once(monkeypatch):
    assert to_start(None) == 1 and to_start(1) == 1 and to_start(3) == 3
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert to_start(None) == 1 and to_start(2) == 1  # they are there already
    with pytest.raises(UsageError, match="--processes 3 inside a launch of 2"):
        to_start(3)


@pytest.mark.parametrize(
    ("command", "started"),
    [
        ("python accelerate-launch --cpu --num_processes 4 -m edgedistill distill --batch-size 8", 4),
        ("python -m accelerate.commands.launch --num-processes=3 --num_machines 1 -m edgedistill teach", 3),
        ("python accelerate-launch --cpu --num_processes 4 --num_machines 2 -m edgedistill teach", None),
        ("python accelerate-launch -m edgedistill distill --processes 2", None),
    ],
)
def test_half_a_launch_is_completed_where_its_number_is_known(monkeypatch, command, started):
    monkeypatch.setattr(processes.psutil, "Process", lambda pid: SimpleNamespace(cmdline=command.split))
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert to_start(2) == 2
    if started:
        assert to_start(None) == started
    else:
        with pytest.raises(UsageError, match="--processes N"):
            to_start(None)


ACCELERATE = "--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 29531"
# What 'accelerate launch' runs; that program itself imports timm, which cannot be beside a CPU-only torch.
LAUNCHERS = {
    "alone": [],
    "option": [],
    "torchrun": "-m torch.distributed.run --standalone --nproc_per_node 2".split(),
    "accelerate": f"-m accelerate.commands.launch --multi_gpu {ACCELERATE}".split(),
    "accelerate on a CPU": f"-m accelerate.commands.launch --cpu {ACCELERATE}".split(),
}


def start(*arguments: object, by: str, program: str = "edgedistill") -> subprocess.Popen[str]:
    command = [sys.executable, *LAUNCHERS[by], "-m", program, *map(str, arguments)]
    command += ["--processes", "2"] if by == "option" else []
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def weights_of(run: RunDir, name: str) -> dict[str, torch.Tensor]:
    return load_tensors(run.root / name, format="edgedistill-model")["state_dict"]


@pytest.fixture(scope="module")
def run_of_one(photos, tmp_path_factory, cli):
    run = RunDir(tmp_path_factory.mktemp("runs") / "one")
    cli("distill", "--data", photos, "--out", run.root, *OPTIONS, "--no-distillation")
    return run


@pytest.mark.slow
@pytest.mark.parametrize("by", ["torchrun", "option", "accelerate on a CPU"])
def test_two_processes_train_the_weights_of_one(photos, tmp_path, run_of_one, by):
    run = RunDir(tmp_path / "two")
    process = start("distill", "--data", photos, "--out", run.root, *OPTIONS, "--no-distillation", "--json", by=by)
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    ours, theirs = weights_of(run, "model.pt"), weights_of(run_of_one, "model.pt")
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.allclose(ours[key], theirs[key], rtol=1e-4, atol=1e-6), key
    one, two = (read_jsonl(each.hard_label_student / "metrics.jsonl") for each in (run_of_one, run))
    assert [row["train_loss"] for row in two] == pytest.approx([row["train_loss"] for row in one], rel=1e-5)
    accuracy = json.loads((run_of_one.evaluation / "evaluation.json").read_text())["models"]["hard_label_student"][
        "accuracy"
    ]
    assert json.loads(out)["evaluation"]["models"]["hard_label_student"]["accuracy"] == accuracy


FROZEN = """
from edgedistill.timm_import import import_timm

timm = import_timm()
from timm.layers import freeze_batch_norm_2d
from timm.models import register_model

from edgedistill.cli import main


@register_model
def test_resnet_frozen(pretrained=False, **options):
    return freeze_batch_norm_2d(timm.models.model_entrypoint("test_resnet")(**options))


main()
"""


@pytest.mark.slow
def test_two_processes_train_the_weights_of_one_where_batch_norms_are_frozen(photos, tmp_path, monkeypatch):
    (tmp_path / "frozen_norms.py").write_text(FROZEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    options = [*OPTIONS, "--student", "test_resnet_frozen", "--no-distillation"]
    runs = {by: RunDir(tmp_path / by) for by in ("alone", "torchrun")}
    for by, run in runs.items():
        process = start("distill", "--data", photos, "--out", run.root, *options, by=by, program="frozen_norms")
        assert process.wait(250) == 0
    one, two = (weights_of(run, "model.pt") for run in runs.values())
    assert one.keys() == two.keys() and not one["conv1.1.running_mean"].any()
    for key in one:
        assert torch.allclose(two[key], one[key], rtol=1e-4, atol=1e-6), key
    first, last = (row["train_loss"] for row in read_jsonl(runs["alone"].hard_label_student / "metrics.jsonl")[::2])
    assert last < first


@pytest.mark.slow
def test_accelerate_runs_the_whole_job_once(photos, tmp_path):
    run = RunDir(tmp_path / "run")
    process = start("distill", "--data", photos, "--out", run.root, *OPTIONS, "--json", by="accelerate")
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0, err
    assert json.loads(out)["evaluation"]["n"] > 0  # one process answers, so it is one object
    assert np.isfinite(read_soft_labels(run.soft_labels, read_dataset(run.dataset))).any()
    assert [row["epoch"] for row in read_jsonl(run.student / "metrics.jsonl")] == [1, 2, 3]
    assert not list(run.root.rglob("checkpoint.pt")) and not list(run.root.rglob("*.tmp"))


@pytest.mark.slow
def test_two_killed_processes_resume_exactly(photos, tmp_path):
    options = [*OPTIONS, "--no-distillation", "--epochs", "6"]
    whole, broken = RunDir(tmp_path / "whole"), RunDir(tmp_path / "broken")
    assert start("distill", "--data", photos, "--out", whole.root, *options, by="torchrun").wait(250) == 0
    process = start("distill", "--data", photos, "--out", broken.root, *options, by="torchrun")
    folder, limit = broken.hard_label_student, time.monotonic() + 200
    while not read_jsonl(folder / "metrics.jsonl") and time.monotonic() < limit:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    assert not broken.model.exists() and (folder / "checkpoint.pt").exists()
    resumed = start("distill", "--data", photos, "--out", broken.root, *options, "--resume", by="torchrun")
    assert resumed.wait(250) == 0
    ours, theirs = weights_of(broken, "model.pt"), weights_of(whole, "model.pt")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["torchrun", "option"])
def test_an_error_of_the_main_process_ends_all_and_is_told_once(photos, tmp_path, by):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "dataset.csv").write_text("nonsense")
    process = start("distill", "--data", photos, "--out", tmp_path / "run", *OPTIONS, by=by)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 if by == "option" else process.returncode != 0
    assert err.count("holds a run already; go on with --resume") == 1


@pytest.mark.slow
def test_an_interrupt_reaches_all_processes_and_the_work_goes_on_from_there(photos, tmp_path):
    options = ["--data", photos, "--out", tmp_path / "run", *OPTIONS, "--no-distillation", "--epochs", "2000"]
    process = start("distill", *options, by="option")
    metrics, limit = RunDir(tmp_path / "run").hard_label_student / "metrics.jsonl", time.monotonic() + 200
    while not read_jsonl(metrics) and time.monotonic() < limit:
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.count("interrupted; distill, teach and tune go on with --resume") == 1 and "Traceback" not in err
    assert len(children) >= 2 and not any(child.is_running() for child in children)
    assert (metrics.parent / "checkpoint.pt").exists()


def test_a_folder_has_one_launch_at_work_and_a_killed_one_frees_it(tmp_path, capsys):
    folder = tmp_path / "fold-0"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom edgedistill.training.processes import alone_in\n"
        "with alone_in(Path(sys.argv[1])):\n    print('in', flush=True)\n    time.sleep(600)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "in\n"
    threading.Timer(1.0, other.kill).start()
    with alone_in(folder):
        assert other.wait(timeout=60) == -signal.SIGKILL  # not before it was gone
    assert "another process is at work there; waiting" in capsys.readouterr().err
    with alone_in(folder):
        pass
    assert capsys.readouterr().err == ""


def test_ctrl_c_at_any_line_of_the_hold_leaves_nothing_locked_in_a_process_that_goes_on(tmp_path):
    folder, stopped = tmp_path / "fold-0", 0
    for wanted in itertools.count(1):
        lines = itertools.count(1)

        def stop(frame, event, _, wanted=wanted, lines=lines):
            if frame.f_code.co_filename != processes.__file__:
                return None
            if event == "line" and next(lines) == wanted:
                raise KeyboardInterrupt
            return stop

        before = sys.gettrace()
        sys.settrace(stop)
        try:
            with alone_in(folder):
                pass
            break
        except KeyboardInterrupt:
            stopped += 1
        finally:
            sys.settrace(before)
        (folder / ".lock").parent.mkdir(exist_ok=True)
        with (folder / ".lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where it is held
    assert stopped > 10
