"""The certificate: the same images through every form of the network, and what each one answers.

Columns are compared with torch's logits for the same pixels. A JPEG has two: scaled in the decoder's DCT (``files``) and
decoded whole, then area-averaged (``frames``); torch judges both, and how often the two disagree is told as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from edgedistill.console import progress
from edgedistill.errors import ModelError, UsageError
from edgedistill.export.cpp_runtime import CppRuntime
from edgedistill.export.inference import (
    Logits,
    compile_ir,
    ir_logits,
    onnx_logits,
    open_onnx,
    torch_logits,
    torch_threads,
)
from edgedistill.export.samples import Samples, load_pixels
from edgedistill.images import ImageU8, InputSpec, decode_image, read_bytes
from edgedistill.runtime import Classifier
from edgedistill.tasks import Task

CERTIFICATE_FORMAT = "edgedistill-certificate"
CHUNK = 32
WORST = 10
Probabilities = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Limits:
    """``logits``: largest difference from torch for FP32 forms, and the top-2 margin above which top-1 must agree.
    ``probability``: the same for the runtime's probabilities. ``int8_drop``: top-1 that INT8 may lose.

    Raises UsageError for a limit that is not above 0 (drop: 0 to 1).
    """

    logits: float = 1e-3
    probability: float = 1e-3
    int8_drop: float = 0.01

    def __post_init__(self) -> None:
        if not (self.logits > 0 and self.probability > 0 and 0 <= self.int8_drop <= 1):
            raise UsageError(f"certificate limits {self}: expected values above 0, and a drop from 0 to 1")


@dataclass(frozen=True, eq=False)
class Forms:
    """The forms of one network. ``module``: the network as it was trained (not fused); ``int8`` None: not made.

    ``task``: its heads, all of which are compared. ``int8_shipped``: INT8 is what runs by default, so its accuracy can fail the certificate; else it is only reported.
    """

    module: nn.Module
    spec: InputSpec
    temperature: float
    onnx: Path
    ir: Path
    task: Task
    int8: Path | None = None
    int8_shipped: bool = False

    def probabilities(self, logits: Logits) -> Probabilities:
        return self.task.probabilities(logits, self.temperature)


@dataclass(frozen=True, eq=False)
class _Column:
    """Answers of one form beside the torch answers for the same pixels; logits None where a form gives none.

    ``rows``: the images that it answered (None: all), to which everything else here belongs.
    """

    name: str
    probabilities: Probabilities
    logits: Logits | None
    reference: Logits
    rows: npt.NDArray[np.intp] | None = None

    def image(self, number: int) -> int:
        """Of the samples, that of its ``number``-th answer."""
        return number if self.rows is None else int(self.rows[number])


def certify(forms: Forms, samples: Samples, limits: Limits, *, threads: int | None = None) -> dict[str, Any]:
    """Run every form on every image and judge. Returns the certificate's own part: split, n, limits, columns, worst,
    not_run (forms that cannot run here, with the reason), files_vs_frames, verdict 'pass' or 'fail', and the reasons for
    a 'fail'.

    Raises ImageError that names an unreadable image.
    """
    columns, files, frames = _answers(forms, samples, threads)
    cpp = _cpp_runtime(forms, samples, (files, frames), threads)
    columns += cpp.columns
    summaries = [_summary(column, samples, limits, forms) for column in columns]
    judged = [summary for summary in summaries if forms.int8_shipped or "int8" not in summary["name"]]
    reasons = [reason for summary in judged for reason in _faults(summary, limits)] + cpp.faults
    return {
        "split": samples.source,
        "source": samples.source,
        "n": len(samples),
        "limits": {"logits": limits.logits, "probability": limits.probability, "int8_drop": limits.int8_drop},
        "columns": summaries,
        "not_run": cpp.not_run,
        "files_vs_frames": _files_vs_frames(files, frames, samples, forms),
        "worst": _worst(columns, samples, forms),
        "verdict": "fail" if reasons else "pass",
        "reasons": reasons,
    }


def not_run(reason: str, limits: Limits) -> dict[str, Any]:
    """The certificate where there are no images to run on."""
    return {
        "split": None,
        "source": None,
        "n": 0,
        "limits": {"logits": limits.logits, "probability": limits.probability, "int8_drop": limits.int8_drop},
        "columns": [],
        "not_run": [],
        "worst": [],
        "verdict": "not run",
        "reasons": [reason],
    }


def table_rows(certificate: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(column titles, rows) of a certificate for a printed table."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    titles = ["form", "top-1", "disagrees", "above margin", "max |dp|", "max |dlogit|"]
    rows = [
        [
            column["name"],
            number(column["top1"], ".4f"),
            number(column["disagreement"], ".2%"),
            number(column["disagreement_above_margin"], ".2%"),
            number(column["max_probability_difference"], ".2g"),
            number(column["max_logit_difference"], ".2g"),
        ]
        for column in certificate["columns"]
    ]
    rows += [[form["name"], "not run", "-", "-", "-", "-"] for form in certificate.get("not_run", ())]
    return titles, rows


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Some images, and their network pixels on both ways; ``frames`` is ``files`` where all pixels are the same."""

    paths: tuple[Path, ...]
    files: ImageU8
    frames: ImageU8


def _answers(forms: Forms, samples: Samples, threads: int | None) -> tuple[list[_Column], Logits, Logits]:
    """All columns, and torch's logits on files and on frames; image chunks go through every form, so memory is flat."""
    parts: dict[str, list[Any]] = {}
    with torch_threads(threads), progress("certificate", len(samples)) as bar:
        readers = _readers(forms, threads)
        for start in range(0, len(samples), CHUNK):
            paths = samples.paths[start : start + CHUNK]
            files = load_pixels(paths, forms.spec, decode="reduced")
            frames = load_pixels(paths, forms.spec, decode="full")
            chunk = _Chunk(paths, files, files if np.array_equal(files, frames) else frames)
            for name, read in readers.items():
                parts.setdefault(name, []).append(np.asarray(read(chunk)))
            again = parts["files"][-1] if chunk.frames is files else torch_logits(forms.module, frames, forms.spec)
            parts.setdefault("frames", []).append(again)
            bar.update(0, advance=len(paths), info="")  # type: ignore[arg-type]
    return _columns({name: np.concatenate(chunks) for name, chunks in parts.items()}, forms)


def _readers(forms: Forms, threads: int | None) -> dict[str, Callable[[_Chunk], Any]]:
    """How each form answers a chunk: logits [N, C], or for the runtime probabilities [N, C]."""
    spec, session, ir = forms.spec, open_onnx(forms.onnx, threads=threads), compile_ir(forms.ir, threads=threads)
    runtime = Classifier(forms.ir, precision="f32", threads=threads, decode="reduced", cache_dir=False)
    readers: dict[str, Callable[[_Chunk], Any]] = {
        "files": lambda chunk: torch_logits(forms.module, chunk.files, spec),
        "onnxruntime": lambda chunk: onnx_logits(session, chunk.files, spec),
        "ir-fp32": lambda chunk: ir_logits(ir, chunk.files, spec),
        "runtime-files": lambda chunk: [runtime.classify(path).probabilities for path in chunk.paths],
        "runtime-frames": lambda chunk: [runtime.classify(_decoded(path)).probabilities for path in chunk.paths],
    }
    if forms.int8 is not None:
        int8 = compile_ir(forms.int8, threads=threads)
        readers["ir-int8"] = lambda chunk: ir_logits(int8, chunk.files, spec)
    if forms.int8_shipped:
        shipped = Classifier(forms.ir, precision="int8", threads=threads, decode="reduced", cache_dir=False)
        readers["runtime-int8"] = lambda chunk: [shipped.classify(path).probabilities for path in chunk.paths]
    return readers


def _decoded(path: Path) -> ImageU8:
    data, name = read_bytes(path)
    return decode_image(data, name=name)


def _columns(parts: dict[str, Any], forms: Forms) -> tuple[list[_Column], Logits, Logits]:
    files, frames = parts["files"], parts["frames"]
    columns = [_Column("torch", forms.probabilities(files), files, files)]
    for name in ("onnxruntime", "ir-fp32", "ir-int8"):
        if name in parts:
            columns.append(_Column(name, forms.probabilities(parts[name]), parts[name], files))
    columns.append(_Column("python-runtime-files", parts["runtime-files"].astype(np.float64), None, files))
    columns.append(_Column("python-runtime-frames", parts["runtime-frames"].astype(np.float64), None, frames))
    if "runtime-int8" in parts:
        columns.append(_Column("python-runtime-int8", parts["runtime-int8"].astype(np.float64), None, files))
    return columns, files, frames


@dataclass(frozen=True, eq=False)
class _Cpp:
    """The C++ runtime's columns, why it failed, and [{name, reason}] where it could not be asked."""

    columns: list[_Column]
    faults: list[str]
    not_run: list[dict[str, str]]


def _cpp_runtime(forms: Forms, samples: Samples, torch: tuple[Logits, Logits], threads: int | None) -> _Cpp:
    """``torch``: its logits on files and on frames. TIFFs, which the C++ runtime does not read, are left out."""
    runtime = CppRuntime.find()
    if isinstance(runtime, str):
        return _Cpp([], [], [{"name": "cpp-runtime", "reason": runtime}])
    wanted = [("files", "f32", "reduced", torch[0]), ("frames", "f32", "full", torch[1])]
    if forms.int8_shipped:
        wanted.append(("int8", "int8", "reduced", torch[0]))
    columns, faults = [], []
    for name, precision, decode, reference in wanted:
        try:
            got = runtime.answers(forms.ir, samples.paths, precision=precision, decode=decode, threads=threads)  # type: ignore[arg-type]
        except ModelError as error:
            faults.append(f"cpp-runtime-{name}: {error}")
            continue
        if len(got.rows):
            columns.append(_Column(f"cpp-runtime-{name}", got.probabilities, None, reference[got.rows], got.rows))
    return _Cpp(columns, faults, [])


def _summary(column: _Column, samples: Samples, limits: Limits, forms: Forms) -> dict[str, Any]:
    task, reference = forms.task, forms.probabilities(column.reference)
    differs = (task.answers(column.probabilities) != task.answers(reference)).any(axis=1)
    clear = task.margins(column.reference, forms.temperature) > limits.logits
    finite = np.isfinite(column.probabilities).all()
    truth = samples.truth if column.rows is None else samples.truth[column.rows]
    return {
        "name": column.name,
        "images": len(truth),
        "top1": float(task.right(column.probabilities, truth).mean()),
        "top1_torch": float(task.right(reference, truth).mean()),
        "disagreement": float(differs.mean()),
        "disagreement_above_margin": float((differs & clear).mean()),
        "max_probability_difference": _largest(task.comparable(column.probabilities), task.comparable(reference)),
        "max_logit_difference": None if column.logits is None else _largest(column.logits, column.reference),
        "finite": bool(finite),
    }


def _largest(values: npt.NDArray[Any], reference: npt.NDArray[Any]) -> float:
    # A NaN must not pass as 0 or slip through a comparison: it counts as an infinite difference.
    difference = np.abs(values.astype(np.float64) - reference)
    return float(np.max(np.where(np.isnan(difference), np.inf, difference)))


def _faults(summary: dict[str, Any], limits: Limits) -> list[str]:
    """Why a column is over its limits; INT8 has a limit on accuracy only."""
    name = summary["name"]
    if not summary["finite"]:
        return [f"{name}: answers that are not finite numbers"]
    if "int8" in name:
        drop = summary["top1_torch"] - summary["top1"]
        over = drop > limits.int8_drop + 1e-9
        return [f"{name}: top-1 falls by {drop:.4f}, limit {limits.int8_drop:g}"] if over else []
    faults = []
    if summary["disagreement_above_margin"] > 0:
        share = summary["disagreement_above_margin"]
        faults.append(
            f"{name}: another top-1 than torch on {share:.2%} of the images although torch's top-2 margin is above "
            f"{limits.logits:g}"
        )
    if summary["max_logit_difference"] is not None and not summary["max_logit_difference"] <= limits.logits:
        faults.append(f"{name}: logits differ by {summary['max_logit_difference']:.3g}, limit {limits.logits:g}")
    if not summary["max_probability_difference"] <= limits.probability:
        difference = summary["max_probability_difference"]
        faults.append(f"{name}: probabilities differ by {difference:.3g}, limit {limits.probability:g}")
    return faults


def _files_vs_frames(files: Logits, frames: Logits, samples: Samples, forms: Forms) -> dict[str, Any]:
    """How much it matters, to torch, whether a JPEG was reduced in its DCT or after decoding."""
    task, of_files, of_frames = forms.task, forms.probabilities(files), forms.probabilities(frames)
    return {
        "top1_files": float(task.right(of_files, samples.truth).mean()),
        "top1_frames": float(task.right(of_frames, samples.truth).mean()),
        "disagreement": float((task.answers(of_files) != task.answers(of_frames)).any(axis=1).mean()),
        "max_probability_difference": _largest(task.comparable(of_files), task.comparable(of_frames)),
        "images_with_other_pixels": int((files != frames).any(axis=1).sum()),
    }


def _worst(columns: list[_Column], samples: Samples, forms: Forms) -> list[dict[str, Any]]:
    """The images on which a form strays furthest from torch, one entry for each image."""
    found: dict[int, tuple[float, str]] = {}
    for column in columns[1:]:
        reference = forms.task.comparable(forms.probabilities(column.reference))
        differences = np.abs(forms.task.comparable(column.probabilities) - reference).max(axis=1)
        differences = np.nan_to_num(differences, nan=np.inf)
        for number in np.argsort(-differences)[:WORST].tolist():
            row = column.image(number)
            found[row] = max(found.get(row, (0.0, "")), (float(differences[number]), column.name))
    ranked = sorted(found.items(), key=lambda item: -item[1][0])[:WORST]
    return [
        {"id": samples.ids[row], "column": name, "probability_difference": difference}
        for row, (difference, name) in ranked
    ]
