"""Does OpenVINO Model API, unchanged, give the same answers with our IR as our own runtime?

    python -m edgedistill.benchmarks.model_api_parity RUN --peers-python .venv-peers/bin/python --out FILE.json

takes the val images of RUN/dataset.csv, classifies them with `edgedistill.runtime.Classifier` at f32, has Model API do
the same in the peers' environment, twice: on images that we resized to H x W (losslessly), where the class must be the
same wherever our top-2 logit margin exceeds 1e-3; and on the original images, which Model API resizes in its own way,
where the disagreement is reported. The first form of this file's command line is what the peers' python runs:

    .venv-peers/bin/python benchmarks/model_api_parity.py --classify MODEL.xml IMAGES.json ANSWERS.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np

MARGIN = 1e-3


def classify(model_xml: str, images_json: str, answers_json: str) -> None:
    """Runs in the peers' environment: {"images": [path]} -> {"index": [int], "label": [str], "probability": [float]}."""
    from model_api.adapters import OpenvinoAdapter, create_core  # type: ignore[import-not-found]
    from model_api.models import Model  # type: ignore[import-not-found]

    paths = json.loads(Path(images_json).read_text(encoding="utf-8"))["images"]
    hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    adapter = OpenvinoAdapter(create_core(), model_xml, device="CPU", plugin_config=hints, model_parameters={})
    # By name as its users do; the adapter is only how Model API lets the precision be set.
    model = Model.create_model(adapter)
    plain = Model.create_model(model_xml)
    answers: dict[str, Any] = {"index": [], "label": [], "probability": [], "plain_index": [], "raw_scores_sum": []}
    for path in paths:
        image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
        result = model(image)
        top = result.top_labels[0]
        answers["index"].append(int(top.id))
        answers["label"].append(str(top.name))
        answers["probability"].append(float(top.confidence))
        answers["raw_scores_sum"].append(float(np.sum(result.raw_scores)))
        answers["plain_index"].append(int(plain(image).top_labels[0].id))
    answers["versions"] = _versions()
    Path(answers_json).write_text(json.dumps(answers), encoding="utf-8")


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("openvino-model-api", "openvino", "opencv-python-headless", "numpy")}


def compare(
    model: Path, images: list[tuple[str, Path]], *, peers_python: Path, threads: int | None = None
) -> dict[str, Any]:
    """``model``: an openvino/ folder or a model.xml; ``images``: (id, path). Returns the record that is written.

    Raises UsageError when the peers' python fails.
    """
    from edgedistill.images import load_image
    from edgedistill.runtime import Bundle, Classifier

    bundle = Bundle.load(model)
    ours = Classifier(bundle, precision="f32", threads=threads, decode="reduced", cache_dir=False)
    xml = bundle.root / bundle.config.stages[0].model
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        resized = []
        for number, (_, path) in enumerate(images):
            resized.append(folder / f"{number}.png")
            _, encoded = cv2.imencode(".png", load_image(path, ours.spec))
            resized[-1].write_bytes(encoded.tobytes())
        our_answers = [ours.classify(path) for path in resized]
        answers = {
            kind: _run_peer(peers_python, xml, paths, folder)
            for kind, paths in (("resized", resized), ("original", [path for _, path in images]))
        }
    probabilities = np.stack([answer.probabilities for answer in our_answers]).astype(np.float64)
    margins = _logit_margins(probabilities, ours.temperature)
    names = bundle.read_model(0, "f32").get_rt_info(["model_info", "labels"]).astype(str).split(" ")
    return _record(names, [id for id, _ in images], probabilities, margins, answers) | {
        "resize": ours.spec.resize,
        "crop_fraction": ours.spec.crop_fraction,
        "temperature": ours.temperature,
    }


def _logit_margins(probabilities: Any, temperature: float) -> Any:
    """Top-1 minus top-2 logit: temperature times the difference of the logarithms. float64 [N]."""
    top2 = np.sort(np.log(np.maximum(probabilities, 1e-300)), axis=1)[:, -2:]
    return temperature * (top2[:, 1] - top2[:, 0])


def _run_peer(peers_python: Path, xml: Path, paths: list[Path], folder: Path) -> dict[str, Any]:
    from edgedistill.errors import UsageError

    question, answer = folder / "images.json", folder / "answers.json"
    question.write_text(json.dumps({"images": [str(path) for path in paths]}), encoding="utf-8")
    command = [str(peers_python), str(Path(__file__).resolve()), "--classify", str(xml), str(question), str(answer)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UsageError(
            f"--peers-python {peers_python}: cannot be run ({error.strerror}); make it with: make peers"
        ) from error
    if done.returncode:
        raise UsageError(f"{peers_python}: Model API failed: {done.stderr.strip().splitlines()[-1:]}; run: make peers")
    return dict(json.loads(answer.read_text(encoding="utf-8")))


def _record(
    names: list[str], ids: list[str], probabilities: Any, margins: Any, answers: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    ours = probabilities.argmax(axis=1)
    resized, original = (np.array(answers[kind]["index"]) for kind in ("resized", "original"))
    expected_names = [names[index] for index in resized]
    # Model API knows no temperature: its probabilities are softmax(logits), so only classes are compared.
    above = (resized != ours) & (margins > MARGIN)
    return {
        "n": len(ids),
        "margin": MARGIN,
        "resized": {
            "disagreement": float((resized != ours).mean()),
            "disagreement_above_margin": float(above.mean()),
            "names_match": expected_names == answers["resized"]["label"],
            "plain_create_model_agrees": bool((np.array(answers["resized"]["plain_index"]) == resized).all()),
            "probabilities_sum_to_one": bool(np.allclose(answers["resized"]["raw_scores_sum"], 1.0, atol=1e-4)),
        },
        "original": {"disagreement": float((original != ours).mean())},
        "differing_ids": {
            "resized": [ids[row] for row in np.flatnonzero(resized != ours).tolist()][:20],
            "original": [ids[row] for row in np.flatnonzero(original != ours).tolist()][:20],
        },
        "peer_versions": answers["resized"]["versions"],
        "verdict": "fail" if above.any() else "pass",
    }


def main() -> int:
    if sys.argv[1:2] == ["--classify"]:
        classify(*sys.argv[2:5])
        return 0
    from edgedistill.artifacts import RunDir, write_json
    from edgedistill.benchmarks.machine import machine_record
    from edgedistill.data.manifest import read_dataset

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder with dataset.csv and openvino/")
    parser.add_argument("--peers-python", type=Path, default=Path(".venv-peers/bin/python"))
    parser.add_argument("--data-root", type=Path, help="where the images lie now, if they were moved")
    parser.add_argument("--split", default="val", choices=("train", "val", "test"))
    parser.add_argument("--limit", type=int, default=1000, help="number of images at most")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    run = RunDir(options.run)
    dataset = read_dataset(run.dataset, data_root=options.data_root)
    rows = dataset.rows(options.split)[: options.limit].tolist()
    images = [(str(dataset.ids[row]), Path(str(dataset.paths[row]))) for row in rows]
    record = compare(run.openvino, images, peers_python=options.peers_python)
    write_json(
        options.out,
        record | {"split": options.split, "machine": machine_record(), "command": " ".join(sys.argv)},
        format="edgedistill-model-api-parity",
    )
    print(json.dumps({key: record[key] for key in ("n", "resized", "original", "verdict")}, indent=2))
    return 0 if record["verdict"] == "pass" else 1


if __name__ == "__main__":
    sys.exit(main())
