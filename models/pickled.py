"""Reading `.pt` files, which are pickles: tensors and plain containers only, and nothing of the file's code.

PyTorch's restricted reader does the work. Before it: a PyTorch in which that reader has no known hole, and an
archive that is what `torch.save` writes. After it: refusals as one sentence.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.torch_version import TorchVersion

SAFE_SINCE = "2.10"  # CVE-2025-32434 and CVE-2026-24747: earlier restricted readers can be made to run code
MAX_RECORDS = 100_000  # of an archive; one per tensor
# Settings that training scripts save with their weights (argparse's, OmegaConf's), by every class in them.
# `tools.convert checkpoint` skips them.
SETTINGS = frozenset(
    [
        "argparse.Namespace",
        *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig", "nodes.AnyNode")),
        *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
        *(f"builtins.{name}" for name in ("dict", "list", "int", "str", "float", "bool")),
        *("typing.Any", "collections.defaultdict"),
    ]
)
CONVERT = "`python -m tools.convert checkpoint` takes its weights alone, if you know the file's SHA-256 from its maker"
DISTRUST = "weights need none: ask the file's maker for its `ema` or `model` dictionary of tensors alone"


class Ignored:
    """Stands for an object of a file that is not wanted: takes any arguments, items and state, and keeps none."""

    def __new__(cls, *_: object, **__: object) -> Ignored:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass


def load_pickled(path: Path, ignored: Iterable[str] = ()) -> Any:
    """The content of a `.pt` file, on the CPU.

    Args:
        ignored: full names of classes whose objects become `Ignored`; any other class is refused.

    Raises:
        ValueError: this PyTorch is too old to read such a file safely; the file is broken, blown up, or holds
            Python objects; the sentence says which.
    """
    if TorchVersion(torch.__version__) < SAFE_SINCE:
        raise ValueError(
            f"{path} is not read: with PyTorch {torch.__version__} a .pt file can run code of its own; install "
            f"PyTorch {SAFE_SINCE} or newer, or give a .safetensors file"
        )
    _check_archive(path)
    stand_ins: list[Any] = [(Ignored, name) for name in ignored]
    try:
        with torch.serialization.safe_globals(stand_ins) if stand_ins else nullcontext():
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # a broken file can raise anything, OSError included
        objects = sorted(set(re.findall(r"GLOBAL ([\w.]+)", str(error))))
        if objects:
            raise ValueError(
                f"{path} holds Python objects ({', '.join(objects)}), which are not loaded because that can run any "
                f"code; {CONVERT if SETTINGS.issuperset(objects) else DISTRUST}"
            ) from error
        raise ValueError(f"{path} is not a whole PyTorch checkpoint; copy it again") from error


def require_hash(file: Path, allowed: Sequence[str]) -> None:
    """Raises ValueError for a file whose SHA-256 is not in `allowed`, FileNotFoundError for no file."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {file}")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found not in [each.strip().lower() for each in allowed]:
        raise ValueError(f"{file} is not opened: its SHA-256 is {found}, but --sha256 allows {', '.join(allowed)}.")


def _check_archive(path: Path) -> None:
    """Refuse an archive that unpacks to more than its own size; `torch.save` never compresses."""
    if not zipfile.is_zipfile(path):
        return  # the format before 1.6, or nothing that torch.load takes
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ValueError(f"{path} is not a whole PyTorch checkpoint; copy it again") from error
    packed = any(record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1 for record in records)
    unpacked = sum(record.file_size for record in records)
    if packed or unpacked > path.stat().st_size or len(records) > MAX_RECORDS:
        raise ValueError(
            f"{path} is refused: its {len(records)} records unpack to {unpacked} bytes from {path.stat().st_size}, "
            "but torch.save writes them unpacked and unencrypted"
        )
