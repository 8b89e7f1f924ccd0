"""Folders of images, and single images, as clips."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import VideoError
from .base import HIDDEN, IMAGE_SUFFIXES, MAX_PIXELS, check_indices, describe_too_large, stack_frames


class FrameReader:
    """Reader of a folder of images, in numerical order, or of one image as a clip of one frame; no frame rate."""

    def __init__(self, path: str | Path, max_pixels: int = MAX_PIXELS) -> None:
        self.path = str(path)
        self.max_pixels = max_pixels
        self.fps = 0.0
        self.damage: str | None = None
        self.cut_off: str | None = None
        try:
            self.frames = list_frames(Path(path)) if Path(path).is_dir() else [Path(path)]
        except OSError as error:
            raise VideoError(path, f"cannot be opened ({error.__class__.__name__})") from error
        if not self.frames:
            raise VideoError(path, "the folder holds no images")

    def __len__(self) -> int:
        return len(self.frames)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Returns these frames in order, uint8 (T, C, H, W) RGB."""
        wanted = check_indices(indices, len(self))
        images = {index: read_image(self.frames[index], self.max_pixels) for index in sorted(set(wanted))}
        return stack_frames(self.path, [images[index] for index in wanted])


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Returns an image as (H, W, C) uint8 RGB, upright (EXIF). Raises: VideoError where PIL cannot read it."""
    try:
        with Path(path).open("rb") as file, Image.open(file) as image:  # reads the header only
            if image.width * image.height > max_pixels:
                raise VideoError(path, describe_too_large(image.width, image.height, max_pixels))
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except VideoError:
        raise
    except Exception as error:  # damaged images raise any kind of error in PIL
        raise VideoError(path, f"is not a readable image ({error.__class__.__name__})") from error


def sort_key(name: str) -> tuple[list[int], str]:
    """Returns the sorting key of a frame's file name: its numbers (frame_9 < frame_10), then the name."""
    return [int(digits) for digits in re.findall(r"\d+", name)], name


def list_frames(folder: Path) -> list[Path]:
    """Returns the images directly in `folder`, in numerical order, without hidden files."""
    names = (entry.name for entry in folder.iterdir())
    names = (n for n in names if Path(n).suffix.lower() in IMAGE_SUFFIXES and not n.startswith(HIDDEN))
    return [folder / name for name in sorted(names, key=sort_key)]
