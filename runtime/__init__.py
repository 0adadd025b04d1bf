"""The Python runtime: `Classifier` for one image at a time, `Engine` for throughput, `frames` for video and folders.

`CppEngine` is `Engine` in C++, where `make cpp-python` built it.

Needs numpy, OpenCV, simplejpeg, isal and OpenVINO; runs where torch is not installed.
"""

from edgedistill.runtime.bundle import Bundle, DeployConfig
from edgedistill.runtime.classifier import Classifier
from edgedistill.runtime.cpp_engine import CppEngine
from edgedistill.runtime.engine import Engine
from edgedistill.runtime.network import Frame, HeadPrediction, Prediction
from edgedistill.runtime.video import frames

__all__ = [
    "Bundle",
    "Classifier",
    "CppEngine",
    "DeployConfig",
    "Engine",
    "Frame",
    "HeadPrediction",
    "Prediction",
    "frames",
]
