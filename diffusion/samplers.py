"""Samplers: single steps, the methods made of them, and the sampling loop.

Letters: B clips, F frames, C channels, H W, T steps of the process. Every step function has the form
`step(process, denoiser, x, timesteps, options) -> Step`, with timesteps (B,), or (B, F) for each frame, in [0, T) on
the device of x, and never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .flow import RectifiedFlow, velocity
from .gaussian import GaussianDiffusion, PMeanVariance
from .guidance import Denoiser
from .losses import append_dims
from .multistep import MULTISTEP_SOLVERS, MultistepSolver
from .scheduled import SCHEDULERS, ScheduledDiffusion, ScheduledWalk
from .steps import DEFAULT, Step, StepOptions

Process = GaussianDiffusion | RectifiedFlow
StepFunction = Callable[..., Step]
Callback = Callable[[int, int, Tensor, Tensor], None]  # (steps done, T, x, pred_x_start)


# ---- Gaussian diffusion ------------------------------------------------------------------------


def p_mean_variance(
    diffusion: GaussianDiffusion, denoiser: Denoiser, x: Tensor, timesteps: Tensor, options: StepOptions = DEFAULT
) -> PMeanVariance:
    """Returns p(x_{t-1} | x_t) of the denoiser, with `options.x_start_fn` and clamping applied."""
    output = denoiser(x, diffusion.network_timesteps(timesteps))
    return diffusion.p_mean_variance(output, x, timesteps, refine=options.refine)


def _unless_first(timesteps: Tensor, x: Tensor) -> Tensor:
    """Returns 1 for timesteps > 0, else 0, since the step to t = -1 adds no noise. Broadcasts over x."""
    return append_dims((timesteps != 0).to(x.dtype), x)


def ddpm_step(
    diffusion: GaussianDiffusion, denoiser: Denoiser, x: Tensor, timesteps: Tensor, options: StepOptions = DEFAULT
) -> Step:
    """Takes one ancestral step x_t -> x_{t-1} (Ho et al. 2020, algorithm 2)."""
    p = p_mean_variance(diffusion, denoiser, x, timesteps, options)
    deviation = _unless_first(timesteps, x) * torch.exp(0.5 * p.log_variance)
    return Step(p.mean + deviation * options.noise_fn(x), p.pred_x_start)


def ddim_step(
    diffusion: GaussianDiffusion, denoiser: Denoiser, x: Tensor, timesteps: Tensor, options: StepOptions = DEFAULT
) -> Step:
    """Takes one DDIM step x_t -> x_{t-1} (Song et al. 2020, eq. 12); `options.eta` sets its noise (eq. 16)."""
    pred_x_start = p_mean_variance(diffusion, denoiser, x, timesteps, options).pred_x_start
    noise = diffusion.noise_from_x_start(pred_x_start, x, timesteps)
    now = diffusion.table("alphas_cumprod", timesteps, x)
    previous = diffusion.table("alphas_cumprod_prev", timesteps, x)
    sigma = options.eta * ((1 - previous) / (1 - now)).sqrt() * (1 - now / previous).sqrt()
    mean = pred_x_start * previous.sqrt() + (1 - previous - sigma**2).sqrt() * noise
    if options.eta == 0:
        return Step(mean, pred_x_start)
    return Step(mean + _unless_first(timesteps, x) * sigma * options.noise_fn(x), pred_x_start)


def ddim_reverse_step(
    diffusion: GaussianDiffusion, denoiser: Denoiser, x: Tensor, timesteps: Tensor, options: StepOptions = DEFAULT
) -> Step:
    """Takes one deterministic DDIM step towards noise, x_t -> x_{t+1}."""
    pred_x_start = p_mean_variance(diffusion, denoiser, x, timesteps, options).pred_x_start
    noise = diffusion.noise_from_x_start(pred_x_start, x, timesteps)
    following = diffusion.table("alphas_cumprod_next", timesteps, x)
    return Step(pred_x_start * following.sqrt() + (1 - following).sqrt() * noise, pred_x_start)


# ---- rectified flow ----------------------------------------------------------------------------


def _flow_velocity(flow: RectifiedFlow, denoiser: Denoiser, x: Tensor, level: Tensor, options: StepOptions) -> Step:
    """Returns the velocity at noise level `level` > 0 of the grid, in `.x`, and the clean clip it points to."""
    time = flow.time(level, x)
    speed = velocity(denoiser(x, time * flow.config.num_steps), x)
    time = append_dims(time, x)
    pred_x_start = x - time * speed
    refined = options.refine(pred_x_start)
    return Step(speed if refined is pred_x_start else (x - refined) / time, refined)


def euler_step(
    flow: RectifiedFlow, denoiser: Denoiser, x: Tensor, timesteps: Tensor, options: StepOptions = DEFAULT
) -> Step:
    """Takes one step towards data over interval `timesteps` of the grid, along the velocity at its noisy end."""
    here = _flow_velocity(flow, denoiser, x, timesteps + 1, options)
    interval = append_dims(flow.time(timesteps, x) - flow.time(timesteps + 1, x), x)
    return Step(x + interval * here.x, here.pred_x_start)


def heun_step(
    flow: RectifiedFlow, denoiser: Denoiser, x: Tensor, timesteps: Tensor, options: StepOptions = DEFAULT
) -> Step:
    """Takes the step along the mean of the velocities at both ends (two evaluations); timesteps >= 1."""
    here = _flow_velocity(flow, denoiser, x, timesteps + 1, options)
    interval = append_dims(flow.time(timesteps, x) - flow.time(timesteps + 1, x), x)
    there = _flow_velocity(flow, denoiser, x + interval * here.x, timesteps, options)
    return Step(x + interval * (here.x + there.x) / 2, there.pred_x_start)


# ---- methods -----------------------------------------------------------------------------------


def multistep(name: str) -> Callable[[Process], StepFunction]:
    """Returns a function that starts a walk of solver `name`; its steps depend on the previous ones."""

    def begin(process: Process) -> StepFunction:
        solver = MultistepSolver(name, process.noise_levels, flow=isinstance(process, RectifiedFlow))

        def step(process: Process, denoiser: Denoiser, x: Tensor, timesteps: Tensor, options: StepOptions) -> Step:
            if isinstance(process, RectifiedFlow):
                x_start = _flow_velocity(process, denoiser, x, timesteps + 1, options).pred_x_start
            else:
                x_start = p_mean_variance(process, denoiser, x, timesteps, options).pred_x_start
            return Step(solver.step(x_start, x, options.noise_fn(x) if solver.stochastic else None), x_start)

        return step

    return begin


class Method(NamedTuple):
    """A row of METHODS.

    Attributes:
        process: class or classes of process that it supports.
        begin: returns the step function of one walk.
        step_at_zero: step function at t = 0, if it differs.
        evaluations: calls of the denoiser per step; at t = 0 always one.
        ascending: walks from data to noise.
    """

    process: type | tuple[type, ...]
    begin: Callable[[Process], StepFunction]
    step_at_zero: StepFunction | None = None
    evaluations: int = 1
    ascending: bool = False

    def indices(self, process: Process) -> list[int]:
        """Returns the timesteps of a walk in order."""
        steps = range(process.num_timesteps)
        return list(steps if self.ascending else reversed(steps))


METHODS = {
    "ddpm": Method(GaussianDiffusion, lambda _: ddpm_step),
    "ddim": Method(GaussianDiffusion, lambda _: ddim_step),
    "ddim_reverse": Method(GaussianDiffusion, lambda _: ddim_reverse_step, ascending=True),
    "euler": Method(RectifiedFlow, lambda _: euler_step),
    # ends with Euler, because networks predict worst at time 0, where clips have no noise
    "heun": Method(RectifiedFlow, lambda _: heun_step, euler_step, evaluations=2),
    **{name: Method((GaussianDiffusion, RectifiedFlow), multistep(name)) for name in MULTISTEP_SOLVERS},
}


def list_evaluations(process: Process, method: str) -> list[float]:
    """Lists the network's timestep in every call of the denoiser that `sample` will make, in order, without the device.

    Raises:
        ValueError: the method does not support the process.
    """
    _check_method(method, process, DEFAULT)
    row = METHODS[method]
    visited = (range(step, max(-1, step - row.evaluations), -1) for step in row.indices(process))
    return [process.step_times[index] for indices in visited for index in indices]


def _check_method(name: str, process: Process | ScheduledDiffusion, options: StepOptions) -> None:
    if isinstance(process, ScheduledDiffusion):
        kind, fitting = "a noise schedule of diffusers", list(SCHEDULERS)
    else:
        kind = f"diffusion.prediction={process.config.prediction}"
        fitting = [key for key, method in METHODS.items() if isinstance(process, method.process)]
    if name not in fitting:
        raise ValueError(f"Sampling method {name!r} does not support {kind}; choose {' | '.join(fitting)}.")
    if options.eta and name not in ("ddim", "DDIM"):
        raise ValueError(f"eta={options.eta} is read only by method ddim; use eta=0 with {name}.")


# ---- loop --------------------------------------------------------------------------------------


class StepWalk:
    """A walk over the timesteps of a process with the step functions of a method."""

    def __init__(self, method: Method, process: Process) -> None:
        self.process = process
        self.indices = method.indices(process)
        self.num_steps = len(self.indices)
        self.take_step = method.begin(process)
        self.step_at_zero = method.step_at_zero or self.take_step

    def start(self, noise: Tensor) -> Tensor:
        """Returns the first x for unit noise."""
        return noise

    def step(self, denoiser: Denoiser, x: Tensor, number: int, options: StepOptions) -> Step:
        """Returns the result of step `number`, counted from 0."""
        index = self.indices[number]
        take_step = self.step_at_zero if index == 0 else self.take_step
        return take_step(self.process, denoiser, x, torch.full((len(x),), index, device=x.device), options)


def start_walk(name: str, process: Process | ScheduledDiffusion, device: torch.device) -> StepWalk | ScheduledWalk:
    """Returns a walk of `process` by method `name`."""
    if isinstance(process, ScheduledDiffusion):
        return ScheduledWalk(name, process, device)
    return StepWalk(METHODS[name], process)


@torch.no_grad()
def sample(
    diffusion: Process | ScheduledDiffusion,
    denoiser: Denoiser,
    noise: Tensor,
    *,
    method: str = "ddpm",
    callback: Callback | None = None,
    **options: Any,
) -> Tensor:
    """Runs all T steps of `diffusion` from `noise` to clean clips, both (B, F, C, H, W).

    Args:
        diffusion: on the device of `noise`; its respacing sets T.
        denoiser: the network, possibly wrapped in guidance.
        noise: unit noise; for `ddim_reverse` clean clips, which are turned into noise.
        method: ddpm | ddim | ddim_reverse, or euler | heun for a flow; for both dpm_solver++ |
            sde_dpm_solver++ | unipc; for a `ScheduledDiffusion` the official names (DDIM, EulerDiscrete, ...).
        callback: called after every step with (steps done, steps in all, x, pred_x_start).
        options: fields of `StepOptions` (eta, clip_denoised, noise_fn, x_start_fn, ...).

    Raises:
        ValueError: the method does not support the process or an option.
    """
    settings = StepOptions(**options)
    _check_method(method, diffusion, settings)
    walk = start_walk(method, diffusion, noise.device)
    x = walk.start(noise)
    for number in range(walk.num_steps):
        step = walk.step(denoiser, x, number, settings)
        x = step.x
        if callback is not None:
            callback(number + 1, walk.num_steps, x, step.pred_x_start)
    return x
