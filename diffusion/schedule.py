"""Noise schedules, respacing, and tables computed from them, all in float64.

T is the number of steps. Step t, 0 <= t < T, adds noise of variance beta_t; alphas_cumprod_t is the fraction of the
signal's variance that remains after it (Ho et al. 2020; Nichol & Dhariwal 2021).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as functional
from torch import Tensor

MAX_BETA = 0.999  # cosine schedule: avoids a singularity at t = T - 1


def linear_betas(num_steps: int) -> Tensor:
    """Returns (T,) betas: 1e-4 to 0.02 for T = 1000, rescaled for other T to reach the same final noise.

    Ho et al. 2020, section 4. Raises ValueError for T <= 20, where the last beta would be 1 or more.
    """
    scale = 1000 / num_steps
    if scale * 0.02 >= 1:
        raise ValueError(
            f"diffusion.num_steps={num_steps} is too small for the linear schedule (at least 21): "
            "train with more steps and shorten sampling by respacing."
        )
    return torch.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=torch.float64)


def cosine_betas(num_steps: int) -> Tensor:
    """Returns (T,) betas for which alphas_cumprod is a squared cosine (Nichol & Dhariwal 2021, eq. 17)."""

    def signal_share(time: Tensor) -> Tensor:
        return torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    step = torch.arange(num_steps, dtype=torch.float64)
    return (1 - signal_share((step + 1) / num_steps) / signal_share(step / num_steps)).clamp(max=MAX_BETA)


BETAS = {"linear": linear_betas, "cosine": cosine_betas}


def respace_timesteps(num_steps: int, respacing: str) -> list[int]:
    """Returns in ascending order which of `num_steps` timesteps `respacing` keeps.

    Args:
        respacing: "" keeps all; "250" keeps 250 evenly spaced ones, ends included; "10,15,20" splits the steps
            into three equal sections and keeps 10 of the first, 15 of the second and 20 of the third; "ddim50" keeps
            every k-th from 0, for an integer k that gives 50. Raises ValueError for any other string, or too few steps.
    """
    respacing = respacing.strip()
    if not respacing:
        return list(range(num_steps))
    if respacing.startswith("ddim"):
        return _strided(num_steps, _count(respacing.removeprefix("ddim"), respacing))
    counts = [_count(part, respacing) for part in respacing.split(",")]
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        size = num_steps // len(counts) + (section < num_steps % len(counts))
        if count > size:
            raise ValueError(
                f"Respacing {respacing!r} asks for {count} of the {size} steps in section {section + 1} of "
                f"{len(counts)} (the process has {num_steps} steps); ask for at most {size}."
            )
        kept += [start + offset for offset in _spread(size, count)]
        start += size
    return kept


def _count(text: str, respacing: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(
            f"Respacing {respacing!r} is invalid: give a number of steps ('250'), one per section "
            "('10,15,20'), or 'ddim50'."
        )
    return int(text)


def _strided(num_steps: int, count: int) -> list[int]:
    for stride in range(1, num_steps + 1):
        if len(kept := range(0, num_steps, stride)) == count:
            return list(kept)
    raise ValueError(
        f"Respacing 'ddim{count}' is impossible: no integer stride keeps {count} of {num_steps} steps; "
        f"use e.g. a divisor of {num_steps}, or plain '{count}'."
    )


def _spread(size: int, count: int) -> list[int]:
    """Returns `count` evenly spaced integers from 0 to `size` - 1, ends included ([0] if `count` is 1)."""
    stride = (size - 1) / (count - 1) if count > 1 else 1.0
    position, spread = 0.0, []
    for _ in range(count):
        spread.append(round(position))
        position += stride  # a running sum, to round like the official code
    return spread


def respace_betas(betas: Tensor, kept: list[int]) -> Tensor:
    """Returns the betas (len(kept),) of a process that keeps only the steps `kept` of the one with `betas` (T,)."""
    alphas_cumprod = torch.cumprod(1 - betas, 0)[kept]
    return 1 - alphas_cumprod / functional.pad(alphas_cumprod[:-1], (1, 0), value=1.0)


def gaussian_tables(betas: Tensor) -> dict[str, Tensor]:
    """Returns all tables computed from `betas` (T,): name -> (T,) float64.

    Posterior q(x_{t-1} | x_t, x_0): Ho et al. 2020, eq. 6 and 7. Its variance is 0 at t = 0, so the log variance
    of t = 1 is used there too ("clipped").
    """
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    previous = functional.pad(alphas_cumprod[:-1], (1, 0), value=1.0)
    posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
    # with a single step there is no t = 1
    first = posterior_variance[1:2] if len(betas) > 1 else betas
    positive_variance = torch.cat([first, posterior_variance[1:]])
    large_variance = torch.cat([positive_variance[:1], betas[1:]])
    return {
        "betas": betas,
        "log_betas": betas.log(),
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": previous,
        "alphas_cumprod_next": functional.pad(alphas_cumprod[1:], (0, 1)),
        "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas_cumprod).sqrt(),
        "sqrt_recip_alphas_cumprod": (1 / alphas_cumprod).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alphas_cumprod - 1).sqrt(),
        "posterior_variance": posterior_variance,
        "posterior_log_variance_clipped": positive_variance.log(),
        "posterior_mean_coef1": betas * previous.sqrt() / (1 - alphas_cumprod),
        "posterior_mean_coef2": (1 - previous) * (1 - betas).sqrt() / (1 - alphas_cumprod),
        "small_variance": posterior_variance,
        "small_log_variance": positive_variance.log(),
        "large_variance": large_variance,
        "large_log_variance": large_variance.log(),
    }
