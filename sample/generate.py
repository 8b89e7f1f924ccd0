"""Videos from a checkpoint: noise -> sampler(guided denoiser) -> codec -> uint8.

A video is a function of (seed, index): its initial noise and the noise of every step come from its own
generator on the CPU, so neither the batch size nor the device nor the number of processes changes the draw.

Letters: B videos of a batch, n videos in all, F frames, C latent channels, h w latent pixels, H W pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from diffusion import Denoiser, Given, guide_denoiser, list_evaluations, sample_given
from diffusion.samplers import Callback
from engine.build import build_model, build_process
from engine.conditions import Conditions, class_conditions
from engine.config import LABEL_RULES, Config, window_overlap
from engine.objective import sample_generator
from models.autoencoder import LatentCodec
from models.convert import load_weights, require_finite
from models.latte import Latte
from models.latte_t2v import LatteT2V
from models.lora import Adapter

from .class_names import UCF101_CLASSES
from .decoding import Decoder
from .given import GivenFrames, Plan, Windows, read_given
from .network import EvaluationCounter, Network
from .source import Source

Progress = Callable[[int, int], None]  # (sampler steps done, sampler steps in all)


def usable_device(name: torch.device | str | None) -> torch.device:
    """Returns the device of that name, by default CUDA if available. Raises: ValueError if the machine lacks it."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        known = device.type == "cuda" and 0 <= (device.index or 0) < torch.cuda.device_count()
        usable = device.type == "cpu" or known
    except RuntimeError:
        usable = False
    if not usable:
        raise ValueError(f"--device {name}: this machine has no such device; use cpu, cuda or cuda:N.")
    return device


def resolve_labels(labels: Sequence[int | str], num_classes: int, class_names: Sequence[str] | None) -> list[int]:
    """Returns the class numbers of `labels`, which may be numbers, numbers as text, or class names.

    Raises:
        ValueError: an unknown name, a number out of range, or labels for a network without classes.
    """
    if labels and not num_classes:
        raise ValueError("sample.labels: this network is unconditional (model.num_classes is 0); leave labels out.")
    return [_resolve_label(str(label).strip(), num_classes, class_names or []) for label in labels]


def _resolve_label(label: str, num_classes: int, class_names: Sequence[str]) -> int:
    if label in class_names:
        return list(class_names).index(label)
    if not label.removeprefix("-").isdecimal():
        known = f"its classes are {', '.join(class_names)}" if class_names else "its class names are not known"
        raise ValueError(f"sample.labels: {label!r} is not a class of this network; {known}; numbers work too.")
    if not 0 <= int(label) < num_classes:
        raise ValueError(
            f"sample.labels: label {label} is out of range; the network has {num_classes} classes, "
            f"0 to {num_classes - 1}."
        )
    return int(label)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: its scale, its interval of noise levels, and whether in one call of 2B."""

    scale: float = 1.0
    interval: Sequence[float] | None = None
    batched: bool = True

    def is_active(self, fraction: float) -> bool:
        """Returns whether a noise level, from 0 (data) to 1 (noise), is guided."""
        return self.interval is None or self.interval[0] <= fraction <= self.interval[1]


class Generator:
    """A network with its codec, ready to sample.

    Args:
        config: the configuration the network was trained with.
        conditions: classes or captions that labels are numbers of.
        network: how the network is called: `precision`, `cast_weights` and `compiled`, as for `Network`. The
            sampler's arithmetic is in fp32 in any case, and the codec has its own precision, `codec.dtype`.
        check_videos: raise ValueError for a video that is not finite. Off for previews, which end no training.
    """

    def __init__(
        self,
        model: Latte | LatteT2V,
        codec: LatentCodec,
        config: Config,
        conditions: Conditions,
        *,
        device: torch.device | str = "cpu",
        check_videos: bool = True,
        **network: Any,
    ) -> None:
        self.device = torch.device(device)
        self.network = Network(model, self.device, **network)
        self.model = self.network.model
        self.codec = codec
        self.config = config
        self.check_videos = check_videos
        self.conditions = conditions

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        config: Config | None = None,
        weights: str = "ema",
        device: torch.device | str | None = None,
        **network: Any,
    ) -> Generator:
        """Loads a checkpoint or run folder of ours, or an official .pt file.

        Args:
            config: needed for an official file; None takes the one in our checkpoint.
            weights: "ema" or "raw".
            device: None is CUDA where there is one.
            network: as for `Generator`.
        """
        return cls.from_source(Source.open(path), config=config, weights=weights, device=device, **network)

    @classmethod
    def from_source(
        cls,
        source: Source,
        *,
        config: Config | None = None,
        weights: str = "ema",
        device: torch.device | str | None = None,
        **network: Any,
    ) -> Generator:
        """Loads an opened source; see `from_checkpoint`."""
        config = config or source.config
        if config is None:
            raise ValueError(f"{source.path} holds weights only: give the config of its network.")
        if config.model.is_text:
            raise ValueError(
                f"{source.path} is a text network: sample/sample_t2x.py --ckpt {source.path} --prompt TEXT samples it."
            )
        device = usable_device(device)
        model = cast(Latte, build_model(config, device))
        own = source.weights(weights)
        require_finite(own, source.weights_file(weights))
        if config.sample.lora:
            Adapter.from_folder(config.sample.lora).merge_into(own, config.sample.lora_scale)
        load_weights(model, own, str(source.path))
        names = source.class_names or _known_class_names(config)
        codec = LatentCodec.from_config(config.codec, device=device)
        conditions = class_conditions(config.model, device, names)
        return cls(model.requires_grad_(False), codec, config, conditions, device=device, **network)

    def sample(self, labels: Sequence[int | str] | None = None, num: int = 4, **settings: Any) -> np.ndarray:
        """Samples `num` videos: uint8 (n, F, H, W, 3); `settings` as for `batches`."""
        return np.concatenate([videos for _, videos in self.batches(labels, num, **settings)])

    def batches(
        self,
        labels: Sequence[int | str] | None = None,
        num: int = 4,
        *,
        label_rule: str = "balanced",
        seed: int = 0,
        steps: int = 250,
        method: str = "auto",
        eta: float = 0.0,
        guidance_scale: float = 1.0,
        guidance_interval: Sequence[float] | None = None,
        batched_guidance: bool = True,
        batch_size: int = 4,
        num_frames: int | None = None,
        image_size: int | None = None,
        overlap_decode: bool = True,
        indices: Sequence[int] | None = None,
        given: GivenFrames | None = None,
        windows: Windows | None = None,
        callback: Progress | None = None,
    ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Samples in batches of at most `batch_size`.

        Args:
            labels, label_rule: as for `labels_for`, which draws with `seed`.
            num: videos 0 to num - 1; `indices` picks others, e.g. one process's share.
            seed: any whole number from 0.
            steps: of the sampler, at most `diffusion.num_steps` for Gaussian diffusion.
            method: ddpm or ddim for Gaussian diffusion, euler or heun for flow; auto is the first. For both
                dpm_solver++, sde_dpm_solver++ and unipc, which need diffusers.
            eta: of DDIM, 0 (deterministic) to 1 (as noisy as DDPM).
            guidance_scale: 1 is the plain conditional network.
            guidance_interval: (low, high) in [0, 1], 0 data and 1 noise: noise levels outside are not guided.
            batched_guidance: conditional and unconditional as one batch, else one after the other.
            num_frames, image_size: of the videos; None is what the network was trained on.
            overlap_decode: on CUDA, decode a batch while the next one is sampled.
            given: known frames of the videos, for networks trained with given frames.
            windows: sample longer videos in windows; None: all frames at once.

        Yields:
            (indices, videos): videos are uint8 (B, F, H, W, 3).

        Raises:
            ValueError: settings that the network or its diffusion does not support.
        """
        label_of = self.labels_for(labels, label_rule, seed)
        shape = self.latent_shape(num_frames, image_size)
        process = build_process(self.config, respacing=str(steps)).to(self.device)
        method = self.resolve_method(method)
        times = list_evaluations(process, method)
        guidance = Guidance(guidance_scale, guidance_interval, batched_guidance)
        plan = self._plan(shape, given, windows)
        indices = list(range(num)) if indices is None else list(indices)
        chunks = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
        passes = itertools.count()

        def sampler_of(chunk: list[int]) -> Callable[[Given | None, int], Tensor]:
            noise = VideoNoise(seed, chunk, self.device)
            wanted = [label_of(index) for index in chunk]

            def sample_pass(known: Given | None, frames: int) -> Tensor:
                counter = EvaluationCounter(times, self.config.diffusion.num_steps)
                return sample_given(
                    process,
                    counter.count(plan.denoiser(self.denoiser(wanted, guidance, counter))),
                    noise.draw((frames, *shape[1:])),
                    known,
                    method=method,
                    eta=eta,
                    noise_fn=noise.like,
                    callback=_progress(callback, next(passes), len(chunks) * plan.num_passes),
                )

            return sample_pass

        with Decoder(self.decode, self.device, ahead=overlap_decode and self.device.type == "cuda") as decoder:
            for chunk in chunks:
                yield from decoder.push(chunk, plan.sample(sampler_of(chunk), chunk))
            yield from decoder.rest()

    def _plan(self, shape: tuple[int, int, int, int], given: GivenFrames | None, windows: Windows | None) -> Plan:
        """Returns known frames and windows of the videos. Raises: ValueError if the network does not support them."""
        plan = Plan(shape, torch.empty(0, device=self.device), windows=windows)
        if given is not None:
            latents = self.codec.encode(given.pixels.to(self.device))
            plan = replace(plan, latents=latents, places=given.places)
        plan.check(self.config.condition, self.config.model.frames_per_token)
        return plan

    @torch.no_grad()
    def decode(self, indices: Sequence[int], latents: Tensor) -> np.ndarray:
        """Returns the videos `indices`, uint8 (B, F, H, W, 3), of latents (B, F, C, h, w)."""
        video = self.codec.decode(latents)
        if self.check_videos:
            require_finite_videos(indices, latents, video)
        return to_uint8(video)

    def labels_for(
        self, labels: Sequence[int | str] | None = None, rule: str = "balanced", seed: int = 0
    ) -> Callable[[int], int | None]:
        """Returns a function from video index to label: one of `labels` (None: all classes); None if unconditional.

        Args:
            rule: "balanced" takes them in turn, so their counts differ by one at most; "random" draws one for each
                index, evenly, as a function of (seed, index).
        """
        if rule not in LABEL_RULES:
            raise ValueError(f"sample.label_rule must be one of {', '.join(LABEL_RULES)}, not {rule!r}.")
        count = self.conditions.count
        chosen = resolve_labels(labels or [], count, self.conditions.names) or list(range(count))
        if not chosen:
            return lambda index: None
        if rule == "random":
            return lambda index: chosen[_draw_number(seed, index) % len(chosen)]
        return lambda index: chosen[index % len(chosen)]

    def class_name(self, label: int | None) -> str | None:
        """Returns the name of a class, `class-012` where names are not known, None for no label."""
        if label is None:
            return None
        names = self.conditions.names or []
        return names[label] if label < len(names) else f"class-{label:03d}"

    def resolve_method(self, method: str) -> str:
        """Returns `method`, with `auto` resolved for this diffusion."""
        if method != "auto":
            return method
        return "euler" if self.config.diffusion.prediction == "flow" else "ddpm"

    def latent_shape(self, num_frames: int | None, image_size: int | None) -> tuple[int, int, int, int]:
        """Returns the shape (F, C, h, w) of one video's latents."""
        size, factor = image_size or self.config.data.image_size, self.config.codec.downsample_factor
        if size % factor:
            raise ValueError(f"data.image_size={size} must be a multiple of codec.downsample_factor={factor}.")
        side = size // factor
        return num_frames or self.config.data.num_frames, self.config.codec.latent_channels, side, side

    def denoiser(self, labels: Sequence[int | None], guidance: Guidance, counter: EvaluationCounter) -> Denoiser:
        """Returns the guided network for a batch of `labels`; `counter` says which evaluation is under way."""
        numbers = [0 if label is None else label for label in labels]
        return guide_denoiser(
            self.network,
            self.conditions.batch(torch.tensor(numbers)[:, None]),
            guidance.scale,
            channels=self.config.codec.latent_channels,
            batched=guidance.batched,
            active=lambda: guidance.is_active(counter.fraction),
        )


def sampler_settings(config: Config) -> dict[str, Any]:
    """Returns the arguments of `Generator.batches` that `config` determines; not the choice of videos."""
    keys = (
        *("labels", "label_rule", "seed", "steps", "method", "eta", "batch_size"),
        *("guidance_scale", "guidance_interval", "batched_guidance", "overlap_decode"),
    )
    sizes = {"num_frames": config.data.num_frames, "image_size": config.data.image_size}
    frames = {"given": read_given(config.sample, config.data), "windows": windows_of(config)}
    return {key: getattr(config.sample, key) for key in keys} | sizes | frames


def windows_of(config: Config) -> Windows | None:
    """Returns the windows of `config`; the method is by default one that the network supports."""
    wanted = config.sample
    if wanted.window is None:
        return None
    fitting = "fused" if config.condition.frames == "none" else "autoregressive"
    method = fitting if wanted.window_method == "auto" else wanted.window_method
    return Windows(wanted.window, window_overlap(wanted), method)


class VideoNoise:
    """Unit noise of a batch of videos, each from its own generator seeded with (seed, index)."""

    def __init__(self, seed: int, indices: Sequence[int], device: torch.device) -> None:
        self.generators = [sample_generator(seed, index, torch.device("cpu")) for index in indices]
        self.device = device

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Draws the next noise (B, *shape)."""
        return torch.stack([torch.randn(*shape, generator=each) for each in self.generators]).to(self.device)

    def like(self, x: Tensor) -> Tensor:
        """Draws the next noise in the shape of x (B, ...)."""
        return self.draw(x.shape[1:])


def _draw_number(seed: int, index: int) -> int:
    """Returns a random 64-bit number for video `index`, independent of its noise."""
    return int(np.random.SeedSequence([seed, index], spawn_key=(1,)).generate_state(1, np.uint64)[0])


def require_finite_videos(indices: Sequence[int], latents: Tensor, video: Tensor) -> None:
    """Raises ValueError that names the first of the videos `indices` whose latents or pixels are not finite.

    Args:
        latents, video: (B, ...), one after the other those of `indices`.
    """
    finite = latents.isfinite().flatten(1).all(1) & video.isfinite().flatten(1).all(1)
    bad = [index for index, good in zip(indices, finite.tolist(), strict=True) if not good]
    if bad:
        raise ValueError(
            f"video {bad[0]} holds NaN or infinity and is not written: use a smaller guidance_scale, fp32 as precision "
            "or another checkpoint."
        )


def to_uint8(video: Tensor) -> np.ndarray:
    """Converts (B, F, 3, H, W) in [-1, 1] to uint8 (B, F, H, W, 3), rounded to the nearest."""
    levels = (video.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 1, 3, 4, 2).contiguous().cpu().numpy()


def _progress(callback: Progress | None, chunk: int, chunks: int) -> Callback | None:
    if callback is None:
        return None
    return lambda done, total, x, pred_x_start: callback(chunk * total + done, chunks * total)


def _known_class_names(config: Config) -> list[str] | None:
    """Returns the class names of a data set whose classes are fixed, for files without names."""
    ucf101 = config.data.name == "ucf101" and config.model.num_classes == len(UCF101_CLASSES)
    return UCF101_CLASSES if ucf101 else None
