"""Runs benchmarks, each relative to a reference timed in the same process.

    python -m benchmarks COMMAND [options]

Every command prints its tables and writes COMMAND.md and COMMAND.json to --out (`quality`: sampling.md and
sampling.json), rewritten after every table. docs/benchmarks/README.md explains the comparisons. Nothing is
downloaded, and only `data`, `metrics` and `quality` read files.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any, NamedTuple

from engine import cli

OPTIONS: dict[str, dict[str, Any]] = {  # option -> arguments of argparse
    "out": {"type": Path, "default": Path("docs/benchmarks"), "help": "folder (%(default)s)"},
    "quick": {"action": "store_true", "help": "tiny sizes, as a smoke test"},
    "device": {"choices": ("cpu", "cuda"), "help": "default: cuda if available"},
    "threads": {"type": int, "help": "torch's CPU threads (torch's default)"},
    "rounds": {"type": int, "default": 3, "help": "measurements of each row (%(default)s)"},
    "clock": {"choices": ("wall", "cpu"), "default": "wall", "help": "cpu: for a shared machine"},
    "size": {"metavar": "NAME", "help": "default: Latte-S/2; on CUDA Latte-XL/2"},
    "batch": {"type": int, "help": "clips"},
    "frames": {"type": int, "help": "frames per clip (16)"},
    "latent": {"type": int, "help": "side of the latents (32; on a CPU in `sample` 16)"},
    "precision": {"nargs": "+", "choices": ("fp32", "tf32", "bf16"), "help": "default: fp32 and bf16"},
    "steps": {"type": int, "help": "sampler steps; default: few on a CPU, 250 (t2v: 50) on CUDA"},
    "traces": {"type": Path, "default": Path("results/bench"), "help": "folder (%(default)s)"},
    "only": {"nargs": "+", "metavar": "WORD", "help": "techniques whose name contains one of these"},
}
PROBLEM = "quick device size batch frames latent"
TIMED = f"{PROBLEM} threads rounds clock"


class Benchmark(NamedTuple):
    """A command: `module` holds the function with the command's name; `help` is also the page's title."""

    module: str
    options: str
    help: str


# The functions take workload, timer and arguments, and yield tables. docs/benchmarks/README.md explains each.
BENCHMARKS = {
    "all": Benchmark("", "quick", "the network's benchmarks on this machine, one after the other: `make bench`"),
    "train": Benchmark("training", f"{TIMED} precision", "training step and forward pass"),
    "memory": Benchmark("training", f"{PROBLEM} precision", "peak memory of a training step"),
    "techniques": Benchmark("training", f"{TIMED} only", "each technique with and without"),
    "attention": Benchmark("attention", f"{TIMED} precision", "attention alone: its kernels by shape, with errors"),
    "sample": Benchmark("sampling", f"{TIMED} precision steps", "the sampling loop with each of its options"),
    "scaling": Benchmark(
        "training", "quick device size batch threads rounds clock",
        "cost of a training step by frames, size, depth, batch, images and ranks, with a plot",
    ),
    "data": Benchmark("files", "rounds", "reading clips from files, frames and latents; the wait for data"),
    "metrics": Benchmark("files", "", "an evaluation from videos, arrays and frames"),
    "saving": Benchmark("training", "quick size", "checkpoints: none, synchronous and asynchronous"),
    "gpu": Benchmark(
        "training", "quick device size frames latent rounds clock traces",
        "all benchmarks of the network on one GPU, in one command of under ten minutes",
    ),
    "profile": Benchmark(
        "profile", f"{PROBLEM} threads precision traces",
        "operators of a step by share of time and bound, with a trace; waits and copies",
    ),
    "t2v": Benchmark(
        "t2v", "quick device rounds clock steps",
        "text to video: sampling against diffusers' pipeline, quantised, compiled; decoding; encoding prompts",
    ),
    "quality": Benchmark(
        "quality", "device threads",
        "sampling quality and cost on the demo network: methods, steps, guidance; with a plot",
    ),
}  # fmt: skip
EVERYTHING = [  # what `all` runs
    "train --rounds 2",
    "memory --precision fp32",
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
        for name in ["out", *benchmark.options.split()]:
            added.add_argument(f"--{name}", **OPTIONS[name])
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
    page = report.Page(file, benchmark.help.capitalize(), arguments.out, argv)
    for table in measure(*workload.read_problem(arguments), arguments):
        page.add(table)
    page.finish()
    return 0


if __name__ == "__main__":
    cli.run(main)
