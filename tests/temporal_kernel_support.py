"""Cases of the temporal attention kernel, and its distance from brute force in float64.

Run as `TRITON_INTERPRET=1 python tests/temporal_kernel_support.py` it prints the distances of all cases as JSON.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """A clip of `frames` and `images`, of which the kernel sees the frames: its tensors are strided views."""

    batch: int
    frames: int
    images: int
    tokens: int
    heads: int
    head_width: int
    dtype: torch.dtype = torch.float32
    packed: bool = True


CASES = {
    "XL/2": Case(2, 16, 0, 3, 2, 72),
    "XL/2 bfloat16": Case(2, 16, 0, 3, 2, 72, torch.bfloat16),
    "odd frames, images": Case(2, 5, 3, 3, 1, 40),
    "one frame": Case(3, 1, 0, 3, 1, 16),
    "one token": Case(1, 3, 0, 1, 2, 8),
    "long clip": Case(1, 32, 0, 1, 1, 72),
    "parallel": Case(1, 17, 2, 1, 2, 144),
    "rotated": Case(2, 16, 2, 3, 2, 72, packed=False),
    "rotated bfloat16": Case(1, 16, 2, 3, 2, 72, torch.bfloat16, packed=False),
}


def brute_force(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Attention among frames in float64, `(B, F, N, D)`, by its definition."""
    q, k, v = (each.double().unflatten(-1, (num_heads, -1)) for each in (q, k, v))
    scores = torch.einsum("bfnhd,bgnhd->bnhfg", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bnhfg,bgnhd->bfnhd", scores.softmax(dim=-1), v).flatten(-2)


def kernels() -> Any:
    """The module under test; by itself where it is interpreted, which loads nothing else."""
    return import_module("temporal_kernel" if __name__ == "__main__" else "benchmarks.candidates.temporal_kernel")


def attention(qkv: Tensor, num_heads: int, packed: bool) -> Tensor:
    """The kernel, on one tensor or on three of different strides."""
    if packed:
        return kernels().packed_temporal_attention(qkv, num_heads)
    q, k, v = qkv.chunk(3, dim=-1)
    return kernels().temporal_attention(q.contiguous(), k.transpose(1, 2).contiguous().transpose(1, 2), v, num_heads)


def distances(case: Case, device: str = "cpu") -> tuple[float, float]:
    """Relative error of the output and of the gradient."""
    torch.manual_seed(0)
    width = case.heads * case.head_width
    rows = torch.randn(case.batch, case.frames + case.images, case.tokens, 3 * width, device=device)
    qkv = rows.to(case.dtype)[:, : case.frames].requires_grad_()
    out = attention(qkv, case.heads, case.packed)
    grad = torch.randn_like(out)
    exact = qkv.detach().double().requires_grad_()
    expected = brute_force(*exact.chunk(3, dim=-1), case.heads)
    (gradient,) = torch.autograd.grad(out, qkv, grad)
    (expected_gradient,) = torch.autograd.grad(expected, exact, grad.double())
    return relative_error(out, expected), relative_error(gradient, expected_gradient)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """|value - expected| / |expected|, in float64; no NaN passes a bound."""
    return float((value.detach().double() - expected.detach()).norm() / expected.detach().norm().clamp(min=1e-30))


def far_apart() -> float:
    """Error where offsets pass 2^31: three clips in 4 GiB of which nearly no page is ever touched."""
    stride = 2**30 + 16
    memory = torch.empty(2 * stride + 16 * 48, dtype=torch.float16)
    qkv = memory.as_strided((3, 16, 1, 48), (stride, 48, 48, 1)).normal_()
    q, k, v = qkv.chunk(3, dim=-1)
    return relative_error(kernels().temporal_attention(q, k, v, 1), brute_force(q, k, v, 1))


def operator_checks() -> dict[str, str]:
    """torch's own checks of the operator: its schema, autograd, shapes in a trace."""
    return torch.library.opcheck(
        kernels()._packed,
        (torch.randn(1, 2, 1, 48, requires_grad=True), 1),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "candidates"))
    print(
        json.dumps(
            {
                "distances": {name: distances(case) for name, case in CASES.items()},
                "far_apart": far_apart(),
                "operator_checks": operator_checks(),
            }
        )
    )
