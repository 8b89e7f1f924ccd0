"""A noise level for each frame (Diffusion Forcing, Chen et al. 2024, arXiv 2407.01392; FVDM, arXiv 2410.03160).

`spread_uniforms` gives each frame of a training clip its own timestep. `sample_frames` takes sampler steps of single
frames along a matrix of noise levels; `sample_rolling` samples long clips with it, with noise that rises towards the
end of the window (Diffusion Forcing, section 3.3).

Letters: B clips, F frames, I images, C channels, H W, T steps of the process, K steps of the matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common.checks import require

from .conditioning import Given, condition_denoiser
from .guidance import Denoiser
from .samplers import METHODS, Callback, Process, StepOptions, check_method
from .scheduled import ScheduledDiffusion

FRAME_METHODS = ("ddpm", "ddim", "euler")  # the others remember earlier steps, or evaluate twice


def spread_uniforms(uniform: Tensor, kind: str, num_images: int, span: int) -> Tensor:
    """Returns uniform numbers (B, F+I), one per frame, from independent ones (B, F/span + I) in [0, 1).

    Args:
        kind: independent, or monotone: sorted along the clip, so that later frames are noisier. Images stay as drawn.
        span: frames of a tubelet, which share a number.
    """
    clip, images = uniform.split([uniform.shape[1] - num_images, num_images], dim=1)
    clip = clip.sort(dim=1).values if kind == "monotone" else clip
    return torch.cat([clip.repeat_interleave(span, dim=1), images], dim=1)


@torch.no_grad()
def sample_frames(
    diffusion: Process | ScheduledDiffusion,
    denoiser: Denoiser,
    noise: Tensor,
    levels: Tensor,
    *,
    window: int | None = None,
    method: str = "ddim",
    callback: Callback | None = None,
    **options: Any,
) -> Tensor:
    """Denoises each frame of `noise` (B, F, C, H, W) when the matrix `levels` says so.

    Args:
        diffusion, method, callback, options: as for `sample`.
        denoiser: takes timesteps (B, F); that of a frame at level 0 is 0.
        noise: unit noise; clean values in frames that start at level 0.
        levels: (K + 1, F) int64 on the CPU. Each row holds the frames' noise levels before a step, from T (noise) to
            0 (clean), the last row those at the end. In a step, each frame goes down by one level or stays. Equal
            columns T, T - 1, ..., 0 are `sample`.
        window: number of frames that the denoiser sees: up to the last frame that moves; None: all.

    Raises ValueError for a matrix with other steps, and for methods that cannot take steps of single frames.
    """
    settings = StepOptions(**options)
    check_method(method, diffusion, settings)
    require(method in FRAME_METHODS, f"Steps of single frames need method {' | '.join(FRAME_METHODS)}, not {method}.")
    moves = levels[:-1] - levels[1:]
    is_valid = bool(((moves == 0) | (moves == 1)).all() and (moves > 0).any(1).all())
    require(is_valid, "In each step some frames must go down by one level, and the others must stay.")
    take_step, x = METHODS[method].begin(diffusion), noise.clone()  # type: ignore[arg-type]
    levels, ends = levels.to(x.device), [int(row.nonzero()[-1]) + 1 for row in moves]
    for done, end in enumerate(ends, 1):
        part = slice(max(0, end - window), max(end, window)) if window else slice(None)
        frames, now, after = x[:, part], levels[done - 1, part], levels[done, part]
        clean = condition_denoiser(denoiser, Given(frames, now[None] == 0))
        timesteps = (now - 1).clamp(min=0).expand(len(x), -1)
        step = take_step(diffusion, clean, frames, timesteps, settings)
        x[:, part] = torch.where((after < now)[:, None, None, None], step.x, frames)
        if callback is not None:
            callback(done, len(ends), x, step.pred_x_start)
    return x


def rolling_levels(num_steps: int, frames: int, active: int, given: int = 0, span: int = 1) -> Tensor:
    """Returns levels (K + 1, `frames`) for `sample_frames`, in which at most `active` frames are denoised at a time.

    Frame f starts f * num_steps / active steps after the first. `given` first frames are clean from the start.
    Frames of a tubelet (`span`) have the same levels.
    """
    units = (torch.arange(frames) - given).div(span, rounding_mode="floor")
    starts = units * span * num_steps // active
    rows = torch.arange(int(starts[-1]) + num_steps + 1)
    levels = (num_steps - rows[:, None] + starts).clamp(0, num_steps)
    return levels.masked_fill(torch.arange(frames) < given, 0)


def sample_rolling(
    diffusion: Process,
    denoiser: Denoiser,
    noise: Tensor,
    given: Given | None,
    *,
    window: int,
    overlap: int,
    span: int = 1,
    **options: Any,
) -> Tensor:
    """Samples clips of any length like `sample_given`: a window rolls over them, its first `overlap` frames clean.

    The noise of the others rises towards the end of the window. The known frames of `given`, the same in all clips,
    must be the first ones; `window` and `overlap` are multiples of `span`.
    """
    count = 0 if given is None else int(given.frames[0].sum())
    levels = rolling_levels(diffusion.num_timesteps, noise.shape[1], window - overlap, count, span)
    noise = noise if given is None else given.keep(noise)
    return sample_frames(diffusion, denoiser, noise, levels, window=window, **options)
