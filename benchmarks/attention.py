"""Attention alone, by kernel and shape: over time and space, forward and backward, with the error of each.

A kernel of benchmarks/candidates that is faster than `fused` over time at every batch belongs in models/attention.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from models import attention

from . import report
from .timing import Call, Case, Timer, compare
from .workload import PRECISIONS, Workload, read_problem

COPY = 4.3e12  # bytes/s that an H200 reads and writes: the floor of memory-bound kernels (docs/attention.md)
SWEEP = (8, 16, 32)
COLUMNS = {"": "", "forward ms": ".3f", "both ms": ".3f", "ratio": ".2f", "floors": ".1f", "error": ".0e"}
ABOUT = """
`both` is forward and backward, from the packed projection to its gradient; `ratio` is how many times as fast as
`fused`, the median over rounds; `floors` is the time over that of moving each number once at 4.3 TB/s; `error` is that
of the output, relative, to float64. `three projections` omits the extra cost of these.
"""
Attend = Callable[[list[Tensor]], Tensor]  # takes [qkv], or [q, k, v]


class Shape(NamedTuple):
    """Shape of one call: `(batch, frames, tokens, 3 x heads x head_width)`."""

    batch: int
    frames: int
    tokens: int
    heads: int
    head_width: int

    @classmethod
    def of(cls, workload: Workload, batch: int) -> Shape:
        """Returns the shape in the workload's network."""
        size = workload.config(Path()).model.size
        tokens = (workload.latent // size.patch_size) ** 2
        return cls(batch, workload.frames, tokens, size.num_heads, size.hidden_size // size.num_heads)


class Candidate(NamedTuple):
    """A way to compute attention: a name of `models.attention.KERNELS` or "triton", and options."""

    name: str
    view: str
    backend: SDPBackend | None = None
    separate: bool = False  # q, k, v come from three projections
    compiled: bool = False

    def build(self, heads: int) -> Attend:
        """Returns the function to be timed."""
        if self.name == "triton":
            from benchmarks.candidates.temporal_kernel import packed_temporal_attention  # needs triton

            return lambda parts: packed_temporal_attention(parts[0], heads)

        def attend(parts: list[Tensor]) -> Tensor:
            q, k, v = parts if self.separate else parts[0].chunk(3, dim=-1)
            return attention.attend(q, k, v, self.view, heads)

        return torch.compile(attend, fullgraph=True) if self.compiled else attend

    @contextmanager
    def selected(self, device: torch.device) -> Iterator[None]:
        """Selects this kernel within the context."""
        before = dict(attention.BACKENDS)
        attention.choose("auto" if self.name == "triton" else self.name)
        if self.backend is not None:
            attention.BACKENDS[device.type] = [self.backend]
        try:
            yield
        finally:
            attention.BACKENDS.update(before)
            attention.choose("auto")


def candidates(view: str, on_cuda: bool) -> dict[str, Candidate]:
    """Returns all candidates for a device by name; the first is the reference."""
    found = {"fused": Candidate("fused", view), "plain": Candidate("plain", view)}
    if view == "temporal":
        found["fused, a row for each token"] = Candidate("fused", "temporal, large")
        found["fused, three projections"] = Candidate("fused", view, separate=True)
    if on_cuda:
        for backend in ("CUDNN", "FLASH", "EFFICIENT"):
            one = getattr(SDPBackend, f"{backend}_ATTENTION")
            found[f"fused, {backend.lower()}"] = Candidate("fused", view, backend=one)
        found["plain, compiled"] = Candidate("plain", view, compiled=True)
        if view == "temporal" and find_spec("triton") is not None:
            found["triton"] = Candidate("triton", view)
    return found


def measure(shape: Shape, view: str, precision: str, timer: Timer) -> report.Section:
    """Returns the table of one shape."""
    device, dtype = timer.device, PRECISIONS[precision][1] or torch.float32
    width, repeats = shape.heads * shape.head_width, 20 if timer.on_cuda else 1  # on CUDA, calls are queued
    torch.manual_seed(0)
    qkv = torch.randn(*shape[:3], 3 * width, device=device).to(dtype).requires_grad_()
    parts = [part.detach().clone().requires_grad_() for part in qkv.chunk(3, dim=-1)]
    grad = torch.randn(*shape[:3], width, device=device).to(dtype)
    q, k, v = qkv[:1].detach().double().chunk(3, dim=-1)
    exact = attention.plain_attention(attention.Call(q, k, v, view, shape.heads))
    forwards: list[Case] = []
    steps: list[Case] = []
    refused: list[dict[str, Any]] = []
    for name, candidate in candidates(view, timer.on_cuda).items():
        forward, both = _calls(candidate, parts if candidate.separate else [qkv], grad, shape.heads, repeats)
        try:
            out = both()
        except RuntimeError as refusal:  # the kernel does not support the shape or type
            if isinstance(refusal, torch.OutOfMemoryError) or "CUDA error" in str(refusal):
                raise
            refused.append({"": f"{name}: not supported"})
            continue
        error = float((out[:1].double() - exact).norm() / exact.norm())
        forwards.append(Case(name, forward, repeats=repeats))
        steps.append(Case(name, both, repeats=repeats, cells={"error": error}))
    timer = replace(timer, warmup=2)
    compare(forwards, (), timer)
    rows = compare(steps, COLUMNS, timer)
    floor = 11 * qkv.numel() / 3 * qkv.element_size() / COPY  # q, k, v, out; then q, k, v, their gradients, out's
    for row, first, both_case in zip(rows, forwards, steps):
        row |= {"forward ms": 1e3 * first.seconds, "both ms": 1e3 * both_case.seconds}
        row["floors"] = both_case.seconds / floor if timer.on_cuda else None
    text = (
        f"{shape.batch} clips, {shape.frames} frames, {shape.tokens} tokens, {shape.heads} heads of {shape.head_width}."
    )
    axis = "time" if view == "temporal" else "space"
    return report.Section(f"Over {axis}, {precision}, batch {shape.batch}", text, COLUMNS, [*rows, *refused])


def _calls(candidate: Candidate, inputs: list[Tensor], grad: Tensor, heads: int, repeats: int) -> tuple[Call, Call]:
    """Returns the forward pass, and the forward and backward pass; both return the output."""
    attend = candidate.build(heads)

    @torch.no_grad()
    def forward() -> Tensor:
        with candidate.selected(grad.device):
            for _ in range(repeats):
                out = attend(inputs)
            return out

    def both() -> Tensor:
        with candidate.selected(grad.device):
            for _ in range(repeats):
                out = attend(inputs)
                torch.autograd.grad(out, inputs, grad)
            return out.detach()

    return forward, both


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints and writes the tables."""
    workload, timer = read_problem(arguments)
    sweep = timer.on_cuda and arguments.batch is None and not arguments.quick
    sections = []
    for precision in arguments.precision or (["bf16"] if timer.on_cuda else ["fp32", "bf16"]):
        for view in ("temporal", "spatial"):
            for batch in SWEEP if sweep else (workload.batch,):
                sections.append(measure(Shape.of(workload, batch), view, precision, timer))
                torch.compiler.reset()
    report.write("attention", "Attention alone", ABOUT, sections, arguments.out, timer.device)
