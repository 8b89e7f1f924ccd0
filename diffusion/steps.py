"""Options and result of one sampling step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepOptions:
    """Options of a step.

    Attributes:
        eta: noise of DDIM, from 0 (none) to 1 (as much as DDPM).
        clip_denoised: clamp the predicted clean clip to [-1, 1].
        noise_fn: draws unit noise of the shape of its argument.
        x_start_fn: applied to the predicted clean clip before it is clamped.
        given_frames: (B or 1, F) bool, frames whose predictions are not used. Schedulers of diffusers only, which do
            not show the predicted clean clip.
        generator: of the noise of diffusers' schedulers, which draw it themselves; a list has one per clip.
    """

    eta: float = 0.0
    clip_denoised: bool = False
    noise_fn: Callable[[Tensor], Tensor] = torch.randn_like
    x_start_fn: Callable[[Tensor], Tensor] | None = None
    given_frames: Tensor | None = None
    generator: torch.Generator | list[torch.Generator] | None = None

    def refine(self, x_start: Tensor) -> Tensor:
        """Applies `x_start_fn` and the clamping to a predicted clean clip."""
        if self.x_start_fn is not None:
            x_start = self.x_start_fn(x_start)
        return x_start.clamp(-1, 1) if self.clip_denoised else x_start


@dataclass
class Step:
    """Result of a step: the next x and the predicted clean clip, both (B, F, C, H, W)."""

    x: Tensor
    pred_x_start: Tensor


DEFAULT = StepOptions()
