"""Low-rank adapters (LoRA, arXiv 2106.09685) of Latte and LatteT2V: small trainable weights added to frozen ones.

peft inserts them for training. Files have peft's format, so peft and diffusers can load them. Merging computes
W + scale * B A and does not need peft.

Letters: r rank, D_in D_out the widths of a linear map; A (r, D_in), B (D_out, r).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from common.checks import POSITIVE, at_least, check_limits, check_read_only_with, one_of, optional, require
from common.storage import write_folder_atomically

from .convert import read_state_dict, require_finite
from .hub import find_folder, read_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the keys in peft's files
KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight", re.DOTALL)
# lora.targets -> linear maps of a block, by the names of Latte and of diffusers
ATTENTION = r"\w*attn\d?\.(qkv|proj|to_[qkv]|to_out\.0)"
TARGETS = {"attention": ATTENTION, "attention+mlp": rf"{ATTENTION}|mlp\.fc[12]|ff\.net\.(0\.proj|2)"}
# Settings in peft's file that change the meaning of the weights -> values for which W + scale * B A is right.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
}

LIMITS = {"rank": at_least(0), "alpha": optional(POSITIVE), "targets": one_of(TARGETS)}


@dataclass(frozen=True)
class LoraConfig:
    """The `lora` section: adapters to the frozen weights of `train.init_from`."""

    rank: int = 0  # 0: no adapters, the whole network is trained
    alpha: float | None = None  # adapter outputs are scaled by alpha / rank; null: by 1
    targets: str = "attention"  # attention | attention+mlp

    def __post_init__(self) -> None:
        check_limits(self, "lora.", LIMITS)
        check_read_only_with(self, "lora.", {"alpha": "rank", "targets": "rank"})

    @property
    def scale(self) -> float:
        """Factor of the adapters' output."""
        return (self.alpha or self.rank) / self.rank


def add_lora(model: nn.Module, config: LoraConfig) -> None:
    """Freezes `model` and adds adapters to its blocks; A is random and B is zero, so they have no effect yet."""
    from peft import inject_adapter_in_model  # optional

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    blocks = (re.fullmatch(r"\w*blocks\.\d+\.(.+)", name) for name in linear)
    targets = {block[1] for block in blocks if block and re.fullmatch(TARGETS[config.targets], block[1])}
    inject_adapter_in_model(_peft_config(config, sorted(targets)), model)


def hold_frozen_linear_maps_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts frozen linear maps once, as autocast would in each call: less memory, the same results."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not any(each.requires_grad for each in module.parameters()):
            module.to(dtype)


def lora_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the adapter weights in a network's state dict."""
    return {key: value for key, value in state_dict.items() if KEY.fullmatch(key)}


class Adapter(NamedTuple):
    """A, B and the scale of their product, by name of the linear map; `source` names their origin in errors."""

    parts: dict[str, tuple[Tensor, Tensor, float]]
    source: str

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor], scale_of: Any, source: str) -> Adapter:
        """Builds an adapter from keys of a network or of peft's file; `scale_of(rank)` returns the scale."""
        halves: dict[str, dict[str, Tensor]] = {}
        for key, value in weights.items():
            match = KEY.fullmatch(key)
            require(match is not None and value.ndim == 2, f"{source} is not a LoRA of linear maps: it holds {key}.")
            halves.setdefault(match[1], {})[match[2]] = value  # type: ignore[index]
        require(bool(halves), f"{source} is not a complete LoRA: it is empty.")
        for name, pair in halves.items():
            whole = pair.keys() == {"A", "B"} and pair["A"].shape[0] == pair["B"].shape[1]
            require(whole, f"{source} is not a complete LoRA: {name} lacks A or B, or their ranks differ.")
        return cls({name: (pair["A"], pair["B"], scale_of(len(pair["A"]))) for name, pair in halves.items()}, source)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Adapter:
        """Reads a folder in peft's format, or a hub name.

        Raises: FileNotFoundError, ValueError if it is missing, or cannot be merged as W + scale * B A.
        """
        folder = find_folder(str(folder), None, "lora", (CONFIG_FILE, WEIGHTS_FILE))
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is not a LoRA in peft's format: it has no {name}")
        config = _read_config(folder / CONFIG_FILE)
        alpha, root = config["lora_alpha"], bool(config.get("use_rslora"))
        weights = read_state_dict(folder / WEIGHTS_FILE)
        require_finite(weights, folder / WEIGHTS_FILE)
        return cls.from_weights(weights, lambda rank: alpha / (math.sqrt(rank) if root else rank), str(folder))

    @torch.no_grad()
    def merge_into(self, weights: dict[str, Tensor], scale: float = 1.0) -> None:
        """Replaces each adapted weight of `weights` by W + scale * B A, computed in fp32, stored in W's dtype.

        Raises: ValueError if a linear map is missing or has another shape; then nothing is replaced.
        """
        for name, (a, b, _) in self.parts.items():
            own = weights.get(f"{name}.weight")
            theirs, ours = (b.shape[0], a.shape[1]), None if own is None else tuple(own.shape)
            found = f"{name} is {theirs} there, {ours} here" if ours else f"this one has no {name}"
            require(ours == theirs, f"{self.source} is for another network: {found}.")
        for name, (a, b, factor) in self.parts.items():
            own = weights[f"{name}.weight"]
            change = (b.to(own.device).float() @ a.to(own.device).float()) * (factor * scale)
            weights[f"{name}.weight"] = (own.float() + change).to(own.dtype)


def merge_lora(model: nn.Module, folder: str | Path, scale: float = 1.0) -> None:
    """Merges the adapters of a folder in peft's format, or of a hub name, into a network."""
    weights = model.state_dict()
    Adapter.from_folder(folder).merge_into(weights, scale)
    model.load_state_dict(weights, assign=True)


def save_lora(weights: Mapping[str, Tensor], config: LoraConfig, folder: Path) -> Path:
    """Writes a network's adapters in peft's format, atomically; returns the folder, which must be new."""
    names = list(Adapter.from_weights(weights, lambda rank: 1.0, "the network").parts)
    targets = sorted({re.sub(r"^\w*blocks\.\d+\.", "", name) for name in names})

    def write(new: Path) -> None:
        files = {f"{PREFIX}{key.replace('.default.', '.')}": value.contiguous() for key, value in weights.items()}
        save_file(files, new / WEIGHTS_FILE, metadata={"format": "pt"})
        _peft_config(config, targets).save_pretrained(str(new))

    return write_folder_atomically(folder, write)


def _read_config(file: Path) -> dict[str, Any]:
    """Returns peft's settings. Raises: ValueError if they are broken or not those of plain LoRA."""
    config = read_json(file)
    alpha = config.get("lora_alpha")
    finite = isinstance(alpha, int | float) and math.isfinite(alpha)
    require(finite, f"{file}: lora_alpha must be finite, got {alpha!r}")
    for key, allowed in PLAIN.items():
        value = config.get(key, allowed[0])
        require(value in allowed, f"{file}: {key} is {value!r}; only plain LoRA ({key} {allowed[0]!r}) can be merged")
    return config


def _peft_config(config: LoraConfig, targets: list[str]) -> Any:
    import peft  # optional

    alpha: Any = config.alpha or config.rank
    return peft.LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=targets)
