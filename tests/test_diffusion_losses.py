"""Losses and likelihoods, against their definitions and autograd; the official values: test_tools_check_parity.py."""

import math

import pytest
import torch
from torch import Tensor

from diffusion import DiffusionConfig, GaussianDiffusion, RectifiedFlow, build_diffusion
from diffusion.losses import discretized_gaussian_log_likelihood
from tests.conftest import refuses

SHAPE = (3, 4, 2, 3, 5)  # B F C H W
LEVELS = torch.linspace(-1, 1, 256, dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def double_output(seed: int = 5) -> Tensor:
    b, f, c, h, w = SHAPE
    return randn(b, f, 2 * c, h, w, seed=seed)


@pytest.mark.parametrize(("mean", "deviation"), [(0.1, 0.05), (-1.0, 0.3), (0.97, 0.02)])
def test_discretized_likelihood_is_a_distribution_over_256_levels(mean: float, deviation: float) -> None:
    log_scale = torch.full_like(LEVELS, math.log(deviation))
    probability = discretized_gaussian_log_likelihood(LEVELS, torch.full_like(LEVELS, mean), log_scale).exp()
    assert probability.sum().item() == pytest.approx(1.0, abs=1e-6)  # 256 floors of 1e-12
    edges = torch.cat([torch.tensor([-torch.inf]), (LEVELS[1:] + LEVELS[:-1]) / 2, torch.tensor([torch.inf])])
    exact = torch.special.ndtr((edges - mean) / deviation).diff()
    assert (probability - exact).abs().max() < 8e-4  # twice the error of the approximate CDF


@pytest.mark.parametrize(("loss", "plain", "weight"), [("rescaled_mse", "mse", 50 / 1000), ("rescaled_kl", "kl", 50)])
def test_rescaled_losses_weight_the_bound_by_the_number_of_steps(loss: str, plain: str, weight: float) -> None:
    found, expected = (
        GaussianDiffusion(DiffusionConfig(num_steps=50, loss=kind)).training_losses(
            lambda *_: double_output(), randn(*SHAPE).clamp(-1, 1), torch.tensor([0, 20, 49]), randn(*SHAPE, seed=1)
        )
        for kind in (loss, plain)
    )
    assert expected.vb is not None and (expected.mse is None) == (plain == "kl")
    bound = weight * expected.vb
    torch.testing.assert_close(found.vb, bound)
    torch.testing.assert_close(found.per_frame(), bound if expected.mse is None else expected.mse + bound)
    torch.testing.assert_close(found.loss, found.per_frame().mean(1))


def gradients(loss: str) -> tuple[Tensor, Tensor]:
    diffusion = GaussianDiffusion(DiffusionConfig(loss=loss))
    output = double_output().requires_grad_()
    timesteps, noise = torch.tensor([3, 400, 900]), randn(*SHAPE, seed=1)
    diffusion.training_losses(lambda *_: output, randn(*SHAPE), timesteps, noise).loss.sum().backward()
    assert output.grad is not None
    first, second = output.grad.chunk(2, dim=2)
    return first, second


def test_the_bound_trains_only_the_variance_when_the_squared_error_trains_the_mean() -> None:
    prediction, variance = gradients("mse")
    by_hand = 2 * (double_output()[:, :, :2] - randn(*SHAPE, seed=1)) / randn(*SHAPE)[0].numel()
    torch.testing.assert_close(prediction, by_hand, rtol=1e-10, atol=1e-14)
    assert (variance != 0).all()
    prediction, variance = gradients("kl")
    assert (prediction - by_hand).abs().max() > 1e-4
    assert (variance != 0).all()


@pytest.mark.parametrize(
    ("prediction", "target"),
    [
        ("epsilon", lambda signal, x_start, noise: noise),
        ("x_start", lambda signal, x_start, noise: x_start),
        ("velocity", lambda signal, x_start, noise: signal.sqrt() * noise - (1 - signal).sqrt() * x_start),
    ],
)
def test_prediction_targets(prediction: str, target) -> None:  # type: ignore[no-untyped-def]
    diffusion = GaussianDiffusion(DiffusionConfig(prediction=prediction), learn_sigma=False)
    x_start, noise, timesteps = randn(*SHAPE), randn(*SHAPE, seed=1), torch.tensor([0, 500, 999])
    signal = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[timesteps]
    expected = target(signal.view(3, 1, 1, 1, 1), x_start, noise)
    x = diffusion.q_sample(x_start, timesteps, noise)
    torch.testing.assert_close(diffusion.target(x_start, noise, timesteps), expected, rtol=1e-10, atol=1e-10)
    # the right answer has loss 0 and gives back the clean clip
    loss = diffusion.training_losses(lambda *_: expected, x_start, timesteps, noise).loss
    assert loss.max() < 1e-18
    clean = diffusion.p_mean_variance(expected, x, timesteps).pred_x_start
    torch.testing.assert_close(clean, x_start, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("learn_sigma", "channels"), [(True, 2), (False, 4)])
def test_output_of_the_wrong_width_is_a_sentence(learn_sigma: bool, channels: int) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(), learn_sigma=learn_sigma)
    output = torch.zeros(SHAPE[0], SHAPE[1], channels, *SHAPE[3:])
    with pytest.raises(ValueError, match=r"model\.learn_sigma"):
        diffusion.training_losses(lambda *_: output, randn(*SHAPE), torch.zeros(3).long(), randn(*SHAPE))


def test_half_precision_output_is_lossless_in_the_loss_dtype() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig())
    output = double_output().to(torch.bfloat16)
    inputs = (randn(*SHAPE).float(), torch.tensor([0, 10, 999]), randn(*SHAPE, seed=1).float())
    half = diffusion.training_losses(lambda *_: output, *inputs).loss
    assert half.dtype == torch.float32
    assert torch.equal(half, diffusion.training_losses(lambda *_: output.float(), *inputs).loss)


def test_flow_loss_and_path() -> None:
    flow = RectifiedFlow(DiffusionConfig(prediction="flow"))
    x_start, noise, output = randn(*SHAPE), randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    timesteps = torch.tensor([0.0, 250.0, 1000.0])
    seen = {}

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        seen.update(x=x, t=t)
        return output

    terms = flow.training_losses(denoiser, x_start, timesteps, noise)
    torch.testing.assert_close(seen["x"][0], x_start[0])
    torch.testing.assert_close(seen["x"][1], 0.75 * x_start[1] + 0.25 * noise[1])
    torch.testing.assert_close(seen["x"][2], noise[2])
    assert torch.equal(seen["t"], timesteps)
    torch.testing.assert_close(terms.loss, (noise - x_start - output).square().mean((1, 2, 3, 4)))
    assert terms.vb is None
    refuses(r"model\.learn_sigma=false", flow.training_losses, lambda *_: double_output(), x_start, timesteps, noise)


@pytest.mark.parametrize(
    ("prediction", "loss"),
    [("epsilon", "mse"), ("epsilon", "kl"), ("x_start", "mse"), ("velocity", "kl"), ("flow", "mse")],
)
def test_every_frame_may_have_its_own_timestep(prediction: str, loss: str) -> None:
    """Equal timesteps give the bits of one per clip, different ones those of clips of one frame."""
    is_flow = prediction == "flow"
    diffusion = build_diffusion(DiffusionConfig(prediction=prediction, loss=loss), learn_sigma=not is_flow)
    x_start, noise, output = randn(*SHAPE), randn(*SHAPE, seed=1), randn(*SHAPE, seed=2) if is_flow else double_output()

    def run(frames: slice, timesteps: Tensor) -> list[Tensor]:
        seen: list[Tensor] = []

        def denoiser(x: Tensor, t: Tensor) -> Tensor:
            assert t.shape == timesteps.shape
            seen.append(x)
            return output[:, frames]

        terms = diffusion.training_losses(denoiser, x_start[:, frames], timesteps, noise[:, frames])
        return [*seen, terms.per_frame()]

    every, timesteps = slice(0, SHAPE[1]), torch.tensor([0, 20, 999])
    rows = timesteps[:, None].expand(-1, SHAPE[1])
    assert all(torch.equal(*pair) for pair in zip(run(every, rows), run(every, timesteps)))
    own = torch.tensor([[0, 3, 400, 999], [7, 0, 0, 250], [500, 501, 1, 2]])
    found = run(every, own)
    for frame in range(SHAPE[1]):
        alone = run(slice(frame, frame + 1), own[:, frame])
        assert all(torch.equal(a[:, frame : frame + 1], b) for a, b in zip(found, alone))
