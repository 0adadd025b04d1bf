"""timm, where PyPI's torchvision and a CPU-only torch disagree. For those who train and for those who measure torch."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any


@functools.cache
def import_timm() -> Any:
    """The timm module. Beside a CPU-only torch, PyPI's torchvision (which timm imports) first needs two op schemas."""
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _declare_torchvision_ops()
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    import timm

    return timm


@functools.cache
def _declare_torchvision_ops() -> Any:
    """torchvision registers shapes for these two ops although its compiled library did not load; nothing calls them.

    Cached because torch forgets the schemas when the Library object dies.
    """
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
