"""The Frechet distance against closed forms and eigenvalues in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tools.metrics.distances import frechet_distance


def features(number: int, dimensions: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64)
    return torch.randn(number, dimensions, generator=generator, dtype=torch.float64) @ mix + seed


def by_eigenvalues(real: Tensor, fake: Tensor) -> float:
    """tr((AB)^(1/2)) as the sum of square roots of the eigenvalues of AB."""
    covariances = [torch.cov(x.T, correction=0) for x in (real, fake)]
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    trace = covariances[0].trace() + covariances[1].trace()
    return ((real.mean(0) - fake.mean(0)).square().sum() + trace - 2 * roots).item()


@pytest.mark.parametrize(("real", "fake"), [(50, 60), (7, 200), (200, 7)])
def test_frechet_is_the_eigenvalue_formula(real: int, fake: int) -> None:
    x, y = features(real, 6, 1), features(fake, 6, 2)
    assert frechet_distance(x, y) == pytest.approx(by_eigenvalues(x, y), rel=1e-9)


def test_frechet_of_a_shift_and_a_scale() -> None:
    x = features(40, 5, 3)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 2) == pytest.approx(4 * 5, rel=1e-9)
    spread = torch.cov(x.T, correction=0).trace().item()
    mean = x.mean(0)
    assert frechet_distance(x, mean + 3 * (x - mean)) == pytest.approx(4 * spread, rel=1e-9)


def test_frechet_with_fewer_samples_than_dimensions() -> None:
    """Rank-deficient covariances: one direction each, so the answer is known."""
    direction = torch.zeros(30, dtype=torch.float64)
    direction[4] = 1.0
    x = torch.stack([direction, -direction])  # variance 1 along one axis
    assert frechet_distance(x, 3 * x) == pytest.approx((3 - 1) ** 2, rel=1e-12)
    other = direction.roll(1)
    assert frechet_distance(x, torch.stack([other, -other])) == pytest.approx(2, rel=1e-12)


@pytest.mark.parametrize(
    ("real", "fake", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(3, 5), "4 dimensions, the fake ones 5"),
        (torch.zeros(0, 4), torch.zeros(3, 4), "real features are (0, 4)"),
        (torch.zeros(3, 4), torch.full((3, 4), float("nan")), "fake features hold NaN"),
    ],
)
def test_impossible_features_are_a_sentence(real: Tensor, fake: Tensor, message: str) -> None:
    with pytest.raises(ValueError) as error:
        frechet_distance(real, fake)
    assert message in str(error.value)
