"""Golden tensors of the official implementation, and what it means to agree with them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

# what the official constructors assume where a configuration is silent
OFFICIAL_DEFAULTS: dict[str, Any] = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "num_frames": 16,
    "class_dropout_prob": 0.1,
    "num_classes": 1000,
    "learn_sigma": True,
    "extras": 1,
    "use_image_num": 0,
    "cfg_scale": 7.0,
    "lr": 1e-4,
    "clip_max_norm": 0.1,
    "ema_decay": 0.9999,
    "note": "",
}

FP32_BOUND = 1e-5
# relative bounds where a network runs otherwise than in fp32 on CPU, where the goldens were made
NETWORK_BOUNDS = {
    ("cpu", "fp32"): 1e-5,
    ("cuda", "fp32"): 1e-4,
    ("cpu", "bf16"): 5e-2,
    ("cuda", "bf16"): 5e-2,
}


class Mismatch(Exception):
    """A quantity that cannot be compared; its message says why."""


@dataclass(frozen=True)
class Setting:
    """Folder of the goldens, device and precision."""

    folder: Path
    device: str
    precision: str

    @property
    def network_bound(self) -> float:
        """Relative bound of what passes through a network."""
        return NETWORK_BOUNDS[self.device, self.precision]


class Goldens:
    """The tensors of one golden file by name, on the device, and its configuration."""

    def __init__(self, path: Path, device: str) -> None:
        if not path.is_file():
            raise Mismatch("missing: there is no such file")
        try:
            with safe_open(path, "pt", device=device) as file:
                self.tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                config = json.loads((file.metadata() or {}).get("config", "{}"))
        except Exception as error:  # safetensors and json raise their own kinds
            raise Mismatch(f"cannot be read: {error}") from error
        self.config: dict[str, Any] = OFFICIAL_DEFAULTS | config
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise Mismatch(f"missing: the file has no tensor {name}")
        self.used.add(name)
        return self.tensors[name]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """All tensors under `prefix`, by the rest of their names; Mismatch if there are none."""
        names = [name for name in self.tensors if name.startswith(prefix)]
        if not names:
            raise Mismatch(f"missing: the file has no tensors {prefix}*")
        return {name.removeprefix(prefix): self[name] for name in names}

    def matches(self, pattern: str) -> list[re.Match[str]]:
        """Full matches of `pattern` among the names; Mismatch if there are none."""
        found = [match for name in self.tensors if (match := re.fullmatch(pattern, name))]
        if not found:
            raise Mismatch(f"missing: the file has no tensor named {pattern}")
        return found


@dataclass
class Quantity:
    """Something to compare.

    Attributes:
        name: its golden; a name that ends in `*` is all goldens with that prefix, compared key by key.
        compute: our value, a dict of them for `*`; raises Mismatch or ValueError where there is none.
        network: whether a network runs in it (its bound widens off the CPU and below fp32).
    """

    name: str
    compute: Callable[[], Tensor | dict[str, Tensor]]
    network: bool = False


@dataclass
class Outcome:
    """A compared quantity; error and bound are nan where `problem` says why, or `note` is all there is."""

    name: str
    error: float = float("nan")
    bound: float = float("nan")
    problem: str = ""
    note: str = ""

    @property
    def ok(self) -> bool:
        """Within its bound (nan is not), or a mere note."""
        return bool(self.note) or (not self.problem and self.error <= self.bound)

    def line(self, width: int) -> str:
        """One aligned line."""
        verdict = "note" if self.note else "ok  " if self.ok else "FAIL"
        detail = self.note or self.problem or f"error {self.error:8.2e}  bound {self.bound:8.2e}"
        return f"{verdict}  {self.name:{width}}  {detail}"


def compare(quantity: Quantity, golden: Goldens, label: str, network_bound: float) -> Outcome:
    """`quantity` against its golden, named `label`/its name."""
    name = f"{label}/{quantity.name}"
    try:
        computed = quantity.compute()
        if isinstance(computed, dict):
            wanted = golden.group(quantity.name.removesuffix("*"))
        else:
            computed, wanted = {"": computed}, {"": golden[quantity.name]}
        if differing := sorted(computed.keys() ^ wanted.keys()):
            return Outcome(name, problem=f"keys differ: {', '.join(differing[:3])}")
        relative = network_bound if quantity.network else FP32_BOUND
        outcomes = [_compare_tensor(name, computed[key], wanted[key], relative) for key in wanted]
    except (Mismatch, ValueError, TypeError, KeyError, RuntimeError, IndexError) as problem:  # as tampered inputs cause
        return Outcome(name, problem=str(problem))
    return max(outcomes, key=_badness)


def _badness(outcome: Outcome) -> float:
    """Error relative to its bound; infinite if unknown."""
    if outcome.problem or math.isnan(outcome.error):
        return math.inf
    return outcome.error / outcome.bound


def _compare_tensor(name: str, computed: Tensor, wanted: Tensor, relative: float) -> Outcome:
    if computed.shape != wanted.shape:
        return Outcome(name, problem=f"shape {tuple(computed.shape)}, not {tuple(wanted.shape)}")
    if computed.is_floating_point() != wanted.is_floating_point():
        return Outcome(name, problem=f"{computed.dtype}, not {wanted.dtype}")
    wanted = wanted.double()
    error = (computed.double() - wanted).abs().max().item()
    return Outcome(name, error, relative * max(1.0, wanted.abs().max().item()))
