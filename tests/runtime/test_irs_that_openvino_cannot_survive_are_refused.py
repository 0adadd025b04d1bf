"""ir_check.py: what would end the process never gets to OpenVINO, and what is sound does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from edgedistill.errors import ArtifactError, ModelError
from edgedistill.runtime.bundle import Bundle
from edgedistill.runtime.ir_check import fault_of

RELU, EDGE = '<layer id="1" type="ReLU"/>', '<edge from-layer="0" to-layer="1"/>'


def net(layer: str, edges: str, more: str = "") -> bytes:
    layers = f'<layers><layer id="0" type="Parameter"/>{layer}</layers>'
    return f"<net>{layers}<edges>{edges}</edges>{more}</net>".encode()


FATAL = {
    "no input": (net(RELU, ""), "too few inputs"),
    "one input of two": (net('<layer id="1" type="Broadcast"/>', EDGE), "too few inputs"),
    "a state": (net('<layer id="1" type="&#82;eadValue"/>', EDGE), "keeps a state"),
    "UTF-16": (net(RELU, "").decode().encode("utf-16"), "not UTF-8"),
    "UTF-32": (net(RELU, "").decode().encode("utf-32"), "not UTF-8"),
    "the same number": (net(RELU + RELU, EDGE), "same number"),
    "edges elsewhere": (net(RELU, f"<x>{EDGE}</x>"), "too few inputs"),
    "edges twice": (net(RELU, EDGE, "<edges/>"), "do not belong together"),
    "layers twice": (net(RELU, EDGE, "<layers/>"), "do not belong together"),
    "depth": (b"<a>" * 400 + b"</a>" * 400, "too deep"),
    "a document type": (b"<!DOCTYPE net [<!ENTITY a 'b'>]><net/>", "document type"),
    "no XML": (b"hello", "not XML"),
    "cut": (net(RELU, EDGE)[:-3], "not XML"),
    "not UTF-8": (b"<net a='\xff'/>", "not XML"),
    "nothing": (b"", "not XML"),
}


@pytest.mark.parametrize("what", FATAL)
def test_what_openvino_cannot_survive_has_a_fault(what: str) -> None:
    xml, says = FATAL[what]
    assert says in str(fault_of(xml))


def test_networks_inside_networks_have_none(tmp_path: Path) -> None:
    image = ops.parameter([1, 3, 8, 8], np.float32)
    step, total = (ops.parameter([1, 1, 8, 8], np.float32) for _ in range(2))
    body = ov.Model([ops.add(step, total)], [step, total])
    loop = ops.tensor_iterator()
    loop.set_body(body)
    loop.set_sliced_input(step, image.output(0), 0, 1, 1, -1, 1)
    start = ops.constant(np.zeros((1, 1, 8, 8), np.float32))
    loop.set_merged_input(total, start.output(0), body.results[0].output(0))
    model = ov.Model([loop.get_iter_value(body.results[0].output(0), -1)], [image])
    ov.save_model(model, tmp_path / "model.xml")
    xml = (tmp_path / "model.xml").read_bytes()
    assert b"<back_edges>" in xml and fault_of(xml) is None
    assert fault_of(net(RELU, EDGE, "<rt_info><layers/><edges/><layer/></rt_info>")) is None


def test_a_model_with_a_fault_is_refused(make: Any) -> None:
    path = make.ir(make.folder / "model.xml")
    path.write_bytes(path.read_bytes().replace(b'type="Const"', b'type="Broadcast"', 1))
    with pytest.raises(ModelError, match=r"model\.xml: not a readable OpenVINO IR .one of its operations"):
        Bundle.load(path)
    with pytest.raises(ModelError, match="memory"):
        Bundle.from_bytes(path.read_bytes(), path.with_suffix(".bin").read_bytes())


def test_text_that_is_no_text_is_refused(make: Any) -> None:
    path = make.ir(make.folder / "model.xml")
    path.write_bytes(path.read_bytes().replace(b'"tiny"', b'"\xf4iny"'))
    with pytest.raises((ArtifactError, ModelError), match=r"model\.xml"):
        Bundle.load(path)
