"""OpenVINO's own benchmark_app as a candidate: scope ``model`` only, a fresh process per slice."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill.benchmarks.timing import CandidateError, Slice

# The console script may be missing or belong to another Python; the module behind it is in the openvino wheel.
LAUNCH = "import sys; from openvino.tools.benchmark.main import main; sys.exit(main())"
START_LIMIT_S = 180.0


@dataclass(frozen=True)
class BenchmarkApp:
    """The settings are ours, passed by hand, so that both measure the same IR in the same configuration.

    Its latency is a median per run only, so its rows show none. Reading, compiling and the first inference are outside its time.
    """

    model: Path
    mode: str
    precision: str
    settings: dict[str, Any]

    def command(self, seconds: float, folder: str) -> list[str]:
        fixed = ["-hint", "none", "-infer_precision", self.precision]
        fixed += ["-nstreams", str(self.settings["streams"]), "-nthreads", str(self.settings["threads"])]
        fixed += ["-pin", "YES" if self.settings["pinning"] else "NO"]
        if self.mode == "latency":
            fixed += ["-api", "sync"]
        else:
            fixed += ["-api", "async", "-nireq", str(self.settings["requests"])]
        if self.settings.get("batch", 1) > 1:
            fixed += ["-b", str(self.settings["batch"])]
        report = ["-report_type", "no_counters", "-json_stats", "true", "-report_folder", folder]
        # Whole seconds only.
        duration = ["-t", str(max(1, round(seconds)))]
        return [sys.executable, "-c", LAUNCH, "-m", str(self.model), "-d", "CPU", *fixed, *duration, *report]

    def run(self, seconds: float) -> Slice:
        """Raises CandidateError with its last line when it fails."""
        with tempfile.TemporaryDirectory(prefix="edgedistill-bench-") as folder:
            try:
                done = subprocess.run(
                    self.command(seconds, folder),
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=seconds + START_LIMIT_S,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise CandidateError(f"benchmark_app: {error}") from error
            report = Path(folder) / "benchmark_report.json"
            if done.returncode != 0 or not report.is_file():
                lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
                raise CandidateError(f"benchmark_app ended with code {done.returncode}: {lines[-1] if lines else ''}")
            return slice_of(json.loads(report.read_text(encoding="utf-8")))


def slice_of(report: dict[str, Any]) -> Slice:
    """Its JSON report: iterations times batch images in milliseconds. Raises CandidateError for another form."""
    try:
        results, setup = report["execution_results"], report["configuration_setup"]
        count = int(results["total number of iterations"]) * int(setup["batch size"])
        return Slice(count, float(results["total execution time (ms)"]) / 1e3)
    except (KeyError, TypeError, ValueError) as error:
        raise CandidateError(f"benchmark_app: its report has another form than expected ({error!r})") from error
