"""Multi-head attention along one axis of the tokens: the views, the kernels, and which of them computes it.

Letters: B batch, F frames, N tokens per frame, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .embeddings import Rotation, rotate


class View(NamedTuple):
    """How one kind of attention folds tokens `(B, F, N, D)` to `(rows, length, heads, D/H)`, and back."""

    fold: str
    unfold: str


VIEWS: dict[str, View] = {
    # among the N tokens of each frame
    "spatial": View(
        "batch frames tokens (heads dim) -> (batch frames) tokens heads dim",
        "(batch frames) tokens heads dim -> batch frames tokens (heads dim)",
    ),
    # among the F frames, for each token position: tokens count as heads, so that none has to change its place
    "temporal": View(
        "batch frames tokens (heads dim) -> batch frames (tokens heads) dim",
        "batch frames (tokens heads) dim -> batch frames tokens (heads dim)",
    ),
    # the same where there would be more heads than the fused kernels take
    "temporal, large": View(
        "batch frames tokens (heads dim) -> (batch tokens) frames heads dim",
        "(batch tokens) frames heads dim -> batch frames tokens (heads dim)",
    ),
    # all tokens of a clip as one row of queries, for the one row of words of its caption
    "text": View(
        "batch frames tokens (heads dim) -> batch (frames tokens) heads dim",
        "batch (frames tokens) heads dim -> batch frames tokens (heads dim)",
    ),
}
MAX_HEADS = 65535  # of a call of a fused kernel on CUDA: the extent of a grid of thread blocks

# torch's fused kernels in the order of preference; those that cannot take a call are passed over.
BACKENDS: dict[str, list[SDPBackend]] = {
    "cuda": [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
}


class Call(NamedTuple):
    """One attention to compute: q `(B, F, N, D)`, k and v the same or what is attended to, strided as they come."""

    q: Tensor
    k: Tensor
    v: Tensor
    view: str  # a key of `VIEWS`
    num_heads: int
    mask: Tensor | None = None  # what fused attention takes for the folded shapes

    def folded(self) -> list[Tensor]:
        """q, k, v in 4-D, `(rows, heads, length, D/H)`: fused attention takes nothing else."""
        parts = (rearrange(each, self._how.fold, heads=self.num_heads) for each in (self.q, self.k, self.v))
        return [each.transpose(1, 2) for each in parts]

    def unfolded(self, out: Tensor) -> Tensor:
        """The 4-D result as tokens `(B, F, N, D)`."""
        batch, frames = self.q.shape[:2]
        out = out.transpose(1, 2)
        return rearrange(out, self._how.unfold, batch=batch, frames=frames, heads=self.num_heads)

    @property
    def _how(self) -> View:
        large = self.view == "temporal" and self.q.shape[2] * self.num_heads > MAX_HEADS
        return VIEWS["temporal, large" if large else self.view]


def fused(call: Call) -> Tensor:
    """torch's scaled_dot_product_attention, with the backends in the order of `BACKENDS`."""
    q, k, v = call.folded()
    with _backends(q.device.type):
        return call.unfolded(functional.scaled_dot_product_attention(q, k, v, attn_mask=call.mask))


def _backends(device: str) -> AbstractContextManager[None]:
    return sdpa_kernel(BACKENDS[device], set_priority=True) if device in BACKENDS else nullcontext()


def plain(call: Call) -> Tensor:
    """softmax(q k^T / sqrt(D/H)) v, with the scores in memory: what the others must equal."""
    q, k, v = call.folded()
    # scaled before the product: scaled after it, the compiler takes this for attention and puts torch's kernel here
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (rows, H, queries, keys)
    if call.mask is not None and call.mask.dtype.is_floating_point:
        scores = scores + call.mask
    elif call.mask is not None:
        scores = scores.masked_fill(~call.mask, float("-inf"))
    return call.unfolded(scores.softmax(dim=-1) @ v)


KERNELS: dict[str, Callable[[Call], Tensor]] = {"fused": fused, "plain": plain}
CHOICES = ("auto", *KERNELS)
_kernel: Callable[[Call], Tensor] = fused


def choose(name: str) -> None:
    """Compute all attention of this process with one of `KERNELS`; "auto", the default, is "fused"."""
    global _kernel
    if name not in CHOICES:
        raise ValueError(f"attention must be one of {', '.join(CHOICES)}, not {name!r}")
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
    """Multi-head attention along the axis that `view` names.

    Args:
        q: queries `(B, F, N, D)`.
        k, v: keys and values, the same shape, or that of what is attended to.
        view: a key of `VIEWS`.
        mask: what fused attention takes for the folded shapes.
        rotation: turns queries and keys by their frame.

    Returns:
        `(B, F, N, D)`.
    """
    if rotation is not None:
        q, k = (_turn(each, rotation, num_heads) for each in (q, k))
    return _kernel(Call(q, k, v, view, num_heads, mask))


def _turn(x: Tensor, rotation: Rotation, num_heads: int) -> Tensor:
    cos, sin = (each[:, None, None] for each in rotation)  # (F, 1, 1, D/H/2)
    return rotate(x.unflatten(-1, (num_heads, -1)), (cos, sin)).flatten(-2)
