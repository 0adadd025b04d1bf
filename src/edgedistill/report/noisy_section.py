"""Labels that look wrong to the teachers that never saw the image."""

from __future__ import annotations

import csv
import itertools

from edgedistill.report.blocks import Callout, Gallery, Missing, Picture, Section, Text
from edgedistill.report.quality_sections import MAX_PICTURES, paths_of, thumbnail
from edgedistill.report.record import RunRecord
from edgedistill.report.wording import shorten

ANCHOR, TITLE = "noisy-labels", "Labels that look wrong"


def noisy_section(record: RunRecord) -> Section:
    path = record.run.root / "noisy_labels.csv"
    if not path.exists():
        return Section(
            ANCHOR,
            TITLE,
            (
                Missing(
                    "Training images have not been compared with their held-out teachers yet", record.command("distill")
                ),
            ),
        )
    with path.open(encoding="utf-8", newline="") as file:
        suspects = list(itertools.takewhile(lambda row: row["suspect"] == "1", csv.DictReader(file)))
    if not suspects:
        return Section(ANCHOR, TITLE, (Callout("good", "No held-out teacher confidently contradicts a label."),))
    shown = suspects[:MAX_PICTURES]
    paths = paths_of(record, [row["id"] for row in shown])
    what = "labels of training images" if "head" in suspects[0] else "training images"
    lead = Text(
        f"{len(suspects):,} {what} look like another class to the teacher that never saw them (more like it "
        f"than that class's own images on average); these are the {len(shown)} clearest. All are in noisy_labels.csv, the "
        "clearest first. Correct them where they are wrong; 'distill --drop-noisy 0.02' leaves out the clearest 2%."
    )
    return Section(ANCHOR, TITLE, (lead, Gallery(tuple(_picture(row, paths.get(row["id"])) for row in shown))))


def _picture(row: dict[str, str], path: str | None) -> Picture:
    """The head, where images have several labels, stands before what it says."""
    data, problem = thumbnail(path)
    head = f"{row['head']}: " if "head" in row else ""
    return Picture(
        data=data,
        name=shorten(row["id"], 60),
        predicted=shorten(head + row["suggested"], 40),
        predicted_probability=float(row["suggested_probability"]),
        true=shorten(head + row["label"], 40),
        true_probability=float(row["self_confidence"]),
        problem=problem,
    )
