"""Frechet distance (FVD, FID), kernel distance (KVD, KID) and inception score of features, in float64.

Letters: N real and M fake samples, D dimensions, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

DIVISORS = {"n": 0, "n-1": 1}  # divisor of a covariance -> what it subtracts from the count


class Moments:
    """Mean and covariance of a stream of features, from float64 sums.

    Adding the same features in the same order and batches gives the same bits; extraction does so on any number of
    ranks.

    Args:
        dims: D.
        device: holds the sums; features are moved to it.
    """

    def __init__(self, dims: int, device: torch.device | str = "cpu") -> None:
        self.state = {  # saved, or added to that of another stream
            "count": torch.zeros((), dtype=torch.int64, device=device),
            "sum": torch.zeros(dims, dtype=torch.float64, device=device),
            "squares": torch.zeros(dims, dims, dtype=torch.float64, device=device),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Moments:
        """Restores moments from a copy of `state`."""
        moments = cls(0)
        moments.state = {name: state[name].clone() for name in moments.state}
        return moments

    @torch.no_grad()
    def add(self, features: Tensor) -> Moments:
        """Adds features (B, D); returns self. Raises ValueError for values that are not finite."""
        _check_features("", features, fewest=0)
        rows = features.to(self.state["sum"].device, torch.float64)
        self.state["count"] += len(rows)
        self.state["sum"] += rows.sum(0)
        self.state["squares"] += rows.T @ rows
        return self

    def __add__(self, other: Moments) -> Moments:
        """Returns the moments of both streams."""
        return Moments.from_state({name: mine + other.state[name] for name, mine in self.state.items()})

    @property
    def count(self) -> int:
        """Number of samples so far."""
        return int(self.state["count"])

    @property
    def mean(self) -> Tensor:
        """Mean (D,), float64, on the CPU."""
        return self.state["sum"].cpu() / self.count

    def covariance(self, divisor: str = "n") -> Tensor:
        """Returns the covariance (D, D), float64, on the CPU, with divisor count ("n") or count - 1 ("n-1")."""
        second = self.state["squares"].cpu() / self.count
        return (second - self.mean.outer(self.mean)) * (self.count / (self.count - DIVISORS[divisor]))


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Returns the squared Frechet distance between Gaussians fitted to `real` (N, D) and `fake` (M, D).

    |mean_r - mean_f|^2 + tr(cov_r) + tr(cov_f) - 2 tr((cov_r cov_f)^(1/2)), covariances divided by N and M.
    With centred features X and Y, the last trace is the nuclear norm of X Y^T / sqrt(N M). This needs no matrix root
    and no diagonal offset, and is exact even for fewer samples than dimensions.

    Raises: ValueError if the features are not (N, D) and (M, D) with N, M >= 2, or hold NaN or infinity.
    """
    _check_pair(real, fake)
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


def frechet_from_moments(real: Moments, fake: Moments, divisor: str = "n") -> float:
    """Returns `frechet_distance` from means and covariances.

    With cov_r = R R^T, tr((cov_r cov_f)^(1/2)) is the sum of the square roots of the eigenvalues of R^T cov_f R, all
    real and non-negative. At most min(N, M) - 1 of them are non-zero; the others are rounding errors and are omitted,
    so the result is accurate for fewer samples than dimensions.

    Args:
        divisor: of the covariances, "n" (StyleGAN-V, Latte) or "n-1" (the first FVD code and most libraries).

    Raises: ValueError for fewer than two samples on a side.
    """
    for name, side in (("real", real), ("fake", fake)):
        if side.count < 2:
            raise ValueError(f"The {name} side has {side.count} samples; a covariance needs at least 2.")
    covariances = [side.covariance(divisor) for side in (real, fake)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt()  # cov_r = root root^T
    rank = min(real.count, fake.count) - 1
    product = torch.linalg.eigvalsh(root.T @ covariances[1] @ root)[-rank:]
    mean_gap = (real.mean - fake.mean).square().sum()
    traces = covariances[0].trace() + covariances[1].trace()
    return (mean_gap + traces - 2 * product.clamp(min=0).sqrt().sum()).item()


def kernel_distance(
    real: Tensor, fake: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Returns the mean and standard deviation, times 1000, of squared MMD over random subsets (KID; KVD on clips).

    Binkowski et al., arXiv 1801.01401. The kernel is (x.y / D + 1)^3; the estimate is unbiased, so it can be negative.

    Args:
        real, fake: (N, D) and (M, D); the subsets depend on their order.
        subsets: number of subsets, which is also the divisor of the variance.
        subset_size: samples per side, drawn without replacement; limited by the smaller side.
        seed: of the draw.

    Raises: ValueError as for `frechet_distance`.
    """
    _check_pair(real, fake)
    size = min(len(real), len(fake), subset_size)
    generator = torch.Generator().manual_seed(seed)

    def draw(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:size].to(features.device)].double()

    values = torch.tensor([_squared_mmd(draw(real), draw(fake)) for _ in range(subsets)], dtype=torch.float64)
    return 1000 * values.mean().item(), 1000 * values.std(correction=0).item()


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    """Returns the unbiased estimate of squared MMD from x (m, D) and y (m, D)."""
    m, dims = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dims + 1) ** 3

    within = [kernel(each, each) for each in (x, y)]
    pairs = sum(each.sum() - each.trace() for each in within) / (m * (m - 1))
    return (pairs - 2 * kernel(x, y).mean()).item()


def inception_score(probabilities: Tensor, *, splits: int = 10, shuffle_seed: int | None = None) -> tuple[float, float]:
    """Returns the mean and standard deviation over splits of exp(mean KL(p(class | sample) || p(class))).

    Salimans et al., arXiv 1606.03498. Split i holds samples floor(i N / splits) to floor((i + 1) N / splits) - 1; zero
    probabilities contribute zero.

    Args:
        probabilities: (N, C), rows that sum to 1.
        splits: number of splits, which is also the divisor of the variance.
        shuffle_seed: seed of the NumPy RandomState that shuffles samples first; video IS uses 42. None: no shuffle.

    Raises: ValueError for rows that are not probabilities, or fewer samples than splits.
    """
    _check_features("", probabilities, fewest=1)
    rows = probabilities.detach().cpu().double()
    if rows.min() < 0 or (rows.sum(1) - 1).abs().max() > 1e-3:
        raise ValueError("The inception score needs rows of probabilities that sum to 1.")
    if len(rows) < splits:
        raise ValueError(f"{len(rows)} samples cannot be split into {splits}: give 1 to {len(rows)} splits.")
    if shuffle_seed is not None:
        rows = rows[torch.from_numpy(np.random.RandomState(shuffle_seed).permutation(len(rows)))]
    ends = [i * len(rows) // splits for i in range(splits + 1)]
    parts = [rows[start:end] for start, end in pairwise(ends)]
    # exp of the mean over samples of sum p (log p - log mean p)
    scores = torch.stack([(torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))).sum(1).mean().exp() for p in parts])
    return scores.mean().item(), scores.std(correction=0).item()


def _check_pair(real: Tensor, fake: Tensor) -> None:
    for name, features in (("real ", real), ("fake ", fake)):
        _check_features(name, features, fewest=2)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"The real features have {real.shape[1]} dimensions, the fake ones {fake.shape[1]}: "
            "both must come from the same detector."
        )


def _check_features(name: str, features: Tensor, fewest: int) -> None:
    if features.ndim != 2 or len(features) < fewest or not features.shape[1]:
        raise ValueError(
            f"The {name}features are {tuple(features.shape)}; they must be ({fewest} or more, dimensions)."
        )
    if not features.isfinite().all():
        raise ValueError(f"The {name}features hold NaN or infinity: check the detector and its input.")
