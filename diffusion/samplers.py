"""Samplers: step functions, the methods built from them, and the sampling loop.

Letters: B clips, F frames, C channels, H W, T steps of the process. Every step function has the signature
`step(process, denoiser, x, timesteps, options) -> Step`; timesteps in [0, T) are (B,), or (B, F) per frame, on the
device of x. No step waits for the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .flow import RectifiedFlow, velocity
from .gaussian import GaussianDiffusion, PMeanVariance
from .guidance import Denoiser
from .losses import append_dims
from .scheduled import MULTISTEP_SOLVERS, SCHEDULERS, ScheduledDiffusion, build_multistep_solver

Process = GaussianDiffusion | RectifiedFlow
Callback = Callable[[int, int, Tensor, Tensor], None]  # (steps done, T, x, pred_x_start)


@dataclass(frozen=True)
class StepOptions:
    """Options of a step.

    Attributes:
        eta: noise of DDIM, from 0 (none) to 1 (as much as DDPM).
        clip_denoised: clamp the predicted clean clip to [-1, 1].
        noise_fn: draws unit noise shaped like its argument.
        x_start_fn: applied to the predicted clean clip before it is clamped.
        given_frames: (B or 1, F) bool, frames whose predictions are ignored. Only for diffusers' schedulers, which do
            not expose the predicted clean clip.
        generator: for diffusers' schedulers, which draw noise themselves; a list has one per clip.
    """

    eta: float = 0.0
    clip_denoised: bool = False
    noise_fn: Callable[[Tensor], Tensor] = torch.randn_like
    x_start_fn: Callable[[Tensor], Tensor] | None = None
    given_frames: Tensor | None = None
    generator: torch.Generator | list[torch.Generator] | None = None

    def refine(self, x_start: Tensor) -> Tensor:
        """Applies `x_start_fn`, then clamping, to a predicted clean clip."""
        if self.x_start_fn is not None:
            x_start = self.x_start_fn(x_start)
        return x_start.clamp(-1, 1) if self.clip_denoised else x_start


class Step(NamedTuple):
    """Result of a step: the next x and the predicted clean clip, both (B, F, C, H, W)."""

    x: Tensor
    pred_x_start: Tensor


DEFAULT = StepOptions()
StepFunction = Callable[..., Step]


# ---- Gaussian diffusion ------------------------------------------------------------------------


def p_mean_variance(
    diffusion: GaussianDiffusion, denoiser: Denoiser, x: Tensor, timesteps: Tensor, options: StepOptions = DEFAULT
) -> PMeanVariance:
    """Returns the denoiser's p(x_{t-1} | x_t), with `options.x_start_fn` and clamping applied."""
    output = denoiser(x, diffusion.network_timesteps(timesteps))
    return diffusion.p_mean_variance(output, x, timesteps, refine=options.refine)


def _unless_first(timesteps: Tensor, x: Tensor) -> Tensor:
    """Returns 1 where timesteps > 0, else 0 (the last step adds no noise), shaped to broadcast over x."""
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
    """Returns a `Step` whose `x` is the velocity at grid level `level` > 0, and the clean clip it points to."""
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
    """Takes the same step along the mean velocity of both ends (two evaluations); timesteps >= 1."""
    here = _flow_velocity(flow, denoiser, x, timesteps + 1, options)
    interval = append_dims(flow.time(timesteps, x) - flow.time(timesteps + 1, x), x)
    there = _flow_velocity(flow, denoiser, x + interval * here.x, timesteps, options)
    return Step(x + interval * (here.x + there.x) / 2, there.pred_x_start)


# ---- diffusers ---------------------------------------------------------------------------------


def begin_multistep(name: str, process: Process) -> StepFunction:
    """Returns the step function of one sampling run with multistep solver `name`; each step uses earlier ones."""
    is_flow = isinstance(process, RectifiedFlow)
    solver = build_multistep_solver(name, process.noise_levels, flow=is_flow)

    def step(process: Any, denoiser: Denoiser, x: Tensor, timesteps: Tensor, options: StepOptions) -> Step:
        if is_flow:
            x_start = _flow_velocity(process, denoiser, x, timesteps + 1, options).pred_x_start
        else:
            x_start = p_mean_variance(process, denoiser, x, timesteps, options).pred_x_start
        extra = {"variance_noise": options.noise_fn(x)} if name.startswith("sde") else {}
        return Step(solver.step(x_start, 0, x, **extra).prev_sample, x_start)

    return step


def scheduler_step(scheduler: Any, denoiser: Denoiser, x: Tensor, time: Tensor, options: StepOptions) -> Step:
    """Takes one step of a diffusers scheduler at its timestep `time`; some schedulers split a step into several."""
    output = denoiser(scheduler.scale_model_input(x, time), time.expand(len(x)).to(x.device))
    if getattr(scheduler.config, "variance_type", None) not in ("learned", "learned_range"):
        output = output[:, :, : x.shape[2]]
    if options.given_frames is not None:  # the results are unused; zeros keep them small
        output = output.masked_fill(options.given_frames[:, :, None, None, None], 0)
    accepted = inspect.signature(scheduler.step).parameters
    extra = {key: getattr(options, key) for key in ("eta", "generator") if key in accepted}
    # (B, C, F, H, W), diffusers' order, in which the scheduler draws its noise
    result = scheduler.step(output.transpose(1, 2), time, x.transpose(1, 2), **extra, return_dict=False)[0]
    return Step(result.transpose(1, 2), result.transpose(1, 2))


# ---- methods -----------------------------------------------------------------------------------


class Method(NamedTuple):
    """A sampling method: a row of METHODS.

    Attributes:
        process: supported process class or classes.
        begin: returns the step function of one sampling run.
        step_at_zero: step function at t = 0, if it differs.
        evaluations: denoiser calls per step; always one at t = 0.
        ascending: goes from data to noise.
    """

    process: type | tuple[type, ...]
    begin: Callable[[Process], StepFunction]
    step_at_zero: StepFunction | None = None
    evaluations: int = 1
    ascending: bool = False

    def indices(self, process: Process) -> list[int]:
        """Returns the timesteps in sampling order."""
        return list(range(process.num_timesteps)[:: 1 if self.ascending else -1])


METHODS = {
    "ddpm": Method(GaussianDiffusion, lambda _: ddpm_step),
    "ddim": Method(GaussianDiffusion, lambda _: ddim_step),
    "ddim_reverse": Method(GaussianDiffusion, lambda _: ddim_reverse_step, ascending=True),
    "euler": Method(RectifiedFlow, lambda _: euler_step),
    # the last step is Euler's, since networks predict worst at time 0, on clips without noise
    "heun": Method(RectifiedFlow, lambda _: heun_step, euler_step, evaluations=2),
    **{name: Method((GaussianDiffusion, RectifiedFlow), partial(begin_multistep, name)) for name in MULTISTEP_SOLVERS},
}


def list_methods(process: type) -> list[str]:
    """Lists the methods that sample from a kind of process."""
    return [name for name, row in METHODS.items() if issubclass(process, row.process) and not row.ascending]


def list_evaluations(process: Process, method: str) -> list[float]:
    """Returns the network's timestep in each denoiser call that `sample` will make, in order."""
    check_method(method, process, DEFAULT)
    row = METHODS[method]
    visited = (range(step, max(-1, step - row.evaluations), -1) for step in row.indices(process))
    return [process.step_times[index] for indices in visited for index in indices]


def check_method(name: str, process: Process | ScheduledDiffusion, options: StepOptions) -> None:
    """Raises ValueError if method `name` does not support the process or the options."""
    if isinstance(process, ScheduledDiffusion):
        kind, fitting = "a noise schedule of diffusers", list(SCHEDULERS)
    else:
        kind = f"diffusion.prediction={process.config.prediction}"
        fitting = [key for key, method in METHODS.items() if isinstance(process, method.process)]
    if name not in fitting:
        raise ValueError(f"Sampling method {name!r} does not support {kind}; choose {' | '.join(fitting)}.")
    if options.eta and name not in ("ddim", "DDIM"):
        raise ValueError(f"eta={options.eta} is read only by method ddim; use eta=0 with {name}.")


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
        callback: called after every step with (steps done, total steps, x, pred_x_start).
        options: fields of `StepOptions` (eta, clip_denoised, noise_fn, x_start_fn, ...).

    Raises ValueError if the method does not support the process or an option.
    """
    settings = StepOptions(**options)
    check_method(method, diffusion, settings)
    x = noise
    if isinstance(diffusion, ScheduledDiffusion):
        scheduler = diffusion.build_scheduler(method)
        scheduler.set_timesteps(diffusion.num_timesteps, device=noise.device)
        x = noise * scheduler.init_noise_sigma
        steps = [partial(scheduler_step, scheduler, time=time) for time in scheduler.timesteps]
    else:
        row = METHODS[method]
        take_step, indices = row.begin(diffusion), row.indices(diffusion)
        functions = [row.step_at_zero or take_step if index == 0 else take_step for index in indices]
        times = [torch.full((len(x),), index, device=x.device) for index in indices]
        steps = [partial(step, diffusion, timesteps=time) for step, time in zip(functions, times)]
    for done, take in enumerate(steps, 1):
        x, pred_x_start = take(denoiser, x, options=settings)
        if callback is not None:
            callback(done, len(steps), x, pred_x_start)
    return x
