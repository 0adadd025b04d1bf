"""What OpenVINO really executes: activations inside the convolutions, few Reorders, no activation that fell apart."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino as ov

from edgedistill.console import warn
from edgedistill.export.inference import compile_ir

OVERHEAD_LIMIT = 0.03
ACTIVATIONS = frozenset(
    (
        "Clamp",
        "Elu",
        "Gelu",
        "HSigmoid",
        "HSwish",
        "HardSigmoid",
        "Mish",
        "PRelu",
        "Relu",
        "Selu",
        "Sigmoid",
        "SoftPlus",
        "SoftSign",
        "Swish",
        "Tanh",
    )
)


def audit(model: ov.Model, *, threads: int | None, runs: int = 10) -> dict[str, Any]:
    """Compile for FP32, run, and read the executed graph and its profile.

    Times are medians over ``runs`` inferences in microseconds. ``overhead_share`` is the share of the whole time that
    goes to activations that run alone and to Reorders between layers; over 3% ``clean`` is False and ``problems`` says
    why. The Reorder of the input (planes to interleaved channels) is told apart, because every float NCHW input has it.
    """
    compiled = compile_ir(model, threads=threads, profile=True)
    times = _median_times(compiled, runs)
    types = {name: kind for name, kind, _ in times}
    nodes = [_Node(operation.get_rt_info(), types) for operation in compiled.get_runtime_model().get_ordered_ops()]
    convolutions = [node for node in nodes if node.layer_type == "Convolution"]
    fused = Counter(kind for node in nodes for kind in node.fused_activations)
    alone, alone_us = _alone(times, nodes)
    by_type: dict[str, float] = defaultdict(float)
    for _, kind, microseconds in times:
        by_type[kind] += microseconds
    total_us = max(sum(by_type.values()), 1e-9)
    input_us = sum(us for name, kind, us in times if kind == "Reorder" and name.startswith(_input_name(compiled)))
    reorder_us = by_type.get("Reorder", 0.0) - input_us
    result = {
        "convolutions": len(convolutions),
        "convolutions_with_fused_activation": sum(bool(node.fused_activations) for node in convolutions),
        "fused_activations": dict(fused),
        "unfused_activations": dict(alone),
        "reorders": sum(node.layer_type == "Reorder" for node in nodes),
        "time_us": {kind: round(us, 1) for kind, us in sorted(by_type.items(), key=lambda item: -item[1]) if us > 0},
        "total_us": round(total_us, 1),
        "input_reorder_share": input_us / total_us,
        "unfused_activation_share": alone_us / total_us,
        "reorder_share": reorder_us / total_us,
        "overhead_share": (alone_us + reorder_us) / total_us,
        "overhead_limit": OVERHEAD_LIMIT,
    }
    result["problems"] = _problems(result)
    result["clean"] = not result["problems"]
    return result


def warn_about(result: Mapping[str, Any]) -> None:
    for problem in result["problems"]:
        warn(f"graph audit: {problem}")


class _Node:
    """One executed node: its layer type and the activations that were fused into it."""

    def __init__(self, info: Mapping[str, Any], types: Mapping[str, str]) -> None:
        self.layer_type = info["layerType"].astype(str)
        names = [name for name in info["originalLayersNames"].astype(str).split(",") if name]
        # The first name is the node itself; what follows was fused into it.
        self.name = names[0] if names else ""
        self.fused_activations = [types[name] for name in names[1:] if types.get(name) in ACTIVATIONS]


def _input_name(compiled: ov.CompiledModel) -> str:
    return f"{compiled.inputs[0].get_node().get_friendly_name()}_"


def _median_times(compiled: ov.CompiledModel, runs: int) -> list[tuple[str, str, float]]:
    """(name, type, microseconds) of every node that the profile lists; 0 for what was fused away."""
    request = compiled.create_infer_request()
    image = np.random.default_rng(0).standard_normal(tuple(compiled.inputs[0].shape), dtype=np.float32)
    request.infer({0: image})
    rounds = []
    for _ in range(runs):
        request.infer({0: image})
        rounds.append(request.profiling_info)
    columns = zip(*rounds, strict=True)
    return [
        (
            infos[0].node_name,
            infos[0].node_type.removesuffix("CPU"),
            float(np.median([i.real_time.total_seconds() for i in infos])) * 1e6,
        )
        for infos in columns
    ]


def _alone(times: list[tuple[str, str, float]], nodes: list[_Node]) -> tuple[Counter[str], float]:
    """Activations that run as nodes of their own (or head a snippet of element-wise operations), and their time."""
    executed = {node.name for node in nodes if node.name}
    alone = [(kind, us) for name, kind, us in times if kind in ACTIVATIONS and name in executed]
    snippets = {node.name for node in nodes if node.layer_type == "Subgraph" and node.fused_activations}
    inside = [("Subgraph", us) for name, _, us in times if name in snippets]
    return Counter(kind for kind, _ in alone + inside), sum(us for _, us in alone + inside)


def _problems(result: Mapping[str, Any]) -> list[str]:
    problems = []
    if result["overhead_share"] > OVERHEAD_LIMIT:
        problems.append(
            f"{result['overhead_share']:.1%} of the time goes to Reorders ({result['reorder_share']:.1%}) and to activations"
            f" that run alone ({result['unfused_activation_share']:.1%}), target at most {OVERHEAD_LIMIT:.0%}"
        )
    return problems
