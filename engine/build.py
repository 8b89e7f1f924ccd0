"""Builds network, diffusion and codec from a Config, and counts parameters and multiply-adds."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from datasets import ClipDataset
from datasets.latents import LatentCache
from diffusion import GaussianDiffusion, RectifiedFlow, build_diffusion
from models.autoencoder import LatentCodec, StoredCodec
from models.identity import codec_identity, is_same_codec
from models.latte import Latte
from models.latte_t2v import LatteT2V
from models.lora import add_lora, hold_frozen_linear_maps_in

from .config import Config
from .memory import check_network_fits


class Precision(NamedTuple):
    """Number formats: `dtype` of weights, latents, noise and loss; `autocast` of the network, if different."""

    dtype: torch.dtype
    autocast: torch.dtype | None = None


PRECISIONS = {  # by train.precision
    "fp32": Precision(torch.float32),
    "tf32": Precision(torch.float32),
    "bf16": Precision(torch.float32, torch.bfloat16),
    "fp64": Precision(torch.float64),
}


def build_model(config: Config, device: torch.device | str = "cpu") -> Latte | LatteT2V:
    """Returns the network of `config` with initial weights. Raises: ValueError if it cannot fit on `device`."""
    check_network_fits(config, device)
    with torch.device(device):
        if config.model.is_text:
            kind: Any = {"gradient_checkpointing": config.model.gradient_checkpointing}
            return LatteT2V(config.text_network(), temporal=config.model.name != "custom-t2i", **kind)
        size = {"latent_size": config.latent_size, "num_frames": config.data.num_frames}
        return Latte(config.model, in_channels=config.codec.latent_channels, **size)


def forward_inputs(config: Config, batch: int, device: torch.device | str, *, images: bool = True) -> dict[str, Any]:
    """Returns dummy keyword arguments of a training step's `forward`, to count or profile a network."""
    num_images = config.data.num_images if images else 0
    frames, size, channels = config.data.num_frames + num_images, config.latent_size, config.codec.latent_channels
    timesteps, text = torch.zeros(batch, device=device), config.text
    if config.model.is_text:
        words = (batch, 1 + num_images, text.max_length)
        return {
            "hidden_states": torch.zeros(batch, channels, frames, size, size, device=device),
            "timestep": timesteps,
            "encoder_hidden_states": torch.zeros(*words, text.caption_channels, device=device),
            "encoder_attention_mask": torch.ones(words, device=device),
            "num_images": num_images,
        }
    labels = torch.zeros(batch, 1 + num_images, dtype=torch.long, device=device)
    return {
        "x": torch.zeros(batch, frames, channels, size, size, device=device),
        "timesteps": timesteps,
        "labels": labels if config.model.num_classes else None,
        "num_images": num_images,
    }


def put_adapters(model: Latte | LatteT2V, config: Config) -> Latte | LatteT2V:
    """Freezes `model` and adds the adapters of `config.lora`, which leave its output unchanged at first."""
    add_lora(model, config.lora)
    if config.train.precision == "bf16":  # else autocast casts them in each call
        hold_frozen_linear_maps_in(model, torch.bfloat16)
    return model


def build_process(config: Config, respacing: str = "") -> GaussianDiffusion | RectifiedFlow:
    """Returns the diffusion process; `respacing` ("250", "ddim50", ...) shortens it for sampling."""
    return build_diffusion(config.diffusion, learn_sigma=config.model.learn_sigma, respacing=respacing)


def build_codec(config: Config, clips: ClipDataset, device: torch.device | str = "cpu") -> LatentCodec | StoredCodec:
    """Returns the codec for `clips`; for a latent cache, which it must have made, a stand-in. Raises: ValueError."""
    if not isinstance(clips.source, LatentCache):
        return LatentCodec.from_config(config.codec, device)
    made, now = clips.source.encoder, codec_identity(config.codec)
    if not is_same_codec(made, now):
        differing = [f"{key} {made.get(key)} -> {now[key]}" for key in now if made.get(key) != now[key]]
        raise ValueError(
            f"data.latents: {clips.source.path} was made with another codec than codec.path={config.codec.path} "
            f"({', '.join(differing)}); make a cache with this codec, or set codec.path to the other."
        )
    return StoredCodec(config.codec, clips.source.stochastic)


def count_parameters(model: torch.nn.Module) -> int:
    """Returns the number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def macs_per_clip(config: Config) -> int:
    """Returns the multiply-adds of one forward pass of one clip, attention included, counted on the meta device."""
    model = build_model(config, "meta").to("meta").eval()  # position tables are computed on the CPU
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**forward_inputs(config, 1, "meta", images=False))
    return counter.get_total_flops() // 2


def describe(config: Config) -> dict[str, Any]:
    """Returns the output of `--dry-run`: resolved config, parameter count and cost. Opens no data."""
    model = build_model(config, "meta")
    return {
        "config": config.to_dict(),
        "trainable_parameters": count_parameters(put_adapters(model, config) if config.lora.rank else model),
        "macs_per_clip": macs_per_clip(config),
    }
