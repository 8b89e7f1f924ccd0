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

# command -> what it measures; its module in this package has `run(arguments)`
COMMANDS = {
    "train": "training step and forward pass",
}


def parser() -> argparse.ArgumentParser:
    """Of the command line; loads no torch."""
    text = argparse.RawDescriptionHelpFormatter
    whole = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__, formatter_class=text)
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    added = {name: commands.add_parser(name, help=what, description=what) for name, what in COMMANDS.items()}
    for each in added.values():
        each.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder (%(default)s)")
    for name in ("train",):
        _add_workload(added[name])
    return whole


def _add_workload(command: argparse.ArgumentParser) -> None:
    """Of what is computed, and how it is timed."""
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    command.add_argument("--size", metavar="NAME", help="default: Latte-S/2; on CUDA Latte-XL/2")
    command.add_argument("--batch", type=int, help="clips (2; on CUDA a sweep)")
    command.add_argument("--frames", type=int, default=16)
    command.add_argument("--latent", type=int, default=32, help="side of the latents (%(default)s)")
    command.add_argument("--precision", nargs="+", choices=("fp32", "tf32", "bf16"), help="default: fp32 and bf16")
    command.add_argument("--mode", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    command.add_argument("--part", nargs="+", choices=("forward", "step"), default=["forward", "step"])
    command.add_argument("--rounds", type=int, default=3, help="of all in turn (%(default)s)")
    command.add_argument("--threads", type=int, help="of torch (its own choice)")
    command.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: for a machine that is shared")
    command.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    arguments = parser().parse_args(argv)
    importlib.import_module(f"tools.bench.{arguments.command}").run(arguments)
    return 0


if __name__ == "__main__":
    cli.run(main)
