"""The training step and the forward pass: the project's against the reference's, with the same weights and inputs."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import report
from .modes import MODES
from .timing import Call, Timing, interleaved
from .workload import Ours, Theirs, Workload, difference, forward_of, pair_of, teraflops

COLUMNS = {
    "": "",
    "median s": ".2f",
    "least s": ".2f",
    "spread": ".0%",
    "ratio": ".2f",
    "videos/s": ".3f",
    "TFLOP/s": ".3f",
}


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, write."""
    workload, device = asked(arguments)
    sections = [
        measure(workload.and_keys(train__precision=precision), part, arguments, device)
        for precision in arguments.precision or ["fp32", "bf16"]
        for part in arguments.part
    ]
    text = (
        "The reference is the official algorithm at the official code's cost (`benchmarks/reference.py`), computed in "
        "the same precision; the official code itself computes in fp32, which tables in other precisions show in a row "
        "of its own. All rows of a table were timed in turn, in one process, on the same weights; `ratio` is how many "
        "times as fast as the reference, the median over rounds."
    )
    report.write("train", "Training step and forward pass", text, sections, arguments.out, device.type)


def asked(arguments: argparse.Namespace, **on_cpu: Any) -> tuple[Workload, torch.device]:
    """What the command line names, else `on_cpu` there, else the defaults. ValueError for what cannot be."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no such device; use cpu.")
    given = {name: getattr(arguments, name, None) for name in ("size", "batch", "frames", "latent")}
    threads = getattr(arguments, "threads", None)
    for name, value in {**given, "rounds": getattr(arguments, "rounds", None), "threads": threads}.items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"--{name} must be at least 1, not {value}.")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if threads:
        torch.set_num_threads(threads)
    sizes = [name for name, value in given.items() if value is not None]
    if arguments.quick and sizes:
        raise ValueError(f"--quick takes tiny sizes of its own: leave --{sizes[0]} out.")
    if arguments.quick:
        return Workload("tiny", batch=1, frames=2, latent=8), device
    defaults = {"size": "Latte-XL/2"} if device.type == "cuda" else {"size": "Latte-S/2", **on_cpu}
    return Workload(**{**defaults, **{name: value for name, value in given.items() if value is not None}}), device


def measure(workload: Workload, part: str, arguments: argparse.Namespace, device: torch.device) -> report.Section:
    """One table: the reference, then ours by mode."""
    precision = workload.keys["train.precision"]
    timing = {"rounds": arguments.rounds, "clock": arguments.clock, "device": device}
    modes = {mode: replace(workload, keys={**workload.keys, **MODES[mode]}) for mode in arguments.mode}
    if part == "forward":
        modes.pop("recomputing", None)
        if not modes:
            raise ValueError("--mode recomputing concerns the training step: add --part step, or another mode.")
        found, apart = _forward(modes, device, timing)
    else:
        found, apart = _step(modes, device, timing)
    flop = workload.flop() * (3 if part == "step" else 1)
    title = f"{'Training step' if part == 'step' else 'Forward pass'}, {precision}"
    text = f"{workload}. Ours and the reference differ by {apart:.1e} (relative) for the same weights and inputs."
    return report.Section(title, text, COLUMNS, [row(name, found, workload.batch, flop) for name in found])


def row(name: str, found: dict[str, Timing], batch: int, flop: float, reference: str = "reference") -> dict[str, Any]:
    """One line of the table, with all samples for JSON."""
    timing = found[name]
    return {
        "": name,
        "median s": timing.median,
        "least s": timing.least,
        "spread": timing.spread,
        "ratio": timing.times_as_fast_as(found[reference]),
        "videos/s": batch / timing.median,
        "TFLOP/s": teraflops(flop, timing.median),
        **timing.to_json(),
    }


def references(workload: Workload) -> dict[str, Workload]:
    """The official algorithm in the workload's precision, and in the official code's."""
    found = {"reference": workload}
    if workload.keys["train.precision"] != "fp32":
        found["reference, fp32"] = workload.and_keys(train__precision="fp32")
    return found


def _forward(
    modes: dict[str, Workload], device: torch.device, timing: dict[str, Any]
) -> tuple[dict[str, Timing], float]:
    """The reference and every mode; and how far apart the outputs are."""
    calls: dict[str, Call] = {}
    for mode, workload in modes.items():
        model, plain = pair_of(workload, device)
        if not calls:
            calls = {name: forward_of(plain, each, device) for name, each in references(workload).items()}
        calls[f"ours, {mode}"] = forward_of(model, workload, device)
    outputs = {name: call().float() for name, call in calls.items()}
    wanted = outputs["reference"]
    apart = max(float((output - wanted).abs().max() / wanted.abs().max()) for output in outputs.values())
    del outputs
    return interleaved(calls, warmup=0, **timing), apart


def _step(modes: dict[str, Workload], device: torch.device, timing: dict[str, Any]) -> tuple[dict[str, Timing], float]:
    """The reference and every mode; and how far apart the losses are before the first step."""
    with tempfile.TemporaryDirectory() as folder:
        calls: dict[str, Call] = {}
        for mode, workload in modes.items():
            ours = Ours(workload, Path(folder), device)
            if not calls:
                theirs = {name: Theirs(each, ours.model, device) for name, each in references(workload).items()}
                apart = difference(ours, theirs["reference"])
                calls = {name: each.step for name, each in theirs.items()}
            calls[f"ours, {mode}"] = ours.step
        return interleaved(calls, **timing), apart
