"""Arrays (.npy) as clips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from torch import Tensor

from ..errors import VideoError
from .base import MAX_PIXELS, check_indices, describe_too_large, stack_frames


class ArrayReader:
    """Reader of a `.npy` file with one uint8 array (T, H, W, 3), the lossless form of samples; no frame rate.

    The file is memory-mapped, so only the requested frames are read.
    """

    def __init__(self, path: str | Path, max_pixels: int = MAX_PIXELS) -> None:
        self.path = str(path)
        self.fps = 0.0
        self.damage: str | None = None
        self.cut_off: str | None = None
        try:
            with Path(path).open("rb") as file:
                shape, order, offset = _read_header(self.path, file)
                _check_array(self.path, shape, file.seek(0, 2) - offset, max_pixels)
            self.array: np.ndarray = np.memmap(path, np.uint8, "r", offset, shape, order)
        except OSError as error:
            raise VideoError(path, f"cannot be opened ({error.__class__.__name__})") from error

    def __len__(self) -> int:
        return len(self.array)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Returns these frames in order, uint8 (T, C, H, W) RGB."""
        wanted = check_indices(indices, len(self))
        return stack_frames(self.path, [np.asarray(self.array[index]) for index in wanted])


def _read_header(path: str, file: BinaryIO) -> tuple[tuple[int, ...], Literal["C", "F"], int]:
    """Returns (shape, memory order, offset of the values) of a .npy file of bytes; never unpickles anything."""
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"version {version}")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except (ValueError, EOFError, MemoryError, RecursionError) as error:
        raise VideoError(path, "is not a readable .npy array") from error
    if dtype != np.uint8:
        raise VideoError(path, f"holds values of type {dtype}; a clip is uint8, 0 to 255")
    return shape, "F" if fortran else "C", file.tell()


def _check_array(path: str, shape: tuple[int, ...], size: int, max_pixels: int) -> None:
    """Raises VideoError unless the shape is that of a clip and all values are present."""
    if len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
        raise VideoError(path, f"holds an array of shape {shape}; a clip is (frames, height, width, 3)")
    if shape[1] * shape[2] > max_pixels:
        raise VideoError(path, describe_too_large(shape[2], shape[1], max_pixels))
    if size != math.prod(shape):
        raise VideoError(path, f"is cut off or too long: {size} of {math.prod(shape)} bytes are there")
