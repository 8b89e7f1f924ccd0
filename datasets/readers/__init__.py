"""Readers of video files, folders of frames and arrays: one interface (`base.Reader`), several backends.

Frame indices count in presentation order, whatever the timestamps, B-frames or rotation of the container.

Letters: T frames, C channels, H height, W width.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from .arrays import ArrayReader
from .base import (
    ARRAY_SUFFIX,
    HIDDEN,
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    VIDEO_SUFFIXES,
    Reader,
    VideoError,
    identify_file,
    load_package,
    name_file,
)
from .decord import DecordReader
from .images import FrameReader, list_frames
from .pyav import PyAVReader

__all__ = [
    "ARRAY_SUFFIX",
    "HIDDEN",
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "READERS",
    "VIDEO_SUFFIXES",
    "Reader",
    "VideoError",
    "check_installed",
    "identify_file",
    "list_frames",
    "load_package",
    "open_video",
]

READERS: dict[str, type[PyAVReader] | type[DecordReader]] = {
    "auto": PyAVReader,
    "pyav": PyAVReader,
    "decord": DecordReader,
}
PACKAGES = {PyAVReader: "av", DecordReader: "decord"}


def open_video(path: str | Path, reader: str = "auto", max_pixels: int = MAX_PIXELS) -> Reader:
    """Opens a video file, a folder of frames, a single image or an array.

    Folders and images are read with PIL, arrays with numpy.

    Args:
        reader: backend of video files. `auto` is PyAV, the only backend with the exact number of frames and exact
            pixels on every sample clip (docs/datasets.md).
        max_pixels: larger frames are refused by their header, before memory is allocated.

    Raises: VideoError where there is no video.
    """
    if reader not in READERS:
        raise ValueError(f"reader '{reader}' is unknown: use one of {', '.join(READERS)}")
    path = Path(path)
    with name_file(path):  # a stale network file, a parent folder without permission
        pictures = path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES
    if pictures:
        return FrameReader(path, max_pixels)
    backend = ArrayReader if path.suffix.lower() == ARRAY_SUFFIX else READERS[reader]
    return backend(path, max_pixels)


def check_installed(reader: str) -> None:
    """Raises ValueError if the package of the backend `reader` is not installed or cannot be loaded."""
    package = PACKAGES[READERS[reader]]
    if find_spec(package) is None:
        raise ValueError(
            f"data.reader={reader} needs the Python package {package!r}, which is not installed: "
            f"pip install {package}, or choose another reader"
        )
    load_package(package)
