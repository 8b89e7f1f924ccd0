"""Compares this repository's results with those of the official implementation.

    python -m tools.check_parity DIR [--device cpu|cuda] [--precision fp32|bf16]

DIR holds golden tensors of the official code (safetensors files with their configuration in the metadata).
Prints a line per quantity: its largest absolute error and its bound, 1e-5 x max(1, largest absolute golden value)
in fp32 on CPU. Exit code 0 if all are within bounds, 1 if one is not or is missing, 2 for bad usage.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common.checks import require
from engine import cli
from tools.parity import CHECKS, Goldens, Mismatch, Quantity, Setting, find_key_problem

KEY_LIST = "state_dict_keys.json"
FP32_BOUND = 1e-5
# (device, precision) -> relative bound of network outputs; the goldens were made in fp32 on a CPU
NETWORK_BOUNDS = {("cpu", "fp32"): 1e-5, ("cuda", "fp32"): 1e-4, ("cpu", "bf16"): 5e-2, ("cuda", "bf16"): 5e-2}


class Outcome(NamedTuple):
    """The outcome for one quantity; error and bound are NaN if there is only a `problem` or a `note`."""

    name: str
    error: float = math.nan
    bound: float = math.nan
    problem: str = ""
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the error is within its bound (NaN is not), or this is only a note."""
        return bool(self.note) or (not self.problem and self.error <= self.bound)


def compare_all(setting: Setting) -> Iterator[Outcome]:
    """Yields all outcomes for a folder in a fixed order; a missing or broken file yields one with a `problem`."""
    for stem, check in CHECKS.items():
        try:
            golden = Goldens(setting.folder / f"{stem}.safetensors", setting.device)
            for quantity in check(golden, setting):
                yield compare(quantity, golden, f"{stem}/{quantity.name}", setting)
        except (Mismatch, ValueError) as problem:
            yield Outcome(stem, problem=str(problem))
            continue
        unread = sorted(golden.tensors.keys() - golden.used)
        if unread:
            yield Outcome(stem, note=f"unknown, not compared: {', '.join(unread)}")
    lists = setting.folder / KEY_LIST
    try:
        for name, official in json.loads(lists.read_text()).items() if lists.is_file() else ():
            yield Outcome(f"{lists.stem}/{name}", error=0, bound=0, problem=find_key_problem(name, official))
    except (KeyError, ValueError, TypeError, AttributeError) as problem:
        yield Outcome(lists.stem, problem=f"cannot be read: {problem!r}")


def compare(quantity: Quantity, golden: Goldens, name: str, setting: Setting) -> Outcome:
    """Returns the outcome for `quantity`, the worst one if it has several goldens."""
    relative = NETWORK_BOUNDS[setting.device, setting.precision] if quantity.network else FP32_BOUND
    try:
        computed = quantity.compute()
        if not isinstance(computed, dict):
            return _compare_tensor(name, computed, golden[quantity.name], relative)
        wanted = golden.group(quantity.name.removesuffix("*"))
        if differing := sorted(computed.keys() ^ wanted.keys()):
            return Outcome(name, problem=f"keys differ: {', '.join(differing[:3])}")
        outcomes = [_compare_tensor(name, computed[key], wanted[key], relative) for key in wanted]
        bad = (each for each in outcomes if each.problem or math.isnan(each.error))
        return next(bad, None) or max(outcomes, key=lambda outcome: outcome.error / outcome.bound)
    except (Mismatch, ValueError, TypeError, KeyError, RuntimeError, IndexError) as problem:  # from malformed goldens
        return Outcome(name, problem=str(problem))


def _compare_tensor(name: str, computed: Tensor, wanted: Tensor, relative: float) -> Outcome:
    if computed.shape != wanted.shape:
        return Outcome(name, problem=f"shape {tuple(computed.shape)}, not {tuple(wanted.shape)}")
    if computed.is_floating_point() != wanted.is_floating_point():
        return Outcome(name, problem=f"{computed.dtype}, not {wanted.dtype}")
    wanted = wanted.double()
    error = (computed.to(wanted) - wanted).abs().max().item()
    return Outcome(name, error, relative * max(1.0, wanted.abs().max().item()))


def main(argv: list[str]) -> int:
    """Prints all outcomes; returns 1 if any is bad."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    setting = Setting(**vars(parser.parse_args(argv)))
    if not setting.folder.is_dir():
        raise FileNotFoundError(f"{setting.folder} is not a folder; give the one that holds the goldens.")
    usable = setting.device == "cpu" or torch.cuda.is_available()
    require(usable, "--device cuda: this machine has no usable CUDA device; use --device cpu.")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    where, bound = f"{setting.device}, {setting.precision}", NETWORK_BOUNDS[setting.device, setting.precision]
    if bound != FP32_BOUND:
        print(f"{where}: bounds of network outputs are widened from {FP32_BOUND:.0e} to {bound:.0e}")
    verdicts = []
    for outcome in compare_all(setting):
        verdict = "note" if outcome.note else "ok  " if outcome.ok else "FAIL"
        detail = outcome.note or outcome.problem or f"error {outcome.error:8.2e}  bound {outcome.bound:8.2e}"
        print(f"{verdict}  {outcome.name:48}  {detail}", flush=True)
        verdicts += [] if outcome.note else [outcome.ok]
    print(f"{sum(verdicts)} of {len(verdicts)} within bounds ({where})")
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    cli.run(main)
