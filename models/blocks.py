"""Parts of Latte: attention over space or time, the block, the final layer, the layer plans.

Letters: B batch, F frames (tubelets count as frames here), I images, N tokens per frame, D width. Tokens are
`(B, F+I, N, D)` everywhere; only attention uses other layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

from common.checks import require

from .attention import attend
from .embeddings import Rotation

Axis = Literal["spatial", "temporal", "clip"]  # views of `attention.VIEWS`
Layer = tuple[tuple[Axis, ...], ...]

# A layer is a sequence of residual branches, then the MLP; the attentions of one branch are summed.
SPATIAL: Layer = (("spatial",),)
TEMPORAL: Layer = (("temporal",),)
SPATIAL_THEN_TEMPORAL: Layer = (("spatial",), ("temporal",))
SPATIAL_AND_TEMPORAL: Layer = (("spatial", "temporal"),)

# Variants 1 to 4 of paper section 3.2, and the image network that can initialise them: depth -> the layers in order.
LAYER_PLANS: dict[str, Callable[[int], list[Layer]]] = {
    "interleaved": lambda depth: [SPATIAL, TEMPORAL] * (depth // 2),
    "late_fusion": lambda depth: [SPATIAL] * (depth // 2) + [TEMPORAL] * (depth // 2),
    "sequential": lambda depth: [SPATIAL_THEN_TEMPORAL] * depth,
    "parallel": lambda depth: [SPATIAL_AND_TEMPORAL] * depth,
    "image": lambda depth: [SPATIAL] * depth,  # a DiT: same layers and names of weights
}


class Attention(nn.Module):
    """Multi-head self-attention along one axis of the tokens, set by the subclass."""

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
    """Attention among the N tokens of each frame."""

    axis = "spatial"

    def forward(self, x: Tensor, num_frames: int, rotation: Rotation | None = None) -> Tensor:
        """`(B, F+I, N, D)` -> `(B, F+I, N, D)`; images are treated as frames."""
        return self.attend(x)


class TemporalAttention(Attention):
    """Attention among the F frames of the clip, for each token position."""

    axis = "temporal"

    def forward(self, x: Tensor, num_frames: int, rotation: Rotation | None = None) -> Tensor:
        """`(B, F+I, N, D)` -> `(B, F+I, N, D)`; zero for images, which have no time axis."""
        num_images = x.shape[1] - num_frames
        out = self.attend(x[:, :num_frames], rotation)  # (B, F, N, D)
        return functional.pad(out, (0, 0, 0, 0, 0, num_images)) if num_images else out


MIXERS: dict[Axis, type[Attention]] = {"spatial": SpatialAttention, "temporal": TemporalAttention}


class Mlp(nn.Module):
    """Linear, GELU (tanh approximation), linear; parameter names as in timm."""

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_size)
        self.fc2 = nn.Linear(hidden_size, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D)` -> the same."""
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))


class Modulation(NamedTuple):
    """Shift, scale and gate of one residual branch, each broadcasting over tokens `(B, F+I, N, D)`."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shifts and scales normalised tokens."""
    return x * (1 + scale) + shift


def per_frame(rows: Tensor, num_frames: int, total: int) -> Tensor:
    """Repeats the clip's row for its F frames: `(B, 1+I, 1, D)` -> `(B, F+I, 1, D)`.

    Returned unchanged: a single row, which broadcasts, and `total` = F+I rows, already one per frame.
    """
    if rows.shape[1] in (1, total):
        return rows
    return torch.cat([rows[:, :1].expand(-1, num_frames, -1, -1), rows[:, 1:]], dim=1)


def conditioner(hidden_size: int, num_outputs: int) -> nn.Sequential:
    """Returns the adaLN head: condition `(..., D)` -> `num_outputs` concatenated vectors of width D."""
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, num_outputs * hidden_size))


class Block(nn.Module):
    """One layer: the residual branches of its plan, then an MLP.

    With `adaln` the condition shifts, scales and gates each branch (DiT's adaLN-zero); the attention branches share one
    modulation. Without it, this is a plain pre-norm block, for conditions given as tokens (paper section 3.3.2).
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
        """`(B, F+I, N, D)` -> the same. Temporal-only layers pass images through unchanged.

        Args:
            condition: `(B, 1 or 1+I or F+I, 1, D)`, see `per_frame`; None without `adaln`.
            rotation: rotates queries and keys of temporal attention.
        """
        if not self.temporal_only or x.shape[1] == num_frames:
            return self._transform(x, condition, num_frames, rotation)
        if condition is not None:  # drops the rows of images
            condition = condition[:, : max(1, condition.shape[1] - x.shape[1] + num_frames)]
        return on_clip(lambda clip: self._transform(clip, condition, num_frames, rotation), x, num_frames)

    def _transform(self, x: Tensor, condition: Tensor | None, num_frames: int, rotation: Rotation | None) -> Tensor:
        attention = mlp = None
        if self.adaLN_modulation is not None:
            parts = per_frame(self.adaLN_modulation(condition), num_frames, x.shape[1]).chunk(6, dim=-1)
            attention, mlp = Modulation(*parts[:3]), Modulation(*parts[3:])
        for branch in self.branches:
            h = _modulate_input(self.norm1(x), attention)
            mixed = [getattr(self, name)(h, num_frames, rotation) for name, _ in branch]
            x = x + _gate_output(sum(mixed[1:], start=mixed[0]), attention)
        return x + _gate_output(self.mlp(_modulate_input(self.norm2(x), mlp)), mlp)


class FinalLayer(nn.Module):
    """Norm, modulation (with `adaln`), and a linear map of each token to the `patch_dim` values of its patch."""

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


def _modulate_input(x: Tensor, modulation: Modulation | None) -> Tensor:
    return x if modulation is None else modulate(x, modulation.shift, modulation.scale)


def _gate_output(x: Tensor, modulation: Modulation | None) -> Tensor:
    return x if modulation is None else modulation.gate * x


def run_block(block: nn.Module, *inputs: Any, recompute: bool, keep_random_state: bool = False) -> Tensor:
    """Runs a block; with `recompute` its activations are not stored but recomputed in the backward pass."""
    if not (recompute and torch.is_grad_enabled()):
        return block(*inputs)
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=keep_random_state)


def on_clip(function: Callable[[Tensor], Tensor], x: Tensor, num_frames: int) -> Tensor:
    """Applies `function` to the F frames of the clip in `x` (B, F+I, ...); images pass unchanged."""
    if x.shape[1] == num_frames:
        return function(x)
    return torch.cat([function(x[:, :num_frames]), x[:, num_frames:]], dim=1)


def require_blocks(indices: Collection[int], depth: int) -> None:
    """Raises ValueError unless `return_hidden_states` names existing blocks."""
    inside = all(0 <= index < depth for index in indices)
    require(inside, f"return_hidden_states must be block indices in [0, {depth}), got {tuple(indices)}")


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compiles each block in place; checkpoints do not change.

    For the backward pass a block keeps its inputs, matrix products and attention, and recomputes the rest. This setting
    applies to everything that the process compiles.
    """
    functorch_config.aggressive_recomputation = True
    for block in blocks:
        block.compile(dynamic=False)
