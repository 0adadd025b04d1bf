"""What a deployed network says about itself: the same strings in the IR's rt_info and in the ONNX file's metadata."""

from __future__ import annotations

import json

from edgedistill.export.network import Network, model_api_labels

FORMAT_VERSION = "1"


def sections(network: Network) -> dict[str, dict[str, str]]:
    """``model_info`` is OpenVINO Model API's; ``edgedistill`` is what ``edgedistill.runtime`` reads.

    ``output_raw_scores`` is True: Model API then adds the softmax of all classes to its answer; its top labels and
    their probabilities are the same with and without it (read in its ClassificationModel 0.4.7, and tried).
    JSON is in ASCII, so that no class name can break the XML.
    """
    spec = network.spec
    model_info = {
        "model_type": "Classification",
        "labels": " ".join(model_api_labels(network.classes)),
        "mean_values": " ".join(repr(float(value)) for value in spec.mean),
        "scale_values": " ".join(repr(float(value)) for value in spec.std),
        "resize_type": "standard" if spec.resize == "squash" else "crop",
        "reverse_input_channels": "True",
        "multilabel": "False",
        "output_raw_scores": "True",
    }
    edgedistill = {
        "format_version": FORMAT_VERSION,
        "input_spec": json.dumps(spec.to_dict()),
        "temperature": repr(float(network.temperature)),
        "thresholds": "null",
        "labels": json.dumps(list(network.classes)),
        "dataset_hash": network.dataset_hash,
        "weights_hash": network.weights_hash,
        "architecture": network.architecture,
        "task": "single-label",
    }
    return {"model_info": model_info, "edgedistill": edgedistill}
