"""Solvers run by diffusers, which is imported only when one is used.

MULTISTEP_SOLVERS are given the noise levels of our process and the clean clips that it predicts, so they visit the same
timesteps as our own methods. SCHEDULERS are the ten of the official text-to-video script: they choose their own
timesteps and give the same results as diffusers' pipelines.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

ORDER = 2
FLOW_EDGE = 1e-6  # keeps times below 1, where the log of the signal is infinite; diffusers' value

# name -> diffusers class and its arguments for DPM-Solver++ (Lu et al. 2022) or UniPC (Zhao et al. 2023)
MULTISTEP_SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm_solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "sde_dpm_solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
# official name -> diffusers class and its arguments beyond the noise schedule
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
LATTE_NOISE = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}  # defaults for absent settings
FIXED_VARIANCE = "fixed_large"  # for DDPM if the network learns no variance


def build_multistep_solver(name: str, noise_levels: Sequence[float], *, flow: bool) -> Any:
    """Returns a scheduler for one sampling run only, as it remembers the clean clips predicted in the last steps.

    Args:
        noise_levels: T + 1 values that ascend from 0, where sampling ends. They are times if `flow`, else
            noise-to-signal ratios.
    """
    import diffusers  # slow to import

    class_name, arguments = MULTISTEP_SOLVERS[name]
    kind = {"prediction_type": "sample", "use_flow_sigmas": flow, "final_sigmas_type": "zero"}
    scheduler = getattr(diffusers, class_name)(solver_order=ORDER, **kind, **arguments)
    steps = len(noise_levels) - 1
    scheduler.set_timesteps(steps)
    levels = torch.tensor(noise_levels[::-1], dtype=torch.float64)
    scheduler.sigmas = (levels.clamp(max=1 - FLOW_EDGE) if flow else levels).float()
    scheduler.timesteps = torch.arange(steps).flip(0)
    scheduler.set_begin_index(0)  # avoids an index lookup on the device
    return scheduler


class ScheduledDiffusion:
    """A noise schedule in diffusers' terms.

    Args:
        settings: content of a `scheduler_config.json`; keys unknown to a scheduler are dropped.
        num_steps: sampling steps. Raises ValueError if there are more than the noise schedule has.
        variance_type: diffusers' name for the learned variance, which only DDPM uses; None if none is learned.
    """

    def __init__(self, settings: Mapping[str, Any], num_steps: int, variance_type: str | None = None) -> None:
        self.settings = settings
        self.num_timesteps = num_steps
        self.variance_type = variance_type
        most = self.build_scheduler("DDIM").config.num_train_timesteps
        if num_steps > most:
            raise ValueError(f"num_sampling_steps={num_steps} is more than the {most} steps of the noise schedule")

    def build_scheduler(self, name: str) -> Any:
        """Returns diffusers' scheduler for the official `name`."""
        import diffusers  # slow to import

        class_name, arguments = SCHEDULERS[name]
        owner = getattr(diffusers, class_name)
        known = inspect.signature(owner.__init__).parameters
        kept = {key: value for key, value in self.settings.items() if key in known and key != "variance_type"}
        variance = {"variance_type": self.variance_type or FIXED_VARIANCE} if name == "DDPM" else {}
        return owner(**{**LATTE_NOISE, **kept, **variance, **arguments})
