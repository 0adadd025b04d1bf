"""report/: the INT8 ladder with accuracy and speed of each rung, for every exported student; hostile records stay text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgedistill.artifacts import RunDir, write_json
from edgedistill.report import write_report


def rung(name: str, kind: str, ratio: float, **more: Any) -> dict[str, Any]:
    figures = {"float_layers": 3, "top1": 0.8125, "drop": 0.0042, "kl": 0.0257, "fps": 1234.0, "fps_f32": 1000.0}
    interval = {"speed_ratio": ratio, "speed_ratio_ci95": [ratio - 0.1, ratio + 0.1]}
    return {"rung": kind, "name": name, **figures, **interval, **more}


def run_with(root: Path, ladders: dict[str, Any]) -> RunDir:
    run = RunDir(root)
    write_json(run.config, {"settings": {}}, format="edgedistill-run")
    for folder, int8 in ladders.items():
        values = {"verdict": "pass", "n": 3, "split": "val", "reasons": [], "columns": [], "int8": int8}
        write_json(root / folder / "stages" / "net" / "certificate.json", values, format="edgedistill-certificate")
    return run


def ladder(*rungs: dict[str, Any], chosen: str | None = None) -> dict[str, Any]:
    decision = {"decision": "shipped" if chosen else "refused", "reason": "because", "chosen": chosen}
    return {**decision, "val_images": 300, "calibration_images": 250, "min_gain": 1.03, "rungs": list(rungs)}


def test_every_rung_of_every_student_is_on_the_page(tmp_path: Path) -> None:
    first = ladder(
        rung("all layers in INT8", "plain", 1.31), rung("in float: head", "float-layers", 1.17), chosen="in float: head"
    )
    tried = {"rung": "qat", "name": "qat", "skipped": "no soft labels"}
    second = ladder(rung("all of it", "plain", 0.91), tried)
    page = write_report(
        run_with(tmp_path, {"openvino": first, "openvino-lcnet": second, "openvino-failed": first})
    ).read_text()
    section = page.split('id="ladder"', 1)[1].split("<section", 1)[0]
    for words in ("all layers in INT8", "in float: head", "81.25%", "−0.4", "0.0257", "1,234", "1.31", "1.17", "0.91"):
        assert words in section, words
    assert "3, layers in float" in section and "5, training: no soft labels" in section
    assert "net in openvino-lcnet" in section and "openvino-failed" not in page


def test_a_run_without_int8_says_how_to_get_it(tmp_path: Path) -> None:
    page = write_report(run_with(tmp_path, {})).read_text()
    assert "INT8 has not been tried" in page and "export-openvino" in page


@pytest.mark.parametrize(
    "rungs", [[{}], [{"rung": ["x"], "name": {}}], "none", [7], [{"skipped": "<script>x</script>"}]]
)
def test_records_of_another_shape_cost_no_other_section(tmp_path: Path, rungs: Any) -> None:
    page = write_report(run_with(tmp_path, {"openvino": ladder() | {"rungs": rungs}})).read_text()
    assert "How it was made" in page and "<script>x" not in page
    assert json.dumps(rungs)  # what a JSON file can hold
