"""The top of the page (what came out, and may it be believed) and its end (how to make it again)."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgedistill.artifacts import commands_of
from edgedistill.report.blocks import Block, Callout, Card, Cards, Code, Details, Facts, Missing, Section, Text
from edgedistill.report.deploy_sections import flatten, headline_result, machine_name
from edgedistill.report.record import RunRecord, data_name, setting
from edgedistill.report.wording import (
    count,
    difference_sentence,
    finite,
    heads_in_words,
    level,
    model_name,
    number,
    percent,
    percent_interval,
    rate,
    shorten,
    verdict,
)

MAX_COMMANDS = 40
SCOPE_WORDS = {"files": "image file to label", "frames": "decoded frame to label", "model": "inference only"}


def headline_section(record: RunRecord) -> Section:
    blocks: list[Block] = [Cards(tuple(_cards(record)))]
    blocks += _verdicts(record)
    return Section("summary", "Summary", tuple(blocks))


def lead_sentence(record: RunRecord) -> str:
    """What this is, in one sentence, from whatever the run has recorded so far."""
    student, teacher = architecture(record, "student"), architecture(record, "teacher")
    dataset = record.dataset
    what = student or "A student network"
    distilled = setting(record.config, "student", "distillation") is not False
    labels = setting(record.config, "soft_labels")
    if distilled and isinstance(labels, str) and labels:
        what += f", distilled from the soft labels of {shorten(labels, 60)}"
    elif teacher and distilled:
        folds = f"{dataset.fold_count} " if dataset is not None and dataset.fold_count else ""
        what += f", distilled from {folds}{teacher} teachers"
    if dataset is None:
        return f"{what}."
    name = data_name(record.config)
    source = f"{shorten(name, 60)}: " if name else ""
    asked = (
        f"of {len(dataset.class_names):,} classes" if dataset.task is None else f"with {heads_in_words(dataset.task)}"
    )
    return f"{what}, on {source}{len(dataset):,} images {asked}."


def architecture(record: RunRecord, stage: str) -> str:
    """The network's name as the settings have it, with the exported stage's full name behind a short one."""
    paths = ((stage, "name"), (stage, "architecture"))
    name = next((value for path in paths if isinstance(value := setting(record.config, *path), str)), "")
    exported = record.exported if stage == "student" else ""
    others = setting(record.config, "ensemble", "others") if stage == "teacher" else None
    if isinstance(others, list) and others:
        return shorten(
            " + ".join([name, *(str(other.get("label")) for other in others if isinstance(other, dict))]), 80
        )
    if name and exported and name != exported:
        return shorten(f"{name} ({exported})", 80)
    return shorten(name or exported, 80)


def _cards(record: RunRecord) -> list[Card]:
    models = (record.evaluation or {}).get("models", {})
    images, main = count((record.evaluation or {}).get("n")), record.main_model
    cards: list[Card] = []
    seen: set[str] = set()
    for name, label, color in (
        (main, f"{model_name(main).capitalize()}, test accuracy", "student" if main == "student" else "hard"),
        ("majority", "Always the largest class", "majority"),
        ("hard_label_student", "Same student without distillation", "hard"),
        ("teacher", "Teacher", "teacher"),
        *((name, f"{model_name(name).capitalize()}", "peer") for name in _other_students(models)),
    ):
        if name in models and name not in seen:
            seen.add(name)
            interval = percent_interval(models[name].get("accuracy_ci95"))
            detail = f"95% interval {interval}, {images} test images; macro-F1 {percent(models[name]['macro_f1'])}"
            cards.append(Card(label, percent(models[name]["accuracy"]), detail, color))
    if main not in models:
        cards.insert(0, Card("Distilled student, test accuracy", "–", "not evaluated yet", "student"))
    cards.insert(1, _speed_card(record))
    return cards


def _other_students(models: dict[str, Any]) -> list[str]:
    return [name for name in models if name.startswith("student-")][:6]


def _speed_card(record: RunRecord) -> Card:
    best = headline_result(record)
    if best is None:
        return Card("Frames per second", "–", "not measured yet", "student")
    bench, result = best
    latency = result.get("latency_ms") or {}
    tail = f"; p99 {number(latency['p99'], 1)} ms" if finite(latency.get("p99")) is not None else ""
    words = [SCOPE_WORDS[result["scope"]], result.get("precision"), f"{result.get('mode')} mode", result.get("input")]
    how = ", ".join(shorten(word, 40) for word in words if word)
    return Card("Frames per second", rate(result["fps"]["median"]), f"{how}{tail}; on {machine_name(bench)}", "student")


def _verdicts(record: RunRecord) -> list[Block]:
    blocks: list[Block] = []
    evaluation = record.evaluation
    if evaluation is None:
        blocks.append(Missing("The test split has not been evaluated", record.command("distill")))
    else:
        blocks += [
            Callout(level(pair), _judgement(pair, evaluation))
            for pair in evaluation.get("paired", ())
            if pair["a"] == record.main_model
            and pair["b"] in ("majority", "hard_label_student")
            and pair["metric"] == "accuracy"
        ]
        blocks += _collapsed(record)
    for name, certificate in record.certificates[:4]:
        if certificate.get("verdict") == "fail":
            blocks.append(Callout("bad", f"The export of {shorten(name)} failed its certificate: do not deploy it."))
    return blocks


def _judgement(pair: dict[str, Any], evaluation: dict[str, Any]) -> str:
    sentence = difference_sentence(pair, int(evaluation["n"]))
    if pair["b"] == "majority" and verdict(pair["ci95"]) != "better":
        unshown = "Nothing here shows that it beats always answering the largest class: train longer, or on more data."
        return f"{sentence} {unshown}"
    return sentence


def _collapsed(record: RunRecord) -> list[Block]:
    """A student that never answers some classes can look accurate on unbalanced data; say so at the top."""
    student = record.predictions.get(record.main_model)
    if student is None or record.test_labels is None:
        return []
    present = np.unique(record.test_labels)
    never = np.setdiff1d(present, np.unique(student.predicted))
    if not len(never):
        return []
    names = ", ".join(shorten(record.class_names[index], 24) for index in never[:5])
    more = f" and {len(never) - 5:,} more" if len(never) > 5 else ""
    return [
        Callout(
            "bad",
            f"On the test split the student never answered {len(never):,} of {len(present):,} classes: {names}{more}.",
        )
    ]


def making_section(record: RunRecord) -> Section:
    title = "How it was made"
    config = record.config
    if not config:
        return Section("making", title, (Missing("No config.json with the settings", record.command("distill")),))
    blocks: list[Block] = []
    lines = commands_of(config)
    if len(lines) > MAX_COMMANDS:
        blocks.append(Text(f"The last {MAX_COMMANDS} of {len(lines):,} commands:"))
    if lines:
        blocks.append(Code("\n".join(shorten(line, 4000) for line in lines[-MAX_COMMANDS:])))
    facts = [
        (key, shorten(config[key], 120)) for key in ("created", "seed", "dataset_hash") if config.get(key) is not None
    ]
    if record.deploy and record.deploy.get("cpu"):
        facts.append(("exported on", shorten(record.deploy["cpu"], 120)))
    if facts:
        blocks.append(Facts(tuple(facts)))
    for key, summary in (("settings", "Settings"), ("versions", "Versions"), ("machine", "Training machine")):
        pairs = tuple(flatten(config.get(key) or {}))
        if pairs:
            blocks.append(Details(summary, (Facts(pairs),)))
    return Section("making", title, tuple(blocks))
