"""Benchmarks training: time and memory of a step, single techniques, scaling, checkpoints; and all of it on a GPU.

Each row of a table is a changed workload; the first row is the reference.
"""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from common.checks import require
from engine.distributed import close_world, init_world

from . import attention, profile, report, sampling
from .report import Panel, Table
from .timing import Case, Timer, run_apart
from .workload import MODES, REFERENCE, Changes, Ours, Workload, make_case, step_of

FP32: Changes = {"train.precision": "fp32"}
BF16: Changes = {"train.precision": "bf16"}
COMPILED: Changes = {"train.compile": True}
FORWARD: Changes = {"part": "forward"}


def time_workloads(title: str, text: str, heads: Sequence[str], rows: Mapping[str, Workload], timer: Timer) -> Table:
    """Returns the table of workloads timed in turn; on CUDA each is timed with the first only, four calls at a time."""
    repeats = 4 if timer.on_cuda else 1  # calls are queued
    makers = {name: partial(make_case, workload, timer.device, repeats) for name, workload in rows.items()}
    return Table(title, text, heads, timer.compare(makers, heads, at_once=not timer.on_cuda))


# ---- time --------------------------------------------------------------------------------------


def train(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[Table]:
    """Yields tables of the training step and of the forward pass: the reference, then ours in each mode."""
    heads = ["median s", "spread", "ratio", "videos/s", "TFLOP/s"]
    heads += ["MFU", "of 790", "peak GB"] if timer.on_cuda else []
    for precision in arguments.precision or ("fp32", "bf16"):
        base = workload.but({"train.precision": precision})
        rows = {"reference": base.but(REFERENCE)}
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
        if precision != "fp32":  # the official scripts allow tf32
            rows["reference, tf32" if timer.on_cuda else "reference, fp32"] = base.but(REFERENCE, FP32)
        rows |= {f"ours, {mode}": base.but(changes) for mode, changes in MODES.items()}
        forward = {name: each.but(FORWARD) for name, each in rows.items() if "recomputing" not in name}
        where, text = f"{precision}, batch {base.batch}", f"{base}."
        yield time_workloads(f"Training step, {where}", text, heads, rows, timer)
        yield time_workloads(f"Forward pass, {where}", text, [*heads, "apart"], forward, timer)


# name -> changes with the technique, without it, and precision of everything else. Add techniques here.
TECHNIQUES: dict[str, tuple[Changes, Changes, str]] = {
    "bf16 autocast": (BF16, FP32, "fp32"),
    "compiled blocks, fp32": (COMPILED, {}, "fp32"),
    "compiled blocks, bf16": (COMPILED, {}, "bf16"),
    "fused attention": ({"train.attention": "fused"}, {"train.attention": "plain"}, "fp32"),
    "fused attention, bf16": ({"train.attention": "fused"}, {"train.attention": "plain"}, "bf16"),
    "AdamW as one kernel": ({"optim.fused": True}, {"optim.fused": False}, "fp32"),
    "no wait in a step": ({"train.run_ahead": True}, {"train.run_ahead": False}, "bf16"),
    "recomputed blocks (saves memory)": ({"model.gradient_checkpointing": True}, {}, "fp32"),
    "network, forward pass: all at once": (FORWARD, {**FORWARD, **REFERENCE}, "fp32"),
}


def techniques(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[Table]:
    """Yields the table of all techniques, or of those whose name contains a word of `--only`, row by row."""
    text = f"{workload}; fp32 and eager except for what the row names. A ratio of 2 means twice as fast with it."
    table = Table("Techniques, one by one", text, ("without, ms", "with, ms", "ratio"))
    for name, (on, off, precision) in TECHNIQUES.items():
        if not arguments.only or any(word in name for word in arguments.only):
            base = workload.but({"train.precision": precision})
            pair = {"without, ms": base.but(off), "with, ms": base.but(on)}
            makers = {which: partial(make_case, each, timer.device) for which, each in pair.items()}
            rows = timer.compare(makers, ("ms", "ratio"))
            cells = {row[""]: row["ms"] for row in rows}
            table.rows.append({"": name, **cells, "ratio": rows[-1]["ratio"], "samples": rows})
            yield table


# ---- growth ------------------------------------------------------------------------------------

CUSTOM: Changes = {"size": "custom", "model.hidden_size": 384, "model.num_heads": 6, "model.patch_size": 2}
AXES: dict[str, dict[str, Changes]] = {
    "Frames": {f"{count} frames": {"frames": count} for count in (4, 8, 16, 32)},
    "Size": {f"{side} x {side}": {"latent": side} for side in (8, 16, 24, 32)},
    "Depth": {f"{depth} layers": {**CUSTOM, "model.depth": depth} for depth in (4, 8, 12, 16)},
    "Batch": {f"batch {count}": {"batch": count} for count in (1, 2, 4)},
    "Joint images": {f"8 frames + {count}": {"images": count} for count in (0, 4, 8)},
}


def scaling(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[Table]:
    """Yields a table for each axis, draws the plot, and yields the table of ranks."""
    base = workload.but({"batch": arguments.batch or 1, "frames": 8, "latent": 8 if arguments.quick else 16})
    tables = []
    for axis, values in AXES.items():
        rows = {value: base.but(changes) for value, changes in list(values.items())[: 2 if arguments.quick else None]}
        text = f"First row: {next(iter(rows.values()))}; the others are relative to it."
        tables.append(time_workloads(axis, text, ("median s", "cost", "tokens", "FLOP", "cost / FLOP"), rows, timer))
        yield tables[-1]
    panels = [
        Panel(t.title, {key: ([row[""] for row in t.rows], [row[key] for row in t.rows]) for key in t.heads[1:4]})
        for t in tables
    ]
    if report.plot(panels, arguments.out / "scaling.png"):
        tables[0].picture = "scaling.png"
    how = "NCCL" if timer.on_cuda else "gloo, one thread each"
    text = (
        f"{base} on each rank; DistributedDataParallel, {how}. Each number of ranks is a separate run, so other load "
        "on the machine affects this table more than the others."
    )
    ranks = Table("Ranks", text, ("median s", "videos/s", "efficiency"))
    for count in (1, 2):
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        median = run_apart(partial(time_rank, base, timer, count, port), range(count))[0]
        rate = count * base.batch / median
        ranks.rows.append({"": f"{count} ranks" if count > 1 else "1 rank", "median s": median, "videos/s": rate})
        ranks.rows[-1]["efficiency"] = rate / (count * ranks.rows[0]["videos/s"])
    yield ranks


def time_rank(workload: Workload, timer: Timer, size: int, port: int, rank: int) -> float:
    """Returns the median seconds of a step in this process, one of `size` ranks."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    torch.set_num_threads(1)
    world = init_world(timer.device.type)
    step = Ours(workload, world.device, world).step
    (row,) = Timer(world.device, timer.rounds).compare({"step": lambda: Case(step)}, ("median s",))
    close_world()
    return float(row["median s"])


# ---- memory ------------------------------------------------------------------------------------


def memory(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[Table]:
    """Yields the table of peaks, each measured in a new process, row by row."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # read when a process starts
    table = Table("Peak memory of a training step", f"{workload}.", ("peak GB", "of the reference"))
    kinds = {"reference": REFERENCE, **{f"ours, {mode}": changes for mode, changes in MODES.items()}}
    for precision in arguments.precision or ("fp32", "bf16"):
        reference = None
        for name, changes in kinds.items():
            problem = workload.but(changes, {"train.precision": precision})
            try:
                peak = run_apart(partial(find_peak, problem), [timer.device])[0]
            except torch.OutOfMemoryError:
                table.rows.append({"": f"{name}, {precision}: no room"})
            else:
                reference = peak if changes is REFERENCE else reference
                cells = {"peak GB": peak / 1e9, "of the reference": reference and peak / reference}
                table.rows.append({"": f"{name}, {precision}", **cells})
            yield table


def find_peak(workload: Workload, device: torch.device) -> int:
    """Returns the peak bytes of a step in this process, after the optimiser has allocated its moments."""
    torch.randn(64, 64, device=device) @ torch.randn(64, 64, device=device)  # loads libraries
    before = _resident("VmRSS")
    step = step_of(workload, device)
    step()
    step()
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM") - before


def _resident(name: str) -> int:
    """Returns VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


# ---- checkpoints -------------------------------------------------------------------------------

SAVING_STEPS, SAVING_EVERY = 40, 10


def saving(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[Table]:
    """Yields the table of whole loops: without, with synchronous, and with asynchronous checkpoints."""
    keys = {"train.max_steps": SAVING_STEPS, "train.checkpoint_every": SAVING_EVERY, "train.log_every": 1000}
    base = workload.but({"batch": 4, "frames": 8, "latent": 16, **keys})

    def make(saves: bool, asynchronous: bool) -> Case:
        case = Case(lambda: None)

        def prepare() -> None:
            ours = Ours(base.but({"train.async_checkpoint": asynchronous}), timer.device)
            run = ours.trainer.run
            if not saves:
                run.save = lambda state: None  # type: ignore[method-assign]
            run.folder.open()

            def loop() -> None:
                ours.trainer.loop()
                run.writer.wait()

            case.call = loop

        case.prepare = prepare
        return case

    modes = {"none": (False, False), "in the step": (True, False), "asynchronous": (True, True)}
    heads = ("median s", "cost")
    rows = timer.compare({name: partial(make, *mode) for name, mode in modes.items()}, heads)
    yield Table("Whole loops", f"{base.size}, {SAVING_STEPS} steps, a checkpoint every {SAVING_EVERY}.", heads, rows)


# ---- everything on one GPU -----------------------------------------------------------------------

MINUTES = 9.0  # no table of `gpu` starts after this time
GPU = (  # benchmarks that `gpu` runs in bf16, and their batch sizes; 5 is that of the official configurations
    (train, 5), (profile.profile, 8), (attention.attention, 8), (attention.attention, 32), (sampling.sample, 1),
    (techniques, 4), (train, 16), (train, 32),
)  # fmt: skip


def gpu(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[Table]:
    """Yields the tables for one GPU until MINUTES have passed."""
    require(timer.device.type == "cuda" or arguments.device, "gpu: no CUDA device found: use --device cpu.")
    end = time.monotonic() + 60 * MINUTES
    for measure, batch in dict(GPU).items() if arguments.quick else GPU:
        batch = 1 if arguments.quick else batch
        given = {"precision": ["bf16"], "batch": batch, "steps": None, "only": None}
        problem, command = workload.but({"batch": batch}), argparse.Namespace(**vars(arguments) | given)
        for table in measure(problem, timer, command):
            yield table
            if time.monotonic() > end:
                return
