"""How the cost of a training step grows: in frames, size, depth, batch, joint images, and ranks."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from . import report
from .timing import Timing, interleaved
from .workload import Ours, Workload

PICTURE = "scaling.png"
COLUMNS = {"": "", "step s": ".3f", "cost": ".2f", "tokens": ".2f", "FLOP": ".2f", "cost / FLOP": ".2f"}
DEPTHS = {"model.name": "custom", "model.hidden_size": 384, "model.num_heads": 6, "model.patch_size": 2}


def axes_of(base: Workload, quick: bool = False) -> dict[str, dict[str, Workload]]:
    """Axis -> value -> what is timed; the first of each is what the others are compared with."""
    depths = (2, 4) if quick else (4, 8, 12, 16)
    custom = {
        depth: replace(base, size="custom", keys={**base.keys, **DEPTHS} | {"model.depth": depth}) for depth in depths
    }
    sides, images = ((4, 8), (0, 2)) if quick else ((8, 16, 24, 32), (0, 4, 8))
    short = (1, 2) if quick else (1, 2, 4)
    return {
        "frames": {f"{count} frames": replace(base, frames=count) for count in (4 * n for n in (*short, 8))},
        "size": {f"{side} x {side}": replace(base, latent=side) for side in sides},
        "depth": {f"{depth} layers": workload for depth, workload in custom.items()},
        "batch": {f"batch {count}": replace(base, batch=count) for count in short},
        "joint images": {f"{base.frames} frames + {count}": replace(base, images=count) for count in images},
    }


def tokens(workload: Workload) -> int:
    """Of the batch; an image is a frame."""
    return workload.batch * (workload.frames + workload.images) * (workload.latent // 2) ** 2


def measure(base: Workload, device: torch.device, rounds: int, clock: str, quick: bool = False) -> list[report.Section]:
    """One table an axis."""
    sections = []
    for axis, workloads in axes_of(base, quick).items():
        with tempfile.TemporaryDirectory() as folder:
            calls = {
                value: Ours(workload, Path(folder) / str(place), device).step
                for place, (value, workload) in enumerate(workloads.items())
            }
            found = interleaved(calls, rounds=rounds, clock=clock, device=device)
        first = next(iter(workloads.values()))
        text = f"{first}, and so on; relative to the first row."
        sections.append(report.Section(axis.capitalize(), text, COLUMNS, rows_of(workloads, found)))
    return sections


def rows_of(workloads: Mapping[str, Workload], found: Mapping[str, Timing]) -> list[dict[str, Any]]:
    """Cost, tokens and FLOP relative to the first row."""
    names = list(workloads)
    first, base = workloads[names[0]], found[names[0]]
    rows = []
    for name, workload in workloads.items():
        cost = base.times_as_fast_as(found[name])
        flop = workload.flop() / first.flop()
        row = {"": name, "step s": found[name].median, "cost": cost, "tokens": tokens(workload) / tokens(first)}
        rows.append({**row, "FLOP": flop, "cost / FLOP": cost / flop, **found[name].to_json()})
    return rows


# ---- ranks -------------------------------------------------------------------------------------


def measure_ranks(base: Workload, device: str, counts: Sequence[int], rounds: int) -> report.Section:
    """Processes of one thread (or one GPU) each, with the same batch each."""
    rows: list[dict[str, Any]] = []
    for count in counts:
        median = seconds_of_ranks(base, device, count, rounds)
        rate = count * base.batch / median
        rows.append({"": f"{count} ranks" if count > 1 else "1 rank", "step s": median, "videos/s": rate})
        rows[-1]["efficiency"] = rate / (count * rows[0]["videos/s"])
    how = "NCCL" if device == "cuda" else "gloo, one thread each"
    text = (
        f"{base} on each rank; DistributedDataParallel, {how}. Each number of ranks is a run of its own, so what else "
        "the machine does weighs more here than in the other tables."
    )
    columns = {"": "", "step s": ".3f", "videos/s": ".2f", "efficiency": ".0%"}
    return report.Section("Ranks", text, columns, rows)


def seconds_of_ranks(base: Workload, device: str, count: int, rounds: int) -> float:
    """The median step of `count` processes under torchrun."""
    asked = json.dumps([{**asdict(base), "keys": dict(base.keys)}, device, rounds])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    argv = [*launch, "-m", "benchmarks.scaling", asked]
    done = subprocess.run(argv, cwd=report.ROOT, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("seconds ")]
    if done.returncode or not lines:
        raise OSError(f"{count} ranks failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return float(lines[-1].split()[1])


def rank_main(problem: dict[str, Any], device: str, rounds: int) -> None:
    """What each rank does."""
    from engine.distributed import close_world, init_world

    world = init_world(device)
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(Workload(**problem), Path(folder), world.device, world)
        found = interleaved({"step": ours.step}, rounds=rounds, device=world.device)
    if world.is_main:
        sys.stdout.write(f"seconds {found['step'].median}\n")
    close_world()


# ---- the picture -------------------------------------------------------------------------------


def plot(sections: Sequence[report.Section], file: Path) -> bool:
    """One panel an axis: cost over FLOP; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(sections), figsize=(3.1 * len(sections), 3.2), layout="constrained")
    for panel, section in zip(panels, sections):
        labels = [row[""] for row in section.rows]
        places = range(len(labels))
        panel.plot(places, [row["FLOP"] for row in section.rows], "--", color="0.6", label="FLOP")
        panel.plot(places, [row["tokens"] for row in section.rows], ":", color="0.4", label="tokens")
        panel.plot(places, [row["cost"] for row in section.rows], "o-", color="C0", label="seconds")
        panel.set_xticks(list(places), labels, rotation=30, ha="right", fontsize=8)
        panel.set_title(section.title, fontsize=10)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("relative to the first")
    panels[0].legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return True


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, write."""
    from .train import asked

    workload, device = asked(arguments)
    if not arguments.quick:
        workload = replace(workload, batch=arguments.batch or 1, frames=8, latent=16)
    sections = measure(workload, device, arguments.rounds, arguments.clock, arguments.quick)
    if plot(sections, arguments.out / PICTURE):
        sections[0].picture = PICTURE
    sections.append(measure_ranks(workload, device.type, arguments.ranks, arguments.rounds))
    text = (
        "One training step of ours. `cost` is seconds and `FLOP` is counted, both relative to the first row; "
        "`cost / FLOP` of 1 is a cost in proportion to the arithmetic. Images pass the layers over time by, so "
        "they cost less than frames."
    )
    report.write("scaling", "How the cost of a training step grows", text, sections, arguments.out, device.type)


if __name__ == "__main__":
    rank_main(*json.loads(sys.argv[1]))
