"""Each technique by itself: the same thing with and without it, in turn. To add one is to add a line to TECHNIQUES."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from einops import repeat

from models import attention

from . import report
from .timing import Call, interleaved
from .train import asked
from .workload import Keys, Ours, Workload, forward_of, pair_of

Pair = tuple[Call, Call]  # with, without
Build = Callable[[Workload, Path, torch.device], Pair]


class Technique(NamedTuple):
    """What it is, and how to make the pair of calls that differ by it alone.

    precision: what else is computed in.
    cuda: it makes no difference elsewhere.
    """

    name: str
    build: Build
    precision: str = "fp32"
    cuda: bool = False


def step(on: Keys, off: Keys) -> Build:
    """A training step with the one or the other keys."""

    def build(workload: Workload, folder: Path, device: torch.device) -> Pair:
        first, second = (
            Ours(workload.and_keys(**{key.replace(".", "__"): value for key, value in keys.items()}), folder, device)
            for keys in (on, off)
        )
        return first.step, second.step

    return build


def attending(on: str, off: str) -> Build:
    """A training step with the one or the other `train.attention`, of one trainer: the choice is the process's."""

    def build(workload: Workload, folder: Path, device: torch.device) -> Pair:
        ours = Ours(workload, folder, device)

        def call(name: str) -> None:
            attention.choose(name)
            ours.step()

        return partial(call, on), partial(call, off)

    return build


def networks(workload: Workload, folder: Path, device: torch.device) -> Pair:
    """All that the network does better, in a forward pass: against the reference's."""
    model, plain = pair_of(workload, device)
    return forward_of(model, workload, device), forward_of(plain, workload, device)


def averages(workload: Workload, folder: Path, device: torch.device) -> Pair:
    """The moving average alone: in one call, or parameter by parameter."""
    from engine.ema import EMA

    from .reference import ReferenceTraining

    model, plain = pair_of(workload, device)
    ours, theirs = EMA(model), ReferenceTraining(plain)
    return lambda: ours.update(model), theirs.update_average


def modulations(workload: Workload, folder: Path, device: torch.device) -> Pair:
    """The modulation of all layers alone: of each clip, or of each frame and each place in a frame."""
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


def measure(
    workload: Workload, device: torch.device, rounds: int, clock: str, names: list[str] | None = None
) -> report.Section:
    """The table of all techniques, or of those whose name holds one of `names`."""
    rows = []
    for technique in TECHNIQUES:
        chosen = not names or any(name in technique.name for name in names)
        if not chosen or (technique.cuda and device.type != "cuda"):
            continue
        torch.compiler.reset()
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            on, off = technique.build(workload.and_keys(train__precision=technique.precision), folder, device)
            found = interleaved({"with": on, "without": off}, rounds=rounds, clock=clock, device=device)
            attention.choose("auto")
        ratio = found["with"].times_as_fast_as(found["without"])
        rows.append(
            {"": technique.name, "with, s": found["with"].median, "without, s": found["without"].median, "ratio": ratio}
            | {name: timing.to_json() for name, timing in found.items()}
        )
    text = f"{workload}; fp32 and eager but for what the row names. A ratio above 1 is that much faster with it."
    columns = {"": "", "with, s": ".4f", "without, s": ".4f", "ratio": ".2f"}
    return report.Section("Techniques, one by one", text, columns, rows)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, write."""
    workload, device = asked(arguments)
    section = measure(workload, device, arguments.rounds, arguments.clock, arguments.only)
    report.write("techniques", "Techniques, one by one", "", [section], arguments.out, device.type)
