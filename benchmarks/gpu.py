"""The benchmark of one GPU, in under ten minutes: training by batch, forward passes, profile, techniques, sampling.

The page is written again after every table, so that a time limit costs only the tables after it. It needs only torch,
numpy, einops, timm and safetensors; latents are random.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import attention, profile, report, sample, techniques
from .timing import PEAK, Call, Case, Timer, compare, compare_one_by_one
from .workload import Keys, Ours, Theirs, Workload, forward_of, pair_of, read_problem

REFERENCE_BATCH = 5  # as in the official configurations
STEPS = 4  # in one measurement: they are queued
COLUMNS = {"": "", "ms": ".1f", "videos/s": ".2f", "ratio": ".2f", "TFLOP/s": ".0f", "MFU": ".1%", "of 790": ".1%",
           "peak GB": ".1f"}  # fmt: skip
FORWARD_COLUMNS = {head: how for head, how in COLUMNS.items() if head != "peak GB"}
BF16: Keys = {"train.precision": "bf16"}
COMPILED: Keys = {**BF16, "train.compile": True}
# name, batch, keys; add a measurement as a line
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


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints and writes table after table until the time is up."""
    workload, timer = read_problem(arguments)
    end = time.monotonic() + 60 * arguments.minutes
    sections: list[report.Section] = []
    text = (
        f"{workload}. Whole training steps: loading, loss, backward, norm, AdamW, average. MFU is against "
        f"{PEAK:.0f} TFLOP/s; a step counts three forwards' FLOP, whatever is recomputed. `ratio` is of videos/s, to "
        "the first row."
    )
    for part in (measure_training, measure_forward, measure_parts, measure_sampling):
        for section in part(workload, timer, arguments):
            sections.append(section)
            report.show(section)
            report.save("gpu", "On one GPU", text, sections, arguments.out, timer.device)
            timer.free()
            if time.monotonic() > end:
                return


def measure_training(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[report.Section]:
    """Yields the table of training steps: the reference as it is shipped, then ours, each in turn with it."""
    repeats = 1 if arguments.quick else STEPS
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as the official scripts do

    def case(name: str, problem: Workload, step: Call) -> Case:
        flop = 3 * problem.flop()
        return Case(name, repeat(step, repeats), problem.batch, flop, repeats)

    def reference() -> Case:
        problem = replace(workload, batch=1 if arguments.quick else REFERENCE_BATCH)
        return case("reference, tf32", problem, Theirs(problem, pair_of(problem, timer.device)[0], timer.device).step)

    def ours(name: str, problem: Workload, folder: Path) -> Callable[[], Case]:
        return lambda: case(name, problem, Ours(problem, folder, timer.device).step)

    makers = {"reference, tf32": reference}
    with tempfile.TemporaryDirectory() as folder:
        for place, (name, batch, keys) in enumerate(TRAININGS[: 2 if arguments.quick else None]):
            problem = replace(workload, batch=1 if arguments.quick else batch, keys=keys)
            title = f"{name}, {problem.batch} videos"
            makers[title] = ours(title, problem, Path(folder, str(place)))
        rows = compare_one_by_one(makers, COLUMNS, timer)
    yield report.Section("Training step", f"{STEPS} steps in each measurement.", COLUMNS, rows)


def measure_forward(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[report.Section]:
    """Yields the table of forward passes without gradients."""
    rows: dict[str, dict[str, Any]] = {}
    for name, batch, keys in FORWARDS[: 2 if arguments.quick else None]:
        problem = replace(workload, batch=1 if arguments.quick else batch, keys=keys)
        model, plain = pair_of(problem, timer.device)
        calls = {
            f"reference, tf32, {batch} videos": forward_of(plain, replace(problem, keys={}), timer.device),
            f"{name}, {batch} videos": forward_of(model, problem, timer.device),
        }
        cases = [Case(title, call, problem.batch, problem.flop()) for title, call in calls.items()]
        for row in compare(cases, FORWARD_COLUMNS, replace(timer, warmup=2)):
            rows.setdefault(row[""], row)
        del model, plain, calls, cases
        timer.free()
    text = "Of the reference in tf32, as it is shipped; same batch."
    yield report.Section("Forward pass", text, FORWARD_COLUMNS, list(rows.values()))


def measure_parts(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[report.Section]:
    """Yields a profile of the compiled step, attention over time, and the techniques."""
    batches, several = ((1,), 1) if arguments.quick else ((8, 32), 4)
    problem = replace(workload, batch=batches[0], keys=COMPILED)
    yield from profile.measure({"compiled": problem}, timer.device, arguments.traces, arguments.quick)
    for batch in batches:
        yield attention.measure(attention.Shape.of(workload, batch), "temporal", "bf16", timer)
    yield techniques.measure(replace(workload, batch=several), replace(timer, rounds=2))


def measure_sampling(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[report.Section]:
    """Yields the tables of sampling one video in 250 steps, without and with guidance."""
    steps = 2 if arguments.quick else 250
    yield from sample.measure(replace(workload, batch=1), replace(timer, rounds=2), steps, "bf16")


def repeat(call: Call, times: int) -> Call:
    """Returns a call that runs `call` several times."""

    def calls() -> None:
        for _ in range(times):
            call()

    return calls
