"""Hundreds of broken and hostile models through both languages: a label or an error that names the file, never a crash."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.cpp

COUNT = 300
SECONDS_A_MODEL = 60.0
hostile = runpy.run_path(str(Path(__file__).with_name("hostile_models.py")))["hostile"]
# What `answer_dump -` does.
PYTHON = """
import json, sys
import numpy as np
from edgedistill.errors import ArtifactError, EdgedistillError, ModelError
from edgedistill.runtime import Classifier
for line in sys.stdin:
    try:
        classifier = Classifier(line.rstrip("\\n"), cache_dir=False, threads=1)
        (answer,) = classifier.classify([np.full((40, 56), 120, np.uint8)])
        if answer.error is not None:
            raise ModelError(answer.error)
        result = {"labels": list(classifier.labels), "answer": {"label": answer.label}}
    except (ArtifactError, ModelError) as error:
        result = {"error": str(error), "kind": "model" if isinstance(error, ModelError) else "artifact"}
    print(json.dumps(result), flush=True)
"""


@pytest.fixture(scope="module")
def models(test_models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, original = tmp_path_factory.mktemp("hostile"), test_models / "single" / "stages" / "tiny" / "model.xml"
    files = original.read_bytes(), original.with_suffix(".bin").read_bytes()
    paths = []
    for name, xml, weights in hostile(*files, COUNT, seed=1):
        path = folder / f"{name}.xml"
        path.write_bytes(xml)
        path.with_suffix(".bin").write_bytes(weights)
        paths.append(path)
    return paths


def results(command: list[str | Path], models: list[Path], env: dict[str, str]) -> Iterator[dict[str, Any]]:
    """One process opens one model after the other; its end, or too long a wait, is a failure of that model."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    assert process.stdin and process.stdout and process.stderr
    log: list[bytes] = []
    reader = threading.Thread(target=lambda: log.extend(process.stderr or ()))
    reader.start()
    try:
        for path in models:
            watchdog = threading.Timer(SECONDS_A_MODEL, process.kill)
            watchdog.start()
            process.stdin.write(os.fsencode(path) + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
            watchdog.cancel()
            assert line, f"{path.name}: crash or hang, {process.wait()}: {b''.join(log)[-2000:]!r}"
            yield json.loads(line)
        process.stdin.close()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        reader.join()


@pytest.fixture(params=["C++", "Python"])
def command(request: pytest.FixtureRequest, cpp_program: Callable[[str], Path]) -> list[str | Path]:
    return [cpp_program("answer_dump"), "-"] if request.param == "C++" else [sys.executable, "-c", PYTHON]


def test_every_hostile_model_ends_in_a_label_or_an_error(
    models: list[Path], command: list[str | Path], tmp_path: Path
) -> None:
    kinds: Counter[str] = Counter()
    env = os.environ | {"EDGEDISTILL_CACHE": str(tmp_path)}
    for path, result in zip(models, results(command, models, env), strict=True):
        if "error" in result:
            # What the network makes of an image is an error of that image.
            if "output is not finite" not in result["error"]:
                assert result["kind"] in ("model", "artifact") and str(path) in result["error"], result
            assert result["error"].isprintable(), result
        else:
            assert result["answer"]["label"] in result["labels"]
        kinds[result.get("kind", "label")] += 1
    assert min(kinds[kind] for kind in ("model", "artifact", "label")) > COUNT // 50, kinds


FATAL = {
    "Broadcast without inputs": (b'type="Const"', b'type="Broadcast"', "too few inputs"),
    "MaxPool without inputs": (b'type="Const"', b'type="MaxPool"', "too few inputs"),
    "a state": (b'type="ReduceMean"', b'type="ReadValue"', "keeps a state"),
    "depth": (b"<rt_info>", b"<rt_info>" + b"<a>" * 200_000 + b"</a>" * 200_000, "too deep"),
    "a document type": (b"<net ", b"<!DOCTYPE net [<!ENTITY a 'b'>]><net ", "document type"),
    "no edges": (b"<edges>", b"<edges></edges><edges>", "too few inputs"),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_what_openvino_would_not_survive_is_seen_in_any_encoding(
    encoding: str, command: list[str | Path], test_models: Path, tmp_path: Path
) -> None:
    original, path = test_models / "single" / "stages" / "tiny" / "model.xml", tmp_path / "model.xml"
    text = original.read_text(encoding="utf-8").replace('type="Const"', 'type="Broadcast"', 1)
    path.write_bytes(text.encode(encoding))
    path.with_suffix(".bin").write_bytes(original.with_suffix(".bin").read_bytes())
    (result,) = results(command, [path], dict(os.environ))
    assert result["kind"] == "model" and f"{path}: not a readable OpenVINO IR" in result["error"]


@pytest.mark.parametrize("what", FATAL)
def test_what_openvino_would_not_survive_it_never_gets(
    what: str, command: list[str | Path], test_models: Path, tmp_path: Path
) -> None:
    original, path = test_models / "single" / "stages" / "tiny" / "model.xml", tmp_path / "model.xml"
    before, after, says = FATAL[what]
    assert before in original.read_bytes()
    path.write_bytes(original.read_bytes().replace(before, after, 1))
    path.with_suffix(".bin").write_bytes(original.with_suffix(".bin").read_bytes())
    (result,) = results(command, [path], dict(os.environ))
    assert result["kind"] == "model" and says in result["error"]
