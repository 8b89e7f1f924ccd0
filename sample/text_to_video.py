"""Text to video in three steps: prompts -> features of T5 -> latents -> pixels; each network is held only as needed.

Equal to diffusers' LattePipeline for one prompt and the same initial latents.

Letters: B batch (2 with guidance), L words of a prompt, F frames, C latent channels, h w latent pixels, H W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets.config import DataConfig
from diffusion import ConditionConfig, Given, ScheduledDiffusion, guide_denoiser, sample_given, start_walk
from diffusion.scheduled import LATTE_NOISE
from engine.conditions import TextFeatures
from engine.config import window_overlap
from engine.objective import sample_generator
from models.autoencoder import DTYPES, LatentCodec
from models.convert_t2v import find_network, load_t2v
from models.latte_t2v import LatteT2V
from models.lora import merge_lora
from models.quantize import quantize
from models.text_encoder import Prompt
from sample.generate import require_finite_videos, to_uint8
from sample.given import Plan, Windows, read_given
from sample.t2x_config import T2XConfig
from sample.text_model import TextModel

log = logging.getLogger(__name__)

Progress = Callable[[int, int], object]


# ------------------------------------------------------------------------------------------ latents


def build_schedule(config: T2XConfig, model: TextModel, *, learned_variance: bool = True) -> ScheduledDiffusion:
    """Returns the noise schedule of the model, with the betas of the config where it has some.

    Args:
        learned_variance: whether the network predicts a variance in addition to the noise.
    """
    betas = {key: getattr(config, key) for key in LATTE_NOISE if getattr(config, key) is not None}
    variance_type = config.variance_type if learned_variance else None
    return ScheduledDiffusion({**model.scheduler_settings(), **betas}, config.num_sampling_steps, variance_type)


def denoise(
    model: LatteT2V,
    schedule: ScheduledDiffusion,
    prompt: Prompt,
    noise: Tensor,
    config: T2XConfig,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
    *,
    plan: Plan | None = None,
    known: Given | None = None,
) -> Tensor:
    """Turns unit noise (1, F, C, h, w) into latents of the same shape.

    Args:
        plan: how windows of a longer video are put together.
        known: frames that the network sees clean, and that are returned unchanged.
        generator: of the noise that some samplers add at each step.
        progress: called with the steps done and their number.
    """

    def network(x: Tensor, timesteps: Tensor, captions: TextFeatures) -> Tensor:
        inputs = x.transpose(1, 2), timesteps, captions.features, None, config.enable_temporal_attentions
        return model(*inputs, return_dict=False)[0].transpose(1, 2)  # (B, F, C or 2C, h, w)

    captions = TextFeatures(prompt.positive, None, prompt.negative)
    scale = config.guidance_scale if prompt.negative is not None and config.guidance_scale > 1 else 1.0
    denoiser = guide_denoiser(network, captions, scale, channels=None)
    return sample_given(
        schedule,
        denoiser if plan is None else plan.denoiser(denoiser),
        noise,
        known,
        method=config.sample_method,
        eta=config.eta,
        generator=generator,
        callback=None if progress is None else lambda done, total, *_: progress(done, total),
    )


def load_network(config: T2XConfig, source: TextModel, device: torch.device) -> LatteT2V:
    """Returns the network of `source`, or of `transformer`, ready to sample."""
    dtype = DTYPES[config.precision]
    other = config.transformer and find_network(config.transformer, None, "transformer")
    model = load_t2v(other, dtype=dtype) if other else source.load_network(dtype)
    if config.lora:
        merge_lora(model, config.lora, config.lora_scale)
    quantize(model.requires_grad_(False), config.quantize_transformer, device)
    if config.compile:
        for block in model.blocks:
            block.compile()
    return model


# ------------------------------------------------------------------------------------------- pixels


def load_codec(config: T2XConfig, source: TextModel, device: torch.device) -> LatentCodec:
    """Returns the decoder of single frames, or that of clips."""
    codec = LatentCodec.from_config(source.codec_config(config), device)
    network: Any = codec.network
    for wanted, method in ((config.vae_slicing, "enable_slicing"), (config.vae_tiling, "enable_tiling")):
        if wanted and not hasattr(network, method):
            raise ValueError(f"{type(network).__name__} has no {method}: leave vae_slicing and vae_tiling out")
        if wanted:
            getattr(network, method)()
    if config.compile:
        network.decoder.compile()
    return codec


# -------------------------------------------------------------------------------------------- whole


class Sampler:
    """Network, sampler and decoder, for one video after the other.

    A video is a function of (seed, index): its noise comes from a generator of its own on the CPU.
    """

    def __init__(self, config: T2XConfig, source: TextModel, device: torch.device) -> None:
        self.config = config
        self.device = device
        if config.cpu_offload and device.type == "cpu":
            log.warning("cpu_offload changes nothing here: the networks would take turns on a GPU")
        resting = torch.device("cpu") if config.cpu_offload else device
        self.model = load_network(config, source, resting)
        channels, out_channels = self.model.config.channels
        self.schedule = build_schedule(config, source, learned_variance=out_channels == 2 * channels)
        self.codec = load_codec(config, source, resting)
        self._check()
        self.plan = self._plan()

    @property
    def num_steps(self) -> int:
        """Evaluations of the network for one video; some samplers make several per step."""
        return start_walk(self.config.sample_method, self.schedule, self.device).num_steps * self.plan.num_passes

    def sample(self, prompt: Prompt, index: int, progress: Progress | None = None) -> np.ndarray:
        """Samples the video of that index: uint8 (F, H, W, 3)."""
        generator = sample_generator(self.config.seed, index, torch.device("cpu"))
        placed = self.device, self.model.dtype
        prompt = Prompt(*(each if each is None else each.to(*placed) for each in prompt))  # type: ignore[arg-type]
        channels, _, *size = self.noise_shape[1:]

        def sample_pass(known: Given | None, frames: int) -> Tensor:
            noise = torch.randn(1, channels, frames, *size, generator=generator).to(*placed).transpose(1, 2)
            inputs = self.model, self.schedule, prompt, noise, self.config, generator, progress
            return denoise(*inputs, plan=self.plan, known=known)

        with self._on_device(self.model):
            latents = self.plan.sample(sample_pass, [index])
        with self._on_device(self.codec):
            video = self.codec.decode(latents)
            require_finite_videos([index], latents, video)
            return to_uint8(video)[0]

    @property
    def noise_shape(self) -> tuple[int, int, int, int, int]:
        """`(1, C, F, h, w)`."""
        height, width = (side // self.codec.config.downsample_factor for side in self.config.image_size)
        return 1, self.model.config.channels[0], self.config.video_length, height, width

    @contextmanager
    def _on_device(self, network: torch.nn.Module) -> Iterator[None]:
        """Moves the network to the device; with `cpu_offload` only for the block."""
        if not self.config.cpu_offload:
            yield
            return
        network.to(self.device)
        try:
            yield
        finally:
            network.to("cpu")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _plan(self) -> Plan:
        """Returns known frames and windows; the network's files do not say which of these it was trained with."""
        config = self.config
        windows = Windows(config.window, window_overlap(config), config.window_method) if config.window else None
        channels, frames, height, width = self.noise_shape[1:]
        data = DataConfig(num_frames=frames, image_size=config.image_size[0], frame_interval=1)
        given = read_given(config, data, prefix="")
        plan = Plan((frames, channels, height, width), torch.empty(0).to(self.device, self.model.dtype), (), windows)
        if given is not None:
            with self._on_device(self.codec):
                latents = self.codec.encode(given.pixels.to(self.device)).to(self.model.dtype)
            plan = replace(plan, latents=latents, places=given.places)
        plan.check(ConditionConfig(frames="random", max_frames=frames), span=1)
        return plan

    def _check(self) -> None:
        """Raises: ValueError where network and decoder do not fit each other or the size."""
        channels, ours = self.codec.config.latent_channels, self.model.config.channels[0]
        if channels != ours:
            raise ValueError(f"the decoder takes {channels} latent channels, but the network makes {ours}")
        grid = self.codec.config.downsample_factor * self.model.config.patch
        if any(side % grid for side in self.config.image_size):
            raise ValueError(f"image_size {self.config.image_size} must be divisible by {grid} for this model")
