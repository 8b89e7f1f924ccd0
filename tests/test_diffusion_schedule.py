"""Schedules, respacing and tables, against definitions written out by hand."""

import pytest
import torch

from diffusion import DiffusionConfig, GaussianDiffusion, RectifiedFlow, build_diffusion
from diffusion.schedule import linear_betas, respace_timesteps
from tests.conftest import refuses


def test_linear_betas_scale_with_the_number_of_steps() -> None:
    betas = linear_betas(1000)
    assert betas.dtype == torch.float64
    assert betas[[0, -1]].tolist() == pytest.approx([1e-4, 0.02], rel=1e-12)
    # the signal left at the end hardly depends on the number of steps
    ends = [torch.cumprod(1 - linear_betas(steps), 0)[-1].log().item() for steps in (500, 1000, 4000)]
    assert max(ends) - min(ends) < 0.2


def test_too_few_steps_for_the_linear_schedule_is_a_sentence() -> None:
    refuses(r"diffusion\.num_steps=20 is too small", linear_betas, 20)
    assert linear_betas(21).max() < 1


@pytest.mark.parametrize(
    ("respacing", "kept"),
    [
        ("", list(range(12))),
        ("1", [0]),
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
    refuses(f"[Rr]espacing '{respacing}'", respace_timesteps, 12, respacing)


def test_one_step_process_has_finite_tables() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(), respacing="1")
    assert all(table.isfinite().all() for table in diffusion.tables.values())


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
        ({"prediction": "flow", "loss": "kl"}, "diffusion.loss=kl has no meaning with diffusion.prediction=flow"),
        ({"prediction": "flow", "schedule": "cosine"}, "diffusion.schedule=cosine has no meaning"),
        ({"timestep_sampler": "loss_aware", "timestep_shift": 2.0}, "diffusion.timestep_shift=2.0 has no meaning"),
    ],
)
def test_wrong_config_is_a_sentence_that_names_the_key(fields: dict, message: str) -> None:
    refuses(message, DiffusionConfig, **fields)


def test_build_diffusion_chooses_the_process() -> None:
    flow = DiffusionConfig(prediction="flow")
    assert isinstance(build_diffusion(DiffusionConfig(), learn_sigma=True), GaussianDiffusion)
    assert isinstance(build_diffusion(flow, learn_sigma=False, respacing="25"), RectifiedFlow)
    for respacing in ("10,15", "ddim50"):
        refuses("give a number", build_diffusion, flow, learn_sigma=False, respacing=respacing)
