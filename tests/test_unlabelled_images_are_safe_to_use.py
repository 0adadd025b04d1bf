"""Unlabelled images and frames: never a test image, labelled by all teachers, filtered, and a fixed share of each batch."""

import dataclasses
import shutil
from pathlib import Path

import cv2
import mmcv
import numpy as np
import pytest
import torch

from edgedistill.artifacts import RunDir, sha256_file
from edgedistill.data import duplicates
from edgedistill.data.soft_label_store import HeldRows
from edgedistill.errors import DataError, UsageError
from edgedistill.student import StudentSettings, find_unlabelled, train_student
from edgedistill.student.live_teachers import find_teachers
from edgedistill.student.unlabelled import (
    MixedDraw,
    Unlabelled,
    choose,
    extract_frames,
    find_images,
    joined,
    label_images,
    unlabelled_targets,
    without_known,
    without_like_test,
)
from edgedistill.tasks import Head, Task
from edgedistill.training.checkpoints import read_model
from edgedistill.training.heads import scores_from
from edgedistill.training.loader import Draw
from edgedistill.training.losses import make_targets
from edgedistill.training.predict import predict_logits
from edgedistill.training.seeds import generator
from edgedistill.training.views import predict_probabilities, views_of

CPU = torch.device("cpu")
SETTINGS = StudentSettings(
    name="test_efficientnet",
    weights="none",
    image_size=32,
    epochs=1,
    extra_epochs=1,
    batch_size=8,
    workers=0,
    device="cpu",
    tensorboard=False,
    soft_weight=1.0,
    loss="kl",
    unlabelled_min_confidence=0.0,
)


@pytest.fixture(scope="module")
def hashed(tiny_dataset):
    """The data set with the true hashes of its files."""
    digests = np.array([sha256_file(path) for path in tiny_dataset.paths])
    return dataclasses.replace(tiny_dataset, sha256=digests)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten new images, one of them twice, and a video of 25 frames."""
    root = tmp_path_factory.mktemp("unlabelled")
    (root / "deep").mkdir()
    for number in range(10):
        pixels = generator(1, number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        cv2.imwrite(str(root / "deep" / f"new{number}.png"), pixels)
    shutil.copy(root / "deep" / "new3.png", root / "again.png")
    (root / "notes.txt").write_text("no image")
    writer = cv2.VideoWriter(str(root / "camera.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (48, 40))
    for number in range(25):
        writer.write(np.full((40, 48, 3), 10 * number, np.uint8))
    writer.release()
    return root


def test_images_and_every_so_many_frames_are_found(folder, tmp_path):
    paths = find_images(folder, frames=tmp_path, frame_step=10)
    frames = [path for path in paths if str(tmp_path) in path]
    assert len(paths) == 11 + 3
    means = [float(cv2.imread(path).mean()) for path in frames]
    assert means == pytest.approx([0, 100, 200], abs=3)
    times = [Path(path).stat().st_mtime_ns for path in frames]
    assert find_images(folder, frames=tmp_path, frame_step=10).tolist() == paths.tolist()
    assert times == [Path(path).stat().st_mtime_ns for path in frames]  # not written again


def test_a_recording_whose_length_was_never_written_is_read_to_its_end(folder, tmp_path, monkeypatch):
    whole = extract_frames(folder / "camera.avi", tmp_path / "whole", 10)
    monkeypatch.setattr(mmcv.VideoReader, "frame_cnt", property(lambda self: -92_000_000_000))
    found = extract_frames(folder / "camera.avi", tmp_path / "live", 10)
    assert [path.name for path in found] == [path.name for path in whole] and len(found) == 3
    assert [path.read_bytes() for path in found] == [path.read_bytes() for path in whole]
    assert extract_frames(folder / "camera.avi", tmp_path / "live", 10) == found


def test_folders_that_cannot_be_used_are_named(folder, tmp_path):
    with pytest.raises(UsageError, match=r"--unlabelled .*nowhere: no such folder"):
        find_images(tmp_path / "nowhere", frames=tmp_path, frame_step=10)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image and no video in it"):
        find_images(tmp_path / "empty", frames=tmp_path, frame_step=10)
    (tmp_path / "empty" / "broken.mp4").write_bytes(b"not a video")
    with pytest.raises(DataError, match=r"broken.mp4: no frame can be read"):
        find_images(tmp_path / "empty", frames=tmp_path, frame_step=10)


def test_a_test_image_under_any_name_is_refused(hashed, folder, tmp_path, capsys):
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    shutil.copy(hashed.paths[hashed.rows("train")[0]], own / "seen.png")
    paths, digests = without_known(find_images(own, frames=tmp_path, frame_step=10), hashed)
    assert "1 images are in the train or val split and are left out" in capsys.readouterr().err
    assert len(paths) == len(set(digests.tolist())) == 10 + 3
    shutil.copy(hashed.paths[hashed.rows("test")[2]], own / "deep" / "harmless.png")
    with pytest.raises(DataError, match=r"1 images are in the test split, first .*harmless.png"):
        without_known(find_images(own, frames=tmp_path, frame_step=10), hashed)


def test_all_teachers_label_together_and_are_asked_once(tiny_dataset, taught_run, folder, tmp_path, monkeypatch):
    from edgedistill.student import unlabelled

    files = find_teachers(taught_run.soft_labels, tiny_dataset)
    paths, digests = without_known(find_images(folder, frames=tmp_path, frame_step=10), tiny_dataset)
    options = {"cache": tmp_path / "cache", "device": CPU, "half": False, "temperatures": None}
    found = label_images(paths, digests, files, tiny_dataset, **options)
    members = [read_model(file.path) for file in files]
    logits = [predict_logits(member.model, paths, member.input_spec) for member in members]
    mean = np.mean([torch.softmax(torch.from_numpy(each), dim=1).numpy() for each in logits], axis=0)
    assert np.allclose(np.exp(found.log_probs[:]), mean, atol=1e-4)
    unlike = [dataclasses.replace(file, weight=weight) for file, weight in zip(files, (3.0, 1.0), strict=True)]
    weighted = label_images(paths, digests, unlike, tiny_dataset, **options | {"cache": tmp_path / "weighted"})
    shares = [torch.softmax(torch.from_numpy(each), dim=1).numpy() for each in logits]
    assert np.allclose(np.exp(weighted.log_probs[:]), (3 * shares[0] + shares[1]) / 4, atol=1e-4)
    monkeypatch.setattr(unlabelled, "open_teachers", lambda *args, **more: pytest.fail("asked again"))
    assert label_images(paths, digests, files, tiny_dataset, **options).hash == found.hash


@pytest.mark.usefixtures("torch_judges")
def test_the_mean_over_all_teachers_goes_head_by_head(heads_dataset, teach_run, folder, tmp_path):
    run = teach_run(heads_dataset, tmp_path / "run", architectures=("", "other"))  # two in each fold
    weights = (0.25, 0.75, 0.5, 0.5)
    files = [
        dataclasses.replace(file, weight=weight)
        for file, weight in zip(find_teachers(run.soft_labels, heads_dataset), weights, strict=True)
    ]
    paths, digests = without_known(find_images(folder, frames=tmp_path, frame_step=10), heads_dataset)
    options = {"device": CPU, "half": False, "temperatures": None}
    found = label_images(paths, digests, files, heads_dataset, cache=tmp_path / "cache", **options)
    task, shares = heads_dataset.task, []
    for file in files:
        loaded = read_model(file.path)
        shares.append(task.probabilities(predict_logits(loaded.model, paths, loaded.input_spec)))
    mean = np.average(shares, axis=0, weights=weights)  # values of the regression head in its own units
    assert found.log_probs.shape == (13, 6)
    assert np.allclose(task.probabilities(found.log_probs[:]), mean, atol=2e-3)
    halves = dict.fromkeys((file.sha256 for file in files), 0.5)
    sharper = label_images(
        paths, digests, files[:1], heads_dataset, cache=tmp_path / "sharp", **options | {"temperatures": halves}
    )
    loaded = read_model(files[0].path)
    expected = task.probabilities(predict_logits(loaded.model, paths, loaded.input_spec), 0.5)
    assert np.allclose(task.probabilities(sharper.log_probs[:]), expected, atol=2e-3)


@pytest.mark.usefixtures("torch_judges")
@pytest.mark.parametrize("heads", [False, True])
def test_teachers_label_by_the_views_that_labelled_their_fold(request, heads, teach_run, folder, tmp_path):
    data = request.getfixturevalue("heads_dataset" if heads else "tiny_dataset")
    run = teach_run(data, tmp_path / "run", settings={"tta": "flip,scales"})
    files = find_teachers(run.soft_labels, data)[:1]
    paths, digests = without_known(find_images(folder, frames=tmp_path, frame_step=10), data)
    options = {"device": CPU, "half": False, "temperatures": {files[0].sha256: 2.0}}
    found = label_images(paths, digests, files, data, cache=tmp_path / "cache", **options)
    loaded, views = read_model(files[0].path), views_of("flip,scales")
    mean = predict_probabilities(loaded.model, paths, loaded.input_spec, views=views, task=data.task)
    task = data.task or Task.single(data.class_names)
    expected = task.probabilities(scores_from(task, mean), 2.0)  # as the stored labels are tempered
    assert np.allclose(task.probabilities(found.log_probs[:]), expected, atol=2e-3)
    one = task.probabilities(predict_logits(loaded.model, paths, loaded.input_spec), 2.0)
    assert np.abs(one - expected).max() > 5e-3


def test_a_kill_while_labelling_costs_one_part_at_most(tiny_dataset, taught_run, folder, tmp_path, monkeypatch):
    from edgedistill.student import unlabelled

    files = find_teachers(taught_run.soft_labels, tiny_dataset)
    paths, digests = without_known(find_images(folder, frames=tmp_path, frame_step=10), tiny_dataset)
    options = {"device": CPU, "half": False, "temperatures": None}
    whole = label_images(paths, digests, files, tiny_dataset, cache=tmp_path / "whole", **options)
    monkeypatch.setattr(unlabelled, "PART_IMAGES", 4)
    judged, judge = [], unlabelled._shares

    def until_killed(teacher, pictures, task, device):
        judged.append(len(pictures[teacher.spec]))
        if judged[:-1] == [4, 4, 4]:  # two teachers: the first part is whole, the second has one answer
            raise KeyboardInterrupt
        return judge(teacher, pictures, task, device)

    monkeypatch.setattr(unlabelled, "_shares", until_killed)
    with pytest.raises(KeyboardInterrupt):
        label_images(paths, digests, files, tiny_dataset, cache=tmp_path / "killed", **options)
    judged[:] = [0]
    resumed = label_images(paths, digests, files, tiny_dataset, cache=tmp_path / "killed", **options)
    assert judged == [0, 4, 4, 4, 4, 1, 1] and len(paths) == 13
    assert np.allclose(resumed.log_probs[:], whole.log_probs[:], atol=1e-5)
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["log_probs.npy", "meta.json"]


def test_damaged_photographs_are_left_out_with_a_warning(tiny_dataset, taught_run, folder, tmp_path, capsys):
    own = tmp_path / "own"
    shutil.copytree(folder / "deep", own)
    (own / "new2.png").write_bytes((own / "new2.png").read_bytes()[:-400])
    (own / "empty.jpg").write_bytes(b"")
    files = find_teachers(taught_run.soft_labels, tiny_dataset)
    options = {"cache": tmp_path / "cache", "device": CPU, "half": False, "temperatures": None}
    paths, digests = without_known(find_images(own, frames=tmp_path, frame_step=10), tiny_dataset)
    for _ in ("labelled now", "labelled before"):
        found = label_images(paths, digests, files, tiny_dataset, **options)
        assert len(paths) == 11 and {Path(path).name for path in found.paths} == {
            f"new{number}.png" for number in range(10) if number != 2
        }
        assert np.isfinite(found.log_probs[:]).all() and len(found.sha256) == len(found.log_probs[:]) == 9
        assert "2 images cannot be read and are left out, first" in " ".join(capsys.readouterr().err.split())
    bad = np.array([path for path in paths if path.endswith(("new2.png", "empty.jpg"))])
    with pytest.raises(DataError, match="none of the 2 images can be read"):
        label_images(bad, digests[:2], files, tiny_dataset, **options)


def made_up(answers, confidence=0.9):
    probabilities = np.full((len(answers), 3), (1 - confidence) / 2)
    probabilities[np.arange(len(answers)), answers] = confidence
    names = np.array([f"{number}.png" for number in range(len(answers))])
    return Unlabelled(names, names.astype("S64"), np.log(probabilities).astype(np.float32))


def test_unsure_answers_and_crowding_classes_are_left_out(capsys):
    images = made_up([0] * 40 + [1] * 4 + [2])
    unsure = dataclasses.replace(images, log_probs=images.log_probs.copy())
    unsure.log_probs[40] = np.log(1 / 3)
    chosen = choose(unsure, min_confidence=0.5, class_cap=1.0, seed=0)
    counts = np.bincount(chosen.log_probs[:].argmax(axis=1), minlength=3)
    assert counts.tolist() == [44 // 3, 3, 1]
    assert "40.png" not in chosen.paths.tolist()
    assert choose(unsure, min_confidence=0.5, class_cap=1.0, seed=0).hash == chosen.hash
    assert choose(unsure, min_confidence=0.5, class_cap=1.0, seed=1).hash != chosen.hash
    with pytest.raises(DataError, match=r"sure of none .*the surest has 0.90"):
        choose(images, min_confidence=0.95, class_cap=1.0, seed=0)


HEADS = Task(
    (
        Head("a", "softmax", ("x", "y")),
        Head("b", "softmax", ("p", "q")),
        Head("tag", "sigmoid", ("t",)),
        Head("v", "regression"),
    )
)


def answered(task, *groups):
    """Images with these shares, so many of each: (count, shares)."""
    shares = np.concatenate([np.tile(np.array(row, float), (count, 1)) for count, row in groups])
    names = np.array([f"{number}.png" for number in range(len(shares))])
    return Unlabelled(names, names.astype("S64"), scores_from(task, shares))


def test_the_least_sure_head_and_the_joint_answer_decide():
    images = answered(
        HEADS,
        (40, [0.9, 0.1, 0.9, 0.1, 0.95, 3.0]),
        (4, [0.1, 0.9, 0.9, 0.1, 0.05, 3.0]),
        (1, [0.9, 0.1, 0.1, 0.9, 0.95, 3.0]),
        (7, [0.9, 0.1, 0.55, 0.45, 0.95, 3.0]),  # unsure of b
        (7, [0.9, 0.1, 0.9, 0.1, 0.4, 3.0]),  # unsure of the tag
    )
    chosen = choose(images, min_confidence=0.8, class_cap=1.0, seed=0, task=HEADS)
    numbers = np.array([int(Path(path).stem) for path in chosen.paths.tolist()])
    counts = [(numbers < 40).sum(), ((numbers >= 40) & (numbers < 44)).sum(), (numbers == 44).sum()]
    assert counts == [15, 4, 1] and len(numbers) == 20  # 45 sure images of 3 joint answers
    with pytest.raises(DataError, match=r"sure of none .*the surest has 0.90"):
        choose(images, min_confidence=0.95, class_cap=1.0, seed=0, task=HEADS)


def test_labels_that_may_apply_together_have_no_cap():
    task = Task((Head("labels", "sigmoid", ("s", "t")),))
    images = answered(task, (30, [0.99, 0.02]), (2, [0.01, 0.99]), (3, [0.99, 0.6]))
    assert len(choose(images, min_confidence=0.9, class_cap=1.0, seed=0, task=task)) == 32


def test_pseudo_labels_of_heads_are_shares_and_values():
    targets = unlabelled_targets(answered(HEADS, (2, [0.8, 0.2, 0.5, 0.5, 0.8, -1.5])), 2.0, HEADS)
    assert torch.allclose(targets.hard[0], torch.tensor([0.8, 0.2, 0.5, 0.5, 0.8, -1.5]), atol=1e-5)
    assert torch.allclose(targets.soft[1], torch.tensor([2 / 3, 1 / 3, 0.5, 0.5, 2 / 3, -1.5]), atol=1e-5)


def test_files_that_nobody_reads_are_counted_once(folder, tmp_path, capsys):
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    for name in ("a.heic", "b.HEIC", "more.tar", "deep/c.gif", "README"):
        (own / name).write_bytes(b"x")
    assert len(find_images(own, frames=tmp_path, frame_step=10)) == 14
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("warning") == 1 and "6 files are none that can be read and are left out (2 .heic, " in said
    assert all(kind in said for kind in ("1 .tar", "1 .gif", "1 .txt", "1 without a suffix", f"first {own}/README"))


def test_what_looks_like_a_test_image_is_left_out_and_searched_once(hashed, folder, tmp_path, capsys, monkeypatch):
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    tested = hashed.rows("test")
    for number, row in enumerate(tested[:2]):
        pixels = cv2.resize(cv2.imread(hashed.paths[row]), (80, 80), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(own / f"again{number}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])
    (own / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    paths, digests = without_known(find_images(own, frames=tmp_path, frame_step=10), hashed)
    kept, left = without_like_test(paths, digests, hashed, cache=tmp_path / "cache")
    assert {Path(path).name for path in set(paths.tolist()) - set(kept.tolist())} == {"again0.jpg", "again1.jpg"}
    assert np.array_equal(left, digests[np.isin(paths, kept)]) and "broken.jpg" in {Path(p).name for p in kept.tolist()}
    assert f"2 images look like test images and are left out, first {own}/again0.jpg" in capsys.readouterr().err
    monkeypatch.setattr(duplicates, "near_duplicates_across", lambda *paths: pytest.fail("searched again"))
    again, _ = without_like_test(paths, digests, hashed, cache=tmp_path / "cache")
    assert np.array_equal(again, kept)
    only = np.isin(paths, kept, invert=True)
    monkeypatch.undo()
    with pytest.raises(DataError, match="every image looks like one of the test split"):
        without_like_test(paths[only], digests[only], hashed, cache=tmp_path / "other")


@pytest.mark.parametrize(
    ("images", "says"),
    [("copies", "every image looks like one of the test split"), ("damaged", "none of the 2 images can be read")],
)
def test_a_folder_that_is_of_no_use_is_refused_before_any_training(hashed, tmp_path, images, says):
    own = tmp_path / "own"
    own.mkdir()
    for number, row in enumerate(hashed.rows("test")[:2]):
        pixels = cv2.resize(cv2.imread(hashed.paths[row]), (80, 80), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(own / f"{number}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])
        if images == "damaged":
            (own / f"{number}.jpg").write_bytes(bytes([number]) + b"no image")
    settings = dataclasses.replace(SETTINGS, unlabelled=str(own))
    with pytest.raises(DataError, match=says):
        find_unlabelled(settings, hashed, tmp_path / "cache")


def test_close_hashes_of_two_sets_are_all_found():
    hashes = generator(0).integers(0, 2**63, 300, dtype=np.uint64)
    flips = np.array([np.bitwise_or.reduce(np.uint64(1) << generator(n).choice(64, n % 7, replace=False).astype(np.uint64))
                      for n in range(300)], np.uint64)  # fmt: skip
    others = np.concatenate([hashes[::-1] ^ flips, hashes[:3]])
    expected = np.argwhere(np.bitwise_count(hashes[:, None] ^ others[None, :]) <= duplicates.MAX_HASH_DISTANCE)
    assert 150 < len(expected) < 300 and np.array_equal(duplicates.close_across(hashes, others), expected)


@pytest.mark.parametrize("balanced", [False, True])
def test_each_batch_has_its_share_and_the_budget_stays(balanced):
    rows, labels = np.arange(50), (np.arange(50) % 5 == 0).astype(np.int32)
    plain = Draw(rows, labels, 8, balanced, seed=3)
    mixed = MixedDraw(rows, labels, 8, balanced, 3, unlabelled=np.arange(50, 57), share=0.25)
    assert mixed.steps == plain.steps
    seen = np.concatenate([mixed.epoch(epoch) for epoch in range(6)])
    assert seen.shape == (6 * plain.steps, 8)
    assert ((seen >= 50).sum(axis=1) == 2).all()
    times = np.bincount(seen[seen >= 50] - 50, minlength=7)
    assert times.max() - times.min() <= 1  # each as often as any other
    assert np.array_equal(mixed.epoch(4), mixed.epoch(4))
    assert len(np.unique(mixed.epoch(0)[:, :6])) > 20


def test_pseudo_labels_stand_in_for_hard_ones():
    images = made_up([2, 0], confidence=0.8)
    both = joined(make_targets(np.array([1], np.int32), 3, temperature=2.0), unlabelled_targets(images, 2.0))
    assert both.hard[0].tolist() == [0.0, 1.0, 0.0]
    assert torch.allclose(both.hard[1], torch.tensor([0.1, 0.1, 0.8]), atol=1e-5)
    roots = torch.tensor([0.1, 0.1, 0.8]).sqrt()
    assert torch.allclose(both.soft[1], roots / roots.sum(), atol=1e-5)


@pytest.mark.parametrize("live", [False, True])
def test_a_student_learns_from_both_and_records_it(hashed, taught_run, folder, tmp_path, live, monkeypatch):
    run = RunDir(tmp_path)
    settings = dataclasses.replace(SETTINGS, unlabelled=str(folder), live_teachers=live)
    monkeypatch.setattr("edgedistill.student.distil.soft_rows", lambda path, data: HeldRows(soft_of(data)))
    monkeypatch.setattr("edgedistill.student.live_teachers.read_model", lambda path: of_dataset(path, hashed))
    train_student(settings, hashed, run, soft_labels=taught_run.soft_labels, out=run.model, resume=False)
    saved = read_model(run.model).settings
    assert saved["unlabelled_images"] == 11  # ten images and one frame, each once
    assert len(saved["unlabelled_sha256"]) == 64


@pytest.mark.usefixtures("torch_judges")
@pytest.mark.parametrize("live", [False, True])
def test_a_student_with_several_heads_learns_from_both(heads_dataset, teach_run, folder, tmp_path, live):
    digests = np.array([sha256_file(path) for path in heads_dataset.paths])
    data, run = dataclasses.replace(heads_dataset, sha256=digests), RunDir(tmp_path / "run")
    labels = teach_run(data, tmp_path / "taught").soft_labels
    settings = dataclasses.replace(SETTINGS, unlabelled=str(folder), live_teachers=live, soft_weight=0.5)
    train_student(settings, data, run, soft_labels=labels, out=run.model, resume=False)
    loaded = read_model(run.model)
    assert loaded.settings["unlabelled_images"] == 11 and loaded.task == data.task


@pytest.mark.usefixtures("torch_judges")
def test_a_cap_where_several_labels_apply_is_doubted(tiny_dataset, teach_run, folder, tmp_path, capsys):
    tags = np.column_stack([tiny_dataset.labels == 0, tiny_dataset.labels > 0]).astype(np.float32)
    data = dataclasses.replace(tiny_dataset, task=Task((Head("labels", "sigmoid", ("s", "t")),)), values=tags)
    labels, settings = teach_run(data, tmp_path / "taught").soft_labels, dataclasses.replace(SETTINGS, extra_epochs=0)
    for cap, doubted in ((3.0, False), (1.0, True)):
        run = RunDir(tmp_path / f"run-{cap}")
        own = dataclasses.replace(settings, unlabelled=str(folder), unlabelled_class_cap=cap)
        train_student(own, data, run, soft_labels=labels, out=run.model, resume=False)
        assert ("--unlabelled-class-cap 1 changes nothing" in capsys.readouterr().err) == doubted
        assert read_model(run.model).settings["unlabelled_images"] == 11


def soft_of(dataset):
    """The fixture's labels belong to a data set whose hashes are made up."""
    soft = np.full((len(dataset), 3), np.nan, np.float32)
    soft[dataset.rows("train")] = np.log(1 / 3)
    return soft


def of_dataset(path, dataset):
    return dataclasses.replace(read_model(path), dataset_hash=dataset.hash)


def test_shares_and_caps_are_checked():
    for wrong, message in (
        ({"unlabelled_share": 1.0}, "a share of the batch"),
        ({"unlabelled_min_confidence": 1.5}, "a probability"),
        ({"unlabelled_class_cap": 0.5}, "1 or more times"),
        ({"unlabelled_frame_step": 0}, "1 or more frames"),
    ):
        with pytest.raises(UsageError, match=message):
            StudentSettings(**wrong)
