"""Images that are the same: byte for byte, or to the eye (a burst, a rescaled or re-encoded copy).

Near-duplicates: perceptual hashes (64 bits) at most 4 bits apart and a pixel correlation of at least 0.98 at 64 x 64
grey pixels. Either alone is not enough: on ELPV the hash alone chains hundreds of unlike solar cells.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import imagehash
import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from edgedistill import console
from edgedistill.errors import ImageError
from edgedistill.image_headers import DEFAULT_MAX_PIXELS
from edgedistill.images import InputSpec, load_image

MAX_HASH_DISTANCE = 4
MIN_CORRELATION = 0.98
THUMBNAIL_PX = 64
THUMBNAIL = InputSpec(height=THUMBNAIL_PX, width=THUMBNAIL_PX)
# 4 KB of thumbnail for each image; beyond these limits the search is off and a note says so.
MAX_IMAGES = 100_000
MAX_PAIRS = 2_000_000
# Five parts: hashes at most 4 bits apart agree in at least one of them whole (pigeonhole).
HASH_PARTS = ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))

Pairs = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int64]
Thumbnails = npt.NDArray[np.uint8]
Hashes = npt.NDArray[np.uint64]

NO_PAIRS: Pairs = np.zeros((0, 2), np.int64)
TOO_MANY_PAIRS = "so many images look alike that near-duplicates are not kept together; byte-equal copies are"


def fingerprint(source: str | Path | bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[int, Thumbnails]:
    """(perceptual hash of 64 bits, grey thumbnail uint8 [64, 64]); decodes the image. Raises ImageError."""
    thumbnail: Thumbnails = cv2.cvtColor(load_image(source, THUMBNAIL, max_pixels=max_pixels), cv2.COLOR_BGR2GRAY)  # type: ignore[assignment]
    bits = imagehash.phash(Image.fromarray(thumbnail)).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big"), thumbnail


def fingerprint_files(paths: Sequence[Path]) -> tuple[Hashes, Thumbnails]:
    """Hashes uint64 [N] and thumbnails uint8 [N, 64, 64] by a thread pool. Raises ImageError for the first bad file."""
    hashes = np.zeros(len(paths), np.uint64)
    thumbnails = np.zeros((len(paths), THUMBNAIL_PX, THUMBNAIL_PX), np.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool, console.progress("looking for duplicates", len(paths)) as bar:
        for row, (value, thumbnail) in enumerate(pool.map(fingerprint, paths)):
            hashes[row], thumbnails[row] = value, thumbnail
            bar.update(bar.task_ids[0], advance=1)
    return hashes, thumbnails


def near_duplicate_pairs(hashes: Hashes, thumbnails: Thumbnails) -> Pairs | None:
    """Row pairs int64 [M, 2], i < j, of near-duplicates; None when more than MAX_PAIRS hashes are alike."""
    pairs = close_hashes(hashes)
    if pairs is None or not len(pairs):
        return pairs
    return pairs[correlations(thumbnails, pairs) >= MIN_CORRELATION]


def close_hashes(hashes: Hashes) -> Pairs | None:
    """All row pairs whose hashes are at most MAX_HASH_DISTANCE bits apart, without comparing all with all.

    Multi-index hashing: rows that agree in one of the five parts are neighbours once sorted by that part.
    """
    found: set[int] = set()
    count = len(hashes)
    for shift, bits in HASH_PARTS:
        part = (hashes >> np.uint64(shift)) & np.uint64((1 << bits) - 1)
        order = np.argsort(part, kind="stable")
        ordered = hashes[order]
        followers = np.searchsorted(part[order], part[order], side="right") - np.arange(count) - 1
        step, active = 1, np.flatnonzero(followers >= 1)
        while len(active):
            hit = active[np.bitwise_count(ordered[active] ^ ordered[active + step]) <= MAX_HASH_DISTANCE]
            one, other = order[hit], order[hit + step]
            found.update((np.minimum(one, other) * count + np.maximum(one, other)).tolist())
            if len(found) > MAX_PAIRS:
                return None
            step += 1
            active = active[followers[active] >= step]
    keys = np.sort(np.fromiter(found, np.int64, len(found)))
    return np.stack([keys // max(count, 1), keys % max(count, 1)], axis=1)


def near_duplicates_across(paths: Sequence[Path | str], others: Sequence[Path | str]) -> Pairs | None:
    """Row pairs int64 [M, 2] (of ``paths``, of ``others``) that are near-duplicates; None when more than MAX_PAIRS hashes
    are alike. Images that cannot be read are like none.

    Of all images only hashes are kept, 8 bytes each: thumbnails are made again of the few whose hashes are close.
    """
    (hashes, readable), (other_hashes, other_readable) = _readable_hashes(paths), _readable_hashes(others)
    one, other = np.flatnonzero(readable), np.flatnonzero(other_readable)
    close = close_across(hashes[one], other_hashes[other])
    if close is None:
        return None
    pairs = np.stack([one[close[:, 0]], other[close[:, 1]]], axis=1)
    found = [NO_PAIRS]
    for start in range(0, len(pairs), 1024):
        some = pairs[start : start + 1024]
        rows, place = np.unique(some[:, 0], return_inverse=True)
        other_rows, other_place = np.unique(some[:, 1], return_inverse=True)
        images = [paths[row] for row in rows] + [others[row] for row in other_rows]
        thumbnails = np.stack([fingerprint(path)[1] for path in images])
        alike = correlations(thumbnails, np.stack([place, len(rows) + other_place], axis=1))
        found.append(some[alike >= MIN_CORRELATION])
    return np.concatenate(found)


def _readable_hashes(paths: Sequence[Path | str]) -> tuple[Hashes, npt.NDArray[np.bool_]]:
    """Hashes uint64 [N], and whether the image could be read, bool [N]."""

    def look(path: Path | str) -> int | None:
        try:
            return fingerprint(path)[0]
        except ImageError:
            return None

    hashes, readable = np.zeros(len(paths), np.uint64), np.zeros(len(paths), bool)
    with ThreadPoolExecutor(os.cpu_count()) as pool, console.progress("looking for duplicates", len(paths)) as bar:
        for row, value in enumerate(pool.map(look, paths)):
            hashes[row], readable[row] = value or 0, value is not None
            bar.update(bar.task_ids[0], advance=1)
    return hashes, readable


def close_across(hashes: Hashes, others: Hashes) -> Pairs | None:
    """Row pairs int64 [M, 2] of ``hashes`` and ``others`` at most MAX_HASH_DISTANCE bits apart, by the same parts as in
    ``close_hashes``; None when more than MAX_PAIRS."""
    found: set[int] = set()
    for shift, bits in HASH_PARTS:
        mask = np.uint64((1 << bits) - 1)
        own, part = (hashes >> np.uint64(shift)) & mask, (others >> np.uint64(shift)) & mask
        order = np.argsort(part, kind="stable")
        place = np.searchsorted(part[order], own, side="left")
        end = np.searchsorted(part[order], own, side="right")
        active = np.flatnonzero(place < end)
        while len(active):
            candidate = order[place[active]]
            hit = np.bitwise_count(hashes[active] ^ others[candidate]) <= MAX_HASH_DISTANCE
            found.update((active[hit] * len(others) + candidate[hit]).tolist())
            if len(found) > MAX_PAIRS:
                return None
            place[active] += 1
            active = active[place[active] < end[active]]
    keys = np.sort(np.fromiter(found, np.int64, len(found)))
    return np.stack([keys // max(len(others), 1), keys % max(len(others), 1)], axis=1)


def correlations(thumbnails: Thumbnails, pairs: Pairs) -> npt.NDArray[np.float32]:
    """Pearson correlation of the pixels of each pair, float32 [M]; two flat images correlate if they are of one grey."""
    result = np.empty(len(pairs), np.float32)
    flat = thumbnails.reshape(len(thumbnails), -1)
    for start in range(0, len(pairs), 1024):
        one, other = (flat[pairs[start : start + 1024, side]].astype(np.float32) for side in (0, 1))
        same = np.abs(one - other).max(axis=1) <= 2
        one -= one.mean(axis=1, keepdims=True)
        other -= other.mean(axis=1, keepdims=True)
        size = np.sqrt(np.einsum("ij,ij->i", one, one) * np.einsum("ij,ij->i", other, other))
        dot = np.einsum("ij,ij->i", one, other)
        result[start : start + 1024] = np.where(same, 1.0, dot / np.maximum(size, 1e-6))
    return result


def same_value_pairs(values: npt.NDArray[np.generic]) -> Pairs:
    """Row pairs int64 [M, 2] that chain all rows of equal value (M = N - number of values)."""
    order = np.argsort(values, kind="stable")
    same = np.flatnonzero(values[order][1:] == values[order][:-1])
    return np.stack([order[same], order[same + 1]], axis=1).astype(np.int64)


def contradictions(digests: npt.NDArray[Any], values: npt.NDArray[np.floating[Any]]) -> tuple[Rows, Pairs]:
    """(rows int64 of all copies that contradict one another, a pair of each such set that does, int64 [M, 2]).

    ``values``: float [N, V]; copies contradict where both have a value in one column and not the same; NaN: not known.
    """
    copies = np.unique(same_value_pairs(digests))
    if not len(copies):
        return copies, NO_PAIRS
    copies = copies[np.argsort(digests[copies], kind="stable")]
    starts = np.flatnonzero(np.append(True, digests[copies][1:] != digests[copies][:-1]))
    wrong = np.fmin.reduceat(values[copies], starts) < np.fmax.reduceat(values[copies], starts)
    sets = np.split(copies, starts[1:])
    rows, pairs = [copies[:0]], list[list[int]]()
    for number in np.flatnonzero(wrong.any(axis=1)):
        column = values[sets[number], wrong[number].argmax()]
        rows.append(sets[number])
        pairs.append(sorted(sets[number][[np.nanargmin(column), np.nanargmax(column)]].tolist()))
    return np.sort(np.concatenate(rows)), np.array(pairs, np.int64).reshape(-1, 2)


def components(count: int, pairs: Pairs) -> npt.NDArray[np.int32]:
    """Component number int32 [count] of each row when rows are joined by pairs; alone is a component too."""
    ones = np.ones(len(pairs), np.int8)
    graph = coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1]
