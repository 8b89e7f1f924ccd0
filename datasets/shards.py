"""Shards of a cache: safetensors files of one large tensor each, written row by row and mapped when read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .readers import VideoError

OPEN_SHARDS = 512  # mapped at a time by one process; a map holds a file descriptor, of which there are often 1024
MAX_HEADER = 2**16  # bytes; ours takes 200


class Dtype(NamedTuple):
    """A number format: its name in safetensors, what numpy maps it as, what torch sees it as."""

    name: str
    mapped: type[np.generic]
    torch: torch.dtype


DTYPES = {
    "fp32": Dtype("F32", np.float32, torch.float32),
    "fp16": Dtype("F16", np.float16, torch.float16),
    "bf16": Dtype("BF16", np.uint16, torch.bfloat16),  # numpy has no bfloat16
}


class CacheError(VideoError):
    """The cache itself is damaged: no other clip may stand in for what it lacks."""

    ends_run = True


def shard_file(folder: Path, number: int) -> Path:
    """Where shard `number` of a cache lies."""
    return folder / f"shard-{number:05d}.safetensors"


def write_shard(file: Path, dtype: str, shape: Sequence[int], rows: Iterable[Tensor], name: str, format: str) -> None:
    """Write `rows`, each (n, ...), as one tensor of `shape` (N, ...), piece by piece.

    The header comes first, so that no more than a piece is ever in memory. ValueError if the rows are not N.

    Args:
        name: of the tensor.
        format: of the cache, for whoever opens the file by itself.
    """
    kind, count = DTYPES[dtype], 0
    with file.open("wb") as stream:
        stream.write(_header(kind, shape, name, format))
        for piece in rows:
            stream.write(piece.to("cpu", kind.torch).contiguous().view(torch.uint8).numpy().tobytes())
            count += len(piece)
        stream.flush()
        os.fsync(stream.fileno())
    if count != shape[0]:
        raise ValueError(f"{file}: {count} rows came for a shard of {shape[0]}")


def _header(dtype: Dtype, shape: Sequence[int], name: str, format: str) -> bytes:
    """Of a safetensors file: its length in 8 bytes, then JSON, padded so that the tensor begins at a multiple of 64."""
    entry = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [0, _bytes_of(dtype, shape)]}
    text = json.dumps({"__metadata__": {"format": format}, name: entry}).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(dtype: Dtype, shape: Sequence[int]) -> int:
    return math.prod(shape) * np.dtype(dtype.mapped).itemsize


@lru_cache(maxsize=OPEN_SHARDS)
def map_shard(file: Path, dtype: Dtype, shape: tuple[int, ...], name: str) -> np.ndarray:
    """The tensor of that name in a shard, read-only and mapped. CacheError unless it is of `shape`."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length) if length <= MAX_HEADER else b"")
        found = (header[name]["dtype"], tuple(header[name]["shape"]))
        size = file.stat().st_size - 8 - length
    except FileNotFoundError:
        raise CacheError(file, "is missing; make the cache anew") from None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise CacheError(file, "cannot be read; make the cache anew") from None
    if found != (dtype.name, shape) or size != _bytes_of(dtype, shape):
        raise CacheError(
            file, f"holds {found[0]} {list(found[1])} in {size} bytes, not {dtype.name} {list(shape)}; make it anew"
        )
    return np.asarray(np.memmap(file, dtype.mapped, "r", 8 + length, shape))
