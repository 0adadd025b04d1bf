"""Every form in which photographs may come is read as the same labelled items."""

import errno
import fcntl
import gzip
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgedistill import artifacts
from edgedistill.data import sources
from edgedistill.data.fashion_mnist import CLASSES
from edgedistill.data.sources import open_source
from edgedistill.errors import DataError, UsageError


@pytest.fixture
def write():
    """write(path): a small image of its own there."""

    def write_image(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(len(str(path))).integers(0, 255, (12, 10, 3), dtype=np.uint8)
        suffix = path.suffix if path.suffix.lower() in (".png", ".jpg", ".bmp") else ".png"
        path.write_bytes(cv2.imencode(suffix, pixels)[1].tobytes())
        return path

    return write_image


def test_a_folder_per_class(tmp_path, write):
    for name in ("cat/1.jpg", "cat/2.PNG", "dog/1.bmp"):
        write(tmp_path / name)
    source = open_source(str(tmp_path))
    assert [(item.id, item.label, item.split) for item in source.items] == [
        ("cat/1.jpg", "cat", ""),
        ("cat/2.PNG", "cat", ""),
        ("dog/1.bmp", "dog", ""),
    ]
    assert source.class_names == ("cat", "dog")
    assert source.items[0].path.is_file()


@pytest.mark.parametrize("val", ["val", "valid", "Validation"])
def test_split_folders(tmp_path, write, val):
    for split in ("train", val, "test"):
        for label in ("cat", "dog"):
            write(tmp_path / split / label / "1.png")
    write(tmp_path / "notes" / "x.png")
    source = open_source(str(tmp_path))
    assert {item.id: item.split for item in source.items}[f"{val}/cat/1.png"] == "val"
    assert sorted(item.split for item in source.items) == ["test", "test", "train", "train", "val", "val"]
    assert source.skipped == ((str(tmp_path / "notes"), "folder beside train, val and test"),)


def test_a_class_may_be_called_train(tmp_path, write):
    for label in ("train", "tram"):
        write(tmp_path / label / "1.png")
    assert open_source(str(tmp_path)).class_names == ("train", "tram")


def test_a_csv_file_with_groups_splits_and_paths_of_both_kinds(tmp_path, write):
    inside, outside = write(tmp_path / "lists" / "a.png"), write(tmp_path / "other" / "b.png")
    table = tmp_path / "lists" / "photos.csv"
    table.write_text(f'\ufeffPath,label,group,split\n"a.png",x,anna,train\n{outside},y,,TEST\n', encoding="utf-8")
    table_rows = table.read_text(encoding="utf-8") + "../other/c.png,y,ben,\n../other/d.png,y,ben,train\n"
    table.write_text(table_rows, encoding="utf-8")
    write(tmp_path / "other" / "c.png")
    write(tmp_path / "other" / "d.png")
    source = open_source(str(table))
    assert source.root == tmp_path
    got = {item.id: (item.label, item.group, item.split) for item in source.items}
    assert got["lists/a.png"] == ("x", "anna", "train")
    assert got["other/b.png"] == ("y", "", "test")
    assert got["other/c.png"] == ("y", "ben", "")
    assert source.items[0].path == inside


def test_ids_of_a_csv_are_relative_to_its_folder_wherever_the_command_runs(tmp_path, write, monkeypatch):
    for name in ("a.png", "b.png"):
        write(tmp_path / "set" / name)
    (tmp_path / "set" / "list.csv").write_text("path,label\na.png,x\nb.png,y\n")
    expected = ["a.png", "b.png"]
    for folder, data in ((tmp_path, "set/list.csv"), (tmp_path / "set", "list.csv"), (tmp_path / "set", "./list.csv")):
        monkeypatch.chdir(folder)
        source = open_source(data)
        assert [item.id for item in source.items] == expected
        assert all(item.path.is_file() for item in source.items)


def test_leftovers_of_other_programs_are_ignored_and_other_files_are_listed(tmp_path, write):
    for label in ("cat", "dog"):
        write(tmp_path / label / "1.png")
    for name in (".DS_Store", "cat/Thumbs.db", "cat/._1.png", "__MACOSX/cat/1.png", ".git/x.png", "cat/desktop.ini"):
        write(tmp_path / name)
    (tmp_path / "cat" / "notes.txt").write_text("x")
    (tmp_path / "dog" / "IMG_1.HEIC").write_bytes(b"x")
    (tmp_path / "dog" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    write(tmp_path / "stray.png")
    source = open_source(str(tmp_path))
    assert [item.id for item in source.items] == ["cat/1.png", "dog/1.png"]
    assert {Path(path).name: reason for path, reason in source.skipped} == {
        "notes.txt": "not an image file",
        "IMG_1.HEIC": f"{sources.UNSUPPORTED} (.heic)",
        "gone.jpg": sources.BROKEN_LINK,
        "stray.png": "image outside the class folders",
    }


def test_what_lies_beside_the_splits_and_deeper_than_the_classes_is_listed(tmp_path, write):
    for name in ("train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/dog/1.png", "loose.jpg"):
        write(tmp_path / name)
    for name in (
        "train/cat/raw/2.HEIC",
        "train/cat/raw/2023/3.heic",
        "train/cat/raw/.hidden/4.heic",
        "test/dog/raw/x.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "train/cat/raw/loop").symlink_to(tmp_path / "train/cat/raw")
    source = open_source(str(tmp_path))
    assert len(source.items) == 4
    assert {Path(path).relative_to(tmp_path).as_posix(): reason for path, reason in source.skipped} == {
        "loose.jpg": sources.OUTSIDE,
        "train/cat/raw/2.HEIC": f"{sources.UNSUPPORTED} (.heic)",
        "train/cat/raw/2023/3.heic": f"{sources.UNSUPPORTED} (.heic)",
        "train/cat/raw/loop": "link to a folder inside a class folder",
        "test/dog/raw/x.txt": "not an image file",
    }


def test_a_class_of_rows_without_a_split_is_learned(tmp_path, write):
    rows = ["a.png,x,train", "b.png,y,", "c.png,y,test"]
    for name in "abc":
        write(tmp_path / f"{name}.png")
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    assert len(open_source(str(tmp_path / "list.csv")).items) == 3


def test_files_below_a_folder_are_found_through_links_and_once_each(tmp_path, write):
    for name in ("photos/a/1.png", "photos/a/b/2.png", "photos/.trash/3.png", "photos/__MACOSX/4.png", "store/5.png"):
        write(tmp_path / name)
    photos = tmp_path / "photos"
    (photos / "linked").symlink_to(tmp_path / "store")
    (photos / "again").symlink_to(tmp_path / "store")
    (photos / "a" / "loop").symlink_to(photos)
    (photos / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found = [path.relative_to(photos).as_posix() for path in sources.files_below(photos)]
    assert found == ["a/1.png", "a/b/2.png", "again/5.png"]


def test_non_ascii_names_become_nfc_ids_and_collisions_are_refused(tmp_path, write):
    decomposed = unicodedata.normalize("NFD", "grün")
    write(tmp_path / decomposed / "größe.png")
    write(tmp_path / "赤" / "1.png")
    source = open_source(str(tmp_path))
    assert [item.id for item in source.items] == ["grün/größe.png", "赤/1.png"]
    assert source.class_names == ("grün", "赤")
    assert all(item.path.is_file() for item in source.items)
    write(tmp_path / "grün" / "größe.png")
    with pytest.raises(DataError, match="same name once Unicode is normalised"):
        open_source(str(tmp_path))


def test_a_name_that_is_no_utf8_is_listed_not_fatal(tmp_path, write):
    for label in ("cat", "dog"):
        write(tmp_path / label / "1.png")
    write(tmp_path / "cat" / os.fsdecode(b"\xff.png"))
    source = open_source(str(tmp_path))
    assert len(source.items) == 2
    assert source.skipped[0][1] == sources.NOT_UTF8
    source.skipped[0][0].encode()


def test_symbolic_links_are_followed_and_loops_end(tmp_path, write):
    write(tmp_path / "store" / "1.png")
    for label in ("cat", "dog"):
        (tmp_path / "data" / label).mkdir(parents=True)
        (tmp_path / "data" / label / "1.png").symlink_to(tmp_path / "store" / "1.png")
    (tmp_path / "data" / "cat" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "self").symlink_to("self")
    (tmp_path / "data" / "bird").symlink_to(tmp_path / "store")
    source = open_source(str(tmp_path / "data"))
    assert [item.id for item in source.items] == ["bird/1.png", "cat/1.png", "dog/1.png"]
    assert "symbolic link to a folder above it" in {reason for _, reason in source.skipped}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["1.png", "2.png"], "lie right in the folder"),
        (["cat/1.png"], "expected at least two classes"),
        (["photos/cat/1.png", "photos/dog/1.png"], "give --data .*photos"),
        (["cat/tabby/1.png", "cat/2.png", "dog/1.png"], "class folders are nested"),
        (["train/1.png", "train/2.png", "test/1.png"], "expected class folders"),
        (["test/cat/1.png", "val/cat/1.png"], "no train folder"),
        (["train/cat/1.png", "train/dog/1.png", "test/bird/1.png"], "'bird' is in test and not in train"),
        (["train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "valid/cat/1.png"], "two folders for split val"),
        ([], "no images and no class folders"),
    ],
)
def test_usual_mistakes_of_layout_are_told_apart(tmp_path, write, files, message):
    for name in files:
        write(tmp_path / name)
    with pytest.raises(DataError, match=message) as error:
        open_source(str(tmp_path))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "missing 'path', 'label'"),
        ("file,label\na.png,x\n", "line 1: columns missing 'path'; unknown 'file'"),
        ("path,label,grp\na.png,x,1\n", "unknown 'grp'"),
        ("path;label\na.png;x\n", "separated by ';'"),
        ("path,label,label\na.png,x,y\n", "repeated 'label'"),
        ("path,label\n", "no rows below the header"),
        ("path,label\na.png,x\nb.png,\n", "line 3: the label of 'b.png' is empty"),
        ("path,label\n ,x\n", "line 2: the path is empty"),
        ("path,label\na.png,x\nmissing.png,y\n", "line 3: 'missing.png': no such file"),
        ("path,label\nsub\\a.png,x\n", "write folders with '/'"),
        ("path,label\na.png,x\n./a.png,y\n", "line 3: './a.png' stands on line 2 already"),
        ("path,label,split\na.png,x,training\n", "line 2: split 'training', expected train, val, test"),
        ("path,label\na.png,x,1\n", "line 2: 3 columns, the header has 2"),
        ("path,label\na.png,x\nb.png,x\n", "expected at least two classes"),
        (
            "path,label\na.png,x\nb.png,caf\u00a0noir\n",
            "U+00A0 in it, expected 1 to 1000 printable characters; rename it",
        ),
        ('path,label\na.png,x\nb.png,"y\nz"\n', "class 'y\\nz': U+000A in it"),
        ('path,label,group\na.png,x,1\nb.png,y,"g\r1"\n', "group 'g\\r1': a carriage return in the name; rename it"),
        (f"path,label\na.png,x\nb.png,{'y' * 1001}\n", "1001 characters, expected 1 to 1000"),
        ('path,label\n"a.png,x\n', "not a CSV file"),
        ("path,label,split\na.png,x,train\nb.png,y,test\n", "'y' is in test and not in train"),
    ],
)
def test_a_wrong_csv_file_is_named_by_line(tmp_path, write, text, message):
    for name in ("a.png", "b.png"):
        write(tmp_path / name)
    table = tmp_path / "list.csv"
    table.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as error:
        open_source(str(table))
    assert message in str(error.value)
    assert "list.csv" in str(error.value) or str(tmp_path) in str(error.value)


def test_a_csv_file_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "list.csv").write_bytes("path,label\nä.png,x\n".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        open_source(str(tmp_path / "list.csv"))


def test_what_does_not_exist_is_wrong_usage_and_names_the_built_in_sets(tmp_path):
    with pytest.raises(UsageError, match="fashion-mnist"):
        open_source(str(tmp_path / "nothing"))
    (tmp_path / "data.zip").write_bytes(b"x")
    with pytest.raises(DataError, match=r"neither a folder nor a \.csv or \.tar file"):
        open_source(str(tmp_path / "data.zip"))


# ---- ELPV ----


@pytest.mark.parametrize(
    ("four", "labels"),
    [
        (False, ["functional", "functional", "defective", "defective"]),
        (True, ["functional", "probably-functional", "probably-defective", "defective"]),
    ],
)
def test_elpv_labels_follow_the_probability_and_the_cell_type_is_a_stratum(tmp_path, four, labels):
    third = "0.3333333333333333"
    (tmp_path / "labels.csv").write_text(
        f"images/1.png  0.0  mono\nimages/2.png {third} poly\nimages/3.png 0.6666666666666666 poly\nimages/4.png 1.0 mono\n\n"
    )
    source = sources.read_elpv(tmp_path, four_classes=four)
    assert [item.label for item in source.items] == labels
    assert [item.stratum for item in source.items] == ["mono", "poly", "poly", "mono"]
    assert source.items[0].path == tmp_path / "images/1.png"
    (tmp_path / "labels.csv").write_text("images/1.png 0.0 mono\nimages/2.png 0.5 poly\n")
    with pytest.raises(DataError, match="line 2"):
        sources.read_elpv(tmp_path)


def test_elpv_opens_without_importing_its_package_or_says_how_to_get_it(monkeypatch):
    pytest.importorskip("elpv_dataset")
    source = open_source("elpv")
    assert len(source.items) == 2624
    assert sum(item.label == "defective" for item in source.items) == 821
    assert all(item.path.is_file() for item in source.items)
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install elpv-dataset"):
        open_source("elpv-4class")


def test_sources_and_manifest_import_neither_torch_nor_sklearn_nor_pillow():
    code = "import sys, edgedistill.data.sources, edgedistill.data.manifest, edgedistill.metrics; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "sklearn", "scipy", "PIL", "albumentations", "matplotlib", "pandas"} & set(loaded)


# ---- Fashion-MNIST ----


@pytest.fixture
def idx(tmp_path):
    """idx(gzipped): a folder with the four IDX files of a tiny Fashion-MNIST."""

    def make(gzipped: bool = True) -> Path:
        folder = tmp_path / "idx"
        folder.mkdir()
        rng = np.random.default_rng(0)
        for prefix, count in (("train", 20), ("t10k", 10)):
            images = rng.integers(0, 255, (count, 28, 28), dtype=np.uint8)
            labels = (np.arange(count) % 10).astype(np.uint8)
            for name, array in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
                header = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
                body = header + array.tobytes()
                path = folder / f"{prefix}-{name}{'.gz' if gzipped else ''}"
                path.write_bytes(gzip.compress(body) if gzipped else body)
        return folder

    return make


@pytest.mark.parametrize("gzipped", [True, False])
def test_fashion_mnist_is_unpacked_once_with_its_official_split(tmp_path, idx, gzipped, monkeypatch):
    folder, cache = idx(gzipped), tmp_path / "cache"
    monkeypatch.setenv("EDGEDISTILL_CACHE", str(cache))
    source = open_source(f"fashion-mnist:{folder}")
    assert len(source.items) == 30
    assert source.items[1].id == "test/00001.png"
    assert {item.split for item in source.items} == {"train", "test"}
    assert set(source.class_names) == set(CLASSES)
    assert "T-shirt-top" in CLASSES
    assert not any("/" in name for name in CLASSES)
    pixels = cv2.imread(str(source.items[0].path), cv2.IMREAD_UNCHANGED)
    assert pixels.shape == (28, 28)
    times = {item.path: item.path.stat().st_mtime_ns for item in source.items}
    again = open_source(f"fashion-mnist:{folder}", cache=cache)
    assert again.items == source.items
    assert {item.path: item.path.stat().st_mtime_ns for item in again.items} == times
    assert [path.name[0] for path in cache.iterdir()] != ["."]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("train-images-idx3-ubyte", lambda body: b"\0\0\x08\x01" + body[4:], "magic number"),
        ("train-images-idx3-ubyte", lambda body: body[:-1], "expected 15680"),
        ("train-images-idx3-ubyte", lambda body: body + b"x", "more than 15680"),
        ("train-images-idx3-ubyte", lambda body: body[:9], "magic number"),
        ("train-images-idx3-ubyte", lambda body: body[:4] + b"\xff" * 12 + body[16:], "bytes after the header"),
        ("t10k-labels-idx1-ubyte", lambda body: body[:-1] + b"\x0a", "one of 0..9"),
        ("t10k-labels-idx1-ubyte", lambda body: b"\0\0\x08\x01\0\0\0\x03" + body[8:11], "3 labels"),
        ("train-labels-idx1-ubyte", lambda body: b"", "magic number nothing"),
    ],
)
def test_damaged_idx_files_are_named_and_leave_nothing_behind(tmp_path, idx, file, change, message):
    folder, cache = idx(gzipped=False), tmp_path / "cache"
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    with pytest.raises(DataError, match=message) as error:
        open_source(f"fashion-mnist:{folder}", cache=cache)
    assert file in str(error.value)
    assert list(cache.iterdir()) == []


def test_damaged_compression_and_missing_idx_files_are_named(tmp_path, idx):
    folder = idx()
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: damaged"):
        open_source(f"fashion-mnist:{folder}", cache=tmp_path / "cache")
    path.unlink()
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        open_source(f"fashion-mnist:{folder}", cache=tmp_path / "cache")


def test_what_a_killed_process_left_in_the_cache_is_removed_and_what_others_write_is_not(tmp_path, idx):
    folder, cache = idx(), tmp_path / "cache"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    name = f".fashion-mnist-0123456789abcdef.{artifacts.OWNER}"
    left, held = cache / f"{name}.{gone.pid}.abc", cache / f"{name}.{gone.pid}.def"
    other, mine = cache / f".fashion-mnist-0.elsewhere.{gone.pid}.abc", cache / f"{name}.{os.getpid()}.abc"
    for path in (left, held, other, mine):
        (path / "train").mkdir(parents=True)
    handle = os.open(held, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # a process of another container, which is not seen here
    open_source(f"fashion-mnist:{folder}", cache=cache)
    assert [path.exists() for path in (left, held, other, mine)] == [False, True, True, True]
    os.close(handle)
    open_source(f"fashion-mnist:{folder}", cache=cache)
    assert not held.exists()


def test_a_killed_unpacking_is_swept_by_the_next(tmp_path, idx):
    folder, cache = idx(), tmp_path / "cache"
    code = (
        "import os, sys; from pathlib import Path; from edgedistill.data import fashion_mnist\n"
        "fashion_mnist._write_split = lambda *a: os._exit(9)\n"
        "fashion_mnist.unpack(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    assert subprocess.run([sys.executable, "-c", code, folder, cache]).returncode == 9
    assert len(list(cache.iterdir())) == 1
    open_source(f"fashion-mnist:{folder}", cache=cache)
    assert [path.name[0] for path in cache.iterdir()] == ["f"]


def test_a_cache_that_cannot_be_written_names_the_way_out(tmp_path, idx):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="EDGEDISTILL_CACHE"):
        open_source(f"fashion-mnist:{idx()}", cache=tmp_path / "file" / "cache")


def test_a_full_disk_leaves_no_half_written_cache(tmp_path, idx, monkeypatch):
    folder, cache, written = idx(), tmp_path / "cache", []

    def write_bytes(self, data):
        written.append(self)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        with self.open("wb") as file:
            return file.write(data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(DataError, match="the disk is full"):
        open_source(f"fashion-mnist:{folder}", cache=cache)
    assert list(cache.iterdir()) == []
    monkeypatch.undo()
    assert len(open_source(f"fashion-mnist:{folder}", cache=cache).items) == 30
