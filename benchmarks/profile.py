"""Profile of a training step: time and bound of each operator, and host synchronisations."""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from . import report
from .timing import Timer
from .workload import Ours, Theirs, Workload, read_problem

SHOWN = 15  # operators in the table
# names of host synchronisations and of copies between host and device in a trace
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "cudaStreamSynchronize", "cudaDeviceSynchronize",
         "cudaEventSynchronize")  # fmt: skip
COPIES = ("Memcpy HtoD", "Memcpy DtoH")
ABOUT = """
The bound is a roofline's: an operator whose FLOP per byte are above what the machine can do of both is bound by
arithmetic, else by memory. FLOP are torch's own count, bytes those of its arguments and an output, each once; the roofs
are measured in the same run, as a large product and a large copy.
"""


class Roof(NamedTuple):
    """Highest FLOP/s and bytes/s of the machine."""

    flops: float
    bandwidth: float


def roof_of(device: torch.device, dtype: torch.dtype, quick: bool = False) -> Roof:
    """Measures the roofs, on random values, as zeros are faster."""
    side = 256 if quick else 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.randn(2**20 if quick else 2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], Any]] = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    found = Timer(device, rounds=5, warmup=2).time(calls)
    return Roof(2 * side**3 / found["product"].least, 2 * source.nbytes / found["copy"].least)


def trace_of(step: Callable[[], Any], device: torch.device, file: Path | None = None) -> profile:
    """Profiles one step after two others; writes `file` for chrome://tracing or Perfetto."""
    timer = Timer(device)
    for _ in range(2):
        step()
    timer.wait()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, record_shapes=True, with_flops=True, acc_events=True) as trace:
        step()
        timer.wait()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        trace.export_chrome_trace(str(file))
    return trace


def operators(trace: profile, roof: Roof, item_bytes: int, on_device: bool) -> list[dict[str, Any]]:
    """Returns a row for each operator, longest first: calls, own time, share, bound, and fraction of the roof."""
    totals: dict[str, dict[str, float]] = {}
    for event in trace.key_averages(group_by_input_shape=True):
        if event.device_type != DeviceType.CPU:
            continue  # a kernel; the operator that launched it has the same time
        own = event.self_device_time_total if on_device else event.self_cpu_time_total
        name = re.sub(r"## Call CompiledFxGraph \w+ ##", "compiled graph", event.key)
        entry = totals.setdefault(name, {"calls": 0, "us": 0.0, "flop": 0.0, "bytes": 0.0})
        entry["calls"] += event.count
        entry["us"] += own
        entry["flop"] += event.flops or 0
        entry["bytes"] += event.count * item_bytes * _values(event.input_shapes)
    whole = sum(entry["us"] for entry in totals.values()) or 1.0
    longest = sorted(totals.items(), key=lambda pair: -pair[1]["us"])[:SHOWN]
    return [_operator(name, entry, whole, roof) for name, entry in longest if entry["us"]]


def _operator(name: str, entry: dict[str, float], whole: float, roof: Roof) -> dict[str, Any]:
    seconds = entry["us"] / 1e6
    compute, memory = entry["flop"] / roof.flops, entry["bytes"] / roof.bandwidth
    bound = "compute" if compute > memory else "memory" if memory else "host"
    return {
        "": name.removeprefix("aten::"),
        "calls": int(entry["calls"]),
        "ms": 1e3 * seconds,
        "share": entry["us"] / whole,
        "bound": bound,
        "of the roof": max(compute, memory) / seconds if bound != "host" else None,
    }


def _values(shapes: list[Any]) -> int:
    """Counts the values of all arguments, and of an output as large as the largest."""
    sizes = [int(torch.Size(shape).numel()) for shape in shapes if shape and all(isinstance(n, int) for n in shape)]
    return sum(sizes) + max(sizes, default=0)


def count_waits(trace: profile) -> dict[str, int]:
    """Counts the host synchronisations and the copies between host and device in the trace."""
    counts = {event.key: event.count for event in trace.key_averages()}
    waited = sum(counts.get(name, 0) for name in WAITS)
    crossed = {name: sum(count for key, count in counts.items() if key.startswith(name)) for name in COPIES}
    return {"waits": waited, **crossed}


def measure(
    problems: Mapping[str, Workload], device: torch.device, traces: Path, quick: bool = False
) -> list[report.Section]:
    """Returns tables of the operators of our steps (by name) and of the reference's, and of synchronisations."""
    workload = next(iter(problems.values()))
    precision = str(workload.keys.get("train.precision", "fp32"))
    half = precision == "bf16"
    roof = roof_of(device, torch.bfloat16 if half else torch.float32, quick)
    sections: list[report.Section] = []
    waiting: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        subjects: dict[str, Ours | Theirs] = {
            name: Ours(problem, Path(folder), device) for name, problem in problems.items()
        }
        subjects["reference"] = Theirs(workload, cast(Ours, next(iter(subjects.values()))).model, device)
        for name, subject in subjects.items():
            file = traces / f"{name}-{precision}-{device.type}.json"
            trace = trace_of(subject.step, device, file)
            rows = operators(trace, roof, 2 if half else 4, device.type == "cuda")
            waiting.append({"": name, **count_waits(trace)})
            text = (
                f"{workload}, {precision}. Roofs measured in this run: {roof.flops / 1e12:.2f} TFLOP/s, "
                f"{roof.bandwidth / 1e9:.0f} GB/s. `of the roof`: how much of its time the operator would take at "
                f"these; `host` is neither. The trace is {file}."
            )
            columns = {"": "", "calls": "", "ms": ".2f", "share": ".1%", "bound": "", "of the roof": ".0%"}
            sections.append(report.Section(f"Operators of a step, {precision}, {name}", text, columns, rows))
    if device.type != "cuda":  # nothing waits here; tests/test_engine_waits.py counts potential waits
        return sections
    columns = {"": "", "waits": "", "Memcpy HtoD": "", "Memcpy DtoH": ""}
    text = "Reads of a device's number by the host, synchronisations, and copies between the two, in the trace."
    return [*sections, report.Section("What the host waits for in a step", text, columns, waiting)]


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints and writes the tables."""
    workload, timer = read_problem(arguments)
    sections: list[report.Section] = []
    for precision in arguments.precision or ["fp32", "bf16"]:
        base = workload.and_keys(train__precision=precision)
        named = {mode: base.with_mode(mode) for mode in arguments.mode}
        sections += measure(named, timer.device, arguments.traces, arguments.quick)
    report.write("profile", "Where a training step's time goes", ABOUT, sections, arguments.out, timer.device)
