"""Folders of images, single images, and arrays (.npy) as clips."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .base import HIDDEN, IMAGE_SUFFIXES, MAX_PIXELS, Reader, VideoError, check_size, name_file


class FrameReader(Reader):
    """Reads a folder of images, in numerical order, or one image as a one-frame clip; no frame rate."""

    def __init__(self, path: str | Path, max_pixels: int = MAX_PIXELS) -> None:
        super().__init__(path)
        self.max_pixels = max_pixels
        with name_file(path):
            self.files = list_frames(Path(path)) if Path(path).is_dir() else [Path(path)]
        if not self.files:
            raise VideoError(path, "the folder holds no images")

    def __len__(self) -> int:
        return len(self.files)

    def read_images(self, indices: list[int]) -> dict[int, np.ndarray]:
        return {index: read_image(self.files[index], self.max_pixels) for index in indices}


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Returns an image as (H, W, C) uint8 RGB, upright (EXIF). Raises: VideoError if PIL cannot read it."""
    try:
        with Path(path).open("rb") as file, Image.open(file) as image:  # reads the header only
            check_size(path, image.width, image.height, max_pixels)
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except VideoError:
        raise
    except Exception as error:  # damaged images raise any kind of error in PIL
        raise VideoError(path, f"is not a readable image ({error.__class__.__name__})") from error


def list_frames(folder: Path) -> list[Path]:
    """Returns the visible images directly in `folder`, sorted by the numbers in their names (frame_9 < frame_10)."""
    names = [entry.name for entry in folder.iterdir() if not entry.name.startswith(HIDDEN)]
    images = [name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    return [folder / name for name in sorted(images, key=lambda name: (list(map(int, re.findall(r"\d+", name))), name))]


class ArrayReader(Reader):
    """Reads a `.npy` file with one uint8 array (T, H, W, 3), memory-mapped; never unpickles objects."""

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
