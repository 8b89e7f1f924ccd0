"""Growth of a training step's cost: over frames, size, depth, batch, joint images and ranks."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from engine.distributed import close_world, init_world

from . import report
from .timing import Case, Timer, compare
from .workload import Ours, Workload, read_problem

PICTURE = "scaling.png"
COLUMNS = {"": "", "step s": ".3f", "cost": ".2f", "tokens": ".2f", "FLOP": ".2f", "cost / FLOP": ".2f"}
DEPTHS = {"model.name": "custom", "model.hidden_size": 384, "model.num_heads": 6, "model.patch_size": 2}
ABOUT = """
One training step of ours. `cost` is seconds and `FLOP` is counted, both relative to the first row; `cost / FLOP` of 1
is a cost in proportion to the arithmetic. Temporal layers skip images, so they cost less than frames.
"""


def axes_of(base: Workload, quick: bool = False) -> dict[str, dict[str, Workload]]:
    """Returns axis -> value -> workload; the first of each axis is the reference."""
    depths = (2, 4) if quick else (4, 8, 12, 16)
    sides, images = ((4, 8), (0, 2)) if quick else ((8, 16, 24, 32), (0, 4, 8))
    short = (1, 2) if quick else (1, 2, 4)
    custom = replace(base, size="custom")
    return {
        "frames": {f"{4 * count} frames": replace(base, frames=4 * count) for count in (*short, 8)},
        "size": {f"{side} x {side}": replace(base, latent=side) for side in sides},
        "depth": {f"{depth} layers": custom.with_keys({**DEPTHS, "model.depth": depth}) for depth in depths},
        "batch": {f"batch {count}": replace(base, batch=count) for count in short},
        "joint images": {f"{base.frames} frames + {count}": replace(base, images=count) for count in images},
    }


def count_tokens(workload: Workload) -> int:
    """Returns the tokens of the batch; an image counts as a frame."""
    return workload.batch * (workload.frames + workload.images) * (workload.latent // 2) ** 2


def measure(base: Workload, timer: Timer, quick: bool = False) -> list[report.Section]:
    """Returns a table for each axis."""
    sections = []
    for axis, workloads in axes_of(base, quick).items():
        first = next(iter(workloads.values()))
        with tempfile.TemporaryDirectory() as folder:
            cases = [
                Case(
                    value, Ours(workload, Path(folder) / str(place), timer.device).step, flop=workload.flop(),
                    cells={"tokens": count_tokens(workload) / count_tokens(first)},
                )
                for place, (value, workload) in enumerate(workloads.items())
            ]  # fmt: skip
            rows = compare(cases, COLUMNS, timer)
        text = f"{first}, and so on; relative to the first row."
        sections.append(report.Section(axis.capitalize(), text, COLUMNS, rows))
    return sections


# ---- ranks -------------------------------------------------------------------------------------


def measure_ranks(base: Workload, device: str, counts: Sequence[int], rounds: int) -> report.Section:
    """Returns the table of numbers of processes, each with one thread or GPU, and the same batch."""
    rows: list[dict[str, Any]] = []
    for count in counts:
        median = time_ranks(base, device, count, rounds)
        rate = count * base.batch / median
        rows.append({"": f"{count} ranks" if count > 1 else "1 rank", "step s": median, "videos/s": rate})
        rows[-1]["efficiency"] = rate / (count * rows[0]["videos/s"])
    how = "NCCL" if device == "cuda" else "gloo, one thread each"
    text = (
        f"{base} on each rank; DistributedDataParallel, {how}. Each number of ranks is a run of its own, so other load "
        "on the machine weighs more here than in the other tables."
    )
    columns = {"": "", "step s": ".3f", "videos/s": ".2f", "efficiency": ".0%"}
    return report.Section("Ranks", text, columns, rows)


def time_ranks(base: Workload, device: str, count: int, rounds: int) -> float:
    """Returns the median seconds of a step on `count` processes under torchrun."""
    problem = json.dumps([{**asdict(base), "keys": dict(base.keys)}, device, rounds])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    argv = [*launch, "-m", "benchmarks.scaling", problem]
    done = subprocess.run(
        argv, cwd=report.ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("seconds ")]
    if done.returncode or not lines:
        raise OSError(f"{count} ranks failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return float(lines[-1].split()[1])


def time_rank(problem: dict[str, Any], device: str, rounds: int) -> None:
    """Times the step on one rank of `time_ranks`."""
    world = init_world(device)
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(Workload(**problem), Path(folder), world.device, world)
        found = Timer(world.device, rounds).time({"step": ours.step})
    if world.is_main:
        sys.stdout.write(f"seconds {found['step'].median}\n")
    close_world()


# ---- the picture -------------------------------------------------------------------------------


def plot(sections: Sequence[report.Section], file: Path) -> bool:
    """Draws a panel for each axis; returns False if matplotlib is not installed."""
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
    """Measures, prints and writes the tables."""
    workload, timer = read_problem(arguments)
    if not arguments.quick:
        workload = replace(workload, batch=arguments.batch or 1, frames=8, latent=16)
    sections = measure(workload, timer, arguments.quick)
    if plot(sections, arguments.out / PICTURE):
        sections[0].picture = PICTURE
    sections.append(measure_ranks(workload, timer.device.type, arguments.ranks, arguments.rounds))
    title = "How the cost of a training step grows"
    report.write("scaling", title, ABOUT, sections, arguments.out, timer.device)


if __name__ == "__main__":
    time_rank(*json.loads(sys.argv[1]))
