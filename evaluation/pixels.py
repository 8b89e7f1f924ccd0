"""Preprocesses frames for a detector: cropping, resizing and lossy storage.

Functions of frames map uint8 (T, 3, H, W) to uint8 (T, 3, H, W), in memory.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MP4_FPS = 8  # of the official sampler's files
MP4_CRF = 5  # imageio's quality 9: int((1 - 9 / 10) * 51)
JPEG_QUALITY = 75  # Pillow's default: the official converter passes `q=95`, which Pillow ignores


def resize_then_center_crop(image: Image.Image, size: int) -> Image.Image:
    """Resizes the short side to `size`, then crops the centre (StyleGAN-V's converter)."""
    factor = size / min(image.size)
    width, height = (max(size, round(side * factor)) for side in image.size)
    return center_crop(image.resize((width, height), Image.Resampling.LANCZOS), size)


def center_crop_then_resize(image: Image.Image, size: int) -> Image.Image:
    """Crops the largest centred square, then resizes it to `size` (Latte's converter)."""
    return center_crop(image, min(image.size)).resize((size, size), Image.Resampling.LANCZOS)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Crops the centred square of side `size`."""
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


CROPS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "resize_then_center_crop": resize_then_center_crop,
    "center_crop_then_resize": center_crop_then_resize,
}


def fit(frames: Tensor, crop: str, size: int | None) -> Tensor:
    """Crops and resizes frames to `size` x `size` with Pillow's Lanczos filter, unless they have that size."""
    if size is None or frames.shape[-2:] == (size, size):
        return frames
    return _each(frames, lambda image: np.asarray(CROPS[crop](image, size)))


def through_jpeg(frames: Tensor) -> Tensor:
    """Encodes and decodes each frame as JPEG, as the official converter stores it."""

    def round_trip(image: Image.Image) -> np.ndarray:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=JPEG_QUALITY)
        return np.asarray(Image.open(file))

    return _each(frames, round_trip)


def through_mp4(frames: Tensor) -> Tensor:
    """Encodes and decodes the clip as the official sampler's mp4: H.264, yuv420p.

    Raises: ValueError for sizes that imageio, the official writer, would resize.
    """
    import av

    height, width = frames.shape[-2:]
    if height % 16 or width % 16:
        raise ValueError(f"frames of {width}x{height} cannot be stored as the official mp4: give a multiple of 16")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=MP4_FPS)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.thread_count = 1  # the same bytes on every machine
        stream.options = {"crf": str(MP4_CRF)}
        for image in frames.permute(0, 2, 3, 1).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file, "r", format="mp4") as container:
        images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


STORAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "as read": lambda frames: frames,
    "jpeg75": through_jpeg,
    "mp4 quality 9, jpeg75": lambda frames: through_jpeg(through_mp4(frames)),
}


def _each(frames: Tensor, change: Callable[[Image.Image], np.ndarray]) -> Tensor:
    images = frames.permute(0, 2, 3, 1).contiguous().numpy()  # (T, H, W, 3)
    return torch.from_numpy(np.stack([change(Image.fromarray(image)) for image in images])).permute(0, 3, 1, 2)
