"""bench-fps: units, rounds, ratios and records are what they claim; what could not be measured is said, with the reason."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from pathlib import Path

import pytest

from edgedistill.benchmarks import serve
from edgedistill.benchmarks.bench_fps import BenchResult, measure_entries, result_rows, short
from edgedistill.benchmarks.benchmark_app import BenchmarkApp, slice_of
from edgedistill.benchmarks.machine import artifact_hash, machine_record
from edgedistill.benchmarks.plan import BenchSettings, Entry, cpp_disagrees, unlike_ours
from edgedistill.benchmarks.plot import plot_bench
from edgedistill.benchmarks.score import score
from edgedistill.benchmarks.timing import (
    CandidateError,
    Slice,
    Spread,
    Worker,
    WorkerCase,
    interleave,
    percentiles_ms,
    ratios,
    round_order,
)
from edgedistill.errors import UsageError


@dataclasses.dataclass
class Fake:
    """A runner that sleeps as long as it is asked to and says what it is told to say about it."""

    name: str
    log: list[str]
    fps: float = 100.0
    unit: float = 1.0
    latency_unit: float = 1.0
    breaks_in_round: int = -1

    def run(self, seconds: float) -> Slice:
        self.log.append(self.name)
        if self.log.count(self.name) - 1 == self.breaks_in_round:
            raise CandidateError("out of memory")
        start = time.perf_counter()
        time.sleep(seconds)
        elapsed = time.perf_counter() - start
        count = max(1, round(self.fps * elapsed))
        each_us = elapsed / count * 1e6 * self.latency_unit
        return Slice(count, elapsed * self.unit, (each_us,) * count)


def test_the_score_is_the_contests_formula() -> None:
    assert score(0.7292, 162.5, 200) == pytest.approx(0.75419)
    assert score(0.8, 500, 200) == score(0.8, 200, 200), "beyond the target more speed is worth nothing"
    assert score(0.8, 100, 200, w=1.0) == pytest.approx(0.8)
    assert score(0.8, 100, 200, w=0.0) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ((72.92, 100, 200), "accuracy"),
        ((0.7, -1, 200), "fps"),
        ((0.7, 100, 0), "fps_target"),
        ((0.7, float("nan"), 200), "fps"),
        ((0.7, 100, 200, 1.5), "weight"),
    ],
)
def test_a_score_out_of_range_is_refused(arguments: tuple[float, ...], names: str) -> None:
    with pytest.raises(UsageError, match=names):
        score(*arguments)


@pytest.mark.parametrize(("count", "rounds"), [(1, 5), (4, 4), (5, 3), (11, 5), (3, 9)])
def test_every_round_measures_everyone_once_in_rotated_order(count: int, rounds: int) -> None:
    orders = [round_order(count, number, rounds) for number in range(rounds)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert len({order[0] for order in orders}) == min(count, rounds), "somebody would stand first twice too often"


def test_rounds_interleave_the_candidates() -> None:
    log: list[str] = []
    runners = [Fake(name, log) for name in "abc"]
    outcomes = interleave(runners, rounds=3, seconds=0.01)
    assert [sorted(log[start : start + 3]) for start in (0, 3, 6)] == [list("abc")] * 3
    assert log[0:3] != log[3:6] != log[6:9]
    assert all(isinstance(outcome, list) and len(outcome) == 3 for outcome in outcomes)


def test_a_candidate_that_breaks_is_left_out_and_the_others_go_on() -> None:
    log: list[str] = []
    outcomes = interleave([Fake("a", log), Fake("b", log, breaks_in_round=1)], rounds=4, seconds=0.01)
    assert isinstance(outcomes[0], list) and len(outcomes[0]) == 4
    assert isinstance(outcomes[1], CandidateError)
    assert log.count("b") == 2, "it was asked again after it broke"


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"unit": 1e-3}, "says that it ran"),
        ({"unit": 1e3}, "says that it ran"),
        ({"unit": 0.0}, "says that it ran"),
        ({"latency_unit": 1e-3}, "latencies do not add up"),
        ({"latency_unit": 1e3}, "latencies do not add up"),
    ],
    ids=["milliseconds", "kiloseconds", "frozen clock", "latency in ms", "latency in ns"],
)
def test_a_wrong_unit_or_a_frozen_clock_is_caught(fault: dict[str, float], says: str) -> None:
    (outcome,) = interleave([Fake("a", [], **fault)], rounds=1, seconds=0.1)
    assert isinstance(outcome, CandidateError)
    assert says in str(outcome)


def test_a_known_sleep_gives_the_expected_fps_and_latency() -> None:
    case = serve.Case(step=lambda: time.sleep(0.005))
    result = serve.measure(case, 0.3)
    one = Slice(result["count"], result["seconds"], tuple(result["latency_us"]))
    # A sleep never ends early; on a busy machine it ends late. A wrong unit would be off by 1000.
    assert 20 <= one.fps <= 200
    latency = percentiles_ms([one])
    assert latency is not None
    assert 5.0 <= latency["p50"] <= latency["p90"] <= latency["p99"] <= 300


def test_the_loop_counts_to_the_last_answer_on_the_clocks_own_ticks() -> None:
    ticks = itertools.count(0, 4_000_000)  # 4 ms between readings
    result = serve.measure(serve.Case(step=lambda: None), 0.01, clock=lambda: next(ticks))
    assert result == {"count": 3, "seconds": 0.012, "latency_us": [4000.0, 4000.0, 4000.0]}
    ticks = itertools.count(0, 500_000_000)
    result = serve.measure(serve.Case(run=lambda seconds: 50), 0.5, clock=lambda: next(ticks))
    assert result == {"count": 50, "seconds": 0.5, "latency_us": []}


def test_percentiles_are_milliseconds_over_the_images_of_all_rounds() -> None:
    first = Slice(50, 1.0, tuple(1000.0 * n for n in range(1, 51)))
    second = Slice(50, 1.0, tuple(1000.0 * n for n in range(51, 101)))
    assert percentiles_ms([first, second]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert percentiles_ms([Slice(10, 1.0)]) is None


def test_ratios_are_taken_round_by_round_so_a_slow_minute_cancels() -> None:
    base = [Slice(100, 1.0), Slice(50, 1.0), Slice(200, 1.0)]
    twice = [Slice(200, 1.0), Slice(100, 1.0), Slice(400, 1.0)]
    assert ratios(twice, base) == Spread(2.0, 2.0, 2.0)
    assert Spread.of([one.fps for one in twice]) == Spread(200.0, 100.0, 400.0)
    assert Spread(200.0, 100.0, 400.0).relative == pytest.approx(1.5)


def test_rows_hold_medians_ratios_and_units() -> None:
    log: list[str] = []
    planned = [
        Entry("edgedistill", "files", "latency", "x.jpg", "f32", runner=Fake("ours", log, fps=400)),
        Entry("naive-f32", "files", "latency", "x.jpg", "f32", runner=Fake("naive", log, fps=100)),
        Entry("torch", "files", "latency", "x.jpg", "f32", reason="torch is not installed"),
        Entry("edgedistill", "model", "latency", "tensor", "f32", runner=Fake("model", log, fps=400)),
    ]
    entries = measure_entries(planned, rounds=3, seconds=0.1)
    ours, naive, model = result_rows(entries)
    assert log[:6].count("model") == 0, "two scopes were measured in the same rounds"
    assert ours["fps"]["median"] == pytest.approx(400, rel=0.1)
    assert ours["fps"]["min"] <= ours["fps"]["median"] <= ours["fps"]["max"]
    assert ours["latency_ms"]["p50"] == pytest.approx(2.5, rel=0.1)
    assert ours["ratio_to_naive_f32"]["median"] == pytest.approx(4, rel=0.15)
    assert naive["ratio_to_naive_f32"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert model["ratio_to_naive_f32"] is None, "a ratio across scopes means nothing"


def test_a_peer_that_computes_something_else_is_named() -> None:
    def entry(candidate: str, answer: tuple[float, ...], scope: str = "model") -> Entry:
        return Entry(candidate, scope, "latency", "tensor", "f32", answer=answer)

    ours = entry("edgedistill", (0.7, 0.2, 0.1))
    assert unlike_ours([ours, entry("naive-f32", (0.701, 0.199, 0.1))], 0.01) == []
    swapped = entry("onnxruntime", (0.2, 0.7, 0.1))
    other_classes = entry("torch", (0.7, 0.3))
    assert unlike_ours([ours, swapped, other_classes], 0.01) == ["onnxruntime", "torch"]
    assert unlike_ours([ours, entry("naive-f32", (0.5, 0.4, 0.1), "files")], 0.01) == [], "files has other pixels"
    files = [entry("edgedistill", (0.6, 0.3, 0.1), "files"), entry("edgedistill-cpp", (0.3, 0.6, 0.1), "files")]
    entries = [ours, entry("edgedistill-cpp", (0.9, 0.8, 0.1)), *files]
    assert cpp_disagrees(entries, 0.01) == ["model f32: 0.6", "files f32: 0.3"]
    assert cpp_disagrees(entries, 0.01, single=False) == ["files f32: 0.3"], "outputs of heads are no softmax"


WORKER = """
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("serve", sys.argv[1])
serve = importlib.util.module_from_spec(spec); sys.modules["serve"] = serve; spec.loader.exec_module(serve)
def prepare(request):
    print("a library that prints to standard output")
    if request["scope"] == "broken":
        raise RuntimeError("cannot compile")
    if request["scope"] == "dies":
        print("Killed by nobody in particular", file=sys.stderr, flush=True); os._exit(7)
    if request["scope"] == "hangs":
        time.sleep(60)
    if request["scope"] == "throughput":
        return serve.Case(run=lambda seconds: (time.sleep(seconds), 7)[1], precision="bf16")
    return serve.Case(step=lambda: time.sleep(0.002), settings={"threads": 2}, answer=[0.75, 0.25])
serve.serve(prepare)
"""


@pytest.fixture
def worker_command(tmp_path: Path) -> list[str]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    return [sys.executable, str(script), str(Path(serve.__file__).resolve())]


def test_a_process_answers_with_slices_and_sleeps_in_between(worker_command: list[str]) -> None:
    with Worker(worker_command) as worker:
        latency = WorkerCase.prepare(worker, "l", {"scope": "latency"})
        throughput = WorkerCase.prepare(worker, "t", {"scope": "throughput"})
        assert (latency.settings, latency.answer) == ({"threads": 2}, (0.75, 0.25))
        assert (throughput.precision, throughput.answer) == ("bf16", ())
        outcomes = interleave([latency, throughput], rounds=2, seconds=0.1)
        time.sleep(1.1)
        latency.run(0.05)
        assert worker.idle_s > 1
        assert not worker.spins
    slices = outcomes[0]
    assert isinstance(slices, list)
    assert all(one.count == len(one.latency_us) and 20 <= one.fps <= 500 for one in slices)
    assert isinstance(outcomes[1], list)
    assert all(one.count == 7 and not one.latency_us for one in outcomes[1])


def test_a_process_that_burns_time_while_idle_is_noticed(worker_command: list[str]) -> None:
    with Worker(worker_command) as worker:
        worker.idle_s, worker.idle_cpu_s = 10.0, 4.0
        assert worker.spins


@pytest.mark.parametrize(
    ("scope", "limit_s", "says"),
    [
        ("broken", 30.0, "RuntimeError: cannot compile"),
        ("dies", 30.0, "ended with code 7: Killed by nobody"),
        ("hangs", 0.3, "no answer in 0.3 s"),
    ],
)
def test_what_went_wrong_in_a_process_is_told(worker_command: list[str], scope: str, limit_s: float, says: str) -> None:
    with Worker(worker_command) as worker, pytest.raises(CandidateError, match=says):
        worker.request({"do": "prepare", "case": "x", "scope": scope}, limit_s=limit_s)


def test_a_program_that_is_not_there_is_told() -> None:
    with pytest.raises(CandidateError, match="cannot be started"):
        Worker(["/no/such/python"])


def test_benchmark_apps_report_is_read_in_its_own_units() -> None:
    report = {
        "configuration_setup": {"batch size": "2"},
        "execution_results": {"total number of iterations": "97", "total execution time (ms)": "1003.58"},
    }
    one = slice_of(report)
    assert (one.count, one.seconds) == (194, pytest.approx(1.00358))
    with pytest.raises(CandidateError, match="another form"):
        slice_of({"execution_results": {}})


def test_benchmark_app_gets_our_streams_threads_and_requests(tmp_path: Path) -> None:
    settings = {"streams": 2, "threads": 4, "requests": 3, "batch": 8, "pinning": False}
    command = BenchmarkApp(tmp_path / "model.xml", "throughput", "f32", settings).command(2.0, "out")
    words = " ".join(command)
    for option in (
        "-infer_precision f32",
        "-nstreams 2",
        "-nthreads 4",
        "-nireq 3",
        "-b 8",
        "-pin NO",
        "-t 2",
        "-api async",
    ):
        assert option in words
    assert "-api sync" in " ".join(BenchmarkApp(tmp_path / "m.xml", "latency", "f32", settings).command(1.0, "out"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rounds": 0}, "--rounds 0"),
        ({"seconds": 0.0}, "--seconds 0.0"),
        ({"seconds": float("inf")}, "--seconds inf"),
        ({"scopes": ("disk",)}, "--scope disk: unknown"),
        ({"scopes": ()}, "--scope: nothing"),
        ({"vs": ("naive", "tensorrt")}, "--vs tensorrt: unknown"),
        ({"vs": ("naive", "naive")}, "twice"),
        ({"precisions": ("fp16",)}, "--precision fp16"),
        ({"fps_target": 200.0}, "together"),
        ({"fps_target": 200.0, "accuracy": 72.9}, "a share, not a percentage"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        BenchSettings(path=tmp_path, **options)  # type: ignore[arg-type]


def test_the_machine_record_says_what_the_figures_hang_on() -> None:
    record = machine_record()
    json.dumps(record)
    assert record["cpu"] and record["cores"] >= 1 and record["kernel"]
    assert {"openvino", "numpy"} <= set(record["versions"])


def test_the_artifact_hash_depends_on_every_byte_and_not_on_the_order(tmp_path: Path) -> None:
    one, two = tmp_path / "model.xml", tmp_path / "model.bin"
    one.write_bytes(b"a")
    two.write_bytes(b"b")
    before = artifact_hash([one, two])
    assert artifact_hash([two, one]) == before
    two.write_bytes(b"c")
    assert artifact_hash([one, two]) != before


def test_numbers_are_short_and_keep_their_size() -> None:
    assert [short(value) for value in (1234.5, 123.4, 12.34, 1.234, 0.05)] == ["1234", "123", "12.3", "1.23", "0.05"]


def _row(candidate: str, median: float, scope: str = "files") -> dict[str, object]:
    fps = {"median": median, "min": 0.9 * median, "max": 1.2 * median}
    named = {"candidate": candidate, "scope": scope, "mode": "latency", "precision": "f32", "input": "x.jpg"}
    return named | {"fps": fps, "latency_ms": None, "ratio_to_naive_f32": None}


def test_the_plot_is_a_png_and_other_names_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    machine = {"cpu": "a processor", "cores": 2}
    record = {"machine": machine, "rounds": 3, "results": [_row("edgedistill", 300), _row("naive-f32", 80)]}
    plot_bench(record, tmp_path / "fps.png")
    assert (tmp_path / "fps.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match=r"\.png"):
        plot_bench(record, tmp_path / "fps.pdf")


def test_tables_keep_scopes_apart_and_name_what_is_missing() -> None:
    missing = {"candidate": "torch", "scope": "files", "mode": "latency", "precision": "f32", "input": "x.jpg"}
    record = {
        "results": [_row("edgedistill", 300), _row("edgedistill", 900, "model")],
        "not_measured": [missing | {"reason": "torch is not installed; pip install torch"}],
    }
    tables = BenchResult(record, ()).tables()
    assert [str(table.title) for table in tables] == ["files: x.jpg", "model: x.jpg"]
    assert "torch not measured: torch is not installed; pip install torch" in str(tables[0].caption)
    assert tables[0].row_count == 2 and tables[1].caption is None
