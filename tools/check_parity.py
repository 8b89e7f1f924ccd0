"""Compare this repository with what the official implementation computed.

    python -m tools.check_parity DIR [--device cpu|cuda] [--precision fp32|bf16]

DIR holds golden tensors of the official code (safetensors files with their configuration in the metadata).
One line per quantity: its largest absolute error and its bound, 1e-5 x max(1, largest absolute golden value)
in fp32 on CPU. Exit code 0 if all are within bounds, 1 if one is not or is missing, 2 for bad use.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from engine.cli import run
from tools.parity.checks import CHECKS, key_list_problem
from tools.parity.goldens import FP32_BOUND, Goldens, Mismatch, Outcome, Setting, compare

KEY_LIST = "state_dict_keys.json"


def outcomes(setting: Setting) -> Iterator[Outcome]:
    """Every comparison of a folder, in a fixed order. A file that is missing or broken is one of them."""
    for stem, check in CHECKS.items():
        try:
            golden = Goldens(setting.folder / f"{stem}.safetensors", setting.device)
            for quantity in check(golden, setting):
                yield compare(quantity, golden, stem, setting.network_bound)
        except (Mismatch, ValueError) as problem:
            yield Outcome(stem, problem=str(problem))
            continue
        unread = sorted(golden.tensors.keys() - golden.used)
        if unread:
            yield Outcome(stem, note=f"not compared, not known: {', '.join(unread)}")
    if (setting.folder / KEY_LIST).is_file():
        yield from key_lists(setting.folder / KEY_LIST)


def key_lists(path: Path) -> Iterator[Outcome]:
    """Keys and shapes of the named networks; the error is 0 where all agree."""
    try:
        for name, official in json.loads(path.read_text()).items():
            yield Outcome(f"{path.stem}/{name}", error=0, bound=0, problem=key_list_problem(name, official))
    except (KeyError, ValueError, TypeError, AttributeError) as problem:
        yield Outcome(path.stem, problem=f"cannot be read: {problem!r}")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; argparse exits with 2 for bad use."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="check_parity"
    )
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Print all outcomes; 1 if one is bad."""
    arguments = parse(argv)
    if not arguments.folder.is_dir():
        raise FileNotFoundError(f"{arguments.folder} is not a folder; give the one that holds the goldens.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no usable CUDA device; use --device cpu.")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    setting = Setting(arguments.folder, arguments.device, arguments.precision)
    if setting.network_bound != FP32_BOUND:
        print(
            f"{setting.device}, {setting.precision}: bounds of what passes through a network are widened "
            f"from {FP32_BOUND:.0e} to {setting.network_bound:.0e}"
        )
    found = []
    for outcome in outcomes(setting):
        print(outcome.line(width=48), flush=True)
        found += [outcome.ok] if not outcome.note else []
    print(f"{sum(found)} of {len(found)} within bounds ({setting.device}, {setting.precision})")
    return 0 if all(found) else 1


if __name__ == "__main__":
    run(main)
