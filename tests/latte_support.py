"""A small class-conditional network with random weights, for several tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from models import Latte, LatteConfig

TINY = LatteConfig(name="custom", hidden_size=16, depth=4, num_heads=4, patch_size=2, num_classes=3)


def tiny_latte(
    size: int | tuple[int, int] = (4, 6), seed: int = 0, frames: int = 4, channels: int = 2, **changes: Any
) -> Latte:
    """Every weight drawn anew, so that none is zero; for latents (B, frames, channels, *size)."""
    torch.manual_seed(seed)
    model = Latte(replace(TINY, **changes), in_channels=channels, latent_size=size, num_frames=frames)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()
