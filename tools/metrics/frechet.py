"""Frechet distance between two sets of features, the number behind FID and FVD."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Squared Frechet distance between Gaussians fitted to `real` (N, D) and `fake` (M, D).

    |mean_r - mean_f|^2 + tr(cov_r) + tr(cov_f) - 2 tr((cov_r cov_f)^(1/2)), covariances divided by N and M.
    With centred features X and Y the last trace is the nuclear norm of X Y^T / sqrt(N M): no matrix root,
    nothing added to the diagonal, exact for fewer samples than dimensions. In float64.

    Raises:
        ValueError: the features are not (N, D) and (M, D) with N and M at least 2, or hold NaN or infinity.
    """
    _check(real, fake)
    factors, traces = [], 0.0
    means = [features.double().mean(0) for features in (real, fake)]
    for features, mean in zip((real, fake), means):
        centred = (features.double() - mean) / len(features) ** 0.5
        traces += centred.square().sum().item()
        # X = QR: the nuclear norm of X Y^T is that of R_x R_y^T, which is at most D x D
        factors.append(torch.linalg.qr(centred, mode="r").R)
    mean_gap = (means[0] - means[1]).square().sum().item()
    root_trace = torch.linalg.svdvals(factors[0] @ factors[1].T).sum().item()
    return mean_gap + traces - 2 * root_trace


def _check(real: Tensor, fake: Tensor) -> None:
    for name, features in (("real", real), ("fake", fake)):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"The {name} features are {tuple(features.shape)}; they must be (2 or more, dimensions).")
        if not features.isfinite().all():
            raise ValueError(f"The {name} features hold NaN or infinity: look at the detector or its input.")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"The real features have {real.shape[1]} dimensions, the fake ones {fake.shape[1]}: "
            "both must come from one detector."
        )
