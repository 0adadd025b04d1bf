"""benchmarks/distillation.py: one teaching per seed, equal budgets, and intervals over seeds and images."""

import csv
import json
import shlex
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgedistill.artifacts import read_array, read_json, write_array, write_json
from edgedistill.benchmarks import distillation, reference_runs
from edgedistill.data.deal import SplitSettings
from edgedistill.errors import DataError, UsageError
from edgedistill.metrics import hierarchical_difference
from edgedistill.training.seeds import generator

PROTOCOLS = sorted((Path(distillation.__file__).parent / "protocols").glob("distillation-*.toml"))
TINY = """
data = "{data}"
seeds = [0, 1]
data_options = "--folds 2"
teacher_options = "--teacher test_efficientnet --teacher-weights none --teacher-image-size 32 --teacher-epochs 1"
student_options = "--student test_efficientnet --student-weights none --image-size 32 --epochs 1 --extra-epochs 0 --batch-size 8"
teachers_with = "contest"
reference = "hard-labels"
peer_teacher = "--student test_efficientnet --student-weights none --image-size 32 --epochs 1 --batch-size 8"

[arms]
contest = "--soft-weight 0.2"
hard-labels = "--no-distillation"
live = "--live-teachers"

[peers]
timm-kd = "--model test_efficientnet --size 32 --epochs 1 --batch-size 8 --workers 0"
"""


def write_protocol(folder, **values):
    path = folder / "tiny.toml"
    path.write_text(TINY.format(data=values.pop("data", "photos")), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: path.stem)
def test_each_protocol_parses_into_settings_that_exist(path, tmp_path):
    """Every arm's options are known to the command line, and only what an arm is about differs between arms."""
    import typer

    from edgedistill import cli

    protocol = distillation.read_protocol(path)
    app = typer.Typer()
    app.command()(cli.distill)
    command = typer.main.get_command(app)
    seen = {}
    for piece in distillation.pieces(protocol, tmp_path):
        if piece.seed or piece.arm in protocol.peers:
            continue
        start = piece.command.index("--data")
        with command.make_context("distill", piece.command[start:]) as context:
            seen[piece.arm] = dict(context.params)
            seen[piece.arm]["all_epochs"] = seen[piece.arm]["epochs"] + seen[piece.arm]["extra_epochs"]
    assert set(seen) >= set(protocol.arms)
    budget = (
        "all_epochs",  # whether the last are averaged may differ, and their number may not
        "batch_size",
        "lr",
        "student",
        "image_size",
        "augment",
        "any_way_up",
        "balanced",
    )
    assert set(protocol.compared) <= {"lr", "balanced"}  # epochs, images and the network are never compared
    equal = set(budget) - set(protocol.compared)
    for arm in protocol.arms:
        reference = seen[protocol.reference_of(arm)]
        assert {key: seen[arm][key] for key in equal} == {key: reference[key] for key in equal}, arm
        assert seen[arm]["no_distillation"] or seen[arm]["soft_labels"] or arm == protocol.teachers_with
    assert seen[protocol.teachers_with]["soft_labels"] is None


def test_pieces_share_one_teaching_per_seed(tmp_path):
    protocol = distillation.read_protocol(write_protocol(tmp_path))
    pieces = list(distillation.pieces(protocol, tmp_path / "runs"))
    assert [(piece.seed, piece.arm) for piece in pieces[:5]] == [
        (0, "contest"),
        (0, "hard-labels"),
        (0, "live"),
        (0, ""),
        (0, "timm-kd"),
    ]
    first, hard, live, peer_teacher, peer = (shlex.join(piece.command) for piece in pieces[:5])
    root = tmp_path / "runs" / "tiny" / "seed-0"
    assert f"--out {root / 'teachers'}" in first and "--teacher-epochs 1" in first
    assert f"--soft-labels {root / 'teachers' / 'soft_labels'}" in live and "--live-teachers" in live
    assert "--soft-labels" not in hard + peer_teacher
    assert f"--dataset {root / 'peer-teacher' / 'dataset.csv'}" in peer
    assert f"--teacher {root / 'peer-teacher' / 'model.pt'}" in peer


def test_an_arm_of_several_processes_is_launched_by_torchrun_with_the_same_options(tmp_path):
    path = write_protocol(tmp_path)
    alone = {piece.arm: piece for piece in distillation.pieces(distillation.read_protocol(path), tmp_path)}
    path.write_text(path.read_text() + "\n[processes]\nhard-labels = 2\n")
    both = {piece.arm: piece for piece in distillation.pieces(distillation.read_protocol(path), tmp_path)}
    assert both["contest"].command == alone["contest"].command
    launched, plain = both["hard-labels"].command, alone["hard-labels"].command
    start = launched.index("--data")
    assert launched[start:] == plain[plain.index("--data") :]
    assert launched[1:start] == shlex.split(
        "-m torch.distributed.run --standalone --nproc_per_node 2 -m edgedistill distill"
    )


def test_unlabelled_images_are_training_images_that_no_arm_has_labels_of(tmp_path):
    make_photos(tmp_path / "photos")
    path = write_protocol(tmp_path, data=str(tmp_path / "photos"))
    text = path.read_text().replace('"--live-teachers"', '"--live-teachers --unlabelled {unlabelled}"')
    path.write_text("unlabelled_images = 15\n" + text)
    with pytest.raises(UsageError, match="give that too"):
        distillation.read_protocol(path)
    path.write_text("train_images = 40\nunlabelled_images = 15\n" + text)
    protocol = distillation.read_protocol(path)
    distillation.prepare_data(protocol, tmp_path / "runs", 0)
    data = distillation.data_argument(protocol, tmp_path / "runs", 0)
    folder = distillation.unlabelled_folder(protocol, tmp_path / "runs", 0)
    linked = {link.resolve() for link in folder.iterdir()}
    labelled = {Path(line.split(",")[0]).resolve() for line in Path(data).read_text().splitlines()[1:]}
    assert (len(linked), len(labelled)) == (15, 40) and not linked & labelled
    live = next(piece for piece in distillation.pieces(protocol, tmp_path / "runs") if piece.arm == "live")
    assert live.command[live.command.index("--unlabelled") + 1] == str(folder)
    path.write_text("train_images = 40\nunlabelled_images = 21\n" + text)
    with pytest.raises(UsageError, match="20 training images are left, not 21"):
        distillation.prepare_data(distillation.read_protocol(path), tmp_path / "runs", 0)


def test_each_seed_cuts_its_own_test_split_before_labels_and_unlabelled_images_are_chosen(tmp_path):
    make_photos(tmp_path / "photos")
    path = write_protocol(tmp_path, data=str(tmp_path / "photos"))
    text = path.read_text().replace('"--live-teachers"', '"--live-teachers --unlabelled {unlabelled}"')
    path.write_text("test_fraction = 0.25\n" + text)
    with pytest.raises(UsageError, match="test_fraction goes with train_images"):
        distillation.read_protocol(path)
    path.write_text("test_fraction = 0.25\ntrain_images = 30\nunlabelled_images = 12\n" + text)
    protocol = distillation.read_protocol(path)
    tests = []
    for seed in (0, 1):
        distillation.prepare_data(protocol, tmp_path / "runs", seed)
        with Path(distillation.data_argument(protocol, tmp_path / "runs", seed)).open(newline="") as file:
            rows = list(csv.DictReader(file))
        of_split = {name: {row["path"] for row in rows if row["split"] == name} for name in ("train", "test")}
        linked = {
            str(link.resolve()) for link in distillation.unlabelled_folder(protocol, tmp_path / "runs", seed).iterdir()
        }
        assert (len(of_split["train"]), len(of_split["test"]), len(linked)) == (
            30,
            16,
            12,
        )  # a quarter of 60, groups and classes kept whole
        assert not linked & (of_split["train"] | of_split["test"])
        labels = [row["label"] for row in rows if row["split"] == "train"]
        assert {labels.count(name) for name in set(labels)} == {30 // len(set(labels))}
        tests.append(of_split["test"])
    assert tests[0] != tests[1]
    with pytest.raises(UsageError, match="has a test split of its own"):
        reference_runs.write_subset(
            distillation.data_argument(protocol, tmp_path / "runs", 0), 10, tmp_path / "x.csv", cut=SplitSettings()
        )


def fake_piece(command, seconds):
    """What a training leaves behind: right answers in 60%, 80% with live teachers, 90% for the teachers."""
    folder = Path(command[command.index("--out") + 1])
    seed = int(command[command.index("--seed") + 1])
    if "peer-teacher" in folder.name:
        (folder / "model.pt").write_bytes(b"")
        return True
    if folder.name == "live" and seed == 1 and seconds < 60:
        return False
    labels = generator(seed, "labels").integers(0, 3, 400)
    shares = {"teachers": {"student": 0.6, "teacher": 0.9}, "live": {"student": 0.8}, "timm-kd": {"student": 0.7}}
    values = {}
    for model, share in shares.get(folder.name, {"hard_label_student": 0.6}).items():
        right = generator(seed, folder.name, model).random(400) < share
        answers = np.where(right, labels, (labels + 1) % 3)
        write_array(folder / "evaluation" / f"{model}.probs.npy", np.eye(3, dtype=np.float32)[answers])
        values[model] = {"accuracy": float(right.mean()), "macro_f1": float(right.mean())}
    write_array(folder / "evaluation" / "test_labels.npy", labels.astype(np.int32))
    write_json(folder / "evaluation" / "evaluation.json", {"n": 400, "models": values}, format="edgedistill-evaluation")
    log = folder / ("student" if "student" in values else "student-hard-labels") / "metrics.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text('{"epoch": 1, "seconds": 30.0}\n{"epoch": 2, "seconds": 31.0}\n')
    if folder.name == "teachers":
        (folder / "dataset.csv").write_text("the manifest")
    return True


def test_a_benchmark_goes_on_where_time_ran_out_and_sums_up(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(distillation, "run_piece", lambda *args: ran.append(args[0]) or fake_piece(*args))
    options = [str(write_protocol(tmp_path)), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert distillation.main([*options, "--minutes", "0.5"]) == distillation.TIMES_UP
    assert "time is up" in capsys.readouterr().err
    count = len(ran)
    assert distillation.main([*options, "--minutes", "5"]) == 0
    assert len(ran) == 11  # five pieces a seed, and the one that time ran out for
    assert count == 8
    rows = distillation.read_rows(tmp_path / "out" / "tiny.csv")
    assert len(rows) == 10
    assert {row["train_s"] for row in rows if row["arm"] == "live"} == {"61.0"}
    assert (tmp_path / "runs" / "tiny" / "seed-1" / "live" / "dataset.csv").read_text() == "the manifest"
    record = read_json(tmp_path / "out" / "tiny.json", format="edgedistill-distillation-benchmark")
    live = record["arms"]["live"]["accuracy"]
    assert live["minus_reference"] == pytest.approx(live["mean"] - record["arms"]["hard-labels"]["accuracy"]["mean"])
    assert live["ci95"][0] > 0.1
    assert record["arms"]["teachers"]["accuracy"]["mean"] == pytest.approx(0.9, abs=0.04)
    assert "minus_reference" not in record["arms"]["hard-labels"]["accuracy"]
    assert read_array(tmp_path / "out" / "tiny" / "seed-0" / "live.npy").shape == (400,)
    assert distillation.main([*options, "--summary"]) == 0
    assert "hard-labels" in capsys.readouterr().out
    assert distillation.main([*options, "--summary", "--reference", "live"]) == 0
    turned = read_json(tmp_path / "out" / "tiny-minus-live.json", format="edgedistill-distillation-benchmark")["arms"]
    assert turned["hard-labels"]["accuracy"]["minus_reference"] == pytest.approx(-live["minus_reference"])
    assert "minus_reference" not in turned["live"]["accuracy"]
    path = Path(options[0])
    path.write_text(f"{path.read_text()}\n[references]\nlive = 'live'\ntimm-kd = 'live'\n")
    with pytest.raises(UsageError, match="'timm-kd' of references"):
        distillation.main([*options, "--summary"])
    path.write_text(path.read_text().replace("timm-kd = 'live'", "contest = 'live'"))
    assert distillation.main([*options, "--summary"]) == 0
    assert "(minus" in capsys.readouterr().out
    arms = read_json(tmp_path / "out" / "tiny.json", format="edgedistill-distillation-benchmark")["arms"]
    assert "minus_reference" not in arms["live"]["accuracy"]
    contest = [record["arms"][arm]["accuracy"]["mean"] for arm in ("contest", "live")]
    assert arms["contest"]["accuracy"]["minus_reference"] == pytest.approx(contest[0] - contest[1])
    assert arms["timm-kd"] == record["arms"]["timm-kd"]
    with pytest.raises(UsageError, match="of --summary"):
        distillation.main([*options, "--reference", "live"])


def test_two_protocols_are_compared_arm_by_arm_on_the_same_test_images(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distillation, "run_piece", fake_piece)
    path, out = write_protocol(tmp_path), tmp_path / "out"
    options = [str(path), "--runs", str(tmp_path / "runs"), "--out", str(out)]
    assert distillation.main([*options, "--minutes", "5"]) == 0
    other = tmp_path / "older.toml"
    other.write_text(path.read_text())
    shutil.copytree(out / "tiny", out / "older")
    shutil.copy(out / "tiny.csv", out / "older.csv")
    for seed in (0, 1):
        shutil.copy(out / "tiny" / f"seed-{seed}" / "contest.npy", out / "older" / f"seed-{seed}" / "live.npy")
    assert distillation.main([*options, "--summary", "--against", str(other)]) == 0
    assert "live" in capsys.readouterr().out
    record = read_json(out / "tiny-minus-older.json", format="edgedistill-distillation-benchmark")
    live, contest = record["arms"]["live"]["accuracy"], record["arms"]["contest"]["accuracy"]
    assert live["minus_reference"] == pytest.approx(live["mean"] - contest["mean"])
    assert live["paired_seeds"] == 2
    assert contest["minus_reference"] == 0
    with pytest.raises(UsageError, match="--against is of --summary"):
        distillation.main([*options, "--against", str(other)])
    # Against one arm of the other: an arm on hard labels, say, that both would train alike.
    assert distillation.main([*options, "--summary", "--against", str(other), "--reference", "hard-labels"]) == 0
    assert "minus older hard-labels" in " ".join(capsys.readouterr().out.split())
    record = read_json(out / "tiny-minus-older-hard-labels.json", format="edgedistill-distillation-benchmark")
    assert record["reference"] == "older hard-labels"
    live, hard = (record["arms"][name]["accuracy"] for name in ("live", "hard-labels"))
    assert live["minus_reference"] == pytest.approx(live["mean"] - hard["mean"])
    assert hard["minus_reference"] == 0
    labels = read_array(out / "older" / "seed-1" / "test_labels.npy")
    write_array(out / "older" / "seed-1" / "test_labels.npy", np.roll(labels, 1))
    with pytest.raises(UsageError, match="tiny and older: judged on different test images"):
        distillation.main([*options, "--summary", "--against", str(other)])
    (out / "older.csv").unlink()
    with pytest.raises(UsageError, match="no arm was trained with one seed in both"):
        distillation.main([*options, "--summary", "--against", str(other)])
    with pytest.raises(UsageError, match=r"nothing: not in .*older\.toml"):
        distillation.main([*options, "--summary", "--against", str(other), "--reference", "nothing"])


def test_only_the_arms_that_are_asked_for_are_trained(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(distillation, "run_piece", lambda *args: ran.append(args[0]) or fake_piece(*args))
    options = [str(write_protocol(tmp_path)), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]

    def trained(arms):
        ran.clear()
        assert distillation.main([*options, "--seeds", "0", "--arms", arms]) == 0
        return [Path(command[command.index("--out") + 1]).name for command in ran]

    assert trained("live") == ["teachers", "live"]
    assert trained("timm-kd") == ["peer-teacher", "timm-kd"]


def test_protocols_that_cannot_be_run_are_refused(tmp_path):
    path = write_protocol(tmp_path)
    text = path.read_text()
    for wrong, message in (
        (text.replace('reference = "hard-labels"', 'reference = "soft"'), "'soft' is not one of its arms"),
        (text.replace('teachers_with = "contest"', 'teachers_with = "hard-labels"'), "trains no teachers"),
        (text.replace("seeds = [0, 1]", "sedes = [0]"), "sedes unknown; expected arms"),
        (text.replace("seeds = [0, 1]\n", ""), "'seeds'; see benchmarks/protocols"),
        (text.replace("peer_teacher", "# peer_teacher"), "peers need a peer_teacher"),
        (f"{text}\n[references]\nlive-half = 'live'", "'live-half' of references is not one of its arms"),
        (f"{text}\n[references]\nlive = 'hard'", "'hard' of references is not one of its arms"),
        (f"{text}\n[processes]\nlive-half = 2", "processes are a number for an arm"),
        (f"{text}\n[processes]\nlive = 0", "processes are a number for an arm"),
        ("= 3", "not TOML"),
    ):
        path.write_text(wrong)
        with pytest.raises(UsageError, match=message):
            distillation.read_protocol(path)
    with pytest.raises(UsageError, match="cannot be read"):
        distillation.read_protocol(tmp_path / "none.toml")


def test_intervals_hold_the_truth_over_seeds_and_images():
    """20 experiments with a true difference of 10 points: the 95% interval holds it in most, and zero in none."""
    held = 0
    for trial in range(20):
        rng = generator(trial, "trial")
        labels = [rng.integers(0, 2, 300) for _ in range(5)]
        a = [np.where(rng.random(300) < 0.8, truth, 1 - truth) for truth in labels]
        b = [np.where(rng.random(300) < 0.7, truth, 1 - truth) for truth in labels]
        found = hierarchical_difference("accuracy", a, b, labels, resamples=200, seed=trial)
        assert found.ci95[0] > 0
        held += found.ci95[0] <= 0.1 <= found.ci95[1]
    assert held >= 17
    same = hierarchical_difference("macro_f1", a, a, labels, resamples=20)
    assert (same.difference, same.ci95) == (0.0, (0.0, 0.0))
    with pytest.raises(DataError, match="of one length"):
        hierarchical_difference("accuracy", a[:2], b, labels)


def test_one_test_set_is_drawn_once_for_all_seeds():
    """The same images in every seed: five seeds of one and the same network tell no more than one."""
    rng = generator(0)
    labels = [rng.integers(0, 2, 100)] * 5
    a, b = [labels[0]] * 5, [np.where(rng.random(100) < 0.8, labels[0], 1 - labels[0])] * 5
    wide = hierarchical_difference("accuracy", a, b, labels, resamples=400).ci95
    single = hierarchical_difference("accuracy", a[:1], b[:1], labels[:1], resamples=400).ci95
    assert wide[1] - wide[0] == pytest.approx(single[1] - single[0], rel=0.2)


def make_photos(root):
    for number in range(60):
        pixels = generator(0, number).integers(0, 120, (40, 40, 3), dtype=np.uint8)
        pixels[:, :, number % 2] += 100
        folder = root / ("a", "b")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{number:03d}.png"), pixels)


@pytest.mark.slow
def test_a_tiny_protocol_runs_with_its_peer(tmp_path, monkeypatch):
    make_photos(tmp_path / "photos")
    path = write_protocol(tmp_path, data=str(tmp_path / "photos"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = [str(path), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--seeds", "0"]
    assert distillation.main([*options, "--minutes", "8"]) == 0
    record = read_json(tmp_path / "out" / "tiny.json", format="edgedistill-distillation-benchmark")
    assert set(record["arms"]) == {"contest", "teachers", "hard-labels", "live", "timm-kd"}
    assert all(0 <= values["accuracy"]["mean"] <= 1 for values in record["arms"].values())


@pytest.mark.parametrize("mixing", [["--cutmix", 0], ["--cutmix", 1, "--mixup-prob", 0.5]])
def test_the_peer_writes_what_an_evaluation_holds(mixing, tmp_path, dataset_of):
    """timm's task in this process, on a manifest and a teacher of ours."""
    from edgedistill.benchmarks import peer_timm_distillation
    from edgedistill.data.manifest import write_dataset
    from edgedistill.training.checkpoints import write_model
    from edgedistill.training.models import create_model, input_spec_for, model_kwargs_for

    make_photos(tmp_path / "photos")
    paths = sorted((tmp_path / "photos").rglob("*.png"))
    numbers = np.arange(len(paths))
    dataset = dataset_of(
        paths,
        np.array([int(path.parent.name == "b") for path in paths]),
        splits=np.where(numbers % 3 == 0, "test", "train"),
        folds=np.where(numbers % 3 == 0, -1, numbers % 3 - 1),
        class_names=("a", "b"),
    )
    write_dataset(dataset, tmp_path / "dataset.csv")
    network = {"class_count": 2, "image_size": 32, "drop_rate": 0.0, "drop_path_rate": 0.0}
    write_model(
        tmp_path / "teacher.pt",
        create_model("test_efficientnet", pretrained=None, **network),
        architecture="test_efficientnet",
        model_kwargs=model_kwargs_for("test_efficientnet", **network),
        classes=("a", "b"),
        input_spec=input_spec_for("test_efficientnet", 32),
        dataset_hash=dataset.hash,
        settings={},
    )
    files = ["--dataset", tmp_path / "dataset.csv", "--teacher", tmp_path / "teacher.pt", "--out", tmp_path / "peer"]
    sizes = ["--model", "test_efficientnet", "--size", 32, "--epochs", 2, "--batch-size", 8, "--workers", 0, *mixing]
    assert peer_timm_distillation.main([str(part) for part in [*files, *sizes]]) == 0
    folder = tmp_path / "peer"
    evaluation = read_json(folder / "evaluation" / "evaluation.json", format="edgedistill-evaluation")
    probabilities = read_array(folder / "evaluation" / "student.probs.npy")
    labels = read_array(folder / "evaluation" / "test_labels.npy")
    assert probabilities.shape == (20, 2) and labels.tolist() == dataset.labels[dataset.rows("test")].tolist()
    assert evaluation["models"]["student"]["accuracy"] == pytest.approx((probabilities.argmax(1) == labels).mean())
    lines = (folder / "student" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    with pytest.raises(SystemExit):
        peer_timm_distillation.main([*map(str, files), "--batch-size", "7"])
