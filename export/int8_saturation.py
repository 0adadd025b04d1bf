"""What the range of INT8 weights costs, on CPUs with 8-bit dot products (VNNI) and without.

    python -m edgedistill.export.int8_saturation runs/cells/model.pt --out benchmarks/results/int8-saturation.json

The network is quantised three times: weights in full range, the first layer's in half (NNCF's default) and all in half.
Each is then run as it is, and in processes whose oneDNN is held to AVX2 and to AVX-512 without VNNI (ONEDNN_MAX_CPU_ISA),
where pairs of products are added in 16 bits: on an x86 CPU with VNNI all three kinds of CPU are measured on one machine.
Accuracy and KL from FP32 are on the test split.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import openvino as ov

from edgedistill import console
from edgedistill.artifacts import read_array, read_json, write_array, write_json
from edgedistill.benchmarks.command import exit_with
from edgedistill.benchmarks.machine import machine_record
from edgedistill.errors import UsageError
from edgedistill.export import ir
from edgedistill.export.fusion import fuse
from edgedistill.export.inference import compile_ir, ir_logits
from edgedistill.export.int8_quantize import WeightRange, kl, quantize
from edgedistill.export.network import load_network
from edgedistill.export.samples import find_images, load_pixels, manifest_of
from edgedistill.images import InputSpec, normalize

FORMAT = "edgedistill-int8-saturation"
RANGES: tuple[WeightRange, ...] = ("full", "first-layer", "half")
CPUS = {"as it is": None, "AVX-512 without VNNI": "AVX512_CORE", "AVX2": "AVX2"}
ANSWER = "import sys; from edgedistill.export.int8_saturation import answer; answer(*sys.argv[1:])"


def answer(folder: str, cpu: str) -> None:
    """Writes the logits of every network of ``folder``, here and now: float32 [N, C]."""
    place = Path(folder)
    spec = InputSpec.from_dict(read_json(place / "spec.json", format=FORMAT)["spec"])
    pixels = read_array(place / "pixels.npy")
    for path in sorted(place.glob("*.xml")):
        compiled = compile_ir(ov.Core().read_model(path), threads=1)
        write_array(place / f"{path.stem}.{cpu}.npy", ir_logits(compiled, pixels, spec))


def measure(model: Path, *, images: int, calibration: int) -> dict[str, Any]:
    """``model``: a model.pt of a run, a student's or a teacher's. Raises UsageError where there is no test split."""
    network = load_network(model, image_size=None)
    found = find_images(network, manifest=manifest_of(model), data=None, split="test")
    if found.missing:
        raise UsageError(f"{model}: {found.missing}")
    samples, spec, task = found.certificate.thinned(images), network.spec, network.task
    judged = load_pixels(samples.paths, spec)
    seen = load_pixels(found.calibration.thinned(calibration).paths, spec)
    result: dict[str, Any] = {"model": network.architecture, "images": len(samples), "calibration_images": len(seen)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        fused, _ = fuse(network.module, normalize(seen[:16], spec), image_kind="train")
        float32, _ = ir.convert(fused, spec, onnx_file=folder / "model.onnx")
        ov.save_model(float32, folder / "FP32.xml", compress_to_fp16=False)
        for name in RANGES:
            ov.save_model(quantize(float32, spec, seen, weights=name), folder / f"{name}.xml")
        write_array(folder / "pixels.npy", judged)
        write_json(folder / "spec.json", {"spec": spec.to_dict()}, format=FORMAT)
        for number, limit in enumerate(CPUS.values()):
            environment = os.environ | ({} if limit is None else {"ONEDNN_MAX_CPU_ISA": limit})
            subprocess.run([sys.executable, "-c", ANSWER, scratch, str(number)], env=environment, check=True)
        reference = read_array(folder / "FP32.0.npy")
        result["accuracy_f32"] = task.score(reference, samples.truth, network.temperature)
        result["int8"] = [
            {
                "weights": name,
                "cpu": cpu,
                "accuracy": task.score(logits, samples.truth, network.temperature),
                "kl": kl(reference, logits, task),
            }
            for number, cpu in enumerate(CPUS)
            for name in RANGES
            for logits in [read_array(folder / f"{name}.{number}.npy")]
        ]
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("models", type=Path, nargs="+", help="model.pt of runs")
    parser.add_argument("--images", type=int, default=2000, help="of the test split, evenly spaced")
    parser.add_argument("--calibration-images", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/int8-saturation.json"))
    args = parser.parse_args(argv)
    found = [measure(path, images=args.images, calibration=args.calibration_images) for path in args.models]
    write_json(args.out, {"networks": found, "machine": machine_record()}, format=FORMAT)
    for network in found:
        title = f"{network['model']}: FP32 {network['accuracy_f32']:.4f} on {network['images']} images"
        rows = [[row["cpu"], row["weights"], f"{row['accuracy']:.4f}", f"{row['kl']:.4f}"] for row in network["int8"]]
        console.out.print(console.table(title, ("CPU", "weights", "accuracy", "KL, nats"), rows))
    return 0


if __name__ == "__main__":
    exit_with(main)
