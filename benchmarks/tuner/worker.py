"""The process in which a heat of deployments is measured, each as a user would run it.

python -m edgedistill.benchmarks.tuner.worker
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgedistill.benchmarks.candidates import Ours
from edgedistill.benchmarks.serve import Case, serve
from edgedistill.images import InputSpec


def prepare(request: dict[str, Any]) -> Case:
    """``deployable``: a deploy.json of this case alone; everything else is as ``candidates.Ours`` takes it."""
    images = [Path(path) for path in request["images"]]
    return Ours(request).prepare(request, images, InputSpec.from_dict(request["input_spec"]))


if __name__ == "__main__":
    serve(prepare)
