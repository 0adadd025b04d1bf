"""What a deployed network says about itself: the same strings in the IR's rt_info and in the ONNX file's metadata."""

from __future__ import annotations

import json
from typing import Any

from edgedistill.export.network import Network, model_api_labels
from edgedistill.tasks import Task

FORMAT_VERSION = "1"


def sections(network: Network) -> dict[str, dict[str, str]]:
    """``model_info`` is OpenVINO Model API's; ``edgedistill`` is what ``edgedistill.runtime`` reads.

    ``output_raw_scores`` is True: Model API then adds the softmax of all classes to its answer; its top labels and
    their probabilities are the same with and without it (read in its ClassificationModel 0.4.7, and tried).
    JSON is in ASCII, so that no class name can break the XML.

    Model API applies softmax and sigmoid itself, so logits are what it wants of every task (read there too): a
    multi-label network is told by ``multilabel``, attributes by a flat ``hierarchical_config``. It has no words for
    values beside labels: several labels with a regression head get no ``model_info`` at all.
    """
    spec, task = network.spec, network.task
    model_info = {
        "model_type": "Classification",
        "labels": " ".join(model_api_labels(network.classes)),
        "mean_values": " ".join(repr(float(value)) for value in spec.mean),
        "scale_values": " ".join(repr(float(value)) for value in spec.std),
        "resize_type": "standard" if spec.resize == "squash" else "crop",
        "reverse_input_channels": "True",
        "multilabel": str(task.is_multi_label),
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
    if task.is_multi_label:
        edgedistill["task"] = "multi-label"
        edgedistill["thresholds"] = json.dumps([task.heads[0].threshold])
        model_info["confidence_threshold"] = repr(task.heads[0].threshold)
    elif not task.is_single:
        edgedistill |= {"task": "heads", "heads": json.dumps(task.to_dict())}
        if any(head.kind == "sigmoid" for head in task.heads):
            return {"edgedistill": edgedistill}
        model_info |= {"hierarchical": "True", "hierarchical_config": json.dumps(_hierarchy(task))}
        model_info["labels"] = " ".join(model_api_labels(tuple(_class_names(task))))
    return {"model_info": model_info, "edgedistill": edgedistill}


def _class_names(task: Task) -> list[str]:
    """The outputs of the softmax heads; a regression head's has no name in Model API."""
    return [f"{head.name}={name}" for head in task.class_heads for name in head.classes]


def _hierarchy(task: Task) -> dict[str, Any]:
    """Softmax heads as Model API's groups without a tree above them; the outputs of values lie behind them all."""
    labels = model_api_labels(tuple(_class_names(task)))
    groups, ranges, start = [], {}, 0
    for number, head in enumerate(task.class_heads):
        stop = start + head.width
        groups.append(list(labels[start:stop]))
        ranges[str(number)] = [start, stop]
        start = stop
    heads = {
        "num_multiclass_heads": len(groups),
        "num_multilabel_classes": 0,
        "num_single_label_classes": start,
        "head_idx_to_logits_range": ranges,
        "all_groups": groups,
        "label_to_idx": {label: number for number, label in enumerate(labels)},
        "class_to_group_idx": {
            label: [number, place] for number, group in enumerate(groups) for place, label in enumerate(group)
        },
        "empty_multiclass_head_indices": [],
    }
    return {"cls_heads_info": heads, "label_tree_edges": []}
