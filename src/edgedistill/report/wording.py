"""Numbers and differences in words, the same on every part of the page."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Sequence
from typing import Any

from edgedistill.tasks import Task

UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
MINUS = "\N{MINUS SIGN}"
MODEL_NAMES = {
    "majority": "majority baseline",
    "hard_label_student": "hard-label student",
    "student": "distilled student",
    "teacher": "teacher",
}
METRIC_NAMES = {"accuracy": "accuracy", "macro_f1": "macro-F1", "joint_macro_f1": "joint macro-F1"}


def clean(text: object) -> str:
    """Text that any browser and UTF-8 can hold: lone surrogates, control characters and marks that turn the reading
    direction (a name that shows 'exe.png' for 'gnp.exe') become visible stand-ins."""
    decodable = str(text).encode("utf-8", "replace").decode("utf-8")
    return UNSAFE.sub("\N{REPLACEMENT CHARACTER}", decodable)


def shorten(text: object, limit: int = 48) -> str:
    """At most ``limit`` characters, the cut marked."""
    whole = clean(text)
    return whole if len(whole) <= limit else whole[: limit - 1] + "…"


def finite(value: Any) -> float | None:
    """The value as a float, or None where it is missing, not a number or not finite."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        return None
    return float(value)


def number(value: Any, digits: int = 3) -> str:
    """A plain decimal, or a dash for what is missing or not finite."""
    known = finite(value)
    return "–" if known is None else f"{known:,.{digits}f}".replace("-", MINUS)


def compact(value: Any) -> str:
    """Three significant digits over any range: 2.4e-6, 0.083, 3.14, 1,204."""
    known = finite(value)
    if known is None:
        return "–"
    if abs(known) >= 1e7 or 0 < abs(known) < 0.001:
        mantissa, exponent = f"{known:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", MINUS)
    return (f"{known:,.0f}" if abs(known) >= 100 else f"{known:.3g}").replace("-", MINUS)


def count(value: Any) -> str:
    known = finite(value)
    return "–" if known is None else f"{int(known):,}"


def percent(share: Any, digits: int = 1) -> str:
    """A share 0..1 as a percentage."""
    known = finite(share)
    return "–" if known is None else f"{100 * known:.{digits}f}%".replace("-", MINUS)


def percent_interval(bounds: Sequence[Any] | None) -> str:
    """[low, high] shares as '86.0 to 90.2%'."""
    if not bounds or len(bounds) != 2 or finite(bounds[0]) is None or finite(bounds[1]) is None:
        return "–"
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}%"


def points(difference: Any) -> str:
    """A difference of shares as signed percentage points."""
    known = finite(difference)
    return "–" if known is None else f"{100 * known:+.1f}".replace("-", MINUS)


def rate(per_second: Any) -> str:
    """Images or frames a second: no decimals that the measurement does not carry."""
    known = finite(per_second)
    return "–" if known is None else f"{known:,.0f}" if known >= 100 else f"{known:.1f}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


def model_name(key: str) -> str:
    """'student' -> 'distilled student'; of a run with several, 'student-lcnet' -> 'distilled student lcnet'."""
    for kind in ("student", "hard_label_student", "teacher"):
        if key.startswith(f"{kind}-"):
            return f"{MODEL_NAMES[kind]} {shorten(key.removeprefix(f'{kind}-'), 32)}"
    return MODEL_NAMES.get(key, shorten(key))


def verdict(bounds: Sequence[float]) -> str:
    """'better', 'worse' or 'not distinguishable', by whether the 95% interval of the difference leaves zero out."""
    low, high = bounds
    return "better" if low > 0 else "worse" if high < 0 else "not distinguishable"


def level(pair: dict[str, Any]) -> str:
    """How a comparison is marked. A student behind its teacher is what distillation expects, and of two students the
    smaller one may well be the worse: no alarm, no triumph."""
    if "teacher" in (pair["a"], pair["b"]) or pair["b"] == "student":
        return "note"
    return {"better": "good", "worse": "bad"}.get(verdict(pair["ci95"]), "note")


def difference_sentence(pair: dict[str, Any], images: int) -> str:
    """One paired comparison of evaluation.json in words that claim no more than its interval allows."""
    low, high = (float(bound) for bound in pair["ci95"])
    metric = METRIC_NAMES.get(pair["metric"], shorten(pair["metric"]))
    a, b = model_name(pair["a"]), model_name(pair["b"])
    outcome = verdict((low, high))
    conclusion = {
        "better": f"the {a} is better",
        "worse": f"the {a} is worse",
        "not distinguishable": f"not distinguishable on these {images:,} images",
    }[outcome]
    figures = f"{metric} {points(pair['difference'])} points, 95% interval {points(low)} to {points(high)}"
    p_value = finite(pair.get("p_value"))
    test = "" if p_value is None else f" (exact McNemar p {'< 0.001' if p_value < 0.001 else f'= {p_value:.3f}'})"
    return f"{a[:1].upper()}{a[1:]} minus {b}: {figures}: {conclusion}{test}."


def heads_in_words(task: Task) -> str:
    """'color (3 classes), size (a value)'."""
    kinds = {"softmax": "{} classes", "sigmoid": "{} labels, each for itself", "regression": "a value"}
    return ", ".join(f"{shorten(head.name, 40)} ({kinds[head.kind].format(head.width)})" for head in task.heads)
