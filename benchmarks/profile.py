"""Profiles a training step: time and bound of each operator, and host synchronisations."""

from __future__ import annotations

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from .report import Table
from .timing import Case, Row, Timer
from .workload import MODES, REFERENCE, Workload, make_case

SHOWN = 15  # operators in the table
HEADS = ("calls", "ms", "share", "bound", "of the roof")
# names of host synchronisations and of copies between host and device in a trace
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "cudaStreamSynchronize", "cudaDeviceSynchronize",
         "cudaEventSynchronize")  # fmt: skip
COPIES = ("Memcpy HtoD", "Memcpy DtoH")


class Roof(NamedTuple):
    """Peak FLOP/s and bytes/s measured on the machine."""

    flops: float
    bandwidth: float


def profile(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[Table]:
    """Yields, for each precision, tables of the operators of our steps and of the reference's, and of waits."""
    for precision in arguments.precision or ("fp32", "bf16"):
        base = workload.but({"train.precision": precision})
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        roof = roof_of(timer, dtype, arguments.quick)
        text = "Device values read by the host, synchronisations, and copies between host and device, in the trace."
        waits = Table(f"What the host waits for in a step, {precision}", text, ("waits", *COPIES))
        for name, changes in {"compiled": MODES["compiled"], "eager": {}, "reference": REFERENCE}.items():
            file = arguments.traces / f"{name}-{precision}-{timer.device.type}.json"
            trace = trace_of(make_case(base.but(changes), timer.device).call, timer, file)
            counts = {event.key: event.count for event in trace.key_averages()}
            copies = {kind: sum(count for key, count in counts.items() if key.startswith(kind)) for kind in COPIES}
            waits.rows.append({"": name, "waits": sum(counts.get(wait, 0) for wait in WAITS), **copies})
            text = (
                f"{base}, {precision}. Roofs measured in this run: {roof.flops / 1e12:.2f} TFLOP/s, "
                f"{roof.bandwidth / 1e9:.0f} GB/s. `of the roof`: share of its time that the operator would take at "
                f"these rates; `host`: bound by neither. The trace is {file}."
            )
            rows = operators(trace, roof, dtype.itemsize, timer.on_cuda)
            yield Table(f"Operators of a step, {precision}, {name}", text, HEADS, rows)
        if timer.on_cuda:  # a CPU never waits; tests/test_engine_waits.py counts potential waits
            yield waits


def roof_of(timer: Timer, dtype: torch.dtype, quick: bool) -> Roof:
    """Measures the roofs on random values, because zeros are faster."""
    side, length = (256, 2**20) if quick else (8192, 2**28) if timer.on_cuda else (1024, 2**25)
    a, b = (torch.randn(side, side, device=timer.device).to(dtype) for _ in range(2))
    source = torch.randn(length, device=timer.device)
    target = torch.empty_like(source)
    calls = {"product": lambda: Case(lambda: a @ b), "copy": lambda: Case(lambda: target.copy_(source))}
    product, copy = Timer(timer.device, rounds=5).compare(calls, ("least s",))
    return Roof(2 * side**3 / product["least s"], 2 * source.nbytes / copy["least s"])


def trace_of(step: Callable[[], Any], timer: Timer, file: Path | None = None) -> torch_profile:
    """Profiles one step after two warm-up steps; writes `file` for chrome://tracing or Perfetto."""
    for _ in range(2):
        step()
    timer.wait()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if timer.on_cuda else [])]
    with torch_profile(activities=activities, record_shapes=True, with_flops=True, acc_events=True) as trace:
        step()
        timer.wait()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(file))
    return trace


def operators(trace: torch_profile, roof: Roof, item_bytes: int, on_device: bool) -> list[Row]:
    """Returns a row for each operator, longest first: calls, own time, share, bound, and fraction of the roof."""
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    for event in trace.key_averages(group_by_input_shape=True):
        if event.device_type != DeviceType.CPU:
            continue  # a kernel, whose time is counted in the operator that launched it
        own = event.self_device_time_total if on_device else event.self_cpu_time_total
        name = re.sub(r"## Call CompiledFxGraph \w+ ##", "compiled graph", event.key).removeprefix("aten::")
        shapes = [shape for shape in event.input_shapes if shape and all(isinstance(side, int) for side in shape)]
        sizes = [int(torch.Size(shape).numel()) for shape in shapes]
        values = sum(sizes) + max(sizes, default=0)  # all arguments, and an output as large as the largest
        totals[name] += Counter(calls=event.count, us=own, flop=event.flops or 0)
        totals[name]["bytes"] += event.count * item_bytes * values
    whole = sum(entry["us"] for entry in totals.values()) or 1.0
    rows = []
    for name, entry in sorted(totals.items(), key=lambda pair: -pair[1]["us"])[:SHOWN]:
        if seconds := entry["us"] / 1e6:
            compute, memory = entry["flop"] / roof.flops, entry["bytes"] / roof.bandwidth
            bound = "compute" if compute > memory else "memory" if memory else "host"
            reached = max(compute, memory) / seconds if bound != "host" else None
            shares = {"share": entry["us"] / whole, "bound": bound, "of the roof": reached}
            rows.append({"": name, "calls": entry["calls"], "ms": 1e3 * seconds, **shares})
    return rows
