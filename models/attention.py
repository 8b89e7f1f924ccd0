"""Multi-head attention along one axis of the tokens: the views, the kernels, and which of them computes it.

Letters: B batch, F frames, N tokens per frame, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .embeddings import Rotation, rotate


class View(NamedTuple):
    """How one kind of attention folds tokens `(B, F, N, D)` to 4-D, and back."""

    fold: str
    unfold: str


VIEWS: dict[str, View] = {
    # among the N tokens of each frame
    "spatial": View(
        "batch frames tokens (heads dim) -> (batch frames) heads tokens dim",
        "(batch frames) heads tokens dim -> batch frames tokens (heads dim)",
    ),
    # among the F frames, for each token position
    "temporal": View(
        "batch frames tokens (heads dim) -> (batch tokens) heads frames dim",
        "(batch tokens) heads frames dim -> batch frames tokens (heads dim)",
    ),
    # all tokens of a clip as one row of queries, for the one row of words of its caption
    "text": View(
        "batch frames tokens (heads dim) -> batch heads (frames tokens) dim",
        "batch heads (frames tokens) dim -> batch frames tokens (heads dim)",
    ),
}

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
        """q, k, v in 4-D, `(rows, H, length, D/H)`: fused attention takes nothing else."""
        return [rearrange(each, VIEWS[self.view].fold, heads=self.num_heads) for each in (self.q, self.k, self.v)]

    def unfolded(self, out: Tensor) -> Tensor:
        """The 4-D result as tokens `(B, F, N, D)`."""
        batch, frames = self.q.shape[:2]
        return rearrange(out, VIEWS[self.view].unfold, batch=batch, frames=frames)


class Kernel(NamedTuple):
    """One way to compute a `Call`, and which calls it is for."""

    takes: Callable[[Call], bool]
    run: Callable[[Call], Tensor]  # -> (B, F, N, D)


def fused(call: Call) -> Tensor:
    """torch's scaled_dot_product_attention, with the backends in the order of `BACKENDS`."""
    q, k, v = call.folded()
    backends = BACKENDS.get(q.device.type)
    if backends is None:
        return call.unfolded(functional.scaled_dot_product_attention(q, k, v, attn_mask=call.mask))
    with sdpa_kernel(backends, set_priority=True):
        return call.unfolded(functional.scaled_dot_product_attention(q, k, v, attn_mask=call.mask))


def plain(call: Call) -> Tensor:
    """softmax(q k^T / sqrt(D/H)) v, with the scores in memory: what the others must equal."""
    q, k, v = call.folded()
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (rows, H, queries, keys)
    if call.mask is not None and call.mask.dtype.is_floating_point:
        scores = scores + call.mask
    elif call.mask is not None:
        scores = scores.masked_fill(~call.mask, float("-inf"))
    return call.unfolded(scores.softmax(dim=-1) @ v)


# The first that takes a call computes it.
KERNELS: dict[str, Kernel] = {
    "fused": Kernel(lambda call: True, fused),
    "plain": Kernel(lambda call: True, plain),
}
CHOICES = ("auto", *KERNELS)
_chosen = "auto"


def choose(name: str) -> None:
    """Compute all attention of this process with one kernel of `KERNELS`, where it takes the call.

    "auto", the default: the first that takes the call. A kernel that is passed over leaves it to "auto".
    """
    global _chosen
    if name not in CHOICES:
        raise ValueError(f"attention must be one of {', '.join(CHOICES)}, not {name!r}")
    _chosen = name


def kernel_for(call: Call) -> Kernel:
    """The chosen kernel where it takes `call`, else the first that does."""
    if _chosen != "auto" and KERNELS[_chosen].takes(call):
        return KERNELS[_chosen]
    return next(kernel for kernel in KERNELS.values() if kernel.takes(call))


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
    call = Call(q, k, v, view, num_heads, mask)
    return kernel_for(call).run(call)


def _turn(x: Tensor, rotation: Rotation, num_heads: int) -> Tensor:
    cos, sin = (each[:, None, None] for each in rotation)  # (F, 1, 1, D/H/2)
    return rotate(x.unflatten(-1, (num_heads, -1)), (cos, sin)).flatten(-2)
