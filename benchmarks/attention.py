"""Times attention alone, by kernel and shape: over time and space, forward and backward, with each kernel's error.

A kernel of benchmarks/candidates that beats `fused` over time at every batch size belongs in models/attention.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.build import PRECISIONS
from models import attention as ours

from .report import Table
from .timing import Case, Timer
from .workload import Workload

COPY = 4.3e12  # memory bandwidth of an H200 in bytes/s, the limit of memory-bound kernels (docs/attention.md)
SEPARATE = "fused, three projections"
Attend = Callable[[list[Tensor], str, int], Tensor]  # takes [qkv] or [q, k, v], the view, the number of heads


def by(kernel: Callable[[ours.Call], Tensor], view: str = "") -> Attend:
    """Returns attention with a kernel of models/attention.py, in `view` if given, else in the caller's."""

    def attend(parts: list[Tensor], given: str, heads: int) -> Tensor:
        q, k, v = parts if len(parts) == 3 else parts[0].chunk(3, dim=-1)
        return kernel(ours.Call(q, k, v, view or given, heads))

    return attend


def attend_by_backend(backend: SDPBackend, call: ours.Call) -> Tensor:
    """Computes torch's attention with one backend."""
    q, k, v = call.fold()
    with sdpa_kernel(backend):
        return call.unfold(functional.scaled_dot_product_attention(q, k, v))


def list_candidates(view: str, on_cuda: bool) -> dict[str, Attend]:
    """Returns the kernels to time for a view and a device, by name; the first is the reference. Add kernels here."""
    found = {"fused": by(ours.fused_attention), "plain": by(ours.plain_attention)}
    if view == "temporal":
        found["fused, a row for each token"] = by(ours.fused_attention, "temporal, large")
        found[SEPARATE] = found["fused"]
    if on_cuda:
        for name in ("CUDNN", "FLASH", "EFFICIENT"):
            backend = getattr(SDPBackend, f"{name}_ATTENTION")
            found[f"fused, {name.lower()}"] = by(partial(attend_by_backend, backend))
        found["plain, compiled"] = by(torch.compile(ours.plain_attention, fullgraph=True))
        if view == "temporal" and find_spec("triton"):
            from benchmarks.candidates.temporal_kernel import packed_temporal_attention

            found["triton"] = lambda parts, given, heads: packed_temporal_attention(parts[0], heads)
    return found


def attention(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[Table]:
    """Yields a table for each precision, axis and batch."""
    sweep = timer.on_cuda and arguments.batch is None and not arguments.quick
    precisions = arguments.precision or (["bf16"] if timer.on_cuda else ["fp32", "bf16"])
    batches = (8, 16, 32) if sweep else (workload.batch,)
    for precision, view, batch in product(precisions, ("temporal", "spatial"), batches):
        yield measure(workload.but({"batch": batch}), view, precision, timer)


def measure(workload: Workload, view: str, precision: str, timer: Timer) -> Table:
    """Returns the table of the attention in the workload's network, over time or space (`view`)."""
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

    def make(name: str, attend: Attend, backward: bool) -> Case:
        """Returns the case of a forward pass, or of both passes, with the output's error."""
        inputs = parts if name == SEPARATE else [qkv]

        def call() -> Tensor:
            """Returns the output of the last of `repeats` passes."""
            with torch.set_grad_enabled(backward):
                for _ in range(repeats):
                    out = attend(inputs, view, heads)
                    if backward:
                        torch.autograd.grad(out, inputs, grad)
                return out.detach()

        try:
            error = float((call()[:1].double() - exact).norm() / exact.norm())
        except RuntimeError as refusal:
            if isinstance(refusal, torch.OutOfMemoryError) or "CUDA error" in str(refusal):
                raise
            raise NotImplementedError(f"{name} does not support the shape or type") from refusal
        return Case(call, repeats=repeats, cells={"error": error})

    candidates = list_candidates(view, timer.on_cuda).items()
    forward, rows = (
        timer.compare({name: partial(make, name, each, backward) for name, each in candidates}, ("ms", "ratio"))
        for backward in (False, True)
    )
    milliseconds = {row[""]: row.get("ms") for row in forward}
    floor = (
        1e3 * 11 * qkv.numel() / 3 * qkv.element_size() / COPY
    )  # forward q, k, v, out; backward q, k, v, 4 gradients
    for row in rows:
        row["forward ms"], row["both ms"] = milliseconds.get(row[""]), row.get("ms")
        row["floors"] = row["ms"] / floor if timer.on_cuda and "ms" in row else None
    text = f"{shape[0]} clips, {shape[1]} frames, {tokens} tokens, {heads} heads of {width // heads}."
    title = f"Over {'time' if view == 'temporal' else 'space'}, {precision}, batch {workload.batch}"
    return Table(title, text, ("forward ms", "both ms", "ratio", "floors", "error"), rows)
