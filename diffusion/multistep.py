"""Multistep solvers of the probability flow: DPM-Solver++ (Lu et al. 2022) and UniPC (Zhao et al. 2023), by diffusers.

diffusers computes the steps and is imported only if one of these is used. It receives the predicted clean clip, which
our process computes from any kind of prediction, and the noise levels of our timesteps, so that all methods visit the
same ones. Sampling always ends at noise level 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ORDER = 2
FLOW_EDGE = 1e-6  # distance from time 1 at which the log of the signal is still finite; the value of diffusers


# name -> scheduler class of diffusers, and the arguments that make it the solver
MULTISTEP_SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm_solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "sde_dpm_solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


class MultistepSolver:
    """Solver of one sampling run; stores the predicted clean clips of the last steps.

    Args:
        name: a key of MULTISTEP_SOLVERS.
        noise_levels: T + 1 levels ascending from 0, as in `noise_levels` of a process.
        flow: True if they are times of a flow, False for noise-to-signal ratios.

    Raises:
        ModuleNotFoundError: diffusers is not installed.
    """

    def __init__(self, name: str, noise_levels: Sequence[float], *, flow: bool) -> None:
        import diffusers  # slow to import

        class_name, arguments = MULTISTEP_SOLVERS[name]
        self.stochastic = name.startswith("sde")  # adds noise at every step
        self.scheduler = getattr(diffusers, class_name)(
            solver_order=ORDER,
            prediction_type="sample",
            use_flow_sigmas=flow,
            final_sigmas_type="zero",
            **arguments,
        )
        steps = len(noise_levels) - 1
        self.scheduler.set_timesteps(steps)
        levels = torch.tensor(noise_levels[::-1], dtype=torch.float64)
        self.scheduler.sigmas = (levels.clamp(max=1 - FLOW_EDGE) if flow else levels).float()
        self.scheduler.timesteps = torch.arange(steps).flip(0)
        self.scheduler.set_begin_index(0)  # otherwise it looks the index up on the device

    def step(self, x_start: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        """Returns the next x (B, F, C, H, W) from x, the clean clip predicted at x and, if `stochastic`, unit noise."""
        extra = {"variance_noise": noise} if self.stochastic else {}
        return self.scheduler.step(x_start, 0, x, **extra).prev_sample
