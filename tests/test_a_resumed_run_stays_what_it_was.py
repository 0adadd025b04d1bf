"""--resume with other wishes: refused before anything is trained or written, and other data are noticed."""

import csv
import json
import shutil

import numpy as np
import pytest

from edgedistill.artifacts import RunDir, sha256_file


@pytest.fixture(scope="module")
def listed(photos, tmp_path_factory):
    """The photographs as a CSV, to which rows can be added."""
    path = tmp_path_factory.mktemp("listed") / "photos.csv"
    images = sorted(file for file in photos.rglob("*") if file.is_file())
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        writer.writerows([str(image), image.parent.name] for image in images)
    return path


@pytest.fixture(scope="module")
def run(listed, tmp_path_factory, cli, tiny_options):
    """Two architectures that vote, and a student."""
    out = tmp_path_factory.mktemp("resumed") / "run"
    options = [option.replace("mbv3s050", "mbv3s050,test_efficientnet", 1) for option in tiny_options[:2]]
    options = [*options, *tiny_options[2:], "--no-baseline"]
    cli("distill", "--data", listed, "--out", out, *options)
    return RunDir(out), options


def files_of(run):
    return {path: sha256_file(path) for path in run.root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["--hard-loss", "focal", "--focal-gamma", "5"], "model.pt: made with focal_gamma=2.0 (now 5.0)"),
        (["--teacher-lr", "0.5"], "fold.json: made with lr="),
        (["--teacher-blend", "0.9,0.1"], "soft_labels/meta.json: made with --teacher-blend oof (now 0.9,0.1)"),
        (["--soft-label-store", "float16"], "made with --soft-label-store float32 (now float16)"),
        (["--teacher", "mbv3s050"], "made with --teacher mbv3s050,test_efficientnet (now one network)"),
        (["--teacher", "mbv3s050,test_efficientnet@40"], "now mbv3s050,test_efficientnet-40"),
    ],
)
def test_other_wishes_are_refused_before_anything_is_written(run, listed, cli, changes, told):
    folder, options = run
    before = files_of(folder)
    more = [*changes, "--resume", *(["--dry-run"] if "--soft-label-store" in changes else [])]
    result = cli("distill", "--data", listed, "--out", folder.root, *options, *more, check=False)
    assert result.returncode == 1 and told in " ".join(result.stderr.split())
    assert files_of(folder) == before


def test_teach_keeps_the_labels_that_students_have_learned_from(run, listed, cli, tiny_options):
    folder, _ = run
    before = files_of(folder)
    options = ["--teacher", "mbv3s050", "--teacher-weights", "none", "--folds", "2"]
    result = cli("teach", "--data", listed, "--out", folder.root, *options, "--resume", check=False)
    assert result.returncode == 1 and files_of(folder) == before


def test_data_without_the_runs_images_are_refused(run, cli, tmp_path, photos):
    folder, options = run
    before = files_of(folder)
    missing = cli("distill", "--data", tmp_path / "no.csv", "--out", folder.root, *options, "--resume", check=False)
    assert missing.returncode == 2 and "a run is resumed with its own data" in missing.stderr
    other = tmp_path / "other"
    for number, image in enumerate(sorted(photos.rglob("*.*"))[:40]):
        (other / image.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(image, other / image.parent.name / f"another {number}{image.suffix}")
    strange = cli("distill", "--data", other, "--out", folder.root, *options, "--resume", check=False)
    assert strange.returncode == 2 and "holds none of the images" in strange.stderr
    assert files_of(folder) == before


def test_more_images_and_other_labels_are_told(run, listed, cli, tmp_path):
    folder, options = run
    with listed.open(newline="") as file:
        rows = list(csv.reader(file))
    grown = tmp_path / "grown.csv"
    labels = sorted({row[1] for row in rows[1:]})
    rows[1][1] = next(label for label in labels if label != rows[1][1])
    extra = tmp_path / "more.png"
    shutil.copy(rows[2][0], extra)
    with grown.open("w", newline="") as file:
        csv.writer(file).writerows([*rows, [str(extra), rows[2][1]]])
    result = cli("distill", "--data", grown, "--out", folder.root, *options, "--resume")
    told = " ".join(result.stderr.split())
    assert "1 more than the run began with" in told and "gives 1 of its images another label" in told
    fewer = tmp_path / "fewer.csv"
    with fewer.open("w", newline="") as file:
        csv.writer(file).writerows(rows[:-3])
    told = cli("distill", "--data", fewer, "--out", folder.root, *options, "--resume").stderr
    assert "lacks 3 of the run's images" in " ".join(told.split())


def test_the_same_wishes_change_nothing(run, listed, cli):
    folder, options = run
    models = {path: digest for path, digest in files_of(folder).items() if path.suffix in (".pt", ".npy")}
    result = cli("distill", "--data", listed, "--out", folder.root, *options, "--resume")
    assert "stays as it was made" not in result.stderr
    assert {path: digest for path, digest in files_of(folder).items() if path.suffix in (".pt", ".npy")} == models
    assert np.isfinite(json.loads((folder.evaluation / "evaluation.json").read_text())["models"]["student"]["accuracy"])
