"""The reader interface, and checks that readers share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_VIDEOS = ".3gp .asf .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv"
_IMAGES = ".bmp .jpeg .jpg .png .ppm .tif .tiff .webp"
VIDEO_SUFFIXES = frozenset(_VIDEOS.split())
IMAGE_SUFFIXES = frozenset(_IMAGES.split())
ARRAY_SUFFIX = ".npy"
HIDDEN = (".", "__MACOSX")  # prefixes of file names to leave out

# Larger frames are refused before decoding; 8192x4320 is the largest standard camera format.
MAX_PIXELS = 8192 * 4320


class VideoError(ValueError):
    """A clip cannot be read: its path and the reason. Can be pickled."""

    ends_run = False  # True if no other clip may replace this one

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(str(path), reason)
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Reader:
    """The interface of all backends; each implements `__len__` and `read_images`.

    `fps` is 0.0 if unknown. `damage` says that frames inside the clip are missing or may be wrong (`read` may set it),
    `cut_off` that the file's end is missing; None if not. `len()` counts only frames that exist.
    """

    fps = 0.0
    damage: str | None = None
    cut_off: str | None = None

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)

    def __len__(self) -> int:
        raise NotImplementedError

    def read_images(self, indices: list[int]) -> dict[int, np.ndarray]:
        """Returns frames at ascending, distinct `indices` as index -> uint8 (H, W, 3), upright. Raises: VideoError."""
        raise NotImplementedError

    def read(self, indices: Sequence[int]) -> Tensor:
        """Returns frames at `indices`, in any order, as uint8 (T, C, H, W) RGB. Raises: VideoError, IndexError."""
        wanted = [int(index) for index in indices]
        if not wanted:
            raise IndexError("read() needs at least one frame index")
        if min(wanted) < 0 or max(wanted) >= len(self):
            raise IndexError(f"frame indices {min(wanted)} to {max(wanted)} do not fit a clip of {len(self)} frames")
        images = self.read_images(sorted(set(wanted)))
        shapes = sorted({image.shape for image in images.values()})
        if len(shapes) > 1:
            sizes = ", ".join(f"{shape[1]}x{shape[0]}" for shape in shapes)
            raise VideoError(self.path, f"its frames differ in size ({sizes})")
        frames = torch.from_numpy(np.stack([images[index] for index in wanted]))
        return frames.permute(0, 3, 1, 2).contiguous()  # (T, C, H, W)

    def read_each(self, indices: list[int]) -> dict[int, np.ndarray | VideoError]:
        """Returns index -> (H, W, 3) uint8, or why that frame cannot be used even if it is read alone."""
        try:
            return dict(self.read_images(indices))
        except VideoError as error:
            if len(indices) == 1:
                return {indices[0]: error}
        return {index: self.read_each([index])[index] for index in indices}

    def frames(self) -> Iterator[np.ndarray]:
        """Yields all frames in order, each (H, W, 3) uint8. Raises: VideoError if one fails."""
        for index in range(len(self)):
            yield self.read_images([index])[index]


@contextmanager
def name_file(path: str | Path, problem: str = "cannot be opened") -> Iterator[None]:
    """Turns an OSError into a VideoError that names the file, the problem and the error."""
    try:
        yield
    except OSError as error:
        raise VideoError(path, f"{problem} ({error.__class__.__name__})") from error


def check_size(path: str | Path, width: int, height: int, max_pixels: int) -> None:
    """Raises VideoError for frames above the limit."""
    if width * height > max_pixels:
        raise VideoError(path, f"its frames of {width}x{height} are larger than data.max_pixels={max_pixels} allows")


def identify_file(path: str | Path) -> tuple[int, int]:
    """Returns a file's size and modification time, which identify its version."""
    with name_file(path):
        stat = Path(path).stat()
    return stat.st_size, stat.st_mtime_ns


def load_package(name: str) -> Any:
    """Imports a package. Raises: ValueError if it is installed but cannot be loaded."""
    try:
        return import_module(name)
    except ImportError as error:
        if error.name == name and isinstance(error, ModuleNotFoundError):  # not installed: engine.cli explains it
            raise
        raise ValueError(
            f"the Python package {name!r} cannot be loaded ({error}): reinstall it with "
            f"pip install --force-reinstall {name}."
        ) from error
