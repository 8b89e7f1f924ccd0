"""Given frames: training and sampling with some frames known (image to video, continuation, interpolation).

A given frame stays clean and has timestep 0; the network sees it next to the noisy frames and predicts only those.
The network itself is unchanged.

Letters: B clips, F frames, C channels, H W; a unit is one frame, or one tubelet if there are tubelets.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.checks import at_least, check_limits, check_read_only_with, one_of, require, within

from .guidance import Denoiser
from .samplers import Process, sample
from .scheduled import ScheduledDiffusion

LIMITS = {"frames": one_of(("none", "prefix", "random")), "probability": within(0, 1, "(]"), "max_frames": at_least(1)}


@dataclass(frozen=True)
class ConditionConfig:
    """The `condition` section: which frames of a clip are given in training."""

    frames: str = "none"  # none | prefix (first k) | random (the first k in half of the clips, any k in the others)
    probability: float = 0.5  # that a clip has given frames
    max_frames: int = 1  # k is drawn uniformly from 1 to max_frames

    def __post_init__(self) -> None:
        check_limits(self, "condition.", LIMITS)
        check_read_only_with(self, "condition.", {"probability": "frames", "max_frames": "frames"})

    def check_clip(self, num_frames: int, span: int) -> None:
        """Raises ValueError unless clips of `num_frames`, in units of `span`, always keep unknown frames."""
        none = self.frames == "none"
        require(
            none or self.max_frames % span == 0,
            f"condition.max_frames={self.max_frames} must be a multiple of model.tubelet_size={span}: only "
            "complete tubelets can be given.",
        )
        require(
            none or self.max_frames <= num_frames - span,
            f"condition.max_frames={self.max_frames} leaves no frame to predict with data.num_frames={num_frames}.",
        )

    def num_uniforms(self, num_frames: int, span: int) -> int:
        """Returns how many random numbers `draw` needs per clip; 0 if no frames are given."""
        return 0 if self.frames == "none" else 3 + num_frames // span

    def draw(self, uniform: Tensor, span: int) -> Tensor:
        """Draws given frames: `uniform` (B, `num_uniforms`) in [0, 1) -> (B, F) bool."""
        most = self.max_frames // span
        count = 1 + (uniform[:, 1] * most).long().clamp(max=most - 1)
        count = torch.where(uniform[:, 0] < self.probability, count, 0)
        any_order = uniform[:, 3:].argsort(dim=1).argsort(dim=1)  # (B, units): a permutation per clip
        in_order = torch.arange(any_order.shape[1], device=uniform.device)
        scattered = (uniform[:, 2:3] < 0.5) & (self.frames == "random")
        order = torch.where(scattered, any_order, in_order)
        return (order < count[:, None]).repeat_interleave(span, dim=1)

    def check_given(self, places: Collection[int], num_frames: int, span: int) -> None:
        """Raises ValueError unless a network trained this way supports given frames `places` of `num_frames`."""
        given, count = set(places), len(set(places))
        named = ", ".join(map(str, sorted(given)))
        require(
            not given or self.frames != "none",
            "this network was trained without given frames (condition.frames=none): fine-tune it with "
            "condition.frames=prefix or random, or sample without given frames.",
        )
        require(
            given <= set(range(num_frames)) and count <= num_frames - span,
            f"the given frames {named} leave nothing to sample of {num_frames} frames.",
        )
        require(
            all(place // span * span + offset in given for place in given for offset in range(span)),
            f"the given frames {named} are not complete tubelets: give multiples of model.tubelet_size={span}.",
        )
        require(
            self.frames == "random" or given == set(range(count)),
            f"this network was trained with given first frames (condition.frames=prefix), not frames {named}; train "
            "with condition.frames=random for these.",
        )
        require(
            count <= self.max_frames,
            f"{count} given frames are more than the {self.max_frames} that this network was trained with "
            "(condition.max_frames).",
        )


@dataclass(frozen=True)
class Given:
    """Known frames of a batch of clips.

    Attributes:
        latents: (B, F, C, H, W); values of unknown frames are ignored.
        frames: (B, F) or (1, F) bool on the same device, True for known frames.
    """

    latents: Tensor
    frames: Tensor

    def keep(self, x: Tensor) -> Tensor:
        """Returns `x` (B, F, C, H, W) with `latents` in its known frames."""
        return torch.where(self.frames[:, :, None, None, None], self.latents.to(x.dtype), x)

    def timesteps(self, timesteps: Tensor) -> Tensor:
        """Expands timesteps (B,) or (B, F) to (B, F), with 0 for known frames."""
        rows = timesteps if timesteps.ndim > 1 else timesteps[:, None]
        return torch.where(self.frames, 0, rows)


def condition_denoiser(denoiser: Denoiser, given: Given) -> Denoiser:
    """Wraps a denoiser that takes timesteps (B, F) so that it sees known frames clean."""
    return lambda x, timesteps: denoiser(given.keep(x), given.timesteps(timesteps))


def sample_given(
    diffusion: Process | ScheduledDiffusion, denoiser: Denoiser, noise: Tensor, given: Given | None, **options: Any
) -> Tensor:
    """Runs `sample` with known frames, which are returned unchanged; `given` None: none are known.

    In every step the known values replace the predicted clean ones, so every method converges to them.
    """
    if given is None:
        return sample(diffusion, denoiser, noise, **options)
    held: dict[str, Any] = {"x_start_fn": given.keep, "given_frames": given.frames}
    return given.keep(sample(diffusion, condition_denoiser(denoiser, given), noise, **held, **options))
