"""Given frames: clips of which some frames are known (image to video, continuation, interpolation).

A given frame stays clean and has timestep 0 of its own; the network sees it beside the noisy ones and fills these in.
Nothing is added to the network, so weights that were trained without given frames can be fine-tuned to them.

Letters: B clips, F frames, C channels, H W; a unit is a frame, or with tubelets a tubelet.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .flow import RectifiedFlow
from .gaussian import GaussianDiffusion
from .guidance import Denoiser
from .samplers import sample

RULES = ("none", "prefix", "random")


@dataclass(frozen=True)
class ConditionConfig:
    """The `condition` section: which frames of a clip are given in training.

    Raises:
        ValueError: one sentence naming `condition.<key>`.
    """

    frames: str = "none"  # none | prefix (the first k) | random (in half of the clips the first k, in the others any k)
    probability: float = 0.5  # of a clip to have given frames; the others are learned from noise alone
    max_frames: int = 1  # k is drawn from 1 to so many, evenly

    def __post_init__(self) -> None:
        if self.frames not in RULES:
            raise ValueError(f"condition.frames is {self.frames!r}; choose {' | '.join(RULES)}.")
        if not 0 < self.probability <= 1:
            raise ValueError(f"condition.probability is {self.probability}; it must be above 0 and at most 1.")
        if self.max_frames < 1:
            raise ValueError(f"condition.max_frames is {self.max_frames}; it must be at least 1.")
        for item in fields(self):
            if self.frames == "none" and getattr(self, item.name) != item.default:
                raise ValueError(f"condition.{item.name} is read only with condition.frames: set that too.")

    def check_clip(self, num_frames: int, span: int) -> None:
        """ValueError unless clips of `num_frames`, in units of `span` frames, keep some that are not given."""
        if self.frames == "none":
            return
        if self.max_frames % span:
            raise ValueError(
                f"condition.max_frames={self.max_frames} must be a multiple of model.tubelet_size={span}: a tubelet "
                "is given whole or not at all."
            )
        if self.max_frames > num_frames - span:
            raise ValueError(
                f"condition.max_frames={self.max_frames} leaves nothing to learn of data.num_frames={num_frames}."
            )

    def num_uniforms(self, num_frames: int, span: int) -> int:
        """Random numbers that `draw` needs for a clip; 0 where no frame is ever given."""
        return 0 if self.frames == "none" else 3 + num_frames // span

    def draw(self, uniform: Tensor, span: int) -> Tensor:
        """`uniform` (B, `num_uniforms`) in [0, 1) -> the given frames (B, F), bool."""
        most = self.max_frames // span
        count = 1 + (uniform[:, 1] * most).long().clamp(max=most - 1)
        count = torch.where(uniform[:, 0] < self.probability, count, 0)
        any_order = uniform[:, 3:].argsort(dim=1).argsort(dim=1)  # (B, units), a permutation each
        in_order = torch.arange(any_order.shape[1], device=uniform.device)
        scattered = (uniform[:, 2:3] < 0.5) & (self.frames == "random")
        order = torch.where(scattered, any_order, in_order)
        return (order < count[:, None]).repeat_interleave(span, dim=1)

    def check_given(self, places: Collection[int], num_frames: int, span: int) -> None:
        """ValueError unless a network trained so can be given the frames at `places` of `num_frames`."""
        given, count = set(places), len(set(places))
        if not given:
            return
        if self.frames == "none":
            raise ValueError(
                "this network was trained without given frames (condition.frames=none): fine-tune it with "
                "condition.frames=prefix or random, or give it none."
            )
        if not given <= set(range(num_frames)) or count > num_frames - span:
            raise ValueError(f"the given frames {_listed(given)} leave nothing to sample of {num_frames} frames.")
        if any((place // span * span + offset) not in given for place in given for offset in range(span)):
            raise ValueError(
                f"the given frames {_listed(given)} are not whole tubelets: give multiples of "
                f"model.tubelet_size={span}."
            )
        if self.frames == "prefix" and given != set(range(count)):
            raise ValueError(
                f"this network was trained to be given first frames (condition.frames=prefix), not frames "
                f"{_listed(given)}; condition.frames=random would take them."
            )
        if count > self.max_frames:
            raise ValueError(
                f"{count} given frames are more than the {self.max_frames} that this network was trained with "
                "(condition.max_frames)."
            )


def _listed(places: Collection[int]) -> str:
    return ", ".join(map(str, sorted(places)))


@dataclass(frozen=True)
class Given:
    """Known frames of a batch of clips.

    Attributes:
        latents: (B, F, C, H, W), of any value where nothing is known.
        frames: (B, F) or (1, F) bool, on the same device: which are known.
    """

    latents: Tensor
    frames: Tensor

    def keep(self, x: Tensor) -> Tensor:
        """`x` (B, F, C, H, W) with the known frames in their places."""
        return torch.where(self.frames[:, :, None, None, None], self.latents.to(x.dtype), x)

    def timesteps(self, timesteps: Tensor) -> Tensor:
        """`timesteps` (B,) or (B, F) -> (B, F), 0 for the known frames."""
        rows = timesteps if timesteps.ndim > 1 else timesteps[:, None]
        return torch.where(self.frames, 0, rows)


def conditioned(denoiser: Denoiser, given: Given) -> Denoiser:
    """`denoiser`, which takes timesteps (B, F), seeing the known frames clean."""
    return lambda x, timesteps: denoiser(given.keep(x), given.timesteps(timesteps))


def sample_given(
    diffusion: GaussianDiffusion | RectifiedFlow, denoiser: Denoiser, noise: Tensor, given: Given | None, **options: Any
) -> Tensor:
    """`sample` with known frames, which come out as they are; None: no frame is known.

    What the network says of a known frame is replaced by what is known, so its noisy state, which nobody sees, ends
    where it must, whatever the method.
    """
    if given is None:
        return sample(diffusion, denoiser, noise, **options)
    return given.keep(sample(diffusion, conditioned(denoiser, given), noise, x_start_fn=given.keep, **options))
