"""Peak memory of a training step, each kind in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import report
from .workload import MODES, Ours, Theirs, Workload, pair_of, read_problem

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}
# name -> precision, and the mode of ours or None for the reference
KINDS: dict[str, tuple[str, str | None]] = {
    "reference,fp32": ("fp32", None),
    "ours,fp32": ("fp32", "eager"),
    "ours,fp32,compiled": ("fp32", "compiled"),
    "ours,fp32,recomputing": ("fp32", "recomputing"),
    "reference,bf16": ("bf16", None),
    "ours,bf16": ("bf16", "eager"),
    "ours,bf16,compiled": ("bf16", "compiled"),
}
ABOUT = (
    "On the CPU it is the rise of the resident set above its size before the network was made, with "
    "`MALLOC_MMAP_THRESHOLD_=65536`: freed memory then goes back to the system at once, as a GPU's caching allocator "
    "uses it again; by default glibc keeps up to twice the memory in use. On CUDA it is what torch allocated. Weights, "
    "gradients, moments, average and one step's activations."
)


def measure(workload: Workload, device: str, kinds: list[str] | None = None) -> report.Section:
    """Returns the table."""
    peaks = {name: peak_of(workload, device, *KINDS[name]) for name in kinds or KINDS}
    rows = []
    for name, peak in peaks.items():
        reference = peaks.get(f"reference,{KINDS[name][0]}")
        share = peak / reference if reference and peak else None
        rows.append({"": name, "peak GB": peak and peak / 1e9, "of the reference": share})
    columns = {"": "", "peak GB": ".3f", "of the reference": ".2f"}
    return report.Section("Peak memory of a training step", ABOUT, columns, rows)


def peak_of(workload: Workload, device: str, precision: str, mode: str | None) -> float | None:
    """Returns the peak in bytes of a process of its own; None if the GPU has too little memory.

    Raises: OSError with the last line of any other failure.
    """
    keys = {"train.precision": precision, **MODES[mode or "eager"]}
    problem = json.dumps([{**asdict(workload), "keys": keys}, device, mode is None])
    argv = [sys.executable, "-m", "benchmarks.memory", problem]
    done = subprocess.run(argv, cwd=report.ROOT, env={**os.environ, **MALLOC}, capture_output=True, text=True)
    if done.returncode:
        if "OutOfMemoryError" in done.stderr:
            return None
        raise OSError(f"measuring memory failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return float(done.stdout.split()[-1])


def peak_here(problem: dict[str, Any], device_name: str, plain: bool) -> int:
    """Returns the peak of one step in this process, once the optimiser has its moments."""
    device = torch.device(device_name)
    torch.randn(64, 64, device=device) @ torch.randn(64, 64, device=device)  # loads libraries
    before = _resident("VmRSS")
    workload = Workload(**problem)
    with tempfile.TemporaryDirectory() as folder:
        subject: Ours | Theirs
        if plain:
            subject = Theirs(workload, pair_of(workload, device)[0], device)
            optimizer = subject.training.optimizer
        else:
            subject = Ours(workload, Path(folder), device)
            optimizer = subject.trainer.state.optimizer
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        optimizer.zero_grad()
        subject.step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    """Returns VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints and writes the table."""
    workload, timer = read_problem(arguments)
    for name in arguments.kind or []:
        if name not in KINDS:
            raise ValueError(f"--kind {name} is unknown: use {' '.join(KINDS)}.")
    section = measure(workload, timer.device.type, arguments.kind)
    report.write("memory", "Memory", f"{workload}.", [section], arguments.out, timer.device)


if __name__ == "__main__":
    sys.stdout.write(f"{peak_here(*json.loads(sys.argv[1]))}\n")
