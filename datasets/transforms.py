"""Pixel transforms of a clip; all frames are transformed alike.

Letters: T frames, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Transform = Callable[[Tensor, int], Tensor]


def to_unit_range(clip: Tensor) -> Tensor:
    """Converts uint8 0..255 to float32 in [0, 1]."""
    return clip.float() / 255


def to_signed_range(clip: Tensor) -> Tensor:
    """Maps [0, 1] to [-1, 1]."""
    return clip * 2 - 1


def horizontal_flip(clip: Tensor) -> Tensor:
    """Mirrors all frames (T, C, H, W) left to right."""
    return clip.flip(-1)


def resize_then_center_crop(clip: Tensor, size: int) -> Tensor:
    """Resizes the short side, then crops the centre: uint8 (T, C, H, W) -> float (T, C, size, size) in [0, 1]."""
    return center_crop(_resize_short_side(to_unit_range(clip), size), size)


def center_crop_then_resize(clip: Tensor, size: int) -> Tensor:
    """Crops the largest centred square, then resizes it: uint8 (T, C, H, W) -> float (T, C, size, size) in [0, 1]."""
    square = center_crop(to_unit_range(clip), min(clip.shape[-2:]))
    return F.interpolate(square, size=(size, size), mode="bilinear", align_corners=False)


def center_crop(clip: Tensor, size: int) -> Tensor:
    """Crops a centred square of side `size`. Half-pixel offsets round to even, as in the official code."""
    height, width = clip.shape[-2:]
    top, left = round((height - size) / 2), round((width - size) / 2)
    return clip[..., top : top + size, left : left + size]  # (T, C, size, size)


def _resize_short_side(clip: Tensor, size: int) -> Tensor:
    """Resizes bilinearly by exactly size / short side, not antialiased; rounds the long side down."""
    short = min(clip.shape[-2:])
    if short == size:  # interpolation changes nothing, yet takes longer than decoding
        return clip
    factor = size / short
    if math.floor(short * factor) < size:  # rounding made the product slightly too small
        factor = math.nextafter(factor, math.inf)
    return F.interpolate(clip, scale_factor=(factor, factor), mode="bilinear", align_corners=False)


TRANSFORMS: dict[str, Transform] = {
    "resize_then_center_crop": resize_then_center_crop,
    "center_crop_then_resize": center_crop_then_resize,
}
