"""Attention among the F frames of a clip, for each token position and head: Triton kernels for short clips.

The score map of one (token, head) pair is F x F, usually 16 x 16. Kernels made for long sequences pad those 16 rows to
64 or 128, and need the tokens folded into the batch, which copies q, k and v. Here each program takes a few pairs,
reads their rows in place from the `qkv` projection's output, and keeps everything in registers. The backward kernel
recomputes the probabilities, so that only q, k and v are saved.

Letters: B batch, F frames, N tokens per frame, H heads, D width of all heads, d = D / H width of a head.

Importing this file needs Triton. With TRITON_INTERPRET=1 the kernels run in Python on a CPU, for tests.
"""

# Kernel arguments have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
_WIDEN = tl.constexpr(INTERPRETED)  # the interpreter wrongly multiplies bfloat16 as integers of the same bits
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_FRAMES = 32  # score maps of longer clips do not fit in registers; fused attention suits them
MAX_HEAD_WIDTH = 256


@triton.jit
def _rows(
    first, tokens, stride_b, stride_f, stride_n,
    H: tl.constexpr, d: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Returns 64-bit offsets (P pairs, R frames, 1) of the rows of the pairs from `first` on."""
    pair = first + tl.arange(0, P)
    position = pair // H
    start = (position // tokens).to(tl.int64) * stride_b + (position % tokens).to(tl.int64) * stride_n + pair % H * d
    return start[:, None, None] + tl.arange(0, R).to(tl.int64)[None, :, None] * stride_f


@triton.jit
def _load(pointer, rows, inside, d: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr):
    """Loads the d values of each row in two parts, of W0 and W1 columns; pads with zeros."""
    column = tl.arange(0, W0)[None, None, :]
    first = tl.load(pointer + rows + column, mask=inside & (column < d), other=0.0)
    rest = first
    if W1 > 0:
        column = W0 + tl.arange(0, W1)[None, None, :]
        rest = tl.load(pointer + rows + column, mask=inside & (column < d), other=0.0)
    return first, rest


@triton.jit
def _store(pointer, rows, inside, parts, d: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr):
    column = tl.arange(0, W0)[None, None, :]
    tl.store(pointer + rows + column, parts[0].to(pointer.dtype.element_ty), mask=inside & (column < d))
    if W1 > 0:
        column = W0 + tl.arange(0, W1)[None, None, :]
        tl.store(pointer + rows + column, parts[1].to(pointer.dtype.element_ty), mask=inside & (column < d))


@triton.jit
def _dot(a, b):
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")  # fp32 stays fp32; has no effect on bf16 and fp16


@triton.jit
def _outer(a, b, W1: tl.constexpr):
    """Returns a b^T, (P, R, R), of a and b (P, R, d), each in two parts."""
    out = _dot(a[0], tl.permute(b[0], (0, 2, 1)))
    if W1 > 0:
        out += _dot(a[1], tl.permute(b[1], (0, 2, 1)))
    return out


@triton.jit
def _inner(a, b, W1: tl.constexpr):
    """Returns a b, (P, R, d) in two parts, of a (P, R, R) and b (P, R, d) in two parts."""
    a = a.to(b[0].dtype)
    first = _dot(a, b[0])
    rest = first
    if W1 > 0:
        rest = _dot(a, b[1])
    return first, rest


@triton.jit
def _attend(
    q_pointer, k_pointer, v_pointer, q_b, q_f, q_n, k_b, k_f, k_n, v_b, v_f, v_n, first, inside, tokens, scale,
    F: tl.constexpr, H: tl.constexpr, d: tl.constexpr,
    P: tl.constexpr, R: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
):  # fmt: skip
    """Loads the pairs from `first` on; returns q, k, v, and softmax(q k^T * scale) over the F frames."""
    q = _load(q_pointer, _rows(first, tokens, q_b, q_f, q_n, H, d, P, R), inside, d, W0, W1)
    k = _load(k_pointer, _rows(first, tokens, k_b, k_f, k_n, H, d, P, R), inside, d, W0, W1)
    v = _load(v_pointer, _rows(first, tokens, v_b, v_f, v_n, H, d, P, R), inside, d, W0, W1)
    scores = _outer(q, k, W1) * (scale * 1.4426950408889634)  # log2(e), for exp2
    if F < R:
        scores = tl.where(tl.arange(0, R)[None, None, :] < F, scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 2)[:, :, None])
    return q, k, v, weights / tl.sum(weights, 2)[:, :, None]


@triton.jit
def _forward_kernel(
    q_pointer, k_pointer, v_pointer, out_pointer,
    q_b, q_f, q_n, k_b, k_f, k_n, v_b, v_f, v_n, out_b, out_f, out_n, tokens, pairs, scale,
    F: tl.constexpr, H: tl.constexpr, d: tl.constexpr,
    P: tl.constexpr, R: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * P
    inside = (first + tl.arange(0, P) < pairs)[:, None, None] & (tl.arange(0, R) < F)[None, :, None]
    _, _, v, weights = _attend(
        q_pointer, k_pointer, v_pointer, q_b, q_f, q_n, k_b, k_f, k_n, v_b, v_f, v_n, first, inside, tokens, scale,
        F, H, d, P, R, W0, W1,
    )  # fmt: skip
    rows = _rows(first, tokens, out_b, out_f, out_n, H, d, P, R)
    _store(out_pointer, rows, inside, _inner(weights, v, W1), d, W0, W1)


@triton.jit
def _backward_kernel(
    q_pointer, k_pointer, v_pointer, grad_pointer, grads_pointer,
    q_b, q_f, q_n, k_b, k_f, k_n, v_b, v_f, v_n, grad_b, grad_f, grad_n, grads_b, grads_f, grads_n,
    tokens, pairs, scale, part,
    F: tl.constexpr, H: tl.constexpr, d: tl.constexpr,
    P: tl.constexpr, R: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * P
    inside = (first + tl.arange(0, P) < pairs)[:, None, None] & (tl.arange(0, R) < F)[None, :, None]
    q, k, v, weights = _attend(
        q_pointer, k_pointer, v_pointer, q_b, q_f, q_n, k_b, k_f, k_n, v_b, v_f, v_n, first, inside, tokens, scale,
        F, H, d, P, R, W0, W1,
    )  # fmt: skip
    g = _load(grad_pointer, _rows(first, tokens, grad_b, grad_f, grad_n, H, d, P, R), inside, d, W0, W1)
    d_weights = _outer(g, v, W1)
    d_scores = weights * (d_weights - tl.sum(weights * d_weights, 2)[:, :, None]) * scale
    rows = _rows(first, tokens, grads_b, grads_f, grads_n, H, d, P, R)
    _store(grads_pointer + 2 * part, rows, inside, _inner(tl.permute(weights, (0, 2, 1)), g, W1), d, W0, W1)
    _store(grads_pointer, rows, inside, _inner(d_scores, k, W1), d, W0, W1)
    _store(grads_pointer + part, rows, inside, _inner(tl.permute(d_scores, (0, 2, 1)), q, W1), d, W0, W1)


class Tile(NamedTuple):
    """Tile of the kernels: compile-time constants."""

    P: int  # pairs per program: one for each of its four warps
    R: int  # rows of a score map: the frames, rounded up for the matrix units
    W0: int  # head width in two parts, each padded to a power of two: 72 = 64 + 8, padded to 16
    W1: int

    @classmethod
    def of(cls, num_frames: int, head_width: int) -> Tile:
        """Returns the tile for clips of `num_frames`, 1 to `MAX_FRAMES`, and heads of `head_width`."""
        first = max(16, 1 << (head_width.bit_length() - 1))
        rest = head_width - first
        return cls(4, _padded(num_frames), first, _padded(rest) if rest > 0 else 0)


def _padded(length: int) -> int:
    return max(16, 1 << (length - 1).bit_length())


def takes(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> bool:
    """Returns whether the kernels support this attention, from dtypes and shapes alone, so it works while tracing."""
    return (
        (q.is_cuda or INTERPRETED)
        and q.shape == k.shape == v.shape
        and q.dtype == k.dtype == v.dtype
        and q.dtype in DTYPES
        and q.shape[1] <= MAX_FRAMES
        and q.shape[-1] // num_heads <= MAX_HEAD_WIDTH
        and q.shape[-1] // num_heads % 8 == 0
    )


def temporal_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Computes softmax(q k^T / sqrt(d)) v over the frames, for each token and head.

    Args:
        q, k, v: `(B, F, N, D)` of one dtype in `DTYPES`, with any strides; a tensor is copied only if its stride
            along D is not 1.
        num_heads: H.

    Returns:
        `(B, F, N, D)`, contiguous.
    """
    return _separate(q, k, v, num_heads)


def packed_temporal_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Computes the same for packed q, k, v, `(B, F, N, 3 D)`; the gradient is packed too."""
    return _packed(qkv, num_heads)


# torch cannot trace interpreted kernels, so there the operators are opaque, with registered output shapes.
_operator = torch.library.custom_op if INTERPRETED else torch.library.triton_op


@_operator("latte::temporal_attention", mutates_args=())
def _separate(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    return _forward(q, k, v, num_heads)


@_operator("latte::packed_temporal_attention", mutates_args=())
def _packed(qkv: Tensor, num_heads: int) -> Tensor:
    q, k, v = qkv.chunk(3, dim=-1)
    return _forward(q, k, v, num_heads)


@_operator("latte::temporal_attention_backward", mutates_args=())
def _gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, num_heads: int, packed: bool) -> Tensor:
    """Returns the gradients of q, k, v: `(B, F, N, 3 D)` if packed, else `(3, B, F, N, D)`."""
    out = q.new_empty((*q.shape[:-1], 3 * q.shape[-1]) if packed else (3, *q.shape))
    first = out[..., : q.shape[-1]] if packed else out[0]
    part = q.shape[-1] if packed else q.numel()
    grad, q, k, v = (_unit_stride(each) for each in (grad, q, k, v))
    grid, last, constants = _launch(q, num_heads)
    _kernel(_backward_kernel)[grid](q, k, v, grad, out, *_strides(q, k, v, grad, first), *last, part, **constants)
    return out


def _forward(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q, k, v = (_unit_stride(each) for each in (q, k, v))
    grid, last, constants = _launch(q, num_heads)
    _kernel(_forward_kernel)[grid](q, k, v, out, *_strides(q, k, v, out), *last, **constants)
    return out


def _launch(q: Tensor, num_heads: int) -> tuple[tuple[int], list[Any], dict[str, int]]:
    """Returns grid, last arguments and compile-time constants of both kernels."""
    batch, frames, tokens, width = q.shape
    tile = Tile.of(frames, width // num_heads)
    pairs = batch * tokens * num_heads
    constants = {"F": frames, "H": num_heads, "d": width // num_heads, **tile._asdict()}
    return (triton.cdiv(pairs, tile.P),), [tokens, pairs, (width // num_heads) ** -0.5], constants


def _kernel(kernel: Any) -> Any:
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.num_heads = inputs
    ctx.save_for_backward(*tensors)


def _separate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gradients(grad, *ctx.saved_tensors, ctx.num_heads, False).unbind(), None)


def _packed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    q, k, v = ctx.saved_tensors[0].chunk(3, dim=-1)
    return _gradients(grad, q, k, v, ctx.num_heads, True), None


_separate.register_autograd(_separate_backward, setup_context=_keep)
_packed.register_autograd(_packed_backward, setup_context=_keep)
if INTERPRETED:
    _separate.register_fake(lambda q, k, v, num_heads: q.new_empty(q.shape))
    _packed.register_fake(lambda qkv, num_heads: qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3)))
    _gradients.register_fake(
        lambda grad, q, k, v, num_heads, packed: q.new_empty(
            (*q.shape[:-1], 3 * q.shape[-1]) if packed else (3, *q.shape)
        )
    )
