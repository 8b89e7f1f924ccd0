"""The ten samplers of the official text-to-video script: schedulers of diffusers, with timesteps of their own.

diffusers computes the steps and is imported only if one of these is used. Unlike `multistep`, they also choose the
timesteps, so that they equal diffusers' own pipelines.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .guidance import Denoiser
from .steps import Step, StepOptions

# official name -> class of diffusers, and what it needs in addition to the noise schedule
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False}),
    "EulerDiscrete": ("EulerDiscreteScheduler", {}),
    "DDPM": ("DDPMScheduler", {"clip_sample": False}),
    "DPMSolverMultistep": ("DPMSolverMultistepScheduler", {}),
    "DPMSolverSinglestep": ("DPMSolverSinglestepScheduler", {}),
    "PNDM": ("PNDMScheduler", {}),
    "HeunDiscrete": ("HeunDiscreteScheduler", {}),
    "EulerAncestralDiscrete": ("EulerAncestralDiscreteScheduler", {}),
    "DEISMultistep": ("DEISMultistepScheduler", {}),
    "KDPM2AncestralDiscrete": ("KDPM2AncestralDiscreteScheduler", {}),
}
LATTE_NOISE = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}  # where the settings say nothing
FIXED_VARIANCE = "fixed_large"  # of DDPM with a network without a learned variance


class ScheduledDiffusion:
    """A noise schedule in diffusers' terms.

    Args:
        settings: content of a `scheduler_config.json`; what a scheduler does not know is left out.
        num_steps: sampling steps.
        variance_type: diffusers' name of the learned variance that DDPM uses; None for a network without one. The
            other samplers have no use for a variance.

    Raises:
        ValueError: more steps than the noise schedule has.
    """

    def __init__(self, settings: Mapping[str, Any], num_steps: int, variance_type: str | None = None) -> None:
        self.settings = settings
        self.num_timesteps = num_steps
        self.variance_type = variance_type
        most = self.build_scheduler("DDIM").config.num_train_timesteps
        if num_steps > most:
            raise ValueError(f"num_sampling_steps={num_steps} is more than the {most} steps of the noise schedule")

    def build_scheduler(self, name: str) -> Any:
        """Returns the scheduler of diffusers with that official name."""
        import diffusers  # slow to import

        class_name, arguments = SCHEDULERS[name]
        owner = getattr(diffusers, class_name)
        known = inspect.signature(owner.__init__).parameters
        kept = {key: value for key, value in self.settings.items() if key in known and key != "variance_type"}
        variance = {"variance_type": self.variance_type or FIXED_VARIANCE} if name == "DDPM" else {}
        return owner(**{**LATTE_NOISE, **kept, **variance, **arguments})


class ScheduledWalk:
    """One walk from noise to data by the scheduler `name`; some make several evaluations per step."""

    def __init__(self, name: str, process: ScheduledDiffusion, device: torch.device) -> None:
        self.scheduler = process.build_scheduler(name)
        self.scheduler.set_timesteps(process.num_timesteps, device=device)
        self.num_steps = len(self.scheduler.timesteps)
        self.accepts = inspect.signature(self.scheduler.step).parameters
        self.splits = getattr(self.scheduler.config, "variance_type", None) not in ("learned", "learned_range")

    def start(self, noise: Tensor) -> Tensor:
        """Returns the first x for unit noise."""
        return noise * self.scheduler.init_noise_sigma

    def step(self, denoiser: Denoiser, x: Tensor, number: int, options: StepOptions) -> Step:
        """Returns the result of evaluation `number`."""
        time = self.scheduler.timesteps[number]
        output = denoiser(self.scheduler.scale_model_input(x, time), time.expand(len(x)).to(x.device))
        if self.splits:
            output = output[:, :, : x.shape[2]]
        if options.given_frames is not None:  # nobody reads their state; zeros keep it small
            output = output.masked_fill(options.given_frames[:, :, None, None, None], 0)
        wanted = {"eta": options.eta, "generator": options.generator}
        extra = {key: value for key, value in wanted.items() if key in self.accepts}
        # in diffusers' order of dimensions, in which the scheduler draws its noise
        result = self.scheduler.step(output.transpose(1, 2), time, x.transpose(1, 2), **extra, return_dict=False)[0]
        return Step(result.transpose(1, 2), result.transpose(1, 2))
