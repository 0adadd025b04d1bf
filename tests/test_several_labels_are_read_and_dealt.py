"""CSV files with attributes, several labels per image and values: read, checked, dealt to folds, kept in dataset.csv."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edgedistill.data.checks import check_data
from edgedistill.data.deal import SplitSettings
from edgedistill.data.folds import freeze_dataset
from edgedistill.data.label_columns import LabelColumns
from edgedistill.data.manifest import ALWAYS_TRAINED, Dataset, read_dataset, write_dataset
from edgedistill.data.sources import Source, open_source
from edgedistill.errors import ArtifactError, DataError, UsageError
from edgedistill.tasks import Task

Row = dict[str, Any]
ATTRIBUTES = LabelColumns(attributes=("shape", "color"), regression=("size",))
MANY = LabelColumns(multi_label=True)


def write_csv(root: Path, rows: list[Row]) -> Path:
    """labels.csv over noise images, all different, one for each row that names none."""
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number, row in enumerate(rows):
        if "path" not in row:
            row["path"] = f"{number:03d}.png"
            cv2.imwrite(str(root / row["path"]), rng.integers(0, 255, (12, 12, 3), np.uint8))
    path = root / "labels.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def attribute_rows(count: int = 60) -> list[Row]:
    """Two attributes; 'ring' is rare and always green; groups of three images."""
    rows: list[Row] = []
    for number in range(count):
        shape = "ring" if number % 6 == 5 else ("bar", "disc")[number % 2]
        color = "green" if shape == "ring" else ("red", "green", "blue")[(number // 2) % 3]
        rows.append({"shape": shape, "color": color, "size": f"{10 + number % 7}", "person": "ignored"})
    return rows


def frozen(path: Path, labels: LabelColumns, *, folds: int = 3, small: Any = "refuse") -> Dataset:
    split = SplitSettings(folds=folds, near_duplicates=False, test_fraction=0.2, small_classes=small)
    return freeze_dataset(open_source(str(path), labels=labels), split)


def test_small_classes_of_attributes_are_always_trained_on_or_dropped(tmp_path: Path) -> None:
    rows = attribute_rows()
    rows[7] = rows[7] | {"color": "violet"}
    path = write_csv(tmp_path, rows)
    with pytest.raises(DataError, match=r"class 'violet' of 'color': 1 images, .* --small-classes train-only"):
        frozen(path, ATTRIBUTES)
    kept = frozen(path, ATTRIBUTES, small="train-only")
    (row,) = np.flatnonzero(kept.folds == ALWAYS_TRAINED)
    assert kept.ids[row] == "007.png" and kept.splits[row] == "train"
    assert kept.task is not None and kept.task.heads[1].classes == ("blue", "green", "red", "violet")
    less = frozen(path, ATTRIBUTES, small="drop")
    assert less.task is not None and less.task.heads[1].classes == ("blue", "green", "red")
    assert len(less) == 59 and less.values is not None and kept.values is not None
    together = np.isin(kept.ids, less.ids)
    np.testing.assert_array_equal(less.values, kept.values[together])
    assert not any("violet" in name for name in less.class_names)


def test_small_labels_of_many_are_dropped_with_their_column(tmp_path: Path) -> None:
    rows: list[Row] = [{"label": ("cat", "dog", "cat|dog", "|")[number % 4]} for number in range(60)]
    rows[5] = {"label": "bird|cat"}
    dataset = frozen(write_csv(tmp_path, rows), MANY, small="drop")
    assert dataset.task is not None and dataset.values is not None
    assert dataset.task.heads[0].classes == ("cat", "dog") and dataset.values.shape == (59, 2)
    (apart,) = np.flatnonzero(frozen(tmp_path / "labels.csv", MANY, small="train-only").folds == ALWAYS_TRAINED)
    assert apart == 5


def test_attributes_reach_every_fold_and_the_manifest_keeps_them(tmp_path: Path) -> None:
    dataset = frozen(write_csv(tmp_path, attribute_rows()), ATTRIBUTES)
    task = dataset.task
    assert task is not None and dataset.values is not None
    assert [(head.name, head.kind) for head in task.heads] == [
        ("shape", "softmax"), ("color", "softmax"), ("size", "regression"),
    ]  # fmt: skip
    assert dataset.outputs == (
        "shape=bar",
        "shape=disc",
        "shape=ring",
        "color=blue",
        "color=green",
        "color=red",
        "size",
    )
    marks = task.marks(dataset.values)
    for part in (*(dataset.folds == fold for fold in range(3)), dataset.splits == "val", dataset.splits == "test"):
        assert marks[part].any(axis=0).all()
    shares = [marks[dataset.folds == fold].sum(axis=0) for fold in range(3)]
    assert np.ptp(shares, axis=0).max() <= 2
    train = dataset.values[dataset.splits == "train", 2].astype(np.float64)
    assert task.heads[2].mean == train.mean() and task.heads[2].std == train.std()
    write_dataset(dataset, tmp_path / "dataset.csv")
    again = read_dataset(tmp_path / "dataset.csv")
    assert again.hash == dataset.hash and again.task == task
    np.testing.assert_array_equal(again.values, dataset.values)
    assert again.class_names == dataset.class_names and "ring, green" in again.class_names


def test_groups_stay_whole_with_several_labels(tmp_path: Path) -> None:
    rows = attribute_rows(90)
    for number, row in enumerate(rows):
        row["group"] = f"person {number // 3}"
    dataset = frozen(write_csv(tmp_path, rows), ATTRIBUTES)
    places = [f"{split}{fold}" for split, fold in zip(dataset.splits, dataset.folds, strict=True)]
    for group in set(dataset.groups.tolist()):
        assert len({place for place, name in zip(places, dataset.groups, strict=True) if name == group}) == 1


def test_labels_with_bars_and_one_hot_columns_say_the_same(tmp_path: Path) -> None:
    sets = [("cat",), ("dog",), ("cat", "dog"), ()] * 12
    bars = write_csv(tmp_path / "a", [{"label": "|".join(labels) or "|"} for labels in sets])
    hot = [{name: str(int(name in labels)) for name in ("cat", "dog")} for labels in sets]
    one = open_source(str(bars), labels=MANY)
    other = open_source(str(write_csv(tmp_path / "b", hot)), labels=LabelColumns(one_hot=("cat", "dog")))
    assert one.task == other.task == Task.from_dict(one.task.to_dict() if one.task else None)
    assert one.task is not None and one.task.outputs == ("cat", "dog") and one.task.is_multi_label
    np.testing.assert_array_equal(one.values, other.values)
    assert one.class_names == ("cat", "cat|dog", "dog", "none")
    dataset = frozen(bars, MANY)
    assert dataset.values is not None
    for fold in range(3):
        assert abs(dataset.values[dataset.folds == fold].mean() - 0.5) < 0.1


def test_missing_labels_are_refused_or_ignored(tmp_path: Path) -> None:
    rows = attribute_rows()
    rows[3]["color"] = rows[9]["color"] = ""
    path = write_csv(tmp_path, rows)
    with pytest.raises(
        DataError, match=r"column 'color': 2 of 60 rows \(lines 5, 11\): no value; .*--missing-labels ignore"
    ):
        open_source(str(path), labels=ATTRIBUTES)
    ignore = LabelColumns(attributes=("shape", "color"), missing="ignore")
    dataset = frozen(path, ignore)
    assert dataset.values is not None and np.isnan(dataset.values).sum() == 2
    write_dataset(dataset, tmp_path / "dataset.csv")
    again = read_dataset(tmp_path / "dataset.csv")
    np.testing.assert_array_equal(again.values, dataset.values)
    report = check_data(open_source(str(path), labels=ignore), folds=3, near_duplicates=False)
    assert report.heads is not None and report.heads["color"]["missing"] == 2 and report.heads["shape"]["ring"] == 10
    assert [finding.kind for finding in report.warnings].count("missing labels") == 1 and not report.errors


@pytest.mark.parametrize("written", ["nan", "NaN", "<NA>"])
def test_what_pandas_writes_for_a_missing_value_is_no_class(tmp_path: Path, written: str) -> None:
    rows = attribute_rows()
    rows[3]["color"] = rows[9]["size"] = written
    path = write_csv(tmp_path, rows)
    with pytest.raises(DataError, match=r"column 'color': 1 of 60 rows \(lines 5\): no value"):
        open_source(str(path), labels=ATTRIBUTES)
    source = open_source(str(path), labels=dataclasses.replace(ATTRIBUTES, missing="ignore"))
    assert source.task is not None and source.task.heads[1].classes == ("blue", "green", "red")
    assert source.values is not None and np.isnan(source.values).sum() == 2


def test_labels_that_another_sign_separates_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["cat, dog", "cat", "dog", "|"] * 5
    source = open_source(str(write_csv(tmp_path, [{"label": label} for label in sets])), labels=MANY)
    assert source.task is not None and source.task.outputs == ("cat", "cat, dog", "dog")
    assert "'cat, dog' counts as one label; several are separated by '|'" in " ".join(capsys.readouterr().err.split())


def with_copy(root: Path, rows: list[Row], row: int, **changes: str) -> Path:
    """labels.csv of ``rows`` and a byte-equal copy of one of them that says something else."""
    write_csv(root, rows)
    (root / "copy.png").write_bytes((root / rows[row]["path"]).read_bytes())
    return write_csv(root, [*rows, rows[row] | {"path": "copy.png"} | changes])


@pytest.mark.parametrize(("changes", "says"), [
    ({"size": "99"}, "size 10 and size 99 hold the same image"),
    ({"color": "blue"}, "color red and color blue hold the same image"),
])  # fmt: skip
def test_copies_contradict_one_another_in_any_label(tmp_path: Path, changes: Row, says: str) -> None:
    source = open_source(str(with_copy(tmp_path, attribute_rows(), 0, **changes)), labels=ATTRIBUTES)
    (finding,) = check_data(source, folds=3, near_duplicates=False).errors
    assert finding.kind == "conflicting labels" and says in finding.message
    assert finding.paths == ("000.png", "copy.png")
    with pytest.raises(
        DataError, match=r"000\.png \(\w+ \w+\) and copy\.png \(\w+ \w+\): the same bytes with different labels"
    ):
        freeze_dataset(source, SplitSettings(folds=3, near_duplicates=False))


def test_a_missing_label_contradicts_no_copy(tmp_path: Path) -> None:
    ignore = LabelColumns(attributes=("shape", "color"), missing="ignore")
    path = with_copy(tmp_path, attribute_rows(), 0, color="")
    report = check_data(open_source(str(path), labels=ignore), folds=3)
    assert not report.errors and [finding.paths for finding in report.warnings if finding.kind == "copies"]
    dataset = frozen(path, ignore)
    assert dataset.groups[dataset.ids == "copy.png"] == dataset.groups[dataset.ids == "000.png"] != ""


def test_copies_around_one_without_a_label_contradict_all_the_same(tmp_path: Path) -> None:
    rows = attribute_rows()
    path = with_copy(tmp_path, rows, 0, color="")
    (tmp_path / "second.png").write_bytes((tmp_path / "copy.png").read_bytes())
    path = write_csv(
        tmp_path,
        [*rows, rows[0] | {"path": "copy.png", "color": ""}, rows[0] | {"path": "second.png", "color": "blue"}],
    )
    ignore = LabelColumns(attributes=("shape", "color"), missing="ignore")
    (finding,) = check_data(open_source(str(path), labels=ignore), folds=3, near_duplicates=False).errors
    assert finding.paths == ("000.png", "copy.png", "second.png")


def test_near_duplicates_with_a_label_missing_are_not_doubtful(tmp_path: Path) -> None:
    rows = attribute_rows()
    path = write_csv(tmp_path, [*rows, rows[0] | {"path": "near.png", "color": ""}])
    smooth = cv2.resize(np.random.default_rng(0).integers(0, 255, (6, 6, 3), np.uint8), (64, 64))
    cv2.imwrite(str(tmp_path / rows[0]["path"]), smooth)
    cv2.imwrite(str(tmp_path / "near.png"), cv2.resize(smooth, (90, 90)))
    ignore = LabelColumns(attributes=("shape", "color"), missing="ignore")
    kinds = [finding.kind for finding in check_data(open_source(str(path), labels=ignore), folds=3).findings]
    assert "near-duplicates" in kinds and "doubtful labels" not in kinds


def test_a_person_of_many_images_leaves_every_fold_its_classes(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"label": ("cat", "dog", "cat|dog")[number % 3], "group": str(max(0, number - 60))} for number in range(90)
    ]
    dataset = frozen(write_csv(tmp_path, rows), MANY, folds=5)
    assert dataset.values is not None
    for part in (dataset.splits == "test", dataset.splits == "val", *(dataset.folds == fold for fold in range(5))):
        assert dataset.values[part].any(axis=0).all()
    assert (dataset.splits == "train").sum() > 60


BAD: tuple[tuple[dict[int, Row], LabelColumns, str], ...] = (
    ({}, LabelColumns(attributes=("shape", "mask")), r"missing 'mask'; it has 'shape', 'color', 'size'"),
    ({n: {"color": "red"} for n in range(60)}, ATTRIBUTES, r"column 'color' has the single value 'red'"),
    ({n: {"size": "4"} for n in range(60)}, ATTRIBUTES, r"'size' has the single value 4"),
    ({3: {"color": "re\u200cd"}}, ATTRIBUTES, r"class 'color=re\\u200cd': U\+200C in it, expected .* rename it"),
    ({7: {"size": "tall"}}, ATTRIBUTES, r"column 'size': 1 of 60 rows \(lines 9\): not a finite number"),
    ({n: {"size": "1.5" if n == 2 else str(n % 2)} for n in range(60)}, LabelColumns(one_hot=("size",)),
     r"column 'size': 1 of 60 rows \(lines 4\): outside 0 to 1"),
    ({n: {"size": "1"} for n in range(60)}, LabelColumns(one_hot=("size",)), r"every image to which it applies"),
)  # fmt: skip


@pytest.mark.parametrize(("changes", "labels", "says"), BAD)
def test_bad_label_columns_are_named(tmp_path: Path, changes: dict[int, Row], labels: LabelColumns, says: str) -> None:
    rows = attribute_rows()
    for number, change in changes.items():
        rows[number] |= change
    with pytest.raises(DataError, match=says):
        open_source(str(write_csv(tmp_path, rows)), labels=labels)


def test_a_class_that_cannot_reach_every_fold_is_refused(tmp_path: Path) -> None:
    rows = attribute_rows()
    for number in (5, 11, 17):
        rows[number]["color"] = "gold"
    source = open_source(str(write_csv(tmp_path, rows)), labels=ATTRIBUTES)
    with pytest.raises(DataError, match=r"class 'gold' of 'color': 3 images, expected at least 5 for 3 folds"):
        freeze_dataset(source, SplitSettings(folds=3, near_duplicates=False))
    report = check_data(source, folds=3, near_duplicates=False)
    assert any("gold" in finding.message for finding in report.errors)


def test_a_class_of_one_fold_only_is_refused_where_groups_force_it(tmp_path: Path) -> None:
    rows = attribute_rows()
    for row in rows:
        row["group"] = "one person" if row["shape"] == "ring" else ""
    with pytest.raises(DataError, match=r"class 'ring' of 'shape': 10 images in 1 groups .*, expected at least 5"):
        frozen(write_csv(tmp_path, rows), ATTRIBUTES)


def test_a_test_class_that_training_lacks_is_refused(tmp_path: Path) -> None:
    rows = attribute_rows()
    for number, row in enumerate(rows):
        row["split"] = "test" if row["shape"] == "ring" else ("val" if number % 10 == 0 else "train")
    with pytest.raises(DataError, match="class 'ring' of 'shape' is in test and not in train"):
        open_source(str(write_csv(tmp_path, rows)), labels=ATTRIBUTES)


def test_options_that_contradict_are_refused(photos: Path) -> None:
    for options in (
        {"attributes": ("a",), "multi_label": True}, {"one_hot": ("a", "a")}, {"attributes": ("path",)},
        {"missing": "ignore"}, {"regression": ("age",), "regression_weight": 0.0}, {"attributes": ("a",), "missing": "x"},
        {"attributes": ("a",), "regression_weight": 0.5},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            LabelColumns(**options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="from a CSV file only"):
        open_source(str(photos), labels=MANY)


def test_a_manifest_with_foreign_label_columns_is_refused(tmp_path: Path) -> None:
    dataset = frozen(write_csv(tmp_path, attribute_rows()), ATTRIBUTES)
    path = tmp_path / "dataset.csv"
    write_dataset(dataset, path)
    text = path.read_text()
    for old, new, says in (
        ("softmax:shape", "argmax:shape", "column 'argmax:shape' is none that edgedistill writes"),
        ("regression@0.1:size", "regression@-1:size", "weight"),
        ("softmax:color", "softmax:shape", "expected 'id,path"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(ArtifactError, match=says):
            read_dataset(path)


def test_a_single_label_source_has_no_task(photos: Path) -> None:
    source = open_source(str(photos))
    assert isinstance(source, Source) and source.task is None
    dataset = freeze_dataset(source, SplitSettings(folds=2, near_duplicates=False))
    assert dataset.task is None and dataset.values is None and dataset.outputs == dataset.class_names
    assert dataset.sampling_labels is dataset.labels
