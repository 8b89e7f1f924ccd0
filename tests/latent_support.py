"""Makes latent caches and tiny autoencoders for the tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.data import get_worker_info

from datasets import Clip
from datasets.clips import Pixels
from engine.config import load_config
from engine.distributed import World
from tools import cache_latents

SHARDS = 3  # of the tiny sets: some clips share one


def cache(overrides: list[str], out: Path, dtype: str = "fp32", world: World | None = None) -> Path:
    with patch.object(cache_latents, "LEAST_SHARDS", SHARDS):
        cache_latents.LatentWriter(load_config(None, overrides), out, dtype, 10**6, world or World()).write()
    return out


def save_codec(folder: Path, class_name: str, seed: int = 0) -> list[str]:
    """A random autoencoder of 5 channels with 2-fold down-sampling, and the overrides that name it."""
    import diffusers

    torch.manual_seed(seed)
    if class_name == "AutoencoderKL":
        blocks = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
        down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
        codec = diffusers.AutoencoderKL(latent_channels=5, down_block_types=down, up_block_types=up, **blocks)
    else:
        sizes = {f"{part}_block_out_channels": (8, 8) for part in ("encoder", "decoder")}
        counts = {f"num_{part}_blocks": (1, 1) for part in ("encoder", "decoder")}
        codec = diffusers.AutoencoderTiny(latent_channels=5, **sizes, **counts)
    codec.save_pretrained(folder)
    return [f"codec.path={folder}", "codec.latent_channels=5", "codec.downsample_factor=2", "codec.scale=0.7"]


class Deadly(Pixels):
    """Kills the loader worker that opens rises/clip1."""

    def open(self, clip: Clip) -> Any:
        if clip.name == "rises/clip1" and get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().open(clip)


def content(made: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in made.iterdir()}
