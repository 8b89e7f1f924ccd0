"""A Config made real: the network, the diffusion, the codec; and what a config amounts to."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from datasets import ClipDataset
from datasets.latents import LatentCache
from diffusion import GaussianDiffusion, RectifiedFlow, build_diffusion
from models.autoencoder import LatentCodec, StoredCodec
from models.codec_identity import codec_identity, same_codec
from models.latte import Latte
from models.lora import add_lora, hold_frozen_linear_maps_in

from .config import Config


def build_model(config: Config, device: torch.device | str = "cpu") -> Latte:
    """The network for the latents that `config` describes, with its initial weights, on `device`."""
    with torch.device(device):
        return Latte(
            config.model,
            in_channels=config.codec.latent_channels,
            latent_size=config.latent_size,
            num_frames=config.data.num_frames,
        )


def put_adapters(model: Latte, config: Config, autocast_dtype: torch.dtype | None = None) -> Latte:
    """Freeze `model` and put the adapters of `config.lora` beside its weights, which change nothing yet."""
    add_lora(model, config.lora)
    if autocast_dtype is not None:
        hold_frozen_linear_maps_in(model, autocast_dtype)
    return model


def build_process(config: Config, respacing: str = "") -> GaussianDiffusion | RectifiedFlow:
    """The diffusion process; `respacing` ("250", "ddim50", ...) shortens it for sampling."""
    return build_diffusion(config.diffusion, learn_sigma=config.model.learn_sigma, respacing=respacing)


def build_codec(config: Config, clips: ClipDataset, device: torch.device | str = "cpu") -> LatentCodec | StoredCodec:
    """What makes latents of `clips`: the codec; or none where they come from a cache, which must be this codec's.

    Raises: ValueError for a cache of another codec.
    """
    if not isinstance(clips.source, LatentCache):
        return LatentCodec.from_config(config.codec, device)
    made, now = clips.source.codec, codec_identity(config.codec)
    if not same_codec(made, now):
        differing = [f"{key} {made.get(key)} -> {now[key]}" for key in now if made.get(key) != now[key]]
        raise ValueError(
            f"data.latents: {clips.source.path} was made by another codec than codec.path={config.codec.path} "
            f"({', '.join(differing)}); make a cache with this one, or name that one"
        )
    return StoredCodec(config.codec, clips.source.stochastic)


def count_parameters(model: torch.nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def macs_per_clip(config: Config) -> int:
    """Multiply-adds of one forward of one clip, attention included, counted on the meta device."""
    model = build_model(config, "meta").eval()
    size = config.latent_size
    x = torch.empty(1, config.data.num_frames, config.codec.latent_channels, size, size, device="meta")
    labels = torch.empty(1, dtype=torch.long, device="meta") if config.model.num_classes else None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, torch.empty(1, dtype=torch.long, device="meta"), labels)
    return counter.get_total_flops() // 2


def describe(config: Config) -> dict[str, Any]:
    """What `--dry-run` prints: the resolved config, its parameter count and its cost. Opens no data."""
    model = build_model(config, "meta")
    return {
        "config": config.to_dict(),
        "trainable_parameters": count_parameters(put_adapters(model, config) if config.lora.rank else model),
        "macs_per_clip": macs_per_clip(config),
    }
