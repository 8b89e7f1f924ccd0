"""A small class-conditional network with random weights, and attention by its definition, for several tests."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

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


def brute_force(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Attention among frames in float64, `(B, F, N, D)`, by its definition."""
    q, k, v = (each.double().unflatten(-1, (num_heads, -1)) for each in (q, k, v))
    scores = torch.einsum("bfnhd,bgnhd->bnhfg", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bnhfg,bgnhd->bfnhd", scores.softmax(dim=-1), v).flatten(-2)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """|value - expected| / |expected|, in float64; no NaN passes a bound."""
    return float((value.detach().double() - expected.detach()).norm() / expected.detach().norm().clamp(min=1e-30))
