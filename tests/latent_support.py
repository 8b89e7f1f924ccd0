"""Makes caches of latents and features, and tiny encoders, for the tests."""

import json
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
from tools import cache_features, cache_latents

SHARDS = 3  # of the tiny sets: some clips share one


def cache(overrides: list[str], out: Path, dtype: str = "fp32", world: World | None = None) -> Path:
    with patch.object(cache_latents, "LEAST_SHARDS", SHARDS):
        cache_latents.LatentWriter(load_config(None, overrides), out, dtype, 10**6, world or World()).write()
    return out


def save_image_encoder(folder: Path, seed: int = 0) -> Path:
    """Saves a random DINOv2 of width 12, whose features depend on content and position."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(seed)
    config = Dinov2Config(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.3)
    Dinov2Model(config).save_pretrained(folder)
    pixels = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder


def features(overrides: list[str], encoder: Path, out: Path, dtype: str = "fp32") -> list[str]:
    """Makes a cache of features; returns the override that names it."""
    with patch.object(cache_latents, "LEAST_SHARDS", SHARDS):
        config = load_config(None, overrides)
        cache_features.FeatureWriter(str(encoder), config, out, dtype, 10**6, World()).write()
    return [f"objective.features={out}"]


def tiny_codec(class_name: str, seed: int = 0) -> Any:
    """A random autoencoder of 5 channels with 2-fold down-sampling, its latents far from zero mean and unit scale."""
    import diffusers

    torch.manual_seed(seed)
    down, blocks = ("DownEncoderBlock2D",) * 2, {"block_out_channels": (8, 8), "layers_per_block": 1}
    if class_name == "AutoencoderKL":
        blocks |= {"down_block_types": down, "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4}
        return diffusers.AutoencoderKL(latent_channels=5, **blocks).eval()
    if class_name == "AutoencoderKLTemporalDecoder":  # its group norms have 32 groups
        blocks |= {"block_out_channels": (32, 32), "down_block_types": down}
        model = diffusers.AutoencoderKLTemporalDecoder(latent_channels=5, **blocks).eval()
        for name, parameter in model.decoder.named_parameters():  # a new one hardly mixes frames
            if "time_conv_out" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        return model
    sizes: dict[str, Any] = {f"{part}_block_out_channels": (8, 8) for part in ("encoder", "decoder")}
    if class_name == "AutoencoderDC":
        for part in ("encoder", "decoder"):
            sizes |= {f"{part}_block_types": ("ResBlock", "EfficientViTBlock"), f"{part}_layers_per_block": (1, 1)}
            sizes |= {f"{part}_qkv_multiscales": ((), (5,)), f"{part}_block_out_channels": (20, 20)}
        return diffusers.AutoencoderDC(latent_channels=5, attention_head_dim=5, **sizes).eval()
    counts = {f"num_{part}_blocks": (1, 1) for part in ("encoder", "decoder")}
    return diffusers.AutoencoderTiny(latent_channels=5, **sizes, **counts).eval()


def save_codec(folder: Path, class_name: str, seed: int = 0) -> list[str]:
    """Saves an autoencoder; returns the overrides that name it."""
    tiny_codec(class_name, seed).save_pretrained(folder)
    return [f"codec.path={folder}", "codec.latent_channels=5", "codec.downsample_factor=2", "codec.scale=0.7"]


class Deadly(Pixels):
    """Kills the loader worker that opens rises/clip1."""

    def open(self, clip: Clip) -> Any:
        if clip.name == "rises/clip1" and get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().open(clip)


def content(made: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in made.iterdir()}
