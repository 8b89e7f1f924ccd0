"""Arrays (.npy) as clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .base import MAX_PIXELS, Reader, VideoError, check_size, name_file


class ArrayReader(Reader):
    """Reader of a `.npy` file with one uint8 array (T, H, W, 3), the lossless form of samples; no frame rate.

    The file is memory-mapped, so only the requested frames are read; objects in it are never unpickled.
    """

    def __init__(self, path: str | Path, max_pixels: int = MAX_PIXELS) -> None:
        super().__init__(path)
        try:
            with name_file(path):
                self.array: np.memmap = np.lib.format.open_memmap(path, mode="r")
                size = Path(path).stat().st_size
        except VideoError:
            raise
        except (ValueError, EOFError, MemoryError, RecursionError, OverflowError) as error:
            raise VideoError(path, "is cut off, or not a readable .npy array of numbers") from error
        shape = self.array.shape
        if self.array.dtype != np.uint8:
            raise VideoError(path, f"holds values of type {self.array.dtype}; a clip is uint8, 0 to 255")
        if len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
            raise VideoError(path, f"holds an array of shape {shape}; a clip is (frames, height, width, 3)")
        check_size(path, shape[2], shape[1], max_pixels)
        expected = self.array.offset + self.array.nbytes
        if size != expected:
            raise VideoError(path, f"is too long: {size} bytes instead of {expected}")

    def __len__(self) -> int:
        return len(self.array)

    def read_images(self, indices: list[int]) -> dict[int, np.ndarray]:
        return {index: np.asarray(self.array[index]) for index in indices}
