"""Folders of images, and single images, as clips."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .base import HIDDEN, IMAGE_SUFFIXES, MAX_PIXELS, Reader, VideoError, check_size, name_file


class FrameReader(Reader):
    """Reader of a folder of images, in numerical order, or of one image as a clip of one frame; no frame rate."""

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
    """Returns an image as (H, W, C) uint8 RGB, upright (EXIF). Raises: VideoError where PIL cannot read it."""
    try:
        with Path(path).open("rb") as file, Image.open(file) as image:  # reads the header only
            check_size(path, image.width, image.height, max_pixels)
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except VideoError:
        raise
    except Exception as error:  # damaged images raise any kind of error in PIL
        raise VideoError(path, f"is not a readable image ({error.__class__.__name__})") from error


def list_frames(folder: Path) -> list[Path]:
    """Returns the visible images directly in `folder`, by the numbers in their names (frame_9 < frame_10)."""
    names = [entry.name for entry in folder.iterdir() if not entry.name.startswith(HIDDEN)]
    images = [name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    return [folder / name for name in sorted(images, key=lambda name: (list(map(int, re.findall(r"\d+", name))), name))]
