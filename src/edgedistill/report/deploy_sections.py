"""What was deployed: the export's certificate and the speed on the machine that was measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from edgedistill.report.blocks import (
    Block,
    Callout,
    Charts,
    Code,
    Details,
    Facts,
    Figure,
    Heading,
    Key,
    Missing,
    Section,
    Table,
    Text,
)
from edgedistill.report.charts import Interval, bar_chart
from edgedistill.report.record import RunRecord
from edgedistill.report.wording import clean, compact, count, finite, number, percent, points, rate, shorten

SCOPES = {
    "files": "Files: encoded image to label",
    "frames": "Frames: decoded image to label",
    "model": "Model: inference only",
}
MAX_BARS = 12
MAX_PANELS = 9
MAX_ROWS = 60
MAX_FACTS = 40
MAX_RUNGS = 24
RUNG_NAMES = {
    "plain": "1, plain",
    "ranges": "2, ranges",
    "float-layers": "3, layers in float",
    "accuracy-control": "4, accuracy control",
    "qat": "5, training",
}
CERTIFICATE_DETAILS = (
    ("files_vs_frames", "Reduced in the JPEG decoder against reduced after decoding"),
    ("fusion", "Fusion"),
    ("audit", "Graph audit"),
    ("reshape", "Other resolutions"),
    ("limits", "Limits"),
)
VERDICT_LEVELS = {"pass": "good", "fail": "bad"}
OWN_NAME = "edgedistill"


def certificate_section(record: RunRecord) -> Section:
    title = "Export certificate"
    if not record.certificates:
        return Section("certificate", title, (Missing("Not exported yet", record.command("export")),))
    blocks: list[Block] = [
        Text(
            "The same images through every form of the network. The columns differ only by the step that made them, so "
            "a difference names its step."
        )
    ]
    for name, certificate in record.certificates[:8]:
        blocks += _certificate(name, certificate)
    return Section("certificate", title, tuple(blocks))


def _certificate(name: str, certificate: dict[str, Any]) -> Iterator[Block]:
    yield Heading(shorten(name))
    outcome = str(certificate.get("verdict", "not run"))
    reasons = "; ".join(shorten(reason, 200) for reason in certificate.get("reasons", ())[:8])
    images = f"{count(certificate.get('n'))} images of {shorten(certificate.get('split') or certificate.get('source'))}"
    sentence = f"Verdict: {outcome}, on {images}." if certificate.get("n") else f"Verdict: {outcome}."
    yield Callout(VERDICT_LEVELS.get(outcome, "note"), f"{sentence} {reasons}".strip())
    columns = certificate.get("columns") or ()
    if columns:
        yield _columns_table(columns)
    for form in [form for form in certificate.get("not_run") or () if isinstance(form, dict)][:4]:
        yield Callout("note", f"{shorten(form.get('name'))} not run: {shorten(form.get('reason'), 300)}")
    yield from _int8(certificate.get("int8") or {})
    worst = [item for item in certificate.get("worst") or () if isinstance(item, dict)][:20]
    if worst:
        rows = tuple(
            (shorten(item.get("id"), 80), shorten(item.get("column")), compact(item.get("probability_difference")))
            for item in worst
        )
        table = Table("Largest differences", ("image", "form", "probability difference"), rows)
        yield Details("Images with the largest differences", (table,))
    for key, label in CERTIFICATE_DETAILS:
        facts = tuple(flatten(certificate.get(key) or {}))
        if facts:
            yield Details(label, (Facts(facts),))


def _int8(int8: dict[str, Any]) -> Iterator[Block]:
    """The decision with its reason; the attempts have a section of their own."""
    if int8.get("decision"):
        level = "good" if int8["decision"] == "shipped" else "note"
        reason = shorten(int8.get("reason") or "no reason recorded", 300)
        yield Callout(level, f"INT8 {shorten(int8['decision'])}: {reason}")


def ladder_section(record: RunRecord) -> Section:
    """How INT8 was sought: each rung with its accuracy and speed, of every exported network."""
    title = "INT8 ladder"
    ladders = [(name, certificate["int8"]) for name, certificate in record.certificates if certificate.get("int8")]
    if not ladders:
        return Section("ladder", title, (Missing("INT8 has not been tried", record.command("export")),))
    blocks: list[Block] = [
        Text(
            "INT8 is sought by ever dearer means, and the first that is both within the accuracy budget and faster than "
            "FP32 on that machine is shipped. Accuracy is on val; speed is the median over rounds in which both take "
            "turns, one image at a time, with a 95% interval."
        )
    ]
    for name, int8 in ladders[:8]:
        blocks += [Heading(shorten(name)), *_int8(int8), *_ladder(int8)]
    return Section("ladder", title, tuple(blocks))


def _ladder(int8: dict[str, Any]) -> Iterator[Block]:
    rungs = [rung for rung in int8.get("rungs") or () if isinstance(rung, dict)]
    measured = [rung for rung in rungs if not rung.get("skipped")][:MAX_RUNGS]
    if measured:
        chosen = [index for index, rung in enumerate(measured) if rung.get("name") == int8.get("chosen")]
        columns = ("what", "rung", "top-1", "points against FP32", "KL from FP32, nats", "layers in float", "images/s")
        caption = (
            f"Attempts on {count(int8.get('val_images'))} val images, calibrated on "
            f"{count(int8.get('calibration_images'))} images"
        )
        rows = tuple(_rung_row(rung) for rung in measured)
        yield Table(caption, (*columns, "× FP32 speed"), rows, strong_row=chosen[0] if chosen else None)
        yield Charts((_speed_figure(measured, int8),))
    skipped = [rung for rung in rungs if rung.get("skipped")][:MAX_RUNGS]
    if skipped:
        words = [f"{_rung_name(rung)}: {shorten(rung['skipped'], 200)}" for rung in skipped]
        yield Text("Not tried. " + "; ".join(words) + ".")


def _rung_name(rung: dict[str, Any]) -> str:
    return RUNG_NAMES.get(str(rung.get("rung")), shorten(rung.get("rung") or "–"))


def _rung_row(rung: dict[str, Any]) -> tuple[str, ...]:
    return (
        shorten(rung.get("name"), 80),
        _rung_name(rung),
        percent(rung.get("top1"), 2),
        points(-(finite(rung.get("drop")) or 0.0)),
        compact(rung.get("kl")),
        count(rung.get("float_layers")),
        rate(rung.get("fps")),
        number(rung.get("speed_ratio"), 2),
    )


def _speed_figure(rungs: list[dict[str, Any]], int8: dict[str, Any]) -> Figure:
    """Speed of each attempt beside FP32's with its interval; what is not faster than 1 is not worth shipping."""
    rows = []
    for rung in rungs[:MAX_BARS]:
        ratio = finite(rung.get("speed_ratio")) or 0.0
        bounds = rung.get("speed_ratio_ci95") or rung.get("speed_ratio_range") or (ratio, ratio)
        low, high = (finite(bound) or ratio for bound in bounds)
        color = "student" if rung.get("name") == int8.get("chosen") else "peer"
        rows.append(Interval(shorten(rung.get("name"), 40), color, ratio, low, high, number(ratio, 2)))
    chart = bar_chart(rows, alt="Speed of each INT8 attempt against FP32", x_label="times the speed of FP32")
    return Figure("Speed against FP32", chart, f"INT8 is taken from {number(int8.get('min_gain'), 2)} times on.")


def _columns_table(columns: list[dict[str, Any]]) -> Table:
    rows = tuple(
        (
            shorten(column["name"]),
            percent(column.get("top1"), 2),
            percent(column.get("disagreement"), 2),
            percent(column.get("disagreement_above_margin"), 2),
            compact(column.get("max_probability_difference")),
            compact(column.get("max_logit_difference")),
        )
        for column in columns[:24]
    )
    heads = (
        "form of the network",
        "top-1",
        "other class than torch",
        "though torch's margin is clear",
        "largest probability difference",
        "largest logit difference",
    )
    return Table("Every form against torch", heads, rows)


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as 'a.b.c' and a short value; at most MAX_FACTS pairs, and it says how many were left out."""
    pairs = list(itertools.islice(_leaves(values, prefix), 1000))
    yield from pairs[:MAX_FACTS]
    if len(pairs) > MAX_FACTS:
        yield "…", f"and {len(pairs) - MAX_FACTS} more"


def _leaves(values: Any, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, list) and any(isinstance(value, dict | list) for value in values):
        for index, value in enumerate(values):
            yield from _leaves(value, f"{prefix}[{index}]")
    elif isinstance(values, list):
        yield shorten(prefix, 80), shorten(", ".join(str(value) for value in values[:20]), 200) or "none"
    elif isinstance(values, float):
        yield shorten(prefix, 80), compact(values)
    else:
        words = {True: "yes", False: "no", None: "none"}
        yield shorten(prefix, 80), words[values] if values is None or isinstance(values, bool) else shorten(values, 200)


def speed_section(record: RunRecord) -> Section:
    title = "Speed"
    if not record.benches:
        missing = Missing("Not measured yet; on the target machine", record.command("bench"))
        return Section("speed", title, (missing,))
    blocks: list[Block] = []
    for name, bench in record.benches[:6]:
        if len(record.benches) > 1:
            blocks.append(Heading(shorten(name)))
        blocks += _bench(bench)
    return Section("speed", title, tuple(blocks))


def machine_name(bench: dict[str, Any]) -> str:
    """'Intel Xeon ..., 2 cores': the machine that the figures belong to."""
    machine = bench.get("machine") or {}
    cores = f", {count(machine['cores'])} cores" if finite(machine.get("cores")) else ""
    return shorten(machine.get("cpu") or "a machine that was not recorded", 60) + cores


def is_ours(result: dict[str, Any]) -> bool:
    return str(result.get("candidate", "")).startswith(OWN_NAME)


def headline_result(record: RunRecord) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(bench, result): our fastest in the scope closest to use (files, else frames, else model) on the first input."""
    measured = [
        (bench, result)
        for _, bench in record.benches
        for result in bench.get("results", ())
        if finite((result.get("fps") or {}).get("median")) is not None and result.get("scope") in SCOPES
    ]
    own = [pair for pair in measured if is_ours(pair[1])]
    for scope in SCOPES:
        here = [pair for pair in own if pair[1]["scope"] == scope]
        if here:
            here = [pair for pair in here if pair[1].get("input") == here[0][1].get("input")]
            return max(here, key=lambda pair: pair[1]["fps"]["median"])
    return None


def _bench(bench: dict[str, Any]) -> Iterator[Block]:
    results = [item for item in bench.get("results", ()) if isinstance(item, dict)]
    yield Text(
        f"Measured on {machine_name(bench)}, in {count(bench.get('rounds'))} rounds that interleave all candidates. Bars are "
        f"medians; whiskers run from the slowest to the fastest round. The three scopes are different work: never compare across them."
    )
    blocks = _comparable(results)
    figures = []
    for (scope, source), here in list(blocks.items())[:MAX_PANELS]:
        title = f"{SCOPES[scope]}, {shorten(source, 40)}" if source else SCOPES[scope]
        note = f"The fastest {MAX_BARS} of {len(here)}; all are in the table." if len(here) > MAX_BARS else ""
        figures.append(Figure(title, _fps_chart(here[:MAX_BARS], title), note))
    if figures:
        yield Charts(tuple(figures), (Key("edgedistill", "student"), Key("other programs", "peer")))
    yield _fps_table([result for here in blocks.values() for result in here])
    yield from _not_measured(bench)
    if bench.get("score"):
        yield Details("Score", (Facts(tuple(flatten(bench["score"]))),))
    if bench.get("command"):
        yield Details(
            "The command and the machine",
            (Code(shorten(bench["command"], 2000)), Facts(tuple(flatten(bench.get("machine") or {})))),
        )


def _comparable(results: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(scope, input) to its results, the fastest first: only what did the same work on the same input is compared."""
    blocks: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for scope in SCOPES:
        for result in results:
            if result.get("scope") == scope:
                blocks.setdefault((scope, str(result.get("input") or "")), []).append(result)
    for here in blocks.values():
        here.sort(key=_median_fps, reverse=True)
    return blocks


def _not_measured(bench: dict[str, Any]) -> Iterator[Block]:
    reasons = {
        f"{shorten(item.get('candidate'))}: {shorten(item.get('reason'), 160)}"
        for item in bench.get("not_measured") or ()
        if isinstance(item, dict)
    }
    if reasons:
        yield Text("Not measured. " + "; ".join(sorted(reasons)[:10]) + ".")


def _median_fps(result: dict[str, Any]) -> float:
    return finite((result.get("fps") or {}).get("median")) or 0.0


def _fps_chart(results: list[dict[str, Any]], title: str) -> Any:
    rows = []
    for result in results:
        fps, median = result["fps"], _median_fps(result)
        what = [result.get("candidate"), result.get("precision"), result.get("mode")]
        low, high = finite(fps.get("min")) or median, finite(fps.get("max")) or median
        color = "student" if is_ours(result) else "peer"
        rows.append(Interval(" · ".join(clean(word) for word in what if word), color, median, low, high, rate(median)))
    return bar_chart(rows, alt=f"Frames per second, {title}", x_label="frames per second")


def _fps_table(results: list[dict[str, Any]]) -> Table:
    rows, colors = [], []
    for result in results[:MAX_ROWS]:
        fps, latency = result.get("fps") or {}, result.get("latency_ms") or {}
        rows.append(
            (
                shorten(result.get("candidate")),
                shorten(result.get("scope")),
                shorten(result.get("mode")),
                shorten(result.get("precision")),
                shorten(result.get("input"), 32),
                rate(fps.get("median")),
                f"{rate(fps.get('min'))} to {rate(fps.get('max'))}",
                " / ".join(number(latency.get(key), 2) for key in ("p50", "p90", "p99")) if latency else "–",
                _ratio(result.get("ratio_to_naive_f32")),
            )
        )
        colors.append("student" if is_ours(result) else "peer")
    columns = (
        "candidate",
        "scope",
        "mode",
        "precision",
        "input",
        "FPS (median)",
        "slowest to fastest round",
        "latency p50 / p90 / p99, ms",
        "× naive f32",
    )
    caption = (
        "Frames per second"
        if len(results) <= MAX_ROWS
        else f"Frames per second, the first {MAX_ROWS} of {len(results)} rows"
    )
    return Table(caption, columns, tuple(rows), colors=tuple(colors))


def _ratio(ratio: Any) -> str:
    middle = finite(ratio.get("median")) if isinstance(ratio, dict) else finite(ratio)
    if middle is None:
        return "–"
    low, high = (finite(ratio.get(key)) for key in ("min", "max")) if isinstance(ratio, dict) else (None, None)
    spread = f" ({low:.2f} to {high:.2f})" if low is not None and high is not None else ""
    return f"{middle:.2f}{spread}"
