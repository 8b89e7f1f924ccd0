"""Multistep solvers of the probability flow: DPM-Solver++ (Lu et al. 2022) and UniPC (Zhao et al. 2023), by diffusers.

diffusers does the arithmetic of a step and is imported when one of these is used. Of the network it gets the clean
clip that our process makes of any prediction, so that it neither splits a learned variance nor counts channels; of the
process it gets the noise levels of our timesteps, so that every method visits the same ones. Both end at no noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ORDER = 2
FLOW_EDGE = 1e-6  # below time 1, where the logarithm of the signal is still finite; diffusers' own


class Scheduler(NamedTuple):
    """A class of diffusers and what makes it the solver."""

    name: str
    arguments: dict[str, Any]
    stochastic: bool = False  # adds noise at every step


SCHEDULERS = {
    "dpm_solver++": Scheduler("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "sde_dpm_solver++": Scheduler("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, True),
    "unipc": Scheduler("UniPCMultistepScheduler", {}),
}


class MultistepSolver:
    """One walk from noise to data; remembers the clean clips of the last steps.

    Args:
        name: a key of SCHEDULERS.
        noise_levels: T + 1 of them, ascending from 0, as `noise_levels` of a process.
        flow: whether these are times of a flow, else ratios of noise to signal.

    Raises:
        ModuleNotFoundError: diffusers is not installed.
    """

    def __init__(self, name: str, noise_levels: Sequence[float], *, flow: bool) -> None:
        import diffusers  # slow to import: only runs with such a method pay for it

        kind = SCHEDULERS[name]
        self.stochastic = kind.stochastic
        self.scheduler = getattr(diffusers, kind.name)(
            solver_order=ORDER,
            prediction_type="sample",
            use_flow_sigmas=flow,
            final_sigmas_type="zero",
            **kind.arguments,
        )
        steps = len(noise_levels) - 1
        self.scheduler.set_timesteps(steps)
        levels = torch.tensor(noise_levels[::-1], dtype=torch.float64)
        self.scheduler.sigmas = (levels.clamp(max=1 - FLOW_EDGE) if flow else levels).float()
        self.scheduler.timesteps = torch.arange(steps).flip(0)
        self.scheduler.set_begin_index(0)  # else it looks its place up on the device

    def step(self, x_start: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        """The next x (B, F, C, H, W) from x, the clean clip predicted there and, if `stochastic`, unit noise."""
        extra = {"variance_noise": noise} if self.stochastic else {}
        return self.scheduler.step(x_start, 0, x, **extra).prev_sample
