"""Embeddings: patches and tubelets, timesteps, labels, positions.

Letters: B batch, F frames, I images, C channels, H W height and width, N tokens per frame, D width;
p is the patch size, s the number of frames in a tubelet.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

MAX_PERIOD = 10_000
Rotation = tuple[Tensor, Tensor]  # cosines and sines, each (F, head width / 2)


class UniformPatchEmbed(nn.Module):
    """Embeds p x p patches of single frames (paper section 3.3.1, "uniform frame patch embedding")."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor, num_images: int) -> Tensor:
        """`(B, F+I, C, H, W)` -> `(B, F+I, N, D)`; images are treated as frames."""
        batch = x.shape[0]
        x = self.proj(x.flatten(0, 1))  # (B*(F+I), D, H/p, W/p)
        # contiguous: otherwise residual sums keep the convolution's memory order, and each norm copies its input
        x = rearrange(x, "(batch frames) dim rows columns -> batch frames (rows columns) dim", batch=batch)
        return x.contiguous()


class TubeletPatchEmbed(nn.Module):
    """Embeds s x p x p tubelets of s frames (section 3.3.1, "compression frame patch embedding")."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int, tubelet_size: int) -> None:
        super().__init__()
        self.tubelet_size = tubelet_size
        kernel = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(in_channels, hidden_size, kernel, stride=kernel)

    def forward(self, x: Tensor, num_images: int) -> Tensor:
        """`(B, F+I, C, H, W)` -> `(B, F/s+I, N, D)`; an image is repeated s times."""
        num_frames = x.shape[1] - num_images
        if num_images:
            images = x[:, num_frames:].repeat_interleave(self.tubelet_size, dim=1)
            x = torch.cat([x[:, :num_frames], images], dim=1)  # (B, F+I*s, C, H, W)
        x = self.proj(x.transpose(1, 2))  # (B, D, F/s+I, H/p, W/p)
        return rearrange(x, "batch dim frames rows columns -> batch frames (rows columns) dim").contiguous()


class FrameUpsampler(nn.Module):
    """Transposed convolution in time after the linear decoder: turns tubelets back into frames, initially copies."""

    def __init__(self, channels: int, tubelet_size: int) -> None:
        super().__init__()
        self.tubelet_size = tubelet_size
        kernel = (tubelet_size, 1, 1)
        self.proj = nn.ConvTranspose3d(channels, channels, kernel, stride=kernel)

    def reset_parameters(self) -> None:
        """Initialises every frame as a copy of its tubelet."""
        with torch.no_grad():
            self.proj.weight.zero_()
            self.proj.weight.diagonal(dim1=0, dim2=1).fill_(1.0)
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, num_images: int) -> Tensor:
        """`(B, F/s+I, C, H, W)` -> `(B, F+I, C, H, W)`; an image is the mean over its s frames."""
        x = self.proj(x.transpose(1, 2)).transpose(1, 2)  # (B, F+I*s, C, H, W)
        if not num_images:
            return x
        num_frames = x.shape[1] - num_images * self.tubelet_size
        pattern = "batch (images tubelet) channels height width -> batch images channels height width"
        images = reduce(x[:, num_frames:], pattern, "mean", tubelet=self.tubelet_size)
        return torch.cat([x[:, :num_frames], images], dim=1)


def unpatchify(x: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """`(B, F, N, p*p*C)` of `grid` rows and columns -> `(B, F, C, H, W)`."""
    pattern = "batch frames (rows columns) (p q channels) -> batch frames channels (rows p) (columns q)"
    return rearrange(x, pattern, rows=grid[0], p=patch_size, q=patch_size)


class TimestepEmbedder(nn.Module):
    """Embeds timesteps with 256 sinusoids and an MLP."""

    num_features = 256

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        first, second = nn.Linear(self.num_features, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, timesteps: Tensor) -> Tensor:
        """`(B, ...)`, integer or fractional -> `(B, ..., D)`."""
        dtype = self.mlp[0].get_parameter("weight").dtype
        features = timestep_features(timesteps, self.num_features, torch.promote_types(dtype, torch.float32))
        return self.mlp(features.to(dtype))


class LabelEmbedder(nn.Module):
    """Label table with one row per class and, for classifier-free guidance, a last row for "no label"."""

    def __init__(self, num_classes: int, hidden_size: int, *, null_row: bool) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + int(null_row), hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        """`(B, ...)` long -> `(B, ..., D)`."""
        return self.embedding_table(labels)


def timestep_features(timesteps: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """`(B, ...)` -> `(B, ..., count)`: cosines, then sines, with periods from 2 pi to 2 pi x 10000."""
    half = count // 2
    steps = torch.arange(half, dtype=dtype, device=timesteps.device)
    angles = timesteps[..., None].to(dtype) * torch.exp(-math.log(MAX_PERIOD) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def axis_positions(count: int, trained: int, *, stretch: bool, device: torch.device | None = None) -> Tensor:
    """Returns `(count,)` positions in float64: 0, 1, 2, ..., or with `stretch` spaced evenly in [0, trained)."""
    spacing = trained / count if stretch else 1.0
    return torch.arange(count, dtype=torch.float64, device=device) * spacing


def sincos_table(positions: Tensor, dim: int) -> Tensor:
    """`(L,)` -> `(L, dim)`: sines, then cosines; `dim` is even."""
    angles = _angles(positions, dim)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def sincos_grid(rows: Tensor, columns: Tensor, dim: int) -> Tensor:
    """`(H,)` and `(W,)` -> `(H*W, dim)`, row by row: half of `dim` for the column, half for the row (as in MAE)."""
    across = sincos_table(columns, dim // 2)[None].expand(len(rows), -1, -1)
    down = sincos_table(rows, dim // 2)[:, None].expand(-1, len(columns), -1)
    return torch.cat([across, down], dim=-1).flatten(0, 1)


def rotary_table(positions: Tensor, head_dim: int, dtype: torch.dtype) -> Rotation:
    """Returns cosines and sines `(F, head_dim / 2)` that rotate queries and keys by their position (RoFormer)."""
    angles = _angles(positions, head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotates each pair (i, i + width/2) of `(..., F, width)` by the angle of its frame."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _angles(positions: Tensor, dim: int) -> Tensor:
    half = dim // 2
    steps = torch.arange(half, dtype=positions.dtype, device=positions.device)
    return positions[:, None] * MAX_PERIOD ** (-steps / half)
