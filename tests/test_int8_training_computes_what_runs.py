"""export/int8_training.py: torch computes as the INT8 network does, and the trained weights end up in that network."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openvino as ov
import pytest
import torch
from torch import nn

from edgedistill.benchmarks.machine import machine_record
from edgedistill.benchmarks.tuner.space import DOT_PRODUCTS
from edgedistill.data.soft_label_store import HeldRows
from edgedistill.export import int8_training, ir
from edgedistill.export.inference import compile_ir, ir_logits, torch_logits
from edgedistill.export.int8 import Skip
from edgedistill.export.int8_quantize import kl, quantize
from edgedistill.export.int8_training import Int8Training, Lesson, find_lesson, plain_copy, simulate, with_weights
from edgedistill.export.network import Network
from edgedistill.export.samples import Samples, load_pixels
from edgedistill.images import InputSpec
from edgedistill.tasks import Head, Task
from edgedistill.training.losses import LossSettings
from edgedistill.training.settings import TrainSettings

SPEC = InputSpec(32, 32)
CLASSES = ("a", "b", "c")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """The class is the colour that is brightest: learnt in a few steps."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 48).astype(np.int32)
    paths = tuple(folder / f"{number}.png" for number in range(len(labels)))
    for path, label in zip(paths, labels, strict=True):
        pixels = random.integers(0, 120, (32, 32, 3), dtype=np.uint8)
        pixels[..., label] += 100
        path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    return Samples("train", tuple(path.name for path in paths), paths, labels)


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.gate = nn.Conv2d(8, 8, 1), nn.Hardsigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.squeeze(x.mean((2, 3), keepdim=True)))


class Block(nn.Module):
    """A residual block with a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.act = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Hardswish()
        self.gate, self.narrow = Gate(), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(self.gate(self.act(self.wide(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 8, 3, stride=2), nn.ReLU()
        self.blocks = nn.Sequential(Block(), Block())
        self.pool, self.flatten, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.flatten(self.pool(self.blocks(self.act(self.stem(x))))))


@pytest.fixture(scope="module")
def fused() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def network(fused: nn.Module) -> Network:
    return Network(fused, "net", CLASSES, SPEC, 1.0, "", "")


@pytest.fixture(scope="module")
def converted(fused: nn.Module) -> ov.Model:
    return ir.convert(fused, SPEC, onnx_file=Path("unused"))[0]


@pytest.fixture(scope="module")
def pattern(converted: ov.Model, samples: Samples) -> ov.Model:
    return quantize(converted, SPEC, load_pixels(samples.paths, SPEC), correct_bias=False)


def lesson(samples: Samples, **changes: Any) -> Lesson:
    settings = TrainSettings(
        name="net",
        image_size=32,
        epochs=5,
        batch_size=8,
        lr=0.02,
        cutmix_probability=0.0,
        augment="none",
    )
    soft = HeldRows(np.log(np.full((len(samples), 3), 1 / 3, np.float32)))
    settings, loss = dataclasses.replace(settings, **changes), LossSettings("ce", 0.2, 1.0)
    return Lesson(samples, Task.single(CLASSES), soft, settings, loss, samples.labels, CLASSES)


def ranges(model: ov.Model) -> list[list[float]]:
    found = [op for op in model.get_ordered_ops() if op.get_type_name() == "FakeQuantize"]
    return [
        [float(value) for port in (1, 2) for value in op.input_value(port).get_node().data.reshape(-1)] for op in found
    ]


def as_written(model: ov.Model) -> ov.CompiledModel:
    """The INT8 network with its roundings computed in float: what it says on any CPU."""
    exact = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "LP_TRANSFORMS_MODE": False}
    return ov.Core().compile_model(model, "CPU", exact)


def on_this_cpu(model: ov.Model) -> ov.CompiledModel:
    return compile_ir(model, threads=1)


# Without 8-bit dot products OpenVINO adds pairs of products in 16 bits, which saturate: such a CPU computes something else.
RUNS = [as_written, on_this_cpu] if DOT_PRODUCTS & set(machine_record()["cpu_flags"]) else [as_written]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_the_simulation_answers_as_the_int8_network(
    fused: nn.Module,
    pattern: ov.Model,
    converted: ov.Model,
    samples: Samples,
    run: Callable[[ov.Model], ov.CompiledModel],
) -> None:
    pixels = load_pixels(samples.paths, SPEC)
    simulation = simulate(fused, pattern)
    assert simulation.unknown == ()
    same = with_weights(pattern, converted)
    int8 = ir_logits(run(same), pixels, SPEC)
    simulated = torch_logits(simulation.model.eval(), pixels, SPEC)
    float32 = torch_logits(fused, pixels, SPEC)
    assert np.abs(simulated - int8).mean() < 0.1 * np.abs(float32 - int8).mean()
    assert np.allclose(int8, ir_logits(run(pattern), pixels, SPEC), atol=0.02)
    plain = plain_copy(simulation, simulation.model)
    assert np.array_equal(torch_logits(plain, pixels, SPEC), float32), "nothing was trained, so nothing may change"


def test_weights_in_half_range_stay_there(fused: nn.Module, converted: ov.Model, samples: Samples) -> None:
    """Pairs of products cannot saturate then, so the simulation answers as the network does on every CPU."""
    pixels = load_pixels(samples.paths, SPEC)
    pattern = quantize(converted, SPEC, pixels, correct_bias=False, weights="half")
    simulation, same = simulate(fused, pattern), with_weights(pattern, converted)
    tops = dict(int8_training._int8_layers(same))
    assert tops == {place: 127 if place.endswith("wide") else 63 for place in tops} and len(tops) == 8
    float32 = torch_logits(fused, pixels, SPEC)
    simulated = torch_logits(simulation.model.eval(), pixels, SPEC)
    for run in (as_written, on_this_cpu):
        int8 = ir_logits(run(same), pixels, SPEC)
        assert np.abs(simulated - int8).mean() < 0.1 * np.abs(float32 - int8).mean()


def test_gradients_reach_every_weight(fused: nn.Module, pattern: ov.Model) -> None:
    simulation = simulate(fused, pattern)
    simulation.model.train()(torch.randn(4, 3, 32, 32)).square().sum().backward()
    without = [name for name, parameter in simulation.model.named_parameters() if parameter.grad is None]
    assert without == [] and all(parameter.grad is None for parameter in fused.parameters())


def test_training_ends_in_the_same_graph_with_other_weights(
    fused: nn.Module, network: Network, pattern: ov.Model, samples: Samples, tmp_path: Path
) -> None:
    pixels = load_pixels(samples.paths, SPEC)
    before = {name: value.clone() for name, value in fused.state_dict().items()}
    training = Int8Training(fused, network, lesson(samples, lr=1.0), epochs=8, folder=tmp_path, threads=1)
    trained = training(pattern, 600.0)
    assert ranges(trained) == ranges(pattern) and list(tmp_path.iterdir()) == []
    assert [op.get_type_name() for op in trained.get_ordered_ops()] == [
        op.get_type_name() for op in pattern.get_ordered_ops()
    ]
    assert all(torch.equal(value, before[name]) for name, value in fused.state_dict().items())
    accuracy = {
        name: float((ir_logits(compile_ir(model, threads=1), pixels, SPEC).argmax(1) == samples.labels).mean())
        for name, model in (("before", pattern), ("after", trained))
    }
    assert accuracy["after"] > accuracy["before"] + 0.1


def test_every_head_is_trained(fused: nn.Module, pattern: ov.Model, samples: Samples, tmp_path: Path) -> None:
    """A class and a label that may apply, on the same three outputs; of a quarter of the images nothing is known."""
    task = Task((Head("blue", "softmax", ("no", "yes")), Head("labels", "sigmoid", ("red",))))
    values = np.stack([samples.labels == 0, samples.labels == 2], axis=1).astype(np.float32)
    values[::4] = np.nan
    told = dataclasses.replace(samples, values=values)
    network = Network(fused, "net", task.outputs, SPEC, 1.0, "", "", heads=task)
    scores = np.full((len(samples), 3), 0.5, np.float32)
    taught = dataclasses.replace(lesson(told, lr=1.0), task=task, soft=HeldRows(scores))
    targets = taught.targets(np.arange(len(taught.samples)))
    assert targets.hard[1, 2] == float(samples.labels[1] == 2) and torch.isnan(targets.hard[0]).all()
    torch.testing.assert_close(targets.soft[1], torch.tensor([0.5, 0.5, torch.sigmoid(torch.tensor(0.5))]))
    trained = Int8Training(fused, network, taught, epochs=8, folder=tmp_path, threads=1)(pattern, 600.0)
    pixels, known = load_pixels(samples.paths, SPEC), ~np.isnan(values[:, 0])
    shares = {}
    for name, model in (("before", pattern), ("after", trained)):
        logits = ir_logits(compile_ir(model, threads=1), pixels, SPEC)
        shares[name] = (task.answers(task.probabilities(logits)) == values)[known].mean(axis=0)
    often = np.maximum(values[known].mean(axis=0), 1 - values[known].mean(axis=0))
    assert (shares["after"] > np.maximum(shares["before"], often) - 0.02).all(), "no head may pay for the other"
    assert shares["after"].sum() > shares["before"].sum() + 0.1


def test_a_network_that_torch_does_not_mirror_is_not_trained(
    network: Network,
    pattern: ov.Model,
    samples: Samples,
    tmp_path: Path,
    fused: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(int8_training.ActivationQuantizer, "forward", lambda self, x: x * 0.5)
    with pytest.raises(Skip, match="torch does not compute as the INT8 network does"):
        Int8Training(fused, network, lesson(samples), epochs=1, folder=tmp_path)(pattern, 600.0)


def test_other_graphs_are_refused(pattern: ov.Model) -> None:
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(Skip, match="no layer of the quantised one"):
        with_weights(pattern, ir.convert(other.eval(), SPEC, onnx_file=Path("unused"))[0])


def test_too_little_time_is_said_and_less_time_trains_less(
    fused: nn.Module,
    network: Network,
    pattern: ov.Model,
    samples: Samples,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training = Int8Training(fused, network, lesson(samples), epochs=3, folder=tmp_path, threads=1)
    monkeypatch.setattr(int8_training, "seconds_per_image", lambda *args: 1.0)
    plan = {seconds: training._plan(fused, seconds) for seconds in (1000.0, 130.0)}
    assert [(len(rows), epochs) for rows, epochs in plan.values()] == [(48, 3), (48, 2)]
    with pytest.raises(Skip, match="--int8-minutes"):
        training(pattern, 30.0)
    monkeypatch.setattr(int8_training, "MIN_STEPS", 0)
    rows, epochs = training._plan(fused, 30.0)
    assert (len(rows), epochs) == (24, 1) and len(set(rows.tolist())) == 24


def test_a_network_from_elsewhere_has_no_lesson(network: Network, samples: Samples, tmp_path: Path) -> None:
    with pytest.raises(Skip, match="not trained here"):
        find_lesson(network, tmp_path / "dataset.csv", samples)
    known = dataclasses.replace(network, settings={"name": "mbv3s050"})
    with pytest.raises(Skip, match=r"no dataset\.csv"):
        find_lesson(known, tmp_path / "dataset.csv", samples)


def test_kl_is_zero_for_equal_answers_only() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    task = Task.single(CLASSES)
    assert kl(logits, logits + 1, task) == pytest.approx(0, abs=1e-6) and kl(logits, -logits, task) > 0.1
