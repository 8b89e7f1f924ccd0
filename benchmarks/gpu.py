"""The whole bench on one GPU, in under ten minutes: training by batch, forward passes, profile, techniques, sampling.

The page is written anew after every table, so that what a time limit cuts off is only what comes after it. It needs
torch, numpy, einops, timm and safetensors, and nothing else; latents are drawn.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import attention, profile, report, sample, techniques
from .timing import Call, Timing, interleaved
from .train import asked
from .workload import Keys, Ours, Theirs, Workload, forward_of, pair_of

PEAK, PRACTICAL = 989.0, 790.0  # TFLOP/s of an H100 or H200 in bf16: dense, and what a large product reaches
REFERENCE_BATCH = 5  # as in the official configurations
STEPS = 4  # in one measurement: they are queued one behind the other
COLUMNS = {"": "", "ms": ".1f", "videos/s": ".2f", "ratio": ".2f", "TFLOP/s": ".0f", "MFU": ".1%", "of 790": ".1%",
           "peak GB": ".1f"}  # fmt: skip
BF16: Keys = {"train.precision": "bf16"}
COMPILED: Keys = {**BF16, "train.compile": True}
# name, batch, keys; to add one is to add a line
TRAININGS: list[tuple[str, int, Keys]] = [
    ("bf16, eager", 5, BF16),
    ("bf16, compiled", 5, COMPILED),
    ("bf16, compiled", 16, COMPILED),
    ("bf16, compiled", 32, COMPILED),
]
FORWARDS: list[tuple[str, int, Keys]] = [
    ("bf16, eager", 1, BF16),
    ("bf16, compiled", 1, COMPILED),
    ("bf16, compiled", 16, COMPILED),
]
Run = Callable[[Workload, torch.device, argparse.Namespace], Iterator[report.Section]]


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, write, table after table until the time is up."""
    workload, device = asked(arguments)
    end = time.monotonic() + 60 * arguments.minutes
    sections: list[report.Section] = []
    text = (
        f"{workload}. Whole training steps: loading, loss, backward, norm, AdamW, average. MFU is against "
        f"{PEAK:.0f} TFLOP/s; a step counts three forwards' FLOP, whatever is recomputed. `ratio` is of videos/s, to "
        "the first row."
    )
    for part in (trainings, forwards, profiles, tables, samplings):
        for section in part(workload, device, arguments):
            sections.append(section)
            report.show(section)
            report.save("gpu", "On one GPU", text, sections, arguments.out, device.type)
            if time.monotonic() > end:
                return


def trainings(workload: Workload, device: torch.device, arguments: argparse.Namespace) -> Iterator[report.Section]:
    """The reference as it is shipped, then ours; each of ours with the reference in turn."""
    several = 1 if arguments.quick else STEPS
    timing = {"rounds": arguments.rounds, "clock": arguments.clock, "device": device}
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as the official scripts do
    base = replace(workload, batch=1 if arguments.quick else REFERENCE_BATCH)
    theirs = Theirs(base, pair_of(base, device)[0], device)
    reference = repeated(theirs.step, several)
    rows: list[dict[str, Any]] = []
    for name, batch, keys in TRAININGS[: 2 if arguments.quick else None]:
        problem = replace(workload, batch=1 if arguments.quick else batch, keys=keys)
        with tempfile.TemporaryDirectory() as folder:
            found, peak = _step(problem, Path(folder), device, reference, several, timing)
        if not rows:
            rows.append(row("reference, tf32", base, found["reference"], several, found["reference"], base, None))
        title = f"{name}, {problem.batch} videos"
        ours = found.get("ours")
        rows.append(
            row(title, problem, ours, several, found["reference"], base, peak) if ours else {"": f"{title}: no room"}
        )
        free(device)
    yield report.Section("Training step", f"{STEPS} steps in each measurement.", COLUMNS, rows)


def _step(
    workload: Workload, folder: Path, device: torch.device, reference: Call, several: int, timing: dict[str, Any]
) -> tuple[dict[str, Timing], float | None]:
    """Ours and the reference in turn, and our peak in bytes; the reference alone where ours does not fit."""
    reference()
    before = allocated(device)
    try:
        ours = Ours(workload, folder, device)
        found = interleaved({"reference": reference, "ours": repeated(ours.step, several)}, **timing)
        if device.type != "cuda":
            return found, None
        torch.cuda.reset_peak_memory_stats(device)
        ours.step()
        return found, torch.cuda.max_memory_allocated(device) - before
    except torch.OutOfMemoryError:
        return interleaved({"reference": reference}, **timing), None


def forwards(workload: Workload, device: torch.device, arguments: argparse.Namespace) -> Iterator[report.Section]:
    """Without gradients."""
    rows: list[dict[str, Any]] = []
    timing = {"rounds": arguments.rounds, "clock": arguments.clock, "device": device, "warmup": 2}
    for name, batch, keys in FORWARDS[: 2 if arguments.quick else None]:
        problem = replace(workload, batch=1 if arguments.quick else batch, keys=keys)
        model, plain = pair_of(problem, device)
        shipped = replace(problem, keys={})
        calls = {"reference": forward_of(plain, shipped, device), "ours": forward_of(model, problem, device)}
        found = interleaved(calls, **timing)
        for title, timed in ((f"reference, tf32, {batch} videos", "reference"), (f"{name}, {batch} videos", "ours")):
            if all(title != each[""] for each in rows):
                rows.append(row(title, problem, found[timed], 1, found["reference"], problem, None, passes=1))
        del model, plain, calls
        free(device)
    columns = {head: how for head, how in COLUMNS.items() if head != "peak GB"}
    yield report.Section("Forward pass", "Of the reference in tf32, as it is shipped; same batch.", columns, rows)


def profiles(workload: Workload, device: torch.device, arguments: argparse.Namespace) -> Iterator[report.Section]:
    """Of the step that is compiled, at a moderate batch."""
    problem = replace(workload, batch=1 if arguments.quick else 8, keys=COMPILED)
    yield from profile.measure({"compiled": problem}, device, arguments.traces, arguments.quick)
    free(device)


def tables(workload: Workload, device: torch.device, arguments: argparse.Namespace) -> Iterator[report.Section]:
    """Attention over time, then techniques one by one."""
    for batch in (1,) if arguments.quick else (8, 32):
        yield attention.measure(attention.Shape.of(workload, batch), "temporal", "bf16", arguments, device)
    free(device)
    problem = replace(workload, batch=1 if arguments.quick else 4)
    yield techniques.measure(problem, device, 2, arguments.clock)
    free(device)


def samplings(workload: Workload, device: torch.device, arguments: argparse.Namespace) -> Iterator[report.Section]:
    """One video by 250 steps, without and with guidance."""
    problem = replace(workload, batch=1, classes=sample.CLASSES)
    for guidance in (False, True):
        yield sample.table(problem, device, 2 if arguments.quick else 250, 2, arguments.clock, "bf16", guidance)
        free(device)


def row(
    name: str, workload: Workload, timing: Timing, several: int, reference: Timing, base: Workload, peak: float | None,
    passes: int = 3,
) -> dict[str, Any]:  # fmt: skip
    """One line: `passes` forwards' FLOP for each of `several` steps."""
    seconds = timing.median / several
    rate = passes * workload.flop() / seconds / 1e12
    return {
        "": name,
        "ms": 1e3 * seconds,
        "videos/s": workload.batch / seconds,
        "ratio": timing.times_as_fast_as(reference) * workload.batch / base.batch,
        "TFLOP/s": rate,
        "MFU": rate / PEAK,
        "of 790": rate / PRACTICAL,
        "peak GB": peak and peak / 1e9,
        **timing.to_json(),
    }


def repeated(call: Call, times: int) -> Call:
    """`call` so many times."""

    def calls() -> None:
        for _ in range(times):
            call()

    return calls


def allocated(device: torch.device) -> int:
    """Bytes that tensors hold on it."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def free(device: torch.device) -> None:
    """Let go of what the last part held, and of its graphs: another batch is to be compiled for itself."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
