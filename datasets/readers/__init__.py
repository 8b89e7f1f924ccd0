"""Video file, frame folder or array -> frames. One interface, several backends.

A reader has `len()`, `fps`, `damage` and `read(indices) -> uint8 (T, C, H, W)` RGB. Frames are named by
their place in presentation order, whatever the container's timestamps, B-frames or rotation.

Letters: T frames, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ..errors import VideoError
from .arrays import ArrayReader
from .base import (
    ARRAY_SUFFIX,
    HIDDEN,
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    VIDEO_SUFFIXES,
    Reader,
    file_identity,
    load_package,
)
from .containers import container_format
from .decord import DecordReader
from .images import FrameReader, list_frames, read_image
from .pyav import PyAVReader

__all__ = [
    "ARRAY_SUFFIX",
    "HIDDEN",
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "READERS",
    "VIDEO_SUFFIXES",
    "PyAVReader",
    "Reader",
    "VideoError",
    "check_installed",
    "container_format",
    "every_frame",
    "file_identity",
    "list_frames",
    "load_package",
    "open_video",
    "read_image",
]

READERS: dict[str, type[PyAVReader] | type[DecordReader]] = {
    "auto": PyAVReader,
    "pyav": PyAVReader,
    "decord": DecordReader,
}
PACKAGES = {PyAVReader: "av", DecordReader: "decord"}


def open_video(path: str | Path, reader: str = "auto", max_pixels: int = MAX_PIXELS) -> Reader:
    """Open a video file, a folder of frames, a single image or an array with the backend named `reader`.

    Frames of more than `max_pixels` pixels are refused from their header, before memory is taken for them.

    `auto` is PyAV: the one backend exact, in count and pixels, on every sample clip (docs/datasets.md).
    A folder or an image is read with PIL, an array with numpy, whatever the backend. Raises VideoError where
    there is no video.
    """
    if reader not in READERS:
        raise ValueError(f"reader '{reader}' is unknown: use one of {', '.join(READERS)}")
    path = Path(path)
    try:
        pictures = path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES
    except OSError as error:  # a stale network file, a folder above it that is closed to us
        raise VideoError(path, f"cannot be opened ({error.__class__.__name__})") from error
    if path.suffix.lower() == ARRAY_SUFFIX and not pictures:
        return ArrayReader(path, max_pixels)
    return FrameReader(path, max_pixels) if pictures else READERS[reader](path, max_pixels)


def every_frame(reader: Reader) -> Iterator[np.ndarray]:
    """All frames of an opened clip in order, each (H, W, C) uint8, whatever its length; VideoError where one fails."""
    if isinstance(reader, PyAVReader):
        yield from reader.frames()
    else:
        for index in range(len(reader)):
            yield reader.read([index])[0].permute(1, 2, 0).numpy()


def check_installed(reader: str) -> None:
    """ValueError if the package behind the backend named `reader` is not installed or cannot be loaded."""
    package = PACKAGES[READERS[reader]]
    if find_spec(package) is None:
        raise ValueError(
            f"data.reader={reader} needs the Python package {package!r}, which is not installed: "
            f"pip install {package}, or choose another reader"
        )
    load_package(package)
