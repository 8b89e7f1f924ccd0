"""Weights from files: official Latte and ours, strictly; an image DiT as a start, with a report."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .latte import Latte
from .pickled import SETTINGS, load_pickled, require_hash

log = logging.getLogger(__name__)

WRAPPERS = ("module", "_orig_mod")  # DistributedDataParallel, torch.compile
PIXART_KEYS = ("state_dict_ema", "state_dict")  # of the `.pth` files that PixArt's training writes
TABLES = {
    "pos_embed": "for another latent size: set data.image_size as in training",
    "temp_embed": "for another frame count: set data.num_frames as in training",
}

# Why an image DiT has nothing for these of ours (a part of the key -> the reason).
ONLY_OURS = {
    "temp_embed": "an image model has no frames; ours is computed",
    "temporal_attn": "an image model has no second attention; ours keeps its initialisation",
    "frame_upsampler": "an image model has no tubelets; ours keeps its initialisation",
}


@dataclass(frozen=True)
class InitReport:
    """Keys that a conversion took and left; the two `left` dictionaries give the reasons."""

    taken: list[str]
    left_theirs: dict[str, str]
    left_ours: dict[str, str]

    def __str__(self) -> str:
        sections = [
            ("taken from the checkpoint", len(self.taken), _fold((key, "") for key in self.taken)),
            ("left in the checkpoint", len(self.left_theirs), _fold(self.left_theirs.items())),
            ("kept as they were in the network", len(self.left_ours), _fold(self.left_ours.items())),
        ]
        return "\n".join(
            line for title, count, lines in sections for line in (f"{title}: {count}", *(f"  {line}" for line in lines))
        )


def read_state_dict(path: str | Path, prefer: str = "ema", ignored: Iterable[str] = ()) -> dict[str, Tensor]:
    """Read the weights of a `.safetensors` file or of a `.pt` file as the official code writes it.

    Of a `.pt` file the weights under `prefer` are taken, else, with a warning, `ema` or `model` (of PixArt's `.pth`
    `state_dict_ema` or `state_dict`), else the file is the weights. The prefixes that DistributedDataParallel and
    torch.compile add to keys are removed. Nothing is unpickled but tensors and plain containers; objects of the
    classes named in `ignored` are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is broken, holds other Python objects, or no weights; the sentence says which.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {path}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else load_pickled(path, ignored)
    weights = _select_weights(content, prefer, path)
    if not weights or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()):
        raise ValueError(f"{path} holds no network weights: neither `ema`, nor `model`, nor tensors by name")
    return _unwrap(weights, path)


def extract_weights(path: Path, hashes: Sequence[str], prefer: str = "ema") -> dict[str, Tensor]:
    """Returns the weights of an official `.pt` file that also holds settings, as tensors that share no memory.

    Args:
        hashes: SHA-256 of files to trust; any other file is not opened.

    Raises:
        FileNotFoundError, ValueError: no such file, another hash, or other objects than tensors and settings.
    """
    require_hash(path, hashes)
    weights = read_state_dict(path, prefer, ignored=SETTINGS)
    return {name: value.contiguous().clone() for name, value in weights.items()}


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], source: str, *, assign: bool = False) -> None:
    """Load all weights or none.

    Args:
        model: the network; unchanged where the weights do not fit.
        state_dict: weights by official key.
        source: where they come from, for the error.
        assign: make these tensors the network's own instead of copying them into it.

    Raises:
        ValueError: keys are missing, unexpected or of another shape; all of them are listed.
    """
    problems = _differences(model.state_dict(), state_dict)
    if problems:
        raise ValueError(f"{source} does not fit the network: " + "; ".join(problems))
    model.load_state_dict(state_dict, assign=assign)


def require_finite(weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Raises ValueError that names `source` and the first of the `weights` that holds NaN or infinity."""
    for name, value in weights.items():
        if value.is_floating_point() and not value.float().isfinite().all():
            raise ValueError(f"{source}: {name} holds NaN or infinity, no weights to sample with; use another file")


def weights_digest(*groups: Mapping[str, Tensor], facts: bytes = b"") -> str:
    """Returns the SHA-256 over names, shapes and numbers, whatever their order and file."""
    total = hashlib.sha256(facts)
    for group in groups:
        for name, value in sorted(group.items()):
            total.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
            total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def is_image_checkpoint(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether these can be an image DiT's weights: a table of positions in space and none in time."""
    return "pos_embed" in state_dict and "temp_embed" not in state_dict


def init_from_dit(model: Latte, state_dict: Mapping[str, Tensor]) -> InitReport:
    """Start from an image DiT: take every weight of the same key and shape, keep ours for the rest.

    In variants 1 and 2 temporal layers inherit the DiT layer of their number, as in the official code. In
    `parallel` the attention inherits DiT's weights with half as many heads.

    Raises:
        ValueError: no layer fits, so this is not a DiT of the network's width.
    """
    ours = model.state_dict()
    taken = [key for key, value in state_dict.items() if key in ours and ours[key].shape == value.shape]
    if not any(key.startswith("blocks.") for key in taken):
        raise ValueError(
            "no layer of the checkpoint fits the network: train.init_from takes an image DiT "
            f"of width {model.config.size.hidden_size} (model.name {model.config.name})"
        )
    kept = set(taken)
    report = InitReport(
        taken=taken,
        left_theirs={key: _why_left(key, state_dict, model) for key in state_dict if key not in kept},
        left_ours={key: _why_kept(key, state_dict, ours) for key in ours if key not in kept},
    )
    model.load_state_dict({**ours, **{key: state_dict[key] for key in taken}})
    return report


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy it again") from error


def _select_weights(content: Any, prefer: str, path: Path) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        return {}
    for key in (prefer, "ema", "model", *PIXART_KEYS):
        if isinstance(content.get(key), Mapping):
            if key != prefer:
                log.warning("%s holds no `%s` weights, its `%s` is taken", path, prefer, key)
            return dict(content[key])
    return dict(content)


def _unwrap(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    bare = {".".join(part for part in key.split(".") if part not in WRAPPERS): value for key, value in weights.items()}
    if len(bare) < len(weights):
        raise ValueError(f"{path} holds the same weights twice, with and without the prefix of a wrapper")
    return bare


def _differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    missing = [(key, "") for key in ours if key not in theirs]
    unexpected = [(key, "") for key in theirs if key not in ours]
    misshapen = [
        (key, _shapes(theirs[key], ours[key]) + (f", a table {TABLES[key]}" if key in TABLES else ""))
        for key in ours
        if key in theirs and theirs[key].shape != ours[key].shape
    ]
    named = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    return [f"{kind} {', '.join(_fold(keys))}" for kind, keys in named.items() if keys]


def _shapes(theirs: Tensor, ours: Tensor) -> str:
    return f"{tuple(theirs.shape)} in the checkpoint, {tuple(ours.shape)} in the network"


def _why_left(key: str, theirs: Mapping[str, Tensor], model: Latte) -> str:
    ours = model.state_dict()
    if key in ours:
        return _shapes(theirs[key], ours[key]) + ("; ours is computed" if key in TABLES else "")
    if key.startswith("y_embedder."):
        return "the network has no labels (model.num_classes is 0)"
    block = re.match(r"blocks\.(\d+)\.", key)
    if block and int(block[1]) >= len(model.blocks):
        return f"the network has {len(model.blocks)} layers"
    return "the network has no such weights"


def _why_kept(key: str, theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> str:
    if key in theirs:
        return _shapes(theirs[key], ours[key]) + ("; ours is computed" if key in TABLES else "")
    reasons = (reason for part, reason in ONLY_OURS.items() if part in key.split("."))
    return next(reasons, "not in the checkpoint")


def _fold(keys: Iterable[tuple[str, str]]) -> list[str]:
    """Keys with notes -> lines; the same key and note in many layers is one line, `blocks.{0-27}.attn...`."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for key, note in keys:
        head, number, tail = re.fullmatch(r"(?:(\w*blocks)\.(\d+)\.)?(.*)", key, re.DOTALL).groups(default="")  # type: ignore[union-attr]
        groups.setdefault((head, tail, note), []).append(int(number or 0))
    return [
        (f"{head}.{_ranges(numbers)}." if head else "") + tail + (f": {note}" if note else "")
        for (head, tail, note), numbers in groups.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> `{0-2,5}`; a single number stands alone."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs = [
        [number for _, number in run]
        for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    ]
    return "{" + ",".join(f"{run[0]}-{run[-1]}" if run[1:] else str(run[0]) for run in runs) + "}"
