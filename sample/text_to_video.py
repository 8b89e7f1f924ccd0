"""Text to video in three steps: prompts -> features of T5 -> latents -> pixels; each network is held only as needed.

Made of the parts of a Latte folder (tokenizer, text_encoder, transformer, scheduler, vae, vae_temporal_decoder), and
equal to diffusers' LattePipeline for one prompt and the same initial latents.

Letters: B batch (2 with guidance), L words of a prompt, F frames, C latent channels, h w latent pixels, H W pixels.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.checks import require
from datasets.config import DataConfig
from diffusion import ConditionConfig, Given, conditioned
from engine.config import window_overlap
from engine.objective import sample_generator
from models import hub
from models.autoencoder import DTYPES, CodecConfig, LatentCodec
from models.convert_t2v import find_network, load_t2v
from models.hub import require_part
from models.latte_t2v import LatteT2V
from models.lora import merge_lora
from models.quantize import quantize
from models.text_encoder import Prompt
from sample.generate import require_finite_videos, to_uint8
from sample.given import Plan, Windows, read_given
from sample.t2x_config import LEARNED_VARIANCE, SCHEDULERS, T2XConfig

LATTE_BETAS = {
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}  # Latte's, where a folder says nothing
BETAS = tuple(LATTE_BETAS)
log = logging.getLogger(__name__)

FIXED_VARIANCE = "fixed_large"  # of DDPM, of a network without a learned one
PARTS = ("tokenizer", "text_encoder", "transformer", "scheduler", "vae*")
Progress = Callable[[int, int], object]


def find_folder(config: T2XConfig) -> Path:
    """The folder of `pretrained_model_path`.

    Raises: FileNotFoundError, one sentence, where it is neither a folder nor a hub name.
    """
    patterns = ["model_index.json", *(f"{part}/*" for part in PARTS)]
    return hub.find_folder(config.pretrained_model_path, config.revision, "pretrained_model_path", patterns)


# ------------------------------------------------------------------------------------------ latents


def make_scheduler(config: T2XConfig, folder: Path, *, learned_variance: bool = True) -> Any:
    """The sampler that `sample_method` names, on the noise schedule of the folder, or with the config's betas.

    Args:
        learned_variance: whether the network predicts a variance beside the noise.
    """
    import diffusers

    require_part(folder, "scheduler")
    name, options = SCHEDULERS[config.sample_method]
    betas = {key: getattr(config, key) for key in BETAS if getattr(config, key) is not None}
    if config.sample_method in LEARNED_VARIANCE:
        betas["variance_type"] = config.variance_type if learned_variance else FIXED_VARIANCE
    owner = getattr(diffusers, name)
    given = hub.read_json(folder / "scheduler" / "scheduler_config.json")
    known = inspect.signature(owner.__init__).parameters
    kept = {key: value for key, value in given.items() if key in known and key != "variance_type"}
    scheduler = owner(**{**LATTE_BETAS, **kept, **betas, **options})
    steps, most = config.num_sampling_steps, scheduler.config.num_train_timesteps
    require(steps <= most, f"num_sampling_steps={steps} is more than the {most} steps of the noise schedule")
    return scheduler


@torch.no_grad()
def denoise(
    model: LatteT2V,
    scheduler: Any,
    prompt: Prompt,
    noise: Tensor,
    config: T2XConfig,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
    *,
    plan: Plan | None = None,
    known: Given | None = None,
) -> Tensor:
    """Unit noise (1, C, F, h, w) -> latents of the same shape.

    Args:
        plan: how windows of a longer video are put together.
        known: frames that the network sees clean, and that come out as they are.
        generator: of the noise that some samplers add at each step.
        progress: called with the steps done and their number.
    """
    scheduler.set_timesteps(config.num_sampling_steps, device=noise.device)
    accepted = inspect.signature(scheduler.step).parameters
    extra = {key: value for key, value in {"eta": config.eta, "generator": generator}.items() if key in accepted}
    learned = getattr(scheduler.config, "variance_type", None) in ("learned", "learned_range")
    guided = config.guidance_scale > 1 and prompt.negative is not None
    captions = torch.cat([prompt.negative, prompt.positive]) if guided else prompt.positive  # type: ignore[list-item]

    def network(x: Tensor, timesteps: Tensor) -> Tensor:
        inputs = x.transpose(1, 2), timesteps, captions, None, config.enable_temporal_attentions
        return model(*inputs, return_dict=False)[0].transpose(1, 2)  # (B, F, C or 2C, h, w)

    denoiser = network if plan is None else plan.denoiser(network)
    denoiser = denoiser if known is None else conditioned(denoiser, known)
    latents = noise * scheduler.init_noise_sigma
    for done, step in enumerate(scheduler.timesteps, start=1):
        entered = scheduler.scale_model_input(latents.expand(len(captions), -1, -1, -1, -1), step)
        timesteps = step.expand(len(captions)).to(noise.device)
        output = denoiser(entered.transpose(1, 2), timesteps).transpose(1, 2)
        if guided:
            without, with_caption = output.chunk(2)
            output = without + config.guidance_scale * (with_caption - without)
        if not learned:
            output = output[:, : noise.shape[1]]
        if known is not None:  # what is said of known frames goes nowhere; zero, so that their state stays small
            output = output.masked_fill(known.frames[:, None, :, None, None], 0)
        latents = scheduler.step(output, step, latents, **extra, return_dict=False)[0]
        if progress is not None:
            progress(done, len(scheduler.timesteps))
    return latents if known is None else known.keep(latents.transpose(1, 2)).transpose(1, 2)


def load_network(config: T2XConfig, folder: Path, device: torch.device) -> LatteT2V:
    """The text-conditioned network of the folder, or of `transformer`, ready to sample."""
    if config.transformer is None:
        require_part(folder, "transformer")
    other = config.transformer and find_network(config.transformer, None, "transformer")
    model = load_t2v(other or folder / "transformer", dtype=DTYPES[config.precision])
    if config.lora:
        merge_lora(model, config.lora, config.lora_scale)
    quantize(model.requires_grad_(False), config.quantize_transformer, device)
    if config.compile:
        for block in model.blocks:
            block.compile()
    return model


# ------------------------------------------------------------------------------------------- pixels


def load_codec(config: T2XConfig, folder: Path, device: torch.device) -> LatentCodec:
    """The decoder of single frames, or the one of clips."""
    name = "vae_temporal_decoder" if config.enable_vae_temporal_decoder else "vae"
    require_part(folder, name)
    described = hub.read_json(folder / name / "config.json")
    widths = described.get("block_out_channels") or described["encoder_block_out_channels"]  # AutoencoderTiny's
    codec = LatentCodec.from_config(
        CodecConfig(
            path=str(folder),
            subfolder=name,
            latent_channels=described["latent_channels"],
            downsample_factor=2 ** (len(widths) - 1),
            scale=described.get("scaling_factor", 0.18215),
            dtype=config.precision,
            chunk_size=config.decode_chunk_size,
        ),
        device,
    )
    network: Any = codec.network
    for wanted, method in ((config.vae_slicing, "enable_slicing"), (config.vae_tiling, "enable_tiling")):
        if wanted and not hasattr(network, method):
            raise ValueError(f"{described['_class_name']} has no {method}: leave vae_slicing and vae_tiling out")
        if wanted:
            getattr(network, method)()
    if config.compile:
        network.decoder.compile()
    return codec


# -------------------------------------------------------------------------------------------- whole


class Sampler:
    """The network, its sampler and the decoder, for one video after the other.

    A video is a function of (seed, index): its noise comes from a generator of its own on the CPU.

    Args:
        codec: the decoder, in place of the folder's.
    """

    def __init__(self, config: T2XConfig, folder: Path, device: torch.device, codec: CodecConfig | None = None) -> None:
        self.config = config
        self.device = device
        if config.cpu_offload and device.type == "cpu":
            log.warning("cpu_offload changes nothing here: the networks would take turns on a GPU")
        resting = torch.device("cpu") if config.cpu_offload else device
        self.model = load_network(config, folder, resting)
        channels, out_channels = self.model.config.channels
        self.scheduler = make_scheduler(config, folder, learned_variance=out_channels == 2 * channels)
        self.codec = LatentCodec.from_config(codec, resting) if codec else load_codec(config, folder, resting)
        self._check()
        self.plan = self._plan()

    @property
    def num_steps(self) -> int:
        """Evaluations of the network for one video; some samplers take several for each step."""
        self.scheduler.set_timesteps(self.config.num_sampling_steps)
        return len(self.scheduler.timesteps) * self.plan.num_passes

    def sample(self, prompt: Prompt, index: int, progress: Progress | None = None) -> np.ndarray:
        """The video of that index: uint8 (F, H, W, 3)."""
        generator = sample_generator(self.config.seed, index, torch.device("cpu"))
        placed = self.device, self.model.dtype
        prompt = Prompt(*(each if each is None else each.to(*placed) for each in prompt))  # type: ignore[arg-type]
        channels, _, *size = self.noise_shape[1:]

        def sample_pass(known: Given | None, frames: int) -> Tensor:
            noise = torch.randn(1, channels, frames, *size, generator=generator).to(*placed)
            inputs = self.model, self.scheduler, prompt, noise, self.config, generator, progress
            return denoise(*inputs, plan=self.plan, known=known).transpose(1, 2)

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
        """Have the network on the device, and with `cpu_offload` no longer than needed."""
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
        """What is known of the videos, and their windows; the network's files do not say what it was trained with."""
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
