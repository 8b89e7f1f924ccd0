"""Min-SNR weighting of the squared error (Hang et al. 2023, arXiv 2303.09556, section 3.4)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from .gaussian import GaussianDiffusion
from .losses import LossTerms


def min_snr_weights(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    """Returns the weights of the squared error at signal-to-noise ratios `snr` >= 0, of the same shape.

    min(snr, gamma) for the error of the clean clip, which is the x_start prediction's; the errors of epsilon and
    velocity are snr and snr + 1 times as large (velocity: Salimans & Ho 2022, appendix D).
    """
    clipped = snr.clamp(max=gamma)
    return {"x_start": clipped, "epsilon": clipped / snr, "velocity": clipped / (snr + 1)}[prediction]


def weigh_terms(terms: LossTerms, diffusion: GaussianDiffusion, timesteps: Tensor) -> LossTerms:
    """Returns `terms` with the squared error weighted for `timesteps` (B,) or (B, F); the bound keeps its weight."""
    assert terms.mse is not None  # DiffusionConfig refuses the losses without it
    config = diffusion.config
    signal = diffusion.tables["alphas_cumprod"][timesteps.reshape(len(timesteps), -1)]  # (B, 1 or F) float64
    weights = min_snr_weights(signal / (1 - signal), config.min_snr_gamma, config.prediction)
    return replace(LossTerms.from_frames(terms.mse * weights.to(terms.mse.dtype), terms.vb), extra=terms.extra)
