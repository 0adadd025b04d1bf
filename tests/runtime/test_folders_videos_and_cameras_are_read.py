"""video.py: everything that holds images gives them one by one, and what holds none says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edgedistill.errors import ImageError
from edgedistill.runtime import Engine, frames


def video(path: Path, make: Any) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    assert writer.isOpened()
    for colour in make.labels * 3:
        writer.write(make.picture(colour, 48, 64))
    writer.release()
    return path


def test_a_videos_frames_are_classified_in_order(make: Any) -> None:
    path = video(make.folder / "vidéo.avi", make)
    with Engine(make.deployable()) as engine:
        answers = list(engine.map(frames(path)))
    assert [answer.label for answer in answers] == list(make.labels) * 3
    assert [answer.name for answer in answers] == [f"{path}#{number}" for number in range(9)]


def test_earlier_frames_stay_as_they_were(make: Any) -> None:
    kept = [np.asarray(frame.data) for frame in frames(video(make.folder / "v.avi", make))]
    assert kept[0][:, :, 2].mean() > 180 and kept[1][:, :, 1].mean() > 150


def test_a_folder_gives_its_images_in_name_order(make: Any) -> None:
    photos = [make.photo(colour, suffix) for colour in make.labels for suffix in (".jpg", ".png")]
    (photos[0].parent / ".hidden.jpg").write_bytes(b"x")
    (photos[0].parent / "notes.txt").write_text("x")
    (photos[0].parent / "folder.jpg").mkdir()
    below = photos[0].parent / "deeper" / "A.JPEG"
    below.parent.mkdir()
    below.write_bytes(photos[0].read_bytes())
    assert [frame.data for frame in frames(photos[0].parent)] == sorted([*photos, below])
    assert [frame.data for frame in frames(str(photos[0]))] == [photos[0]]


def test_what_holds_no_images_says_so(make: Any) -> None:
    (make.folder / "empty").mkdir()
    (make.folder / "broken.mp4").write_bytes(b"not a video" * 100)
    for source, what in (
        (make.folder / "empty", "no images in it"),
        (make.folder / "missing", "no such file or folder"),
        (make.folder / "broken.mp4", r"broken\.mp4: not a video"),
        (77, "camera 77: no camera"),
        ("77", "camera 77: no camera"),
    ):
        with pytest.raises(ImageError, match=what):
            frames(source)
