"""Read a run, build its sections, render one page: no network, no scripts, every text escaped."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

import edgedistill
from edgedistill.artifacts import RunDir, write_text
from edgedistill.report.blocks import Callout, Section
from edgedistill.report.data_sections import data_section, folds_section
from edgedistill.report.deploy_sections import certificate_section, ladder_section, speed_section
from edgedistill.report.explain_section import explanation_section
from edgedistill.report.noisy_section import noisy_section
from edgedistill.report.quality_sections import (
    comparison_section,
    confusion_section,
    mistakes_section,
)
from edgedistill.report.record import RunRecord, read_record
from edgedistill.report.reliability_section import reliability_section
from edgedistill.report.summary_sections import headline_section, lead_sentence, making_section
from edgedistill.report.training_sections import curves_section, oof_section
from edgedistill.report.tuning_sections import tuning_section
from edgedistill.report.wording import clean, percent, shorten

SECTIONS: tuple[tuple[str, str, Callable[[RunRecord], Section]], ...] = (
    ("summary", "Summary", headline_section),
    ("comparison", "Comparison on the test split", comparison_section),
    ("data", "Data", data_section),
    ("folds", "Folds", folds_section),
    ("curves", "Training curves", curves_section),
    ("oof", "Out-of-fold soft labels", oof_section),
    ("confusion", "Confusion matrix", confusion_section),
    ("reliability", "Reliability", reliability_section),
    ("mistakes", "Most confident mistakes", mistakes_section),
    ("explain", "Where the student looks", lambda record: explanation_section(record.explanation, run=record.run.root)),
    ("noisy-labels", "Labels that look wrong", noisy_section),
    ("certificate", "Export certificate", certificate_section),
    ("ladder", "INT8 ladder", ladder_section),
    ("speed", "Speed", speed_section),
    ("tuning", "Tuning", tuning_section),
    ("making", "How it was made", making_section),
)


def write_report(run: RunDir, *, bench: Path | None = None) -> Path:
    """RUN/report.html from whatever the run has so far, also while it still trains; returns its path.

    ``bench``: a benchmark JSON to show instead of those in RUN/openvino. A missing part becomes one line with the
    command that makes it; a damaged file costs its own section and is named on top. Raises ArtifactError when the
    folder is missing or not a run, or when ``bench`` is not there.
    """
    record = read_record(run, bench=bench)
    problems = list(record.problems)
    sections = [_guarded(anchor, title, build, record, problems) for anchor, title, build in SECTIONS]
    html = (
        _environment()
        .get_template("report.html.j2")
        .render(
            name=shorten(run.root.resolve().name, 80),
            lead=lead_sentence(record),
            version=edgedistill.__version__,
            sections=sections,
            problems=[shorten(problem, 400) for problem in problems[:20]],
            style=Markup(
                _resource("report.css")
            ),  # ours, not the user's: the only text that is not escaped, with the charts
        )
    )
    write_text(run.report, html)
    return run.report


def _guarded(
    anchor: str, title: str, build: Callable[[RunRecord], Section], record: RunRecord, problems: list[str]
) -> Section:
    """JSON that parses but does not hold what its format promises must not cost the user the rest of the page."""
    try:
        return build(record)
    except Exception as error:  # also csv.Error, RecursionError, OverflowError: it depends on what the file holds
        detail = f"{type(error).__name__}: {error}"
        problems.append(f"{title}: a file of this section does not hold what its format promises ({detail})")
        text = "This section's file could not be understood; run the command that made it again."
        return Section(anchor, title, (Callout("bad", text),))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_resource),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.filters["clean"] = clean
    return environment


def _resource(name: str) -> str:
    return resources.files("edgedistill.report").joinpath(name).read_text(encoding="utf-8")
