"""Samples videos: noise -> sampler(guided denoiser) -> codec -> uint8.

A video is a function of (seed, index): its own CPU generator draws its initial noise and that of every step, so
the noise does not depend on batch size, device or number of processes.

Letters: B videos per batch, n videos in total, F frames, C latent channels, h w latent pixels, H W pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from common.checks import require
from diffusion import Denoiser, Given, ScheduledDiffusion, guide_denoiser, list_evaluations
from diffusion.samplers import Callback, Process
from engine.build import build_model, build_process
from engine.conditions import Conditions, class_conditions
from engine.config import Config, SampleConfig, window_overlap
from engine.objective import sample_generator
from models.autoencoder import LatentCodec
from models.convert import load_weights, require_finite
from models.latte import Latte
from models.latte_t2v import LatteT2V
from models.lora import Adapter

from .decoding import Batch, decode_batches, require_finite_videos, to_uint8
from .given import GivenFrames, Plan, Windows, read_given
from .labels import choose_labels
from .network import GuidedEvaluations, Network
from .source import Source

Progress = Callable[[int, int], None]  # (sampler steps done, total)


@dataclass(frozen=True)
class Settings:
    """Settings shared by all videos of a job; most are keys of the `sample` section (`SampleConfig`)."""

    labels: Sequence[int | str] | None = None
    label_rule: str = "balanced"
    seed: int = 0
    steps: int = 250
    method: str = "auto"  # with a diffusers schedule, one of its ten samplers
    eta: float = 0.0
    guidance_scale: float = 1.0
    guidance_interval: Sequence[float] | None = None
    batched_guidance: bool = True
    batch_size: int = 4
    num_frames: int | None = None  # None, here and below: as in training
    image_size: int | Sequence[int] | None = None  # one number or (height, width)
    overlap_decode: bool = True
    given: GivenFrames | None = None  # for networks trained with given frames
    windows: Windows | None = None  # None: all frames at once


def sampler_settings(config: Config) -> dict[str, Any]:
    """Returns the `Settings` that `config` determines, by name; reads given frames.

    The default window method is one that the network supports.
    """
    wanted, windows = config.sample, None
    if wanted.window is not None:
        fitting = "fused" if config.condition.frames == "none" else "autoregressive"
        fitting = fitting if config.diffusion.frame_timesteps == "shared" else "rolling"
        method = fitting if wanted.window_method == "auto" else wanted.window_method
        windows = Windows(wanted.window, window_overlap(wanted), method)
    keys = {item.name for item in fields(Settings)} & SampleConfig.__dataclass_fields__.keys()
    return {key: getattr(wanted, key) for key in keys} | {
        "num_frames": config.data.num_frames,
        "image_size": config.data.image_size,
        "given": read_given(wanted, config.data),
        "windows": windows,
    }


def plan_sampling(config: Config, wanted: Settings) -> Plan:
    """Returns the size, known frames and windows of the videos; needs no weights.

    Raises: ValueError if the network or codec of `config` does not support them.
    """
    size = config.data.image_size if wanted.image_size is None else wanted.image_size
    sides, factor = (size, size) if isinstance(size, int) else tuple(size), config.codec.downsample_factor
    for side in sides:
        require(side % factor == 0, f"data.image_size={side} must be a multiple of codec.downsample_factor={factor}.")
    shape = (wanted.num_frames or config.data.num_frames, config.codec.latent_channels, *(s // factor for s in sides))
    plan = Plan(shape, wanted.given.places if wanted.given else (), wanted.windows)  # type: ignore[arg-type]
    if wanted.windows and wanted.windows.method == "rolling":
        plan.check_rolling(config, wanted)
    else:
        plan.check(config.condition, config.model.frames_per_token)
    return plan


class Generator:
    """A network with its codec, ready to sample.

    Args:
        config: the training configuration of the network.
        conditions: the classes or captions that labels index.
        schedule: number of steps -> diffusers noise schedule. Sampling then matches diffusers' pipelines: latents in
            the dtype of the weights, guidance of the variance too. None: the diffusion of `config`, in fp32.
        network: `precision`, `cast_weights` and `compiled`, as for `Network`. The precision of the codec is
            `codec.dtype`.
        check_videos: raise ValueError for a video that is not finite. Off for previews, which must not stop training.
        offload: keep only the one in use, network or codec, on the device.
    """

    def __init__(
        self,
        model: Latte | LatteT2V,
        codec: LatentCodec,
        config: Config,
        conditions: Conditions,
        *,
        schedule: Callable[[int], ScheduledDiffusion] | None = None,
        device: torch.device | str = "cpu",
        check_videos: bool = True,
        offload: bool = False,
        **network: Any,
    ) -> None:
        self.device = torch.device(device)
        self.network = Network(model, torch.device("cpu") if offload else self.device, **network)
        self.model = self.network.model
        self.codec, self.config, self.conditions, self.schedule = codec, config, conditions, schedule
        self.check_videos, self.offload = check_videos, offload
        self.dtype = cast(torch.dtype, self.model.dtype) if schedule else torch.float32  # of the latents

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path | Source,
        *,
        config: Config | None = None,
        weights: str = "ema",
        device: torch.device | str | None = None,
        say: Callable[[str], object] = lambda text: None,
        **network: Any,
    ) -> Generator:
        """Loads one of our checkpoint or run folders, or an official .pt file.

        Args:
            config: required for an official file; None uses the one in our checkpoint. The trained clip size, if
                the checkpoint or its position tables contain it, replaces that of `config`.
            weights: "ema" or "raw".
            device: None is CUDA if available.
            say: called with a line for each part being loaded.
            network: as for `Generator`.
        """
        source = path if isinstance(path, Source) else Source.open(path)
        config, device = source.require_classes(config or source.config), usable_device(device)
        say(f"loading the network from {source.path}")
        own = source.weights(weights)
        require_finite(own, source.weights_file(weights))
        config = source.trained_config(config, own)
        if config.sample.lora:
            Adapter.from_folder(config.sample.lora).merge_into(own, config.sample.lora_scale)
        model = cast(Latte, build_model(config, device))
        load_weights(model, own, str(source.path))
        say(f"loading the codec, {config.codec.path or 'pixel space'}")
        codec = LatentCodec.from_config(config.codec, device=device)
        conditions = class_conditions(config.model, device, source.class_names(config))
        return cls(model.requires_grad_(False), codec, config, conditions, device=device, **network)

    def sample(self, labels: Sequence[int | str] | None = None, num: int = 4, **settings: Any) -> np.ndarray:
        """Samples `num` videos: uint8 (n, F, H, W, 3); `settings` as for `batches`."""
        return np.concatenate([videos for _, videos in self.batches(labels, num, **settings)])

    def batches(
        self,
        labels: Sequence[int | str] | None = None,
        num: int = 4,
        *,
        indices: Sequence[int] | None = None,
        callback: Progress | None = None,
        **settings: Any,
    ) -> Iterator[Batch]:
        """Samples in batches of at most `batch_size`.

        Args:
            labels: as for `choose_labels`.
            num: samples videos 0 to num - 1, unless `indices` are given, e.g. one process's share.
            callback: called after each step of the sampler.
            settings: fields of `Settings`.

        Yields: (indices, videos), videos as uint8 (B, F, H, W, 3).

        Raises: ValueError if the network or its diffusion does not support the settings.
        """
        wanted = Settings(labels, **settings)
        label_of = choose_labels(self.conditions, labels, wanted.label_rule, wanted.seed)
        plan = plan_sampling(self.config, wanted)
        chosen = list(range(num)) if indices is None else list(indices)
        chunks = [chosen[start : start + wanted.batch_size] for start in range(0, len(chosen), wanted.batch_size)]
        callbacks = count_passes(callback, len(chunks) * plan.num_passes)
        process, known = self.build_process(wanted.steps), self.encode(wanted.given)

        def sample_latents(chunk: list[int]) -> Tensor:
            clips = torch.zeros(len(chunk), *plan.shape, device=self.device, dtype=self.dtype)
            if known is not None:
                clips[:, list(plan.places)] = known[[index % len(known) for index in chunk]]
            labels, noise = [label_of(each) for each in chunk], VideoNoise(wanted.seed, chunk, self.device, self.dtype)
            with self._on_device(self.model):
                return plan.sample(self._start_passes(process, plan, wanted, labels, noise, callbacks), clips)

        batches = ((chunk, sample_latents(chunk)) for chunk in chunks)
        ahead = wanted.overlap_decode and self.device.type == "cuda" and not self.offload
        yield from decode_batches(batches, self.decode, self.device, ahead=ahead)

    def _start_passes(
        self,
        process: Process | ScheduledDiffusion,
        plan: Plan,
        wanted: Settings,
        labels: Sequence[int | None],
        noise: VideoNoise,
        callbacks: Iterator[Callback | None],
    ) -> Callable[[Given | None, int], Tensor]:
        """Returns a function (known frames, number of frames) -> latents (B, frames, C, h, w) for one batch."""

        def sample_pass(given: Given | None, frames: int) -> Tensor:
            guided = GuidedEvaluations(self.list_guided(process, wanted))
            return plan.sampler(self.config.model.frames_per_token)(
                process,
                guided.count(plan.denoiser(self.denoiser(labels, wanted, guided))),
                noise.draw((frames, *plan.shape[1:]), channels_first=self.schedule is not None),
                given,
                method=self.resolve_method(wanted.method),
                eta=wanted.eta,
                noise_fn=noise.like,
                generator=noise.generators,
                callback=next(callbacks),
            )

        return sample_pass

    def build_process(self, steps: int) -> Process | ScheduledDiffusion:
        """Returns the diffusion respaced to `steps`."""
        if self.schedule is not None:
            return self.schedule(steps)
        return build_process(self.config, respacing=str(steps)).to(self.device)

    def resolve_method(self, method: str) -> str:
        """Returns `method`, with `auto` resolved for this diffusion."""
        default = "DDPM" if self.schedule else "euler" if self.config.is_flow else "ddpm"
        return default if method == "auto" else method

    def list_guided(self, process: Process | ScheduledDiffusion, wanted: Settings) -> list[bool] | None:
        """Returns for each evaluation whether its noise level is in `guidance_interval`; None without an interval."""
        if wanted.guidance_interval is None:
            return None
        require(not isinstance(process, ScheduledDiffusion), "diffusers' samplers do not support guidance_interval.")
        low, high = wanted.guidance_interval
        times = list_evaluations(cast(Process, process), self.resolve_method(wanted.method))
        return [low <= time / self.config.diffusion.num_steps <= high for time in times]

    def denoiser(self, labels: Sequence[int | None], wanted: Settings, guided: GuidedEvaluations) -> Denoiser:
        """Returns the guided network for a batch of `labels`."""
        return guide_denoiser(
            self.network,
            self.conditions.batch(torch.tensor([label or 0 for label in labels])[:, None]),
            wanted.guidance_scale,
            channels=None if self.schedule else self.config.codec.latent_channels,
            batched=wanted.batched_guidance,
            active=guided.is_active,
        )

    def encode(self, given: GivenFrames | None) -> Tensor | None:
        """Encodes given frames to latents (V, k, C, h, w)."""
        if given is None:
            return None
        with self._on_device(self.codec):
            return self.codec.encode(given.pixels.to(self.device)).to(self.dtype)

    @torch.no_grad()
    def decode(self, indices: Sequence[int], latents: Tensor) -> np.ndarray:
        """Decodes latents (B, F, C, h, w) of the videos `indices` to uint8 (B, F, H, W, 3)."""
        with self._on_device(self.codec):
            video = self.codec.decode(latents)
        if self.check_videos:
            require_finite_videos(indices, latents, video)
        return to_uint8(video)

    @contextmanager
    def _on_device(self, network: nn.Module) -> Iterator[None]:
        """Moves `network` to the device for the duration of the block, if `offload` is set."""
        if not self.offload:
            yield
            return
        network.to(self.device)
        try:
            yield
        finally:
            network.to("cpu")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


class VideoNoise:
    """Unit noise for a batch of videos, each with its own generator seeded by (seed, index)."""

    def __init__(
        self, seed: int, indices: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.generators = [sample_generator(seed, index, torch.device("cpu")) for index in indices]
        self.device, self.dtype = device, dtype

    def draw(self, shape: Sequence[int], *, channels_first: bool = False) -> Tensor:
        """Draws the next noise (B, *shape); if `channels_first`, fills shape (F, C, h, w) in the order (C, F, h, w)."""
        order = (shape[1], shape[0], *shape[2:]) if channels_first else shape
        noise = torch.stack([torch.randn(*order, generator=each) for each in self.generators])
        noise = noise.to(self.device, self.dtype)
        return noise.transpose(1, 2) if channels_first else noise

    def like(self, x: Tensor) -> Tensor:
        """Draws the next noise, with the shape of x (B, ...)."""
        return self.draw(x.shape[1:])


def count_passes(callback: Progress | None, num_passes: int) -> Iterator[Callback | None]:
    """Yields a sampler callback for each pass, which calls `callback` with step counts over all passes."""
    for number in itertools.count():
        yield callback and (lambda done, total, *_, n=number: callback(n * total + done, num_passes * total))


def usable_device(name: torch.device | str | None) -> torch.device:
    """Returns the named device, by default CUDA if available. Raises: ValueError if the machine lacks it."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        known = device.type == "cuda" and 0 <= (device.index or 0) < torch.cuda.device_count()
        usable = device.type == "cpu" or known
    except RuntimeError:
        usable = False
    require(usable, f"--device {name}: this machine has no such device; use cpu, cuda or cuda:N.")
    return device
