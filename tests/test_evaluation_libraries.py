"""Distances against torchmetrics and torch-fidelity on the same features, where they define the same thing.

Neither is a dependency: `pip install torchmetrics torch-fidelity` in an environment of your own runs these. The table
of agreements and differences is in docs/metrics.md.
"""

from __future__ import annotations

from typing import Any

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


def fed(metric: Any, pair: tuple[Tensor, Tensor]) -> Any:
    for features, real in zip(pair, (True, False)):
        metric.update(features, real=real)
    return metric.compute()


def test_frechet_distance(pair: tuple[Tensor, Tensor]) -> None:
    """Both divide by N - 1; torch-fidelity keeps its means in float32."""
    ours, other = (frechet_from_moments(*(Moments(DIMS).add(each) for each in pair), kind) for kind in ("n-1", "n"))
    theirs = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance(feature=Identity())
    value = fed(theirs.set_dtype(torch.float64), pair).item()
    assert value == pytest.approx(ours, rel=1e-7) and value != pytest.approx(other, rel=1e-5)
    module = pytest.importorskip("torch_fidelity.metric_fid")
    found = module.fid_statistics_to_metric(*map(module.fid_features_to_statistics, pair), verbose=False)
    assert found["frechet_inception_distance"] == pytest.approx(ours, rel=1e-6)


def test_kernel_distance(pair: tuple[Tensor, Tensor]) -> None:
    """A thousandth of ours. torchmetrics draws the same subsets; torch-fidelity others, where they are not all."""
    module = pytest.importorskip("torchmetrics.image.kid")
    for size in (20, 500):
        torch.manual_seed(3)
        found = fed(module.KernelInceptionDistance(feature=Identity(), subsets=20, subset_size=size), pair)
        expected = kernel_distance(*pair, subsets=20, subset_size=size, seed=3)
        assert [1000 * each.item() for each in found] == pytest.approx(expected, rel=1e-3)
    module = pytest.importorskip("torch_fidelity.metric_kid")
    whole = pair[0], pair[1][:500]
    found = module.kid_features_to_metric(*whole, kid_subsets=3, kid_subset_size=500, verbose=False)
    expected = kernel_distance(*whole, subsets=3)
    assert 1000 * found["kernel_inception_distance_mean"] == pytest.approx(expected[0], rel=1e-4)


def test_inception_score() -> None:
    """Both take logits. torchmetrics shuffles by torch's own generator, and divides by one split less."""
    logits = torch.randn(203, 30, generator=torch.Generator().manual_seed(1)) * 2
    module = pytest.importorskip("torchmetrics.image.inception")
    theirs = module.InceptionScore(feature=Identity(), splits=10)
    theirs.update(logits[:200])
    torch.manual_seed(4)
    mean, deviation = (each.item() for each in theirs.compute())
    torch.manual_seed(4)
    shuffled = logits[torch.randperm(200)]
    assert (mean, deviation * 0.9**0.5) == pytest.approx(inception_score(shuffled.softmax(1)), rel=1e-5)
    module = pytest.importorskip("torch_fidelity.metric_isc")
    for options, seed in (({"shuffle": False}, None), ({"rng_seed": 2020}, 2020)):  # unequal splits
        found = module.isc_features_to_metric(logits, splits=10, **options)
        expected = inception_score(logits.double().softmax(1), shuffle_seed=seed)
        assert tuple(found.values()) == pytest.approx(expected, rel=1e-9)
