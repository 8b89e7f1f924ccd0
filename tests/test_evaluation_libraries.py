"""Distances against torchmetrics and torch-fidelity on the same features, where they define the same thing.

Neither is a dependency: `pip install torchmetrics torch-fidelity` in an environment of your own runs these. The table
of agreements and differences is in docs/metrics.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evaluation.distances import Moments, frechet_from_moments, inception_score, kernel_distance

DIMS = 64


class Identity(nn.Module):
    """The smallest module that the libraries accept as a detector."""

    num_features = DIMS

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    """Features like those of a detector: float32, not negative, not centred, of unequal number."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(DIMS, DIMS, generator=generator) / 8
    real, fake = (torch.randn(number, DIMS, generator=generator) for number in (500, 620))
    return torch.relu(real @ mix), torch.relu(1.1 * fake @ mix + 0.1)


def frechet(pair: tuple[Tensor, Tensor], divisor: str) -> float:
    real, fake = (Moments(DIMS).add(features) for features in pair)
    return frechet_from_moments(real, fake, divisor)


def fed(metric: Any, pair: tuple[Tensor, Tensor]) -> Any:
    for features, real in zip(pair, (True, False)):
        metric.update(features, real=real)
    return metric.compute()


# ---- torchmetrics ------------------------------------------------------------------------------------


def test_frechet_is_that_of_torchmetrics(pair: tuple[Tensor, Tensor]) -> None:
    """It divides by N - 1."""
    theirs = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance(feature=Identity())
    value = fed(theirs.set_dtype(torch.float64), pair).item()
    assert value == pytest.approx(frechet(pair, "n-1"), rel=1e-7)
    assert value != pytest.approx(frechet(pair, "n"), rel=1e-5)


@pytest.mark.parametrize("size", [20, 500])
def test_kernel_distance_is_that_of_torchmetrics(pair: tuple[Tensor, Tensor], size: int) -> None:
    """A thousandth of ours, of the same subsets: it draws them with torch's own generator, in the same order."""
    module = pytest.importorskip("torchmetrics.image.kid")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        found = fed(module.KernelInceptionDistance(feature=Identity(), subsets=20, subset_size=size), pair)
    expected = kernel_distance(*pair, subsets=20, subset_size=size, seed=3)
    assert [1000 * each.item() for each in found] == pytest.approx(expected, rel=1e-3)


def test_inception_score_is_that_of_torchmetrics() -> None:
    """Its deviation is over one split less; it shuffles by torch's own generator, and takes logits."""
    module = pytest.importorskip("torchmetrics.image.inception")
    logits = torch.randn(200, 30, generator=torch.Generator().manual_seed(1)) * 2
    theirs = module.InceptionScore(feature=Identity(), splits=10)
    theirs.update(logits)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        mean, deviation = (each.item() for each in theirs.compute())
        torch.manual_seed(4)
        shuffled = logits[torch.randperm(200)]
    expected = inception_score(shuffled.softmax(1))
    assert (mean, deviation * 0.9**0.5) == pytest.approx(expected, rel=1e-5)


# ---- torch-fidelity ----------------------------------------------------------------------------------


def test_frechet_is_that_of_torch_fidelity(pair: tuple[Tensor, Tensor]) -> None:
    """It divides by N - 1, and keeps its means in float32."""
    module = pytest.importorskip("torch_fidelity.metric_fid")
    found = module.fid_statistics_to_metric(*map(module.fid_features_to_statistics, pair), verbose=False)
    assert found["frechet_inception_distance"] == pytest.approx(frechet(pair, "n-1"), rel=1e-6)


def test_kernel_distance_is_that_of_torch_fidelity(pair: tuple[Tensor, Tensor]) -> None:
    """A thousandth of ours; where subsets are all samples. Of smaller ones it draws others."""
    module = pytest.importorskip("torch_fidelity.metric_kid")
    real, fake = pair[0], pair[1][:500]
    found = module.kid_features_to_metric(real, fake, kid_subsets=3, kid_subset_size=500, verbose=False)
    mean, _ = kernel_distance(real, fake, subsets=3)
    assert 1000 * found["kernel_inception_distance_mean"] == pytest.approx(mean, rel=1e-4)
    found = module.kid_features_to_metric(*pair, kid_subsets=200, kid_subset_size=100, verbose=False)
    mean, deviation = kernel_distance(*pair, subsets=200, subset_size=100)
    assert 1000 * found["kernel_inception_distance_mean"] == pytest.approx(mean, abs=5 * deviation / np.sqrt(200))


def test_inception_score_is_that_of_torch_fidelity() -> None:
    """In every split, also where they are unequal, and of the same shuffle. It takes logits."""
    module = pytest.importorskip("torch_fidelity.metric_isc")
    logits = torch.randn(203, 30, generator=torch.Generator().manual_seed(1)) * 2
    for options, seed in (({"shuffle": False}, None), ({"rng_seed": 2020}, 2020)):
        found = module.isc_features_to_metric(logits, splits=10, **options)
        expected = inception_score(logits.double().softmax(1), shuffle_seed=seed)
        assert tuple(found.values()) == pytest.approx(expected, rel=1e-9)
