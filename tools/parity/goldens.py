"""Golden tensors of the official implementation, and quantities to compare with them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

# values that the official constructors assume where a configuration is silent
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


class Mismatch(Exception):
    """A quantity that cannot be compared; its message says why."""


class Setting(NamedTuple):
    """Folder of the goldens, device and precision."""

    folder: Path
    device: str
    precision: str


class Quantity(NamedTuple):
    """Something to compare.

    name: its golden; a name that ends in `*` is all goldens with that prefix, compared key by key.
    compute: returns our value, a dict of them for `*`; raises Mismatch or ValueError where there is none.
    network: whether a network runs in it (its bound widens off the CPU and below fp32).
    """

    name: str
    compute: Callable[[], Tensor | dict[str, Tensor]]
    network: bool = False


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
        """Returns all tensors under `prefix`, by the rest of their names; Mismatch if there are none."""
        return {match[1]: self[match[0]] for match in self.matches(f"{re.escape(prefix)}(.*)")}

    def matches(self, pattern: str) -> list[re.Match[str]]:
        """Returns the full matches of `pattern` among the names; Mismatch if there are none."""
        found = [match for name in self.tensors if (match := re.fullmatch(pattern, name))]
        if not found:
            raise Mismatch(f"missing: the file has no tensor named {pattern}")
        return found
