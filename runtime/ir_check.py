"""Is an IR's XML fit to be given to OpenVINO? Some files end the process instead of raising; those are refused here.

What OpenVINO 2025 does with them, found by changing a small IR in thousands of ways:

- elements 200,000 deep in each other: 40 GB, because the key of its cache is the model written out again, indented;
- Broadcast with fewer than two inputs, MaxPool with none: it reads an input that is not there (a segmentation fault);
- ReadValue and Assign: the same where their variable is not described. An image classifier keeps no state anyway.

runtime/cpp/src/ir.cpp refuses the same. An IR remains a program that OpenVINO runs: run those of people you trust.
"""

from __future__ import annotations

from functools import lru_cache
from xml.parsers import expat

# An IR has about ten; each network inside a network (a loop's body) adds six.
MAX_DEPTH = 300
_NEEDED_INPUTS = {"Parameter": 0, "Const": 0, "Broadcast": 2}
_STATEFUL = frozenset({"ReadValue", "Assign"})
_APART = "its layers and edges do not belong together"


class _Refused(Exception):
    pass


class _Walk:
    """Layers and the edges between them, in networks inside networks: how many inputs each layer still needs."""

    def __init__(self) -> None:
        # The depth of <layers>, and so of its <edges>, with the inputs that each layer still needs.
        self._networks: list[tuple[int, dict[str, int]]] = []
        self._in_edges = False
        self._depth = 0
        self._notes = 0  # the depth of the rt_info that we are in; OpenVINO looks for no layers there

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _Refused("its elements lie too deep in each other")
        if self._notes:
            return
        if name == "rt_info":
            self._notes = self._depth
        elif name == "layers":
            self._networks.append((self._depth, {}))
        elif name == "layer":
            self._layer(attributes.get("id", ""), attributes.get("type", ""))
        elif name == "edges":
            if not self._inside(0):
                raise _Refused(_APART)
            self._in_edges = True
        elif name == "edge" and self._in_edges and self._inside(1):
            to, needed = attributes.get("to-layer", ""), self._networks[-1][1]
            if to not in needed:
                raise _Refused(_APART)
            needed[to] -= 1

    def _inside(self, levels: int) -> bool:
        return bool(self._networks) and self._networks[-1][0] + levels == self._depth

    def _layer(self, number: str, kind: str) -> None:
        if not self._inside(1) or not number:
            raise _Refused(_APART)
        needed = self._networks[-1][1]
        if kind in _STATEFUL:
            raise _Refused("its network keeps a state from one image to the next")
        if number in needed:
            raise _Refused("two of its layers have the same number")
        needed[number] = _NEEDED_INPUTS.get(kind, 1)

    def end(self, name: str) -> None:
        if not self._notes and name == "edges":
            if not self._inside(0):
                raise _Refused(_APART)
            self._in_edges = False
            if any(needed > 0 for needed in self._networks.pop()[1].values()):
                raise _Refused("one of its operations has too few inputs")
        elif self._inside(-1):
            raise _Refused(_APART)  # what holds the layers ends without their edges
        if self._depth == self._notes:
            self._notes = 0
        self._depth -= 1

    def finish(self) -> None:
        if self._networks:
            raise _Refused(_APART)


# An Engine reads the same IR once for its checks and once for every worker's network.
@lru_cache(maxsize=4)
def fault_of(xml: bytes) -> str | None:
    """Why OpenVINO must not get this text, or None."""
    if b"\0" in xml:  # UTF-16 and UTF-32, as C++ refuses them
        return "it is not UTF-8"
    walk, parser = _Walk(), expat.ParserCreate()

    def doctype(*_: object) -> None:
        raise _Refused("it has a document type")

    parser.StartElementHandler, parser.EndElementHandler = walk.start, walk.end
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.Parse(xml, True)
        walk.finish()
    except _Refused as refused:
        return str(refused)
    except (expat.ExpatError, ValueError, LookupError) as error:
        return f"not XML: {error}"
    return None
