"""Readers of video files, folders of frames and arrays: one interface (`base.Reader`), several backends.

Frame indices count in presentation order, regardless of the container's timestamps, B-frames or rotation.

Letters: T frames, C channels, H height, W width.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from common.checks import require

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
from .images import ArrayReader, FrameReader, list_frames
from .pyav import PyAVReader

# data.reader -> backend of video files, its package. `auto` is PyAV, the only backend with the exact number of frames
# and exact pixels on every sample clip (docs/datasets.md).
READERS = {"auto": (PyAVReader, "av"), "pyav": (PyAVReader, "av"), "decord": (DecordReader, "decord")}


def open_video(path: str | Path, reader: str = "auto", max_pixels: int = MAX_PIXELS) -> Reader:
    """Opens a video file (with backend `reader`), a folder of frames, a single image or an array.

    Frames above `max_pixels` are refused from the header alone. Raises: VideoError if there is no video.
    """
    require(reader in READERS, f"reader '{reader}' is unknown: use one of {', '.join(READERS)}")
    path = Path(path)
    with name_file(path):  # e.g. a stale network file, or a parent folder without permission
        pictures = path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES
    if pictures:
        return FrameReader(path, max_pixels)
    if path.suffix.lower() == ARRAY_SUFFIX:
        return ArrayReader(path, max_pixels)
    return READERS[reader][0](path, max_pixels)


def check_installed(reader: str) -> None:
    """Raises ValueError if the package of the backend `reader` is not installed or cannot be loaded."""
    package = READERS[reader][1]
    require(
        find_spec(package) is not None,
        f"data.reader={reader} needs the Python package {package!r}, which is not installed: pip install {package}, "
        "or choose another reader",
    )
    load_package(package)
