"""edgedistill-classify and edgedistill-bench: the outputs of `edgedistill predict` and `bench-fps`, without Python."""

from __future__ import annotations

import csv
import json
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgedistill.artifacts import read_json
from edgedistill.benchmarks.bench_fps import BENCH_FORMAT, BenchSettings, bench_fps
from edgedistill.benchmarks.machine import artifact_hash
from edgedistill.benchmarks.target import Target
from edgedistill.export.certificate import CERTIFICATE_FORMAT
from edgedistill.export.export import certify_test
from edgedistill.runtime import Classifier
from edgedistill.runtime.network import usable_cores

pytestmark = [pytest.mark.cpp, pytest.mark.timeout(600)]
Run = Callable[..., subprocess.CompletedProcess[str]]
FILES = 100  # that a program may have open


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEDISTILL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def classify(cpp_program: Callable[[str], Path], test_models: Path) -> Run:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(cpp_program("edgedistill-classify")), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=test_models, timeout=120)

    return run


@pytest.fixture
def both(classify: Run, test_models: Path, cli: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple]:
    """The same arguments to the C++ program and to `edgedistill predict`."""

    def run(*arguments: str) -> tuple[subprocess.CompletedProcess[str], subprocess.CompletedProcess[str]]:
        monkeypatch.chdir(test_models)
        return classify(*arguments), cli("predict", *arguments, check=False)

    return run


@pytest.mark.parametrize("options", [(), ("--top-k", "2"), ("--decode", "full")], ids=" ".join)
def test_lines_are_predicts(both: Callable[..., tuple], options: tuple[str, ...]) -> None:
    ours, python = both("single", "photos", "./photos//red.jpg", *options)
    assert ours.returncode == python.returncode == 1, "a damaged image makes the exit code 1"
    assert ours.stdout == python.stdout
    assert "photos/broken.jpg\terror: photos/broken.jpg: damaged" in ours.stdout
    assert len(ours.stdout.splitlines()) == 8


@pytest.mark.parametrize("model", ["multi_label", "heads", "heads_many"])
def test_several_labels_and_heads_are_said_alike(both: Callable[..., tuple], model: str) -> None:
    ours, python = both(model, "photos")
    assert (ours.returncode, ours.stdout) == (python.returncode, python.stdout)
    assert {"multi_label": "red ", "heads": "hue=red ", "heads_many": "hues=green "}[model] in ours.stdout
    assert ("blueness=" in ours.stdout) == (model != "multi_label")
    ours, python = both(model, "photos", "--top-k", "2")
    assert (ours.returncode, ours.stdout) == (python.returncode, python.stdout)
    assert all(line.count("hue") == 2 for line in ours.stdout.splitlines() if model == "heads" and "error" not in line)
    ours, python = both(model, "photos", "--json", "--latency")[0], both(model, "photos", "--json")[1]
    for one, other in zip(ours.stdout.splitlines(), python.stdout.splitlines(), strict=True):
        found, expected = json.loads(one), json.loads(other)
        assert found.get("labels") == expected.get("labels")
        for share, wanted in zip(found.get("probabilities", []), expected.get("probabilities", []), strict=True):
            assert (share is None) == (wanted is None) and (share is None or abs(share - wanted) < 1e-6)


@pytest.mark.parametrize("model", ["heads", "heads_many"])
def test_outputs_of_heads_come_back_exactly(classify: Run, test_models: Path, model: str) -> None:
    classifier = Classifier(test_models / model, cache_dir=False)
    for line in map(json.loads, classify(model, "photos", "--probabilities").stdout.splitlines()):
        if "error" not in line:
            expected = classifier.classify(test_models / line["image"])
            assert (line["label"], line["index"]) == (expected.label, expected.index)
            np.testing.assert_allclose(line["probabilities"], expected.probabilities, rtol=1e-5, atol=1e-6)


def test_json_lines_are_predicts(both: Callable[..., tuple]) -> None:
    ours, python = both("single", "photos", "--json", "--top-k", "3")
    found, expected = ([json.loads(line) for line in one.stdout.splitlines()] for one in (ours, python))
    assert [list(one) for one in found] == [list(one) for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["image"] == other["image"] and one.get("labels") == other.get("labels")
        np.testing.assert_allclose(one.get("probabilities", []), other.get("probabilities", []), atol=1e-6)


def test_the_csv_is_predicts(classify: Run, cli: Run, test_models: Path, tmp_path: Path) -> None:
    awkward = tmp_path / 'a, "b"'
    shutil.copytree(test_models / "photos", awkward)
    done = classify("single", str(awkward), "--csv", str(tmp_path / "ours.csv"), "--top-k", "2")
    assert (done.returncode, done.stdout.strip()) == (1, str(tmp_path / "ours.csv"))
    cli("predict", test_models / "single", awkward, "--csv", tmp_path / "python.csv", "--top-k", "2", check=False)
    tables = []
    for name in ("ours.csv", "python.csv"):
        with (tmp_path / name).open(newline="", encoding="utf-8") as file:
            tables.append(list(csv.reader(file)))
    assert [row[:3] for row in tables[0]] == [row[:3] for row in tables[1]]
    assert (tmp_path / "ours.csv").read_bytes().count(b"\r\n") == 8


def test_one_image_at_a_time_answers_the_same(classify: Run) -> None:
    assert classify("single", "photos", "--latency").stdout == classify("single", "photos").stdout


def test_probabilities_come_back_exactly(classify: Run, test_models: Path) -> None:
    lines = [json.loads(line) for line in classify("single", "photos", "--probabilities").stdout.splitlines()]
    classifier = Classifier(test_models / "single", cache_dir=False)
    for line in lines:
        if "error" in line:
            continue
        expected = classifier.classify(test_models / line["image"])
        assert (line["label"], line["index"]) == (expected.label, expected.index)
        found = np.array(line["probabilities"])
        assert [float(f"{np.float32(value):.9g}") for value in found] == found.tolist(), "not nine digits of a float"
        np.testing.assert_allclose(found, expected.probabilities, atol=1e-6)
    assert len(lines) == 7


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("single",),
        ("single", "photos", "--top-k", "0"),
        ("single", "photos", "--precision", "f16"),
        ("single", "photos", "--decode", "half"),
        ("single", "photos", "--colour"),
        ("single", "photos", "--latency", "--streams", "2"),
        ("single", "photos", "--probabilities", "--csv", "x.csv"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(classify: Run, arguments: tuple[str, ...]) -> None:
    done = classify(*arguments)
    assert done.returncode == 2 and done.stdout == "" and done.stderr


def test_a_video_needs_a_program_that_was_built_for_it(classify: Run, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"not a video")
    done = classify("single", str(tmp_path / "clip.mp4"))
    if done.returncode == 2:
        assert "-DEDGEDISTILL_VIDEO=ON" in done.stderr
    else:
        assert done.returncode == 1 and "not a video" in done.stderr


@pytest.fixture
def clip(test_models: Path, tmp_path: Path) -> Path:
    """Six frames of 64x48, red and green in turns, as Motion JPEG."""
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    pictures = [cv2.imread(str(test_models / "photos" / name)) for name in ("red.jpg", "green.png")]
    for picture in pictures * 3:
        writer.write(cv2.resize(picture, (64, 48)))
    writer.release()
    return path


@pytest.mark.parametrize("options", [(), ("--latency",), ("--streams", "2")], ids=" ".join)
def test_every_frame_of_a_video_is_answered_as_in_python(
    classify: Run, cli: Run, test_models: Path, clip: Path, options: tuple[str, ...]
) -> None:
    ours = classify("single", str(clip), "--json", *options)
    if ours.returncode == 2 and "-DEDGEDISTILL_VIDEO=ON" in ours.stderr:
        pytest.skip("edgedistill-classify was built without videos; configure with -DEDGEDISTILL_VIDEO=ON")
    python = cli("predict", test_models / "single", clip, "--json")
    assert ours.returncode == python.returncode == 0, ours.stderr
    found, expected = ([json.loads(line) for line in one.stdout.splitlines()] for one in (ours, python))
    assert [one["image"] for one in found] == [f"{clip}#{number}" for number in range(6)]
    assert [one["labels"] for one in found] == [one["labels"] for one in expected] == [["red"], ["green"]] * 3
    # Debian's OpenCV and pip's decode with different libraries.
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one["probabilities"], other["probabilities"], atol=0.02)


def test_what_is_missing_is_told_after_what_was_there(classify: Run, tmp_path: Path) -> None:
    done = classify("single", "photos/red.jpg", "missing.jpg", "photos/green.png")
    assert (done.returncode, done.stdout) == (1, "photos/red.jpg\tred 0.9702\n")
    assert "error: missing.jpg: no such file or folder" in done.stderr
    assert "no images in it" in classify("single", str(tmp_path)).stderr
    assert classify("nothing", "photos").returncode == 1


def test_a_folder_that_cannot_be_searched_to_the_bottom_is_an_error(
    cpp_program: Callable[[str], Path], test_models: Path, tmp_path: Path
) -> None:
    """Every folder on the way down costs a file descriptor."""
    (tmp_path / "/".join("d" * FILES)).mkdir(parents=True)
    shutil.copyfile(test_models / "photos" / "red.jpg", tmp_path / "red.jpg")
    command = [str(cpp_program("edgedistill-classify")), str(test_models / "single"), str(tmp_path)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES)),
    )
    assert done.returncode == 1, done.stdout
    assert f"error: {tmp_path}: cannot be searched to the bottom (Too many open files)" in done.stderr


def test_a_csv_is_whole_or_absent(classify: Run, tmp_path: Path) -> None:
    assert classify("single", "photos/red.jpg", "missing.jpg", "--csv", str(tmp_path / "a.csv")).returncode == 1
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    done = classify("single", "photos", "--csv", str(tmp_path / "file" / "a.csv"))
    assert done.returncode == 1 and "cannot be written" in done.stderr


def said_to_a_full_disk(*command: str) -> tuple[int, str]:
    """(exit code, standard error) of a program whose standard output takes nothing."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    return done.returncode, done.stderr


@pytest.mark.parametrize("options", [(), ("--latency",), ("--json", "--csv")], ids=" ".join)
def test_answers_that_cannot_be_written_are_an_error(
    cpp_program: Callable[[str], Path], test_models: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    whole = [str(tmp_path / "whole.csv")] if "--csv" in options else []
    photo = str(test_models / "photos" / "red.jpg")
    program = str(cpp_program("edgedistill-classify"))
    code, message = said_to_a_full_disk(program, str(test_models / "single"), photo, *options, *whole)
    assert code == 1 and message.startswith("error: standard output: cannot be written (No space left on device)")


@pytest.mark.parametrize("options", [(), ("--json",)], ids=" ".join)
def test_a_bench_that_cannot_be_written_is_an_error(
    cpp_program: Callable[[str], Path], test_models: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    photo, out = str(test_models / "photos" / "red.jpg"), str(tmp_path / "bench.json")
    quick = ("--rounds", "1", "--seconds", "0.05", "--scope", "model", "--precision", "f32", "--out", out)
    command = (str(cpp_program("edgedistill-bench")), str(test_models / "single"), photo)
    code, message = said_to_a_full_disk(*command, *quick, *options)
    assert code == 1 and "error: standard output: cannot be written (No space left on device)" in message
    assert read_json(Path(out), format=BENCH_FORMAT)["results"]


def test_inputs_of_one_name_are_told_apart(
    cpp_program: Callable[[str], Path], test_models: Path, tmp_path: Path
) -> None:
    for number, name in enumerate(("red.jpg", "large.jpg", "red.jpg", "red.jpg")):
        (tmp_path / str(number) / "val").mkdir(parents=True)
        shutil.copyfile(test_models / "photos" / name, tmp_path / str(number) / "val" / "photo.jpg")
    folders = [str(tmp_path / str(number) / "val") for number in range(4)]
    quick = ["--rounds", "1", "--seconds", "0.05", "--scope", "files", "--precision", "f32"]
    out = tmp_path / "bench.json"
    command = [str(cpp_program("edgedistill-bench")), str(test_models / "single"), *folders, *quick, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    inputs = [row["input"] for row in read_json(out, format=BENCH_FORMAT)["results"] if row["mode"] == "latency"]
    red = "val 56x40 JPEG"
    assert inputs == [red, "val 1920x1281 JPEG", f"{red} (2)", f"{red} (3)"]


def test_the_bench_writes_bench_fps_record(
    cpp_program: Callable[[str], Path], test_models: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(test_models / "single", tmp_path / "openvino")
    photos = test_models / "photos"
    command = [str(cpp_program("edgedistill-bench")), str(copy), str(photos / "large.jpg"), str(photos)]
    quick = ["--rounds", "2", "--seconds", "0.05", "--precision", "f32"]
    done = subprocess.run([*command, *quick], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "broken.jpg" in done.stderr and "left out" in done.stderr
    record = read_json(copy / "bench-cpp.json", format=BENCH_FORMAT)
    target = Target.open(copy)
    assert record["artifact"]["sha256"] == artifact_hash(target.files)
    assert record["artifact"]["models"] == target.sha256
    rows = {(row["scope"], row["mode"], row["input"]) for row in record["results"]}
    photographs = {"large.jpg 1920x1281 JPEG", "photos, 6 images, 5 sizes"}
    inputs = {"model": {"32x32 tensor"}, "frames": photographs, "files": photographs}
    assert rows == {(s, m, i) for s, names in inputs.items() for i in names for m in ("latency", "throughput")}
    for row in record["results"]:
        assert 0 < row["fps"]["min"] <= row["fps"]["median"] <= row["fps"]["max"] and len(row["fps"]["rounds"]) == 2
        assert (row["latency_ms"] is None) == (row["mode"] == "throughput")
    for title in ("model: 32x32 tensor", "files: large.jpg 1920x1281 JPEG"):
        assert title in done.stdout


def test_bench_fps_measures_it_in_the_same_rounds(
    cpp_program: Callable[[str], Path], test_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEDISTILL_CPP_BIN", str(cpp_program("edgedistill-bench").parent))
    for name in ("single", "cascade"):
        settings = BenchSettings(
            path=test_models / name,
            vs=("edgedistill-cpp",),
            images=(str(test_models / "photos" / "large.jpg"),),
            precisions=("f32",),
            rounds=2,
            seconds=0.05,
            out=tmp_path / "bench.json",
        )
        record = bench_fps(settings).record
        assert record["not_measured"] == []
        assert not [one for one in record["warnings"] if "otherwise" in one], "C++ and Python answer differently"
        rows = [row for row in record["results"] if row["candidate"] == "edgedistill-cpp"]
        assert len(rows) == 6


def test_it_is_measured_with_the_threads_that_are_deployed(
    cpp_program: Callable[[str], Path], test_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEDISTILL_CPP_BIN", str(cpp_program("edgedistill-bench").parent))
    copy, cores = shutil.copytree(test_models / "single", tmp_path / "openvino"), usable_cores()
    values = json.loads((copy / "deploy.json").read_text())
    values["latency"]["threads"] = 1
    values["throughput"] |= {"streams": 1, "threads": cores}
    (copy / "deploy.json").write_text(json.dumps(values))
    photo, out = str(test_models / "photos" / "red.jpg"), tmp_path / "bench.json"
    settings = BenchSettings(
        copy, vs=("edgedistill-cpp",), images=(photo,), precisions=("f32",), rounds=1, seconds=0.05, out=out
    )
    rows = [row for row in bench_fps(settings).record["results"] if row["candidate"].startswith("edgedistill")]
    assert len(rows) == 12
    for row in rows:
        expected = (1, 1) if row["mode"] == "latency" else (cores, 1)
        assert (row["settings"]["threads"], row["settings"]["streams"]) == expected, row


def test_stages_of_unlike_precisions_are_measured_as_they_are_deployed(
    cpp_program: Callable[[str], Path], test_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(test_models / "cascade", tmp_path / "openvino")
    values = json.loads((copy / "deploy.json").read_text())
    for stage in values["stages"]:
        for suffix in (".xml", ".bin"):
            model = (copy / stage["model"]).with_suffix(suffix)
            shutil.copyfile(model, model.with_name(f"model-int8{suffix}"))
        stage["int8_sha256"] = stage["sha256"]
    for mode in ("latency", "throughput"):
        values[mode] |= {"precision": "int8", "later_precision": "f32"}
    (copy / "deploy.json").write_text(json.dumps(values))
    photo = str(test_models / "photos" / "large.jpg")
    command = [str(cpp_program("edgedistill-bench")), str(copy), photo, "--rounds", "2", "--seconds", "0.05"]
    done = subprocess.run([*command, "--scope", "model,files"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "int8+f32" in done.stdout, done.stderr
    rows = read_json(copy / "bench-cpp.json", format=BENCH_FORMAT)["results"]
    mixed = [row for row in rows if row["precision"] == "int8+f32"]
    assert [(row["scope"], row["mode"]) for row in mixed] == [("files", "latency"), ("files", "throughput")]
    assert all(row["settings"]["stage_precisions"] == ["int8", "f32"] for row in mixed)
    monkeypatch.setenv("EDGEDISTILL_CPP_BIN", str(cpp_program("edgedistill-bench").parent))
    settings = BenchSettings(copy, ("files",), ("edgedistill-cpp",), (photo,), rounds=2, seconds=0.05)
    record = bench_fps(settings).record
    assert record["not_measured"] == []
    assert not [one for one in record["warnings"] if "otherwise" in one], "C++ and Python answer differently"
    both = {(row["candidate"], row["mode"]) for row in record["results"] if row["precision"] == "int8+f32"}
    assert both == {(name, mode) for name in ("edgedistill", "edgedistill-cpp") for mode in ("latency", "throughput")}


def test_the_certificate_has_its_columns(
    cpp_program: Callable[[str], Path], tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEDISTILL_CPP_BIN", str(cpp_program("edgedistill-classify").parent))
    run = shutil.copytree(tiny_run, tmp_path / "run")
    certificate = read_json(certify_test(run / "model.pt", run / "openvino"), format=CERTIFICATE_FORMAT)
    columns = {column["name"]: column for column in certificate["columns"]}
    assert certificate["verdict"] == "pass" and certificate["not_run"] == []
    for form in ("files", "frames"):
        ours, python = columns[f"cpp-runtime-{form}"], columns[f"python-runtime-{form}"]
        assert (ours["top1"], ours["disagreement"]) == (python["top1"], python["disagreement"])
        assert ours["max_probability_difference"] < 1e-4
