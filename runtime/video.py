"""Where images come from when they are not single files: folders, video files, cameras."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2

from edgedistill.errors import ImageError
from edgedistill.images import IMAGE_SUFFIXES
from edgedistill.runtime.network import Frame

MAX_CAMERA = 2**31 - 1
VIDEO_SUFFIXES = frozenset(
    {".avi", ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp"}
)


def frames(source: str | Path | int) -> Iterator[Frame]:
    """The images of an image file, a folder (searched to the bottom, in name order), a video file or a camera.

    ``source``: a path, or a camera's number (0, or the string "0"). Files come as paths, so that the engine can decode
    them scaled; video comes as uint8 [h, w, 3] BGR, named FILE#NUMBER from 0. Raises ImageError when there is nothing
    of the kind, before the first frame.
    """
    try:
        number = isinstance(source, int) or (str(source).isdecimal() and not Path(source).exists())
        path = Path(str(source))
        folder, file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:  # a name too long, or with a NUL in it
        raise ImageError(f"{str(source)[:60]!r}: no name of a file ({getattr(error, 'strerror', error)})") from error
    if number:
        if int(str(source)) > MAX_CAMERA:
            raise ImageError(f"camera {str(source)[:60]}: no camera answers under that number, or it has no frames")
        return _video(int(str(source)), f"camera {source}")
    if folder:
        return _folder(path)
    if not file:
        raise ImageError(f"{path}: no such file or folder; name an image, a folder, a video or a camera's number")
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return _video(str(path), str(path))
    return iter((Frame(str(path), path),))


def _folder(folder: Path) -> Iterator[Frame]:
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not paths:
        raise ImageError(f"{folder}: no images in it; expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}")
    return (Frame(str(path), path) for path in paths)


def _video(source: str | int, name: str) -> Iterator[Frame]:
    capture = cv2.VideoCapture(source)
    done, image = capture.read() if capture.isOpened() else (False, None)
    if not done:
        capture.release()
        what = "no camera answers under that number" if isinstance(source, int) else "not a video that OpenCV can read"
        raise ImageError(f"{name}: {what}, or it has no frames")
    return _captured(capture, image, name)


def _captured(capture: cv2.VideoCapture, image: object, name: str) -> Iterator[Frame]:
    number, done = 0, True
    try:
        while done:
            yield Frame(f"{name}#{number}", image)  # type: ignore[arg-type]
            number += 1
            # A new array per frame, so that earlier ones may still be in work.
            done, image = capture.read()
    finally:
        capture.release()
