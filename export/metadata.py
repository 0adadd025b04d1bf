"""What a deployed network says about itself: the same strings in the IR's rt_info and in the ONNX file's metadata."""

from __future__ import annotations

import json
import math
from statistics import median
from typing import Any

import numpy as np

from edgedistill.export.network import Network, model_api_labels
from edgedistill.tasks import KINDS, sigmoid

FORMAT_VERSION = "1"
# No output is called so: a head's name holds no =, and comes first.
NEVER = "=never"


def sections(network: Network) -> dict[str, dict[str, str]]:
    """``model_info`` is OpenVINO Model API's; ``edgedistill`` is what ``edgedistill.runtime`` reads.

    JSON is in ASCII, so that no class name can break the XML. Two kinds of network get no ``model_info``, for Model API
    0.4.7 cannot read them: one label alone (it squeezes the one logit to a number and fails on it), and labels in front
    of an attribute.
    """
    task = network.task
    edgedistill = {
        "format_version": FORMAT_VERSION,
        "input_spec": json.dumps(network.spec.to_dict()),
        "temperature": repr(float(network.temperature)),
        "thresholds": "null",
        "calibration": "null" if network.calibration is None else json.dumps(network.calibration.to_dict()),
        "labels": json.dumps(list(network.classes)),
        "dataset_hash": network.dataset_hash,
        "weights_hash": network.weights_hash,
        "architecture": network.architecture,
        "task": "single-label",
    }
    if task.is_multi_label:
        edgedistill |= {"task": "multi-label", "thresholds": json.dumps(list(task.heads[0].thresholds))}
    elif not task.is_single:
        edgedistill |= {"task": "heads", "heads": json.dumps(task.to_dict())}
    order = [KINDS.index(head.kind) for head in task.heads]
    if task.width == 1 or order != sorted(order):
        return {"edgedistill": edgedistill}
    return {"model_info": _model_info(network), "edgedistill": edgedistill}


def _model_info(network: Network) -> dict[str, str]:
    """Model API applies softmax and sigmoid itself, so logits are what it wants of every task (read in its
    ClassificationModel 0.4.7, and tried). ``labels`` names every output, those of values too: with one name less it
    takes the first output for 'other', with two less it refuses the network. It knows one threshold for all labels, the
    median of ours, and no temperature: a label applies there from the same logit on, by the share that it computes.

    ``output_raw_scores`` is True: Model API then adds the probabilities of all classes to its answer; its top labels
    and their probabilities are the same with and without it.
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
    thresholds = [threshold for head in task.heads if head.kind == "sigmoid" for threshold in head.thresholds]
    if thresholds:
        model_info["confidence_threshold"] = repr(_untempered(median(thresholds), network.temperature))
    if not task.is_single and not task.is_multi_label:
        model_info |= {"hierarchical": "True", "hierarchical_config": json.dumps(_hierarchy(network))}
    return model_info


def _untempered(share: float, temperature: float) -> float:
    """sigmoid(z) where sigmoid(z / temperature) is ``share``."""
    if not 0 < share < 1:
        return share
    return float(sigmoid(np.array(temperature * math.log(share / (1 - share)))))


def _hierarchy(network: Network) -> dict[str, Any]:
    """Heads as Model API's groups: each softmax head one, each label of a sigmoid head one of its own, no tree above them.

    Outputs behind the softmax heads that no group names are nothing to Model API; behind a sigmoid head it takes them for
    more labels. A value there is made the child of a label that no group holds and no output gives: by its rule a
    label shows only together with its parents, so a value never does.
    """
    task, labels = network.task, model_api_labels(network.classes)
    groups: list[list[str]] = []
    ranges: dict[str, list[int]] = {}
    edges: list[list[str]] = []
    indices = {label: number for number, label in enumerate(labels)}
    many = [head for head in task.heads if head.kind == "sigmoid"]
    for head, part in task.slices():
        own = list(labels[part])
        if head.kind == "softmax":
            ranges[str(len(groups))] = [part.start, part.stop]
            groups.append(own)
        elif many:
            groups += [[label] for label in own]
        if head.kind == "regression" and many:
            edges.append([own[0], NEVER])
            indices[NEVER] = len(labels)
    softmax_width = sum(head.width for head in task.heads if head.kind == "softmax")
    heads = {
        "num_multiclass_heads": len(ranges),
        "num_multilabel_classes": task.width - softmax_width if many else 0,
        "num_single_label_classes": softmax_width,
        "head_idx_to_logits_range": ranges,
        "all_groups": groups,
        "label_to_idx": indices,
        "class_to_group_idx": {
            label: [number, place] for number, group in enumerate(groups) for place, label in enumerate(group)
        },
        "empty_multiclass_head_indices": [],
    }
    return {"cls_heads_info": heads, "label_tree_edges": edges}
