"""The replay benchmark: recorded tunings become a table whose truth is known, every search pays alike, and
agreement is that of three tunings."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill.benchmarks import tuner_search
from edgedistill.benchmarks.score import Objective
from edgedistill.benchmarks.tuner.explain import words
from edgedistill.benchmarks.tuner.heats import polish
from edgedistill.benchmarks.tuner.journal import Journal
from edgedistill.benchmarks.tuner.measure import Case, deploy_config
from edgedistill.benchmarks.tuner.space import Deployment, Host, Serving, Student, Variant, default_serving, servings
from edgedistill.benchmarks.tuner.truth import Truth
from edgedistill.benchmarks.tuner.tune import incumbent
from edgedistill.benchmarks.tuner_search import (
    Costs,
    Heat,
    Noise,
    Regrets,
    ReplayBench,
    Table,
    noise_of,
    recorded_heats,
    searched,
    speeds_of,
)
from edgedistill.errors import ArtifactError, UsageError
from edgedistill.images import InputSpec
from edgedistill.runtime.bundle import write_deploy

HOST = Host(cores=2, bf16=False, int8_dot_products=True, cpu="made")
CLASSES, IMAGES, PX = 4, 300, 64
MINUTES = 4.0
# As recorded: most slices lie close together, one in eight was disturbed.
REST = tuple(
    np.random.default_rng(3).normal(0, 0.07, 210).tolist() + np.random.default_rng(4).normal(0, 0.3, 30).tolist()
)


def student(name: str) -> Student:
    labels = tuple(f"class {number}" for number in range(CLASSES))
    digest = name.encode().hex().ljust(64, "0")
    return Student(name, Path(name), "model.xml", InputSpec(height=PX, width=PX), digest, digest, labels)


@functools.cache
def made_table() -> Table:
    """Two students; INT8 is faster, eight images per inference double the small one's speed, easy images stay easy."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, IMAGES).astype(np.int32)
    hardness = rng.exponential(1.0, IMAGES)
    students = (student("small"), student("large"))
    logits, fps = {}, {}
    for one, skill, speed in zip(students, (1.3, 2.2), (1100.0, 650.0), strict=True):
        for precision, faster in (("f32", 1.0), ("int8", 1.4)):
            for size in (32, 48, 64):
                variant = Variant(one.name, precision, (size, size))
                margin = skill * (0.5 + 0.5 * size / PX) - hardness
                scores = rng.normal(0, 0.25, (IMAGES, CLASSES))
                scores[np.arange(IMAGES), labels] += margin
                logits[variant] = (3 * scores).astype(np.float32)
                fps[variant] = speed * faster * (PX / size) ** 0.6
    batches = {
        "small": {1: 1.0, 2: 1.35, 4: 1.8, 8: 2.2, 16: 2.3},
        "large": {1: 1.0, 2: 1.1, 4: 1.25, 8: 1.5, 16: 1.55},
    }
    objective = Objective(fps_target=3000.0)
    noise, costs = Noise(0.15, 0.1, REST), Costs(1.5, 2.0, 1.7)
    return Table(
        students,
        HOST,
        Truth.single(labels, students[0].labels),
        objective,
        logits,
        fps,
        gains_of(batches),
        noise,
        costs,
    )


def gains_of(batches: dict[str, dict[int, float]]) -> dict[str, dict[Serving, float]]:
    """What each way of serving multiplies a student's speed by; ``batches``: what each number of images does."""
    return {
        name: {way: of[way.batch] * (1.0 if way.streams == HOST.cores else 0.55) for way in servings(HOST)}
        for name, of in batches.items()
    }


@pytest.mark.parametrize("name", ["tuner", "random", "optuna-tpe"])
def test_every_search_pays_for_the_same_things(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "optuna-tpe":
        pytest.importorskip("optuna")
    benches: list[ReplayBench] = []

    class Watched(ReplayBench):
        def __init__(self, table: Table, seed: int) -> None:
            super().__init__(table, seed)
            benches.append(self)

    monkeypatch.setattr(tuner_search, "ReplayBench", Watched)
    chosen = searched(made_table(), name, minutes=MINUTES, seed=1)
    assert 0.75 * MINUTES * 60 <= benches[0].now <= MINUTES * 60
    assert all(stage in made_table().fps for stage in chosen.stages)
    assert chosen == searched(made_table(), name, minutes=MINUTES, seed=1), "a seed is a replay"


@functools.cache
def doubling_table() -> Table:
    """Five students as accurate as each other; the slowest, image by image, doubles its speed in batches, and no other
    gains anything by them."""
    made, rng, doubles = made_table(), np.random.default_rng(0), "doubling"
    students = tuple(student(name) for name in ("one", "two", "three", "four", doubles))
    labels = rng.integers(0, CLASSES, IMAGES).astype(np.int32)
    hardness = rng.exponential(1.0, IMAGES)
    logits, fps = {}, {}
    for number, one in enumerate(students):
        speed = 900.0 if one.name == doubles else 1500.0 - 40 * number
        for (precision, faster), size in itertools.product((("f32", 1.0), ("int8", 1.2)), (48, 64)):
            scores = rng.normal(0, 0.25, (IMAGES, CLASSES))
            scores[np.arange(IMAGES), labels] += 1.9 * (0.6 + 0.4 * size / PX) - hardness
            variant = Variant(one.name, precision, (size, size))
            logits[variant] = (3 * scores).astype(np.float32)
            fps[variant] = speed * faster * (PX / size) ** 0.6
    batches = {name: {1: 1.0, 2: 1.0, 4: 0.97, 8: 0.93, 16: 0.9} for name in ("one", "two", "three", "four")}
    batches[doubles] = {1: 1.0, 2: 1.5, 4: 2.0, 8: 2.4, 16: 2.6}
    return dataclasses.replace(
        made,
        students=students,
        truth=Truth.single(labels, students[0].labels),
        logits=logits,
        fps=fps,
        gains=gains_of(batches),
    )


def test_a_student_that_pays_in_batches_only_is_found() -> None:
    table = doubling_table()
    at_one = max(table.fps, key=lambda variant: table.fps[variant])
    assert at_one.student == "one", "image by image it would be dropped"
    for seed in range(3):
        chosen = searched(table, "tuner", minutes=MINUTES, seed=seed)
        assert {stage.student for stage in chosen.stages} == {"doubling"} and chosen.serving.batch >= 4
        judge = table.at(ReplayBench(table, seed).level)
        assert judge.best - judge.true_value(chosen) <= 0.02


@functools.cache
def unlike_table() -> Table:
    """INT8 triples the speed of both students and costs only the large one accuracy."""
    made, rng = made_table(), np.random.default_rng(7)
    hardness = rng.exponential(1.0, IMAGES)
    logits, fps = {}, {}
    for variant in made.fps:
        large, int8 = variant.student == "large", variant.precision == "int8"
        margin = (1.4 if large and int8 else 3.2 if large else 1.4) * (0.5 + 0.5 * variant.size[0] / PX) - hardness
        scores = rng.normal(0, 0.25, (IMAGES, CLASSES))
        scores[np.arange(IMAGES), made.truth.codes[:, 0]] += margin
        logits[variant] = (3 * scores).astype(np.float32)
        fps[variant] = (300.0 if large else 1000.0) * (3.0 if int8 else 1.0) * (PX / variant.size[0]) ** 0.6
    quiet = Noise(0.0, 0.0, (0.0,))
    return dataclasses.replace(made, logits=logits, fps=fps, noise=quiet, objective=Objective(fps_target=4000.0))


def test_a_cascade_of_unlike_precisions_is_found_and_deployed(tmp_path: Path) -> None:
    table = unlike_table()
    chosen = searched(table, "tuner", minutes=MINUTES, seed=0)
    assert [(stage.student, stage.precision) for stage in chosen.stages] == [("small", "int8"), ("large", "f32")]
    assert table.best - table.true_value(chosen) <= 0.015
    alike = [dataclasses.replace(stage, precision=one) for one in ("f32", "int8") for stage in chosen.stages]
    pairs = [tuple(alike[:2]), tuple(alike[2:])]
    assert all(table.true_value(dataclasses.replace(chosen, stages=pair)) < table.true_value(chosen) for pair in pairs)
    text = words(chosen)
    assert "small INT8 at" in text and "then large FP32 at" in text and chosen.precision == "int8+f32"
    students = {one.name: one for one in table.students}
    config = deploy_config(Case(chosen, (1.0, 1.0), (), "files"), students, table.objective, HOST)
    for settings in (config.latency, config.throughput):
        assert (settings.precision, settings.later_precision) == ("int8", "f32")
    write_deploy(tmp_path / "deploy.json", config)
    assert incumbent(tmp_path / "deploy.json", table.students, HOST) == chosen
    plain = dataclasses.replace(students["small"], int8_sha256=None)
    assert incumbent(tmp_path / "deploy.json", [plain, students["large"]], HOST) is None


def test_without_optuna_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=r"pip install 'edgedistill\[search-benchmark\]'"):
        searched(made_table(), "optuna-tpe", minutes=MINUTES, seed=0)


def test_agreement_is_of_three() -> None:
    assert Regrets((0.0, 0.009)).agreeing() == 1
    assert Regrets((0.0, 0.02)).agreeing() == pytest.approx(0.25, abs=0.03)


# ---- what is read from journals ----

USUAL = default_serving(HOST)
EIGHT = Serving(2, 2, 8)


def recorded_rows(rounds: int, noise: float) -> list[dict[str, Any]]:
    """Two networks beside the reference, one of them at two servings; a machine that swings by a tenth."""
    rng = np.random.default_rng(0)
    rates = {
        Deployment((Variant("small", "f32", (PX, PX)),), USUAL).key: 1000.0,
        Deployment((Variant("small", "int8", (PX, PX)),), USUAL).key: 1400.0,
        Deployment((Variant("small", "int8", (PX, PX)),), EIGHT).key: 2800.0,
        Deployment((Variant("large", "int8", (PX, PX)),), USUAL).key: 700.0,
    }
    rows = []
    for number in range(rounds):
        level = math.exp(rng.normal(0, 0.1))
        results = {
            f"{key} | throughput files": [fps * level * math.exp(rng.normal(0, noise))] for key, fps in rates.items()
        }
        rows.append({"kind": "round", "heat": "screen 0/0", "round": number, "results": results, "elapsed_s": 9.0})
    return rows


def test_speeds_gains_and_noise_are_those_that_were_recorded() -> None:
    heats = recorded_heats(recorded_rows(60, 0.05))
    students = made_table().students
    variants = [Variant(name, kind, (PX, PX)) for name in ("small", "large") for kind in ("f32", "int8")]
    fps, gains = speeds_of(heats, students, HOST, variants)
    assert fps[variants[1]] / fps[variants[0]] == pytest.approx(1.4, rel=0.06)
    assert fps[variants[3]] / fps[variants[0]] == pytest.approx(0.7, rel=0.06)
    assert variants[2] not in fps, "nobody measured it"
    assert gains["small"][EIGHT] == pytest.approx(2.0, rel=0.06)
    assert gains["large"][EIGHT] == gains["small"][EIGHT], "what nobody measured is the other's"
    assert set(gains["large"]) == set(servings(HOST))
    found = noise_of(heats)
    assert np.std(found.rest) == pytest.approx(0.05, rel=0.25)
    assert found.swing == pytest.approx(0.1, rel=0.3)


def test_what_sets_heats_apart_is_told_from_the_noise_of_rounds() -> None:
    rng = np.random.default_rng(1)
    for luck in (0.0, 0.05):
        heats = [
            Heat(
                [f"case {number}" for number in range(6)],
                rng.normal(0, luck, (6, 1)) + rng.normal(0, 0.1, (1, 6)) + rng.normal(0, 0.02, (6, 6)),
            )
            for _ in range(40)
        ]
        assert noise_of(heats).heat == pytest.approx(luck, abs=0.008)
    bench = ReplayBench(dataclasses.replace(made_table(), noise=Noise(0.0, 0.0, (0.0,), 0.05)), 0)
    cases = [Case(Deployment((Variant("small", "f32", (PX, PX)),), USUAL), (1.0,), (), "files", "throughput", None)]
    rates = []
    for _ in range(400):
        with bench.prepared(cases):
            rates.append([math.log(bench.speed_now(cases[0].label)) for _ in range(2)])
    assert np.std(rates) == pytest.approx(0.05, rel=0.2)
    assert np.ptp(rates, axis=1).max() == 0, "as long as the heat lasts it is the same"


def test_replayed_noise_is_that_of_the_table() -> None:
    bench = ReplayBench(made_table(), 0)
    case = Case(Deployment((Variant("small", "f32", (PX, PX)),), USUAL), (1.0,), (), "files", "throughput", None)
    rates = []
    with bench.prepared([case]):
        for _ in range(4000):
            bench.now += 60.0
            rates.append(math.log(bench.speed_now(case.label)))
    assert np.std(rates) == pytest.approx(math.hypot(0.1, float(np.std(REST))), rel=0.1)


def test_no_speed_is_known_without_noise() -> None:
    """Rounds that lie close together by chance say nothing about the next ones."""
    rates = np.random.default_rng(0).normal(0, 0.1, (6, 5))
    rates[2] = rates[2, 0]
    _, errors = polish(rates)
    assert errors.min() > 0.3 * np.median(errors)


def test_folders_without_a_tuning_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="journal"):
        Journal.read(tmp_path)
    (tmp_path / "journal.jsonl").write_text(json.dumps({"kind": "round"}) + "\n")
    with pytest.raises(ArtifactError, match="edgedistill tune"):
        Journal.read(tmp_path)
    with pytest.raises(ArtifactError):
        tuner_search.read_table([tmp_path])


def test_what_no_tuning_had_time_for_is_left_out() -> None:
    table = dataclasses.replace(made_table(), noise=Noise(0.0, 0.0, (0.0,)))
    missing = Variant("large", "int8", (PX, PX))
    logits = {variant: found for variant, found in table.logits.items() if variant != missing}
    fps = {variant: speed for variant, speed in table.fps.items() if variant != missing}
    chosen = searched(dataclasses.replace(table, logits=logits, fps=fps), "tuner", minutes=MINUTES, seed=0)
    assert missing not in chosen.stages


def test_a_quieter_machine_is_told_apart_better() -> None:
    """The noise is what costs: without it every tuning chooses the same."""
    quiet = dataclasses.replace(made_table(), noise=Noise(0.0, 0.0, (0.0,)))
    chosen = {searched(quiet, "tuner", minutes=MINUTES, seed=seed).key for seed in range(2)}
    assert len(chosen) == 1


def test_a_choice_is_judged_on_the_machine_as_fast_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target in FPS is absolute: what is right on a machine that is faster that day is wrong on the usual one."""
    table = dataclasses.replace(made_table(), noise=Noise(0.5, 0.0, (0.0,)))
    levels = [ReplayBench(table, seed).level for seed in range(8)]
    assert max(levels) > 1.3 and min(levels) < 0.8

    def best_single(asked: Table, name: str, *, minutes: float, seed: int) -> Deployment:
        judge = asked.at(levels[seed])
        singles = [Deployment((variant,), way) for variant in judge.fps for way in servings(judge.host)]
        return max(singles, key=judge.true_value)

    monkeypatch.setattr(tuner_search, "searched", best_single)
    found = tuner_search.replayed(table, ["tuner"], replays=len(levels), minutes=4.0)["tuner"]
    for seed, (level, regret) in enumerate(zip(levels, found.values, strict=True)):
        judge = table.at(level)
        chosen = best_single(table, "tuner", minutes=4.0, seed=seed)
        assert judge.true_fps(chosen) == pytest.approx(level * table.true_fps(chosen))
        assert regret == pytest.approx(judge.best - judge.true_value(chosen)) and regret >= -1e-9
    assert len({best_single(table, "", minutes=4.0, seed=seed).key for seed in range(len(levels))}) > 1
