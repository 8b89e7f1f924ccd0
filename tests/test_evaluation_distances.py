"""Distances between features against closed forms, brute force in float64, exact arithmetic and other libraries.

Libraries that are not installed are skipped; the table of agreements and differences is in docs/metrics.md.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evaluation.distances import Moments, frechet_distance, frechet_from_moments, inception_score, kernel_distance
from tests.conftest import refuses

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


@both
@pytest.mark.parametrize(("real", "fake"), [(90, 70), (15, 200), (200, 15)])
def test_frechet_is_the_matrix_root_formula(distance: Distance, real: int, fake: int) -> None:
    """The formula of the first FVD and FID code, which needs more samples than dimensions."""
    x, y = features(real, 12, 1).numpy(), features(fake, 12, 2).numpy()
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
    refuses(message, found.add, bad)
    assert all(torch.equal(value, moments(wide(3)).state[name]) for name, value in found.state.items())


def test_moments_of_one_sample() -> None:
    one = moments(torch.tensor([[1.0, 2.0]]))
    assert one.mean.tolist() == [1, 2] and one.covariance().tolist() == [[0, 0], [0, 0]]
    refuses("real side has 1 samples", frechet_from_moments, one, one)


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
    refuses("", kernel_distance, torch.ones(5, 3), fake)


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


def test_inception_score_of_impossible_rows_is_a_sentence() -> None:
    for rows, sentence in (
        (probabilities(9, 4), "9 samples cannot be split into 10"),
        (torch.randn(20, 4), "probabilities that sum to 1"),
        (torch.full((20, 4), 0.3), "probabilities that sum to 1"),
        (torch.full((20, 4), float("nan")), "NaN"),
        (torch.zeros(0, 4), r"\(0, 4\)"),
    ):
        refuses(sentence, inception_score, rows)


class Identity(nn.Module):
    """The smallest module that torchmetrics accepts as a detector."""

    num_features = 64

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    """Features like those of a detector: float32, not negative, not centred, of unequal number."""
    return torch.relu(features(500, 64, 1).float() / 8), torch.relu(features(620, 64, 2).float() / 8)


def fed(metric: Any, pair: tuple[Tensor, Tensor]) -> Any:
    for features, real in zip(pair, (True, False)):
        metric.update(features, real=real)
    return metric.compute()


def test_frechet_of_other_libraries(pair: tuple[Tensor, Tensor]) -> None:
    """Both divide by N - 1; torch-fidelity keeps its means in float32."""
    ours, other = (frechet_from_moments(*map(moments, pair), kind) for kind in ("n-1", "n"))
    theirs = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance(feature=Identity())
    value = fed(theirs.set_dtype(torch.float64), pair).item()
    assert value == pytest.approx(ours, rel=1e-7) and value != pytest.approx(other, rel=1e-5)
    module = pytest.importorskip("torch_fidelity.metric_fid")
    found = module.fid_statistics_to_metric(*map(module.fid_features_to_statistics, pair), verbose=False)
    assert found["frechet_inception_distance"] == pytest.approx(ours, rel=1e-6)


def test_kernel_distance_of_other_libraries(pair: tuple[Tensor, Tensor]) -> None:
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


def test_inception_score_of_other_libraries() -> None:
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
