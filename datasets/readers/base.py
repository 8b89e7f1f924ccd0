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
HIDDEN = (".", "__MACOSX")  # files whose names start like this are left out

# Larger frames are refused before decoding; 8192x4320 is the largest standard camera format.
MAX_PIXELS = 8192 * 4320


class Reader(Protocol):
    """The interface of all backends.

    `fps` is 0.0 where it is unknown. `damage` is None, or a sentence if frames inside the clip are missing or may be
    wrong (`read` may set it). `cut_off` is None, or a sentence if the end of the file is missing. In both cases
    `len()` counts only frames that exist.
    """

    fps: float
    damage: str | None
    cut_off: str | None

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Tensor:
        """Returns these frames in order, repeats allowed, as uint8 (T, C, H, W) RGB. Raises: VideoError, IndexError."""
        ...


def check_indices(indices: Sequence[int], length: int) -> list[int]:
    """Returns the indices as integers. Raises: IndexError where there are none or one does not fit the clip."""
    wanted = [int(index) for index in indices]
    if not wanted:
        raise IndexError("read() needs at least one frame index")
    if min(wanted) < 0 or max(wanted) >= length:
        raise IndexError(f"frame indices {min(wanted)} to {max(wanted)} do not fit a clip of {length} frames")
    return wanted


def stack_frames(path: str | Path, frames: Sequence[np.ndarray]) -> Tensor:
    """Stacks arrays (H, W, C) to uint8 (T, C, H, W). Raises: VideoError if their sizes differ."""
    shapes = sorted({frame.shape for frame in frames})
    if len(shapes) > 1:
        sizes = ", ".join(f"{shape[1]}x{shape[0]}" for shape in shapes)
        raise VideoError(path, f"its frames differ in size ({sizes})")
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()  # (T, C, H, W)


def describe_too_large(width: int, height: int, max_pixels: int) -> str:
    """Returns the error text for frames above the limit."""
    return f"its frames of {width}x{height} are larger than data.max_pixels={max_pixels} allows"


def identify_file(path: str | Path) -> tuple[int, int]:
    """Returns size and modification time, which identify a version of a file."""
    try:
        stat = Path(path).stat()
    except OSError as error:
        raise VideoError(path, f"cannot be opened ({error.__class__.__name__})") from error
    return stat.st_size, stat.st_mtime_ns


def load_package(name: str) -> Any:
    """Imports a package. Raises: ValueError where it is installed but cannot be loaded."""
    try:
        return import_module(name)
    except ImportError as error:
        if error.name == name and isinstance(error, ModuleNotFoundError):  # not installed: engine.cli explains it
            raise
        raise ValueError(
            f"the Python package {name!r} cannot be loaded ({error}): reinstall it with "
            f"pip install --force-reinstall {name}."
        ) from error
