"""Distances between features against closed forms, brute force in float64 and exact arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evaluation.distances import Moments, frechet_distance, frechet_from_moments, inception_score, kernel_distance

GOLDEN = Path(__file__).parent / "goldens" / "frechet.safetensors"
Distance = Callable[[Tensor, Tensor], float]


def moments(features: Tensor) -> Moments:
    return Moments(features.shape[1]).add(features)


def from_moments(real: Tensor, fake: Tensor) -> float:
    return frechet_from_moments(moments(real), moments(fake))


both = pytest.mark.parametrize("distance", [frechet_distance, from_moments])


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


@both
@pytest.mark.parametrize(("real", "fake"), [(50, 60), (7, 200), (200, 7)])
def test_frechet_is_the_eigenvalue_formula(distance: Distance, real: int, fake: int) -> None:
    x, y = features(real, 6, 1), features(fake, 6, 2)
    assert distance(x, y) == pytest.approx(by_eigenvalues(x, y), rel=1e-9)


@both
def test_frechet_is_the_matrix_root_formula(distance: Distance) -> None:
    """The formula of the first FVD and FID code, which needs more samples than dimensions."""
    x, y = features(90, 12, 1).numpy(), features(70, 12, 2).numpy()
    a, b = (np.cov(each, rowvar=False, bias=True) for each in (x, y))
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b)).real
    assert distance(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_the_official_implementation() -> None:
    golden = load_file(GOLDEN)
    real, fake = moments(golden["real"]), moments(golden["fake"])
    assert (real.count, fake.count, len(real.mean)) == (256, 300, 32)
    for value in (frechet_distance(golden["real"], golden["fake"]), frechet_from_moments(real, fake)):
        assert value == pytest.approx(7.2762975352553, rel=1e-12)
    assert frechet_from_moments(real, fake, divisor="n-1") == pytest.approx(7.28975, abs=1e-5)


@both
def test_frechet_of_a_shift_and_a_scale(distance: Distance) -> None:
    x = features(40, 5, 3)
    spread = torch.cov(x.T, correction=0).trace().item()
    assert abs(distance(x, x)) < 1e-9 * spread and abs(distance(x, x.flip(0))) < 1e-9 * spread
    assert distance(x, x + 2) == pytest.approx(4 * 5, rel=1e-9)
    mean = x.mean(0)
    assert distance(x, mean + 3 * (x - mean)) == pytest.approx(4 * spread, rel=1e-9)


@both
def test_frechet_with_fewer_samples_than_dimensions(distance: Distance) -> None:
    """Rank-deficient covariances: one direction each, so the answer is known."""
    direction = torch.zeros(30, dtype=torch.float64)
    direction[4] = 1.0
    x = torch.stack([direction, -direction])  # variance 1 along one axis
    assert distance(x, 3 * x) == pytest.approx((3 - 1) ** 2, rel=1e-12)
    other = direction.roll(1)
    assert distance(x, torch.stack([other, -other])) == pytest.approx(2, rel=1e-12)


@pytest.mark.parametrize(("real", "fake"), [(8, 30), (500, 2), (399, 400)])
def test_frechet_from_moments_with_fewer_samples_than_dimensions(real: int, fake: int) -> None:
    """Against the nuclear norm, which needs no covariance."""
    x, y = features(real, 400, 5).float(), features(fake, 400, 6).float() * 0.9
    value = from_moments(x, y)
    assert np.isfinite(value) and value == pytest.approx(frechet_distance(x, y), rel=1e-9)


def test_frechet_divisor() -> None:
    """x against 3 x about its mean: all of it is trace, so the divisors differ by N / (N - 1)."""
    x = features(16, 5, 7)
    x -= x.mean(0)
    real, fake = moments(x), moments(3 * x)
    ratio = frechet_from_moments(real, fake, divisor="n-1") / frechet_from_moments(real, fake, divisor="n")
    assert ratio == pytest.approx(16 / 15, rel=1e-9)


def wide(number: int, dimensions: int = 5) -> Tensor:
    """float32 of which float64 sums depend on the order: magnitudes from 1e-4 to 6e4."""
    generator = torch.Generator().manual_seed(0)
    scale = 10 ** torch.empty(number, dimensions).uniform_(-4, 4.7, generator=generator)
    return torch.randn(number, dimensions, generator=generator).sign() * scale


def test_moments_are_the_mean_and_the_covariance() -> None:
    x = features(90, 7, 8)
    found = moments(x)
    assert found.count == 90
    assert torch.allclose(found.mean, x.mean(0), rtol=1e-12, atol=1e-12)
    for divisor, correction in (("n", 0), ("n-1", 1)):
        expected = torch.cov(x.T, correction=correction)
        assert torch.allclose(found.covariance(divisor), expected, rtol=1e-9, atol=1e-10)


def test_moments_are_the_same_bits_in_the_same_order(tmp_path: Path) -> None:
    """And near in any other; in a file they keep every bit."""
    x = wide(301)
    first, again = (moments(x[:200]).add(x[200:]) for _ in range(2))
    save_file(first.state, tmp_path / "moments.safetensors")
    saved = Moments.from_state(load_file(tmp_path / "moments.safetensors"))
    assert all(torch.equal(value, each.state[name]) for each in (again, saved) for name, value in first.state.items())
    parts = [moments(part) for part in x.flip(0).split(7)]
    total = sum(parts[1:], parts[0])
    assert (total.count, parts[0].count) == (301, 7)
    torch.testing.assert_close(total.covariance(), first.covariance(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("bad", "message"), [(torch.full((2, 5), float("inf")), "NaN or infinity"), (torch.zeros(5), r"\(5,\)")]
)
def test_moments_refuse_features_that_cannot_be(bad: Tensor, message: str) -> None:
    found = moments(wide(3))
    with pytest.raises(ValueError, match=message):
        found.add(bad)
    assert all(torch.equal(value, moments(wide(3)).state[name]) for name, value in found.state.items())


def test_moments_of_one_sample() -> None:
    one = moments(torch.tensor([[1.0, 2.0]]))
    assert one.mean.tolist() == [1, 2] and one.covariance().tolist() == [[0, 0], [0, 0]]
    with pytest.raises(ValueError, match="real side has 1 samples"):
        frechet_from_moments(one, one)


def by_pairs(x: Tensor, y: Tensor) -> float:
    m, dims = x.shape

    def kernel(a: Tensor, b: Tensor) -> float:
        return ((a * b).sum().item() / dims + 1) ** 3

    within = sum(kernel(s[i], s[j]) for s in (x, y) for i, j in itertools.permutations(range(m), 2))
    return within / (m * (m - 1)) - 2 * sum(kernel(a, b) for a in x for b in y) / m**2


def test_kernel_distance_is_the_sum_over_pairs_times_1000() -> None:
    x, y = features(12, 4, 1), features(12, 4, 2)
    mean, deviation = kernel_distance(x, y)
    assert mean == pytest.approx(1000 * by_pairs(x, y), rel=1e-12)
    assert deviation < 1e-9 * mean  # all are taken every time


def test_kernel_distance_takes_subsets_of_the_smaller_number() -> None:
    x, y = features(30, 4, 1), features(12, 4, 1)
    generator = torch.Generator().manual_seed(7)
    expected = []
    for _ in range(5):
        a, b = (each[torch.randperm(len(each), generator=generator)[:9]] for each in (x, y))
        expected.append(1000 * by_pairs(a, b))
    found = kernel_distance(x, y, subsets=5, subset_size=9, seed=7)
    assert found == pytest.approx((np.mean(expected), np.std(expected)), rel=1e-9)
    assert kernel_distance(x, y) == kernel_distance(x, y, subset_size=12)
    assert kernel_distance(x, y, seed=1) != kernel_distance(x, y, seed=2)


@pytest.mark.parametrize("fake", [torch.ones(1, 3), torch.ones(5, 4), torch.full((5, 3), float("nan"))])
def test_kernel_distance_of_impossible_features_is_a_sentence(fake: Tensor) -> None:
    with pytest.raises(ValueError) as error:
        kernel_distance(torch.ones(5, 3), fake)
    assert "\n" not in str(error.value)


def probabilities(number: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randn(number, classes, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(1)


def by_splits(rows: np.ndarray, splits: int) -> tuple[float, float]:
    scores = []
    for i in range(splits):
        part = rows[i * len(rows) // splits : (i + 1) * len(rows) // splits]
        marginal = part.mean(0)
        divergence = [sum(p * np.log(p / q) for p, q in zip(row, marginal) if p > 0) for row in part]
        scores.append(np.exp(np.mean(divergence)))
    return float(np.mean(scores)), float(np.std(scores))


@pytest.mark.parametrize(("number", "splits"), [(43, 10), (10, 10), (7, 1)])
def test_inception_score_is_the_formula(number: int, splits: int) -> None:
    rows = probabilities(number, 6)
    expected = by_splits(rows.double().numpy(), splits)
    assert inception_score(rows, splits=splits) == pytest.approx(expected, rel=1e-9)


def test_inception_score_shuffles_rows_as_numpy_does() -> None:
    rows = probabilities(43, 6)
    shuffled = rows.double().numpy().copy()
    np.random.RandomState(42).shuffle(shuffled)
    assert inception_score(rows, shuffle_seed=42) == pytest.approx(by_splits(shuffled, 10), rel=1e-9)
    assert inception_score(rows, shuffle_seed=42) != pytest.approx(inception_score(rows))


def test_inception_score_from_one_to_the_number_of_classes() -> None:
    assert inception_score(torch.full((20, 8), 1 / 8)) == pytest.approx((1, 0))
    certain = torch.eye(8).repeat(10, 1)  # zeros everywhere else
    assert inception_score(certain, splits=10) == pytest.approx((8, 0))
    assert inception_score(torch.eye(8)[[3] * 20]) == pytest.approx((1, 0))  # classes that nobody has


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (probabilities(9, 4), "9 samples cannot be split into 10"),
        (torch.randn(20, 4), "probabilities that sum to 1"),
        (torch.full((20, 4), 0.3), "probabilities that sum to 1"),
        (torch.full((20, 4), float("nan")), "NaN"),
        (torch.zeros(0, 4), "(0, 4)"),
    ],
)
def test_inception_score_of_what_it_cannot_take_is_a_sentence(rows: Tensor, message: str) -> None:
    with pytest.raises(ValueError) as error:
        inception_score(rows)
    assert message in str(error.value)
