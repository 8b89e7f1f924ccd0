"""Attention alone, by kernel and shape: over time, over space, forward and backward, each with its error.

A kernel of benchmarks/candidates that is ahead of `fused` over time at every batch belongs into models/attention.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from models import attention

from . import report
from .timing import Call, interleaved
from .train import asked
from .workload import PRECISIONS, Workload

COPY = 4.3e12  # bytes/s that an H200 reads and writes: the floor of what waits for memory (docs/attention.md)
SWEEP = (8, 16, 32)
COLUMNS = {"": "", "forward ms": ".3f", "both ms": ".3f", "ratio": ".2f", "floors": ".1f", "error": ".0e"}


class Shape(NamedTuple):
    """Of one call: `(batch, frames, tokens, 3 x heads x head_width)`."""

    batch: int
    frames: int
    tokens: int
    heads: int
    head_width: int

    @classmethod
    def of(cls, workload: Workload, batch: int) -> Shape:
        """In the workload's network."""
        size = workload.config(Path()).model.size
        tokens = (workload.latent // size.patch_size) ** 2
        return cls(batch, workload.frames, tokens, size.num_heads, size.hidden_size // size.num_heads)


Attend = Callable[[list[Tensor]], Tensor]  # of [qkv], or of [q, k, v]


class Candidate(NamedTuple):
    """One way to compute it: `name` of `models.attention.KERNELS` or "triton", and what else is different about it."""

    name: str
    view: str
    backend: SDPBackend | None = None
    separate: bool = False  # q, k, v come from three projections
    compiled: bool = False

    def build(self, heads: int) -> Attend:
        """The function to be timed."""
        if self.name == "triton":
            from benchmarks.candidates.temporal_kernel import packed_temporal_attention

            return lambda parts: packed_temporal_attention(parts[0], heads)

        def attend(parts: list[Tensor]) -> Tensor:
            q, k, v = parts if self.separate else parts[0].chunk(3, dim=-1)
            return attention.attend(q, k, v, self.view, heads)

        return torch.compile(attend, fullgraph=True) if self.compiled else attend

    @contextmanager
    def chosen(self, device: torch.device) -> Iterator[None]:
        """Let attention be computed in this way."""
        before = dict(attention.BACKENDS)
        attention.choose("auto" if self.name == "triton" else self.name)
        if self.backend is not None:
            attention.BACKENDS[device.type] = [self.backend]
        try:
            yield
        finally:
            attention.BACKENDS.update(before)
            attention.choose("auto")


def candidates(view: str, device: torch.device) -> dict[str, Candidate]:
    """All that may be worth a comparison on `device`; the first is what the others are compared with."""
    found = {"fused": Candidate("fused", view), "plain": Candidate("plain", view)}
    if view == "temporal":
        found["fused, a row for each token"] = Candidate("fused", "temporal, large")
        found["fused, three projections"] = Candidate("fused", view, separate=True)
    if device.type == "cuda":
        for backend in ("CUDNN", "FLASH", "EFFICIENT"):
            one = getattr(SDPBackend, f"{backend}_ATTENTION")
            found[f"fused, {backend.lower()}"] = Candidate("fused", view, backend=one)
        found["plain, compiled"] = Candidate("plain", view, compiled=True)
        if view == "temporal" and find_spec("triton") is not None:
            found["triton"] = Candidate("triton", view)
    return found


def measure(
    shape: Shape, view: str, precision: str, arguments: argparse.Namespace, device: torch.device
) -> report.Section:
    """The table of one shape."""
    dtype = PRECISIONS[precision][1] or torch.float32
    width = shape.heads * shape.head_width
    torch.manual_seed(0)
    qkv = torch.randn(*shape[:3], 3 * width, device=device).to(dtype).requires_grad_()
    parts = [part.detach().clone().requires_grad_() for part in qkv.chunk(3, dim=-1)]
    grad = torch.randn(*shape[:3], width, device=device).to(dtype)
    q, k, v = qkv[:1].detach().double().chunk(3, dim=-1)
    exact = attention.plain_attention(attention.Call(q, k, v, view, shape.heads))
    forwards: dict[str, Call] = {}
    steps: dict[str, Call] = {}
    errors: dict[str, float | None] = {}
    for name, candidate in candidates(view, device).items():
        inputs = parts if candidate.separate else [qkv]
        forward, both = _calls(candidate, inputs, grad, shape.heads, device)
        try:
            out = both()
        except RuntimeError as refusal:  # a kernel that cannot take the shape, or the type
            if isinstance(refusal, torch.OutOfMemoryError) or "CUDA error" in str(refusal):
                raise
            errors[name] = None
            continue
        errors[name] = float((out[:1].double() - exact).norm() / exact.norm())
        forwards[name], steps[name] = forward, both
    timing = {"rounds": arguments.rounds, "clock": arguments.clock, "device": device, "warmup": 2}
    first, whole = interleaved(forwards, **timing), interleaved(steps, **timing)
    floor = 11 * qkv.numel() / 3 * qkv.element_size() / COPY  # q, k, v, out; then q, k, v, their gradients, out's
    rows: list[dict[str, Any]] = []
    for name, error in errors.items():
        if error is None:
            rows.append({"": f"{name}: does not take it"})
            continue
        both_s = whole[name].median / _times(device)
        rows.append(
            {
                "": name,
                "forward ms": 1e3 * first[name].median / _times(device),
                "both ms": 1e3 * both_s,
                "ratio": whole[name].times_as_fast_as(whole["fused"]),
                "floors": both_s / floor if device.type == "cuda" else None,
                "error": error,
                **whole[name].to_json(),
            }
        )
    text = (
        f"{shape.batch} clips, {shape.frames} frames, {shape.tokens} tokens, {shape.heads} heads of {shape.head_width}."
    )
    axis = "time" if view == "temporal" else "space"
    return report.Section(f"Over {axis}, {precision}, batch {shape.batch}", text, COLUMNS, rows)


def _times(device: torch.device) -> int:
    """Calls in one measurement: on CUDA they are queued one behind the other."""
    return 20 if device.type == "cuda" else 1


def _calls(
    candidate: Candidate, inputs: list[Tensor], grad: Tensor, heads: int, device: torch.device
) -> tuple[Call, Call]:
    """The forward pass, and the forward and backward pass; each returns the output."""
    attend = candidate.build(heads)

    @torch.no_grad()
    def forward() -> Tensor:
        with candidate.chosen(device):
            for _ in range(_times(device)):
                out = attend(inputs)
            return out

    def both() -> Tensor:
        with candidate.chosen(device):
            for _ in range(_times(device)):
                out = attend(inputs)
                torch.autograd.grad(out, inputs, grad)
            return out.detach()

    return forward, both


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, write."""
    workload, device = asked(arguments)
    sweep = device.type == "cuda" and arguments.batch is None and not arguments.quick
    sections = []
    for precision in arguments.precision or (["bf16"] if device.type == "cuda" else ["fp32", "bf16"]):
        for view in ("temporal", "spatial"):
            for batch in SWEEP if sweep else (workload.batch,):
                sections.append(measure(Shape.of(workload, batch), view, precision, arguments, device))
                torch.compiler.reset()
    text = (
        "`both` is forward and backward, from the packed projection to its gradient; `ratio` is how many times as fast "
        "as `fused`, the median over rounds; `floors` is the time over that of moving each number once at 4.3 TB/s; "
        "`error` is that of the output, relative, to float64. `three projections` leaves out what these cost more."
    )
    report.write("attention", "Attention alone", text, sections, arguments.out, device.type)
