"""The interface of readers, and the checks that they share."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import VideoError

_VIDEOS = ".3gp .asf .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv"
_IMAGES = ".bmp .jpeg .jpg .png .ppm .tif .tiff .webp"
VIDEO_SUFFIXES = frozenset(_VIDEOS.split())
IMAGE_SUFFIXES = frozenset(_IMAGES.split())
ARRAY_SUFFIX = ".npy"
HIDDEN = (".", "__MACOSX")  # names that begin so are left out


# Larger frames are refused before they are decoded: 8192x4320 is the largest that cameras have a standard for.
MAX_PIXELS = 8192 * 4320


class Reader(Protocol):
    """What every backend offers.

    `fps` is 0.0 where it is unknown. `damage` is None or says, in words, that frames inside the clip are
    missing or doubtful (it may be set by `read`); `cut_off` is None or says that the end of the file is
    missing. In both cases `len()` counts only frames that are there.
    """

    fps: float
    damage: str | None
    cut_off: str | None

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Tensor:
        """Frames in the order asked, repeats allowed, as uint8 (T, C, H, W) RGB. VideoError, IndexError."""
        ...


def check_indices(indices: Sequence[int], length: int) -> list[int]:
    wanted = [int(index) for index in indices]
    if not wanted:
        raise IndexError("read() needs at least one frame index")
    if min(wanted) < 0 or max(wanted) >= length:
        raise IndexError(f"frame indices {min(wanted)} to {max(wanted)} do not fit a clip of {length} frames")
    return wanted


def stack_frames(path: str | Path, frames: Sequence[np.ndarray]) -> Tensor:
    """Arrays (H, W, C) -> uint8 (T, C, H, W)."""
    shapes = sorted({frame.shape for frame in frames})
    if len(shapes) > 1:
        sizes = ", ".join(f"{shape[1]}x{shape[0]}" for shape in shapes)
        raise VideoError(path, f"its frames differ in size ({sizes})")
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()  # (T, C, H, W)


def too_large(width: int, height: int, max_pixels: int) -> str:
    return f"its frames of {width}x{height} are larger than data.max_pixels={max_pixels} allows"


def file_identity(path: str | Path) -> tuple[int, int]:
    """Size and time of change: a replaced file is another file."""
    try:
        stat = Path(path).stat()
    except OSError as error:
        raise VideoError(path, f"cannot be opened ({error.__class__.__name__})") from error
    return stat.st_size, stat.st_mtime_ns


def load_package(name: str) -> Any:
    """Import a package; ValueError, a sentence, where it is there and cannot be loaded."""
    try:
        return import_module(name)
    except ImportError as error:
        if error.name == name and isinstance(error, ModuleNotFoundError):  # not installed, which engine.cli explains
            raise
        raise ValueError(
            f"the Python package {name!r} cannot be loaded ({error}): install it anew, "
            f"pip install --force-reinstall {name}."
        ) from error
