"""Weight files: safe reading, strict loading, and initialisation from an image DiT.

A `.pt` file is a pickle. PyTorch's restricted unpickler loads only tensors and plain containers and runs no code of the
file. It is used only in PyTorch versions without a known vulnerability, and on archives as `torch.save` writes them.
"""

from __future__ import annotations

import hashlib
import logging
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from common.checks import require
from common.storage import file_sha256

from .latte import Latte

log = logging.getLogger(__name__)

SAFE_SINCE = "2.10"  # CVE-2025-32434, CVE-2026-24747: earlier restricted unpicklers can be made to run code
MAX_RECORDS = 100_000  # in an archive; one per tensor
# Classes in the settings that training scripts store with weights (argparse, OmegaConf); `tools.convert checkpoint`
# can skip them.
SETTINGS = frozenset(
    [
        "argparse.Namespace",
        *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig", "nodes.AnyNode")),
        *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
        *(f"builtins.{name}" for name in ("dict", "list", "int", "str", "float", "bool")),
        *("typing.Any", "collections.defaultdict"),
    ]
)
CONVERT = "`python -m tools.convert checkpoint` extracts only the weights, given the file's SHA-256 from its author"
DISTRUST = "weights need none: ask the file's author for only its `ema` or `model` dictionary of tensors"

WRAPPERS = ("module", "_orig_mod")  # DistributedDataParallel, torch.compile
RELEASED = "https://huggingface.co/maxin-cn/Latte"  # ffs.pt, skytimelapse.pt, taichi-hd.pt, ucf101.pt
PIXART_KEYS = ("state_dict_ema", "state_dict")  # of the `.pth` files that PixArt's training writes
TABLES = {  # position table -> advice if its shape does not match
    "pos_embed": "for another latent size: set data.image_size as in training",
    "temp_embed": "for another frame count: set data.num_frames as in training",
}

# Parts of keys that only the network, or only the image DiT, has -> the reason.
ONLY_OURS = {
    "temp_embed": "an image model has no frames; ours is computed",
    "temporal_attn": "an image model has no second attention; ours keeps its initialisation",
    "frame_upsampler": "an image model has no tubelets; ours keeps its initialisation",
}
ONLY_THEIRS = {"y_embedder": "the network has no labels (model.num_classes is 0)"}


class Ignored:
    """Placeholder for a skipped object: accepts any arguments, items and state, and stores nothing."""

    def __new__(cls, *_: object, **__: object) -> Ignored:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass


def load_pickled(path: Path, ignored: Iterable[str] = ()) -> Any:
    """Returns the content of a `.pt` file, on the CPU; objects of the classes `ignored` (full names) become `Ignored`.

    Raises: ValueError if this PyTorch is too old to read it safely, or it is broken, compressed or has other objects.
    """
    unsafe = f"with PyTorch {torch.__version__} a .pt file can run code"
    remedy = f"install PyTorch {SAFE_SINCE} or newer, or use a .safetensors file"
    require(TorchVersion(torch.__version__) >= SAFE_SINCE, f"{path} is not read, because {unsafe}; {remedy}")
    _check_archive(path)
    stand_ins: list[Any] = [(Ignored, name) for name in ignored]
    try:
        with torch.serialization.safe_globals(stand_ins) if stand_ins else nullcontext():
            return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 tensors only
    except PermissionError:
        raise
    except Exception as error:  # a broken file can raise anything, OSError included
        objects = sorted(set(re.findall(r"GLOBAL ([\w.]+)", str(error))))
        if not objects:
            raise ValueError(f"{path} is not a complete PyTorch checkpoint; copy it again") from error
        remedy = CONVERT if SETTINGS.issuperset(objects) else DISTRUST
        kinds = ", ".join(objects)
        refusal = f"{path} holds Python objects ({kinds}), which are not loaded because that can run any code; {remedy}"
        raise ValueError(refusal) from error


def _check_archive(path: Path) -> None:
    """Raises ValueError for an archive that unpacks to more than its own size; `torch.save` never compresses."""
    if not zipfile.is_zipfile(path):
        return  # the format before PyTorch 1.6, or not a checkpoint: torch.load decides
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ValueError(f"{path} is not a complete PyTorch checkpoint; copy it again") from error
    packed = any(record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1 for record in records)
    size, unpacked = path.stat().st_size, sum(record.file_size for record in records)
    plain = not packed and unpacked <= size and len(records) <= MAX_RECORDS
    found = f"its {len(records)} records unpack to {unpacked} bytes from {size}"
    require(plain, f"{path} is refused: {found}, but torch.save writes them unpacked and unencrypted")


def read_state_dict(path: str | Path, prefer: str = "ema", ignored: Iterable[str] = ()) -> dict[str, Tensor]:
    """Returns the weights in a `.safetensors` file, or in a `.pt` file as the official code writes it.

    A `.pt` file may hold several sets: the one under `prefer` is taken, else, with a warning, `ema` or `model` (in
    PixArt's `.pth` files `state_dict_ema` or `state_dict`), else the whole file is taken as weights. Prefixes that
    DistributedDataParallel and torch.compile add to keys are removed. For `ignored` see `load_pickled`.

    Raises: FileNotFoundError, ValueError if the file is missing, broken, or holds no weights or other objects too.
    """
    path = Path(path)
    if not path.is_file():
        released = f"; the released weights are at {RELEASED}" if path.suffix == ".pt" else ""
        raise FileNotFoundError(f"there is no checkpoint file {path}{released}")
    content = read_safetensors(path) if path.suffix == ".safetensors" else load_pickled(path, ignored)
    sets: Mapping[Any, Any] = content if isinstance(content, Mapping) else {}
    kind = next((key for key in (prefer, "ema", "model", *PIXART_KEYS) if isinstance(sets.get(key), Mapping)), None)
    if kind not in (None, prefer):
        log.warning("%s holds no `%s` weights; using its `%s`", path, prefer, kind)
    weights: Mapping[str, Any] = sets if kind is None else sets[kind]
    named = all(isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items())
    absent = "neither `ema`, nor `model`, nor tensors by name"
    require(bool(weights) and named, f"{path} holds no network weights: {absent}")
    bare = {".".join(part for part in key.split(".") if part not in WRAPPERS): value for key, value in weights.items()}
    twice = f"the same weights twice, with and without a wrapper prefix ({', '.join(WRAPPERS)})"
    require(len(bare) == len(weights), f"{path} holds {twice}")
    return bare


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors in a safetensors file. Raises: ValueError if it is broken."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}); copy it again") from error


def extract_weights(path: Path, hashes: Sequence[str], prefer: str = "ema") -> dict[str, Tensor]:
    """Returns the weights of an official `.pt` file that also holds settings, as tensors that share no memory.

    `hashes`: SHA-256 of files to trust; any other file is not opened. Raises: FileNotFoundError, ValueError.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {path}")
    found, trusted = file_sha256(path), [each.strip().lower() for each in hashes]
    mismatch = f"its SHA-256 is {found}, but --sha256 allows {', '.join(hashes)}."
    require(found in trusted, f"{path} is not opened: {mismatch}")
    weights = read_state_dict(path, prefer, ignored=SETTINGS)
    return {name: value.contiguous().clone() for name, value in weights.items()}


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], source: str, *, assign: bool = False) -> None:
    """Loads all weights or none, by official key; `source` names their origin in the error.

    With `assign` the tensors become the network's parameters instead of being copied.

    Raises: ValueError if keys are missing, unexpected or of another shape; all of them are listed.
    """
    ours = model.state_dict()
    bad = [key for key in ours if key in state_dict and state_dict[key].shape != ours[key].shape]
    tables = {key: f", a table {advice}" for key, advice in TABLES.items()}
    kinds = {
        "missing": [(key, "") for key in ours if key not in state_dict],
        "unexpected": [(key, "") for key in state_dict if key not in ours],
        "misshapen": [(key, _shapes(state_dict[key], ours[key]) + tables.get(key, "")) for key in bad],
    }
    problems = [f"{kind} {', '.join(_fold(keys))}" for kind, keys in kinds.items() if keys]
    require(not problems, f"{source} does not fit the network: " + "; ".join(problems))
    model.load_state_dict(state_dict, assign=assign)


def require_finite(weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Raises ValueError if any of the `weights` contains NaN or infinity, naming `source` and the first such key."""
    for name, value in weights.items():
        if value.is_floating_point() and not value.float().isfinite().all():
            raise ValueError(f"{source}: {name} holds NaN or infinity; use another file")


def weights_digest(*groups: Mapping[str, Tensor], facts: bytes = b"") -> str:
    """Returns a SHA-256 over names, dtypes, shapes and values, independent of their order and file format."""
    total = hashlib.sha256(facts)
    for group in groups:
        for name, value in sorted(group.items()):
            total.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
            total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


@dataclass(frozen=True)
class InitReport:
    """Keys that were loaded, and those left in the checkpoint or unchanged in the network, with the reason."""

    taken: list[str]
    left_theirs: dict[str, str]
    left_ours: dict[str, str]

    def __str__(self) -> str:
        sections = {
            "taken from the checkpoint": dict.fromkeys(self.taken, ""),
            "left in the checkpoint": self.left_theirs,
            "kept as they were in the network": self.left_ours,
        }
        lines = ([f"{title}: {len(keys)}", *_fold(keys.items())] for title, keys in sections.items())
        return "\n".join("\n  ".join(section) for section in lines)


def is_image_checkpoint(state_dict: Mapping[str, Tensor]) -> bool:
    """Returns whether these may be an image DiT's weights: they have spatial but no temporal positions."""
    return "pos_embed" in state_dict and "temp_embed" not in state_dict


def init_from_dit(model: Latte, state_dict: Mapping[str, Tensor]) -> InitReport:
    """Copies those weights of an image DiT whose key and shape match one of ours; our others stay unchanged.

    In variants 1 and 2 a temporal layer takes the DiT layer with the same index, as in the official code. In `parallel`
    attention takes DiT's weights with half as many heads. Raises: ValueError if no layer fits.
    """
    ours = model.state_dict()
    taken = [key for key, value in state_dict.items() if key in ours and ours[key].shape == value.shape]
    wanted = f"an image DiT of width {model.config.size.hidden_size} (model.name {model.config.name})"
    fits = any(key.startswith("blocks.") for key in taken)
    require(fits, f"no layer of the checkpoint fits the network: train.init_from must be {wanted}")

    def explain(key: str, reasons: Mapping[str, str], otherwise: str) -> str:
        if key in ours and key in state_dict:
            return _shapes(state_dict[key], ours[key]) + "; ours is computed" * (key in TABLES)
        return next((why for part, why in reasons.items() if part in key.split(".")), otherwise)

    kept, absent = set(taken), "the network has no such weights"
    theirs = {key: explain(key, ONLY_THEIRS, absent) for key in state_dict if key not in kept}
    own = {key: explain(key, ONLY_OURS, "not in the checkpoint") for key in ours if key not in kept}
    model.load_state_dict({**ours, **{key: state_dict[key] for key in taken}})
    return InitReport(taken, theirs, own)


def _shapes(theirs: Tensor, ours: Tensor) -> str:
    return f"{tuple(theirs.shape)} in the checkpoint, {tuple(ours.shape)} in the network"


def _fold(keys: Iterable[tuple[str, str]]) -> list[str]:
    """Formats keys with notes as lines; layers with the same key and note share one, `blocks.{0-27}.attn...`."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for key, note in keys:
        head, number, tail = re.fullmatch(r"(?:(\w*blocks)\.(\d+)\.)?(.*)", key, re.DOTALL).groups(default="")  # type: ignore[union-attr]
        groups.setdefault((head, tail, note), []).append(int(number or 0))
    lines = []
    for (head, tail, note), numbers in groups.items():
        first, last = min(numbers), max(numbers)
        layers = str(first) if first == last else f"{{{first}-{last}}}"
        if len(numbers) < last - first + 1:
            layers = f"{{{','.join(map(str, sorted(numbers)))}}}"
        lines.append((f"{head}.{layers}." if head else "") + tail + (f": {note}" if note else ""))
    return lines
