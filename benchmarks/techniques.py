"""Each technique by itself: the same work with and without it, in turn. Add one as a line of TECHNIQUES."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import repeat

from engine.optim import EMA
from models import attention

from . import report
from .reference import ReferenceTraining
from .timing import Call, Timer
from .workload import Keys, Ours, Workload, forward_of, pair_of, read_problem

Pair = tuple[Call, Call]  # with, without
Build = Callable[[Workload, Path, torch.device], Pair]
COLUMNS = {"": "", "with, s": ".4f", "without, s": ".4f", "ratio": ".2f"}


class Technique(NamedTuple):
    """A technique and the constructor of two calls that differ by it alone.

    precision: of everything else.
    cuda: skipped on other devices, where it makes no difference.
    """

    name: str
    build: Build
    precision: str = "fp32"
    cuda: bool = False


def step(on: Keys, off: Keys) -> Build:
    """Compares a training step with either set of configuration keys."""

    def build(workload: Workload, folder: Path, device: torch.device) -> Pair:
        first, second = (Ours(workload.with_keys(keys), folder, device) for keys in (on, off))
        return first.step, second.step

    return build


def attending(on: str, off: str) -> Build:
    """Compares two values of `train.attention` in one trainer: the kernel is chosen for the whole process."""

    def build(workload: Workload, folder: Path, device: torch.device) -> Pair:
        ours = Ours(workload, folder, device)

        def call(name: str) -> None:
            attention.choose(name)
            ours.step()

        return partial(call, on), partial(call, off)

    return build


def networks(workload: Workload, folder: Path, device: torch.device) -> Pair:
    """Compares our forward pass with the reference's."""
    model, plain = pair_of(workload, device)
    return forward_of(model, workload, device), forward_of(plain, workload, device)


def averages(workload: Workload, folder: Path, device: torch.device) -> Pair:
    """Compares the EMA update alone: in one call, or parameter by parameter."""
    model, plain = pair_of(workload, device)
    ours, theirs = EMA(model), ReferenceTraining(plain)
    return lambda: ours.update(model), theirs.update_average


def modulations(workload: Workload, folder: Path, device: torch.device) -> Pair:
    """Compares the modulation of all layers alone: once per clip, or for each frame and each token position."""
    model, plain = pair_of(workload, device)
    heads = [block.get_submodule("adaLN_modulation") for block in plain.blocks]
    condition = torch.randn(workload.batch, model.config.size.hidden_size, device=device)
    tokens = (workload.latent // model.patch_size) ** 2
    by_frame = repeat(condition, "b d -> (b f) d", f=workload.frames)
    by_token = repeat(condition, "b d -> (b n) d", n=tokens)

    @torch.no_grad()
    def each() -> None:
        for index, head in enumerate(heads):
            head(by_token if index % 2 else by_frame)

    @torch.no_grad()
    def once() -> None:
        for head in heads:
            head(condition)

    return once, each


# fmt: off
TECHNIQUES = [
    Technique("bf16 autocast", step({"train.precision": "bf16"}, {"train.precision": "fp32"})),
    Technique("compiled blocks, fp32", step({"train.compile": True}, {"train.compile": False})),
    Technique("compiled blocks, bf16", step({"train.compile": True}, {"train.compile": False}), "bf16"),
    Technique("fused attention", attending("fused", "plain")),
    Technique("fused attention, bf16", attending("fused", "plain"), "bf16"),
    Technique("AdamW as one kernel", step({"optim.fused": True}, {"optim.fused": False})),
    Technique("no wait in a step", step({"train.run_ahead": True}, {"train.run_ahead": False}), "bf16", True),
    Technique("recomputed blocks (saves memory)", step({"model.gradient_checkpointing": True}, {})),
    Technique("network, forward pass: all at once", networks),
    Technique("modulation once per clip, alone", modulations),
    Technique("average in one call, alone", averages),
]
# fmt: on


def measure(workload: Workload, timer: Timer, names: list[str] | None = None) -> report.Section:
    """Returns the table of all techniques, or of those with one of `names` in their name."""
    rows: list[dict[str, Any]] = []
    for technique in TECHNIQUES:
        chosen = not names or any(name in technique.name for name in names)
        if not chosen or (technique.cuda and not timer.on_cuda):
            continue
        torch.compiler.reset()
        with tempfile.TemporaryDirectory() as folder:
            problem = workload.and_keys(train__precision=technique.precision)
            found = timer.time(dict(zip(("with", "without"), technique.build(problem, Path(folder), timer.device))))
            attention.choose("auto")
        medians = {f"{name}, s": timing.median for name, timing in found.items()}
        ratio = found["with"].times_as_fast_as(found["without"])
        samples = {name: timing.to_json() for name, timing in found.items()}
        rows.append({"": technique.name, **medians, "ratio": ratio, **samples})
    text = f"{workload}; fp32 and eager but for what the row names. A ratio above 1 is that much faster with it."
    return report.Section("Techniques, one by one", text, COLUMNS, rows)


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints and writes the table."""
    workload, timer = read_problem(arguments)
    section = measure(workload, timer, arguments.only)
    report.write("techniques", "Techniques, one by one", "", [section], arguments.out, timer.device)
