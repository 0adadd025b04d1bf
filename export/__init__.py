"""Fusion, ONNX, OpenVINO IR, INT8, the graph audit and the parity certificate."""

import edgedistill.training  # noqa: F401  first: it sets how OpenMP waits, which torch reads when it loads
