"""Peak memory of a training step, each kind in a process of its own.

On the CPU it is what the resident set rises to above what it was before the network was made, with
`MALLOC_MMAP_THRESHOLD_=65536`: freed memory then goes back to the system at once, as a GPU's caching allocator uses it
again; by default glibc keeps up to twice of what is in use. On CUDA it is what torch allocated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import report

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}
# name -> keys of ours, or None for the reference in the same precision
KINDS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "reference,fp32": ("fp32", None),
    "ours,fp32": ("fp32", {}),
    "ours,fp32,compiled": ("fp32", {"train.compile": True}),
    "ours,fp32,recomputing": ("fp32", {"train.compile": True, "model.gradient_checkpointing": True}),
    "reference,bf16": ("bf16", None),
    "ours,bf16": ("bf16", {}),
    "ours,bf16,compiled": ("bf16", {"train.compile": True}),
}


def measure(problem: dict[str, Any], device: str, kinds: list[str] | None = None) -> report.Section:
    """The table; `problem` holds the fields of a Workload."""
    peaks = {name: peak_of(problem, device, *KINDS[name]) for name in kinds or KINDS}
    rows = []
    for name, peak in peaks.items():
        reference = peaks.get(f"reference,{KINDS[name][0]}")
        share = peak / reference if reference and peak else None
        rows.append({"": name, "peak GB": peak and peak / 1e9, "of the reference": share})
    how = " ".join((__doc__ or "").split("\n\n")[1].split())
    return report.Section(
        "Peak memory of a training step", f"{how} Weights, gradients, moments, average and one step's activations.",
        {"": "", "peak GB": ".3f", "of the reference": ".2f"}, rows,
    )  # fmt: skip


def peak_of(problem: dict[str, Any], device: str, precision: str, keys: dict[str, Any] | None) -> float | None:
    """Bytes; None where the GPU has too little for it. OSError with the last line of what else went wrong."""
    asked = {**problem, "keys": {"train.precision": precision, **(keys or {})}}
    argv = [sys.executable, "-m", "benchmarks.memory", json.dumps([asked, device, keys is None])]
    done = subprocess.run(argv, cwd=report.ROOT, env={**os.environ, **MALLOC}, capture_output=True, text=True)
    if done.returncode:
        if "OutOfMemoryError" in done.stderr:
            return None
        raise OSError(f"measuring memory failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return float(done.stdout.split()[-1])


def peak_here(problem: dict[str, Any], device_name: str, plain: bool) -> int:
    """Of one step after the optimiser has its moments, in this process."""
    import torch

    from .workload import Ours, Theirs, Workload, pair_of

    device = torch.device(device_name)
    torch.randn(64, 64, device=device) @ torch.randn(64, 64, device=device)  # libraries are loaded at the first product
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
    """VmRSS (now) or VmHWM (at most) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, write."""
    from dataclasses import asdict

    from .train import asked

    workload, device = asked(arguments)
    for name in arguments.kind or []:
        if name not in KINDS:
            raise ValueError(f"--kind {name} is unknown: use {' '.join(KINDS)}.")
    section = measure({**asdict(workload), "keys": {}}, device.type, arguments.kind)
    report.write("memory", "Memory", f"{workload}.", [section], arguments.out, device.type)


if __name__ == "__main__":
    sys.stdout.write(f"{peak_here(*json.loads(sys.argv[1]))}\n")
