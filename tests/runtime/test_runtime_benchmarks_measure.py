"""benchmarks/engine_limit.py and memory_flat.py run from end to end and write what they say (no figure is judged)."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from edgedistill.artifacts import read_json
from edgedistill.benchmarks import engine_limit, memory_flat
from edgedistill.benchmarks.command import exit_with


def test_engine_and_limit_take_turns(make: Any) -> None:
    out = make.folder / "limit.json"
    photos = [str(make.photo(colour)) for colour in make.labels]
    options = ["--rounds", "2", "--seconds", "0.1", "--out", str(out)]
    assert engine_limit.main([str(make.deployable()), "--images", *photos, *options]) == 0
    record = read_json(out, format="edgedistill-engine-limit")
    assert len(record["rounds"]) == 2 and record["settings"]["images"] == 3
    for entry in record["rounds"]:
        assert entry["ratio"] == pytest.approx(entry["engine_fps"] / entry["limit_fps"]) and entry["limit_fps"] > 0
    assert record["summary"]["ratio"]["min"] <= record["summary"]["ratio"]["median"]


def test_memory_is_sampled_over_both_runtimes(make: Any) -> None:
    out = make.folder / "memory.json"
    assert memory_flat.main([str(make.deployable()), "--count", "400", "--out", str(out)]) == 0
    results = read_json(out, format="edgedistill-memory-flat")["results"]
    for name in ("classifier", "engine"):
        assert results[name]["images"] == 400 and len(results[name]["samples_mib"]) == 200
        # 100 MiB over 50,000 images would be 2 KiB per image; this is a smoke test, so a generous multiple of that.
        assert results[name]["growth_mib"] < 60


def test_bad_input_is_one_line_and_an_exit_code(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    broken = make.folder / "broken.jpg"
    broken.write_bytes(b"x")
    bad = [
        (engine_limit, [str(make.deployable()), "--images", str(broken)], 1),
        (engine_limit, [str(make.deployable()), "--images", str(make.photo("red")), "--rounds", "0"], 2),
        (memory_flat, [str(make.deployable()), "--count", "3"], 2),
    ]
    for benchmark, options, code in bad:
        with pytest.raises(SystemExit) as end:
            exit_with(functools.partial(benchmark.main, options))
        assert end.value.code == code
    errors = capsys.readouterr().err
    assert errors.count("error: ") == 3 and "Traceback" not in errors
