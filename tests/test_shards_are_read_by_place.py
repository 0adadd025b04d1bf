"""WebDataset shards: any image at any time, unpacked nowhere; hostile tars are told, and nothing leaves them."""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgedistill.benchmarks.inputs import input_sets
from edgedistill.data.checks import check_data
from edgedistill.data.deal import SplitSettings
from edgedistill.data.folds import freeze_dataset
from edgedistill.data.manifest import hash_files, read_dataset, write_dataset
from edgedistill.data.sources import open_source
from edgedistill.errors import ArtifactError, DataError, ImageError
from edgedistill.images import InputSpec, load_image
from edgedistill.shard_members import Member, member_of, read_file
from edgedistill.training.loader import open_store


def picture(number, suffix=".jpg"):
    pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return cv2.imencode(suffix, pixels)[1].tobytes()


def add(tar, name, data, **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data) if info.isreg() else None)


@pytest.fixture
def shards(tmp_path):
    """Three shards of 20 images: labels as .cls, .txt and .json, one image kind each; some groups."""
    for shard, kind in enumerate(("cls", "txt", "json")):
        with tarfile.open(tmp_path / f"part-{shard:03d}.tar", "w") as tar:
            for number in range(20):
                key, label = f"{shard}{number:04d}", ("cat", "dög")[number % 2]
                text = json.dumps({"label": label, "group": f"g{number // 4}"}) if kind == "json" else f"{label}\n"
                add(tar, f"{key}.{kind}", text.encode())
                add(
                    tar,
                    f"{key}.{'png' if shard == 1 else 'jpg'}",
                    picture(100 * shard + number, ".jpg" if shard != 1 else ".png"),
                )
    return tmp_path


def test_every_image_is_found_with_its_label(shards):
    for data in (str(shards), f"{shards}/*.tar", f"{shards}/part-00[0-2].tar"):
        source = open_source(data)
        assert len(source.items) == 60
        assert source.class_names == ("cat", "dög")
    item = next(item for item in source.items if item.id == "part-001/10003.png")
    assert item.label == "dög"
    assert read_file(item.path) == picture(103, ".png")
    assert [item.group for item in source.items if item.id.startswith("part-002/20004")] == ["g1"]
    assert len(open_source(str(shards / "part-000.tar")).items) == 20


def test_shards_go_the_whole_way(shards, tmp_path):
    source = open_source(str(shards))
    report = check_data(source, settings=SplitSettings(folds=2))
    assert not report.errors
    dataset = freeze_dataset(source, SplitSettings(folds=2), checks=report)
    assert np.array_equal(dataset.sha256, hash_files(dataset.paths))
    write_dataset(dataset, tmp_path / "run" / "dataset.csv")
    again = read_dataset(tmp_path / "run" / "dataset.csv", data_root=shards)
    assert again.hash == dataset.hash and np.array_equal(again.paths, dataset.paths)
    spec = InputSpec(height=16, width=16)
    rows = np.random.default_rng(0).permutation(len(again))[:12]
    store = open_store(again.paths[rows], spec, cache_gib=None)
    for place, row in enumerate(rows):
        assert np.array_equal(store.image(place, "full"), load_image(read_file(again.paths[row]), spec))
    assert (store.reduced_row >= 0).sum() == sum(str(again.ids[row]).endswith(".jpg") for row in rows)
    moved = shards / "moved"
    moved.mkdir()
    for path in shards.glob("*.tar"):
        path.rename(moved / path.name)
    found = read_dataset(tmp_path / "run" / "dataset.csv", data_root=moved)
    assert read_file(str(found.paths[0])) and str(moved) in str(found.paths[0])
    with pytest.raises(ArtifactError, match="60 of 60 images of the manifest are not there"):
        read_dataset(tmp_path / "run" / "dataset.csv", data_root=tmp_path / "run")


def test_the_teachers_train_from_shards(shards, tmp_path, cli, tiny_options):
    options = [*tiny_options, "--no-distillation", "--epochs", "1"]
    cli("distill", "--data", f"{shards}/part-00*.tar", "--out", tmp_path / "run", *options)
    assert (tmp_path / "run" / "model.pt").exists()
    # Export and bench-fps find the images where they lie, and programs that know files alone get files.
    cli("export-openvino", tmp_path / "run" / "model.pt", "--int8", "off", "--test-parity")
    certificate = next((tmp_path / "run" / "openvino").rglob("certificate.json"))
    assert json.loads(certificate.read_text())["n"] > 0
    (found,), origin = input_sets([], dataset=tmp_path / "run" / "dataset.csv", scratch=tmp_path / "scratch")
    assert found.name.startswith("val, ") and "val split" in origin
    rows = read_dataset(tmp_path / "run" / "dataset.csv")
    members = [path for path in rows.paths[rows.rows("val")].tolist() if Path(path).suffix == found.paths[0].suffix]
    assert found.paths[0].read_bytes() in [read_file(path) for path in members]
    assert sorted(path.name for path in shards.glob("*.tar")) == [f"part-00{n}.tar" for n in range(3)]


def test_a_path_says_where_the_bytes_are():
    member = Member("/data/a.tar", 512, 7, "x/y.jpg")
    assert member.path == "/data/a.tar!512+7/x/y.jpg"
    assert member_of(member.path) == member
    for path in ("/data/a.tar", "/data/a.tar!x/y.jpg", "photo.tar!.jpg", "a!5+5/x.jpg"):
        assert member_of(path) is None


WRONG = {
    "a link": ([("a.jpg", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})], "a.jpg'.*a link, a device"),
    "a hard link": ([("a.jpg", {"type": tarfile.LNKTYPE, "linkname": "b.jpg"})], "a link, a device"),
    "a device": ([("a.jpg", {"type": tarfile.CHRTYPE})], "a link, a device"),
    "an absolute name": ([("/etc/a.jpg", {})], "an absolute name or one that climbs out"),
    "a climbing name": ([("x/../../a.jpg", {})], "an absolute name or one that climbs out"),
    "no label": ([("a.jpg", {})], r"a.jpg: no label; expected a.cls or .txt with the class"),
    "two images": ([("a.jpg", {}), ("a.png", {}), ("a.cls", b"x")], "key 'a' has 2 images"),
    "a label alone": ([("a.cls", b"x")], "key 'a' has 0 images"),
    "bad JSON": ([("a.jpg", {}), ("a.json", b"{nonsense")], "a.json: not a label"),
    "JSON without a label": ([("a.jpg", {}), ("a.json", b'{"name": "x"}')], "a.jpg: no label"),
    "JSON with half a label": ([("a.jpg", {}), ("a.json", b'{"label": 0.5}')], "a.jpg: no label"),
    "no text": ([("a.jpg", {}), ("a.cls", b"\xff\xfe")], "a.cls: not a label"),
    "a huge label": ([("a.jpg", {}), ("a.txt", b"x" * (2 << 20))], "a label of 2097152 bytes"),
    "one class": ([("a.jpg", {}), ("a.cls", b"x")], "expected at least two classes"),
}


@pytest.mark.parametrize("what", WRONG)
def test_hostile_shards_are_named(tmp_path, what):
    members, message = WRONG[what]
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for name, value in members:
            data = value if isinstance(value, bytes) else b"" if "type" in value else picture(0)
            add(tar, name, data, **({} if isinstance(value, bytes) else value))
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path / "bad.tar"))


def test_damaged_and_compressed_shards_are_named(shards, tmp_path):
    whole = (shards / "part-000.tar").read_bytes()
    broken = tmp_path / "broken"
    broken.mkdir()
    path = broken / "part.tar"
    with tarfile.open(shards / "part-000.tar") as tar:
        last = tar.getmembers()[-1]
    for cut in (len(whole) // 3, last.offset_data + last.size // 2):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"part\.tar.*(not a whole|the shard ends before it does)"):
            open_source(str(path))
    for data in (b"", b"nonsense" * 200):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"part\.tar: not a whole, uncompressed tar file"):
            open_source(str(path))
    with tarfile.open(broken / "part.tar.gz", "w:gz") as tar:
        add(tar, "a.jpg", picture(0))
    with pytest.raises(DataError, match=r"decompress it to \.tar"):
        open_source(str(broken / "part.tar.gz"))
    with pytest.raises(DataError, match="no such shards"):
        open_source(f"{broken}/none-*.tar")


def test_a_shard_cut_or_damaged_between_two_members_is_named(shards, tmp_path):
    whole = (shards / "part-000.tar").read_bytes()
    with tarfile.open(shards / "part-000.tar") as tar:
        start = tar.getmembers()[20].offset
    path = tmp_path / "broken" / "part.tar"
    path.parent.mkdir()
    for data, message in (
        (whole[:start], r"part\.tar: it ends without the zero blocks .*head -c 1024 /dev/zero >> part\.tar"),
        (whole[: start + 100], rf"part\.tar: damaged at byte {start}"),
        (whole[:start] + b"\7" * 512 + whole[start + 512 :], rf"part\.tar: damaged at byte {start}"),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=message):
            open_source(str(path))
    path.write_bytes(whole[:start] + bytes(1024))  # as the message says
    assert len(open_source(str(path)).items) == 10


@pytest.mark.parametrize("form", ["gnu", "ustar", "posix", "v7", "oldgnu"])
def test_shards_of_gnu_tar_and_with_one_zero_block_are_whole(shards, tmp_path, form):
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(picture(number))
        (folder / f"{number}.cls").write_text(f"{number % 2}")
    path = tmp_path / "whole" / "part.tar"
    path.parent.mkdir()
    subprocess.run(["tar", f"--format={form}", "-cf", path, "-C", folder, "."], check=True)
    assert len(open_source(str(path)).items) == 4
    data = path.read_bytes().rstrip(b"\0")
    path.write_bytes(data + bytes(-len(data) % 512) + bytes(512))
    assert len(open_source(str(path)).items) == 4


def test_two_shards_of_one_name_are_refused(shards):
    (shards / "a").mkdir()
    (shards / "b").mkdir()
    for folder in "ab":
        (shards / folder / "part.tar").write_bytes((shards / "part-000.tar").read_bytes())
    with pytest.raises(DataError, match=r"two shards are called part\.tar"):
        open_source(f"{shards}/[ab]/*.tar")


def test_a_shard_that_shrinks_later_is_an_error_of_its_image(shards):
    item = open_source(str(shards)).items[-1]
    path = shards / "part-002.tar"
    path.write_bytes(path.read_bytes()[: member_of(item.path).offset + 10])
    with pytest.raises(ImageError, match=r"the shard ends before 20019\.jpg"):
        load_image(str(item.path), InputSpec(height=16, width=16))
    path.unlink()
    with pytest.raises(ImageError, match="No such file"):
        load_image(str(item.path), InputSpec(height=16, width=16))
