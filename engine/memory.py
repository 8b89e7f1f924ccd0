"""Refuses sizes that cannot fit in memory, before anything is allocated.

It compares a lower bound of a run's memory, so nothing that would fit is refused; tools.plan counts all of it.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

from common.checks import require
from models.config import SIZE_KEYS

from .config import Config

GIB = 2**30
STATE_BYTES = {"weights": 4, "gradients": 4, "Adam moments": 8, "average (EMA)": 4}  # bytes per parameter, all in fp32
FROZEN_BYTES = {"bf16": 2}  # bytes per base weight of a LoRA run; 4 in other precisions
TABLE_BYTES = 8 + 4  # bytes per number of the position tables while they are computed: float64, then float32
LARGEST = 2**50  # bytes allowed on the meta device: beyond it, byte counts overflow
LARGEST_ATTENTION = 2**56  # spatial attention scores per clip: beyond it, byte counts overflow
LIMIT_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # container limits


def check_network_fits(config: Config, device: torch.device | str) -> None:
    """Refuses a network that does not fit on `device` together with the tokens of one clip.

    On the meta device, only the position tables of text networks take memory: they are computed on the CPU. Raises
    ValueError with the keys to lower, the memory needed and the memory available.
    """
    device = torch.device(device)
    parameters, positions, tokens = count_least(config)
    parts = 4 * parameters, TABLE_BYTES * positions, 2 * tokens
    _require_room(config, "This network", parts, None if device.type == "meta" else device)
    if config.model.is_text and device.type == "meta":
        _require_room(config, "This network", (0, parts[1], 0), torch.device("cpu"))
    side = config.latent_size // config.model.size.patch_size
    require(
        config.data.num_frames * config.model.size.num_heads * side**4 <= LARGEST_ATTENTION,
        f"data.image_size={config.data.image_size} makes {side**2:,} tokens per frame, too many for spatial "
        "attention: lower it.",
    )


def check_training_fits(config: Config, device: torch.device | str, ranks: int = 1) -> None:
    """Refuses a training whose weights, optimizer states and layer inputs do not fit on `device`.

    Raises ValueError as above, or for more loader processes than this machine's cores can serve.
    """
    train, workers = config.train, config.data.num_workers
    most = 8 * (os.cpu_count() or 1) + 8
    require(
        workers <= most,
        f"data.num_workers={workers} is more than the {most} loader processes (8 per core + 8) that this machine "
        "can serve: lower it.",
    )
    parameters, positions, tokens = count_least(config)
    each = FROZEN_BYTES.get(train.precision, 4) if config.lora.rank else sum(STATE_BYTES.values())
    shards = ranks if train.parallel == "fsdp" else 1
    kept = train.batch_size * config.model.size.depth * tokens * (2 if train.precision == "bf16" else 4)
    parts = each * parameters // shards, TABLE_BYTES * positions, kept
    _require_room(config, "This training", parts, torch.device(device), f"train.batch_size={train.batch_size}, ")


def _require_room(
    config: Config, what: str, parts: tuple[int, int, int], device: torch.device | None, batch: str = ""
) -> None:
    """Refuses (parameters, position tables, tokens), in bytes, that exceed the memory of `device`; None: LARGEST."""
    model, data = config.model, config.data
    needed, available = sum(parts), find_memory(device) if device else LARGEST
    size = f"model.name={model.name} ({', '.join(f'{key}={value}' for key, value in zip(SIZE_KEYS, model.size))})"
    has_more_classes = model.num_classes > 4 * model.size.depth * model.size.hidden_size
    keys = (
        f"model.num_classes={model.num_classes}" if has_more_classes else size,
        f"data.image_size={data.image_size}",
        f"{batch}data.num_frames={data.num_frames}, data.image_size={data.image_size}",
    )
    require(
        needed <= available,
        f"{what} needs at least {needed / GIB:,.1f} GiB of memory, and {device or 'a machine'} has "
        f"{available / GIB:,.1f} GiB: lower {keys[parts.index(max(parts))]}.",
    )


def count_least(config: Config) -> tuple[int, int, int]:
    """Returns lower bounds: parameters, position table entries, numbers in a clip's tokens.

    Counts the parameters of attention and MLP in each block, and of the label table.
    """
    model, data = config.model, config.data
    width, depth, _, patch = model.size
    spatial, temporal = (config.latent_size // patch) ** 2, data.num_frames // model.frames_per_token
    layers = int(depth * (4 + 2 * model.mlp_ratio) * width**2)
    return (
        layers + model.num_classes * width,
        width * (spatial + temporal),
        width * spatial * (temporal + data.num_images),
    )


def find_memory(device: torch.device) -> int:
    """Returns the bytes of memory of a GPU, or of this machine (its container's limit, if lower)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in LIMIT_FILES:
        with suppress(OSError, ValueError):  # no such file, or it says "max"
            limits.append(int(Path(file).read_text()))
    return min(limits)
