"""Multi-head attention along one axis of the tokens: views, kernels and kernel selection.

Letters: B batch, F frames, N tokens per frame, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.checks import require

from .embeddings import Rotation, rotate

# Einops patterns that fold tokens `(B, F, N, D)` to `(rows, length, heads, D/H)`; the reverse pattern unfolds.
VIEWS = {
    # among the N tokens of each frame
    "spatial": "batch frames tokens (heads dim) -> (batch frames) tokens heads dim",
    # among the F frames, for each token position; tokens count as heads, which avoids a transposed copy
    "temporal": "batch frames tokens (heads dim) -> batch frames (tokens heads) dim",
    # the same, if that gives more heads than the fused kernels accept
    "temporal, large": "batch frames tokens (heads dim) -> (batch tokens) frames heads dim",
    # all tokens of a clip as one row: attention over space and time jointly, or to the words of a caption
    "clip": "batch frames tokens (heads dim) -> batch (frames tokens) heads dim",
}
MAX_HEADS = 65535  # in one call of a fused CUDA kernel: the limit of a thread-block grid

# Fused kernels of torch on CUDA in order of preference; torch skips those that do not support a call.
_PREFERRED = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
BACKENDS = {"cuda": [getattr(SDPBackend, name) for name in _PREFERRED]}


class Call(NamedTuple):
    """Arguments of one attention call: q `(B, F, N, D)`; k and v likewise, or of other tokens; any strides."""

    q: Tensor
    k: Tensor
    v: Tensor
    view: str  # a key of `VIEWS`
    num_heads: int
    mask: Tensor | None = None  # bool, or numbers added to scores; broadcasts over the folded (rows, H, queries, keys)

    def fold(self) -> list[Tensor]:
        """Returns q, k, v as `(rows, heads, length, D/H)`, the only layout that fused kernels accept."""
        parts = (rearrange(each, self._pattern, heads=self.num_heads) for each in (self.q, self.k, self.v))
        return [each.transpose(1, 2) for each in parts]

    def unfold(self, out: Tensor) -> Tensor:
        """Returns the 4-D result as tokens `(B, F, N, D)`."""
        tokens, folded = self._pattern.split(" -> ")
        batch, frames = self.q.shape[:2]
        return rearrange(out.transpose(1, 2), f"{folded} -> {tokens}", batch=batch, frames=frames, heads=self.num_heads)

    @property
    def _pattern(self) -> str:
        large = self.view == "temporal" and self.q.shape[2] * self.num_heads > MAX_HEADS
        return VIEWS["temporal, large" if large else self.view]


def fused_attention(call: Call) -> Tensor:
    """Computes attention with torch's scaled_dot_product_attention, preferring backends in the order of `BACKENDS`."""
    q, k, v = call.fold()
    backends = BACKENDS.get(q.device.type)
    with sdpa_kernel(backends, set_priority=True) if backends else nullcontext():
        return call.unfold(functional.scaled_dot_product_attention(q, k, v, attn_mask=call.mask))


def plain_attention(call: Call) -> Tensor:
    """Computes softmax(q k^T / sqrt(D/H)) v with explicit scores: the reference for the other kernels."""
    q, k, v = call.fold()
    # scaled before the product: otherwise the compiler recognises attention and substitutes a fused kernel
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (rows, H, queries, keys)
    if call.mask is not None and call.mask.dtype.is_floating_point:
        scores = scores + call.mask
    elif call.mask is not None:
        scores = scores.masked_fill(~call.mask, float("-inf"))
    return call.unfold(scores.softmax(dim=-1) @ v)


KERNELS: dict[str, Callable[[Call], Tensor]] = {"fused": fused_attention, "plain": plain_attention}
CHOICES = ("auto", *KERNELS)
_kernel: Callable[[Call], Tensor] = fused_attention


def choose(name: str) -> None:
    """Sets the attention kernel of this process: a key of `KERNELS`, or "auto" (the default) for "fused"."""
    global _kernel
    require(name in CHOICES, f"attention must be one of {', '.join(CHOICES)}, got {name!r}")
    _kernel = KERNELS["fused" if name == "auto" else name]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    view: str,
    num_heads: int,
    *,
    mask: Tensor | None = None,
    rotation: Rotation | None = None,
) -> Tensor:
    """Computes multi-head attention `(B, F, N, D)` along the axis that `view`, a key of `VIEWS`, selects.

    Args:
        q: queries `(B, F, N, D)`; k, v: keys and values, likewise or of other tokens.
        mask: bool (True: attend) or numbers added to the scores; broadcasts over the folded (rows, H, queries, keys).
        rotation: rotates queries and keys by their frame.
    """
    if rotation is not None:
        cos, sin = (each[:, None, None] for each in rotation)  # (F, 1, 1, D/H/2)
        q, k = (rotate(each.unflatten(-1, (num_heads, -1)), (cos, sin)).flatten(-2) for each in (q, k))
    return _kernel(Call(q, k, v, view, num_heads, mask))
