"""The engine of edgedistill's C++ runtime; use it through edgedistill.runtime.CppEngine.

Every call but the properties lets go of Python's lock while it works or waits. What fails raises Error, whose ``args``
are the kind ('usage', 'image', 'artifact', 'model', 'closed') and the message.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__version__: str

class Error(Exception): ...

class HeadAnswer:
    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def index(self) -> int: ...
    @property
    def probability(self) -> float: ...
    @property
    def value(self) -> float: ...
    @property
    def accepted(self) -> tuple[int, ...]: ...

class Answer:
    """``probabilities``: float32 [C], the answer's own memory. ``error``: '' where the image was read."""

    @property
    def label(self) -> str: ...
    @property
    def index(self) -> int: ...
    @property
    def probability(self) -> float: ...
    @property
    def probabilities(self) -> npt.NDArray[np.float32]: ...
    @property
    def stage(self) -> int: ...
    @property
    def error(self) -> str: ...
    @property
    def accepted(self) -> tuple[int, ...]: ...
    @property
    def heads(self) -> list[HeadAnswer]: ...

class Engine:
    def __init__(
        self,
        path: bytes,
        memory: tuple[bytes, bytes] | None,
        *,
        precision: str,
        threads: int | None,
        streams: int | None,
        batch: int | None,
        queue_size: int | None,
        drop_oldest: bool,
        reduced: bool | None,
        use_cache: bool,
        cache_folder: bytes,
    ) -> None:
        """``memory``: the bytes of model.xml and model.bin, in the place of ``path``. None: what deploy.json says."""

    def submit_file(self, path: bytes, timeout_ms: int) -> tuple[int, int | None] | None:
        """(number of this image, number of the one that was given up for it); None: the engine was still full."""

    def submit_bytes(
        self, encoded: bytes | bytearray | memoryview, name: bytes, timeout_ms: int
    ) -> tuple[int, int | None] | None:
        """Borrows the memory until the answer is taken. Raises BufferError where it is not contiguous."""

    def submit_pixels(self, pixels: npt.NDArray[Any], timeout_ms: int) -> tuple[int, int | None] | None:
        """uint8 [h, w], [h, w, 1], [h, w, 3] BGR or [h, w, 4] BGRA, borrowed until the answer is taken. Raises
        BufferError for other arrays and for rows with gaps between their pixels or from the right to the left."""

    def take(self, number: int, timeout_ms: int) -> Answer | None:
        """The answer to an image, once; None: not there yet."""

    def forget(self, numbers: Sequence[int]) -> None:
        """Nobody will take these answers."""

    def close(self) -> None: ...
    def wait_until_ready(self) -> None: ...
    @property
    def dropped(self) -> int: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def spec(self) -> dict[str, Any]: ...
    @property
    def heads(self) -> list[dict[str, Any]]: ...
    @property
    def multi_label(self) -> bool: ...
    @property
    def precision(self) -> str: ...
    @property
    def streams(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def later_batch(self) -> int: ...
    @property
    def queue_size(self) -> int: ...
    @property
    def warnings(self) -> list[str]: ...
