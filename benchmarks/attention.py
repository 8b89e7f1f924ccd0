"""Attention alone, by kernel and shape: over time and space, forward and backward, with the error of each.

A kernel of benchmarks/candidates that is faster than `fused` over time at every batch belongs in models/attention.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from engine.build import PRECISIONS
from models import attention as ours

from .report import Table
from .timing import Case, Row, Timer
from .workload import Workload

COPY = 4.3e12  # bytes/s that an H200 reads and writes: the floor of memory-bound kernels (docs/attention.md)


class Candidate(NamedTuple):
    """A way to compute attention: a name of `models.attention.KERNELS` or "triton", and options."""

    name: str
    backend: SDPBackend | None = None
    separate: bool = False  # q, k, v come from three projections
    compiled: bool = False
    by_row: bool = False  # over time, each token is a row
    cuda: bool = False
    temporal: bool = False  # exists over time only

    def build(self, view: str, heads: int) -> Callable[[list[Tensor]], Tensor]:
        """Returns the attention of [qkv], or of [q, k, v]."""
        if self.name == "triton":
            from benchmarks.candidates.temporal_kernel import packed_temporal_attention  # needs triton

            return lambda parts: packed_temporal_attention(parts[0], heads)

        def attend(parts: list[Tensor]) -> Tensor:
            q, k, v = parts if self.separate else parts[0].chunk(3, dim=-1)
            return ours.attend(q, k, v, "temporal, large" if self.by_row else view, heads)

        return torch.compile(attend, fullgraph=True) if self.compiled else attend

    @contextmanager
    def selected(self, device: torch.device) -> Iterator[None]:
        """Selects this kernel within the context."""
        before = dict(ours.BACKENDS)
        ours.choose("auto" if self.name == "triton" else self.name)
        if self.backend is not None:
            ours.BACKENDS[device.type] = [self.backend]
        try:
            yield
        finally:
            ours.BACKENDS.update(before)
            ours.choose("auto")


# The first is the reference. Add a kernel as a line.
CANDIDATES = {
    "fused": Candidate("fused"),
    "plain": Candidate("plain"),
    "fused, a row for each token": Candidate("fused", by_row=True, temporal=True),
    "fused, three projections": Candidate("fused", separate=True, temporal=True),
    "fused, cudnn": Candidate("fused", SDPBackend.CUDNN_ATTENTION, cuda=True),
    "fused, flash": Candidate("fused", SDPBackend.FLASH_ATTENTION, cuda=True),
    "fused, efficient": Candidate("fused", SDPBackend.EFFICIENT_ATTENTION, cuda=True),
    "plain, compiled": Candidate("plain", compiled=True, cuda=True),
    **({"triton": Candidate("triton", cuda=True, temporal=True)} if find_spec("triton") else {}),
}


def attention(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[Table]:
    """Yields a table for each precision, axis and batch."""
    sweep = timer.on_cuda and arguments.batch is None and not arguments.quick
    for precision in arguments.precision or (["bf16"] if timer.on_cuda else ["fp32", "bf16"]):
        for view in ("temporal", "spatial"):
            for batch in (8, 16, 32) if sweep else (workload.batch,):
                yield measure(workload.but({"batch": batch}), view, precision, timer)


def measure(workload: Workload, view: str, precision: str, timer: Timer) -> Table:
    """Returns the table of the attention in the workload's network."""
    size = workload.config().model.size
    tokens, width, heads = (workload.latent // size.patch_size) ** 2, size.hidden_size, size.num_heads
    shape = workload.batch, workload.frames, tokens
    device, dtype = timer.device, PRECISIONS[precision].autocast or torch.float32
    repeats = 20 if timer.on_cuda else 1  # on CUDA, calls are queued
    torch.manual_seed(0)
    qkv = torch.randn(*shape, 3 * width, device=device).to(dtype).requires_grad_()
    parts = [part.detach().clone().requires_grad_() for part in qkv.chunk(3, dim=-1)]
    grad = torch.randn(*shape, width, device=device).to(dtype)
    q, k, v = qkv[:1].detach().double().chunk(3, dim=-1)
    exact = ours.plain_attention(ours.Call(q, k, v, view, heads))

    def make(candidate: Candidate, backward: bool) -> Case:
        attend, inputs = candidate.build(view, heads), parts if candidate.separate else [qkv]

        def call() -> Tensor:
            with candidate.selected(device), torch.set_grad_enabled(backward):
                for _ in range(repeats):
                    out = attend(inputs)
                    if backward:
                        torch.autograd.grad(out, inputs, grad)
                return out.detach()

        error = float((call()[:1].double() - exact).norm() / exact.norm())
        return Case(call, repeats=repeats, cells={"error": error})

    supported, refused = {}, list[Row]()
    for name, candidate in CANDIDATES.items():
        if (candidate.cuda and not timer.on_cuda) or (candidate.temporal and view != "temporal"):
            continue
        try:
            make(candidate, True)
            supported[name] = candidate
        except RuntimeError as refusal:  # the kernel does not support the shape or type
            if isinstance(refusal, torch.OutOfMemoryError) or "CUDA error" in str(refusal):
                raise
            refused.append({"": f"{name}: not supported"})
    forward, rows = (
        timer.compare({name: partial(make, each, backward) for name, each in supported.items()}, ("ms", "ratio"))
        for backward in (False, True)
    )
    floor = 1e3 * 11 * qkv.numel() / 3 * qkv.element_size() / COPY  # q, k, v, out; then q, k, v, 3 gradients, out's
    for row, first in zip(rows, forward):
        row |= {"forward ms": first["ms"], "both ms": row["ms"], "floors": row["ms"] / floor if timer.on_cuda else None}
    text = f"{shape[0]} clips, {shape[1]} frames, {tokens} tokens, {heads} heads of {width // heads}."
    title = f"Over {'time' if view == 'temporal' else 'space'}, {precision}, batch {workload.batch}"
    return Table(title, text, ("forward ms", "both ms", "ratio", "floors", "error"), [*rows, *refused])
