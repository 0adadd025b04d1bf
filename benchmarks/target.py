"""What is to be measured: the deployable, the files beside it that peers need, and which peers can run here."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from edgedistill.artifacts import sha256_file
from edgedistill.errors import UsageError
from edgedistill.images import InputSpec
from edgedistill.runtime.bundle import Bundle, int8_path
from edgedistill.runtime.cpp_programs import HOW_TO_BUILD, find_cpp_program

SCOPES = ("model", "frames", "files")
MODES = ("latency", "throughput")
OWN = "edgedistill"
BASE = "naive-f32"
# Our C++ runtime: measured like our own, at every precision, through its program's --serve.
CPP = "edgedistill-cpp"
CPP_PROGRAM = "edgedistill-bench"
# --vs name -> the name in the results, the modes and the scopes in which it is measured.
PEERS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "naive": (BASE, ("latency",), SCOPES),
    "naive-default": ("naive-default", ("latency",), SCOPES),
    "onnxruntime": ("onnxruntime", MODES, SCOPES),
    "torch": ("torch", MODES, SCOPES),
    "benchmark_app": ("benchmark_app", MODES, ("model",)),
    "model-api": ("model-api", MODES, ("frames", "files")),
    "ncnn": ("ncnn", MODES, ("model",)),
    CPP: (CPP, MODES, SCOPES),
}


@dataclass(frozen=True)
class Target:
    """A deployable on disk. ``model``: the FP32 IR that peers run (of a cascade the last, most accurate stage)."""

    path: Path
    bundle: Bundle
    model: Path
    spec: InputSpec

    @classmethod
    def open(cls, path: str | Path) -> Target:
        """Raises UsageError for a path that cannot be one; ArtifactError or ModelError for a damaged deployable."""
        path = Path(path)
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder; give an openvino/ folder or a model.xml")
        if path.is_file() and path.suffix not in (".xml", ".json"):
            raise UsageError(f"{path}: not an OpenVINO IR; give an openvino/ folder, its deploy.json or a model.xml")
        names = ("deploy.json", "openvino/deploy.json", "model.xml")
        if path.is_dir() and not any((path / name).is_file() for name in names):
            raise UsageError(f"{path}: no deploy.json or model.xml in it; run export-openvino first")
        bundle = Bundle.load(path)
        last = bundle.config.stages[-1]
        return cls(path, bundle, bundle.root / last.model, last.input_spec)

    @property
    def deploy_folder(self) -> Path | None:
        """The openvino/ folder, or None for a single model.xml from anywhere."""
        return self.bundle.root if (self.bundle.root / "deploy.json").is_file() else None

    @property
    def has_int8(self) -> bool:
        return all(stage.int8_sha256 is not None for stage in self.bundle.config.stages)

    @property
    def files(self) -> list[Path]:
        """Every file of the networks: model.xml, model.bin and their INT8 forms."""
        found = [self.bundle.root / name for name in self.sha256]
        return [*found, *(path.with_suffix(".bin") for path in found)]

    @property
    def sha256(self) -> dict[str, str]:
        """sha256 of every IR, by its path inside the deployable."""
        found = {}
        for stage in self.bundle.config.stages:
            found[stage.model] = stage.sha256
            if stage.int8_sha256 is not None:
                found[int8_path(Path(stage.model)).as_posix()] = stage.int8_sha256
        return found

    @property
    def onnx(self) -> Path:
        return self.model.with_suffix(".onnx")

    def beside(self, name: str) -> Path | None:
        """A file of the run that this deployable belongs to: beside it or up to three folders above the IR."""
        return next((folder / name for folder in self._run_folders if (folder / name).is_file()), None)

    @property
    def _run_folders(self) -> tuple[Path, ...]:
        return (self.model.parent, *list(self.model.resolve().parents)[1:4])

    @cached_property
    def checkpoint(self) -> Path | None:
        """The model.pt or model-NAME.pt that the last stage was exported from, by its hash, among the run's; None where it
        is not there."""
        files = (path for folder in self._run_folders for path in sorted(folder.glob("model*.pt")) if path.is_file())
        wanted = self.bundle.metadata[-1].weights_hash
        return next((path for path in files if sha256_file(path) == wanted), None)

    def missing(self, peer: str, peers_python: Path) -> str | None:
        """Why that peer (a key of PEERS) cannot be measured here, with the remedy; None if it can."""
        metadata = self.bundle.metadata[-1]
        if peer == CPP:
            return None if find_cpp_program(CPP_PROGRAM) else f"{CPP_PROGRAM} is not built; {HOW_TO_BUILD}"
        if peer != "benchmark_app" and (metadata.bgr or metadata.layout != "NCHW"):
            return f"takes RGB planes, this IR wants {'BGR ' if metadata.bgr else ''}{metadata.layout}"
        if peer == "onnxruntime":
            return _needs("onnxruntime", self.onnx if self.onnx.is_file() else None, self.onnx)
        if peer == "torch":
            return _needs("torch", self.checkpoint, Path("the model.pt that it was exported from")) or _needs(
                "timm", self.model, self.model
            )
        if peer in ("model-api", "ncnn") and not peers_python.is_file():
            return f"{peers_python} is not there; run 'make peers' in the source folder and start from it"
        if peer == "ncnn" and not self.onnx.is_file():
            return f"{self.onnx} is not there; export-openvino writes it"
        return None


def _needs(package: str, file: Path | None, wanted: Path) -> str | None:
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed; pip install {package}"
    if file is None:
        return f"{wanted} is not there; export-openvino writes it"
    return None
