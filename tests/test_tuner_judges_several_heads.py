"""`edgedistill tune` of networks that give more than one label per image: by the figures of task_metrics, on what the
runtime answers, from val.csv to deploy.json."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from edgedistill.artifacts import RUN_FORMAT, RunDir, read_json, sha256_file, write_json
from edgedistill.benchmarks.score import Objective
from edgedistill.benchmarks.tuned_score import answers, measured
from edgedistill.benchmarks.tuner import TuneSettings, tune
from edgedistill.benchmarks.tuner.cascade import cascade_answers, exit_curve
from edgedistill.benchmarks.tuner.measure import Case, RealBench
from edgedistill.benchmarks.tuner.space import Deployment, Host, Variant, default_serving
from edgedistill.benchmarks.tuner.students import find_students
from edgedistill.benchmarks.tuner.truth import Truth, answers_of, confidences, predicted_answers
from edgedistill.benchmarks.tuner.tune import TUNE_FORMAT
from edgedistill.benchmarks.tuner.valset import open_val, truth_of, write_val
from edgedistill.data.manifest import Dataset, hash_files, read_dataset, write_dataset
from edgedistill.errors import ArtifactError, DataError
from edgedistill.images import InputSpec
from edgedistill.report import write_report
from edgedistill.runtime import Engine
from edgedistill.runtime.bundle import DeployConfig, describe_stage, write_deploy
from edgedistill.task_metrics import Scored, joint_accuracy, mean_f1, summary
from edgedistill.tasks import MANY, Floats, Head, Task, Values

SPEC = InputSpec(height=64, width=64)
VAL, OTHERS = 40, 10
COLOURS = ("blue", "green", "red")
ATTRIBUTES = Task(
    (
        Head("colour", "softmax", COLOURS),
        Head("light", "softmax", ("bright", "dark")),
        Head("level", "regression", weight=0.5, mean=120.0, std=20.0),
    )
)
LABELS = Task((Head(MANY, "sigmoid", ("bluish", "bright")),))
MIXED = Task(
    (
        Head("colour", "softmax", COLOURS),
        Head("labels", "sigmoid", ("a", "b"), threshold=0.3),
        Head("age", "regression", mean=10.0, std=4.0),
    )
)


def drawn(count: int = 150) -> tuple[Floats, Floats, Values]:
    """(logits of a fast network, of a better one, what is true) of MIXED; labels here and there are not known."""
    rng = np.random.default_rng(5)
    colours, marks = rng.integers(0, 3, count), rng.random((count, 2)) < 0.4
    values = np.column_stack([colours, marks, rng.normal(10, 4, count)]).astype(np.float32)
    clean = np.column_stack([3 * np.eye(3)[colours], 4 * marks - 2, (values[:, 3] - 10) / 4])
    fast, slow = (clean + rng.normal(0, noise, clean.shape) for noise in (2.5, 1.5))
    values[::7, 0], values[::5, 1], values[::11, 3] = np.nan, np.nan, np.nan
    return fast.astype(np.float32), slow.astype(np.float32), values


# ---- figures ----


def test_figures_are_those_of_the_evaluation() -> None:
    logits, _, values = drawn()
    truth, temperature = Truth(MIXED, values), 1.7
    shares = MIXED.probabilities(logits, temperature)
    found, scored = answers_of(MIXED, logits, temperature), Scored(MIXED, shares, values)
    np.testing.assert_array_equal(found, MIXED.answers(shares))
    assert truth.metric(found, "accuracy") == pytest.approx(joint_accuracy(scored))
    assert truth.metric(found, "macro-f1") == pytest.approx(mean_f1(scored))
    rows = np.random.default_rng(0).integers(0, len(values), len(values))
    assert truth.scorer(found, "macro-f1")(rows) == pytest.approx(mean_f1(scored.take(rows)))
    assert truth.scorer(found, "accuracy")(rows) == pytest.approx(joint_accuracy(scored.take(rows)))
    heads, own = summary(scored)["heads"], truth.head_figures(shares, found)
    assert own["colour"]["accuracy"] == heads["colour"]["accuracy"] and own["age"] == {"mae": heads["age"]["mae"]}
    assert not np.array_equal(found, answers_of(MIXED, logits, 1.0)), "a threshold is met or not by the temperature"


def test_what_is_not_known_is_neither_right_nor_wrong() -> None:
    values = np.array([[0, np.nan, 1, 10], [np.nan, 1, np.nan, 9]], np.float32)
    truth = Truth(MIXED, values)
    assert truth.right(np.array([[0, 0, 1], [2, 1, 0]])).all()
    assert not truth.right(np.array([[-1, -1, -1], [1, 0, 0]])).any(), "'unknown' is no right answer"
    with pytest.raises(DataError, match="no known label"):
        Truth(MIXED, np.array([[0, 1, 1, 5], [np.nan, np.nan, np.nan, 5]], np.float32))


def test_every_threshold_of_a_cascade_of_heads_is_judged_as_it_answers() -> None:
    fast, slow, values = drawn()
    truth = Truth(MIXED, values)
    temperatures = (truth.fit_temperature(fast), truth.fit_temperature(slow))
    sure = confidences(MIXED, fast, temperatures[0])
    shares = MIXED.probabilities(fast, temperatures[0])
    np.testing.assert_allclose(sure, np.minimum(shares[:, :3].max(axis=1), shares[:, 3:5].max(axis=1)), rtol=1e-6)
    for metric in ("accuracy", "macro-f1"):
        curve = exit_curve(fast, slow, truth, temperatures=temperatures, metric=metric)
        assert len(curve) > 100
        for point in range(0, len(curve), 13):
            threshold = float(curve.threshold[point])
            found, stage = cascade_answers(fast, slow, (MIXED, MIXED), temperatures=temperatures, threshold=threshold)
            assert stage.mean() == pytest.approx(curve.passed_on[point])
            assert truth.metric(found, metric) == pytest.approx(curve.metric[point])


# ---- networks that run ----


def network(task: Task, gain: float, dataset_hash: str = "") -> ov.Model:
    """Its outputs from the mean of each plane; works at any size."""
    image = ops.parameter([1, 3, SPEC.height, SPEC.width], np.float32, name="image")
    means = ops.reduce_mean(image, np.array([2, 3]), False)  # red, green, blue
    blue, green, red = np.eye(3)[::-1]
    columns = [blue, green, red, np.ones(3) / 3, -np.ones(3) / 3, np.ones(3)]
    if task.is_multi_label:
        columns = [2 * blue - green - red, np.ones(3)]
    weights = gain * np.stack(columns, axis=1)
    logits = ops.matmul(means, weights.astype(np.float32), False, False)
    model = ov.Model([logits], [image], "tiny")
    model.inputs[0].get_node().set_layout(ov.Layout("NCHW"))
    metadata = {
        "format_version": "1",
        "input_spec": json.dumps(SPEC.to_dict()),
        "temperature": "1.0",
        "thresholds": json.dumps(list(task.heads[0].thresholds)) if task.is_multi_label else "null",
        "labels": json.dumps(task.outputs),
        "dataset_hash": dataset_hash,
        "weights_hash": f"{gain}",
        "architecture": "tiny",
        "task": "multi-label" if task.is_multi_label else "heads",
        "heads": json.dumps(task.to_dict()),
    }
    for key, value in metadata.items():
        model.set_rt_info(value, ["edgedistill", key])
    return model


def make_bundle(folder: Path, task: Task, gains: dict[str, float], dataset_hash: str = "") -> Path:
    """Labels that each apply or not have other thresholds in every network, as if fitted on its own outputs."""
    for number, (name, gain) in enumerate(gains.items()):
        (folder / "stages" / name).mkdir(parents=True, exist_ok=True)
        path = folder / "stages" / name / "model.xml"
        own = [
            dataclasses.replace(head, threshold=(0.55, 0.35)[number]) if number and head.kind == "sigmoid" else head
            for head in task.heads
        ]
        ov.save_model(network(Task(tuple(own)), gain, dataset_hash), path, compress_to_fp16=False)
    stage = describe_stage(folder, f"stages/{next(iter(gains))}/model.xml", input_spec=SPEC, temperature=1.0)
    write_deploy(folder / "deploy.json", DeployConfig(stages=(stage,)))
    return folder


def make_run(root: Path, task: Task) -> Path:
    """RUN with photographs of a colour and a brightness, hard ones among them; one of them without any known label."""
    rng = np.random.default_rng(0)
    paths, rows = [], []
    for number in range(VAL + OTHERS):
        colour, bright = number % 3, number // 3 % 2 == 0
        base = 118.0 + (12 if bright else -12) * (0.3 if number % 4 == 0 else 1.0)
        pixels = np.full(3, base)
        pixels[colour] += 8 if number % 5 == 0 else 50
        image = np.clip(pixels + rng.normal(0, 10, (130, 120, 3)), 0, 255).astype(np.uint8)
        paths.append(root / "data" / f"{number:03d}.jpg")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        paths[-1].write_bytes(cv2.imencode(".jpg", image)[1].tobytes())
        rows.append([colour == 0, bright] if task.is_multi_label else [colour, not bright, base])
    values = np.array(rows, np.float32)
    values[3, : 2 if task.is_multi_label else 3] = np.nan
    values[7, 1] = np.nan
    joint = [task.joint_label(row) for row in values]
    names = tuple(sorted(set(joint)))
    dataset = Dataset(
        ids=np.array([path.name for path in paths]),
        paths=np.array([str(path) for path in paths]),
        sha256=hash_files(paths),
        labels=np.array([names.index(name) for name in joint]),
        groups=np.array([""] * len(paths)),
        splits=np.array(["val"] * VAL + ["train"] * (OTHERS - 4) + ["test"] * 4),
        folds=np.array([-1] * VAL + [0] * (OTHERS - 4) + [-1] * 4),
        class_names=names,
        task=task,
        values=values,
    )
    write_dataset(dataset, root / "dataset.csv")
    write_json(root / "config.json", {"settings": {"student": {"final_data": "train"}}}, format=RUN_FORMAT)
    make_bundle(root / "openvino", dataset.task or task, {"sharp": 6.0, "dull": 0.8}, dataset.hash)
    return root


@pytest.fixture(scope="module", params=[ATTRIBUTES, LABELS], ids=["attributes", "labels"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("several") / "run", request.param)


def test_stored_logits_answer_as_the_runtime_does(run: Path, tmp_path: Path) -> None:
    students, host = find_students([run]), Host.here()
    val, task = open_val(students, None), students[0].task
    assert not task.is_single and len(val) == VAL - 1, "the image of which nothing is known is left out"
    tasks = [{student.name: student.task for student in students}[name] for name in ("dull", "sharp")]
    assert (tasks[0] == tasks[1]) != task.is_multi_label, "labels have thresholds of their own in each network"
    with RealBench(students, val, Objective(fps_target=1.0), host, scratch=tmp_path / "scratch") as bench:
        stages = (Variant("dull", "f32", (32, 32)), Variant("sharp", "f32", (64, 64)))
        logits = [bench.logits(stage, "reduced") for stage in stages]
        first, last = (val.truth.fit_temperature(one) for one in logits)
        single = Deployment(stages[:1], default_serving(host), "reduced")
        found, _ = bench.answers(Case(single, (first,), (), "files"))
        np.testing.assert_array_equal(found, answers_of(tasks[0], logits[0], first))
        curve = exit_curve(*logits, val.truth, temperatures=(first, last), tasks=tasks)
        threshold = float(np.median(curve.threshold))
        cascade = Deployment(stages, default_serving(host), "reduced", threshold)
        found, stage = bench.answers(Case(cascade, (first, last), (), "files"))
    expected, expected_stage = cascade_answers(*logits, tasks, temperatures=(first, last), threshold=threshold)
    np.testing.assert_array_equal(stage, expected_stage)
    np.testing.assert_array_equal(found, expected)
    assert 0 < stage.mean() < 1


def test_a_tuning_of_several_heads_from_folder_to_deploy_json(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", ATTRIBUTES)
    settings = TuneSettings((root,), Objective(fps_target=1e9, metric="macro-f1"), minutes=0.5, sizes=(32,))
    result = tune(settings)
    record, students = read_json(result.folder / "tune.json", format=TUNE_FORMAT), find_students([root])
    val, task = open_val(students, None), students[0].task
    with Engine(root / "openvino", cache_dir=False) as engine:
        found = predicted_answers(task, list(engine.map(val.paths)))
    assert record["verified"]["accuracy"] == pytest.approx(val.truth.metric(found, "accuracy"), abs=1e-6)
    assert record["chosen"]["metric"] == pytest.approx(val.truth.metric(found, "macro-f1"), abs=1e-6)
    assert list(record["heads"]) == [head.name for head in task.heads]
    assert any("Each head's own" in sentence for sentence in record["explanation"])
    dataset = read_dataset(root / "dataset.csv")
    rows, truth = truth_of(dataset, "test", task)
    said, _ = answers(root / "openvino" / "deploy.json", [str(path) for path in dataset.paths[rows]], task)
    accuracy, margin = measured(said, truth, "accuracy")
    assert accuracy == pytest.approx(truth.right(said).mean()) and 0 <= margin <= 1
    page = write_report(RunDir(root)).read_text(encoding="utf-8")
    assert "Each head&#39;s own" in page and "could not be understood" not in page


# ---- val images ----


def test_val_csv_carries_every_head(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "board"
    shutil.copytree(run / "openvino", folder)
    val = open_val(find_students([run]), None)
    rows = [
        (id, path.name, "any", sha256_file(path), *cells)
        for id, path, cells in zip(val.ids, val.paths, val.cells, strict=True)
    ]
    write_val(folder, rows, columns=val.columns)
    found = open_val(find_students([folder]), str(run / "data"))
    assert (found.ids, found.hash) == (val.ids, val.hash)
    np.testing.assert_array_equal(found.truth.values, val.truth.values)
    other = dataclasses.replace(val, truth=Truth(val.truth.task, np.zeros_like(val.truth.values)))
    assert other.hash != val.hash and other.drawn(25, seed=1).truth.values.shape[0] == 25
    write_val(folder, [row[:4] for row in rows])
    with pytest.raises(ArtifactError, match="expected the columns id,path,label,sha256,s"):
        open_val(find_students([folder]), str(run / "data"))


def test_images_of_ones_own_come_with_the_columns_of_training(run: Path, tmp_path: Path) -> None:
    """Several labels as 'a|b' or in columns of their own; a value beside them may be missing."""
    shutil.copytree(run / "openvino", tmp_path / "openvino")
    students = find_students([tmp_path / "openvino"])
    task, dataset = students[0].task, read_dataset(run / "dataset.csv")
    assert dataset.values is not None
    forms: dict[str, list[dict[str, object]]] = {"columns": [], "joined": []}
    for path, row in zip(dataset.paths.tolist(), dataset.values.tolist(), strict=True):
        known = ["" if value != value else value for value in row]
        if task.is_multi_label:
            there = "|".join(name for name, value in zip(task.outputs, row, strict=True) if value == 1)
            forms["columns"].append({"path": path, "bluish": known[0], "bright": known[1]})
            forms["joined"].append({"path": path, "label": "" if "" in known else there or "|"})
        else:
            texts = ["" if v == "" else h.classes[int(v)] for h, v in zip(task.heads, known[:2], strict=False)]
            forms["columns"].append({"path": path, "colour": texts[0], "light": texts[1], "level": known[2]})
            forms["joined"].append({"path": path, "colour": texts[0], "light": texts[1]})
    for name, rows in forms.items():
        with (tmp_path / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        val = open_val(students, str(tmp_path / f"{name}.csv"))
        place = {Path(path).name: row for row, path in enumerate(dataset.paths.tolist())}
        wanted = dataset.values[[place[path.name] for path in val.paths]]
        known = val.truth.codes >= 0
        np.testing.assert_array_equal(val.truth.codes[known], Truth(task, wanted).codes[known])
        assert known.mean() > 0.98 and len(val) >= VAL + OTHERS - 2
    foreign = [row | {"bright" if task.is_multi_label else "light": 3} for row in forms["columns"]]
    with (tmp_path / "foreign.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(foreign[0]))
        writer.writeheader()
        writer.writerows(foreign)
    with pytest.raises(DataError):
        open_val(students, str(tmp_path / "foreign.csv"))


def test_labels_of_another_task_are_refused(run: Path, tmp_path: Path) -> None:
    task = find_students([run])[0].task
    other = MIXED if task.is_multi_label else LABELS
    shutil.copytree(run, tmp_path / "run")
    students = find_students([make_bundle(tmp_path / "run" / "openvino-other", other, {"x": 1.0})])
    with pytest.raises(DataError, match="give the data set that it was trained on"):
        open_val(students, None)
    classes = tmp_path / "classes"
    for name in ("bright", "dark"):
        (classes / name).mkdir(parents=True)
        shutil.copyfile(run / "data" / "000.jpg", classes / name / f"{name}.jpg")
    shutil.copytree(run / "openvino", tmp_path / "alone")
    with pytest.raises(DataError, match="label columns softmax:label that the model does not have"):
        open_val(find_students([tmp_path / "alone"]), str(classes))


def test_each_network_answers_by_its_own_thresholds() -> None:
    """Of a cascade of heads, from its logits: figures, curve and answers."""
    fast, slow, values = drawn()
    truth, temperatures = Truth(MIXED, values), (1.3, 0.8)
    colour, labels, age = MIXED.heads
    tasks = (MIXED, Task((colour, dataclasses.replace(labels, threshold=(0.7, 0.6), weight=2.0), age)))
    assert tasks[0].layout == tasks[1].layout and tasks[0] != tasks[1]
    sure = confidences(MIXED, fast, temperatures[0])
    shares = [task.probabilities(logits, t) for task, logits, t in zip(tasks, (fast, slow), temperatures, strict=True)]
    for metric in ("accuracy", "macro-f1"):
        curve = exit_curve(fast, slow, truth, temperatures=temperatures, metric=metric, tasks=tasks)
        point = len(curve) // 2
        threshold = float(curve.threshold[point])
        found, _ = cascade_answers(fast, slow, tasks, temperatures=temperatures, threshold=threshold)
        early = sure >= threshold
        own = [task.answers(share) for task, share in zip(tasks, shares, strict=True)]
        np.testing.assert_array_equal(found, np.where(early[:, None], own[0], own[1]))
        assert truth.metric(found, metric) == pytest.approx(curve.metric[point])
        both = np.where(early[:, None], shares[0], shares[1])
        figures = truth.head_figures(both, found)
        assert figures["labels"] != truth.head_figures(both, MIXED.answers(both))["labels"]
        known = ~np.isnan(values[:, 1:3])
        right = ((found[:, 1:] == (values[:, 1:3] >= 0.5)) | ~known).all(axis=1)[known.any(axis=1)]
        assert figures["labels"]["accuracy"] == pytest.approx(right.mean())


def test_students_of_unlike_heads_are_not_tuned_together(tmp_path: Path) -> None:
    scaled = Task((*ATTRIBUTES.heads[:2], dataclasses.replace(ATTRIBUTES.heads[2], std=9.0)))
    one = make_bundle(tmp_path / "one", ATTRIBUTES, {"x": 1.0})
    assert find_students([one])[0].task == ATTRIBUTES
    with pytest.raises(DataError, match="its heads are others"):
        find_students([one, make_bundle(tmp_path / "two", scaled, {"y": 2.0})])
