"""A deployable model on disk: deploy.json, the IR files that it names, and what each IR says about itself.

``deploy.json`` is what `export-openvino` and `edgedistill tune` decide and what both runtimes obey. Everything read here
may come from elsewhere, so nothing in it is trusted before it was checked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import openvino as ov

from edgedistill.artifacts import read_json, settings_dict, write_json
from edgedistill.errors import ArtifactError, ModelError
from edgedistill.images import DecodeMode, InputSpec
from edgedistill.runtime.ir_check import fault_of
from edgedistill.tasks import Head, Task, unfit_label

DEPLOY_FORMAT = "edgedistill-deploy"
IR_FORMAT_VERSION = "1"
PRECISIONS = ("f32", "bf16", "int8")
MAX_METADATA_CHARACTERS = 16_000_000
_Settings = TypeVar("_Settings")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Stage:
    """One network of a deployable. ``model`` is a POSIX path inside the deployable's folder.

    ``sha256`` and ``int8_sha256`` are ``model_sha256`` of model.xml and model-int8.xml (None: there is no INT8 form).
    ``exit_threshold``: the confidence from which this stage's answer stands; None on the last stage.
    """

    model: str
    sha256: str
    input_spec: InputSpec
    temperature: float = 1.0
    exit_threshold: float | None = None
    int8_sha256: str | None = None

    def __post_init__(self) -> None:
        path = PurePosixPath(self.model)
        if not self.model.endswith(".xml") or path.is_absolute() or ".." in path.parts or "\\" in self.model:
            raise ArtifactError(f"stage model {self.model!r}: expected a path to an .xml file inside the folder")
        hashes = (("sha256", self.sha256), ("int8_sha256", self.int8_sha256 or self.sha256))
        for name, value in hashes:
            if not _SHA256.fullmatch(value):
                raise ArtifactError(f"stage {self.model}: {name} {value[:80]!r}, expected 64 hexadecimal digits")
        if not (math.isfinite(self.temperature) and 0 < self.temperature <= 1000):
            raise ArtifactError(
                f"stage {self.model}: temperature {self.temperature}, expected a value above 0 up to 1000"
            )
        _check_share(f"stage {self.model}: exit_threshold", self.exit_threshold)


@dataclass(frozen=True)
class LatencySettings:
    """How `Classifier` runs: one image at a time. ``threads`` None: all cores.

    ``later_precision``: of a cascade's stages after the first; None: ``precision``.
    """

    precision: str = "f32"
    threads: int | None = None
    later_precision: str | None = None

    def __post_init__(self) -> None:
        _check_precision("latency precision", self.precision)
        _check_later_precision("latency", self.later_precision)
        _check_count("latency threads", self.threads)


@dataclass(frozen=True)
class ThroughputSettings:
    """How `Engine` runs: many images at once. None: chosen for the machine. ``batch``: images per inference.

    ``later_batch``, ``later_precision``: of a cascade's stages after the first; None: ``batch``, ``precision``.
    """

    precision: str = "f32"
    streams: int | None = None
    threads: int | None = None
    batch: int = 1
    pinning: bool | None = None
    later_batch: int | None = None
    later_precision: str | None = None

    def __post_init__(self) -> None:
        _check_precision("throughput precision", self.precision)
        _check_later_precision("throughput", self.later_precision)
        _check_count("throughput streams", self.streams)
        _check_count("throughput threads", self.threads)
        _check_count("throughput batch", self.batch)
        _check_count("throughput later_batch", self.later_batch)
        if self.pinning not in (None, True, False):
            raise ArtifactError(f"throughput pinning {self.pinning!r}, expected true, false or null")


RunSettings = LatencySettings | ThroughputSettings


def stage_precisions(settings: RunSettings, stages: int) -> tuple[str, ...]:
    """What each of ``stages`` runs at."""
    return (settings.precision, *[settings.later_precision or settings.precision] * (stages - 1))


def precision_name(precisions: Sequence[str]) -> str:
    """'int8', or 'int8+f32' where the stages of a cascade differ."""
    return precisions[0] if len(set(precisions)) == 1 else "+".join(precisions)


def deployed_precision(settings: RunSettings, stages: int) -> str:
    """The `precision_name` of what ``stages`` run at."""
    return precision_name(stage_precisions(settings, stages))


@dataclass(frozen=True)
class ScoreSettings:
    """What was weighed: w * accuracy + (1 - w) * min(fps / fps_target, 1)."""

    w: float = 0.7
    metric: str = "accuracy"
    scope: str = "files"
    fps_target: float | None = None

    def __post_init__(self) -> None:
        _check_share("score w", self.w)
        if self.metric not in ("accuracy", "macro-f1"):
            raise ArtifactError(f"score metric {self.metric!r}, expected 'accuracy' or 'macro-f1'")
        if self.scope not in ("model", "frames", "files"):
            raise ArtifactError(f"score scope {self.scope!r}, expected 'model', 'frames' or 'files'")
        if self.fps_target is not None and not (math.isfinite(self.fps_target) and self.fps_target > 0):
            raise ArtifactError(f"score fps_target {self.fps_target}, expected a number above 0 or null")


@dataclass(frozen=True)
class DeployConfig:
    """deploy.json. ``reject_below``: a final confidence below it answers 'unknown'. ``cpu``, ``cores``: that the settings
    were measured on, as far as they say."""

    stages: tuple[Stage, ...]
    latency: LatencySettings = field(default_factory=LatencySettings)
    throughput: ThroughputSettings = field(default_factory=ThroughputSettings)
    decode: DecodeMode = "reduced"
    reject_below: float | None = None
    score: ScoreSettings = field(default_factory=ScoreSettings)
    cpu: str = ""
    cores: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ArtifactError("deploy: no stages, expected at least one")
        if any(stage.exit_threshold is None for stage in self.stages[:-1]):
            raise ArtifactError(
                "deploy: a stage before the last has no exit_threshold, so the last would never be asked"
            )
        if self.decode not in ("full", "reduced"):
            raise ArtifactError(f"deploy: decode {self.decode!r}, expected 'full' or 'reduced'")
        _check_share("deploy: reject_below", self.reject_below)
        _check_count("deploy: cores", self.cores)
        for name, settings in (("latency", self.latency), ("throughput", self.throughput)):
            if settings.later_precision is not None and len(self.stages) == 1:
                raise ArtifactError(
                    f"{name} later_precision {settings.later_precision!r} is of the stages after the first, "
                    "but there is one stage; expected null"
                )


def _check_precision(what: str, precision: str, *, expected: Sequence[str] = PRECISIONS) -> None:
    if precision not in PRECISIONS:
        raise ArtifactError(f"{what} {precision!r}, expected one of {', '.join(expected)}")


def _check_later_precision(what: str, precision: str | None) -> None:
    if precision is not None:
        _check_precision(f"{what} later_precision", precision, expected=(*PRECISIONS, "null"))


def _check_count(what: str, count: int | None) -> None:
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 4096):
        raise ArtifactError(f"{what} {count!r}, expected a whole number from 1 to 4096")


def _check_share(what: str, value: float | None) -> None:
    if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
        raise ArtifactError(f"{what} {value!r}, expected a number from 0 to 1")


def describe_stage(
    root: Path, model: str, *, input_spec: InputSpec, temperature: float, exit_threshold: float | None = None
) -> Stage:
    """The stage whose FP32 IR is ``root / model``, with the hashes of its files; model-int8.xml beside it is found."""
    int8 = int8_path(root / model)
    return Stage(
        model=model,
        sha256=model_sha256(root / model),
        input_spec=input_spec,
        temperature=temperature,
        exit_threshold=exit_threshold,
        int8_sha256=model_sha256(int8) if int8.exists() else None,
    )


def write_deploy(path: Path, config: DeployConfig) -> None:
    """deploy.json, whole or not at all."""
    write_json(path, settings_dict(config), format=DEPLOY_FORMAT)


def read_deploy(path: Path) -> DeployConfig:
    """Raises ArtifactError that names the file, the field and what was expected."""
    values = read_json(path, format=DEPLOY_FORMAT)
    del values["format"], values["version"]
    try:
        stages = values.pop("stages", None)
        if not isinstance(stages, list):
            raise ArtifactError(f"stages is {type(stages).__name__}, expected a list")
        parts: dict[str, Any] = {"stages": tuple(_stage_from(entry) for entry in stages)}
        for name, kind in (("latency", LatencySettings), ("throughput", ThroughputSettings), ("score", ScoreSettings)):
            if name in values:
                parts[name] = _settings_from(kind, values.pop(name), name)
        return _settings_from(DeployConfig, values | parts, "deploy")
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}; export the model again") from error


def _stage_from(entry: Any) -> Stage:
    if not isinstance(entry, dict):
        raise ArtifactError(f"a stage is {type(entry).__name__}, expected an object")
    return _settings_from(Stage, entry | {"input_spec": InputSpec.from_dict(entry.get("input_spec", {}))}, "stage")


def _settings_from(kind: type[_Settings], values: Any, what: str) -> _Settings:
    """``values`` as that dataclass; a missing, unknown or wrongly typed field is an ArtifactError."""
    names = {entry.name for entry in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(values, dict) or set(values) - names:
        got = sorted(set(values) - names) if isinstance(values, dict) else type(values).__name__
        raise ArtifactError(f"{what}: unknown fields {got}, expected some of {sorted(names)}")
    try:
        return kind(**values)
    except (TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{what}: {error}") from error


def int8_path(model: Path) -> Path:
    """model.xml -> model-int8.xml."""
    return model.with_name(f"{model.stem}-int8.xml")


def model_sha256(xml: Path) -> str:
    """sha256 over the bytes of model.xml followed by those of model.bin: the network as it is deployed.

    Raises ArtifactError when one of them is missing.
    """
    digest = hashlib.sha256()
    for path in (xml, xml.with_suffix(".bin")):
        try:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise ArtifactError(
                f"{path}: cannot be read ({error.strerror or error}); export the model again"
            ) from error
    return digest.hexdigest()


@dataclass(frozen=True)
class ModelMetadata:
    """What an IR says about itself. ``bgr``: it wants BGR planes. ``gives_probabilities``: it ends in a softmax (or,
    where it is multi-label, a sigmoid). ``heads``: of a network with several, whose outputs ``labels`` names.

    ``own``: written by edgedistill; otherwise only Model API's section was there. ``layout``: of its input.
    ``threshold``: multi-label networks accept the classes from this probability on, or each from its own.
    """

    labels: tuple[str, ...]
    input_spec: InputSpec
    temperature: float = 1.0
    architecture: str = ""
    dataset_hash: str = ""
    weights_hash: str = ""
    bgr: bool = False
    gives_probabilities: bool = False
    own: bool = True
    layout: str = "NCHW"
    multi_label: bool = False
    threshold: float | tuple[float, ...] = 0.5
    heads: Task | None = None


def read_metadata(model: ov.Model, name: str) -> ModelMetadata:
    """Raises ModelError for a network that is no image classifier, ArtifactError for metadata that do not hold."""
    layout, height, width, classes = _shapes(model, name)
    try:
        if model.has_rt_info(["edgedistill", "format_version"]):
            metadata = _own_metadata(model)
        elif model.has_rt_info(["model_info", "labels"]):
            metadata = _model_api_metadata(model, height, width)
        else:
            raise ModelError(
                f"{name}: says nothing about its labels and input (no rt_info 'edgedistill' or 'model_info'); "
                "export it with export-openvino"
            )
        _check_labels(metadata.labels, classes)
    except ArtifactError as error:
        raise ArtifactError(f"{name}: {error}") from error
    if (metadata.input_spec.height, metadata.input_spec.width) != (height, width):
        raise ArtifactError(
            f"{name}: its input is {height}x{width}, its input_spec says "
            f"{metadata.input_spec.height}x{metadata.input_spec.width}; export the model again"
        )
    last = model.get_results()[0].input_value(0).get_node().get_type_name()
    if metadata.multi_label and last == "Softmax":
        raise ArtifactError(f"{name}: multi-label, but it ends in a softmax; expected logits or a sigmoid")
    if metadata.heads is not None and last in ("Softmax", "Sigmoid"):
        raise ArtifactError(f"{name}: several heads, but it ends in a {last}; expected logits")
    wanted = "Sigmoid" if metadata.multi_label else "Softmax"
    return dataclasses.replace(metadata, layout=layout, gives_probabilities=last == wanted)


def _shapes(model: ov.Model, name: str) -> tuple[str, int, int, int]:
    """(layout, height, width, classes) of a network with one image input and one output [1, C]."""
    shapes = [port.partial_shape for port in (*model.inputs, *model.outputs)]
    if len(model.inputs) != 1 or len(model.outputs) != 1 or any(shape.is_dynamic for shape in shapes):
        got = ", ".join(str(shape) for shape in shapes)
        raise ModelError(f"{name}: shapes {got}; expected one static input [1, 3, H, W] and one output [1, C]")
    image, scores = (list(shape.to_shape()) for shape in shapes)
    layout = "NCHW" if len(image) == 4 and image[1] == 3 else "NHWC"
    if (
        len(image) != 4
        or 3 not in (image[1], image[3])
        or image[0] != 1
        or len(scores) != 2
        or scores[0] != 1
        or scores[1] < 1
    ):
        raise ModelError(f"{name}: input {image} and output {scores}; expected [1, 3, H, W] and [1, C]")
    if model.inputs[0].get_element_type() == ov.Type.u8 or model.has_rt_info(["edgedistill", "preprocessing_embedded"]):
        raise ModelError(f"{name}: has its preprocessing embedded; use the plain IR, this runtime adds its own")
    height, width = image[2:] if layout == "NCHW" else image[1:3]
    return layout, height, width, scores[1]


def _text(model: ov.Model, section: str, key: str, default: str | None = None) -> str:
    """One metadata string. ``default`` None: it has to be there."""
    if not model.has_rt_info([section, key]):
        if default is None:
            raise ArtifactError(f"metadata {section}.{key} is missing; export the model again")
        return default
    try:
        value = model.get_rt_info([section, key]).value
    except UnicodeDecodeError as error:
        raise ArtifactError(f"metadata {section}.{key}: not UTF-8; export the model again") from error
    text = " ".join(str(v) for v in value) if isinstance(value, list | tuple) else str(value)
    if isinstance(value, dict) or len(text) > MAX_METADATA_CHARACTERS:
        raise ArtifactError(f"metadata {section}.{key}: not a plain value, or longer than {MAX_METADATA_CHARACTERS}")
    return text


def _own_metadata(model: ov.Model) -> ModelMetadata:
    version = _text(model, "edgedistill", "format_version")
    if version != IR_FORMAT_VERSION:
        raise ArtifactError(
            f"metadata format {version[:20]!r}, this runtime reads {IR_FORMAT_VERSION!r}; use the release that wrote it"
        )
    task = _text(model, "edgedistill", "task")
    if task not in ("single-label", "multi-label", "heads"):
        raise ArtifactError(f"task {task[:40]!r}, this runtime does 'single-label', 'multi-label' and 'heads'")
    labels = _parsed(model, "labels")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ArtifactError("metadata edgedistill.labels: expected a JSON list of strings; export the model again")
    heads = Task.from_dict(_parsed(model, "heads")) if task == "heads" else None
    if heads is not None and heads.outputs != tuple(labels):
        raise ArtifactError("metadata edgedistill.heads: not those of the labels; export the model again")
    (temperature,) = _numbers(_text(model, "edgedistill", "temperature"), "edgedistill.temperature", count=1)
    if not 0 < temperature <= 1000:
        raise ArtifactError(f"metadata edgedistill.temperature {temperature}, expected a value above 0 up to 1000")
    return ModelMetadata(
        labels=tuple(labels),
        input_spec=InputSpec.from_dict(_parsed(model, "input_spec")),
        temperature=temperature,
        architecture=_text(model, "edgedistill", "architecture", ""),
        dataset_hash=_text(model, "edgedistill", "dataset_hash", ""),
        weights_hash=_text(model, "edgedistill", "weights_hash", ""),
        multi_label=task == "multi-label",
        threshold=_own_threshold(model, len(labels)) if task == "multi-label" else 0.5,
        heads=heads,
    )


def _own_threshold(model: ov.Model, count: int) -> float | tuple[float, ...]:
    """A list with one for each of ``count`` labels; null, or the list of one number of older exports: what Model API's
    section says."""
    listed = _parsed(model, "thresholds") if model.has_rt_info(["edgedistill", "thresholds"]) else None
    if listed is None or (count > 1 and isinstance(listed, list) and len(listed) == 1):
        return _threshold(model)
    numbers = listed if isinstance(listed, list) else [listed] * count
    fits = (isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number <= 1 for number in numbers)
    if len(numbers) != count or not all(fits):
        raise ArtifactError(f"metadata edgedistill.thresholds: expected {count} numbers from 0 to 1; export it again")
    return tuple(float(number) for number in numbers)


def _threshold(model: ov.Model) -> float:
    name = "model_info.confidence_threshold"
    (threshold,) = _numbers(_text(model, "model_info", "confidence_threshold", "0.5"), name, count=1)
    if not 0 <= threshold <= 1:
        raise ArtifactError(f"metadata {name} {threshold}, expected a number from 0 to 1")
    return threshold


def _parsed(model: ov.Model, key: str) -> Any:
    text = _text(model, "edgedistill", key)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"metadata edgedistill.{key}: not JSON ({text[:60]!r}); export the model again") from error


def _model_api_metadata(model: ov.Model, height: int, width: int) -> ModelMetadata:
    """A network from elsewhere that describes itself as OpenVINO Model API's classifiers do."""

    def value(key: str, default: str | None = None) -> str:
        return _text(model, "model_info", key, default)

    def is_set(key: str) -> bool:
        return value(key, "False").lower() in ("true", "1", "yes")

    for key in ("embedded_processing", "hierarchical"):
        if is_set(key):
            raise ArtifactError(f"metadata model_info.{key} is set, which this runtime does not do")
    resizes = {"standard": "squash", "crop": "center-crop"}
    if value("resize_type", "standard") not in resizes:
        raise ArtifactError(
            f"metadata model_info.resize_type {value('resize_type')[:40]!r}, expected {sorted(resizes)}"
        )
    bgr, multi_label = not is_set("reverse_input_channels"), is_set("multilabel")
    mean = _numbers(value("mean_values", "0 0 0"), "model_info.mean_values", count=3)
    std = _numbers(value("scale_values", "1 1 1"), "model_info.scale_values", count=3)
    spec = {
        "height": height,
        "width": width,
        "resize": resizes[value("resize_type", "standard")],
        "crop_fraction": 1.0,
        "color_order": "RGB",
        # The input spec is in RGB order whatever the network wants.
        "mean": mean[::-1] if bgr else mean,
        "std": std[::-1] if bgr else std,
    }
    return ModelMetadata(
        labels=tuple(value("labels").split()),
        input_spec=InputSpec.from_dict(spec),
        bgr=bgr,
        own=False,
        multi_label=multi_label,
        threshold=_threshold(model) if multi_label else 0.5,
    )


def _numbers(text: str, name: str, *, count: int) -> list[float]:
    """One number stands for all ``count`` of them, as Model API has it."""
    try:
        numbers = [float(part) for part in re.split(r"[\s,\[\]]+", text[:1000]) if part]
    except ValueError as error:
        raise ArtifactError(f"metadata {name} {text[:60]!r}: not numbers; export the model again") from error
    numbers = numbers * count if len(numbers) == 1 else numbers
    if len(numbers) != count or not all(math.isfinite(number) for number in numbers):
        raise ArtifactError(f"metadata {name} {text[:60]!r}: expected {count} finite numbers; export the model again")
    return numbers


def _check_labels(labels: tuple[str, ...], classes: int) -> None:
    if len(labels) != classes:
        raise ArtifactError(f"{len(labels)} labels, but the network has {classes} outputs; export the model again")
    for label in labels:
        if wrong := unfit_label(label):
            raise ArtifactError(f"label {label[:60]!r}: {wrong}; rename it and export the model again")
    if len(set(labels)) != len(labels):
        raise ArtifactError("two labels are the same; export the model again")


@dataclass(frozen=True)
class Bundle:
    """A checked deployable. ``source``: folder or file for messages. ``metadata``: one per stage.

    ``weights``: (xml, bin) of a model that came from memory; its only stage then has no files.
    """

    source: str
    root: Path
    config: DeployConfig
    metadata: tuple[ModelMetadata, ...]
    weights: tuple[bytes, bytes] | None = None

    @classmethod
    def load(cls, path: str | Path) -> Bundle:
        """An openvino/ folder (or the run's folder above it), a deploy.json, or a single model.xml.

        Raises ArtifactError when files are missing, changed or hostile, ModelError when the IR is no classifier.
        """
        path = Path(path)
        if path.is_dir():
            candidates = (path / "deploy.json", path / "openvino" / "deploy.json", path / "model.xml")
            found = next((candidate for candidate in candidates if candidate.is_file()), None)
            if found is None:
                raise ArtifactError(f"{path}: no deploy.json or model.xml in it; run export-openvino first")
            path = found
        if not path.is_file():
            raise ArtifactError(f"{path}: no such file; expected an openvino/ folder, a deploy.json or a model.xml")
        if path.suffix == ".xml":
            metadata = read_metadata(read_ir(path), str(path))
            stage = describe_stage(
                path.parent, path.name, input_spec=metadata.input_spec, temperature=metadata.temperature
            )
            return cls(str(path), path.parent, DeployConfig(stages=(stage,)), (metadata,))
        if path.suffix != ".json":
            raise ArtifactError(f"{path}: expected an openvino/ folder, a deploy.json or a model.xml")
        config = read_deploy(path)
        metadata_of_stages = tuple(_stage_metadata(path.parent, stage) for stage in config.stages)
        _check_stages_agree(path, metadata_of_stages)
        return cls(str(path.parent), path.parent, config, metadata_of_stages)

    @classmethod
    def from_bytes(cls, xml: bytes, weights: bytes, *, name: str = "<memory>") -> Bundle:
        """A single IR that is in memory: the bytes of model.xml and of model.bin."""
        metadata = read_metadata(read_ir((xml, weights), name=name), name)
        digest = hashlib.sha256(xml + weights).hexdigest()
        stage = Stage("model.xml", digest, metadata.input_spec, metadata.temperature)
        return cls(name, Path(), DeployConfig(stages=(stage,)), (metadata,), (bytes(xml), bytes(weights)))

    @property
    def labels(self) -> tuple[str, ...]:
        return self.metadata[0].labels

    @property
    def multi_label(self) -> bool:
        return self.metadata[0].multi_label

    @property
    def single(self) -> bool:
        """Whether every image gets one label."""
        return not self.multi_label and not self.heads

    @property
    def heads(self) -> tuple[Head, ...]:
        """Of a network with several heads; () where every image gets one label or one set of labels."""
        task = self.metadata[0].heads
        return () if task is None else task.heads

    def read_model(self, stage: int, precision: str) -> ov.Model:
        """The IR for that precision, at the stage's resolution. Raises ModelError when there is no such form."""
        settings, metadata = self.config.stages[stage], self.metadata[stage]
        _check_precision(f"{self.source} precision", precision)
        if precision == "int8" and (settings.int8_sha256 is None or self.weights is not None):
            raise ModelError(
                f"{self.source}: stage {settings.model} has no INT8 form; use precision 'f32' or export it"
            )
        if self.weights is not None:
            model = read_ir(self.weights, name=self.source)
        else:
            path = self.root / settings.model
            model = read_ir(int8_path(path) if precision == "int8" else path)
        spec = settings.input_spec
        if (spec.height, spec.width) != (metadata.input_spec.height, metadata.input_spec.width):
            reshape_model(model, metadata.layout, spec, batch=1, name=self.source)
        return model


def reshape_model(model: ov.Model, layout: str, spec: InputSpec, *, batch: int, name: str) -> None:
    """Raises ModelError when the network cannot take that size."""
    size = [3, spec.height, spec.width] if layout == "NCHW" else [spec.height, spec.width, 3]
    try:
        model.reshape([batch, *size])
    except RuntimeError as error:
        raise ModelError(
            f"{name}: cannot run at {spec.height}x{spec.width} with batch {batch} ({last_line(error)})"
        ) from error


def read_ir(source: Path | tuple[bytes, bytes], *, name: str = "") -> ov.Model:
    """Raises ModelError for a file that is missing, damaged, not an OpenVINO IR, or one that OpenVINO cannot survive."""
    name = name or str(source)
    try:
        why = fault_of(source.read_bytes() if isinstance(source, Path) else bytes(source[0]))
        if why is None:
            given = (str(source),) if isinstance(source, Path) else source
            return ov.Core().read_model(*given)
    # Its messages repeat what is in the file, which may be no UTF-8.
    except (RuntimeError, OSError, UnicodeDecodeError) as error:
        why = last_line(error)
    raise ModelError(f"{name}: not a readable OpenVINO IR ({why}); export it again")


def last_line(error: Exception) -> str:
    """OpenVINO's messages are a stack of source lines with the reason at the end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def _stage_metadata(root: Path, stage: Stage) -> ModelMetadata:
    path = root / stage.model
    if not path.resolve().is_relative_to(root.resolve()):
        raise ArtifactError(f"{path}: leads outside {root}; export the model again")
    for file, expected in ((path, stage.sha256), (int8_path(path), stage.int8_sha256)):
        got = model_sha256(file) if expected is not None else None
        if got != expected:
            raise ArtifactError(
                f"{file}: sha256 {str(got)[:12]}..., deploy.json says {str(expected)[:12]}...: it is damaged or from "
                "another export; export the model again"
            )
    metadata = read_metadata(read_ir(path), str(path))
    if stage.input_spec.resized(metadata.input_spec.height, metadata.input_spec.width) != metadata.input_spec:
        raise ArtifactError(
            f"{path}: its input spec and deploy.json's differ in more than the resolution; export the model again"
        )
    return metadata


def _check_stages_agree(path: Path, metadata: tuple[ModelMetadata, ...]) -> None:
    for number, other in enumerate(metadata[1:], start=1):
        if other.labels != metadata[0].labels:
            raise ArtifactError(f"{path}: stage {number} has other labels than stage 0; export them from one data set")
        if (other.multi_label, _layout(other)) != (metadata[0].multi_label, _layout(metadata[0])):
            raise ArtifactError(f"{path}: stage {number} has another task than stage 0; export them from one data set")


def _layout(metadata: ModelMetadata) -> Any:
    return None if metadata.heads is None else metadata.heads.layout
