"""Soft labels in every store: what is read is what was written, the loss is the measured one, memory stays bounded."""

import json
import subprocess
import sys

import numpy as np
import pytest

from edgedistill.artifacts import read_array, read_json, write_array
from edgedistill.data.manifest import Dataset
from edgedistill.data.soft_label_store import open_store, parse_store, write_blocks, write_store
from edgedistill.errors import ArtifactError, UsageError
from edgedistill.teacher import TeacherSettings
from edgedistill.training.soft_labels import (
    FoldResult,
    ids_hash,
    open_soft_labels,
    read_soft_labels,
    write_soft_labels,
)

CLASSES = 12


def log_probs(count, seed=0, sharpness=3.0):
    logits = np.random.default_rng(seed).normal(size=(count, CLASSES)) * sharpness
    logits -= logits.max(axis=1, keepdims=True)
    return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)


def blocks_of(table, size=7):
    return (table[start : start + size] for start in range(0, len(table), size))


def write(folder, table, store):
    return write_store(folder, "label", blocks_of(table), shape=table.shape, kind=parse_store(store))


def opened(folder, entry, count):
    return open_store(folder, "label", entry, count=count, class_count=CLASSES)


def divergence(given, got):
    given, got = given.astype(np.float64), got.astype(np.float64)
    return (np.exp(given) * (given - got)).sum(axis=1)


@pytest.mark.parametrize("store", ["float32", "float16", "top-k:1", "top-k:4", "top-k:11"])
def test_what_is_read_is_what_was_written(tmp_path, store):
    table = log_probs(50)
    entry = write(tmp_path, table, store)
    labels = opened(tmp_path, json.loads(json.dumps(entry)), 50)
    everything = np.concatenate(list(labels.blocks(size=13)))
    assert everything.dtype == np.float32 and everything.shape == table.shape
    rows = np.array([49, 0, 7, 7])
    assert np.array_equal(labels.rows(rows), everything[rows])
    assert np.allclose(np.exp(everything.astype(np.float64)).sum(axis=1), 1, atol=1e-5)
    if store == "float32":
        assert np.array_equal(everything, table) and "loss" not in entry
        return
    measured = divergence(table, everything)
    assert entry["loss"]["kl_mean"] == pytest.approx(max(0, measured.mean()), rel=1e-3, abs=1e-6)
    assert entry["loss"]["kl_max"] == pytest.approx(measured.max(), rel=1e-3, abs=1e-6)
    assert entry["loss"]["top1_changed"] == (table.argmax(1) != everything.argmax(1)).sum() == 0


def test_top_k_keeps_the_first_and_shares_the_rest(tmp_path):
    table = log_probs(20)
    got = np.exp(opened(tmp_path, write(tmp_path, table, "top-k:3"), 20).rows(np.arange(20)))
    order = np.argsort(-table, axis=1)
    kept = np.take_along_axis(got, order[:, :3], axis=1)
    assert np.allclose(kept, np.take_along_axis(np.exp(table), order[:, :3], axis=1), atol=1e-6)
    rest = np.take_along_axis(got, order[:, 3:], axis=1)
    assert np.allclose(rest, (1 - kept.sum(axis=1, keepdims=True)) / 9, atol=1e-6)
    sharp = log_probs(5, sharpness=400.0)  # all mass on one class: the rest underflows, and stays finite
    assert np.isfinite(opened(tmp_path, write(tmp_path, sharp, "top-k:1"), 5).rows(np.arange(5))).all()


def test_a_smaller_k_loses_more_and_takes_less(tmp_path):
    table = log_probs(200)
    losses, sizes = [], []
    for store in ("top-k:1", "top-k:2", "top-k:4", "float16"):
        folder = tmp_path / store.replace(":", "-")
        losses.append(write(folder, table, store)["loss"]["kl_mean"])
        sizes.append(sum(path.stat().st_size for path in folder.iterdir()))
    assert losses == sorted(losses, reverse=True) and losses[0] > 10 * losses[2] > 0
    assert sizes[:3] == sorted(sizes[:3])
    write(tmp_path / "top-k-1", table, "float32")  # what belonged to the old store goes
    assert [path.name for path in (tmp_path / "top-k-1").iterdir()] == ["label.log_probs.npy"]


@pytest.mark.parametrize("text", ["float64", "top-k", "top-k:0", "top-k:-3", "top-k:99999", ""])
def test_other_stores_are_usage_errors(tmp_path, text):
    with pytest.raises(UsageError, match="expected float32, float16 or top-k:N"):
        TeacherSettings(soft_label_store=text)
    with pytest.raises(UsageError, match="the data set has 12 classes; expected a smaller number, or float16"):
        write(tmp_path, log_probs(3), "top-k:12")


def test_damaged_stores_are_named(tmp_path):
    table = log_probs(10)
    entry = write(tmp_path, table, "top-k:3")
    with pytest.raises(ArtifactError, match="store 'zip', expected float32"):
        opened(tmp_path, entry | {"store": "zip"}, 10)
    with pytest.raises(ArtifactError, match=r"label.log_probs.npy: float32 \(10, 3\), expected float32 \(11, 3\)"):
        opened(tmp_path, entry, 11).rows(np.arange(3))
    indices = np.load(tmp_path / "label.indices.npy")
    write_array(tmp_path / "label.indices.npy", np.full_like(indices, 12))
    with pytest.raises(ArtifactError, match=r"label.indices.npy: names classes beyond 12"):
        opened(tmp_path, entry, 10).rows(np.arange(3))
    write_array(tmp_path / "label.indices.npy", indices)
    (tmp_path / "label.rest.npy").unlink()
    with pytest.raises(ArtifactError, match=r"label.rest.npy: cannot be read"):
        opened(tmp_path, entry, 10).rows(np.arange(3))
    with pytest.raises(ArtifactError, match="9 soft labels, expected 10"):
        write_store(tmp_path / "short", "label", [table[:9]], shape=(10, CLASSES), kind=parse_store("float16"))
    with pytest.raises(ArtifactError, match="at row 0, expected"):
        write_store(tmp_path / "long", "label", [table], shape=(9, CLASSES), kind=parse_store("float16"))
    assert not list((tmp_path / "short").iterdir()) and not list((tmp_path / "long").iterdir())


def make_dataset(count=30):
    numbers = np.arange(count + 4)
    return Dataset(
        ids=np.array([f"im{n:03d}.png" for n in numbers])[::-1].copy(),
        paths=np.array([f"/nowhere/im{n:03d}.png" for n in numbers]),
        sha256=np.array([f"{n:064x}" for n in numbers]),
        labels=(numbers % CLASSES).astype(np.int32),
        groups=np.array([""] * len(numbers)),
        splits=np.where(numbers < count, "train", "test"),
        folds=np.where(numbers < count, numbers % 3, -1).astype(np.int16),
        class_names=tuple(f"c{n:02d}" for n in range(CLASSES)),
    )


@pytest.mark.parametrize("store", ["float32", "float16", "top-k:5"])
def test_labels_are_read_by_rows_as_whole(tmp_path, store, capsys):
    dataset, table = make_dataset(), log_probs(34)
    results = [
        FoldResult(
            fold=fold,
            ids=dataset.ids[dataset.folds == fold],
            log_probs=table[dataset.folds == fold],
            trained_on=ids_hash(dataset.ids[(dataset.splits == "train") & (dataset.folds != fold)]),
            epochs_planned=1,
            epochs_done=1,
            architecture="x",
            model_sha256="0" * 64,
        )
        for fold in range(3)
    ]
    folder = write_soft_labels(tmp_path, dataset, results, store=store)
    whole, labels = read_soft_labels(folder, dataset), open_soft_labels(folder, dataset)
    assert np.allclose(np.exp(whole[:30]), np.exp(table[:30]), atol=0.0 if store == "float32" else 0.05)
    assert np.isnan(whole[30:]).all()
    rows = np.array([33, 2, 29])
    assert np.array_equal(labels.rows(rows), whole[rows], equal_nan=True)
    seen = {int(row): block for rows, values in labels.blocks(size=8) for row, block in zip(rows, values, strict=True)}
    assert sorted(seen) == list(range(30)) and np.array_equal(seen[11], whole[11])
    head = read_json(folder / "meta.json", format="edgedistill-soft-labels")["heads"]["label"]
    assert ("loss" in head) == (store != "float32")
    assert ("nats lost on average" in capsys.readouterr().err) == (store != "float32")


@pytest.mark.parametrize("store", ["top-k:10", "float16"])
def test_the_benchmark_stays_within_its_memory(tmp_path, store):
    """Finishing is the proof: the process may not take more than its limit."""
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "edgedistill.benchmarks.soft_label_scale", "--rows", "20000", "--store", store]
    subprocess.run([*command, "--folder", tmp_path, "--out", out], check=True, capture_output=True, timeout=400)
    figures = read_json(out, format="edgedistill-soft-label-scale")
    assert figures["rows"] == 20_000
    assert figures["peak_rss_bytes"] < 400e6
    assert figures["disk_bytes"] < figures["float32_bytes"] * 0.51
    assert 0 < figures["loss"]["kl_mean"] < 0.5
    teachers = figures["teachers"]  # blocks of them in float64, however many images
    assert teachers["peak_rss_bytes"] - teachers["imported_rss_bytes"] < 500e6
    assert sum(teachers["weights"]) == pytest.approx(1) and teachers["log_loss"] > np.log(1000)


def test_an_array_is_written_block_by_block_or_not_at_all(tmp_path):
    table = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    path = tmp_path / "folder" / "table.npy"
    write_blocks(path, (table[start : start + 4] for start in (0, 4, 8)), shape=(10, 3))
    assert np.array_equal(read_array(path, mmap=True), table)
    before = path.read_bytes()
    for blocks, shape in (([table], (11, 3)), ([table, table], (10, 3)), ([table], (10, 4))):
        with pytest.raises(ArtifactError, match="expected"):
            write_blocks(path, blocks, shape=shape)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == ["table.npy"]
    write_blocks(path, [], shape=(0, 3))
    assert read_array(path).shape == (0, 3)


def test_a_head_of_any_name_stays_in_its_folder(tmp_path):
    """A column of a foreign CSV may be called so."""
    table = np.log(np.full((4, 3), 1 / 3, np.float32))
    for head in ("../../age", "height/width"):
        entry = write_store(tmp_path / "labels", head, [table], shape=table.shape, kind=parse_store("top-k:1"))
        assert (tmp_path / "labels" / entry["file"]).parent == tmp_path / "labels"
        store = open_store(tmp_path / "labels", head, entry, count=4, class_count=3)
        assert np.allclose(store.rows(np.arange(4)), table)
    assert [path.name for path in tmp_path.iterdir()] == ["labels"] and len(list((tmp_path / "labels").iterdir())) == 6
