"""Samplers, against Gaussian data (whose perfect denoiser and flow are known) and diffusers' schedulers."""

import re
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from diffusion import (
    DiffusionConfig,
    GaussianDiffusion,
    RectifiedFlow,
    build_diffusion,
    build_timestep_sampler,
    list_evaluations,
    sample,
)
from diffusion.samplers import METHODS
from tests.conftest import refuses

SHAPE = (2, 3, 2, 4, 5)  # B F C H W
MEAN, DEVIATION = 0.3, 0.5  # of the Gaussian data


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(respacing: str = "", learn_sigma: bool = False, **fields: Any) -> GaussianDiffusion:
    return GaussianDiffusion(DiffusionConfig(**fields), learn_sigma=learn_sigma, respacing=respacing)


def flow(respacing: str, shift: float = 1.0) -> RectifiedFlow:
    return RectifiedFlow(DiffusionConfig(prediction="flow", timestep_shift=shift), respacing=respacing)


FULL_SIGNAL = gaussian().tables["alphas_cumprod"]


def perfect_denoiser(x: Tensor, timesteps: Tensor) -> Tensor:
    """E[noise | x_t] for data N(MEAN, DEVIATION^2), at original timesteps."""
    signal = FULL_SIGNAL[timesteps].view(-1, 1, 1, 1, 1)
    gain = signal.sqrt() * DEVIATION**2 / (signal * DEVIATION**2 + 1 - signal)
    clean = MEAN + gain * (x - signal.sqrt() * MEAN)
    return (x - signal.sqrt() * clean) / (1 - signal).sqrt()


def perfect_velocity(x: Tensor, timesteps: Tensor) -> Tensor:
    time = (timesteps / 1000).view(-1, 1, 1, 1, 1)
    variance = (1 - time) ** 2 * DEVIATION**2 + time**2
    centred = x - (1 - time) * MEAN
    return (time - (1 - time) * DEVIATION**2) / variance * centred - MEAN


def solution_error(method: str, steps: int) -> float:
    """Distance from the exact end of the probability flow, on Gaussian data."""
    noise = randn(*SHAPE)
    if method == "ddim":
        signal = FULL_SIGNAL[-1]
        deviation = (signal * DEVIATION**2 + 1 - signal).sqrt()
        exact = MEAN + DEVIATION * (noise - signal.sqrt() * MEAN) / deviation
        found = sample(gaussian(str(steps)), perfect_denoiser, noise, method="ddim")
    else:
        exact = MEAN + DEVIATION * noise
        found = sample(flow(str(steps)), perfect_velocity, noise, method=method)
    return (found - exact).abs().max().item()


@pytest.mark.parametrize(
    ("method", "order", "steps"),
    [("ddim", 1, 50), ("euler", 1, 50), ("heun", 2, 50), ("dpm_solver++", 2, 80), ("unipc", 2, 80)],
)
def test_solvers_reach_the_exact_solution_at_their_order(method: str, order: int, steps: int) -> None:
    coarse, fine = solution_error(method, steps), solution_error(method, 4 * steps)
    assert fine < 0.03 / 10 ** (order - 1)
    assert 0.65 * 4**order < coarse / fine < 3 * 4**order


def test_reverse_ddim_leads_back_to_the_noise_that_ddim_came_from() -> None:
    # the last reverse step goes to pure noise, where ddim starts from alphas_cumprod = 4e-5: 1 % apart
    diffusion, noise = gaussian(), randn(*SHAPE)
    clean = sample(diffusion, perfect_denoiser, noise, method="ddim")
    found = sample(diffusion, perfect_denoiser, clean, method="ddim_reverse")
    torch.testing.assert_close(found, noise, atol=0.05, rtol=0)


def network(channels: int, inputs: int = SHAPE[2]) -> Callable[[Tensor, Tensor], Tensor]:
    weight = randn(channels, inputs, seed=9) / inputs

    def call(x: Tensor, timesteps: Tensor) -> Tensor:
        time = timesteps.to(x.dtype).view(-1, 1, 1, 1, 1) / 1000
        return torch.tanh(torch.einsum("oc,bfchw->bfohw", weight.to(x.dtype), x) + time)

    return call


def walk_diffusers(scheduler: Any, denoiser: Callable[[Tensor, Tensor], Tensor], **options: Any) -> Tensor:
    """A loop of a diffusers scheduler, frames folded into the batch."""
    generator = torch.Generator().manual_seed(7)
    x = randn(*SHAPE)
    for t in scheduler.timesteps:
        output = denoiser(x, torch.full((SHAPE[0],), t.item(), dtype=t.dtype))
        # flat: diffusers splits learned variance at dimension 1
        step = scheduler.step(output.flatten(0, 1), t, x.flatten(0, 1), **options, generator=generator)
        x = step.prev_sample.unflatten(0, SHAPE[:2])
    return x


def walk_ours(diffusion: Any, denoiser: Callable[[Tensor, Tensor], Tensor], **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(7)

    def noise_fn(x: Tensor) -> Tensor:
        return torch.randn(x.flatten(0, 1).shape, generator=generator, dtype=x.dtype).view_as(x)

    return sample(diffusion, denoiser, randn(*SHAPE), noise_fn=noise_fn, **options)


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Their tables are float32."""
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize(
    ("theirs", "ours", "clip"),
    [("epsilon", "epsilon", False), ("sample", "x_start", True), ("v_prediction", "velocity", False)],
)
def test_ddpm_is_diffusers_ddpm(theirs: str, ours: str, clip: bool) -> None:
    names = {"variance_type": "learned_range", "prediction_type": theirs, "timestep_spacing": "leading"}
    scheduler = diffusers.DDPMScheduler(clip_sample=clip, **names)
    scheduler.set_timesteps(25)
    diffusion = gaussian("ddim25", learn_sigma=True, prediction=ours)
    assert_near(walk_ours(diffusion, network(4), clip_denoised=clip), walk_diffusers(scheduler, network(4)))


@pytest.mark.parametrize(("theirs", "ours", "eta"), [("epsilon", "epsilon", 0.0), ("v_prediction", "velocity", 0.3)])
def test_ddim_is_diffusers_ddim(theirs: str, ours: str, eta: float) -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type=theirs)
    scheduler.set_timesteps(50)
    found = walk_ours(gaussian("ddim50", prediction=ours), network(2), method="ddim", eta=eta)
    assert_near(found, walk_diffusers(scheduler, network(2), eta=eta))


def test_euler_is_diffusers_flow_matching() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=4.0)
    scheduler.set_timesteps(sigmas=[i / 12 for i in range(12, 0, -1)])
    assert_near(walk_ours(flow("12", 4.0), network(2), method="euler"), walk_diffusers(scheduler, network(2)))


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "x_start", "velocity"])
@pytest.mark.parametrize(
    ("method", "scheduler"),
    [("dpm_solver++", diffusers.DPMSolverMultistepScheduler), ("unipc", diffusers.UniPCMultistepScheduler)],
)
def test_multistep_is_diffusers_scheduler(method: str, scheduler: Any, prediction: str, learn_sigma: bool) -> None:
    """At our timesteps and noise levels. Learned variance changes nothing, in any number of channels."""
    channels = 16 if learn_sigma else 4
    theirs = {"epsilon": "epsilon", "x_start": "sample", "velocity": "v_prediction"}[prediction]
    scheduler = scheduler(prediction_type=theirs)
    scheduler.set_timesteps(12)
    process = gaussian("12", learn_sigma, prediction=prediction)
    scheduler.timesteps = times = process.timestep_map.flip(0)
    levels = (1 / FULL_SIGNAL - 1).sqrt()[times]
    scheduler.sigmas = torch.cat([levels, levels.new_zeros(1)]).float()
    predicted = network(channels, channels)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        output = predicted(x, t)
        return torch.cat([output, torch.full_like(output, 0.7)], 2) if learn_sigma else output

    noise = randn(2, 3, channels, 4, 5)
    expected = noise.float()
    for t in times:
        output = predicted(expected, t.expand(2))
        expected = scheduler.step(output.flatten(0, 1), t, expected.flatten(0, 1)).prev_sample.unflatten(0, (2, 3))
    assert_near(sample(process, denoiser, noise, method=method).float(), expected.float(), 2e-5)


def test_stochastic_multistep_draws_the_data_distribution_from_the_given_noise() -> None:
    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(3)
        noise_fn = lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)  # noqa: E731
        noise = randn(1, 1, 1, 200, 100)
        return sample(gaussian("250"), perfect_denoiser, noise, method="sde_dpm_solver++", noise_fn=noise_fn)

    found = draw()
    assert found.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert found.std().item() == pytest.approx(DEVIATION, abs=0.02)
    assert torch.equal(found, draw())


@pytest.mark.parametrize("method", METHODS)
def test_evaluations_are_those_that_the_network_is_asked_for(method: str) -> None:
    for process in (gaussian("7", schedule="cosine"), flow("7", 3.0)):
        if isinstance(process, METHODS[method].process):
            asked = []

            def denoiser(x: Tensor, timesteps: Tensor, asked: list = asked) -> Tensor:
                asked.append(timesteps[0].item())
                return x / 2

            sample(process, denoiser, randn(*SHAPE).float(), method=method)
            assert list_evaluations(process, method) == asked


def test_clipping_holds_for_every_method() -> None:
    for method in ("ddpm", "ddim", "euler", "heun", "dpm_solver++", "unipc"):
        process = flow("8") if METHODS[method].process is RectifiedFlow else gaussian("8")
        predictions: list[Tensor] = []
        note = lambda step, total, x, clean, seen=predictions: seen.append(clean)  # noqa: E731
        options = {"method": method, "clip_denoised": True, "callback": note}
        found = sample(process, lambda x, t: -3 * x, randn(*SHAPE), **options)
        assert all(clean.abs().max() <= 1 for clean in predictions), method
        torch.testing.assert_close(found, predictions[-1], rtol=1e-9, atol=1e-9)  # t = 0 gives the clean clip


def test_callback_sees_every_step_and_x_start_fn_is_applied() -> None:
    seen = []
    note = lambda step, total, x, clean: seen.append((step, total, x.shape, clean.unique().item()))  # noqa: E731
    quarter = lambda clean: torch.full_like(clean, 0.25)  # noqa: E731
    options = {"method": "ddim", "x_start_fn": quarter, "callback": note}
    found = sample(gaussian("6"), perfect_denoiser, randn(*SHAPE), **options)
    assert seen == [(step, 6, torch.Size(SHAPE), 0.25) for step in range(1, 7)]
    torch.testing.assert_close(found, torch.full_like(found, 0.25))


@pytest.mark.parametrize(
    ("process", "options", "message"),
    [
        (gaussian("4"), {"method": "euler"}, "'euler' does not support diffusion.prediction=epsilon"),
        (flow("4"), {"method": "ddpm"}, "choose euler | heun | dpm_solver++ | sde_dpm_solver++ | unipc"),
        (gaussian("4"), {"method": "plms"}, "choose ddpm | ddim | ddim_reverse | dpm_solver++"),
        (gaussian("4"), {"method": "ddpm", "eta": 0.5}, "eta=0.5 is read only by method ddim"),
    ],
)
def test_options_that_do_not_fit_are_a_sentence(process: Any, options: dict[str, Any], message: str) -> None:
    refuses(re.escape(message), sample, process, perfect_denoiser, randn(*SHAPE), **options)


@pytest.mark.parametrize("prediction", ["epsilon", "velocity", "flow"])
def test_nothing_waits_for_the_device(prediction: str) -> None:
    """On the meta device, where reading a value fails: no table is left behind and no number is read back."""
    config = DiffusionConfig(prediction=prediction)
    process = build_diffusion(config, learn_sigma=prediction != "flow", respacing="3").to("meta")
    x = torch.zeros(SHAPE, device="meta")

    def denoiser(x: Tensor, timesteps: Tensor) -> Tensor:
        assert timesteps.device.type == "meta"
        return x if prediction == "flow" else torch.cat([x, x], 2)

    for method, row in METHODS.items():
        if isinstance(process, row.process):
            assert sample(process, denoiser, x, method=method).shape == x.shape
    timesteps, _ = build_timestep_sampler(config).timesteps_from_uniform(torch.zeros(SHAPE[0], device="meta"))
    assert process.training_losses(denoiser, x, timesteps, x).loss.shape == (SHAPE[0],)
