"""The benchmarks, each a ratio to a reference timed in the same process.

    python -m benchmarks COMMAND [options]

Every command prints its tables and writes COMMAND.md and COMMAND.json into --out. docs/benchmarks/README.md says what
is compared with what. Nothing is downloaded, and only `data`, `metrics` and `saving` read files.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from engine import cli

from . import report
from .modes import MODES

# command -> what it measures; its module in this package has `run(arguments)`
COMMANDS = {
    "all": "the network's benchmarks on this machine, one after the other: `make bench`",
    "train": "training step and forward pass",
    "memory": "peak memory of a training step",
    "techniques": "each technique with and without",
    "attention": "attention alone: its kernels by shape, with their errors",
    "sample": "the sampling loop with each of its options",
    "scaling": "cost by frames, size, depth, batch, images and ranks, with a plot",
    "data": "reading clips from files, frames and latents; the training's wait for data",
    "metrics": "an evaluation from videos, arrays and frames; its memory",
    "saving": "checkpoints in and beside the training",
    "gpu": "all that concerns the network on one GPU, in one command of under ten minutes",
    "profile": "operators of a step by share of time and bound, with a trace; waits and copies",
    "t2v": "text to video: sampling against diffusers' pipeline, quantised, compiled; decoding; encoding prompts",
}

# what is computed, and how it is timed
OPTIONS: dict[str, dict[str, Any]] = {
    "device": {"choices": ("cpu", "cuda"), "help": "default: cuda where there is one"},
    "size": {"metavar": "NAME", "help": "default: Latte-S/2; on CUDA Latte-XL/2"},
    "batch": {"type": int, "help": "clips"},
    "frames": {"type": int, "help": "of a clip (16)"},
    "latent": {"type": int, "help": "side of the latents (32; on a CPU in `sample` 16)"},
    "precision": {"nargs": "+", "choices": ("fp32", "tf32", "bf16"), "help": "default: fp32 and bf16"},
    "mode": {"nargs": "+", "choices": MODES, "default": [*MODES], "help": "rows beside the reference (all)"},
    "part": {"nargs": "+", "choices": ("forward", "step"), "default": ["forward", "step"], "help": "(both)"},
    "rounds": {"type": int, "default": 3, "help": "of all in turn (%(default)s)"},
    "threads": {"type": int, "help": "of torch (its own choice)"},
    "clock": {"choices": ("wall", "cpu"), "default": "wall", "help": "cpu: for a machine that is shared"},
    "quick": {"action": "store_true", "help": "tiny sizes: does it run at all?"},
}
PROBLEM, TIMING = "device size batch frames latent threads quick", "rounds clock"
READS = {
    "all": "quick",
    "train": f"{PROBLEM} {TIMING} precision mode part",
    "memory": "device size batch frames latent quick",
    "techniques": f"{PROBLEM} {TIMING}",
    "attention": f"{PROBLEM} {TIMING} precision",
    "sample": f"{PROBLEM} {TIMING} precision",
    "scaling": f"device size batch threads quick {TIMING}",
    "profile": f"{PROBLEM} precision mode",
    "gpu": f"device size frames latent quick {TIMING}",
    "t2v": f"device quick {TIMING}",
}
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


def parser() -> argparse.ArgumentParser:
    """Of the command line; loads no torch."""
    text = argparse.RawDescriptionHelpFormatter
    whole = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=text)
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    added = {name: commands.add_parser(name, help=what, description=what) for name, what in COMMANDS.items()}
    for each in added.values():
        each.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder (%(default)s)")
    for name, options in READS.items():
        for option in options.split():
            added[name].add_argument(f"--{option}", **OPTIONS[option])
    added["memory"].add_argument("--kind", nargs="+", metavar="NAME", help="default: all of them")
    added["techniques"].add_argument("--only", nargs="+", metavar="WORD", help="those whose name holds one of these")
    added["sample"].add_argument("--steps", type=int, help="of each walk (4; on CUDA 250)")
    added["scaling"].add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="(1 2)")
    _add_reading(added)
    added["t2v"].add_argument("--steps", type=int, help="of the sampler (50; on a CPU 4)")
    for name in ("profile", "gpu"):
        added[name].add_argument("--traces", type=Path, default=Path("results/bench"), help="folder (%(default)s)")
    added["gpu"].add_argument("--minutes", type=float, default=9.0, help="begin no table after (%(default)s)")
    return whole


def _add_reading(added: dict[str, argparse.ArgumentParser]) -> None:
    """Of the commands that read and write files."""
    data, metrics, saving = (added[name] for name in ("data", "metrics", "saving"))
    data.add_argument("--rounds", type=int, default=5, help="repetitions of each measurement (%(default)s)")
    data.add_argument("--steps", type=int, default=10, help="of the training (%(default)s)")
    data.add_argument("--videos", type=Path, nargs="*", default=[], metavar="FILE", help="read these too")
    metrics.add_argument("--clips", type=int, default=256, help="of each side (%(default)s)")
    metrics.add_argument("--workers", type=int, default=2, help="loader processes (%(default)s)")
    saving.add_argument("--steps", type=int, default=40, help="of each run (%(default)s)")
    saving.add_argument("--every", type=int, default=10, help="steps between checkpoints (%(default)s)")


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    arguments = parser().parse_args(argv)
    report.begin(argv)
    if arguments.command == "all":
        for line in EVERYTHING:
            main([*line.split(), "--out", str(arguments.out), *(["--quick"] if arguments.quick else [])])
        return 0
    importlib.import_module(f"benchmarks.{arguments.command}").run(arguments)
    return 0


if __name__ == "__main__":
    cli.run(main)
