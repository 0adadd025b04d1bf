"""dataset.csv: what is written is what is read, whole or not at all, and a line that is wrong is named."""

import csv
import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest

from edgedistill.benchmarks import manifest_scale
from edgedistill.data.manifest import COLUMNS, Dataset, hash_files, read_dataset, write_dataset
from edgedistill.errors import ArtifactError, DataError

FIELDS = ("ids", "paths", "sha256", "labels", "groups", "splits", "folds")


@pytest.fixture
def dataset():
    names = ["b/1.png", "a/ü 2.png", 'c/"quoted", with comma.png', "a/new\nline.png", "a/5.png", "b/6.png"]
    return Dataset(
        ids=np.array(names),
        paths=np.array([f"/photos/{name}" for name in names]),
        sha256=np.array([hashlib.sha256(name.encode()).hexdigest() for name in names]),
        labels=np.array([1, 0, 2, 0, 0, 1]),
        groups=np.array(["", "anna", "anna", "", "", ""]),
        splits=np.array(["train", "val", "val", "test", "train", "train"]),
        folds=np.array([0, -1, -1, -1, 1, 1]),
        class_names=("A", "b", "ä"),
    )


@pytest.fixture
def rows(dataset, tmp_path):
    """rows(change): a manifest whose rows, header first, were changed by a function."""
    path = tmp_path / "dataset.csv"
    write_dataset(dataset, path)

    def changed(change) -> Path:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
        change(lines)
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(lines)
        return path

    return changed


def test_everything_survives_and_the_hash_with_it(dataset, tmp_path):
    write_dataset(dataset, tmp_path / "dataset.csv")
    again = read_dataset(tmp_path / "dataset.csv")
    for name in FIELDS:
        assert getattr(again, name).tolist() == getattr(dataset, name).tolist(), name
        assert getattr(again, name).dtype.kind == getattr(dataset, name).dtype.kind
    assert again.class_names == ("A", "b", "ä")
    assert again.hash == dataset.hash
    assert (again.fold_count, len(again), again.rows("train").tolist()) == (2, 6, [0, 4, 5])
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.csv"]


def test_the_hash_ignores_order_and_splits_and_sees_every_id_file_and_label(dataset):
    order = np.array([3, 1, 5, 0, 4, 2])
    shuffled = Dataset(*(getattr(dataset, name)[order] for name in FIELDS), dataset.class_names)
    assert shuffled.hash == dataset.hash
    assert dataclasses.replace(dataset, folds=np.array([1, -1, -1, -1, 0, 0])).hash == dataset.hash
    for name, value in (("ids", "x"), ("sha256", "0" * 64), ("labels", 2)):
        column = getattr(dataset, name).copy()
        column[0] = value
        assert dataclasses.replace(dataset, **{name: column}).hash != dataset.hash
    lines = sorted(
        f"{id}\0{sha.decode()}\0{dataset.class_names[label]}\n"
        for id, sha, label in zip(dataset.ids, dataset.sha256, dataset.labels, strict=True)
    )
    assert dataset.hash == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_class_names_are_sorted_by_code_point_whatever_came_first(rows):
    def rename(lines):
        for line in lines[1:]:
            line[3] = {"A": "zebra", "b": "Zebra", "ä": "10"}[line[3]]

    again = read_dataset(rows(rename))
    assert again.class_names == ("10", "Zebra", "zebra")
    assert again.labels.tolist() == [1, 2, 0, 2, 2, 1]


def edit(line: int, column: str, value: str):
    return lambda lines: lines[line].__setitem__(COLUMNS.index(column), value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(0, "label", "class"), "line 1: columns"),
        (edit(1, "split", "training"), "line 2: split 'training'"),
        (edit(1, "fold", "-1"), "line 2: fold '-1' in split train"),
        (edit(1, "fold", "x"), "line 2: fold 'x'"),
        (edit(1, "fold", "99999999999"), "line 2: fold '99999999999'"),
        (edit(2, "fold", "0"), "line 3: fold '0' in split val"),
        (edit(4, "fold", "2"), "line 7: fold '2' in split test"),  # its name and path have a line break each
        (edit(1, "fold", "7"), "fold 0 of 0..7 has no images"),
        (edit(2, "label", ""), "line 3: the label is empty"),
        (edit(2, "id", ""), "line 3: the id is empty"),
        (edit(2, "sha256", "g" * 64), "line 3: sha256"),
        (edit(2, "sha256", "0" * 63), "line 3: sha256"),
        (edit(2, "id", "b/1.png"), "id 'b/1.png' stands twice (rows 2 and 3"),
        (lambda lines: lines[3].append("x"), "line 4: 8 columns, expected 7"),
        (lambda lines: lines.__delitem__(slice(1, None)), "no images"),
        (lambda lines: lines.clear(), "line 1: columns ''"),
    ],
)
def test_a_wrong_line_is_named(rows, change, message):
    path = rows(change)
    with pytest.raises(ArtifactError) as error:
        read_dataset(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_a_file_that_is_no_text_or_not_there_is_named(tmp_path):
    path = tmp_path / "dataset.csv"
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_dataset(path)
    path.write_bytes(b"id,path\xff")
    with pytest.raises(ArtifactError, match="not a UTF-8 CSV"):
        read_dataset(path)


def test_images_that_moved_are_found_by_id_under_the_data_root(dataset, tmp_path):
    root = tmp_path / "moved"
    for id in dataset.ids:
        (root / id).parent.mkdir(parents=True, exist_ok=True)
        (root / id).write_bytes(b"x")
    stays = tmp_path / "stays.png"
    stays.write_bytes(b"x")
    paths = dataset.paths.copy().astype("U300")
    paths[0] = str(stays)
    write_dataset(dataclasses.replace(dataset, paths=paths), tmp_path / "dataset.csv")
    again = read_dataset(tmp_path / "dataset.csv", root)
    assert again.paths[0] == str(stays)
    assert again.paths[1:].tolist() == [str(root / id) for id in dataset.ids[1:]]
    assert again.hash == dataset.hash
    (root / "a/5.png").unlink()
    with pytest.raises(ArtifactError, match=r"1 of 6 images .* first 'a/5.png'"):
        read_dataset(tmp_path / "dataset.csv", root)


def test_a_failed_write_leaves_the_old_manifest(dataset, tmp_path):
    path = tmp_path / "dataset.csv"
    write_dataset(dataset, path)
    before = path.read_bytes()
    broken = dataclasses.replace(dataset, ids=np.array(["\ud800"] + dataset.ids[1:].tolist()))
    with pytest.raises(UnicodeEncodeError):
        write_dataset(broken, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["dataset.csv"]


def test_columns_of_unlike_length_and_labels_without_a_name_are_refused(dataset):
    with pytest.raises(ArtifactError, match="groups has shape"):
        dataclasses.replace(dataset, groups=dataset.groups[:3])
    with pytest.raises(ArtifactError, match=r"labels outside 0\.\.2"):
        dataclasses.replace(dataset, labels=dataset.labels + 1)


def test_files_are_hashed_in_order_and_a_missing_one_is_named(tmp_path):
    paths = [tmp_path / f"{number}.bin" for number in range(150)]
    for number, path in enumerate(paths):
        path.write_bytes(b"x" * number)
    expected = [hashlib.sha256(b"x" * number).hexdigest().encode() for number in range(150)]
    assert hash_files(paths).tolist() == expected
    paths[77].unlink()
    with pytest.raises(DataError, match=r"77\.bin: cannot be read"):
        hash_files(paths)


def test_the_scale_benchmark_measures_every_step(tmp_path):
    result = manifest_scale.measure(3000, tmp_path)
    assert list(result["seconds"]) == ["read", "split and fold, ungrouped", "split and fold, grouped", "hash", "write"]
    assert result["peak_rss_bytes"] > 1e6
    assert read_dataset(tmp_path / "dataset.csv").fold_count == 5
