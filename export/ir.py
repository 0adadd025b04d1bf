"""The OpenVINO IR: true FP32, static, self-describing.

It is converted from torch directly. Measured: from the ONNX file OpenVINO 2026.4 leaves MobileNetV3's HardSigmoid
unfused with 20 Reorders in the executed graph; directly from torch there are 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openvino as ov
import torch
from torch import nn

from edgedistill.errors import ArtifactError, ModelError
from edgedistill.export.metadata import sections
from edgedistill.export.network import Network
from edgedistill.export.quiet import quiet
from edgedistill.images import InputSpec
from edgedistill.runtime.normalisation import embed_normalisation


def convert(module: nn.Module, spec: InputSpec, *, onnx_file: Path) -> tuple[ov.Model, str]:
    """(model, 'torch' or 'onnx'): input 'image' float32 [1, 3, H, W] NCHW, output 'logits' float32 [1, C].

    A network that cannot be traced is read from its ONNX file. Raises ModelError when neither way works.
    """
    try:
        with quiet(), torch.no_grad():
            model = ov.convert_model(module, example_input=torch.zeros(1, 3, spec.height, spec.width))
        source = "torch"
    except Exception as torch_error:  # the tracer runs the network's own code, which may raise anything
        try:
            model = ov.Core().read_model(str(onnx_file))
        except RuntimeError as onnx_error:
            raise ModelError(
                f"OpenVINO converts the network neither from torch ({torch_error}) nor from ONNX ({onnx_error})"
            ) from onnx_error
        source = "onnx"
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ModelError(f"{len(model.inputs)} inputs and {len(model.outputs)} outputs, expected one of each")
    model.reshape([1, 3, spec.height, spec.width])
    model.inputs[0].get_node().set_layout(ov.Layout("NCHW"))
    model.inputs[0].get_node().set_friendly_name("image")
    model.inputs[0].set_names({"image"})
    model.outputs[0].set_names({"logits"})
    model.validate_nodes_and_infer_types()
    return model, source


def describe(model: ov.Model, network: Network) -> None:
    """The sections of ``metadata.sections`` under rt_info."""
    for section, values in sections(network).items():
        for key, value in values.items():
            model.set_rt_info(value, [section, key])


def save(model: ov.Model, path: Path) -> None:
    """model.xml and model.bin in true FP32. Raises ArtifactError (OpenVINO reports a full disk as a stream error)."""
    try:
        ov.save_model(model, str(path), compress_to_fp16=False)
    except RuntimeError as error:
        raise ArtifactError(
            f"{path}: cannot be written ({str(error).strip().splitlines()[-1]}); is the disk full or read-only?"
        ) from error


def read(path: Path) -> ov.Model:
    """Raises ArtifactError for a damaged file."""
    try:
        return ov.Core().read_model(str(path))
    except RuntimeError as error:
        raise ArtifactError(
            f"{path}: cannot be read back ({str(error).strip().splitlines()[-1]}); export again"
        ) from error


def embed_preprocessing(model: ov.Model, spec: InputSpec) -> ov.Model:
    """A copy that takes uint8 [1, H, W, 3] BGR pixels, already resized; colour order, mean and scale are inside.

    Model API's section is left out of it: that reader would normalise a second time.
    """
    embedded = embed_normalisation(model.clone(), spec)
    info: Any = embedded.rt_info
    if "model_info" in info:
        del info["model_info"]
    embedded.set_rt_info("True", ["edgedistill", "preprocessing_embedded"])
    return embedded
