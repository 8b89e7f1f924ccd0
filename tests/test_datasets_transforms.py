"""Transforms against the official code's outputs, and their edges."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from datasets.transforms import (
    TRANSFORMS,
    center_crop,
    center_crop_then_resize,
    horizontal_flip,
    resize_then_center_crop,
    to_signed_range,
    to_unit_range,
)

GOLDENS = load_file(Path(__file__).parent / "goldens" / "transforms.safetensors")
SIZES = sorted({key.split("/")[0] for key in GOLDENS})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_golden(size: str, name: str) -> None:
    expected = GOLDENS[f"{size}/{name}_64"]
    assert torch.allclose(TRANSFORMS[name](GOLDENS[f"{size}/clip"], 64), expected, rtol=0, atol=1e-5)


def test_every_short_side_gives_the_asked_size() -> None:
    """size / side * side may fall below size in floating point: 49 * (1 / 49) is 0.9999999999999999."""
    for side in range(1, 700, 3):
        clip = torch.zeros(1, 3, side, side + 5, dtype=torch.uint8)
        for size in (1, 7, 56):
            assert resize_then_center_crop(clip, size).shape == (1, 3, size, size)
    assert resize_then_center_crop(torch.zeros(1, 3, 49, 60, dtype=torch.uint8), 1).shape == (1, 3, 1, 1)


def test_same_size_changes_nothing() -> None:
    clip = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    for transform in (resize_then_center_crop, center_crop_then_resize):
        assert torch.equal(transform(clip, 16), clip.float() / 255)


def test_ranges() -> None:
    clip = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert torch.allclose(to_unit_range(clip), torch.tensor([0.0, 0.2, 1.0]))
    assert torch.allclose(to_signed_range(to_unit_range(clip)), torch.tensor([-1.0, -0.6, 1.0]))


def test_flip_and_crop_move_whole_columns() -> None:
    clip = torch.arange(6).expand(1, 1, 4, 6)
    assert horizontal_flip(clip)[0, 0, 0].tolist() == [5, 4, 3, 2, 1, 0]
    assert center_crop(clip, 4)[0, 0, 0].tolist() == [1, 2, 3, 4]
