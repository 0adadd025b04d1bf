"""torch -> fused -> ONNX -> OpenVINO IR -> INT8, with a graph audit and a certificate; one folder, whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
import torch
from torch import nn

from edgedistill.artifacts import read_json, write_json, write_text
from edgedistill.benchmarks.machine import machine_record, package_versions
from edgedistill.console import note, warn
from edgedistill.errors import ArtifactError, DataError, ModelError, UsageError
from edgedistill.export import audit, ir
from edgedistill.export.certificate import CERTIFICATE_FORMAT, Forms, Limits, certify, not_run
from edgedistill.export.folder import building, check_target, put_in_place
from edgedistill.export.fusion import fuse
from edgedistill.export.inference import compile_ir, torch_threads
from edgedistill.export.int8 import (
    MIN_GAIN,
    Int8Mode,
    Int8Result,
    Int8Settings,
    Int8Weights,
    Rung,
    Skip,
    Trainer,
    make_int8,
)
from edgedistill.export.int8_training import Int8Training, find_lesson
from edgedistill.export.network import Network, load_network, load_timm_network, random_images
from edgedistill.export.onnx_file import write_onnx
from edgedistill.export.samples import ExportImages, Samples, find_images, load_pixels, manifest_of
from edgedistill.images import InputSpec, normalize
from edgedistill.runtime import Bundle
from edgedistill.runtime.bundle import (
    DeployConfig,
    LatencySettings,
    ThroughputSettings,
    describe_stage,
    int8_path,
    write_deploy,
)

FUSION_IMAGES = 16
RESHAPE_STEP_PX = 32


@dataclass(frozen=True)
class ExportSettings:
    """What to export: ``model`` (a model.pt), or ``architecture``, ``weights`` and ``labels`` of any timm checkpoint.

    ``out``: the folder, by default openvino/ beside model.pt and openvino-NAME/ beside model-NAME.pt. ``data``: as for
    training; by default dataset.csv of the run that model.pt belongs to. ``image_size``: another input size, in pixels. ``int8``: 'auto'
    ships it where it is faster on this CPU and within ``int8_max_drop`` (top-1 on val), 'on' or 'force' wherever it is
    within, 'off' makes none. ``int8_max_rung``, ``int8_minutes``: the last rung of the ladder to try, and the time for
    all; ``int8_epochs``: of its training; ``int8_weights``: 'half' of their range for CPUs without VNNI, 'auto': where this is
    one. ``certificate`` False: export without proof. ``test_parity``: also certify on the test split, once, for the final evaluation.
    ``threads``: for everything that runs here; None: all cores. Raises UsageError for settings that contradict.
    """

    model: Path | None = None
    architecture: str | None = None
    weights: Path | None = None
    labels: Path | None = None
    out: Path | None = None
    data: str | None = None
    image_size: int | None = None
    int8: Int8Mode = "auto"
    calibration_images: int = 300
    int8_max_drop: float = 0.01
    int8_min_gain: float = MIN_GAIN
    int8_max_rung: Rung = "qat"
    int8_minutes: float = 20.0
    int8_weights: Int8Weights = "auto"
    int8_epochs: int = 3
    certificate: bool = True
    certificate_images: int = 1000
    test_parity: bool = False
    embed_preprocessing: bool = False
    logit_limit: float = 1e-3
    probability_limit: float = 1e-3
    timing_rounds: int = 45
    timing_seconds: float = 0.05
    threads: int | None = None

    def __post_init__(self) -> None:
        foreign = (self.architecture, self.weights, self.labels)
        if self.model is not None and any(value is not None for value in foreign):
            raise UsageError("give either a model.pt or --model NAME with --weights and --labels, not both")
        if self.model is None and any(value is None for value in foreign):
            raise UsageError(
                "give a model.pt, or --model NAME --weights FILE --labels FILE for another timm checkpoint"
            )
        if self.calibration_images < 1 or self.certificate_images < 1 or self.timing_rounds < 1:
            raise UsageError("--calibration-images, --certificate-images and timing rounds: expected 1 or more")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads {self.threads}: expected 1 or more")
        if self.image_size is not None and not 8 <= self.image_size <= 4096:
            raise UsageError(f"--image-size {self.image_size}: expected 8 to 4096 pixels")
        if self.test_parity and not self.certificate:
            raise UsageError("--test-parity needs the certificate; leave --no-certificate away")
        _ = self.limits, self.int8_settings

    @property
    def source(self) -> Path:
        """The file that holds the weights."""
        path = self.model or self.weights
        if path is None:
            raise UsageError("no model given")
        return path

    @property
    def folder(self) -> Path:
        # One folder for each student of a run: model.pt -> openvino/, model-lcnet.pt -> openvino-lcnet/.
        student = self.model.stem.removeprefix("model") if self.model and self.model.stem.startswith("model-") else ""
        return (self.out or self.source.with_name(f"openvino{student}")).absolute()

    @property
    def limits(self) -> Limits:
        return Limits(logits=self.logit_limit, probability=self.probability_limit, int8_drop=self.int8_max_drop)

    @property
    def int8_settings(self) -> Int8Settings:
        return Int8Settings(
            mode=self.int8,
            calibration_images=self.calibration_images,
            max_drop=self.int8_max_drop,
            min_gain=self.int8_min_gain,
            max_rung=self.int8_max_rung,
            minutes=self.int8_minutes,
            weights=self.int8_weights,
            timing_rounds=self.timing_rounds,
            timing_seconds=self.timing_seconds,
            threads=self.threads,
        )


@dataclass(frozen=True, eq=False)
class _Export:
    """What the steps of one export share. ``stage``: the folder of this network's files."""

    settings: ExportSettings
    network: Network
    images: ExportImages
    stage: Path


def export_openvino(settings: ExportSettings) -> Path:
    """The openvino/ folder with stages/NAME/ (model.xml, model.onnx, certificate.json, ...), labels.txt and deploy.json.

    Everything is built beside it and put in place at the end. Raises ModelError when the certificate fails or could not
    be run: then certificate.json is kept for reading (in the folder, or in NAME-failed where an earlier export stands
    and goes on standing), and there is no new deploy.json. Raises ArtifactError, DataError or ImageError for bad input.
    """
    check_target(settings.folder)
    network = _load(settings)
    manifest = manifest_of(settings.source)
    images = find_images(network, manifest=manifest, data=settings.data)
    out = settings.folder
    with building(out) as temporary, torch_threads(settings.threads):
        stage = temporary / "stages" / re.sub(r"[^A-Za-z0-9_.-]", "_", network.architecture)
        stage.mkdir(parents=True)
        export = _Export(settings, network, images, stage)
        certificate, int8 = _make_stage(export)
        write_text(temporary / "labels.txt", "".join(f"{' '.join(name.split())}\n" for name in network.classes))
        if settings.certificate and certificate["verdict"] != "pass":
            kept = out if not (out / "deploy.json").exists() else out.with_name(f"{out.name}-failed")
            put_in_place(temporary, kept)
            raise ModelError(_failure(certificate, kept / "stages" / stage.name / "certificate.json"))
        write_deploy(temporary / "deploy.json", _deploy_config(temporary, stage, network, int8))
        put_in_place(temporary, out)
    return out


def read_certificates(openvino: Path) -> dict[str, dict[str, Any]]:
    """certificate.json of every stage of an openvino/ folder, by stage name."""
    found = sorted(openvino.glob("stages/*/certificate.json"))
    return {path.parent.name: read_json(path, format=CERTIFICATE_FORMAT) for path in found}


def exported_forms(model: Path, openvino: Path) -> tuple[Network, Forms]:
    """A model.pt and the files of its export, ready to certify. Raises ArtifactError when the export is another model's."""
    bundle = Bundle.load(openvino)
    metadata = bundle.metadata[0]
    network = load_network(model, image_size=None)
    if metadata.weights_hash != network.weights_hash:
        raise ArtifactError(
            f"{openvino}: exported from another model ({metadata.weights_hash[:12]}) than {model}"
            f" ({network.weights_hash[:12]}); export again"
        )
    path = bundle.root / bundle.config.stages[0].model
    int8 = int8_path(path)
    return network, Forms(
        module=network.module,
        spec=metadata.input_spec,
        temperature=network.temperature,
        task=network.task,
        onnx=path.with_suffix(".onnx"),
        ir=path,
        int8=int8 if int8.exists() else None,
        int8_shipped="int8" in (bundle.config.latency.precision, bundle.config.throughput.precision),
    )


def certify_test(model: Path, openvino: Path, *, data: str | None = None, limits: Limits | None = None) -> Path:
    """certificate-test.json beside certificate.json: parity on the test split, once, in the final evaluation.

    Raises ModelError when it fails (the file is written first) and DataError when there are no test images.
    """
    network, forms = exported_forms(model, openvino)
    samples = _test_samples(network, model, data)
    path = forms.ir.with_name("certificate-test.json")
    certificate = certify(forms, samples, limits or Limits())
    write_json(path, certificate, format=CERTIFICATE_FORMAT)
    if certificate["verdict"] != "pass":
        raise ModelError(_failure(certificate, path))
    return path


def _load(settings: ExportSettings) -> Network:
    if settings.model is not None:
        return load_network(settings.model, image_size=settings.image_size)
    if settings.architecture is None or settings.weights is None or settings.labels is None:
        raise UsageError("--model, --weights and --labels go together")
    return load_timm_network(settings.architecture, settings.weights, settings.labels, image_size=settings.image_size)


def _make_stage(export: _Export) -> tuple[dict[str, Any], Int8Result]:
    """All files of one network; returns its certificate and what became of INT8."""
    network, settings, stage = export.network, export.settings, export.stage
    proof_images, kind = _fusion_images(export)
    fused, fusion = fuse(network.module, proof_images, image_kind=kind)
    if network.spec.crop_fraction < 1:
        warn(
            f"the input is cropped to {network.spec.crop_fraction:g} of the image, which Model API cannot express: given whole"
            " images, it will answer differently than edgedistill's runtimes"
        )
    note(f"fused {fusion.folded} norms, logits moved by {fusion.max_logit_difference:.2g}")
    write_onnx(fused, stage / "model.onnx", network)
    model, converted_from = ir.convert(fused, network.spec, onnx_file=stage / "model.onnx")
    ir.describe(model, network)
    ir.save(model, stage / "model.xml")
    model = ir.read(stage / "model.xml")
    if settings.embed_preprocessing:
        ir.save(ir.embed_preprocessing(model, network.spec), stage / "model-embedded.xml")
    graph = audit.audit(model, threads=settings.threads)
    audit.warn_about(graph)
    int8 = _make_int8(export, model, fused)
    certificate = _certify(export, int8) | {
        "architecture": network.architecture,
        "fusion": fusion.to_dict(),
        "converted_from": converted_from,
        "reshape": check_reshape(fused, model, network.spec, threads=settings.threads),
        "audit": graph,
        "int8": int8.to_dict(),
        "machine": machine_record(),
    }
    write_json(stage / "certificate.json", certificate, format=CERTIFICATE_FORMAT)
    return certificate, int8


def _fusion_images(export: _Export) -> tuple[npt.NDArray[np.float32], str]:
    """(normalised images, kind) for the proof of fusion: real ones where there are any."""
    real = export.images.certificate.thinned(FUSION_IMAGES)
    if len(real):
        return normalize(load_pixels(real.paths, export.network.spec), export.network.spec), "real"
    return random_images(export.network.spec, FUSION_IMAGES), "random"


def _make_int8(export: _Export, model: ov.Model, fused: nn.Module) -> Int8Result:
    settings = export.settings
    if settings.int8 != "off" and export.images.missing:
        return Int8Result(None, False, f"no images: {export.images.missing}", settings=settings.int8_settings)
    val = export.images.certificate.thinned(settings.certificate_images)
    result = make_int8(
        model,
        export.network.spec,
        export.images.calibration,
        val,
        settings.int8_settings,
        task=export.network.task,
        temperature=export.network.temperature,
        trainer=_int8_trainer(export, fused),
    )
    if result.model is not None:
        ir.describe(result.model, export.network)
        ir.save(result.model, export.stage / "model-int8.xml")
    if settings.int8 != "off":
        note(f"INT8 {'shipped' if result.shipped else 'refused'}: {result.reason}")
    return result


def _int8_trainer(export: _Export, fused: nn.Module) -> Trainer:
    """Looks for the student's training only when the ladder comes to it: reading it takes a while."""

    def trained(pattern: ov.Model, seconds: float) -> ov.Model:
        if export.settings.model is None:
            raise Skip("the network was not trained here, so there are neither its settings nor its soft labels")
        manifest = manifest_of(export.settings.source)
        training = Int8Training(
            module=fused,
            network=export.network,
            lesson=find_lesson(export.network, manifest, export.images.calibration),
            epochs=export.settings.int8_epochs,
            folder=export.stage,
            threads=export.settings.threads,
        )
        return training(pattern, seconds)

    return trained


def _certify(export: _Export, int8: Int8Result) -> dict[str, Any]:
    settings, stage, network = export.settings, export.stage, export.network
    if not settings.certificate:
        return not_run("not wanted (--no-certificate)", settings.limits)
    if export.images.missing:
        return not_run(f"no images: {export.images.missing}", settings.limits)
    forms = Forms(
        module=network.module,
        spec=network.spec,
        temperature=network.temperature,
        task=network.task,
        onnx=stage / "model.onnx",
        ir=stage / "model.xml",
        int8=None if int8.model is None else stage / "model-int8.xml",
        int8_shipped=int8.shipped,
    )
    samples = export.images.certificate.thinned(settings.certificate_images)
    certificate = certify(forms, samples, settings.limits, threads=settings.threads)
    if settings.test_parity:
        certificate = _with_test_parity(export, forms, certificate)
    return certificate


def _with_test_parity(export: _Export, forms: Forms, certificate: dict[str, Any]) -> dict[str, Any]:
    """certificate-test.json; its faults fail the export as those on val do."""
    settings = export.settings
    samples = _test_samples(export.network, settings.source, settings.data)
    test = certify(forms, samples, settings.limits, threads=settings.threads)
    write_json(export.stage / "certificate-test.json", test, format=CERTIFICATE_FORMAT)
    reasons = certificate["reasons"] + [f"test: {reason}" for reason in test["reasons"]]
    return certificate | {"reasons": reasons, "verdict": "fail" if reasons else certificate["verdict"]}


def _test_samples(network: Network, model: Path, data: str | None) -> Samples:
    images = find_images(network, manifest=manifest_of(model), data=data, split="test")
    if images.missing or images.certificate.source != "test":
        raise DataError(f"{model}: no parity on test: {images.missing or 'the data have no test split'}")
    return images.certificate


def check_reshape(module: nn.Module, model: ov.Model, spec: InputSpec, *, threads: int | None) -> dict[str, Any]:
    """Whether the IR answers like torch with batch 4 and at another resolution: what the tuner relies on.

    For each: the largest logit difference, or the error of a network that takes one size only.
    """
    larger = spec.resized(spec.height + RESHAPE_STEP_PX, spec.width + RESHAPE_STEP_PX)
    cases: dict[str, Callable[[], float]] = {
        "batch 4": lambda: _reshape_difference(module, model, random_images(spec, 4), threads),
        f"{larger.height}x{larger.width}": lambda: _reshape_difference(
            module, model, random_images(larger, 1), threads
        ),
    }
    results: dict[str, Any] = {}
    for name, run in cases.items():
        try:
            results[name] = {"max_logit_difference": run()}
        except (RuntimeError, AssertionError, ValueError, ModelError) as error:
            results[name] = {"error": (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]}
    return results


def _reshape_difference(
    module: nn.Module, model: ov.Model, images: npt.NDArray[np.float32], threads: int | None
) -> float:
    with torch.no_grad():
        expected = module(torch.from_numpy(images)).numpy()
    reshaped = model.clone()
    reshaped.reshape(list(images.shape))
    got = compile_ir(reshaped, threads=threads)(images)[0]
    return float(np.max(np.abs(got - expected)))


def _deploy_config(root: Path, stage: Path, network: Network, int8: Int8Result) -> DeployConfig:
    precision = "int8" if int8.shipped else "f32"
    described = describe_stage(
        root,
        (stage / "model.xml").relative_to(root).as_posix(),
        input_spec=network.spec,
        temperature=network.temperature,
    )
    return DeployConfig(
        stages=(described,),
        latency=LatencySettings(precision=precision),
        throughput=ThroughputSettings(precision=precision),
        cpu=str(machine_record()["cpu"]),
        versions=package_versions(),
    )


def _failure(certificate: dict[str, Any], path: Path) -> str:
    reasons = "; ".join(certificate["reasons"])
    if certificate["verdict"] == "not run":
        return (
            f"{path}: the certificate was not run ({reasons}); nothing was deployed. Give --data, or export without proof"
            " with --no-certificate"
        )
    worst = ", ".join(item["id"] for item in certificate["worst"][:3])
    return f"{path}: the certificate failed: {reasons} (worst images: {worst}); nothing was deployed"
