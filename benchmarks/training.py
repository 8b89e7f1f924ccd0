"""Training: time and memory of a step, each technique by itself, growth with the size, checkpoints; and all on a GPU.

Every table is data: its rows are changes of a workload, and the first row is what the others are compared with.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.distributed import close_world, init_world
from engine.state import TrainState

from . import attention, profile, report, sampling
from .report import Panel, Table
from .timing import PEAK, Case, Timer
from .workload import MODES, REFERENCE, Changes, Ours, Workload, make_case, step_of

FP32: Changes = {"train.precision": "fp32"}
BF16: Changes = {"train.precision": "bf16"}
COMPILED: Changes = {"train.compile": True}
FORWARD: Changes = {"part": "forward"}


def time_workloads(
    title: str, text: str, heads: Sequence[str], rows: Mapping[str, Workload], timer: Timer, **options: Any
) -> Table:
    """Returns the table of some workloads, timed in turn; `options` as for `make_case` and `Timer.compare`."""
    repeats = options.pop("repeats", 1)
    makers = {name: partial(make_case, workload, timer.device, repeats) for name, workload in rows.items()}
    return Table(title, text, heads, timer.compare(makers, heads, **options))


# ---- time --------------------------------------------------------------------------------------


def train(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[Table]:
    """Yields tables of the training step and of the forward pass: the reference, then ours in each mode."""
    heads = ("median s", "least s", "spread", "ratio", "videos/s", "TFLOP/s")
    for precision in arguments.precision or ("fp32", "bf16"):
        for part in arguments.part:
            base = workload.but({"part": part, "train.precision": precision})
            modes = [mode for mode in arguments.mode if part == "step" or mode != "recomputing"]
            if not modes:
                raise ValueError("--mode recomputing concerns the training step: add --part step, or another mode.")
            rows = {"reference": base.but(REFERENCE)}
            if precision != "fp32":
                rows["reference, fp32"] = base.but(REFERENCE, FP32)
            rows |= {f"ours, {mode}": base.but(MODES[mode]) for mode in modes}
            title = f"{'Training step' if part == 'step' else 'Forward pass'}, {precision}"
            yield time_workloads(title, f"{base}.", heads if part == "step" else (*heads, "apart"), rows, timer)


# name -> changes with the technique, without it, and precision of everything else. Add a technique as a line.
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
    "modulation once per clip, alone": ({"part": "modulation"}, {"part": "modulation", **REFERENCE}, "fp32"),
    "average in one call, alone": ({"part": "average"}, {"part": "average", **REFERENCE}, "fp32"),
}


def techniques(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[Table]:
    """Yields the table of all techniques, or of those with one of `--only` in their name, row by row."""
    text = f"{workload}; fp32 and eager but for what the row names. A ratio above 1 is that much faster with it."
    table = Table("Techniques, one by one", text, ("without, ms", "with, ms", "ratio"))
    for name, (on, off, precision) in TECHNIQUES.items():
        if not arguments.only or any(word in name for word in arguments.only):
            base = workload.but({"train.precision": precision})
            pair = {"without": base.but(off), "with": base.but(on)}
            makers = {which: partial(make_case, each, timer.device) for which, each in pair.items()}
            table.rows.append(timer.compare_pair(name, makers))
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
        text = f"{next(iter(rows.values()))}, and so on; relative to the first row."
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
        f"{base} on each rank; DistributedDataParallel, {how}. Each number of ranks is a run of its own, so other load "
        "on the machine weighs more here than in the other tables."
    )
    ranks = Table("Ranks", text, ("median s", "videos/s", "efficiency"))
    for count in arguments.ranks:
        launch = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}")
        given = (base, timer.device.type, timer.rounds)
        median = run_apart("time_rank", given, *launch, OMP_NUM_THREADS="1") or 0.0
        rate = count * base.batch / median
        ranks.rows.append({"": f"{count} ranks" if count > 1 else "1 rank", "median s": median, "videos/s": rate})
        ranks.rows[-1]["efficiency"] = rate / (count * ranks.rows[0]["videos/s"])
    yield ranks


# ---- measurements in processes of their own ------------------------------------------------------


def run_apart(name: str, given: Sequence[Any], *launch: str, **environment: str) -> float | None:
    """Returns the result of the function `name` of this module in another process; None without memory for it.

    Args:
        given: the arguments of the function, a workload first.
        launch: arguments of Python that start the module.

    Raises: OSError with the last line of any other failure.
    """
    problem = json.dumps([asdict(given[0]), *given[1:]])
    argv = [sys.executable, *launch, "-m", "benchmarks.training", name, problem]
    done = subprocess.run(argv, cwd=report.ROOT, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode and "OutOfMemoryError" in done.stderr:
        return None
    if done.returncode:
        raise OSError(f"{name} failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return float(done.stdout.split()[-1])


def time_rank(problem: dict[str, Any], device: str, rounds: int) -> float:
    """Returns the median seconds of a step on one rank under torchrun."""
    world = init_world(device)
    step = Ours(Workload(**problem), world.device, world).step
    (row,) = Timer(world.device, rounds).compare({"step": lambda: Case(step)}, ("median s",))
    close_world()
    return float(row["median s"])


def find_peak(problem: dict[str, Any], device_name: str) -> int:
    """Returns the peak bytes of a step in this process, once the optimiser has its moments."""
    device = torch.device(device_name)
    torch.randn(64, 64, device=device) @ torch.randn(64, 64, device=device)  # loads libraries
    before = _resident("VmRSS")
    step = step_of(Workload(**problem), device)
    step()
    step()
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM") - before


def _resident(name: str) -> int:
    """Returns VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


KINDS: dict[str, Changes] = {
    "reference,fp32": REFERENCE,
    "ours,fp32": {},
    "ours,fp32,compiled": MODES["compiled"],
    "ours,fp32,recomputing": MODES["recomputing"],
    "reference,bf16": {**REFERENCE, **BF16},
    "ours,bf16": BF16,
    "ours,bf16,compiled": {**COMPILED, **BF16},
}


def memory(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[Table]:
    """Yields the table of peaks, each kind of a process of its own, row by row."""
    for name in arguments.kind or ():
        if name not in KINDS:
            raise ValueError(f"--kind {name} is unknown: use {' '.join(KINDS)}.")
    table = Table("Peak memory of a training step", f"{workload}.", ("peak GB", "of the reference"))
    found: dict[str, float] = {}
    for name in arguments.kind or KINDS:
        given = (workload.but(KINDS[name]), timer.device.type)
        peak = run_apart("find_peak", given, MALLOC_MMAP_THRESHOLD_="65536")
        if peak is None:
            table.rows.append({"": f"{name}: no room"})
        else:
            found[name] = peak
            reference = found.get(f"reference,{name.split(',')[1]}")
            table.rows.append({"": name, "peak GB": peak / 1e9, "of the reference": reference and peak / reference})
        yield table


# ---- checkpoints -------------------------------------------------------------------------------


def saving(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[Table]:
    """Yields the table of whole loops without, with, and with asynchronous checkpoints."""
    steps, every = arguments.steps, arguments.every
    keys = {"train.max_steps": steps, "train.checkpoint_every": every, "train.log_every": 1000}
    base = workload.but({"batch": 4, "frames": 8, "latent": 16, **keys})

    def make(saves: bool, asynchronous: bool) -> Case:
        case = Case(lambda: None)
        spent: list[float] = []

        def prepare() -> None:
            ours = Ours(base.but({"train.async_checkpoint": asynchronous}), timer.device)
            run, spent[:] = ours.trainer.run, []
            save = run.save

            def timed(state: TrainState) -> None:
                start = time.perf_counter()
                if saves:
                    save(state)
                spent.append(time.perf_counter() - start)

            def loop() -> None:
                start = time.perf_counter()
                ours.trainer.loop()
                run.writer.wait()
                case.cells["inside `save`"] = sum(spent) / (time.perf_counter() - start)

            run.save = timed  # type: ignore[method-assign]
            run.folder.open()
            case.call = loop

        case.prepare = prepare
        return case

    modes = {"none": (False, False), "in the step": (True, False), "asynchronous": (True, True)}
    heads = ("median s", "cost", "inside `save`")
    rows = timer.compare({name: partial(make, *mode) for name, mode in modes.items()}, heads)
    yield Table("Whole loops", f"{base.size}, {steps} steps, a checkpoint every {every}.", heads, rows)


# ---- everything on one GPU -----------------------------------------------------------------------

GPU_TRAININGS: dict[str, Sequence[Changes]] = {
    "reference, tf32, 5 videos": ({"batch": 5}, REFERENCE),  # the batch of the official configurations
    "bf16, eager, 5 videos": ({"batch": 5}, BF16),
    "bf16, compiled, 5 videos": ({"batch": 5}, BF16, COMPILED),
    "bf16, compiled, 16 videos": ({"batch": 16}, BF16, COMPILED),
    "bf16, compiled, 32 videos": ({"batch": 32}, BF16, COMPILED),
}
GPU_FORWARDS: dict[str, Sequence[Changes]] = {
    "reference, tf32, 1 video": ({"batch": 1}, REFERENCE),
    "bf16, eager, 1 video": ({"batch": 1}, BF16),
    "bf16, compiled, 1 video": ({"batch": 1}, BF16, COMPILED),
    "reference, tf32, 16 videos": ({"batch": 16}, REFERENCE),
    "bf16, compiled, 16 videos": ({"batch": 16}, BF16, COMPILED),
}


def gpu(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[Table]:
    """Yields all tables of one GPU until the minutes are up."""
    end = time.monotonic() + 60 * arguments.minutes
    for table in _measure_gpu(workload, timer, arguments):
        yield table
        if time.monotonic() > end:
            return


def _measure_gpu(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[Table]:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as the official scripts do
    quick = arguments.quick
    heads = ("ms", "videos/s", "ratio", "TFLOP/s", "MFU", "of 790", "peak GB")
    for title, rows, part, repeats in (
        ("Training step", GPU_TRAININGS, {}, 1 if quick else 4),  # several in a measurement: they are queued
        ("Forward pass", GPU_FORWARDS, FORWARD, 1),
    ):
        chosen = {
            name: workload.but(part, *changes, {"batch": 1} if quick else {})
            for name, changes in list(rows.items())[: 3 if quick else None]
        }
        text = (
            f"{workload}. Whole steps: loading, loss, backward, norm, AdamW, average; a step counts three forwards' "
            f"FLOP, whatever is recomputed. MFU is against {PEAK:.0f} TFLOP/s; `ratio` is of videos/s."
        )
        yield time_workloads(title, text, heads, chosen, timer, repeats=repeats, at_once=False)
    batches = (1,) if quick else (8, 32)
    yield from profile.measure({"compiled": workload.but({"batch": batches[0]}, BF16, COMPILED)}, timer, arguments)
    for batch in batches:
        yield attention.measure(workload.but({"batch": batch}), "temporal", "bf16", timer)
    short = Timer(timer.device, min(2, timer.rounds), timer.clock)
    yield from techniques(workload.but({"batch": 1 if quick else 4}), short, argparse.Namespace(only=None))
    yield from sampling.measure(workload.but({"batch": 1}), short, 2 if quick else 250, "bf16")


if __name__ == "__main__":
    sys.stdout.write(f"\n{globals()[sys.argv[1]](*json.loads(sys.argv[2]))}\n")
