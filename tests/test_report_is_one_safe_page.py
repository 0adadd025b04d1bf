"""report.html: one file, whatever the run has and whatever its names contain; honest words; bounded for large runs."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edgedistill.artifacts import RUN_FORMAT, RunDir, append_jsonl, read_json, write_array, write_json
from edgedistill.data.manifest import Dataset, read_dataset, write_dataset
from edgedistill.errors import ArtifactError
from edgedistill.report import write_report
from edgedistill.report.charts import (
    PERCENT,
    PLAIN,
    POINTS,
    Interval,
    ReliabilityBin,
    Series,
    bar_chart,
    interval_chart,
    line_chart,
    nice_ticks,
)
from edgedistill.report.quality_sections import _matrix
from edgedistill.report.record import Predictions, read_record
from edgedistill.report.reliability_section import reliability_bins
from edgedistill.report.summary_sections import lead_sentence
from edgedistill.report.wording import difference_sentence, duration, percent
from edgedistill.training.noisy_labels import write_noisy_labels

CLASSES = ("bird", "cat", "dog", "fish", "fox", "snake")
FOLDS = 5


@dataclass(frozen=True)
class FakeRun:
    """A run folder with every file that the report reads, written in the formats of the stages."""

    root: Path
    classes: tuple[str, ...] = CLASSES
    images: int = 300
    seed: int = 0
    skill: dict[str, float] = field(default_factory=lambda: {"hard_label_student": 1.1, "student": 1.5, "teacher": 2.4})

    def write(self, *, pictures: bool = True) -> RunDir:
        run = RunDir(self.root)
        dataset = self.dataset(pictures=pictures)
        write_dataset(dataset, run.dataset)
        self.config(run, dataset)
        self.data_report(run, dataset)
        self.soft_labels(run, dataset)
        self.training(run)
        self.evaluation(run, dataset)
        self.explanation(run)
        self.export(run, dataset)
        self.bench(run)
        self.tune(run)
        return run

    def dataset(self, *, pictures: bool) -> Dataset:
        rng = np.random.default_rng(self.seed)
        share = np.linspace(2.0, 0.6, len(self.classes))
        labels = rng.choice(len(self.classes), self.images, p=share / share.sum()).astype(np.int32)
        labels[: len(self.classes)] = np.arange(len(self.classes))
        ids = np.array([f"images/photo {index:05d}.png" for index in range(self.images)])
        splits = rng.choice(np.array(["train", "val", "test"]), self.images, p=[0.66, 0.14, 0.2])
        folds = np.where(splits == "train", np.arange(self.images) % FOLDS, -1).astype(np.int16)
        paths = np.array([str(self.root.parent / f"{self.root.name}-photos" / identity) for identity in ids])
        if pictures:
            for path, label in zip(paths, labels, strict=True):
                _draw(Path(path), int(label), rng)
        digests = np.array([f"{index:064x}" for index in range(self.images)])
        groups = np.array([f"session-{index // 40}" if index < 0 else "" for index in range(self.images)])
        return Dataset(ids, paths, digests, labels, groups, splits, folds, tuple(sorted(self.classes)))

    def explanation(self, run: RunDir) -> None:
        images = [
            {
                "id": f"images/photo {index:05d}.png",
                "right": index > 1,
                "predicted": "cat",
                "probability": 0.9,
                "true": "fox",
            }
            for index in range(4)
        ]
        values = {"method": "Grad-CAM", "layer": "blocks.5", "model_sha256": "0" * 64, "images": images}
        write_json(run.evaluation / "explain.json", values, format="edgedistill-explain")
        cv2.imwrite(str(run.evaluation / "explain.png"), np.zeros((40, 60, 3), np.uint8))

    def config(self, run: RunDir, dataset: Dataset) -> None:
        values = {
            "settings": {
                "data": {"data": "photos/animals", "split": {"folds": FOLDS, "seed": 0}},
                "seed": 0,
                "teacher": {"name": "effb4", "epochs": 12, "image_size_px": 224, "pretrained": True},
                "student": {
                    "name": "mbv3s",
                    "epochs": 20,
                    "extra_epochs": 4,
                    "soft_weight": 0.2,
                    "lr": 1e-3,
                },
            },
            "versions": {"edgedistill": "0.1.0", "torch": "2.13.0", "timm": "1.0.31", "openvino": "2026.4.1"},
            "dataset_hash": dataset.hash,
            "commands": ["distill --data photos/animals --teacher effb4 --student mbv3s --out 'runs/my cells'"],
        }
        write_json(run.config, values, format=RUN_FORMAT)

    def data_report(self, run: RunDir, dataset: Dataset) -> None:
        finding = {
            "kind": "near-duplicates",
            "message": "3 images look the same as another, in 1 groups; each group stays in one split and fold",
            "remedy": "nothing to do; remove bursts to save time",
            "paths": [str(identity) for identity in dataset.ids[7:10]],
        }
        sizes = {"height_px": {"min": 40, "median": 65, "max": 89}, "width_px": {"min": 40, "median": 80, "max": 119}}
        values = {
            "name": "animals",
            "sizes": sizes,
            "shapes": [
                {
                    "class": name,
                    "images": 300 // (number + 2),
                    "aspect": [0.8, 0.9 + number / 20, 1.1 + number / 20, 1.3 + number / 20, 1.9],
                    "sizes": [[40 + 7 * place + 5 * number, 40 + 5 * place, 12 - place] for place in range(10)],
                }
                for number, name in enumerate([*dataset.class_names[:3], None])
            ],
            "modes": {"colour": 280, "grey": 20},
            "errors": [],
            "warnings": [finding],
        }
        write_json(run.root / "data_report.json", values, format="edgedistill-data-report")

    def soft_labels(self, run: RunDir, dataset: Dataset) -> None:
        train = dataset.rows("train")[::-1]  # another order than dataset.csv: soft labels are joined by id
        write_array(run.soft_labels / "ids.npy", dataset.ids[train])
        write_array(run.soft_labels / "fold.npy", dataset.folds[train])
        rows = [
            {"fold": fold, "n": 40, "accuracy": 0.8 + 0.01 * fold, "macro_f1": 0.78, "log_loss": 0.61, "ece": 0.041}
            for fold in range(FOLDS)
        ]
        values = {"folds": rows, "all": {"n": 200, "accuracy": 0.82, "macro_f1": 0.781, "log_loss": 0.6, "ece": 0.038}}
        write_json(run.root / "teacher" / "oof.json", values, format="edgedistill-oof")
        soft = np.full((len(dataset), len(dataset.class_names)), np.nan, np.float32)
        soft[train] = np.log(0.02 / (len(dataset.class_names) - 1))
        soft[train, dataset.labels[train]] = np.log(0.98)
        soft[train[0], [dataset.labels[train[0]], dataset.labels[train[0]] - 1]] = np.log([0.02, 0.98])
        write_noisy_labels(run.root / "noisy_labels.csv", dataset, soft)

    def training(self, run: RunDir) -> None:
        rng = np.random.default_rng(self.seed + 1)
        for fold in range(FOLDS):
            _log(run.teacher(fold), rng, epochs=12, best=0.86, speed=310, val=False)
        _log(run.student, rng, epochs=20, best=0.78, speed=2100, val=True, extra=4)
        _log(run.hard_label_student, rng, epochs=20, best=0.75, speed=2150, val=True, extra=4)

    def evaluation(self, run: RunDir, dataset: Dataset) -> None:
        rng = np.random.default_rng(self.seed + 2)
        test = dataset.rows("test")
        labels, classes = dataset.labels[test], len(self.classes)
        largest = int(np.bincount(dataset.labels[dataset.rows("train")]).argmax())
        probabilities = {"majority": np.tile(np.eye(classes)[largest] * 0.9 + 0.1 / classes, (len(test), 1))}
        for name, skill in self.skill.items():
            logits = rng.normal(size=(len(test), classes)) * 1.3
            logits[np.arange(len(test)), labels] += skill * 1.4
            probabilities[name] = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        for name, probs in probabilities.items():
            write_array(run.evaluation / f"{name}.probs.npy", probs.astype(np.float32))
        write_array(run.evaluation / "test_ids.npy", dataset.ids[test])
        write_array(run.evaluation / "test_labels.npy", labels)
        values = {
            "split": "test",
            "n": len(test),
            "classes": list(dataset.class_names),
            "models": {name: _scores(probs, labels) for name, probs in probabilities.items()},
            "paired": [
                _pair(probabilities, labels, a, b, rng)
                for a, b in (("student", "majority"), ("student", "hard_label_student"), ("teacher", "student"))
                if {a, b} <= set(probabilities)
            ],
        }
        write_json(run.evaluation / "evaluation.json", values, format="edgedistill-evaluation")

    def export(self, run: RunDir, dataset: Dataset) -> None:
        names = ("torch", "onnxruntime", "ir-fp32", "ir-int8", "python-runtime-files", "python-runtime-frames")
        columns = [
            {
                "name": name,
                "top1": 0.781 - 0.004 * (name == "ir-int8"),
                "disagreement": 0.021 * (name == "ir-int8"),
                "disagreement_above_margin": 0.012 * (name == "ir-int8"),
                "max_probability_difference": 0.083 if name == "ir-int8" else 2.4e-6 * index,
                "max_logit_difference": 0.41 if name == "ir-int8" else 1.1e-5 * index,
            }
            for index, name in enumerate(names)
        ]
        values = {
            "split": "val",
            "n": 120,
            "source": "val",
            "limits": {"max_logit_difference": 1e-3, "int8_drop": 0.01},
            "columns": columns,
            "worst": [{"id": str(dataset.ids[3]), "column": "ir-int8", "probability_difference": 0.083}],
            "fusion": {"folded_batch_norms": 34, "max_logit_difference": 3.1e-6, "images": 16},
            "audit": {"convolutions": 52, "unfused_activations": 0, "reorder_share": 0.011, "verdict": "pass"},
            "int8": {
                "decision": "shipped",
                "reason": "1.24x faster in latency mode, 0.4 points below FP32",
                "calibration_images": 300,
                "chosen": "all layers",
                "val_images": 120,
                "rungs": [
                    {
                        "rung": "plain",
                        "name": "all layers",
                        "float_layers": 0,
                        "top1": 0.777,
                        "drop": 0.004,
                        "kl": 0.0042,
                        "fps": 1240.0,
                        "speed_ratio": 1.24,
                        "speed_ratio_ci95": [1.2, 1.27],
                    }
                ],
            },
            "verdict": "pass",
            "reasons": [],
        }
        folder = run.openvino / "stages" / "mobilenetv3_small_100"
        write_json(folder / "certificate.json", values, format="edgedistill-certificate")
        test = {"split": "test", "n": 525, "columns": columns, "verdict": "pass", "reasons": []}
        write_json(folder / "certificate-test.json", test, format="edgedistill-certificate")

    def bench(self, run: RunDir) -> None:
        results = []
        speeds = (
            ("edgedistill", "int8", "throughput", 1240.0),
            ("edgedistill", "f32", "throughput", 980.0),
            ("edgedistill", "f32", "latency", 590.0),
            ("onnxruntime", "f32", "latency", 540.0),
            ("naive-f32", "f32", "latency", 330.0),
            ("torch", "f32", "latency", 140.0),
        )
        for scope, factor, source in (
            ("files", 0.55, "640x427 JPEG"),
            ("frames", 0.8, "640x427 frames"),
            ("model", 1.0, "224x224 tensor"),
            ("files", 0.2, "1920x1281 JPEG"),
        ):
            for candidate, precision, mode, speed in speeds:
                fps = speed * factor
                latency = {"p50": 1000 / fps, "p90": 1150 / fps, "p99": 1600 / fps} if mode == "latency" else None
                results.append(
                    {
                        "candidate": candidate,
                        "scope": scope,
                        "mode": mode,
                        "precision": precision,
                        "input": source,
                        "fps": {"median": fps, "min": fps * 0.9, "max": fps * 1.07},
                        "latency_ms": latency,
                        "ratio_to_naive_f32": {"median": speed / 330, "min": speed / 350, "max": speed / 310},
                    }
                )
        values = {
            "machine": {"cpu": "Intel(R) Xeon(R) Platinum 8488C", "cores": 2, "flags": ["avx2", "avx512f", "amx_int8"]},
            "command": f"bench-fps {run.openvino} --vs all",
            "artifact": {"path": str(run.openvino), "sha256": "ab" * 32},
            "settings": {"seconds": 3},
            "rounds": 5,
            "results": results,
            "not_measured": [{"candidate": "benchmark_app", "scope": "model", "reason": "not on the PATH"}],
            "score": {"value": 0.846, "w": 0.7, "accuracy": 0.78, "fps": 682.0, "fps_target": 200},
        }
        write_json(run.openvino / "bench.json", values, format="edgedistill-bench")

    def tune(self, run: RunDir) -> None:
        """What the tuner writes, a chosen cascade among it."""
        keys = ("mbv3s f32 224, reduced, 2s2t1b", "lcnet int8 96 -> mbv3s int8 224 (exit at 0.8), reduced, 2s2t2b")
        measured = [
            {"key": key, "stages": number + 1, "metric": 0.81 - 0.01 * number, "fps": 300.0 * (number + 1)}
            | {"fps_error": 4.0, "value": 0.7 + 0.05 * number, "shares": [1.0] if number == 0 else [0.7, 0.3]}
            for number, key in enumerate(keys)
        ]
        variant = {"variant": "mbv3s f32 224", "metric": 0.81, "fps": 300.0}
        curve = [
            {"threshold": 0.9 - share, "passed_on": 1 - share, "metric": 0.81 - share / 20, "fps": 300 + 500 * share}
            for share in (0.1, 0.4, 0.7)
        ]
        cascade = {"chosen": True, "key": keys[1], "fast": variant, "slow": variant, "passed_on": 0.3, "metric": 0.8}
        cascade |= {"stage_ms": [1.0, 3.0], "expected_ms": 1.9, "expected_fps": 526.0, "measured_fps": 520.0}
        values = {
            "machine": {"cpu": "a board's CPU", "cores": 4},
            "objective": {"metric": "accuracy", "scope": "files", "goal": "score", "words": "score = 0.7 x accuracy"},
            "val": {"images": 300},
            "seconds": 590.0,
            "reached": True,
            "explanation": ["Chosen: a cascade.", "Given up: <b>1.0 points</b> against the most accurate."],
            "steps": [
                {"what": "FP32 at 224 px", "key": keys[0], "metric": 0.81, "fps": 300.0, "value": 0.7},
                {"what": "lcnet in front of it", "key": keys[1], "metric": 0.8, "fps": 600.0, "value": 0.75},
            ],
            "chosen": measured[1],
            "finalists": measured,
            "measured": measured,
            "pareto": list(keys),
            "left_out": {"mbv3s f32 320": "no time left to measure its speed"},
            "cascade": cascade | {"pays_below": 0.66, "exit_threshold": 0.8, "curve": curve},
            "scopes": {
                "frames": {"fps": 900.0, "settings": {}},
                "files": {"fps": 600.0, "settings": {"decode_us": 900.0, "resize_us": 100.0}},
            },
        }
        write_json(run.openvino / "tune.json", values, format="edgedistill-tune")


def _draw(path: Path, label: int, rng: np.random.Generator) -> None:
    """A photograph of its class: a coloured shape on noise, sizes as different as in a real folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = int(rng.integers(40, 90)), int(rng.integers(40, 120))
    image = rng.integers(0, 90, (height, width, 3)).astype(np.uint8)
    image = cv2.GaussianBlur(image, (0, 0), 2)
    color = tuple(int(value) for value in np.roll((230, 140, 60), label))
    centre, size = (width // 2, height // 2), min(height, width) // 3
    if label % 2:
        cv2.circle(image, centre, size, color, -1, cv2.LINE_AA)
    else:
        cv2.ellipse(image, centre, (size, size // 2), 20 * label, 0, 360, color, -1, cv2.LINE_AA)
    cv2.imwrite(str(path), image)


def _log(
    folder: Path, rng: np.random.Generator, *, epochs: int, best: float, speed: float, val: bool, extra: int = 0
) -> None:
    for epoch in range(epochs + extra):
        done = (epoch + 1) / (epochs + extra)
        row = {
            "epoch": epoch,
            "phase": "main" if epoch < epochs else "all data",
            "train_loss": 1.9 * float(np.exp(-2.2 * done)) + 0.25 + rng.normal() * 0.02,
            "lr": 1e-3 * 0.5 * (1 + float(np.cos(np.pi * done))),
            "images_per_s": speed + rng.normal() * speed * 0.02,
            "wait_fraction": abs(rng.normal()) * 0.01,
            "seconds": 4000 / speed,
        }
        if val:
            accuracy = best * (1 - float(np.exp(-3.5 * done))) + rng.normal() * 0.01
            row |= {"val_accuracy": accuracy, "val_macro_f1": accuracy - 0.02, "val_log_loss": 1.2 - accuracy * 0.6}
        append_jsonl(folder / "metrics.jsonl", row)


def _scores(probs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    predicted, classes = probs.argmax(1), probs.shape[1]
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (labels, predicted), 1)
    accuracy = float((predicted == labels).mean())
    f1 = float(np.mean(2 * np.diag(confusion) / np.maximum(1, confusion.sum(0) + confusion.sum(1))))
    half = 1.96 * float(np.sqrt(max(accuracy * (1 - accuracy), 1e-4) / len(labels)))
    return {
        "accuracy": accuracy,
        "accuracy_ci95": [accuracy - half, accuracy + half],
        "macro_f1": f1,
        "macro_f1_ci95": [max(0, f1 - half), f1 + half],
        "log_loss": float(-np.log(probs[np.arange(len(labels)), labels]).mean()),
        "ece": 0.031,
        "confusion": confusion.tolist(),
    }


def _pair(probs: dict[str, np.ndarray], labels: np.ndarray, a: str, b: str, rng: np.random.Generator) -> dict[str, Any]:
    gain = (probs[a].argmax(1) == labels).astype(float) - (probs[b].argmax(1) == labels)
    means = gain[rng.integers(0, len(gain), (400, len(gain)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "a": a,
        "b": b,
        "metric": "accuracy",
        "difference": float(gain.mean()),
        "ci95": [float(low), float(high)],
        "p_value": 0.04,
    }


class _Page(html.parser.HTMLParser):
    """Every tag with its attributes, the visible text, and a check that tags nest."""

    VOID = frozenset({"meta", "img", "line", "circle", "rect", "polyline", "br", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def _read(path: Path) -> _Page:
    return _Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = FakeRun(tmp_path_factory.mktemp("runs") / "animals").write()
    write_report(run)
    return run


@pytest.fixture
def copied_run(full_run: RunDir, tmp_path: Path) -> RunDir:
    return RunDir(Path(shutil.copytree(full_run.root, tmp_path / "copy")))


def test_one_file_that_loads_nothing_and_runs_nothing(full_run: RunDir) -> None:
    page = _read(full_run.report)
    assert {"script", "link", "iframe", "object", "embed", "base"}.isdisjoint({tag for tag, _ in page.tags})
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "data", "xlink:href", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/")), f"{tag} {name}={value}"
    style = full_run.report.read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert [path.name for path in full_run.root.glob("report*")] == ["report.html"]


def test_a_whole_run_fills_every_section(full_run: RunDir) -> None:
    page = _read(full_run.report)
    assert not [attributes for _, attributes in page.tags if attributes.get("class") == "missing"]
    assert not [attributes for _, attributes in page.tags if attributes.get("class") == "callout bad"]
    models = json.loads((full_run.evaluation / "evaluation.json").read_text())["models"]
    for name in ("majority", "hard_label_student", "student", "teacher"):
        assert percent(models[name]["accuracy"]) in page.text
    for expected in (
        "mbv3s (mobilenetv3_small_100), distilled from 5 effb4 teachers, on photos/animals: 300 images of 6 classes.",
        "Intel(R) Xeon(R) Platinum 8488C, 2 cores",
        "682 image file to label, int8, throughput mode, 640x427 JPEG; on Intel",
        "in exactly one of 5 folds",
        "written by the one teacher that never saw its image",
        "Verdict: pass, on 120 images of val.",
        "mobilenetv3_small_100, on the test split",
        "all layers 1, plain 77.70% −0.4 0.0042 0 1,240 1.24",
        "INT8 shipped: 1.24x faster",
        "In pixels: width 40 to 119 (median 80), height 40 to 89 (median 65); modes: colour 280, grey 20.",
        "images/photo 00007.png, images/photo 00008.png and 1 more",
        "Not measured. benchmark_app: not on the PATH.",
        "--out 'runs/my cells'",
        "1 training images look like another class",
    ):
        assert expected in page.text


def test_it_can_be_read_without_eyes_or_mouse(full_run: RunDir) -> None:
    page = _read(full_run.report)
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    svgs = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("aria-hidden") != "true"]
    assert len(svgs) > 12 and all(attributes["role"] == "img" and attributes["aria-label"] for attributes in svgs)
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.tags if tag == "th")
    tags = [tag for tag, _ in page.tags]
    assert tags.count("caption") == tags.count("table") > 6
    assert tags.count("h1") == tags.count("main") == 1
    anchors = {attributes["id"] for tag, attributes in page.tags if tag == "section" and attributes.get("id")}
    links = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert {f"#{anchor}" for anchor in anchors} == links
    assert next(attributes for tag, attributes in page.tags if tag == "html")["lang"] == "en"


def _luminance(color: str) -> float:
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def _mixed(color: str, paper: str, share: float) -> str:
    pairs = [(int(color[at : at + 2], 16), int(paper[at : at + 2], 16)) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in pairs)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(full_run: RunDir, scheme: str) -> None:
    style = full_run.report.read_text(encoding="utf-8").split("<style>")[1]
    light, dark = style.split("prefers-color-scheme: dark")[:2]
    values = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6}|\d+%)", light if scheme == "light" else dark.split("* {")[0]))
    heat = float(values["heat-max"].rstrip("%")) / 100
    pairs = [(values["ink"], values[paper]) for paper in ("page", "paper", "good-paper", "bad-paper", "note-paper")]
    pairs += [(values[ink], values[paper]) for ink in ("quiet", "accent") for paper in ("page", "paper")]
    pairs += [(values["ink"], _mixed(values[hue], values["paper"], heat)) for hue in ("student", "bad")]
    for ink, paper in pairs:
        high, low = sorted((_luminance(ink), _luminance(paper)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{ink} on {paper}"
    lines = ("student", "hard", "teacher", "majority", "peer", *(f"fold{index}" for index in range(6)))
    for line in lines:
        high, low = sorted((_luminance(values[line]), _luminance(values["paper"])), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 3, f"line {line}"


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "{{ 7 * 7 }}",
    "Käse–Würstchen 猫 \u202egnp.exe",
    "x" * 5000,
    "bell\x07\x1b[31m",
)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "<b>run & co", classes=HOSTILE, images=120).write()
    config = json.loads(run.config.read_text())
    config["commands"] = ["distill --data '</style><script>alert(3)</script>'"]
    config["settings"]["data"]["data"] = "</title><svg onload=alert(4)>\udcff"
    run.config.write_text(json.dumps(config))
    write_report(run)
    text = run.report.read_text(encoding="utf-8")
    page = _Page(text)
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags and "b" in tags and tags.count("style") == tags.count("title") == 1
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text and "{{ 7 * 7 }}" in page.text and "猫" in page.text
    assert "49" not in page.text.split("{{ 7 * 7 }}")[0][-20:]
    assert "x" * 200 not in text and "\x07" not in text and "\x1b" not in text and "\u202e" not in text
    assert len(text) < 3_000_000


PARTS: dict[str, tuple[Callable[[RunDir], Path], str]] = {
    "comparison": (
        lambda run: run.evaluation,
        "have not been compared on the test split: distill --data photos/animals",
    ),
    "certificate": (lambda run: run.openvino / "stages", "Not exported yet: export-openvino"),
    "speed": (lambda run: run.openvino / "bench.json", "Not measured yet; on the target machine: bench-fps"),
    "tuning": (lambda run: run.openvino / "tune.json", "Not tuned yet; on the target machine: edgedistill tune"),
    "curves": (lambda run: run.root / "teacher", "No teacher has finished an epoch: distill"),
    "hard labels": (
        lambda run: run.hard_label_student,
        "No hard-label student to compare with: distill --data photos/animals",
    ),
    "oof": (lambda run: run.root / "teacher" / "oof.json", "The out-of-fold soft labels are not finished: distill"),
    "noisy labels": (
        lambda run: run.root / "noisy_labels.csv",
        "Training images have not been compared with their held-out teachers yet: distill",
    ),
    "data": (lambda run: run.dataset, "No frozen manifest dataset.csv: distill"),
    "check-data": (
        lambda run: run.root / "data_report.json",
        "conflicts: edgedistill check-data photos/animals",
    ),
    "explain": (lambda run: run.evaluation / "explain.json", "No Grad-CAM of test images: edgedistill report"),
    "config": (lambda run: run.config, "No config.json with the settings: distill"),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_says_what_makes_it(copied_run: RunDir, part: str) -> None:
    locate, expected = PARTS[part]
    path = locate(copied_run)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = _read(write_report(copied_run))
    assert expected.replace("photos/animals", "DATA" if part == "config" else "photos/animals") in page.text
    assert "could not be understood" not in page.text


def test_soft_labels_of_an_earlier_run_are_named_in_place_of_teachers(copied_run: RunDir) -> None:
    config = read_json(copied_run.config, format=RUN_FORMAT)
    config["settings"]["soft_labels"] = "earlier/run/soft_labels"
    write_json(copied_run.config, config, format=RUN_FORMAT)
    sentence = lead_sentence(read_record(copied_run))
    assert "distilled from the soft labels of earlier/run/soft_labels, on" in sentence and "teachers" not in sentence


def test_a_run_that_has_just_begun_is_shown(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "young")
    write_json(run.config, {"settings": {}}, format=RUN_FORMAT)
    folder = run.teacher(0)
    append_jsonl(
        folder / "metrics.jsonl", {"epoch": 0, "phase": "main", "train_loss": 2.25, "lr": 0.001, "seconds": 3.0}
    )
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 1, "train_lo')  # killed, or being written now
    page = _read(write_report(run))
    assert "2.25" in page.text and "fold 0" in page.text
    assert "could not be understood" not in page.text
    assert "not evaluated yet" in page.text and "not measured yet" in page.text


def test_epochs_repeated_by_a_resume_count_once(copied_run: RunDir) -> None:
    path = copied_run.student / "metrics.jsonl"
    rows = path.read_text().splitlines()
    path.write_text("\n".join(rows[:15] + rows[10:]) + "\n")
    page = _read(write_report(copied_run))
    assert re.search(r"distilled student 24 ", page.text)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("evaluation/evaluation.json", "{", "not valid JSON"),
        ("evaluation/evaluation.json", '{"format": "other", "version": 1}', "expected 'edgedistill-evaluation'"),
        (
            "evaluation/evaluation.json",
            '{"format": "edgedistill-evaluation", "version": 1, "n": "many", "models": {"student": 3}}',
            "classes, n missing or of another type",
        ),
        (
            "evaluation/evaluation.json",
            '{"format": "edgedistill-evaluation", "version": 1, "n": 4, "classes": ["a"], "models": {"student": 3}}',
            "Comparison on the test split: a file",
        ),
        (
            "teacher/oof.json",
            '{"format": "edgedistill-oof", "version": 1, "folds": 3}',
            "Out-of-fold soft labels: a file",
        ),
        ("evaluation/explain.png", "<svg/>", "explain.png: not the PNG that explain.json belongs to"),
        (
            "evaluation/explain.json",
            '{"format": "edgedistill-explain", "version": 1}',
            "Where the student looks: a file",
        ),
        ("evaluation/student.probs.npy", "not numpy", "damaged or not a plain array"),
        ("dataset.csv", "nonsense", "dataset.csv"),
        ("data_report.json", '{"findings": []}', "Data: a file"),
        ("config.json", "[1]", "a JSON list, expected an object"),
        (
            "openvino/bench.json",
            '{"format": "edgedistill-bench", "version": 1, "results": [{"scope": "files", "fps": 4}]}',
            "Speed: a file",
        ),
        (
            "openvino/tune.json",
            '{"format": "edgedistill-tune", "version": 1, "measured": [{"fps": 4, "metric": 1}]}',
            "Tuning: a file",
        ),
        ("student/metrics.jsonl", b"\xff\xfe\x00", "utf-8"),
        ("student/metrics.jsonl", "[" * 100_000, "metrics.jsonl: RecursionError"),
        ("noisy_labels.csv", 'id,suspect\n"' + "x" * 140_000, "Labels that look wrong: a file"),
        ("config.json", '{"commands": 3, "settings": {"student": {"final_data": []}}}', "How it was made: a file"),
    ],
)
def test_a_damaged_file_costs_only_its_own_section(
    copied_run: RunDir, file: str, content: str | bytes, says: str
) -> None:
    path = copied_run.root / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    page = _read(write_report(copied_run))
    assert says in page.text
    assert "Training curves" in page.text and "fold 4" in page.text


def test_figures_that_are_no_numbers_leave_the_others_shown(copied_run: RunDir) -> None:
    path = copied_run.evaluation / "evaluation.json"
    values = json.loads(path.read_text())
    values["models"]["student"] |= {"accuracy": float("nan"), "accuracy_ci95": [float("nan"), float("inf")]}
    path.write_text(json.dumps(values))
    page = _read(write_report(copied_run))
    assert "could not be understood" not in page.text and percent(values["models"]["teacher"]["accuracy"]) in page.text
    assert not [name for _, attributes in page.tags for name in attributes.values() if name in ("nan", "inf")]


RECORDED = {
    "all its flags": (
        ["distill --data photos/ --student mbv3s,lcnet --epochs 5 --final-data train+val --out run"],
        "distill --data photos/ --student mbv3s,lcnet --epochs 5 --final-data train+val --out ROOT --resume",
    ),
    "the last of several": (
        ["teach --data photos/ --out run", "edgedistill distill --resume --out=run --data 'my photos' --lr 0.1"],
        "distill --data 'my photos' --lr 0.1 --out ROOT --resume",
    ),
    "teachers alone": (
        ["edgedistill teach --data photos/ --out run --fold 3 --teacher effb0 --teacher-epochs 7"],
        "distill --data photos/ --teacher effb0 --teacher-epochs 7 --out ROOT --resume",
    ),
    "nothing to read": (["distill --data 'photos"], "distill --data photos/animals --out ROOT --resume"),
    "another program": (["pytest -q"], "distill --data photos/animals --out ROOT --resume"),
}


@pytest.mark.parametrize("case", RECORDED)
def test_what_is_missing_is_made_by_the_runs_own_command(tmp_path: Path, case: str) -> None:
    commands, expected = RECORDED[case]
    run = RunDir(tmp_path / "run")
    write_json(run.config, {"settings": {"data": {"data": "photos/animals"}}, "commands": commands}, format=RUN_FORMAT)
    assert read_record(run).command("distill") == expected.replace("ROOT", str(run.root))
    page = _read(write_report(run))
    assert expected.replace("ROOT", str(run.root)) in page.text and " ".join(commands) in page.text


def test_a_config_of_one_command_is_read(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    write_json(run.config, {"settings": {}, "command": "distill --data x --lr 0.1 --out y"}, format=RUN_FORMAT)
    assert read_record(run).command("distill") == f"distill --data x --lr 0.1 --out {run.root} --resume"
    assert "distill --data x --lr 0.1 --out y" in _read(write_report(run)).text.split("How it was made")[-1]


def test_a_baseline_that_was_not_wanted_is_asked_for(tmp_path: Path) -> None:
    run, line = RunDir(tmp_path / "run"), "distill --data x --no-baseline --lr 0.1"
    for baselines, expected in (
        ("none", f"distill --data x --lr 0.1 --out {run.root} --resume --baselines first"),
        ("first", f"{line} --out {run.root} --resume"),
    ):
        write_json(run.config, {"settings": {"baselines": baselines}, "commands": [line]}, format=RUN_FORMAT)
        assert read_record(run).command("baseline") == expected


@pytest.mark.parametrize("settings", [{"student": {"distillation": False}}, {"soft_labels": "earlier/soft_labels"}])
def test_a_run_without_teachers_of_its_own_misses_none(tmp_path: Path, settings: dict[str, Any]) -> None:
    run = RunDir(tmp_path / "run")
    write_json(run.config, {"settings": settings, "commands": ["distill --data x"]}, format=RUN_FORMAT)
    text = _read(write_report(run)).text
    assert "has no teachers of its own" in text and "No student has finished an epoch" in text
    assert "No teacher has finished" not in text and "soft labels are not finished" not in text


def test_the_page_begins_with_its_own_students_export(copied_run: RunDir) -> None:
    copied_run.openvino.rename(copied_run.root / "openvino-lcnet")
    lead = lead_sentence(read_record(copied_run))
    assert lead.startswith("mbv3s, distilled from 5 effb4 teachers")


@pytest.mark.parametrize(
    ("final_data", "says"),
    [
        ("train", "final evaluation, and none on val; folds cover train only."),
        (
            "train+val",
            "final evaluation; the last epochs of each student are on val too (--final-data train+val); folds",
        ),
        (None, "final evaluation; folds cover train only."),
    ],
)
def test_what_is_said_of_the_splits_holds_for_this_run(copied_run: RunDir, final_data: str | None, says: str) -> None:
    config = read_json(copied_run.config, format=RUN_FORMAT)
    config["settings"]["student"]["final_data"] = final_data
    write_json(copied_run.config, config, format=RUN_FORMAT)
    text = _read(write_report(copied_run)).text
    assert f"No network is trained on test, which is kept for the {says}" in text
    assert "cut first" not in text  # data may bring a split of their own


def test_right_answers_of_folded_classes_are_right() -> None:
    confusion = np.diag([50] * 30)
    confusion[np.arange(13), (np.arange(13) + 1) % 13] += 20
    confusion[np.arange(13, 30), 13 + (np.arange(17) + 1) % 17] += 10
    matrix = _matrix(confusion, [f"c{index}" for index in range(30)], "student")
    name, total, cells = matrix.rows[-1]
    assert (name, total, len(matrix.rows)) == ("the other 17", confusion[13:].sum(), 14)
    assert matrix.columns[-2:] == ("the other 17", "another of these 17")
    assert [(cell.count, cell.right) for cell in cells[-2:]] == [(17 * 50, True), (17 * 10, False)]
    assert sum(cell.count for _, _, row in matrix.rows for cell in row if cell.right) == np.trace(confusion)
    assert all(sum(cell.count for cell in row) == images for _, images, row in matrix.rows)


def test_missing_pictures_are_named_not_fatal(copied_run: RunDir) -> None:
    dataset = read_dataset(copied_run.dataset)
    gone = np.array([str(copied_run.root / "gone" / identity) for identity in dataset.ids])
    columns = (dataset.sha256, dataset.labels, dataset.groups, dataset.splits, dataset.folds)
    (copied_run.root / "data_report.json").unlink()
    write_dataset(Dataset(dataset.ids, gone, *columns, dataset.class_names), copied_run.dataset)
    page = _read(write_report(copied_run))
    assert "the file is missing or cannot be read any more" in page.text
    assert "sizes are unknown" in page.text
    assert not [tag for tag, attributes in page.tags if tag == "img" and attributes.get("class") != "sheet"]


def test_the_most_confident_mistakes_come_first(full_run: RunDir) -> None:
    page = _read(full_run.report)
    probs = np.load(full_run.evaluation / "student.probs.npy")
    labels = np.load(full_run.evaluation / "test_labels.npy")
    wrong = np.sort(probs.max(1)[probs.argmax(1) != labels])[::-1][:24]
    pictures = [attributes for tag, attributes in page.tags if tag == "img" and attributes.get("class") != "sheet"]
    assert len(pictures) == len(wrong) + 1  # and the one label that looks wrong
    shown = re.findall(r"said \w+ (\d+\.\d)% true", page.text)
    assert shown == [*(f"{100 * probability:.1f}" for probability in wrong), "98.0"]


def test_leaking_folds_and_groups_are_called_out(copied_run: RunDir) -> None:
    dataset = read_dataset(copied_run.dataset)
    groups = np.array(["same person"] * len(dataset))
    columns = (dataset.ids, dataset.paths, dataset.sha256, dataset.labels, groups, dataset.splits, dataset.folds)
    write_dataset(Dataset(*columns, dataset.class_names), copied_run.dataset)
    write_array(copied_run.soft_labels / "fold.npy", np.roll(np.load(copied_run.soft_labels / "fold.npy"), 1))
    page = _read(write_report(copied_run))
    assert "1 of 1 groups cross splits or folds" in page.text
    assert "soft_labels/ does not match dataset.csv" in page.text


@pytest.mark.parametrize(
    ("bounds", "says"),
    [
        ((-0.008, 0.031), "95% interval −0.8 to +3.1: not distinguishable on these 525 images"),
        ((0.0, 0.031), "not distinguishable"),
        ((0.001, 0.031), "the distilled student is better"),
        ((-0.05, -0.01), "the distilled student is worse"),
    ],
)
def test_differences_claim_no_more_than_their_interval(bounds: tuple[float, float], says: str) -> None:
    pair = {
        "a": "student",
        "b": "hard_label_student",
        "metric": "accuracy",
        "difference": sum(bounds) / 2,
        "ci95": bounds,
    }
    assert says in difference_sentence(pair | {"p_value": None}, 525)


def test_a_student_no_better_than_the_majority_is_said_at_the_top(tmp_path: Path) -> None:
    skills = {"student": -0.5, "hard_label_student": -0.5, "teacher": 0.2}
    run = FakeRun(tmp_path / "poor", skill=skills, images=200).write(pictures=False)
    page = _read(write_report(run))
    assert "Nothing here shows that it beats always answering the largest class" in page.text


def test_a_run_without_distillation_shows_its_hard_label_student(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "hard", skill={"hard_label_student": 1.2}).write(pictures=False)
    page = _read(write_report(run))
    assert "Hard-label student, test accuracy" in page.text
    assert "The hard-label student on test: images, and share of the true class" in page.text
    assert page.text.count("Same student without distillation") == 0


def test_large_runs_make_a_bounded_page(tmp_path: Path) -> None:
    classes = tuple(f"class {index:04d} with a fairly long name" for index in range(1000))
    run = FakeRun(tmp_path / "large", classes=classes, images=6000, skill={"student": 1.5}).write(pictures=False)
    for fold in range(5, 40):
        shutil.copytree(run.teacher(0), run.teacher(fold))
    page = _read(write_report(run))
    assert run.report.stat().st_size < 600_000
    assert "the 13 most confused of 1,000 classes" in page.text
    assert "the other 987" in page.text
    assert "the ten largest and the ten smallest of 1,000 classes" in page.text
    evaluation = json.loads((run.evaluation / "evaluation.json").read_text())
    matrix = page.text.split("true ↓")[1].split("The most frequent confusions")[0]
    assert f"{evaluation['n']:,}" in page.text and "the other 987" in matrix


def test_a_chosen_benchmark_replaces_the_runs_own(copied_run: RunDir, tmp_path: Path) -> None:
    values = json.loads((copied_run.openvino / "bench.json").read_text())
    values["machine"]["cpu"] = "Cortex-A76"
    chosen = tmp_path / "pi.json"
    chosen.write_text(json.dumps(values))
    page = _read(write_report(copied_run, bench=chosen))
    assert "Cortex-A76, 2 cores" in page.text and "Xeon" not in page.text
    with pytest.raises(ArtifactError, match="no such benchmark; make it with 'bench-fps"):
        write_report(copied_run, bench=tmp_path / "absent.json")


def test_what_is_not_a_run_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no such run folder; make one with 'distill"):
        write_report(RunDir(tmp_path / "absent"))
    (tmp_path / "photos").mkdir()
    with pytest.raises(ArtifactError, match=r"not a run .* --out of 'distill'"):
        write_report(RunDir(tmp_path / "photos"))
    assert not list((tmp_path / "photos").iterdir())


def test_reliability_bins_hold_every_image_once() -> None:
    rng = np.random.default_rng(5)
    probs = rng.dirichlet((0.4, 0.4, 0.4), 500).astype(np.float32)
    probs[0] = (1, 0, 0)
    labels = rng.integers(0, 3, 500)
    bins = reliability_bins(Predictions(probs, probs.argmax(1), probs.max(1)), labels)
    assert sum(item.count for item in bins) == 500
    right = sum(item.accuracy * item.count for item in bins)
    assert right == pytest.approx((probs.argmax(1) == labels).sum())
    for item in bins:
        assert (isinstance(item, ReliabilityBin) and item.low <= item.accuracy <= item.high) or not item.count
        assert not item.count or item.left <= item.confidence <= item.right


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.1, 0.2), (1e-9, 2e-9), (5.0, 5.0), (0.0, 0.0), (0, 1e7)])
def test_ticks_cover_the_data_with_round_numbers(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12 and 2 <= len(ticks) <= 9
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])


def test_tick_labels_share_their_decimals() -> None:
    assert PLAIN.labels([0.0, 0.5, 1.0]) == ["0", "0.5", "1.0"]
    assert PLAIN.labels([0.0, 0.00025, 0.0005]) == ["0", "0.00025", "0.00050"]
    assert PLAIN.labels([1000.0, 1500.0]) == ["1,000", "1,500"]
    assert PLAIN.labels([1e-9, 2e-9]) == ["1.0e−09", "2.0e−09"]
    assert PERCENT.labels([0.7, 0.725, 0.75]) == ["70.0%", "72.5%", "75.0%"]
    assert POINTS.labels([-0.25, 0.0, 0.25]) == ["−25", "0", "+25"]


def test_charts_take_empty_single_and_broken_values() -> None:
    nan = float("nan")
    lines = [
        Series("none", "student", (), ()),
        Series("one", "hard", (1.0,), (0.5,)),
        Series("nan", "peer", (1.0, 2.0), (nan, nan)),
    ]
    chart = str(line_chart(lines, alt="odd", x_label="epoch", unit=PERCENT))
    assert (
        "nan" not in chart.lower().replace("nan ends", "") and chart.startswith("<svg") and "one ends at 50%" in chart
    )
    rows = [Interval("broken", "hard", nan, nan, float("inf"), "–"), Interval("whole", "peer", 0.5, 0.4, 0.6, "50%")]
    for chart in (interval_chart(rows, alt="a", x_label="x", zero=True), bar_chart(rows[:1], alt="b", x_label="x")):
        assert "nan" not in chart and "inf" not in chart and "broken" in chart
    long = Series("long", "student", tuple(map(float, range(100_000))), tuple(np.sin(np.arange(100_000.0))))
    assert len(line_chart([long], alt="long", x_label="epoch", unit=PERCENT)) < 12_000


@pytest.mark.parametrize(("seconds", "says"), [(0.42, "0.4 s"), (59, "59 s"), (61, "1 min 1 s"), (7322, "2 h 2 min")])
def test_durations_read_well(seconds: float, says: str) -> None:
    assert duration(seconds) == says
