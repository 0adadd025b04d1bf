"""The ONNX file: opset 17, static height and width, any batch."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from torch import nn

from edgedistill.errors import ArtifactError, ModelError
from edgedistill.export.metadata import sections
from edgedistill.export.network import Network
from edgedistill.export.quiet import quiet

OPSET = 17


def write_onnx(module: nn.Module, path: Path, network: Network) -> None:
    """``module``, the fused form of ``network``: input 'image' float32 [batch, 3, H, W], output 'logits' float32
    [batch, C], metadata under 'model_info KEY' and 'edgedistill KEY' as Model API names them; passes onnx.checker.

    torch's TorchScript-based exporter is used on purpose: for these networks it writes the same graph as the dynamo
    one (HardSwish and HardSigmoid as single nodes) in a twentieth of the time, and it needs no onnxscript.
    Raises ModelError when the network cannot be expressed, ArtifactError when the file cannot be written.
    """
    example = torch.zeros(1, 3, network.spec.height, network.spec.width)
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
        model = onnx.load(path)
        values = {
            f"{section} {key}": text for section, pairs in sections(network).items() for key, text in pairs.items()
        }
        onnx.helper.set_model_props(model, values)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror or error})") from error
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, onnx.checker.ValidationError) as error:
        raise ModelError(f"{type(module).__name__} cannot be written as ONNX opset {OPSET}: {error}") from error
