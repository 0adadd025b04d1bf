"""Splits and folds: stratified, repeatable, and nothing of one group, copy or burst is ever on two sides."""

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgedistill.data import deal as dealing
from edgedistill.data import duplicates, folds
from edgedistill.data.checks import check_data
from edgedistill.data.deal import SplitSettings, Table, deal, deal_splits
from edgedistill.data.folds import freeze_dataset, group_codes, verify_folds
from edgedistill.data.manifest import ALWAYS_TRAINED, read_dataset, write_dataset
from edgedistill.data.sources import Item, Source, open_source
from edgedistill.errors import DataError, EdgedistillError, UsageError

NO_NEAR = SplitSettings(near_duplicates=False)


@pytest.fixture
def source(tmp_path):
    """source(counts, ...): a Source of tiny files, every one unlike the others."""

    def make(counts, *, group=lambda label, number: "", split=lambda label, number: "", same=lambda label, number: ""):
        items = []
        for label, count in counts.items():
            for number in range(count):
                path = tmp_path / label / f"{number:04d}.png"
                path.parent.mkdir(exist_ok=True)
                path.write_text(same(label, number) or f"{label} {number}")
                id = path.relative_to(tmp_path).as_posix()
                items.append(Item(id, path, label, group(label, number), split(label, number), ("x", "y")[number % 2]))
        return Source("tiny", tmp_path, tuple(sorted(items, key=lambda item: item.id)))

    return make


def table(classes, groups=None, strata=None, given=None) -> Table:
    count = len(classes)
    codes = group_codes(np.asarray(groups if groups is not None else [""] * count))
    return Table(
        np.asarray(classes),
        np.asarray(strata if strata is not None else np.zeros(count, np.int64)),
        codes,
        np.asarray(given if given is not None else np.zeros(count, np.int64)),
    )


def test_every_image_has_one_place_and_every_class_its_share(source):
    dataset = freeze_dataset(source({"a": 300, "b": 50, "c": 10}), NO_NEAR)
    assert {split: len(dataset.rows(split)) for split in ("train", "val", "test")} == {
        "train": 230,
        "val": 58,
        "test": 72,
    }
    for label, count in enumerate((300, 50, 10)):
        of_class = dataset.labels == label
        assert (of_class & (dataset.splits == "test")).sum() == pytest.approx(0.2 * count, abs=1)
        sizes = np.bincount(dataset.folds[of_class & (dataset.splits == "train")], minlength=5)
        assert sizes.max() - sizes.min() <= 1
        assert sizes.min() >= 1
    verify_folds(dataset)


def test_the_stratum_is_balanced_too(source):
    made = source({"a": 200, "b": 100})
    strata = np.array([item.stratum for item in made.items]) == "x"
    dataset = freeze_dataset(made, NO_NEAR)
    for split in ("train", "val", "test"):
        assert strata[dataset.rows(split)].mean() == pytest.approx(0.5, abs=0.03)
    for fold in range(5):
        assert strata[dataset.folds == fold].mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("count", "expected"), [(1000, 0.2), (1500, 0.2), (2000, 0.15), (3000, 0.1), (9000, 0.1)])
def test_val_is_a_tenth_or_300_images_but_no_more_than_a_fifth(count, expected):
    assert dealing.val_fraction(count, SplitSettings()) == expected
    assert dealing.val_fraction(count, SplitSettings(val_fraction=0.3)) == 0.3


def test_the_same_seed_repeats_and_another_does_not(source):
    made = source({"a": 60, "b": 60})
    first, again = freeze_dataset(made, NO_NEAR), freeze_dataset(made, NO_NEAR)
    other = freeze_dataset(made, SplitSettings(near_duplicates=False, seed=1))
    assert (first.folds == again.folds).all()
    assert (first.splits == again.splits).all()
    assert (first.splits != other.splits).any()
    assert first.hash == other.hash


def test_the_datas_own_splits_are_kept(source):
    split = lambda label, number: ("train", "train", "train", "val", "test")[number % 5]  # noqa: E731
    made = source({"a": 100, "b": 50}, split=split)
    dataset = freeze_dataset(made, NO_NEAR)
    assert dataset.splits.tolist() == [item.split for item in made.items]
    only_test = source({"a": 100, "b": 50}, split=lambda label, number: "test" if number % 5 == 0 else "")
    dataset = freeze_dataset(only_test, NO_NEAR)
    given = np.array([item.split == "test" for item in only_test.items])
    assert ((dataset.splits == "test") == given).all()
    assert len(dataset.rows("val")) == 24  # a fifth of the 120 images left


@pytest.mark.parametrize("limit", [0, 10_000], ids=["own deal", "scikit-learn"])
@pytest.mark.parametrize("size", [2, 7, 19])
def test_groups_never_part(source, monkeypatch, limit, size):
    monkeypatch.setattr(dealing, "MAX_SKLEARN_GROUPS", limit)
    groups = lambda label, number: f"person {number // size}" if number % 3 else ""  # noqa: E731 (across the classes)
    dataset = freeze_dataset(source({"a": 400, "b": 200, "c": 200}, group=groups), NO_NEAR)
    for name in set(dataset.groups.tolist()) - {""}:
        rows = dataset.groups == name
        assert len(set(zip(dataset.splits[rows].tolist(), dataset.folds[rows].tolist(), strict=True))) == 1
    assert len(dataset.rows("test")) == pytest.approx(160, abs=20)
    sizes = np.bincount(dataset.folds[dataset.folds >= 0])
    assert sizes.max() - sizes.min() <= 3 * size


def test_the_deal_is_as_good_with_many_groups_as_with_none():
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 20, 20_000)
    groups = [f"g{number // 5}" for number in range(20_000)]
    bins = deal(table(classes, groups), np.tile(np.bincount(classes) / 5, (5, 1)), rng)
    counts = np.bincount(bins.astype(np.int64) * 20 + classes, minlength=100).reshape(5, 20)
    assert np.abs(counts / np.bincount(classes) - 0.2).max() < 0.03
    assert all(len(set(bins[start : start + 5].tolist())) == 1 for start in range(0, 20_000, 5))


def test_groups_reach_the_small_bin_as_often_as_single_images_do():
    classes = np.zeros(1000, np.int64)
    groups = [f"g{number // 5}" if number < 500 else "" for number in range(1000)]
    bins = deal(table(classes, groups), np.array([[200.0], [800.0]]), np.random.default_rng(0))
    assert (bins[:500] == 0).mean() == pytest.approx(0.2, abs=0.01)
    assert (bins[500:] == 0).mean() == pytest.approx(0.2, abs=0.01)


def test_byte_equal_copies_stay_together_with_near_duplicates_off(source):
    same = lambda label, number: f"copy {label} {number // 3}" if number < 60 else ""  # noqa: E731
    dataset = freeze_dataset(source({"a": 100, "b": 100}, same=same), NO_NEAR)
    for digest in set(dataset.sha256.tolist()):
        rows = dataset.sha256 == digest
        assert len(set(zip(dataset.splits[rows].tolist(), dataset.folds[rows].tolist(), strict=True))) == 1
    assert (dataset.groups != "").sum() == 120


def test_a_copy_joins_the_groups_of_two_people(source):
    group = lambda label, number: f"p{number // 4:02d}" if label == "a" else ""  # noqa: E731
    same = lambda label, number: "twin" if (label, number) in (("a", 0), ("a", 5)) else ""  # noqa: E731
    dataset = freeze_dataset(source({"a": 80, "b": 80}, group=group, same=same), NO_NEAR)
    assert dataset.groups[:8].tolist() == ["p00+p01"] * 8


def test_one_image_with_two_labels_is_refused_by_name(source):
    made = source({"a": 20, "b": 20}, same=lambda label, number: "same" if number == 7 else "")
    with pytest.raises(DataError, match=r"a/0007.png \(a\) and b/0007.png \(b\).*different labels"):
        freeze_dataset(made, NO_NEAR)


def test_copies_and_groups_across_the_datas_own_splits_are_refused(source):
    split = lambda label, number: "test" if number < 5 else "train"  # noqa: E731
    same = lambda label, number: "same" if label == "a" and number in (2, 9) else ""  # noqa: E731
    with pytest.raises(DataError, match=r"a/0002.png and a/0009.png: the same bytes"):
        freeze_dataset(source({"a": 30, "b": 30}, split=split, same=same), NO_NEAR)
    group = lambda label, number: "anna" if label == "b" and number in (3, 8) else ""  # noqa: E731
    with pytest.raises(DataError, match=r"b/0003.png and b/0008.png: one group"):
        freeze_dataset(source({"a": 30, "b": 30}, split=split, group=group), NO_NEAR)


@pytest.mark.parametrize(("count", "group", "message"), [
    (6, "", "class 'b': 6 images, expected at least 7 for 5 folds"),
    (30, "one", "class 'b': 30 images in 1 groups"),
])  # fmt: skip
def test_a_class_too_small_is_refused_with_the_remedy(source, count, group, message):
    made = source({"a": 40, "b": count}, group=lambda label, number: group if label == "b" else "")
    with pytest.raises(DataError, match="fewer --folds") as error:
        freeze_dataset(made, NO_NEAR)
    assert message in str(error.value)
    if not group:
        assert freeze_dataset(made, SplitSettings(folds=4, near_duplicates=False)).fold_count == 4


@pytest.mark.parametrize("count", [2, 5, 8, 19])
def test_the_smallest_allowed_class_reaches_test_val_and_every_fold(count):
    classes = np.repeat([0, 1], [500, count + 2])
    for seed in range(10):
        strata = np.random.default_rng(seed).integers(0, 4, 502 + count)
        settings = SplitSettings(folds=count, seed=seed, test_fraction=0.3)
        splits, dealt = deal_splits(table(classes, strata=strata), settings, ("a", "b"))
        assert sorted(splits[500:].tolist()) == ["test"] + ["train"] * count + ["val"]
        assert sorted(dealt[500:][dealt[500:] >= 0].tolist()) == list(range(count))


def grouped(*sizes):
    """A table with classes 0, 1, ...: ``sizes`` of the groups of each."""
    counts = np.concatenate(sizes)
    classes = np.repeat(np.repeat(np.arange(len(sizes)), [len(own) for own in sizes]), counts)
    return table(classes, groups=[f"g{number}" for number in np.repeat(np.arange(len(counts)), counts)])


ONE_LARGE = [
    ([100] + [1] * 29, [100] + [1] * 29), ([100] + [1] * 29, [5] * 30), ([400] + [20] * 10, [20] * 30),
    ([60] + [3] * 9, [60] + [3] * 9), ([300, 260] + [10] * 6, [10] * 50), ([1000, 100] + [1] * 5, [3] * 9),
]  # fmt: skip


@pytest.mark.parametrize("sizes", ONE_LARGE, ids=str)
def test_a_class_with_a_dominant_group_reaches_test_val_and_every_fold(sizes):
    made, names = grouped(*sizes), ("a", "b")
    for seed in range(10):
        splits, dealt = deal_splits(made, SplitSettings(seed=seed), names)
        for label in (0, 1):
            own = made.classes == label
            assert {"test", "val"} <= set(splits[own].tolist()) and set(dealt[own & (dealt >= 0)].tolist()) == set(
                range(5)
            )
            assert (splits[own] == "test").mean() <= 0.3 and (splits[own] == "val").mean() <= 0.3
            for group in np.unique(made.groups[own]):
                assert len(set(zip(splits[made.groups == group], dealt[made.groups == group], strict=True))) == 1


def test_small_groups_beside_a_dominant_one_are_shared_as_others_are():
    made = grouped([1000] + [1] * 100, [1] * 100)
    splits, _ = deal_splits(made, SplitSettings(), ("a", "b"))
    small = (made.classes == 0) & (np.bincount(made.groups)[made.groups] == 1)
    assert [int((splits[small] == split).sum()) for split in ("test", "val", "train")] == [20, 16, 64]


@pytest.mark.parametrize("seed", [4, 5, 9, 10, 14, 18, 19])
def test_groups_of_unlike_size_and_several_classes_reach_every_part(seed):
    rng = np.random.default_rng(seed)
    sizes = np.minimum(rng.pareto(0.7, 16) + 2, 100).astype(int)
    classes = [rng.choice(rng.choice(4, rng.integers(1, 5), replace=False), size) for size in sizes]
    made = table(np.concatenate(classes), groups=[f"g{number}" for number in np.repeat(np.arange(16), sizes)])
    splits, dealt = deal_splits(made, SplitSettings(folds=3), "abcd")
    for part in (splits == "test", splits == "val", *(dealt == fold for fold in range(3))):
        assert set(made.classes[part].tolist()) == {0, 1, 2, 3}


def test_fewer_groups_than_folds_are_an_error_of_ours():
    made = grouped([50], [50])
    with pytest.raises(DataError, match="is missing in fold"):
        dealing._deal_folds(made, SplitSettings(folds=3), np.random.default_rng(0), ("a", "b"))


@pytest.mark.parametrize(("given", "count", "needs"), [
    (("val", "test"), 5, "5 folds"), (("test",), 6, "5 folds and val"), ((), 7, "5 folds, test and val"),
])  # fmt: skip
def test_a_class_needs_an_image_for_each_fold_and_split_that_is_cut(source, given, count, needs):
    split = lambda label, number: given[number] if number < len(given) else ""  # noqa: E731
    made = source({"a": 40, "b": count + len(given)}, split=split)
    dataset = freeze_dataset(made, NO_NEAR)
    of_b = dataset.labels == 1
    assert sorted(dataset.folds[of_b & (dataset.folds >= 0)].tolist()) == list(range(5))
    assert {"test", "val"} <= set(dataset.splits[of_b].tolist())
    few = dataclasses.replace(made, items=made.items[:-1])
    with pytest.raises(DataError, match=f"class 'b': {count - 1} images, expected at least {count} for {needs}; add"):
        freeze_dataset(few, NO_NEAR)
    dropped = freeze_dataset(dataclasses.replace(few, items=few.items + source({"c": 40}).items), keep("drop"))
    assert dropped.class_names == ("a", "c")


# ---- rows marked train beside rows without a split ----


def own_and_foreign(label, number):
    """Ten own photographs of each class, the others foreign: to be trained on alone."""
    return "" if number < 10 else "train"


def test_rows_marked_train_are_cut_where_no_others_are(source, capsys):
    made = source({"a": 40, "b": 40}, split=own_and_foreign)
    dataset = freeze_dataset(made, SplitSettings(folds=2, near_duplicates=False))
    foreign = np.array([item.split == "train" for item in made.items])
    assert (dataset.splits[foreign] == "train").all() and (dataset.folds[foreign] >= 0).all()
    assert {name: int((dataset.splits[~foreign] == name).sum()) for name in ("test", "val", "train")} == {
        "test": 4, "val": 4, "train": 12,
    }  # fmt: skip
    told = capsys.readouterr().err.replace("\n", " ")
    assert "20 images have no split, where others are train; test and val are cut from them alone" in told
    whole = source({"a": 40, "b": 40}, split=lambda label, number: "train")
    assert len(freeze_dataset(whole, NO_NEAR).rows("test")) == 16


@pytest.mark.parametrize(("given", "says"), [
    (("test",), "where others are train; val is cut from them alone, first a/0001.png"),
    (("test", "val"), "where others have one, and count as train, first a/0002.png"),
])  # fmt: skip
def test_what_becomes_of_rows_without_a_split_is_told(source, capsys, given, says):
    split = lambda label, number: given[number] if number < len(given) else own_and_foreign(label, number)  # noqa: E731
    made = source({"a": 40, "b": 40}, split=split)
    dataset = freeze_dataset(made, SplitSettings(folds=2, near_duplicates=False))
    assert says in capsys.readouterr().err.replace("\n", " ")
    assert (dataset.splits[[item.split == "train" for item in made.items]] == "train").all()


def test_an_own_image_of_a_foreign_group_is_not_cut(source):
    group = lambda label, number: f"{label}{number % 10}" if number < 20 and number % 2 else ""  # noqa: E731
    made = source({"a": 40, "b": 40}, split=own_and_foreign, group=group)
    dataset = freeze_dataset(made, SplitSettings(folds=2, near_duplicates=False))
    assert (dataset.splits[dataset.groups != ""] == "train").all() and len(dataset.rows("test")) == 2


def test_a_class_of_foreign_images_alone_cannot_be_tested(source):
    split = lambda label, number: "train" if label == "c" else own_and_foreign(label, number)  # noqa: E731
    made = source({"a": 40, "b": 40, "c": 40}, split=split)
    says = (
        "class 'c': 0 images, expected at least 2 for test and val beside those that are train; leave the split of more"
    )
    with pytest.raises(DataError, match=says):
        freeze_dataset(made, NO_NEAR)
    assert (freeze_dataset(made, keep("train-only")).folds[80:] == ALWAYS_TRAINED).all()


# ---- classes too small for the folds ----


def keep(how):
    return SplitSettings(near_duplicates=False, small_classes=how)


def test_the_refusal_of_a_small_class_names_the_option(source):
    with pytest.raises(DataError, match="keep it in training alone with --small-classes train-only"):
        freeze_dataset(source({"a": 40, "b": 1}), NO_NEAR)


def test_a_class_of_one_image_is_always_trained_on_and_never_held_out(source, tmp_path, capsys):
    group = lambda label, number: f"p{number}" if label in ("a", "c") and number < 3 else ""  # noqa: E731
    dataset = freeze_dataset(source({"a": 40, "b": 1, "c": 3, "d": 40}, group=group), keep("train-only"))
    apart = dataset.folds == ALWAYS_TRAINED
    # 'c' is too small and shares its three people with 'a', whose images must stay on the same side.
    assert set(dataset.ids[apart]) == {"b/0000.png", *(f"{label}/{n:04d}.png" for label in "ac" for n in range(3))}
    assert (dataset.splits[apart] == "train").all() and dataset.fold_count == 5
    for label in (0, 3):
        own = dataset.folds[(dataset.labels == label) & ~apart]
        assert (np.bincount(own[own >= 0], minlength=5) >= 1).all()
        assert {"val", "test"} <= set(dataset.splits[dataset.labels == label])
    assert "7 images are in every teacher's training" in capsys.readouterr().err.replace("\n", " ")
    assert dataset.class_names == ("a", "b", "c", "d")
    verify_folds(dataset)
    write_dataset(dataset, tmp_path / "dataset.csv")
    again = read_dataset(tmp_path / "dataset.csv")
    assert (again.folds == dataset.folds).all() and again.hash == dataset.hash
    for row, fold, message in (
        (np.flatnonzero(dataset.splits == "test")[0], ALWAYS_TRAINED, "train images have a fold"),
        (np.flatnonzero(dataset.ids == "c/0001.png")[0], 2, "is missing in fold 0"),
        (np.flatnonzero(dataset.ids == "a/0001.png")[0], 2, "the same group in different splits or folds"),
    ):
        folds = dataset.folds.copy()
        folds[row] = fold
        with pytest.raises(DataError, match=message):
            verify_folds(dataclasses.replace(dataset, folds=folds))


def test_dropped_classes_are_gone_and_counted(source, capsys):
    made = source({"a": 40, "b": 1, "c": 3, "d": 40})
    dataset = freeze_dataset(made, keep("drop"))
    assert dataset.class_names == ("a", "d") and len(dataset) == 80
    assert "4 images are left out, of class 'b', class 'c'" in capsys.readouterr().err.replace("\n", " ")
    assert (dataset.folds != ALWAYS_TRAINED).all()
    with pytest.raises(DataError, match="drop leaves fewer than two classes"):
        freeze_dataset(source({"a": 40, "e": 2}), keep("drop"))


def test_where_every_class_is_small_nothing_can_be_dealt(source):
    with pytest.raises(DataError, match="every class has fewer images or groups than 5 folds, test and val need"):
        freeze_dataset(source({"a": 5, "b": 6}), keep("train-only"))
    test_only = lambda label, number: "test" if label == "b" else ""  # noqa: E731
    with pytest.raises(DataError, match="class 'b': no image to train on"):
        freeze_dataset(source({"a": 40, "b": 9}, split=test_only), keep("train-only"))


@pytest.mark.parametrize(("how", "says"), [("train-only", "in every teacher's training"), ("drop", "are left out")])
def test_check_data_says_what_becomes_of_small_classes(make_photos, tmp_path, how, says):
    root = make_photos(tmp_path / "photos", per_class=10)
    (root / "ring").mkdir()
    (root / "bar" / "000.jpg").rename(root / "ring" / "000.jpg")
    report = check_data(open_source(str(root)), settings=SplitSettings(folds=2, small_classes=how))
    (finding,) = [finding for finding in report.findings if finding.kind == "small classes"]
    assert finding.severity == "warning" and says in finding.message and "class 'ring'" in finding.message
    assert not report.errors


# ---- near-duplicates ----


@pytest.fixture
def photographs(tmp_path):
    """A Source of two classes of smooth random pictures; ``burst``: numbers that are slightly changed copies of another."""

    def make(count=14, burst=None):
        rng = np.random.default_rng(0)
        items = []
        for label in ("a", "b"):
            (tmp_path / label).mkdir()
            pictures = [
                cv2.resize(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8), (90, 80), interpolation=cv2.INTER_CUBIC)
                for _ in range(count)
            ]
            for number in range(count):
                picture = pictures[(burst or {}).get((label, number), number)]
                path = tmp_path / label / f"{number:02d}.jpg"
                quality = 95 if (label, number) not in (burst or {}) else 60 + number
                cv2.imwrite(str(path), picture, [cv2.IMWRITE_JPEG_QUALITY, quality])
                items.append(Item(f"{label}/{number:02d}.jpg", path, label))
        return Source("photographs", tmp_path, tuple(items))

    return make


def test_re_encoded_copies_form_groups_and_unlike_images_do_not(photographs):
    burst = {("a", 3): 1, ("a", 4): 1, ("b", 9): 8}
    dataset = freeze_dataset(photographs(burst=burst), SplitSettings(folds=3))
    groups = dict(zip(dataset.ids.tolist(), dataset.groups.tolist(), strict=True))
    assert {id: name for id, name in groups.items() if name} == {
        "a/01.jpg": "like a/01.jpg", "a/03.jpg": "like a/01.jpg", "a/04.jpg": "like a/01.jpg",
        "b/08.jpg": "like b/08.jpg", "b/09.jpg": "like b/08.jpg",
    }  # fmt: skip
    assert len(set(dataset.sha256.tolist())) == len(dataset)


def test_a_burst_stays_together_however_long(photographs, capsys):
    dataset = freeze_dataset(
        photographs(count=40, burst={("a", number): 0 for number in range(1, 12)}), SplitSettings()
    )
    assert [name for name in dataset.groups.tolist() if name] == ["like a/00.jpg"] * 12
    assert "near-duplicate" not in capsys.readouterr().err
    verify_folds(dataset)


def clique(*rows):
    return [(one, other) for one in rows for other in rows if one < other]


def parts(pairs, rows=100, **columns):
    """Sizes of the groups that near-duplicate ``pairs`` make in a class of so many rows, the largest first."""
    made = table(np.zeros(rows, np.int64), **columns)
    kept = folds.pairs_to_keep(np.array(pairs, np.int64), made)
    sizes = np.bincount(duplicates.components(rows, kept))
    return sorted(sizes[sizes > 1].tolist(), reverse=True)


def test_of_a_chain_too_long_only_bursts_are_kept_together():
    chain = [(row, row + 1) for row in range(20)]
    assert parts(chain[:9]) == [10]  # ten images: no long chain
    assert parts(chain) == []
    assert parts([*clique(*range(15)), (14, 15), (15, 16), *clique(*range(16, 28))]) == [16, 12]
    assert parts([(3, row) for row in range(20, 40)]) == [21]  # all like one, though not like each other
    assert parts([*clique(*range(8)), *[(row, row + 1) for row in range(8, 20)], (7, 8)]) == []
    assert folds.long_chains(np.array([[0, 1], [1, 2]]), np.zeros(80, np.int64)) == []


def test_a_burst_is_no_more_than_a_third_of_its_class_and_never_parted_where_nothing_is_dealt():
    assert parts(clique(*range(80))) == [33, 33, 14]
    assert parts(clique(*range(12)), rows=30) == [10, 2]
    own_test = np.where(np.arange(100) < 80, dealing.TEST, dealing.TO_DEAL)
    assert parts(clique(*range(80)), given=own_test) == [80]


def test_near_duplicates_that_are_not_kept_together_are_told(photographs, capsys):
    dataset = freeze_dataset(
        photographs(count=21, burst={("a", number): 0 for number in range(1, 12)}), SplitSettings()
    )
    assert sorted(np.unique(dataset.groups, return_counts=True)[1].tolist()) == [2, 10, 30]
    told = capsys.readouterr().err.replace("\n", " ")
    assert "20 near-duplicate pairs are not kept together" in told and "first a/00.jpg and a/10.jpg" in told


def test_near_duplicates_across_the_datas_own_splits_are_reported(photographs, capsys):
    made = photographs(count=14, burst={("a", 5): 2})
    items = [
        dataclasses.replace(item, split="test" if item.id in ("a/02.jpg", "b/03.jpg") else "") for item in made.items
    ]
    dataset = freeze_dataset(dataclasses.replace(made, items=tuple(items)), SplitSettings())
    assert dataset.splits[2] == "test"
    assert dataset.splits[5] != "test"
    assert "a/02.jpg and a/05.jpg" in capsys.readouterr().err


def test_a_damaged_image_is_named_when_near_duplicates_are_looked_for(photographs):
    made = photographs()
    Path(made.items[3].path).write_bytes(b"\xff\xd8 nothing")
    with pytest.raises(EdgedistillError, match=r"03\.jpg"):
        freeze_dataset(made, SplitSettings())


def test_close_hashes_are_exactly_those_that_comparing_all_with_all_finds(monkeypatch):
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**64, 300, dtype=np.uint64)
    flips = [
        np.uint64(sum(1 << int(bit) for bit in rng.choice(64, size, replace=False))) for size in rng.integers(0, 8, 900)
    ]
    hashes = np.concatenate([base, base[rng.integers(0, 300, 900)] ^ np.array(flips)])
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    one, other = np.nonzero(np.triu(distance <= duplicates.MAX_HASH_DISTANCE, 1))
    assert len(one) > 500
    expected = [list(pair) for pair in sorted(zip(one.tolist(), other.tolist(), strict=True))]
    assert duplicates.close_hashes(hashes).tolist() == expected
    monkeypatch.setattr(duplicates, "MAX_PAIRS", 100)
    assert duplicates.close_hashes(hashes) is None


def test_correlation_equals_numpys_and_flat_images_match_only_their_own_grey():
    rng = np.random.default_rng(0)
    thumbnails = rng.integers(0, 255, (5, 64, 64), dtype=np.uint8)
    thumbnails[3], thumbnails[4] = 10, 12
    got = duplicates.correlations(thumbnails, np.array([[0, 1], [1, 2], [3, 4], [0, 3]]))
    expected = [np.corrcoef(thumbnails[a].ravel(), thumbnails[b].ravel())[0, 1] for a, b in ((0, 1), (1, 2))]
    assert got[:2] == pytest.approx(expected, abs=1e-4)
    assert got[2:].tolist() == [1.0, 0.0]
    thumbnails[4] = 40
    assert duplicates.correlations(thumbnails, np.array([[3, 4]]))[0] == 0.0


# ---- the proof ----


@pytest.fixture
def frozen(source):
    group = lambda label, number: f"g{number // 2}" if label == "a" else ""  # noqa: E731
    return freeze_dataset(source({"a": 60, "b": 60}, group=group), NO_NEAR)


def test_the_proof_passes_on_what_was_frozen_and_names_what_was_tampered_with(frozen):
    verify_folds(frozen)

    def tampered(name, row, value):
        column = getattr(frozen, name).copy()
        column[row] = value
        return dataclasses.replace(frozen, **{name: column})

    train, test = frozen.rows("train"), frozen.rows("test")
    grouped = train[frozen.groups[train] != ""][0]
    cases = [
        (tampered("folds", train[0], -1), "train images have a fold"),
        (tampered("folds", test[0], 2), "train images have a fold"),
        (tampered("folds", grouped, (frozen.folds[grouped] + 1) % 5), "the same group in different splits or folds"),
        (tampered("sha256", train[-1], frozen.sha256[test[-1]]), "the same bytes in different splits or folds"),
        (tampered("ids", train[0], frozen.ids[train[1]]), "the id stands twice"),
        (tampered("folds", frozen.folds == 3, 2), "is missing in fold 3"),
        (
            dataclasses.replace(frozen, splits=np.full(120, "test"), folds=np.full(120, -1)),
            "no image is in split train",
        ),
    ]
    for dataset, message in cases:
        with pytest.raises(DataError, match=message):
            verify_folds(dataset)


@pytest.mark.parametrize(
    "wrong", [{"folds": 1}, {"test_fraction": 0.0}, {"val_fraction": 0.9}, {"seed": -1}, {"small_classes": "merge"}]
)
def test_settings_out_of_range_are_wrong_usage(wrong):
    with pytest.raises(UsageError, match="splits: "):
        SplitSettings(**wrong)
