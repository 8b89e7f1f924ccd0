"""Samplers: single steps, the sampling loop, and the bits-per-dimension loop.

Letters: B clips, F frames, C channels, H W, T steps of the process. Every step function has the form
`step(diffusion, denoiser, x, timesteps, options) -> Step`, with timesteps (B,) in [0, T) on the device of x, and never
waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .flow import RectifiedFlow, velocity
from .gaussian import GaussianDiffusion, PMeanVariance
from .guidance import Denoiser
from .losses import frame_mean
from .multistep import MULTISTEP_SOLVERS, MultistepSolver
from .scheduled import SCHEDULERS, ScheduledDiffusion, ScheduledWalk
from .steps import DEFAULT, Step, StepOptions

Callback = Callable[[int, int, Tensor, Tensor], None]  # (steps done, T, x, pred_x_start)


# ---- Gaussian diffusion ------------------------------------------------------------------------


def p_mean_variance(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    x: Tensor,
    timesteps: Tensor,
    options: StepOptions = DEFAULT,
) -> PMeanVariance:
    """Returns p(x_{t-1} | x_t) of the denoiser, with `options.x_start_fn` and clamping applied."""
    output = denoiser(x, diffusion.network_timesteps(timesteps))
    return diffusion.p_mean_variance(output, x, timesteps, refine=options.refine)


def _unless_first(timesteps: Tensor, x: Tensor) -> Tensor:
    """Returns 1 for timesteps > 0, else 0, since the step to t = -1 adds no noise. Broadcasts over x."""
    return (timesteps != 0).to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def ddpm_step(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    x: Tensor,
    timesteps: Tensor,
    options: StepOptions = DEFAULT,
) -> Step:
    """Takes one ancestral step x_t -> x_{t-1} (Ho et al. 2020, algorithm 2)."""
    p = p_mean_variance(diffusion, denoiser, x, timesteps, options)
    noise = options.noise_fn(x)
    if options.gradient_fn is not None:
        gradient = options.gradient_fn(x, diffusion.network_timesteps(timesteps))
        p.mean = p.mean + p.variance * gradient
    deviation = _unless_first(timesteps, x) * torch.exp(0.5 * p.log_variance)
    return Step(p.mean + deviation * noise, p.pred_x_start)


def _ddim_prediction(
    diffusion: GaussianDiffusion, denoiser: Denoiser, x: Tensor, timesteps: Tensor, options: StepOptions
) -> tuple[Tensor, Tensor]:
    """Returns the predicted clean clip and noise at x_t, with classifier guidance if there is any."""
    pred_x_start = p_mean_variance(diffusion, denoiser, x, timesteps, options).pred_x_start
    noise = diffusion.noise_from_x_start(pred_x_start, x, timesteps)
    if options.gradient_fn is None:
        return pred_x_start, noise
    gradient = options.gradient_fn(x, diffusion.network_timesteps(timesteps))
    noise = noise - (1 - diffusion.table("alphas_cumprod", timesteps, x)).sqrt() * gradient
    pred_x_start = (
        diffusion.table("sqrt_recip_alphas_cumprod", timesteps, x) * x
        - diffusion.table("sqrt_recipm1_alphas_cumprod", timesteps, x) * noise
    )
    return pred_x_start, noise


def ddim_step(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    x: Tensor,
    timesteps: Tensor,
    options: StepOptions = DEFAULT,
) -> Step:
    """Takes one DDIM step x_t -> x_{t-1} (Song et al. 2020, eq. 12); `options.eta` sets its noise (eq. 16)."""
    pred_x_start, noise = _ddim_prediction(diffusion, denoiser, x, timesteps, options)
    now = diffusion.table("alphas_cumprod", timesteps, x)
    previous = diffusion.table("alphas_cumprod_prev", timesteps, x)
    sigma = options.eta * ((1 - previous) / (1 - now)).sqrt() * (1 - now / previous).sqrt()
    mean = pred_x_start * previous.sqrt() + (1 - previous - sigma**2).sqrt() * noise
    if options.eta == 0:
        return Step(mean, pred_x_start)
    return Step(mean + _unless_first(timesteps, x) * sigma * options.noise_fn(x), pred_x_start)


def ddim_reverse_step(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    x: Tensor,
    timesteps: Tensor,
    options: StepOptions = DEFAULT,
) -> Step:
    """Takes one deterministic DDIM step towards noise, x_t -> x_{t+1}."""
    pred_x_start, noise = _ddim_prediction(diffusion, denoiser, x, timesteps, options)
    following = diffusion.table("alphas_cumprod_next", timesteps, x)
    return Step(pred_x_start * following.sqrt() + (1 - following).sqrt() * noise, pred_x_start)


# ---- rectified flow ----------------------------------------------------------------------------


def _flow_velocity(flow: RectifiedFlow, denoiser: Denoiser, x: Tensor, time: Tensor, options: StepOptions) -> Step:
    """Returns the velocity at `time` (B, 1, ...) > 0, in `.x`, and the clean clip it points to."""
    speed = velocity(denoiser(x, flow.network_timesteps(time)), x)
    pred_x_start = x - time * speed
    refined = options.refine(pred_x_start)
    return Step(speed if refined is pred_x_start else (x - refined) / time, refined)


def euler_step(
    flow: RectifiedFlow,
    denoiser: Denoiser,
    x: Tensor,
    timesteps: Tensor,
    options: StepOptions = DEFAULT,
) -> Step:
    """Takes one step towards data over interval `timesteps` of the grid, along the velocity at its noisy end."""
    time, target = flow.time(timesteps + 1, x), flow.time(timesteps, x)
    here = _flow_velocity(flow, denoiser, x, time, options)
    return Step(x + (target - time) * here.x, here.pred_x_start)


def heun_step(
    flow: RectifiedFlow,
    denoiser: Denoiser,
    x: Tensor,
    timesteps: Tensor,
    options: StepOptions = DEFAULT,
) -> Step:
    """Takes the step along the mean of the velocities at both ends (two evaluations); timesteps >= 1."""
    time, target = flow.time(timesteps + 1, x), flow.time(timesteps, x)
    here = _flow_velocity(flow, denoiser, x, time, options)
    there = _flow_velocity(flow, denoiser, x + (target - time) * here.x, target, options)
    return Step(x + (target - time) * (here.x + there.x) / 2, there.pred_x_start)


# ---- both processes ----------------------------------------------------------------------------


Process = GaussianDiffusion | RectifiedFlow
StepFunction = Callable[..., Step]


def multistep(name: str) -> Callable[[Process], StepFunction]:
    """Returns a function that starts a walk of solver `name`; its steps depend on the previous ones."""

    def begin(process: Process) -> StepFunction:
        solver = MultistepSolver(name, process.noise_levels, flow=isinstance(process, RectifiedFlow))

        def step(process: Process, denoiser: Denoiser, x: Tensor, timesteps: Tensor, options: StepOptions) -> Step:
            x_start = _predicted_x_start(process, denoiser, x, timesteps, options)
            return Step(solver.step(x_start, x, options.noise_fn(x) if solver.stochastic else None), x_start)

        return step

    return begin


def _predicted_x_start(
    process: Process, denoiser: Denoiser, x: Tensor, timesteps: Tensor, options: StepOptions
) -> Tensor:
    """Returns the clean clip that the denoiser's output at x_t implies, for any prediction."""
    if isinstance(process, GaussianDiffusion):
        return p_mean_variance(process, denoiser, x, timesteps, options).pred_x_start
    return _flow_velocity(process, denoiser, x, process.time(timesteps + 1, x), options).pred_x_start


# ---- loops -------------------------------------------------------------------------------------


class Walk(Protocol):
    """One walk from noise to data, or back."""

    num_steps: int

    def start(self, noise: Tensor) -> Tensor:
        """Returns the first x for unit noise."""

    def step(self, denoiser: Denoiser, x: Tensor, number: int, options: StepOptions) -> Step:
        """Returns the result of step `number`, counted from 0."""


@dataclass(frozen=True)
class Method:
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


class StepWalk:
    """A walk over the timesteps of a process with the step functions of a `Method`."""

    def __init__(self, method: Method, process: Process) -> None:
        self.process = process
        self.indices = method.indices(process)
        self.num_steps = len(self.indices)
        self.take_step = method.begin(process)
        self.step_at_zero = method.step_at_zero or self.take_step

    def start(self, noise: Tensor) -> Tensor:
        return noise

    def step(self, denoiser: Denoiser, x: Tensor, number: int, options: StepOptions) -> Step:
        index = self.indices[number]
        take_step = self.step_at_zero if index == 0 else self.take_step
        return take_step(self.process, denoiser, x, torch.full((len(x),), index, device=x.device), options)


METHODS = {
    "ddpm": Method(GaussianDiffusion, lambda _: ddpm_step),
    "ddim": Method(GaussianDiffusion, lambda _: ddim_step),
    "ddim_reverse": Method(GaussianDiffusion, lambda _: ddim_reverse_step, ascending=True),
    "euler": Method(RectifiedFlow, lambda _: euler_step),
    # ends with Euler, because networks predict worst at time 0, where clips have no noise
    "heun": Method(RectifiedFlow, lambda _: heun_step, euler_step, evaluations=2),
    **{name: Method((GaussianDiffusion, RectifiedFlow), multistep(name)) for name in MULTISTEP_SOLVERS},
}


def list_methods(process: Process | ScheduledDiffusion) -> list[str]:
    """Returns the names of the methods that support `process`."""
    if isinstance(process, ScheduledDiffusion):
        return list(SCHEDULERS)
    return [name for name, method in METHODS.items() if isinstance(process, method.process)]


def _check_method(name: str, process: Process | ScheduledDiffusion, options: StepOptions) -> None:
    if name not in (fitting := list_methods(process)):
        kind = "a noise schedule of diffusers"
        if not isinstance(process, ScheduledDiffusion):
            kind = f"diffusion.prediction={process.config.prediction}"
        raise ValueError(f"Sampling method {name!r} does not support {kind}; choose {' | '.join(fitting)}.")
    if options.eta and name not in ("ddim", "DDIM"):
        raise ValueError(f"eta={options.eta} is read only by method ddim; use eta=0 with {name}.")
    if options.gradient_fn is not None and name not in ("ddpm", "ddim", "ddim_reverse"):
        raise ValueError("gradient_fn (classifier guidance) needs Gaussian diffusion and ddpm or ddim.")


def start_walk(name: str, process: Process | ScheduledDiffusion, device: torch.device) -> Walk:
    """Returns a walk of `process` by method `name`."""
    if isinstance(process, ScheduledDiffusion):
        return ScheduledWalk(name, process, device)
    return StepWalk(METHODS[name], process)


class Evaluation(NamedTuple):
    """One call of the denoiser in a walk.

    Attributes:
        time: timestep of the network.
        clean_gain: absolute derivative of the predicted clean clip by the output.
        share: fraction of the present noise that the step removes by this evaluation.
    """

    time: float
    clean_gain: float
    share: float


def list_evaluations(process: Process, method: str) -> list[Evaluation]:
    """Lists every call of the denoiser that `sample` will make, in order, without the device.

    Raises:
        ValueError: the method does not support the process.
    """
    _check_method(method, process, DEFAULT)
    row = METHODS[method]
    levels = process.noise_levels
    found = []
    for step in row.indices(process):
        visited = range(step, max(-1, step - row.evaluations), -1)  # heun: both ends of a step
        share = abs(1 - levels[step] / levels[step + 1]) / len(visited)
        found += [Evaluation(process.step_times[index], process.clean_gains[index], share) for index in visited]
    return found


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
        options: fields of `StepOptions` (eta, clip_denoised, noise_fn, x_start_fn, gradient_fn, ...).

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


@dataclass
class BitsPerDim:
    """Variational bound of clips in bits per dimension; column t of the (B, T) parts is step t.

    Attributes:
        total: (B,) sum of `vb` over t plus `prior`.
        prior: (B,) the constant term at t = T.
        vb: (B, T) the terms.
        x_start_mse: (B, T) squared error of the predicted clean clip.
        mse: (B, T) squared error of the predicted noise.
    """

    total: Tensor
    prior: Tensor
    vb: Tensor
    x_start_mse: Tensor
    mse: Tensor


@torch.no_grad()
def calc_bpd_loop(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    x_start: Tensor,
    *,
    clip_denoised: bool = True,
    noise_fn: Callable[[Tensor], Tensor] = torch.randn_like,
) -> BitsPerDim:
    """Computes all terms of the variational bound of `x_start` (B, F, C, H, W), each with its own noise.

    The last term (t = 0) takes `x_start` in [-1, 1] as 8-bit data. Calls the network T times.
    """
    refine = StepOptions(clip_denoised=clip_denoised).refine
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    for index in reversed(range(diffusion.num_timesteps)):
        timesteps = torch.full((len(x_start),), index, device=x_start.device)
        noise = noise_fn(x_start)
        x = diffusion.q_sample(x_start, timesteps, noise)
        output = denoiser(x, diffusion.network_timesteps(timesteps))
        p = diffusion.p_mean_variance(output, x, timesteps, refine=refine)
        vb = diffusion.variational_bound(output, x_start, x, timesteps, refine=refine)
        pred_noise = diffusion.noise_from_x_start(p.pred_x_start, x, timesteps)
        errors = ((p.pred_x_start - x_start) ** 2, (pred_noise - noise) ** 2)
        columns.insert(0, (vb.mean(1), frame_mean(errors[0]).mean(1), frame_mean(errors[1]).mean(1)))
    vb, x_start_mse, mse = (torch.stack(column, 1) for column in zip(*columns, strict=True))
    prior = diffusion.prior_bits(x_start)
    return BitsPerDim(vb.sum(1) + prior, prior, vb, x_start_mse, mse)
