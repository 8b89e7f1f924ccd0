"""Schedules, respacing and tables, against definitions written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal

from diffusion import DiffusionConfig, GaussianDiffusion, RectifiedFlow, build_diffusion
from diffusion.schedule import cosine_betas, gaussian_tables, linear_betas, respace_betas, respace_timesteps


def test_linear_betas_scale_with_the_number_of_steps() -> None:
    betas = linear_betas(1000)
    assert betas.dtype == torch.float64
    assert betas[[0, -1]].tolist() == pytest.approx([1e-4, 0.02], rel=1e-12)
    # the signal left at the end hardly depends on the number of steps
    ends = [torch.cumprod(1 - linear_betas(steps), 0)[-1].log().item() for steps in (500, 1000, 4000)]
    assert max(ends) - min(ends) < 0.2


def test_cosine_betas_give_the_squared_cosine() -> None:
    signal = torch.cumprod(1 - cosine_betas(1000), 0)
    for step in (0, 10, 500, 900):
        start, end = (math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, (step + 1) / 1000))
        assert signal[step].item() == pytest.approx(end / start, rel=1e-9)
    assert cosine_betas(1000).max() == 0.999


def test_too_few_steps_for_the_linear_schedule_is_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"diffusion\.num_steps=20 is too small"):
        linear_betas(20)
    assert linear_betas(21).max() < 1


@pytest.mark.parametrize(
    ("respacing", "kept"),
    [
        ("", list(range(12))),
        ("12", list(range(12))),
        ("1", [0]),
        ("2", [0, 11]),
        ("ddim6", [0, 2, 4, 6, 8, 10]),
        ("ddim4", [0, 3, 6, 9]),
        ("2,3", [0, 5, 6, 8, 11]),  # 8.5 rounds to even
        ("1, 1, 4", [0, 4, 8, 9, 10, 11]),
    ],
)
def test_respacing(respacing: str, kept: list[int]) -> None:
    assert respace_timesteps(12, respacing) == kept
    assert respace_timesteps(11, "6,5") == list(range(11))  # the first section gets the surplus


@pytest.mark.parametrize("respacing", ["13", "0", "-3", "ddim", "ddim13", "ddim7", "ten", "2,,3", "1.5", "7,1"])
def test_impossible_respacing_is_a_sentence_that_repeats_it(respacing: str) -> None:
    with pytest.raises(ValueError, match=f"[Rr]espacing '{respacing}'"):
        respace_timesteps(12, respacing)


def test_respaced_process_visits_the_same_noise_levels() -> None:
    betas = linear_betas(1000)
    kept = respace_timesteps(1000, "10,15,20")
    short = torch.cumprod(1 - respace_betas(betas, kept), 0)
    torch.testing.assert_close(short, torch.cumprod(1 - betas, 0)[kept], rtol=1e-12, atol=0)


@pytest.mark.parametrize("step", [1, 3, 7])
def test_posterior_is_bayes_rule(step: int) -> None:
    """q(x_{t-1} | x_t, x_0) by numerical integration of q(x_t | x_{t-1}) q(x_{t-1} | x_0)."""
    betas = torch.linspace(0.05, 0.4, 8, dtype=torch.float64)
    tables = gaussian_tables(betas)
    x_start, x = 0.7, -0.4
    grid = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    before = torch.cumprod(1 - betas, 0)[step - 1]
    weight = Normal(before.sqrt() * x_start, (1 - before).sqrt()).log_prob(grid).exp()
    forward = Normal((1 - betas[step]).sqrt() * grid, betas[step].sqrt())
    weight = weight * forward.log_prob(torch.tensor(x, dtype=torch.float64)).exp()
    mean = (weight * grid).sum() / weight.sum()
    variance = (weight * (grid - mean) ** 2).sum() / weight.sum()
    ours = tables["posterior_mean_coef1"][step] * x_start + tables["posterior_mean_coef2"][step] * x
    assert ours.item() == pytest.approx(mean.item(), abs=1e-9)
    assert tables["posterior_variance"][step].item() == pytest.approx(variance.item(), rel=1e-9)
    assert tables["posterior_log_variance_clipped"][step].exp().item() == pytest.approx(variance.item(), rel=1e-9)


def test_one_step_process_has_finite_tables_and_the_network_gets_the_original_timesteps() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(), respacing="1")
    assert all(table.isfinite().all() for table in diffusion.tables.values())
    diffusion = GaussianDiffusion(DiffusionConfig(), respacing="ddim50")
    timesteps = diffusion.network_timesteps(torch.tensor([0, 7, 49]))
    assert timesteps.tolist() == [0, 140, 980]
    assert timesteps.dtype == torch.int64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "quad"}, "diffusion.schedule must be one of linear, cosine, got 'quad'"),
        ({"prediction": "noise"}, "diffusion.prediction must be one of"),
        ({"loss": "l1"}, "diffusion.loss must be one of"),
        ({"fixed_variance": "big"}, "diffusion.fixed_variance"),
        ({"timestep_density": "cosine"}, "diffusion.timestep_density"),
        ({"timestep_sampler": "random"}, "diffusion.timestep_sampler"),
        ({"num_steps": 0}, "diffusion.num_steps must be at least 1, got 0"),
        ({"timestep_shift": 0.0}, "diffusion.timestep_shift must be positive and finite, got 0.0"),
        ({"timestep_shift": float("nan")}, "diffusion.timestep_shift must be positive and finite, got nan"),
        (
            {"prediction": "flow", "loss": "kl"},
            "diffusion.loss=kl has no meaning with diffusion.prediction=flow",
        ),
        ({"prediction": "flow", "schedule": "cosine"}, "diffusion.schedule=cosine has no meaning"),
        (
            {"timestep_sampler": "loss_aware", "timestep_shift": 2.0},
            "diffusion.timestep_shift=2.0 has no meaning",
        ),
    ],
)
def test_wrong_config_is_a_sentence_that_names_the_key(fields: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        DiffusionConfig(**fields)
    assert message in str(error.value)


def test_build_diffusion_chooses_the_process() -> None:
    flow = DiffusionConfig(prediction="flow")
    assert isinstance(build_diffusion(DiffusionConfig(), learn_sigma=True), GaussianDiffusion)
    assert isinstance(build_diffusion(flow, learn_sigma=False, respacing="25"), RectifiedFlow)
    for respacing in ("10,15", "ddim50"):
        with pytest.raises(ValueError, match="give a number"):
            build_diffusion(flow, learn_sigma=False, respacing=respacing)
