"""The loss of a batch of clips: the one place that joins codec, diffusion and network.

Letters: B clips, F frames, I images, C latent channels, H W pixels, h w latent pixels; P is 1 (mean) or 2 (mean, std).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from datasets import ClipDataset
from diffusion import (
    GaussianDiffusion,
    Given,
    LossTerms,
    TimestepSampler,
    condition_denoiser,
    spread_uniforms,
    weigh_terms,
)
from models.autoencoder import LatentCodec, Posterior

from .alignment import Projector, layer_sync
from .build import PRECISIONS, build_codec, build_process
from .conditions import Condition, Conditions
from .config import Config
from .routing import draw_route


@dataclass(frozen=True)
class Draws:
    """Everything random in one micro-batch: depends on (seed, position) alone."""

    uniform: Tensor  # (B,), or (B, F+I) for one timestep per frame, in [0, 1): before the density is applied
    label_uniform: Tensor  # (B, 1+I) in [0, 1): label dropout
    noise: Tensor  # (B, F+I, C, h, w)
    codec_noise: Tensor | None  # like noise: the codec's posterior sample
    given: Tensor | None = None  # (B, F) bool: given frames; None if there never are any
    route: Tensor | None = None  # (B, N) in [0, 1): chooses the tokens of objective.route_blocks; None without


@dataclass(frozen=True)
class StepLoss:
    """The loss to differentiate, and detached parts of it for the log: scalars on the device."""

    loss: Tensor
    parts: dict[str, Tensor]
    timesteps: Tensor  # (B,) or (B, F+I)
    per_clip: Tensor  # (B,) detached losses, for the timestep sampler


def sample_generator(seed: int, position: int, device: torch.device) -> torch.Generator:
    """Returns the generator of the sample at `position`: the same draws on every rank and after every resume."""
    state = np.random.SeedSequence([seed, position]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) >> 1)


class Objective:
    """`objective(model, batch) -> StepLoss`.

    `codec` turns video (B, F+I, 3, H, W) into latents (B, F+I, C, h, w), or is a stand-in if batches hold cached
    posteriors.
    """

    def __init__(
        self,
        config: Config,
        clips: ClipDataset,
        conditions: Conditions,
        timestep_sampler: TimestepSampler,
        device: torch.device,
        projector: Projector | None = None,
    ) -> None:
        self.codec = build_codec(config, clips, device)
        self.diffusion = build_process(config).to(device)
        self.conditions, self.timestep_sampler, self.device = conditions, timestep_sampler, device
        self.config, self.projector = config.objective, projector
        aligned = (self.config.features_block,) if projector else ()
        self.hidden_blocks = self.config.synced + aligned  # blocks whose tokens `extra_terms` receives
        self.num_routed = config.token_grid**2 if self.config.routed else 0
        self.num_images = config.data.num_images  # I, trailing frames that are single images (joint training)
        self.seed = config.train.seed
        self.precision = PRECISIONS[config.train.precision]
        self.given = config.condition  # which frames are given
        self.tubelet_size = config.model.frames_per_token  # frames that are given together, and share a timestep
        self.frame_timesteps = config.diffusion.frame_timesteps

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], step: int = 0) -> StepLoss:
        """Returns the mean loss of a micro-batch {"video" or "latents", "labels", "position"} of the data loader."""
        if self.config.features_until and step >= self.config.features_until:
            batch = {key: value for key, value in batch.items() if key != "features"}
        condition = self.conditions.batch(batch["labels"])
        posterior = self.posterior(batch)
        draws = self.draw(batch["position"].tolist(), posterior.mean.shape, batch["labels"].shape[1])
        latents = posterior.latents(self.codec.config, draws.codec_noise).to(self.precision.dtype)
        latents = latents.contiguous()  # a codec may change the layout, and gradients are summed in its order
        return self.loss(model, latents, condition, draws, batch)

    def posterior(self, batch: Mapping[str, Tensor]) -> Posterior:
        """Returns the posterior of a video (B, F+I, 3, H, W), or of cached latents (B, F+I, P, C, h, w)."""
        if isinstance(self.codec, LatentCodec):
            return self.codec.posterior(batch["video"].to(self.device, non_blocking=True))
        mean, *std = batch["latents"].to(self.device, non_blocking=True).unbind(2)
        return Posterior(mean, std[0] if std else None)

    def loss(
        self, model: nn.Module, latents: Tensor, condition: Condition, draws: Draws, batch: Mapping[str, Tensor]
    ) -> StepLoss:
        """Returns the loss of latents (B, F+I, C, h, w) for a condition and draws; `batch` is for `extra_terms`."""
        timesteps, weights = self.timestep_sampler.timesteps_from_uniform(draws.uniform)
        condition = condition.drop(draws.label_uniform, self.conditions.dropout)
        options = {} if draws.route is None else {"route": draw_route(draws.route, self.config)}
        terms = self.terms(model, latents, condition, timesteps, draws.noise, draws.given, options, batch)
        trained = terms
        if isinstance(self.diffusion, GaussianDiffusion) and self.diffusion.config.loss_weighting == "min_snr":
            trained = weigh_terms(terms, self.diffusion, timesteps)
        weighted = weights * (trained.loss if weights.ndim == 1 else trained.per_frame())
        loss = sum((extra.mean() for extra in terms.extra.values()), start=weighted.mean())
        return StepLoss(loss, self.parts(terms), timesteps, terms.loss.detach())

    def extra_terms(self, hidden_states: dict[int, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns further terms (B,) of the training loss by name, from tokens (B, F+I, N, D) of `hidden_blocks`.

        `batch` is the data loader's; empty in validation, which ignores these terms.
        """
        config, terms = self.config, dict[str, Tensor]()
        if config.synced:
            early, late = (hidden_states[block] for block in config.synced)
            terms["sync"] = config.sync_weight * layer_sync(early, late)
        if self.projector is not None and "features" in batch:
            features = batch["features"].to(self.device, self.precision.dtype, non_blocking=True)
            with self.autocast():
                term = self.projector(hidden_states[config.features_block], features, self.num_images)
            terms["features"] = config.features_weight * term
        return terms

    def autocast(self) -> torch.autocast:
        """Returns the context in which networks compute."""
        kind = self.precision.autocast
        return torch.autocast(self.device.type, kind, enabled=kind is not None)

    def terms(
        self,
        model: nn.Module,
        latents: Tensor,
        condition: Condition,
        timesteps: Tensor,
        noise: Tensor,
        given: Tensor | None = None,
        options: Mapping[str, Any] | None = None,
        batch: Mapping[str, Tensor] | None = None,
    ) -> LossTerms:
        """Returns the loss terms of latents (B, F+I, C, h, w) at timesteps (B,) or (B, F+I), with noise like them.

        Frames that are `given` (B, F) stay clean; the terms cover the others. `options` go to the network, `batch` to
        `extra_terms`.
        """
        hidden_states: dict[int, Tensor] = {}
        wanted = {"return_hidden_states": self.hidden_blocks} if self.hidden_blocks else {}

        def denoiser(noisy_latents: Tensor, t: Tensor) -> Tensor:
            with self.autocast():
                output = condition.call(model, noisy_latents, t, self.num_images, **wanted, **(options or {}))
            if wanted:
                output, states = output
                hidden_states.update(states)
            return output.to(noisy_latents.dtype)

        noise = noise.to(latents.dtype)
        if given is None:
            terms = self.diffusion.training_losses(denoiser, latents, timesteps, noise)
        else:
            known = Given(latents, functional.pad(given, (0, self.num_images)))
            terms = self.diffusion.training_losses(condition_denoiser(denoiser, known), latents, timesteps, noise)
            terms = terms.without(given)
        return replace(terms, extra=self.extra_terms(hidden_states, batch or {}))

    def draw(self, positions: list[int], latent_shape: torch.Size, num_labels: int) -> Draws:
        """Draws all random numbers of the samples at `positions`, each from its own generator, in a fixed order."""
        shape, rows, num_frames = latent_shape[1:], [], latent_shape[1] - self.num_images
        num_uniforms, is_shared = self.num_given_uniforms(num_frames), self.frame_timesteps == "shared"
        num_own = 0 if is_shared else num_frames // self.tubelet_size + self.num_images
        for position in positions:
            where: Any = {"generator": sample_generator(self.seed, position, self.device), "device": self.device}
            uniform, noise = torch.rand(1 + num_labels, **where), torch.randn(shape, **where)
            codec_noise = torch.randn(shape, **where) if self.codec.stochastic else noise[:0]
            given_uniform, route = torch.rand(num_uniforms, **where), torch.rand(self.num_routed, **where)
            own = torch.rand(num_own, **where)  # for a timestep per frame
            rows.append((uniform, noise, codec_noise, given_uniform, route, own))
        uniform, noise, codec_noise, given_uniform, route, own = map(torch.stack, zip(*rows))
        spread = self.frame_timesteps, self.num_images, self.tubelet_size
        return Draws(
            uniform=uniform[:, 0] if is_shared else spread_uniforms(own, *spread),
            label_uniform=uniform[:, 1:],
            noise=noise,
            codec_noise=codec_noise if self.codec.stochastic else None,
            given=self.given_frames(given_uniform),
            route=route if self.num_routed else None,
        )

    def num_given_uniforms(self, num_frames: int) -> int:
        """Returns the number of random numbers that `given_frames` needs for a clip; 0 if no frame is ever given."""
        return self.given.num_uniforms(num_frames, self.tubelet_size)

    def given_frames(self, uniform: Tensor) -> Tensor | None:
        """Returns the given frames (B, F) for `uniform` (B, `num_given_uniforms`) in [0, 1); None if none ever is."""
        return self.given.draw(uniform, self.tubelet_size) if uniform.shape[1] else None

    def parts(self, terms: LossTerms) -> dict[str, Tensor]:
        """Returns means to log: loss, mse, vb; in joint training also the losses of video and image frames."""
        parts = {"loss": terms.loss, "mse": terms.mse, "vb": terms.vb, **terms.extra}
        if self.num_images:
            per_frame = terms.per_frame()  # (B, F+I)
            parts |= {"video_loss": per_frame[:, : -self.num_images], "image_loss": per_frame[:, -self.num_images :]}
        return {name: value.detach().mean() for name, value in parts.items() if value is not None}
