"""Shards and index of a cache of latents or text features.

A shard is a safetensors file with one large tensor, written row by row and memory-mapped when read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.checks import require

from .readers import VideoError

INDEX = "index.json"
OPEN_SHARDS = 512  # memory maps open at once per process; each holds a file descriptor, often limited to 1024
MAX_HEADER = 2**16  # bytes; ours take about 200


class NumberFormat(NamedTuple):
    """A number format: its name in safetensors, the numpy type to map it with, the torch type."""

    name: str
    mapped: type[np.generic]
    torch: torch.dtype


NUMBER_FORMATS = {
    "fp32": NumberFormat("F32", np.float32, torch.float32),
    "fp16": NumberFormat("F16", np.float16, torch.float16),
    "bf16": NumberFormat("BF16", np.uint16, torch.bfloat16),  # numpy has no bfloat16
}


class CacheError(VideoError):
    """The cache itself is damaged, so no other clip may replace the unreadable one."""

    ends_run = True


def shard_file(folder: Path, number: int) -> Path:
    """Returns the path of shard `number`."""
    return folder / f"shard-{number:05d}.safetensors"


def write_shard(file: Path, dtype: str, shape: Sequence[int], rows: Iterable[Tensor], name: str, format: str) -> None:
    """Writes `rows`, each (n, ...), as the tensor `name` of `shape` (N, ...), piece by piece after the header.

    `format`, the cache's, is stored in the metadata. Raises: ValueError unless there are N rows.
    """
    kind, count = NUMBER_FORMATS[dtype], 0
    size = math.prod(shape) * kind.torch.itemsize
    entry = {"dtype": kind.name, "shape": list(shape), "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": {"format": format}, name: entry}).encode()
    header += b" " * (-(len(header) + 8) % 64)  # aligns the tensor
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for piece in rows:
            stream.write(piece.to("cpu", kind.torch).contiguous().view(torch.uint8).numpy().tobytes())
            count += len(piece)
        stream.flush()
        os.fsync(stream.fileno())
    require(count == shape[0], f"{file}: {count} rows were given for a shard of {shape[0]}")


@lru_cache(maxsize=OPEN_SHARDS)
def map_shard(file: Path, dtype: NumberFormat, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Returns the tensor `name` of a shard, memory-mapped read-only. Raises CacheError unless it has `shape`."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length) if length <= MAX_HEADER else b"")
        found = (header[name]["dtype"], tuple(header[name]["shape"]))
        size = file.stat().st_size - 8 - length
    except FileNotFoundError:
        raise CacheError(file, "is missing; make the cache again") from None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise CacheError(file, "cannot be read; make the cache again") from None
    if found != (dtype.name, shape) or size != math.prod(shape) * dtype.torch.itemsize:
        raise CacheError(
            file, f"holds {found[0]} {list(found[1])} in {size} bytes, not {dtype.name} {list(shape)}; make it again"
        )
    return np.asarray(np.memmap(file, dtype.mapped, "r", 8 + length, shape))


class ShardReader:
    """The shards of a finished cache, memory-mapped: shard `i` is one tensor `name` (counts[i], *row_shape)."""

    def __init__(
        self, folder: Path, dtype: NumberFormat, counts: Sequence[int], row_shape: tuple[int, ...], name: str
    ) -> None:
        self.folder, self.dtype, self.counts, self.row_shape, self.name = folder, dtype, counts, row_shape, name
        for number in range(len(counts)):
            self.map(number)

    def map(self, number: int) -> np.ndarray:
        """Returns the whole shard, memory-mapped read-only."""
        shape = (self.counts[number], *self.row_shape)
        return map_shard(shard_file(self.folder, number), self.dtype, shape, self.name)

    def copy(self, number: int, place: Any, content: str) -> Tensor:
        """Returns a copy of the part `place` of a shard. Raises: CacheError, naming `content`, if it is not finite."""
        tensor = torch.from_numpy(np.array(self.map(number)[place])).view(self.dtype.torch)
        if not tensor.isfinite().all():
            file = shard_file(self.folder, number)
            raise CacheError(file, f"holds non-finite {self.name} of {content}; make the cache again")
        return tensor


def read_index(path: Path, format: str, key: str, tool: str) -> dict[str, Any]:
    """Returns the index of a finished cache; errors name its setting `key` and its command `tool`."""
    if not path.is_dir():
        raise FileNotFoundError(f"{key}: there is no folder '{path}'; {tool} makes one")
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        found = index["format"]
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{key}: '{path}' is not a finished cache: it has no {INDEX}; run {tool}, again if it was interrupted"
        ) from None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(f"{key}: {path / INDEX} cannot be read; make the cache again") from None
    if found != format:
        raise ValueError(f"{key}: {path} is of format {found!r}; this version reads {format!r}")
    return dict(index)
