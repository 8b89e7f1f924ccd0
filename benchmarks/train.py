"""Training step and forward pass: ours against the reference, with the same weights and inputs."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from . import report
from .timing import Case, Timer, compare
from .workload import Ours, Theirs, Workload, difference, forward_of, pair_of, read_problem

COLUMNS = {
    "": "",
    "median s": ".2f",
    "least s": ".2f",
    "spread": ".0%",
    "ratio": ".2f",
    "videos/s": ".3f",
    "TFLOP/s": ".3f",
}
ABOUT = """
The reference is the official algorithm at the official code's cost (`benchmarks/reference.py`), computed in the same
precision; the official code itself computes in fp32, which tables in other precisions show in a row of its own. All
rows of a table were timed in turn, in one process, on the same weights; `ratio` is how many times as fast as the
reference, the median over rounds.
"""


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints and writes the tables."""
    workload, timer = read_problem(arguments)
    sections = [
        measure(workload.and_keys(train__precision=precision), part, arguments.mode, timer)
        for precision in arguments.precision or ["fp32", "bf16"]
        for part in arguments.part
    ]
    report.write("train", "Training step and forward pass", ABOUT, sections, arguments.out, timer.device)


def measure(workload: Workload, part: str, names: list[str], timer: Timer) -> report.Section:
    """Returns one table: the reference, then ours in each mode."""
    precision = workload.keys["train.precision"]
    modes = {mode: workload.with_mode(mode) for mode in names}
    if part == "forward":
        modes.pop("recomputing", None)
        if not modes:
            raise ValueError("--mode recomputing concerns the training step: add --part step, or another mode.")
    with tempfile.TemporaryDirectory() as folder:
        if part == "forward":
            cases, apart = forward_cases(modes, timer)
            timer = replace(timer, warmup=0)  # the comparison of outputs was the warm-up
        else:
            cases, apart = step_cases(modes, Path(folder), timer)
        flop = workload.flop() * (3 if part == "step" else 1)
        for case in cases:
            case.videos, case.flop = workload.batch, flop
        rows = compare(cases, COLUMNS, timer)
    title = f"{'Training step' if part == 'step' else 'Forward pass'}, {precision}"
    text = f"{workload}. Ours and the reference differ by {apart:.1e} (relative) for the same weights and inputs."
    return report.Section(title, text, COLUMNS, rows)


def references(workload: Workload) -> dict[str, Workload]:
    """Returns the official algorithm in the workload's precision, and in the official code's."""
    found = {"reference": workload}
    if workload.keys["train.precision"] != "fp32":
        found["reference, fp32"] = workload.and_keys(train__precision="fp32")
    return found


def forward_cases(modes: dict[str, Workload], timer: Timer) -> tuple[list[Case], float]:
    """Returns the reference and every mode, and the largest relative difference of their outputs."""
    cases: list[Case] = []
    for mode, workload in modes.items():
        model, plain = pair_of(workload, timer.device)
        if not cases:
            cases = [Case(name, forward_of(plain, each, timer.device)) for name, each in references(workload).items()]
        cases.append(Case(f"ours, {mode}", forward_of(model, workload, timer.device)))
    wanted, *outputs = (case.call().float() for case in cases)
    return cases, max(float((output - wanted).abs().max() / wanted.abs().max()) for output in outputs)


def step_cases(modes: dict[str, Workload], folder: Path, timer: Timer) -> tuple[list[Case], float]:
    """Returns the reference and every mode, and the relative difference of the losses before the first step."""
    cases: list[Case] = []
    for mode, workload in modes.items():
        ours = Ours(workload, folder, timer.device)
        if not cases:
            theirs = {name: Theirs(each, ours.model, timer.device) for name, each in references(workload).items()}
            apart = difference(ours, theirs["reference"])
            cases = [Case(name, each.step) for name, each in theirs.items()]
        cases.append(Case(f"ours, {mode}", ours.step))
    return cases, apart
