"""Where the student looks: the sheet that ``edgedistill report --explain`` made, with what its columns show."""

from __future__ import annotations

import base64
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.artifacts import read_json
from edgedistill.errors import ArtifactError
from edgedistill.report.blocks import Block, Missing, Section, Sheet, Table, Text
from edgedistill.report.wording import percent, shorten

EXPLAIN_FORMAT = "edgedistill-explain"
SHEET = "explain.png"
PNG_START = b"\x89PNG\r\n\x1a\n"
MAX_SHEET_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Explanation:
    """``values``: explain.json; ``png``: the sheet's bytes."""

    values: dict[str, Any]
    png: bytes


def read_explanation(path: Path) -> Explanation:
    """``path``: explain.json, with the sheet beside it. Raises ArtifactError for a sheet that is not a PNG of its size."""
    values = read_json(path, format=EXPLAIN_FORMAT)
    sheet = path.with_name(SHEET)
    try:
        png = sheet.read_bytes() if sheet.stat().st_size <= MAX_SHEET_BYTES else b""
    except OSError as error:
        raise ArtifactError(f"{sheet}: cannot be read ({error.strerror or error})") from error
    if not png.startswith(PNG_START):
        raise ArtifactError(f"{sheet}: not the PNG that explain.json belongs to; run 'edgedistill report --explain'")
    return Explanation(values, png)


def explanation_section(explanation: Explanation | None, *, run: Path) -> Section:
    title = "Where the student looks"
    if explanation is None:
        command = shlex.join(["edgedistill", "report", str(run), "--explain"])
        return Section("explain", title, (Missing("No Grad-CAM of test images", command),))
    values = explanation.values
    images = [item for item in values["images"] if isinstance(item, dict)]
    kinds = list(dict.fromkeys((str(item.get("head", "")), bool(item["right"])) for item in images))
    shown = [
        (_kind_words(head, right), [i for i in images if (str(i.get("head", "")), bool(i["right"])) == (head, right)])
        for head, right in kinds
    ]
    lead = Text(
        f"Each test image stands above the same image with {shorten(values['method'])} at layer "
        f"{shorten(values['layer'])}: red is what spoke for the answer that the student gave. "
        f"Rows from the top: {', then '.join(f'the surest {words}' for words, _ in shown)}. A network that looks "
        f"beside the subject has learned something about the photographs, not about the classes."
    )
    data = "data:image/png;base64," + base64.b64encode(explanation.png).decode("ascii")
    blocks: list[Block] = [lead, Sheet(data, "Test images above their Grad-CAM heat maps")]
    for words, items in shown:
        rows = tuple(
            (
                f"{number}. {shorten(item['id'], 60)}",
                shorten(item["predicted"], 40),
                percent(item["probability"]),
                shorten(item["true"], 40),
            )
            for number, item in enumerate(items, start=1)
        )
        caption = f"The {words}, from left to right"
        blocks.append(Table(caption, ("image", "said", "probability", "true"), rows))
    return Section("explain", title, tuple(blocks))


def _kind_words(head: str, right: bool) -> str:
    of = f" of {shorten(head, 40)}" if head else ""
    return f"{'right' if right else 'wrong'} answers{of}"
