"""The benchmarks, each a ratio to a reference timed in the same process.

    python -m benchmarks COMMAND [options]

Every command prints its tables and writes COMMAND.md and COMMAND.json to --out (`quality`: sampling.md and
sampling.json), again after every table. docs/benchmarks/README.md says what is compared with what. Nothing is
downloaded, and only `data`, `metrics` and `quality` read files.
"""

from __future__ import annotations

import argparse
import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import cli

Options = dict[str, dict[str, Any]]  # option -> arguments of argparse
MODES = ("eager", "compiled", "recomputing")  # of workload.MODES
QUICK: Options = {"quick": {"action": "store_true", "help": "tiny sizes, as a smoke test"}}
DEVICE: Options = {"device": {"choices": ("cpu", "cuda"), "help": "default: cuda where there is one"}}
THREADS: Options = {"threads": {"type": int, "help": "of torch (its own choice)"}}
BATCH: Options = {"batch": {"type": int, "help": "clips"}}
SIZE: Options = {"size": {"metavar": "NAME", "help": "default: Latte-S/2; on CUDA Latte-XL/2"}}
SHAPE: Options = {
    "frames": {"type": int, "help": "of a clip (16)"},
    "latent": {"type": int, "help": "side of the latents (32; on a CPU in `sample` 16)"},
}
PROBLEM: Options = {**DEVICE, **SIZE, **BATCH, **SHAPE, **QUICK}
TIMING: Options = {
    "rounds": {"type": int, "default": 3, "help": "measurements of each row (%(default)s)"},
    "clock": {"choices": ("wall", "cpu"), "default": "wall", "help": "cpu: for a machine that is shared"},
}
PRECISION: Options = {
    "precision": {"nargs": "+", "choices": ("fp32", "tf32", "bf16"), "help": "default: fp32 and bf16"}
}
MODE: Options = {"mode": {"nargs": "+", "choices": MODES, "default": MODES, "help": "modes of ours (all)"}}
PART: Options = {
    "part": {"nargs": "+", "choices": ("forward", "step"), "default": ["forward", "step"], "help": "(both)"}
}
TRACES: Options = {"traces": {"type": Path, "default": Path("results/bench"), "help": "folder (%(default)s)"}}
OUT: Options = {"out": {"type": Path, "default": Path("docs/benchmarks"), "help": "folder (%(default)s)"}}


def count(default: int | None, text: str) -> dict[str, Any]:
    """Returns an option that is a number."""
    return {"type": int, "default": default, "help": f"{text} (%(default)s)" if default else text}


@dataclass(frozen=True)
class Benchmark:
    """One command: the function of its name in `module`, and the title and first paragraph of its page."""

    module: str
    help: str
    title: str = ""
    text: str = ""
    options: Options = field(default_factory=dict)


# The table of all benchmarks. A function takes workload, timer and arguments, and yields tables.
BENCHMARKS = {
    "all": Benchmark("", "the network's benchmarks on this machine, one after the other: `make bench`", options=QUICK),
    "train": Benchmark(
        "training", "training step and forward pass", "Training step and forward pass",
        "The reference is the official algorithm at the official code's cost (`benchmarks/reference.py`), computed in "
        "the same precision; the official code itself computes in fp32, which tables in other precisions show in a row "
        "of its own. All rows of a table were timed in turn, in one process, on the same weights; `ratio` is how many "
        "times as fast as the reference, the median over rounds.",
        {**PROBLEM, **THREADS, **TIMING, **PRECISION, **MODE, **PART},
    ),
    "memory": Benchmark(
        "training", "peak memory of a training step", "Memory",
        "On the CPU it is the resident set minus its size before the network was made, with "
        "`MALLOC_MMAP_THRESHOLD_=65536`: freed memory then goes back to the system at once, as a GPU's caching "
        "allocator uses it again; by default glibc keeps up to twice the memory in use. On CUDA it is what torch "
        "allocated. Weights, gradients, moments, average and one step's activations.",
        {**PROBLEM, "kind": {"nargs": "+", "metavar": "NAME", "help": "default: all of them"}},
    ),
    "techniques": Benchmark(
        "training", "each technique with and without", "Techniques, one by one", "",
        {**PROBLEM, **THREADS, **TIMING,
         "only": {"nargs": "+", "metavar": "WORD", "help": "those with one of these in their name"}},
    ),
    "attention": Benchmark(
        "attention", "attention alone: its kernels by shape, with their errors", "Attention alone",
        "`both` is forward and backward, from the packed projection to its gradient; `ratio` is how many times as fast "
        "as `fused`, the median over rounds; `floors` is the time over that of moving each number once at 4.3 TB/s; "
        "`error` is that of the output, relative, to float64. `three projections` omits the extra cost of these.",
        {**PROBLEM, **THREADS, **TIMING, **PRECISION},
    ),
    "sample": Benchmark(
        "sampling", "the sampling loop with each of its options", "Sampling",
        "Random weights and no autoencoder: decoding is not part of it. `ms` is the time of a step. With fewer steps "
        "than 250, the time of 250 is that of as many evaluations; in bf16 both run under autocast.",
        {**PROBLEM, **THREADS, **TIMING, **PRECISION, "steps": count(None, "of the sampler (4; on CUDA 250)")},
    ),
    "scaling": Benchmark(
        "training", "cost by frames, size, depth, batch, images and ranks, with a plot",
        "How the cost of a training step grows",
        "One training step of ours. `cost` is seconds and `FLOP` is counted, both relative to the first row; `cost / "
        "FLOP` of 1 is a cost in proportion to the arithmetic. Temporal layers skip images, so they cost less than "
        "frames.",
        {**DEVICE, **SIZE, **BATCH, **THREADS, **QUICK, **TIMING,
         "ranks": {"type": int, "nargs": "+", "default": [1, 2], "help": "(1 2)"}},
    ),
    "data": Benchmark(
        "files", "reading clips from files, frames and latents; the training's wait for data",
        "Cost of reading clips", "The reference is the whole file decoded for every clip, as the official loaders do.",
        {"rounds": count(5, "repetitions of each measurement"), "steps": count(10, "of the training"),
         "videos": {"type": Path, "nargs": "*", "default": [], "metavar": "FILE", "help": "read these, too"}},
    ),
    "metrics": Benchmark(
        "files", "an evaluation from videos, arrays and frames; its memory", "Cost of an evaluation",
        "A tiny network replaces I3D, so that reading is what is measured.",
        {"clips": count(256, "of each side"), "workers": count(2, "loader processes")},
    ),
    "saving": Benchmark(
        "training", "checkpoints: none, synchronous and asynchronous", "Cost of checkpoints",
        "Whole loops, so that the work of the writing thread counts, too; `cost` is relative to the first row.",
        {**SIZE, "steps": count(40, "of each run"), "every": count(10, "steps between checkpoints"), **QUICK},
    ),
    "gpu": Benchmark(
        "training", "all benchmarks of the network on one GPU, in one command of under ten minutes", "On one GPU", "",
        {**DEVICE, **SIZE, **SHAPE, **QUICK, **TRACES, **TIMING,
         "minutes": {"type": float, "default": 9.0, "help": "start no table after (%(default)s)"}},
    ),
    "profile": Benchmark(
        "profile", "operators of a step by share of time and bound, with a trace; waits and copies",
        "Where a training step's time goes",
        "The bound is a roofline's: an operator whose FLOP per byte are above what the machine can do of both is bound "
        "by arithmetic, else by memory. FLOP are torch's own count, bytes those of its arguments and an output, each "
        "once; the roofs are measured in the same run, as a large product and a large copy.",
        {**PROBLEM, **THREADS, **PRECISION, **MODE, **TRACES},
    ),
    "t2v": Benchmark(
        "t2v", "text to video: sampling against diffusers' pipeline, quantised, compiled; decoding; encoding prompts",
        "Text to video",
        "Random weights. `ratio`: how many times as fast as the first row; `apart`: from its result, relative. Without "
        "diffusers ours alone is timed, and no decoder.",
        {**DEVICE, **QUICK, **TIMING, "steps": count(None, "of the sampler (50; on a CPU 4)")},
    ),
    "quality": Benchmark(
        "quality", "sampling quality and cost on the demo network: methods, steps, guidance; with a plot",
        "Sampling quality and cost",
        "The demo network (`assets/demo/latte`, x-start prediction, 32 pixels) from the same noise in every row. Cost "
        "is counted in forward passes of all layers for a video, independent of the machine. Grey levels are the "
        "distance from DPM-Solver++ in 250 steps, which solves the probability flow; not of a stochastic method. The "
        "Fréchet distance is to 1024 drawn clips, on 24 plain features (mean colour of each quarter of the frame, and "
        "its mean change): it is comparable within this page only. `Drawn clips` are as many others: the floor.",
        {**DEVICE, **THREADS, "videos": count(64, "of each row, a multiple of 8")},
    ),
}  # fmt: skip
# what `all` runs
EVERYTHING = [
    "train --rounds 2",
    "memory --kind reference,fp32 ours,fp32 ours,fp32,compiled ours,fp32,recomputing",
    "techniques --rounds 2 --batch 1 --latent 16",
    "attention",
    "sample --rounds 2 --precision fp32",
    "scaling --rounds 2",
    "profile --batch 1",
]


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the command line; loads no torch."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=text)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, benchmark in BENCHMARKS.items():
        added = commands.add_parser(command, help=benchmark.help, description=benchmark.help)
        for name, settings in {**OUT, **benchmark.options}.items():
            added.add_argument(f"--{name}", **settings)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Runs a benchmark; returns the exit code."""
    arguments = parse(argv)
    name, benchmark = arguments.command, BENCHMARKS[arguments.command]
    if name == "all":
        for line in EVERYTHING:
            main([*line.split(), "--out", str(arguments.out), *(["--quick"] if arguments.quick else [])])
        return 0
    # not at the top: they load torch and optional packages
    report, workload = (importlib.import_module(f"benchmarks.{module}") for module in ("report", "workload"))
    measure = getattr(importlib.import_module(f"benchmarks.{benchmark.module}"), name)
    file = "sampling" if name == "quality" else name
    page = report.Page(file, benchmark.title, benchmark.text, arguments.out, argv)
    for table in measure(*workload.read_problem(arguments), arguments):
        page.add(table)
    page.finish()
    return 0


if __name__ == "__main__":
    cli.run(main)
