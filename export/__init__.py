"""Fusion, ONNX, OpenVINO IR, INT8, the graph audit and the parity certificate."""
