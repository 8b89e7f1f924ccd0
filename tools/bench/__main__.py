"""The benchmarks, each a ratio to a reference timed in the same process.

    python -m tools.bench COMMAND [options]

Every command prints its tables and writes COMMAND.md and COMMAND.json into --out. docs/benchmarks/README.md says what
is compared with what. Nothing is downloaded, and only `data`, `metrics` and `saving` read files.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from engine import cli

from . import MODES, report

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

QUICK = "tiny sizes: does it run at all?"
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
    whole = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__, formatter_class=text)
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    added = {name: commands.add_parser(name, help=what, description=what) for name, what in COMMANDS.items()}
    for each in added.values():
        each.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder (%(default)s)")
    for name in ("train", "memory", "techniques", "attention", "sample", "scaling", "profile", "gpu"):
        _add_workload(added[name])
    added["all"].add_argument("--quick", action="store_true", help=QUICK)
    added["memory"].add_argument("--kind", nargs="+", metavar="NAME", help="default: all of them")
    added["techniques"].add_argument("--only", nargs="+", metavar="WORD", help="those whose name holds one of these")
    added["sample"].add_argument("--steps", type=int, help="of each walk (4; on CUDA 250)")
    added["scaling"].add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="(1 2)")
    _add_reading(added)
    _add_text(added["t2v"])
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


def _add_text(command: argparse.ArgumentParser) -> None:
    """Of text to video."""
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    command.add_argument("--steps", type=int, help="of the sampler (50; on a CPU 4)")
    command.add_argument("--rounds", type=int, default=3, help="of each row (%(default)s)")
    command.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that is shared")
    command.add_argument("--quick", action="store_true", help=QUICK)


def _add_workload(command: argparse.ArgumentParser) -> None:
    """Of what is computed, and how it is timed."""
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    command.add_argument("--size", metavar="NAME", help="default: Latte-S/2; on CUDA Latte-XL/2")
    command.add_argument("--batch", type=int, help="clips (2; on CUDA a sweep)")
    command.add_argument("--frames", type=int, default=16)
    command.add_argument("--latent", type=int, default=32, help="side of the latents (%(default)s)")
    command.add_argument("--precision", nargs="+", choices=("fp32", "tf32", "bf16"), help="default: fp32 and bf16")
    command.add_argument("--mode", nargs="+", choices=MODES, default=[*MODES])
    command.add_argument("--part", nargs="+", choices=("forward", "step"), default=["forward", "step"])
    command.add_argument("--rounds", type=int, default=3, help="of all in turn (%(default)s)")
    command.add_argument("--threads", type=int, help="of torch (its own choice)")
    command.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that is shared")
    command.add_argument("--quick", action="store_true", help=QUICK)


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    arguments = parser().parse_args(argv)
    report.begin(argv)
    if arguments.command == "all":
        for line in EVERYTHING:
            main([*line.split(), "--out", str(arguments.out), *(["--quick"] if arguments.quick else [])])
        return 0
    importlib.import_module(f"tools.bench.{arguments.command}").run(arguments)
    return 0


if __name__ == "__main__":
    cli.run(main)
