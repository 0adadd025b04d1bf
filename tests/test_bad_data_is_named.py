"""check-data names every bad file and the remedy before a training starts, and stops for nothing else."""

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from edgedistill.data import checks, duplicates
from edgedistill.data.checks import check_data, plot_data
from edgedistill.data.deal import SplitSettings
from edgedistill.data.folds import freeze_dataset
from edgedistill.data.label_columns import LabelColumns
from edgedistill.data.sources import open_source
from edgedistill.errors import DataError


def picture(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    """Smooth random colours, BGR: each seed's looks like no other's."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def photos(tmp_path):
    """A clean folder of two classes, 10 JPEG images each."""
    for number in range(20):
        path = tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), picture(number))
    return tmp_path / "photos"


def report_on(folder: Path, **options):
    return check_data(open_source(str(folder)), **options)


def found(report, kind: str):
    findings = [finding for finding in report.findings if finding.kind == kind]
    assert len(findings) == 1, (kind, report.rows())
    assert findings[0].remedy
    return findings[0]


def png_header_of(width: int, height: int) -> bytes:
    """A PNG whose header promises that size and whose pixels are missing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_clean_data_pass_without_a_word(photos):
    report = report_on(photos)
    assert report.findings == ()
    assert report.class_counts == {"cat": 10, "dog": 10}
    assert report.modes == {"colour": 20}
    assert (report.sizes == (60, 80)).all()
    assert "no errors" in report.summary()


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("empty", lambda data: b""),
        ("damaged", lambda data: data[: len(data) * 2 // 3]),
        ("damaged", lambda data: data[:5]),
        ("too large", lambda data: png_header_of(50_000, 50_000)),
        ("damaged", lambda data: png_header_of(80, 60)),
        ("unsupported format", lambda data: b"\0\0\0\x18ftypheic" + bytes(100)),
        ("unsupported format", lambda data: b"GIF89a" + bytes(100)),
        ("unsupported format", lambda data: b"<html>not found</html>"),
        ("unsupported format", lambda data: bytes(500)),
    ],
    ids=["empty", "truncated", "cut in its header", "bomb", "no pixels", "HEIC", "GIF", "HTML", "zeros"],
)
def test_a_bad_image_is_an_error_with_its_name_and_the_data_set_is_refused(photos, kind, content):
    bad = photos / "dog" / "07.jpg"
    bad.write_bytes(content(bad.read_bytes()))
    report = report_on(photos)
    finding = found(report, kind)
    assert finding.severity == "error"
    assert finding.paths == ("dog/07.jpg",)
    assert len(report.errors) == 1
    with pytest.raises(DataError, match=r"dog/07\.jpg"):
        freeze_dataset(open_source(str(photos)), SplitSettings(), checks=report)


def test_the_limit_of_pixels_can_be_set(photos):
    assert found(report_on(photos, max_pixels=4000), "too large").paths[0] == "cat/00.jpg"
    assert report_on(photos, max_pixels=4800).errors == ()


def test_a_file_that_went_away_or_cannot_be_opened_is_unreadable(photos):
    source = open_source(str(photos))
    source.items[4].path.unlink()
    assert found(check_data(source), "unreadable").paths == (source.items[4].id,)


def test_photographs_in_formats_nobody_reads_and_broken_links_are_errors_other_files_warnings(photos):
    (photos / "cat" / "IMG_2.HEIC").write_bytes(b"x")
    (photos / "cat" / "link.png").symlink_to(photos / "nothing.png")
    (photos / "cat" / "list.txt").write_text("x")
    (photos / "bird").mkdir()
    report = report_on(photos)
    assert found(report, "unsupported format").paths[0].endswith("IMG_2.HEIC")
    assert found(report, "unreadable").paths[0].endswith("link.png")
    left_out = {Path(finding.paths[0]).name for finding in report.warnings if finding.kind == "left out"}
    assert left_out == {"list.txt", "bird"}
    assert len(report.errors) == 2


@pytest.mark.parametrize(("said", "counted"), [("train", 3), ("", 0)])
def test_rows_without_a_split_beside_others_with_one_are_told(photos, tmp_path, said, counted):
    files = sorted(photos.rglob("*.jpg"))
    splits = ["val" if number % 10 == 9 else said for number in range(len(files))]
    for number in (0, 5, 12):
        splits[number] = ""
    table = tmp_path / "photos.csv"
    rows = [f"{file},{file.parent.name},{split}" for file, split in zip(files, splits, strict=True)]
    table.write_text("\n".join(["path,label,split", *rows]))
    report = check_data(open_source(str(table)), settings=SplitSettings(folds=2))
    told = [finding.message for finding in report.warnings if finding.kind == "splits"]
    assert len(told) == bool(counted) and not report.errors
    assert all(f"{counted} images have no split" in message and "00.jpg" in message for message in told)


def test_copies_are_reported_and_conflicting_labels_refused(photos):
    (photos / "cat" / "copy.jpg").write_bytes((photos / "cat" / "02.jpg").read_bytes())
    report = report_on(photos)
    assert found(report, "copies").paths == ("cat/02.jpg", "cat/copy.jpg")
    assert report.errors == ()
    (photos / "dog" / "copy.jpg").write_bytes((photos / "cat" / "04.jpg").read_bytes())
    finding = found(report_on(photos), "conflicting labels")
    assert finding.severity == "error"
    assert finding.paths == ("cat/04.jpg", "dog/copy.jpg")


def test_near_duplicates_are_reported_once_and_frozen_without_decoding_again(photos, monkeypatch):
    cv2.imwrite(str(photos / "cat" / "burst.jpg"), picture(2), [cv2.IMWRITE_JPEG_QUALITY, 60])
    cv2.imwrite(str(photos / "dog" / "burst.jpg"), picture(4), [cv2.IMWRITE_JPEG_QUALITY, 60])
    report = report_on(photos)
    assert found(report, "near-duplicates").paths == ("cat/02.jpg", "cat/04.jpg", "cat/burst.jpg", "dog/burst.jpg")
    assert found(report, "doubtful labels").paths == ("cat/04.jpg", "dog/burst.jpg")
    source = open_source(str(photos))
    expected = freeze_dataset(source, SplitSettings())
    monkeypatch.setattr(duplicates, "fingerprint", None)
    dataset = freeze_dataset(source, SplitSettings(), checks=report)
    assert (dataset.folds == expected.folds).all()
    assert (dataset.groups == expected.groups).all()
    assert dataset.hash == expected.hash


def test_pairs_that_are_not_kept_together_have_a_line_of_their_own(photos, tmp_path):
    for number in range(12):
        cv2.imwrite(str(photos / "cat" / f"burst{number:02d}.jpg"), picture(2), [cv2.IMWRITE_JPEG_QUALITY, 60 + number])
    report = report_on(photos)
    (whole, parted) = [finding for finding in report.findings if finding.kind == "near-duplicates"]
    assert "13 images look the same as another, in 1 groups" in whole.message and "another line" in whole.message
    assert "30 near-duplicate pairs are not kept together" in parted.message and "group" in parted.remedy
    for number in range(22):
        cv2.imwrite(str(photos / "cat" / f"other{number}.jpg"), picture(500 + number))
    assert found(report_on(photos), "near-duplicates").message.startswith("13 images")
    rows = [
        f"{file},{file.parent.name},{'test' if file.stem in ('02', '03') else ''}"
        for file in sorted(photos.rglob("*.jpg"))
    ]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    kinds = [finding.message for finding in check_data(open_source(str(tmp_path / "list.csv"))).findings]
    assert any("12 near-duplicate pairs lie across the data's own splits" in message for message in kinds)


def test_a_report_without_the_search_does_not_switch_it_off(photos):
    cv2.imwrite(str(photos / "cat" / "burst.jpg"), picture(2), [cv2.IMWRITE_JPEG_QUALITY, 60])
    report = report_on(photos, near_duplicates=False)
    assert report.findings == ()
    dataset = freeze_dataset(open_source(str(photos)), SplitSettings(), checks=report)
    assert (dataset.groups != "").sum() == 2


def test_above_its_limit_the_search_is_off_and_the_report_says_so(photos, monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_IMAGES", 19)
    assert "not looked for" in found(report_on(photos), "near-duplicates").message


def test_a_class_too_small_for_the_folds_is_an_error_with_its_counts(photos):
    report = report_on(photos, folds=9)
    assert "10 images, expected at least 11 for 9 folds" in found(report, "class too small").message
    assert report_on(photos, folds=8).errors == ()


def test_a_class_whose_images_are_all_bad_is_missing(photos):
    for path in (photos / "dog").iterdir():
        path.write_bytes(b"")
    report = report_on(photos)
    assert "'dog'" in found(report, "missing class").message
    assert len(found(report, "empty").paths) == 10


def test_a_csv_of_several_labels_whose_images_are_all_bad_is_reported(photos):
    files = sorted(photos.rglob("*.jpg"))
    for path in files:
        path.write_bytes(b"")
    rows = [f"{file},{('cat', 'cat|dog', '|')[number % 3]}" for number, file in enumerate(files)]
    (photos / "labels.csv").write_text("\n".join(["path,label", *rows]))
    report = check_data(open_source(str(photos / "labels.csv"), labels=LabelColumns(multi_label=True)))
    assert found(report, "missing class").message == "no image can be read"
    assert len(found(report, "empty").paths) == 20


def test_groups_and_copies_across_given_splits_are_errors(tmp_path, photos):
    rows = [
        f"photos/{('cat', 'dog')[n % 2]}/{n:02d}.jpg,{('cat', 'dog')[n % 2]},g{n // 2},{'test' if n in (1, 5) else ''}"
        for n in range(20)
    ]
    (tmp_path / "list.csv").write_text("path,label,group,split\n" + "\n".join(rows))
    assert "one group" in found(check_data(open_source(str(tmp_path / "list.csv"))), "splits").message


def test_several_labels_read_as_one_are_a_warning(photos):
    table = photos / "labels.csv"
    names = sorted(str(path) for path in photos.rglob("*.jpg"))
    rows = [f"{name},{('cat', 'cat|dog', 'dog')[number % 3]}" for number, name in enumerate(names)]
    table.write_text("\n".join(["path,label", *rows]) + "\n")
    finding = found(report_on(str(table)), "one label or several")
    assert "1 of 3 classes" in finding.message and "'cat|dog'" in finding.message
    assert "--multi-label" in finding.remedy
    several = check_data(open_source(str(table), labels=LabelColumns(multi_label=True)))
    assert "one label or several" not in {one.kind for one in several.warnings}


def test_odd_modes_sizes_extensions_and_imbalance_are_warnings(photos):
    base = picture(100)
    depth, alpha = base[:, :, 0].astype(np.uint16) * 257, np.dstack([picture(101), np.full((60, 80), 9, np.uint8)])
    cv2.imwrite(str(photos / "cat" / "depth.png"), depth)
    cv2.imwrite(str(photos / "cat" / "alpha.png"), alpha)
    Image.fromarray(picture(102)).convert("CMYK").save(photos / "cat" / "cmyk.jpg")
    cv2.imwrite(str(photos / "cat" / "grey.png"), picture(103)[:, :, 0])
    cv2.imwrite(str(photos / "cat" / "tiny.png"), picture(104, 6, 9))
    cv2.imwrite(str(photos / "cat" / "long.png"), picture(105, 40, 400))
    (photos / "cat" / "liar.png").write_bytes(cv2.imencode(".jpg", picture(106))[1].tobytes())
    for number in range(90):
        cv2.imwrite(str(photos / "cat" / f"more{number}.bmp"), picture(200 + number, 40, 40))
    report = report_on(photos)
    assert report.errors == ()
    odd = {finding.paths: finding.message for finding in report.warnings if finding.kind == "odd mode"}
    assert odd == {
        ("cat/alpha.png",): "1 images are colour with alpha",
        ("cat/cmyk.jpg",): "1 images are CMYK",
        ("cat/depth.png",): "1 images are 16-bit grey",
    }
    assert set(found(report, "mixed modes").paths) == {"cat/grey.png", "cat/depth.png"}
    assert found(report, "wrong extension").paths == ("cat/liar.png",)
    assert "'cat' has 107 images, 'dog' 10" in found(report, "class imbalance").message
    sizes = [finding.paths for finding in report.warnings if finding.kind == "odd size"]
    assert ("cat/tiny.png",) in sizes
    assert ("cat/long.png",) in sizes
    assert report.modes["BMP"] == 90


def test_the_report_is_plain_json_and_a_table(photos):
    (photos / "dog" / "07.jpg").write_bytes(b"")
    (photos / "dog" / "09.jpg").write_bytes(b"\xff\xd8")
    report = report_on(photos)
    values = report.to_dict()
    assert [error["paths"] for error in values["errors"]] == [["dog/07.jpg"], ["dog/09.jpg"]]
    assert values["sizes"]["width_px"] == {"min": 80, "median": 80, "max": 80}
    assert (values["images"], values["classes"]) == (20, {"cat": 10, "dog": 10})
    assert [(shape["class"], shape["images"]) for shape in values["shapes"]] == [("cat", 10), ("dog", 8)]
    width, height = values["shapes"][0]["sizes"][0][:2]
    assert values["shapes"][0]["sizes"] == [[width, height, 10]]
    assert values["shapes"][0]["aspect"] == [pytest.approx(width / height, abs=1e-4)] * 5
    rows = report.rows()
    assert [row[0] for row in rows] == ["error", "error"]
    assert rows[0][3] == "dog/07.jpg"
    assert "dog/07.jpg" in report.summary()
    assert "1 more kinds of error" in report.summary()


def test_the_picture_is_drawn_for_few_and_for_many_classes_and_for_no_readable_image(photos, tmp_path):
    cv2.imwrite(str(photos / "cat" / "large.png"), picture(105, 600, 900))
    for number in range(40):
        folder = (
            photos
            / (f"a class with a rather long name {number}", f"赤い {number}", rf"$\frac{{{number}}}$ price")[number % 3]
        )
        folder.mkdir()
        cv2.imwrite(str(folder / "1.png"), picture(300 + number, 50 + number, 70))
    target = plot_data(report_on(photos), tmp_path / "plots" / "data.png")
    image = cv2.imread(str(target))
    assert image.shape[1] >= 1200
    assert image.std() > 10
    shapes = report_on(photos).shapes()
    assert len(shapes) == checks.COLORED_CLASSES + 1 and shapes[-1]["class"] is None
    assert sum(shape["images"] for shape in shapes) == len(list(photos.rglob("*.png"))) + len(
        list(photos.rglob("*.jpg"))
    )
    for path in photos.rglob("*.*"):
        path.write_bytes(b"")
    assert plot_data(report_on(photos), tmp_path / "none.png").stat().st_size > 5000


def test_every_kind_of_bad_image_has_a_remedy():
    assert set(checks.REMEDIES) == {"unreadable", "empty", "damaged", "unsupported format", "too large"}
    assert all(checks.REMEDIES.values())
