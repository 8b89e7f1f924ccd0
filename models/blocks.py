"""The parts of a Latte layer: attention over space or time, the block, the final layer, the layer plans.

Letters: B batch, F frames (tubelets count as frames here), I images, N tokens per frame, D width. Tokens are
`(B, F+I, N, D)` everywhere; only attention views them differently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from .attention import attend
from .embeddings import Rotation

Axis = Literal["spatial", "temporal"]
Layer = tuple[tuple[Axis, ...], ...]

# A layer is a row of residual branches, followed by the MLP; the attentions of one branch are added.
SPATIAL: Layer = (("spatial",),)
TEMPORAL: Layer = (("temporal",),)
SPATIAL_THEN_TEMPORAL: Layer = (("spatial",), ("temporal",))
SPATIAL_AND_TEMPORAL: Layer = (("spatial", "temporal"),)

# Paper section 3.2, variants 1 to 4: how many of `depth` layers attend over what, in which order.
LAYER_PLANS: dict[str, Callable[[int], list[Layer]]] = {
    "interleaved": lambda depth: [SPATIAL, TEMPORAL] * (depth // 2),
    "late_fusion": lambda depth: [SPATIAL] * (depth // 2) + [TEMPORAL] * (depth // 2),
    "sequential": lambda depth: [SPATIAL_THEN_TEMPORAL] * depth,
    "parallel": lambda depth: [SPATIAL_AND_TEMPORAL] * depth,
}


class Attention(nn.Module):
    """Multi-head self-attention along one axis of the tokens; a subclass says which."""

    axis: ClassVar[Axis]

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, hidden_size * 3)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def attend(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """`(B, F, N, D)` -> the same."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(attend(q, k, v, self.axis, self.num_heads, rotation=rotation))


class SpatialAttention(Attention):
    """Among the N tokens of each frame."""

    axis = "spatial"

    def forward(self, x: Tensor, num_frames: int, rotation: Rotation | None = None) -> Tensor:
        """`(B, F+I, N, D)` -> `(B, F+I, N, D)`; images are frames like any other."""
        return self.attend(x)


class TemporalAttention(Attention):
    """Among the F frames of the clip, for each token position."""

    axis = "temporal"

    def forward(self, x: Tensor, num_frames: int, rotation: Rotation | None = None) -> Tensor:
        """`(B, F+I, N, D)` -> `(B, F+I, N, D)`; the images have no time: they get zero."""
        num_images = x.shape[1] - num_frames
        out = self.attend(x[:, :num_frames], rotation)  # (B, F, N, D)
        return functional.pad(out, (0, 0, 0, 0, 0, num_images)) if num_images else out


MIXERS: dict[Axis, type[Attention]] = {"spatial": SpatialAttention, "temporal": TemporalAttention}


class Mlp(nn.Module):
    """Two linear maps with GELU (by tanh) between them, under timm's names."""

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_size)
        self.fc2 = nn.Linear(hidden_size, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D)` -> the same."""
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class Modulation(NamedTuple):
    """What the condition does to one residual branch; each broadcasts over tokens `(B, F+I, N, D)`."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale normalised tokens."""
    return x * (1 + scale) + shift


def per_frame(rows: Tensor, num_frames: int, total: int) -> Tensor:
    """`(B, 1, 1+I or F+I, 1, D)` -> `(B, 1 or F+I, 1, D)`: the clip's row for its F frames, then one per image.

    A single row is left to broadcast, and one for each of the `total` F+I frames is there already.
    """
    if rows.shape[1] in (1, total):
        return rows
    return torch.cat([rows[:, :1].expand(-1, num_frames, -1, -1), rows[:, 1:]], dim=1)


def conditioner(hidden_size: int, num_outputs: int) -> nn.Sequential:
    """The adaLN head: condition `(..., D)` -> `num_outputs` vectors of width D, side by side."""
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, num_outputs * hidden_size))


class Block(nn.Module):
    """One layer: the residual branches of its plan, then an MLP.

    With `adaln` each branch is shifted, scaled and gated by the condition (DiT's adaLN-zero), and the
    attention branches of a layer share one modulation. Without, it is a plain pre-norm transformer block,
    for conditions that are given as tokens (paper section 3.3.2).
    """

    def __init__(self, layer: Layer, hidden_size: int, num_heads: int, mlp_ratio: float, *, adaln: bool) -> None:
        super().__init__()
        names = iter(("attn", "temporal_attn"))
        self.branches = [[(next(names), axis) for axis in branch] for branch in layer]
        self.temporal_only = layer == TEMPORAL
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=not adaln)
        for branch in self.branches:
            for name, axis in branch:
                self.add_module(name, MIXERS[axis](hidden_size, num_heads // len(branch)))
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=not adaln)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = conditioner(hidden_size, 6) if adaln else None

    def forward(self, x: Tensor, condition: Tensor | None, num_frames: int, rotation: Rotation | None = None) -> Tensor:
        """`(B, F+I, N, D)` -> the same; `condition (B, 1, 1+I or F+I, 1, D)`: as for `per_frame`.

        `rotation` turns queries and keys of temporal attention. A layer over time only lets images pass.
        """
        if not self.temporal_only or x.shape[1] == num_frames:
            return self._transform(x, condition, num_frames, rotation)
        num_images = x.shape[1] - num_frames
        clip_condition = None if condition is None else condition[:, : max(1, condition.shape[1] - num_images)]
        clip = self._transform(x[:, :num_frames], clip_condition, num_frames, rotation)
        return torch.cat([clip, x[:, num_frames:]], dim=1)

    def _transform(self, x: Tensor, condition: Tensor | None, num_frames: int, rotation: Rotation | None) -> Tensor:
        attention, mlp = self._modulations(condition, num_frames, x.shape[1])
        for branch in self.branches:
            h = _enter(self.norm1(x), attention)
            mixed = [getattr(self, name)(h, num_frames, rotation) for name, _ in branch]
            x = x + _leave(sum(mixed[1:], start=mixed[0]), attention)
        return x + _leave(self.mlp(_enter(self.norm2(x), mlp)), mlp)

    def _modulations(
        self, condition: Tensor | None, num_frames: int, total: int
    ) -> tuple[Modulation | None, Modulation | None]:
        if self.adaLN_modulation is None:
            return None, None
        parts = per_frame(self.adaLN_modulation(condition), num_frames, total).chunk(6, dim=-1)
        return Modulation(*parts[:3]), Modulation(*parts[3:])


class FinalLayer(nn.Module):
    """Normalise, modulate (with `adaln`) and map each token to its patch of `patch_dim` values."""

    def __init__(self, hidden_size: int, patch_dim: int, *, adaln: bool) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=not adaln)
        self.linear = nn.Linear(hidden_size, patch_dim)
        self.adaLN_modulation = conditioner(hidden_size, 2) if adaln else None

    def forward(self, x: Tensor, condition: Tensor | None, num_frames: int) -> Tensor:
        """`(B, F+I, N, D)` -> `(B, F+I, N, patch_dim)`; `condition` as in `Block`."""
        x = self.norm_final(x)
        if self.adaLN_modulation is not None:
            shift, scale = per_frame(self.adaLN_modulation(condition), num_frames, x.shape[1]).chunk(2, dim=-1)
            x = modulate(x, shift, scale)
        return self.linear(x)


def _enter(x: Tensor, modulation: Modulation | None) -> Tensor:
    return x if modulation is None else modulate(x, modulation.shift, modulation.scale)


def _leave(x: Tensor, modulation: Modulation | None) -> Tensor:
    return x if modulation is None else modulation.gate * x
