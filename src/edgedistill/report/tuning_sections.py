"""What the tuner measured and chose, and why a figure here is not benchmark_app's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgedistill.report.blocks import Block, Callout, Charts, Details, Facts, Figure, Key, Missing, Section, Table, Text
from edgedistill.report.charts import PERCENT, Point, Series, line_chart, scatter_chart
from edgedistill.report.deploy_sections import flatten, machine_name
from edgedistill.report.record import RunRecord
from edgedistill.report.wording import compact, count, duration, finite, number, percent, points, rate, shorten

MAX_ROWS = 40
MAX_SENTENCES = 12
PEER = "benchmark_app"
OWN = "edgedistill"
SCOPE_STEPS = (
    ("model", "our network alone", "normalisation, and the colour order, are part of the network here"),
    ("frames", "from decoded pixels", "resizing, softmax, temperature, one object for each answer"),
    ("files", "from encoded files", "decoding, which often costs more than the network"),
)


def tuning_section(record: RunRecord) -> Section:
    title = "Tuning"
    blocks: list[Block] = []
    if record.tune is None:
        blocks.append(Missing("Not tuned yet; on the target machine", record.command("tune")))
    else:
        blocks += _tuned(record.tune, record.deploy)
    blocks += why_speeds_differ(record)
    return Section("tuning", title, tuple(blocks))


def _tuned(tune: dict[str, Any], deploy: dict[str, Any] | None) -> Iterator[Block]:
    val, objective = tune.get("val") or {}, tune.get("objective") or {}
    yield Text(
        f"Measured on {machine_name(tune)} in {duration(finite(tune.get('seconds')) or 0.0)}, accuracy on "
        f"{count(val.get('images'))} val images, never on test. Goal: {shorten(objective.get('words'), 120)}."
    )
    chosen = tune.get("deploy")
    if isinstance(chosen, dict) and deploy is not None and any(deploy.get(key) != chosen[key] for key in ("stages",)):
        yield Callout("note", "deploy.json has changed since: these figures belong to another deployment.")
    if tune.get("reached") is False:
        yield Callout("bad", "Nothing that was measured reaches the goal; deploy.json was not changed.")
    for sentence in [str(one) for one in tune.get("explanation") or ()][:MAX_SENTENCES]:
        yield Text(shorten(sentence, 600))
    yield _pareto(tune)
    yield from _steps(tune)
    yield _table("Finalists, interleaved", tune.get("finalists") or (), tune)
    if isinstance(tune.get("cascade"), dict):
        yield from _cascade(tune["cascade"])
    measured = tune.get("measured") or ()
    yield Details(f"All {len(measured)} measured deployments", (_table("Measured", measured, tune),))
    left_out = tuple((shorten(key, 80), shorten(reason, 200)) for key, reason in (tune.get("left_out") or {}).items())
    if left_out:
        yield Details(f"{len(left_out)} candidates left out, and why", (Facts(left_out[:MAX_ROWS]),))
    yield Details("Machine", (Facts(tuple(flatten(tune.get("machine") or {}))),))


def _pareto(tune: dict[str, Any]) -> Charts:
    front, chosen = set(tune.get("pareto") or ()), (tune.get("chosen") or {}).get("key")
    rows = [
        row for row in tune.get("measured") or () if finite(row.get("fps")) and finite(row.get("metric")) is not None
    ]
    dots = []
    for row in rows:
        best = row["key"] == chosen
        color = "student" if best else "teacher" if row.get("stages") == 2 else "peer"
        name = f"chosen, {row['key']}" if best else row["key"] if row["key"] in front else ""
        dots.append(Point(row["fps"], row["metric"], color, name, 6.0 if best else 3.0))
    line = sorted((row["fps"], row["metric"]) for row in rows if row["key"] in front)
    series = Series("Pareto front", "student", tuple(x for x, _ in line), tuple(y for _, y in line))
    metric = shorten((tune.get("objective") or {}).get("metric"))
    chart = scatter_chart(
        dots, series, alt=f"{metric} on val against frames per second", x_label="frames per second", unit=PERCENT
    )
    note = "Nothing that was measured is both faster and better than a point on the line."
    keys = (Key("chosen, Pareto front", "student"), Key("cascade", "teacher"), Key("one network", "peer"))
    return Charts((Figure(f"Pareto front: {metric} on val", chart, note),), keys)


def _steps(tune: dict[str, Any]) -> Iterator[Block]:
    rows: list[tuple[str, ...]] = []
    before: dict[str, Any] | None = None
    for step in tune.get("steps") or ():
        rows.append(
            (
                shorten(step.get("what"), 80),
                percent(step.get("metric"), 2),
                "–" if before is None else points(step["metric"] - before["metric"]),
                rate(step.get("fps")),
                "–" if before is None else f"{number(step['fps'] / before['fps'], 2)}",
                number(step.get("value"), 4),
            )
        )
        before = step
    if rows:
        metric = shorten((tune.get("objective") or {}).get("metric"))
        columns = ("step", f"{metric} on val", "points", "FPS", "× before", shorten(tune["objective"].get("goal")))
        yield Table("What each step brought", columns, tuple(rows))


def _table(caption: str, measured: Any, tune: dict[str, Any]) -> Table:
    rows: list[tuple[str, ...]] = []
    strong: int | None = None
    chosen = (tune.get("chosen") or {}).get("key")
    for row in list(measured)[:MAX_ROWS]:
        if row.get("key") == chosen:
            strong = len(rows)
        latency = row.get("latency_ms") or {}
        rows.append(
            (
                shorten(row.get("key"), 110),
                percent(row.get("metric"), 2),
                rate(row.get("fps")),
                f"±{rate(row.get('fps_error'))}",
                " / ".join(number(latency.get(key), 2) for key in ("p50", "p99")) if latency else "–",
                " + ".join(percent(share, 0) for share in row.get("shares") or ()),
                number(row.get("value"), 4),
            )
        )
    columns = ("deployment", "on val", "FPS", "standard error", "p50 / p99, ms", "answered by stage", "goal")
    return Table(caption, columns, tuple(rows), strong_row=strong)


def _cascade(cascade: dict[str, Any]) -> Iterator[Block]:
    fast, slow = cascade.get("fast") or {}, cascade.get("slow") or {}
    first_ms, second_ms = cascade["stage_ms"]
    verdict = "It was chosen." if cascade.get("chosen") else "The best cascade there was; it was not chosen."
    yield Text(
        f"Cascade: {shorten(fast.get('variant'))} answers what it is sure of, {shorten(slow.get('variant'))} the rest. An "
        f"image costs {compact(first_ms)} + r × {compact(second_ms)} ms; with r = {percent(cascade.get('passed_on'))} that is "
        f"{compact(cascade.get('expected_ms'))} ms or {rate(cascade.get('expected_fps'))} FPS, measured "
        f"{rate(cascade.get('measured_fps'))}. It pays against the slow network alone only below r = "
        f"{percent(cascade.get('pays_below'))}. {verdict}"
    )
    curve = [point for point in cascade.get("curve") or () if isinstance(point, dict)]
    xs = tuple(100 * float(point["passed_on"]) for point in curve)
    marks = ((100 * float(cascade["passed_on"]), "threshold"),) if finite(cascade.get("passed_on")) is not None else ()
    label = "images passed on to the slow network, %"
    accuracy = line_chart(
        [Series("cascade", "student", xs, tuple(float(point["metric"]) for point in curve))],
        alt="Metric of the cascade on val against the share that is passed on",
        x_label=label,
        unit=PERCENT,
        marks=marks,
    )
    speed = line_chart(
        [Series("cascade", "student", xs, tuple(float(point["fps"]) for point in curve))],
        alt="Expected frames per second of the cascade against the share that is passed on",
        x_label=label,
        marks=marks,
    )
    yield Charts((Figure("Cascade: metric on val", accuracy), Figure("Cascade: expected FPS", speed)))


# ---- why a figure is not benchmark_app's ----


def why_speeds_differ(record: RunRecord) -> Iterator[Block]:
    """From inference alone to files, one step after the other, each with the time that it adds to an image."""
    for source, rows in _ladders(record):
        table_rows, before = [], None
        for what, fps, why in rows:
            spent = 1e3 / fps
            added = "–" if before is None else f"{spent - before:+.3f}".replace("-", "\N{MINUS SIGN}")
            table_rows.append((what, rate(fps), number(spent, 3), added, why))
            before = spent
        columns = ("measured", "FPS", "ms per image", "ms more than above", "what is in it")
        yield Table(f"Why our FPS differs from benchmark_app's ({source})", columns, tuple(table_rows), numeric=False)


def _ladders(record: RunRecord) -> Iterator[tuple[str, list[tuple[str, float, str]]]]:
    for name, bench in record.benches[:3]:
        rows = _bench_steps(bench)
        if len(rows) > 1:
            yield shorten(name), rows
    scopes = (record.tune or {}).get("scopes") or {}
    rows = []
    for scope, what, why in SCOPE_STEPS:
        fps = finite((scopes.get(scope) or {}).get("fps"))
        if fps:
            rows.append((what, fps, why + _parts(scopes[scope].get("settings") or {})))
    if len(rows) > 1:
        yield "tune.json, the chosen deployment", rows


def _bench_steps(bench: dict[str, Any]) -> list[tuple[str, float, str]]:
    """benchmark_app and our own at one precision, in throughput mode, on the first input of each scope."""
    results = [row for row in bench.get("results") or () if isinstance(row, dict) and row.get("mode") == "throughput"]
    own = [row for row in results if row.get("candidate") == OWN and _fps(row)]
    peers = [row for row in results if row.get("candidate") == PEER and _fps(row)]
    precisions = [row.get("precision") for row in (*peers, *own)]
    rows = []
    for precision in dict.fromkeys(precisions):
        here = [row for row in peers if row.get("precision") == precision][:1]
        rows = [(f"{PEER}, {shorten(precision)}", _fps(row), _why_peer(row)) for row in here]
        for scope, what, why in SCOPE_STEPS:
            found = [row for row in own if row.get("scope") == scope and row.get("precision") == precision][:1]
            rows += [
                (f"{what}, {shorten(precision)}", _fps(row), why + _parts(row.get("settings") or {})) for row in found
            ]
        if len(rows) > 1:
            return rows
    return rows


def _why_peer(row: dict[str, Any]) -> str:
    settings = row.get("settings") or {}
    return (
        f"the network alone, the same input again and again, {count(settings.get('streams'))} streams; unasked it would "
        "run in the CPU's default precision, bfloat16 where there is one"
    )


def _parts(settings: dict[str, Any]) -> str:
    """What the preparation of an image costs in one thread, where it was measured."""
    decode, resize = finite(settings.get("decode_us")), finite(settings.get("resize_us"))
    if decode is None or resize is None:
        return ""
    return f" (decoding {number(decode / 1e3, 2)} ms and resizing {number(resize / 1e3, 2)} ms in one thread)"


def _fps(row: dict[str, Any]) -> float:
    return finite((row.get("fps") or {}).get("median")) or 0.0
