"""The benchmarks, each a ratio to a reference timed in the same process.

    python -m benchmarks COMMAND [options]

Every command prints its tables and writes COMMAND.md and COMMAND.json to --out (`quality`: sampling.md and
sampling.json). docs/benchmarks/README.md says what is compared with what. Nothing is downloaded, and only `data`,
`metrics`, `saving` and `quality` read files.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from engine import cli

MODES = ("eager", "compiled", "recomputing")  # of workload.MODES
# command -> help; the module of that name in this package has `run(arguments)`
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
    "saving": "checkpoints: none, synchronous and asynchronous",
    "gpu": "all benchmarks of the network on one GPU, in one command of under ten minutes",
    "profile": "operators of a step by share of time and bound, with a trace; waits and copies",
    "t2v": "text to video: sampling against diffusers' pipeline, quantised, compiled; decoding; encoding prompts",
    "quality": "sampling quality and cost on the demo network: methods, steps, guidance; with a plot",
}

# option -> arguments of argparse
OPTIONS: dict[str, dict[str, Any]] = {
    "out": {"type": Path, "default": Path("docs/benchmarks"), "help": "folder (%(default)s)"},
    "device": {"choices": ("cpu", "cuda"), "help": "default: cuda where there is one"},
    "size": {"metavar": "NAME", "help": "default: Latte-S/2; on CUDA Latte-XL/2"},
    "batch": {"type": int, "help": "clips"},
    "frames": {"type": int, "help": "of a clip (16)"},
    "latent": {"type": int, "help": "side of the latents (32; on a CPU in `sample` 16)"},
    "precision": {"nargs": "+", "choices": ("fp32", "tf32", "bf16"), "help": "default: fp32 and bf16"},
    "mode": {"nargs": "+", "choices": MODES, "default": MODES, "help": "modes of ours (all)"},
    "part": {"nargs": "+", "choices": ("forward", "step"), "default": ["forward", "step"], "help": "(both)"},
    "rounds": {"type": int, "default": 3, "help": "measurements of each row (%(default)s)"},
    "threads": {"type": int, "help": "of torch (its own choice)"},
    "clock": {"choices": ("wall", "cpu"), "default": "wall", "help": "cpu: for a machine that is shared"},
    "quick": {"action": "store_true", "help": "tiny sizes, as a smoke test"},
    "traces": {"type": Path, "default": Path("results/bench"), "help": "folder (%(default)s)"},
    "workers": {"type": int, "default": 2, "help": "loader processes (%(default)s)"},
}
PROBLEM, TIMING = "device size batch frames latent threads quick", "rounds clock"
# command -> options
READS = {
    "all": "quick",
    "train": f"{PROBLEM} {TIMING} precision mode part",
    "memory": "device size batch frames latent quick",
    "techniques": f"{PROBLEM} {TIMING}",
    "attention": f"{PROBLEM} {TIMING} precision",
    "sample": f"{PROBLEM} {TIMING} precision",
    "scaling": f"device size batch threads quick {TIMING}",
    "profile": f"{PROBLEM} precision mode traces",
    "gpu": f"device size frames latent quick traces {TIMING}",
    "t2v": f"device quick {TIMING}",
    "metrics": "workers",
    "quality": "device threads",
}
# command -> options of its own
OWN: dict[str, dict[str, dict[str, Any]]] = {
    "memory": {"kind": {"nargs": "+", "metavar": "NAME", "help": "default: all of them"}},
    "techniques": {"only": {"nargs": "+", "metavar": "WORD", "help": "those with one of these in their name"}},
    "sample": {"steps": {"type": int, "help": "of the sampler (4; on CUDA 250)"}},
    "scaling": {"ranks": {"type": int, "nargs": "+", "default": [1, 2], "help": "(1 2)"}},
    "data": {
        "rounds": {"type": int, "default": 5, "help": "repetitions of each measurement (%(default)s)"},
        "steps": {"type": int, "default": 10, "help": "of the training (%(default)s)"},
        "videos": {"type": Path, "nargs": "*", "default": [], "metavar": "FILE", "help": "read these, too"},
    },
    "metrics": {"clips": {"type": int, "default": 256, "help": "of each side (%(default)s)"}},
    "saving": {
        "steps": {"type": int, "default": 40, "help": "of each run (%(default)s)"},
        "every": {"type": int, "default": 10, "help": "steps between checkpoints (%(default)s)"},
    },
    "t2v": {"steps": {"type": int, "help": "of the sampler (50; on a CPU 4)"}},
    "gpu": {"minutes": {"type": float, "default": 9.0, "help": "start no table after (%(default)s)"}},
    "quality": {"videos": {"type": int, "default": 64, "help": "of each row, a multiple of 8 (%(default)s)"}},
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


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the command line; loads no torch."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=text)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, description in COMMANDS.items():
        added = commands.add_parser(command, help=description, description=description)
        shared = {name: OPTIONS[name] for name in ("out", *READS.get(command, "").split())}
        for name, settings in {**shared, **OWN.get(command, {})}.items():
            added.add_argument(f"--{name}", **settings)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Runs a benchmark; returns the exit code."""
    arguments = parse(argv)
    if arguments.command == "all":
        for line in EVERYTHING:
            main([*line.split(), "--out", str(arguments.out), *(["--quick"] if arguments.quick else [])])
        return 0
    importlib.import_module("benchmarks.report").start(argv)
    importlib.import_module(f"benchmarks.{arguments.command}").run(arguments)
    return 0


if __name__ == "__main__":
    cli.run(main)
