"""Gaussian diffusion (Ho et al. 2020; Nichol & Dhariwal 2021): noising, prediction, losses.

Letters: B clips, F frames, C channels, H W, T steps of this (possibly respaced) process.
x_0 is a clip of latents, x_t the noisy clip after step t. `timesteps` index this process, in [0, T): (B,), or
(B, F) for one noise level per frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .config import DiffusionConfig
from .guidance import Denoiser
from .losses import NATS_PER_BIT, LossTerms, append_dims, discretized_gaussian_log_likelihood, frame_mean, normal_kl
from .schedule import BETAS, gaussian_tables, respace_betas, respace_timesteps

CHANNEL_DIM = 2


class PMeanVariance(NamedTuple):
    """p(x_{t-1} | x_t) and the clean clip it is computed from; each (B, F, C, H, W)."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_x_start: Tensor


def prediction_tables(tables: dict[str, Tensor], prediction: str) -> dict[str, Tensor]:
    """Returns the coefficients of the network's target; no other function depends on `prediction`.

    target = target_x_start * x_0 + target_noise * noise, and
    x_0 = x_start_input * x_t + x_start_output * target.
    Velocity: Salimans & Ho 2022, appendix D.
    """
    signal, noise = tables["sqrt_alphas_cumprod"], tables["sqrt_one_minus_alphas_cumprod"]
    zero, one = torch.zeros_like(signal), torch.ones_like(signal)
    reciprocal, reciprocal_m1 = tables["sqrt_recip_alphas_cumprod"], tables["sqrt_recipm1_alphas_cumprod"]
    names = ("target_x_start", "target_noise", "x_start_input", "x_start_output")
    coefficients = {
        "epsilon": (zero, one, reciprocal, -reciprocal_m1),
        "x_start": (one, zero, zero, one),
        "velocity": (-noise, signal, signal, -noise),
    }[prediction]
    return dict(zip(names, coefficients, strict=True))


class GaussianDiffusion:
    """A diffusion process of T steps: all steps of `config`, or those that `respacing` keeps.

    Tables are float64 tensors that `.to(device)` moves; entries are cast on use to the clip's dtype, at least float32.

    Args:
        config: the `diffusion` section; its prediction is not "flow".
        learn_sigma: the network outputs 2C channels; the second half interpolates the variance.
        respacing: see `schedule.respace_timesteps`.
    """

    def __init__(self, config: DiffusionConfig, *, learn_sigma: bool = True, respacing: str = "") -> None:
        self.config = config
        self.learn_sigma = learn_sigma
        kept = respace_timesteps(config.num_steps, respacing)
        tables = gaussian_tables(respace_betas(BETAS[config.schedule](config.num_steps), kept))
        self.tables = tables | prediction_tables(tables, config.prediction)
        self.timestep_map = torch.tensor(kept)
        self.num_timesteps = len(kept)
        # plain floats, for planning: the network's timestep in step i; noise-to-signal ratios before it (index i + 1)
        # and after it (index i)
        self.step_times = [float(timestep) for timestep in kept]
        self.noise_levels = [0.0, *(1 / tables["alphas_cumprod"] - 1).sqrt().tolist()]

    def to(self, device: torch.device | str) -> GaussianDiffusion:
        """Moves the tables to `device`; returns self."""
        self.tables = {name: table.to(device) for name, table in self.tables.items()}
        self.timestep_map = self.timestep_map.to(device)
        return self

    def table(self, name: str, timesteps: Tensor, x: Tensor) -> Tensor:
        """Returns entries of table `name` at `timesteps`, shaped to broadcast over `x` (B, F, ...)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return append_dims(self.tables[name][timesteps].to(dtype), x)

    def network_timesteps(self, timesteps: Tensor) -> Tensor:
        """Converts indices in [0, T) to the network's timesteps, int64 in [0, config.num_steps)."""
        return self.timestep_map[timesteps]

    # ---- the noising process -------------------------------------------------------------------

    def q_sample(self, x_start: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Returns x_t for `x_start` and unit `noise`, all (B, F, C, H, W)."""
        signal = self.table("sqrt_alphas_cumprod", timesteps, x_start)
        return signal * x_start + self.table("sqrt_one_minus_alphas_cumprod", timesteps, x_start) * noise

    def q_posterior_mean(self, x_start: Tensor, x: Tensor, timesteps: Tensor) -> Tensor:
        """Returns the mean of q(x_{t-1} | x_t, x_0)."""
        start = self.table("posterior_mean_coef1", timesteps, x) * x_start
        return start + self.table("posterior_mean_coef2", timesteps, x) * x

    # ---- the network's output --------------------------------------------------------------------

    def target(self, x_start: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Returns what the network should predict."""
        start = self.table("target_x_start", timesteps, x_start) * x_start
        return start + self.table("target_noise", timesteps, x_start) * noise

    def noise_from_x_start(self, x_start: Tensor, x: Tensor, timesteps: Tensor) -> Tensor:
        """Returns the noise that leads from x_0 to x_t."""
        reciprocal = self.table("sqrt_recip_alphas_cumprod", timesteps, x)
        return (reciprocal * x - x_start) / self.table("sqrt_recipm1_alphas_cumprod", timesteps, x)

    def split_output(self, model_output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Splits (B, F, C or 2C, H, W) into prediction (B, F, C, H, W) and variance values of that shape, or None.

        Raises ValueError if the output's shape contradicts `learn_sigma`.
        """
        batch, frames, channels, *size = x.shape
        expected = (batch, frames, channels * (2 if self.learn_sigma else 1), *size)
        if model_output.shape != expected:
            raise ValueError(
                f"The network's output is {tuple(model_output.shape)}, but with model.learn_sigma="
                f"{str(self.learn_sigma).lower()} the diffusion needs {expected}."
            )
        model_output = model_output.to(torch.promote_types(x.dtype, torch.float32))
        prediction, *variance_values = model_output.split(channels, CHANNEL_DIM)
        return prediction, variance_values[0] if variance_values else None

    def p_mean_variance(
        self, model_output: Tensor, x: Tensor, timesteps: Tensor, *, refine: Callable[[Tensor], Tensor] | None = None
    ) -> PMeanVariance:
        """Returns p(x_{t-1} | x_t) for the network's output (B, F, C or 2C, H, W) at x_t (B, F, C, H, W).

        Args:
            refine: applied to the predicted clean clip, e.g. clamping to [-1, 1].
        """
        prediction, variance_values = self.split_output(model_output, x)
        pred_x_start = self.table("x_start_input", timesteps, x) * x
        pred_x_start = pred_x_start + self.table("x_start_output", timesteps, x) * prediction
        if refine is not None:
            pred_x_start = refine(pred_x_start)
        if variance_values is None:
            variance = self.table(f"{self.config.fixed_variance}_variance", timesteps, x)
            log_variance = self.table(f"{self.config.fixed_variance}_log_variance", timesteps, x)
        else:  # [-1, 1] maps to the smallest to largest log variance (Nichol & Dhariwal 2021, eq. 15)
            share, smallest = (variance_values + 1) / 2, self.table("posterior_log_variance_clipped", timesteps, x)
            log_variance = share * self.table("log_betas", timesteps, x) + (1 - share) * smallest
            variance = log_variance.exp()
        mean = self.q_posterior_mean(pred_x_start, x, timesteps)
        return PMeanVariance(mean, variance.expand_as(mean), log_variance.expand_as(mean), pred_x_start)

    # ---- losses --------------------------------------------------------------------------------

    def variational_bound(self, model_output: Tensor, x_start: Tensor, x: Tensor, timesteps: Tensor) -> Tensor:
        """Returns term t of the variational bound (B, F) in bits per dimension; at t = 0 the decoder term."""
        p = self.p_mean_variance(model_output, x, timesteps)
        q_mean = self.q_posterior_mean(x_start, x, timesteps)
        q_log_variance = self.table("posterior_log_variance_clipped", timesteps, x)
        divergence = frame_mean(normal_kl(q_mean, q_log_variance, p.mean, p.log_variance))
        decoder = -frame_mean(discretized_gaussian_log_likelihood(x_start, p.mean, 0.5 * p.log_variance))
        return torch.where(append_dims(timesteps == 0, decoder), decoder, divergence) / NATS_PER_BIT

    def training_losses(self, denoiser: Denoiser, x_start: Tensor, timesteps: Tensor, noise: Tensor) -> LossTerms:
        """Returns the loss of clean clips (B, F, C, H, W) at int64 `timesteps`, with unit noise of the same shape."""
        x = self.q_sample(x_start, timesteps, noise)
        model_output = denoiser(x, self.network_timesteps(timesteps))
        steps = float(self.num_timesteps)
        weight = {"kl": 1.0, "rescaled_kl": steps, "mse": 1.0, "rescaled_mse": steps / 1000}[self.config.loss]
        if self.config.loss in ("kl", "rescaled_kl"):
            return LossTerms.from_frames(vb=weight * self.variational_bound(model_output, x_start, x, timesteps))
        prediction, variance_values = self.split_output(model_output, x)
        mse = frame_mean((self.target(x_start, noise, timesteps) - prediction) ** 2)
        if variance_values is None:
            return LossTerms.from_frames(mse)
        # the bound trains only the variance; the mean is trained by the squared error
        frozen_mean = torch.cat([prediction.detach(), variance_values], CHANNEL_DIM)
        bound = self.variational_bound(frozen_mean, x_start, x, timesteps)
        return LossTerms.from_frames(mse, weight * bound)
