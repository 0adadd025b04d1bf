"""The ONNX file: opset 17, static height and width, any batch."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from torch import nn

from edgedistill.errors import ArtifactError, ModelError
from edgedistill.export.quiet import quiet
from edgedistill.images import InputSpec

OPSET = 17


def write_onnx(module: nn.Module, path: Path, spec: InputSpec) -> None:
    """Input 'image' float32 [batch, 3, H, W], output 'logits' float32 [batch, C]; checked by onnx.checker.

    torch's TorchScript-based exporter is used on purpose: for these networks it writes the same graph as the dynamo
    one (HardSwish and HardSigmoid as single nodes) in a twentieth of the time, and it needs no onnxscript.
    Raises ModelError when the network cannot be expressed, ArtifactError when the file cannot be written.
    """
    example = torch.zeros(1, 3, spec.height, spec.width)
    try:
        with quiet(), torch.no_grad():
            torch.onnx.export(
                module,
                (example,),
                str(path),
                opset_version=OPSET,
                dynamo=False,
                input_names=["image"],
                output_names=["logits"],
                dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
            )
        onnx.checker.check_model(str(path), full_check=True)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror or error})") from error
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, onnx.checker.ValidationError) as error:
        raise ModelError(f"{type(module).__name__} cannot be written as ONNX opset {OPSET}: {error}") from error
