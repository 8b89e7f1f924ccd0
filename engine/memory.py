"""Refuses sizes that cannot fit before anything is allocated.

It counts a lower bound of a run's memory, so that nothing that would fit is refused; tools.plan counts all of it. It is
plain arithmetic, quick for every size that a configuration may have.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from common.checks import require
from models.config import SIZE_KEYS
from models.latte import Latte
from models.latte_t2v import LatteT2V

from .config import Config

GIB = 2**30
STATE_BYTES = {"weights": 4, "gradients": 4, "Adam moments": 8, "average (EMA)": 4}  # bytes per parameter, all in fp32
FROZEN_BYTES = {"bf16": 2}  # bytes per base weight of a LoRA run; 4 in other precisions
TABLE_BYTES = 8 + 4  # bytes per number of the position tables while they are computed: float64, then float32
LARGEST = 2**50  # bytes of networks that are only counted: beyond it, numbers of bytes overflow
LARGEST_ATTENTION = 2**56  # scores of spatial attention in a clip: beyond it, numbers of bytes overflow
LIMIT_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


def check_network_fits(config: Config, device: torch.device | str) -> None:
    """Refuses a network that does not fit on `device` together with the tokens of one clip.

    On the meta device only the position tables of text networks take memory; they are computed on the CPU.

    Raises: ValueError, a sentence with the keys, the memory needed and the memory available.
    """
    device = torch.device(device)
    parts = 4 * estimate_parameters(config), TABLE_BYTES * count_positions(config), 2 * count_tokens(config)
    _require_room(config, "This network", parts, None if device.type == "meta" else device)
    if config.model.is_text and device.type == "meta":
        _require_room(config, "This network", (0, parts[1], 0), torch.device("cpu"))
    side = config.latent_size // config.model.size.patch_size
    scores = config.data.num_frames * config.model.size.num_heads * side**4
    require(
        scores <= LARGEST_ATTENTION,
        f"data.image_size={config.data.image_size} makes {side**2:,} tokens a frame, too many for attention among "
        "them: lower it.",
    )


def check_training_fits(config: Config, device: torch.device | str, ranks: int = 1) -> None:
    """Refuses a training whose weights, optimizer states and layer inputs do not fit on `device`.

    Raises: ValueError, a sentence with the keys, the memory needed and the memory available; or for more loader
        processes than the cores of this machine can serve.
    """
    train, workers = config.train, config.data.num_workers
    most = 8 * (os.cpu_count() or 1) + 8
    require(
        workers <= most,
        f"data.num_workers={workers} is more than the {most} loader processes (8 a core, and 8) that this machine "
        "can serve: lower it.",
    )
    each = FROZEN_BYTES.get(train.precision, 4) if config.lora.rank else sum(STATE_BYTES.values())
    shards = ranks if train.parallel == "fsdp" else 1
    kept = train.batch_size * config.model.size.depth * count_tokens(config) * (2 if train.precision == "bf16" else 4)
    parts = each * estimate_parameters(config) // shards, TABLE_BYTES * count_positions(config), kept
    _require_room(config, "This training", parts, torch.device(device), f"train.batch_size={train.batch_size}, ")


def _require_room(
    config: Config, what: str, parts: tuple[int, int, int], device: torch.device | None, batch: str = ""
) -> None:
    """Refuses more bytes of (parameters, position tables, tokens) than `device` has; None: than any machine has."""
    model, data = config.model, config.data
    needed, available = sum(parts), find_memory(device) if device else LARGEST
    size = f"model.name={model.name} ({', '.join(f'{key}={value}' for key, value in zip(SIZE_KEYS, model.size))})"
    layers = 4 * model.size.depth * model.size.hidden_size**2  # their parameters, at least
    keys = (
        f"model.num_classes={model.num_classes}" if model.num_classes * model.size.hidden_size > layers else size,
        f"data.image_size={data.image_size}",
        f"{batch}data.num_frames={data.num_frames}, data.image_size={data.image_size}",
    )
    require(
        needed <= available,
        f"{what} needs at least {needed / GIB:,.1f} GiB of memory, and {device or 'a machine'} has "
        f"{available / GIB:,.1f} GiB: lower {keys[parts.index(max(parts))]}.",
    )


def estimate_parameters(config: Config) -> int:
    """Returns the number of parameters, extrapolated from two shallow networks: it is linear in the depth."""
    model, size, channels = config.model, config.model.size, config.codec.latent_channels
    networks: list[torch.nn.Module]
    with torch.device("meta"):
        if model.is_text:
            whole, temporal = config.text_network(), model.name != "custom-t2i"
            small = replace(whole, sample_size=size.patch_size, video_length=1)
            layers, step = whole.num_layers, 1
            networks = [LatteT2V(replace(small, num_layers=count), temporal=temporal) for count in (1, 2)]
        else:
            layers, step = size.depth, 2
            sizes = [dict(zip(SIZE_KEYS, size._replace(depth=depth))) for depth in (2, 4)]
            frames = model.frames_per_token
            networks = [
                Latte(
                    replace(model, name="custom", **each),  # type: ignore[arg-type]
                    in_channels=channels,
                    latent_size=size.patch_size,
                    num_frames=frames,
                )
                for each in sizes
            ]
    one, two = (sum(parameter.numel() for parameter in network.parameters()) for network in networks)
    return one + (two - one) * (layers - step) // step


def count_positions(config: Config) -> int:
    """Returns the size of the tables of spatial and temporal positions."""
    width, patch, frames = config.model.size.hidden_size, config.model.size.patch_size, config.data.num_frames
    return width * ((config.latent_size // patch) ** 2 + frames // config.model.frames_per_token)


def count_tokens(config: Config) -> int:
    """Returns the size of the tokens of one clip with its images."""
    frames = config.data.num_frames // config.model.frames_per_token + config.data.num_images
    return frames * config.model.size.hidden_size * (config.latent_size // config.model.size.patch_size) ** 2


def find_memory(device: torch.device) -> int:
    """Returns the bytes of memory of a GPU, or of this machine (of its container, if that is less)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in LIMIT_FILES:
        with suppress(OSError, ValueError):  # no such file, or it says "max"
            limits.append(int(Path(file).read_text()))
    return min(limits)
