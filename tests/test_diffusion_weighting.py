"""Min-SNR weights, against diffusers' signal-to-noise ratio and the equal loss of all predictions."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from diffusion import DiffusionConfig, GaussianDiffusion, weigh_terms

GAMMA = 3.0
STEPS = torch.tensor([[0, 150], [400, 999]])  # (B, F)


@pytest.mark.parametrize("prediction", ["x_start", "epsilon", "velocity"])
@pytest.mark.parametrize("timesteps", [STEPS, STEPS[:, 0]], ids=["per frame", "per clip"])
def test_all_predictions_minimise_the_same_loss(prediction: str, timesteps: torch.Tensor) -> None:
    """A network whose clean clip is off by `error` has the loss min(snr, gamma) * error^2 whatever it predicts."""
    config = DiffusionConfig(prediction=prediction, loss_weighting="min_snr", min_snr_gamma=GAMMA)
    diffusion = GaussianDiffusion(config, learn_sigma=False)
    clip, noise, error = torch.randn(3, 2, 2, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def off_by_error(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return diffusion.target(clip + error, diffusion.noise_from_x_start(clip + error, x, times), times)

    terms = diffusion.training_losses(off_by_error, clip, timesteps, noise)
    snr = compute_snr(DDPMScheduler(beta_start=1e-4, beta_end=0.02), timesteps.flatten()).view(2, -1).double()
    expected = snr.clamp(max=GAMMA) * error.square().mean((2, 3, 4))
    torch.testing.assert_close(weigh_terms(terms, diffusion, timesteps).per_frame(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("other", ["prediction=flow", "loss=kl", "loss=rescaled_kl", "timestep_sampler=loss_aware"])
def test_combinations_without_meaning_are_refused(other: str) -> None:
    key, _, value = other.partition("=")
    with pytest.raises(ValueError, match=r"diffusion\.loss_weighting=min_snr has no meaning"):
        DiffusionConfig(loss_weighting="min_snr", **{key: value})  # type: ignore[arg-type]
