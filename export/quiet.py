"""Converters without their noise: warnings, prints on standard output, and statistics sent to their makers."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """For torch.onnx and ov.convert_model. Standard output belongs to the one answer of a command.

    openvino-telemetry sends usage statistics unless it believes to run in CI; nobody who exports a model here has been
    asked, so none are sent (without a network each conversion waited seconds for them, too).
    """
    disabled, ci = logging.getLogger().manager.disable, os.environ.get("CI")
    logging.disable(logging.WARNING)
    os.environ["CI"] = "true"
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if ci is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = ci


@contextlib.contextmanager
def quiet_nncf() -> Iterator[None]:
    """NNCF's notes are dropped; its progress bars stay, on standard error."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
