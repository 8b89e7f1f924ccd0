"""Densities of training timesteps against their formulae; the loss-aware sampler against brute force."""

import math
import random
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion import DiffusionConfig, LossAwareTimestepSampler, build_timestep_sampler
from engine.distributed import World
from tests.conftest import refuses
from tests.fault_support import on_two_ranks

DRAWS = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000  # even, so histograms are exact to 1e-5


def density(name: str, time: Tensor) -> Tensor:
    if name == "logit_normal":
        logit = (time / (1 - time)).log()
        return torch.exp(-0.5 * logit**2) / math.sqrt(2 * math.pi) / (time * (1 - time))
    return {"uniform": torch.ones_like(time), "linear": 2 * time}[name]


@pytest.mark.parametrize("shift", [1.0, 6.0, 0.5])
@pytest.mark.parametrize("name", ["uniform", "linear", "logit_normal"])
def test_timesteps_follow_the_density(name: str, shift: float) -> None:
    config = DiffusionConfig(timestep_density=name, timestep_shift=shift)
    timesteps, weights = build_timestep_sampler(config).timesteps_from_uniform(DRAWS)
    assert timesteps.dtype == torch.int64
    assert (weights == 1).all()
    found = torch.bincount(timesteps, minlength=1000).view(20, 50).sum(1) / len(DRAWS)
    # change of variables: a shifted time was t / (s - (s - 1) t) before
    unshifted = DRAWS / (shift - (shift - 1) * DRAWS)
    slope = shift / (shift - (shift - 1) * DRAWS) ** 2
    expected = (density(name, unshifted) * slope).view(20, -1).mean(1) / 20
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["uniform", "linear", "logit_normal"])
def test_flow_timesteps_are_the_same_unrounded_and_extreme_draws_stay_in_range(name: str) -> None:
    extremes = torch.tensor([0.0, 1 - 2**-24])  # the ends of torch.rand in float32
    settings: dict[str, Any] = {"timestep_density": name, "timestep_shift": 9.0}
    configs = [DiffusionConfig(**settings), DiffusionConfig(prediction="flow", **settings)]
    gaussian, flow = (build_timestep_sampler(config).timesteps_from_uniform for config in configs)
    timesteps = flow(DRAWS)[0]
    assert timesteps.is_floating_point()
    assert torch.equal(timesteps.long().clamp(max=999), gaussian(DRAWS)[0])
    for draw, most in ((gaussian, 999), (flow, 1000)):
        least, greatest = draw(extremes)[0].tolist()
        assert least == 0
        assert 995 < greatest <= most


def loss_aware(steps: int = 5, history: int = 10) -> LossAwareTimestepSampler:
    return LossAwareTimestepSampler(DiffusionConfig(num_steps=steps, timestep_sampler="loss_aware"), history)


class BruteForce:
    """The last losses of every timestep in queues, one loss at a time."""

    def __init__(self, steps: int, history: int) -> None:
        self.queues: list[deque[float]] = [deque(maxlen=history) for _ in range(steps)]
        self.history = history

    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        for timestep, loss in zip(timesteps.tolist(), losses.tolist()):
            self.queues[timestep].append(loss)

    def probabilities(self) -> list[float]:
        if any(len(queue) < self.history for queue in self.queues):
            return [1 / len(self.queues)] * len(self.queues)
        roots = [math.sqrt(sum(loss**2 for loss in queue) / self.history) for queue in self.queues]
        return [0.999 * root / sum(roots) + 0.001 / len(roots) for root in roots]


def fill(sampler: Any, batches: int = 60, seed: int = 0) -> None:
    """Batches with repeated timesteps, some more often than the history is long."""
    numbers = random.Random(seed)
    for _ in range(batches):
        timesteps = torch.tensor([numbers.choice([0, 1, 2, 2, 2, 3, 4]) for _ in range(12)])
        losses = torch.tensor([numbers.random() * (1 + t) for t in timesteps.tolist()], dtype=torch.float64)
        sampler.update(timesteps, losses)


@pytest.mark.parametrize("history", [3, 10])
def test_loss_aware_probabilities_are_brute_force(history: int) -> None:
    ours, reference = loss_aware(5, history), BruteForce(5, history)
    for seed in range(12):
        expected = torch.tensor(reference.probabilities(), dtype=torch.float64)
        torch.testing.assert_close(ours.probabilities(), expected, rtol=1e-12, atol=0)
        fill(ours, batches=1 + seed, seed=seed)
        fill(reference, batches=1 + seed, seed=seed)
    assert reference.probabilities() != [0.2] * 5


def test_loss_aware_draws_follow_the_probabilities_and_weights_undo_them() -> None:
    sampler = build_timestep_sampler(DiffusionConfig(num_steps=50, timestep_sampler="loss_aware"))
    assert isinstance(sampler, LossAwareTimestepSampler)
    for _ in range(10):
        sampler.update(torch.arange(50), 0.1 + torch.arange(50) ** 2.0)
    timesteps, weights = sampler.timesteps_from_uniform(DRAWS)
    found = torch.bincount(timesteps, minlength=50) / len(DRAWS)
    torch.testing.assert_close(found.double(), sampler.probabilities(), atol=2e-5, rtol=0)
    assert found[49] > 10 * found[10]
    # the weighted mean of any function is its plain mean over timesteps
    assert (weights * timesteps).mean().item() == pytest.approx(24.5, rel=2e-3)
    assert weights.dtype == DRAWS.dtype


def test_loss_aware_state_continues_and_ignores_losses_that_are_not_finite() -> None:
    first, second = loss_aware(), loss_aware()
    fill(first)
    second.load_state_dict(first.state_dict())
    fill(first, batches=3, seed=1)
    fill(second, batches=3, seed=1)
    assert torch.equal(first.probabilities(), second.probabilities())
    second.update(torch.tensor([1, 4]), torch.tensor([float("nan"), float("inf")]))  # not recorded
    assert torch.equal(first.probabilities(), second.probabilities())
    refuses(r"keep diffusion\.num_steps", lambda: loss_aware(6).load_state_dict(first.state_dict()))


def update_on_rank(world: World) -> dict[str, Tensor]:
    sampler = loss_aware(5, history=3)
    sampler.update(torch.tensor([0, 1, 2]) + world.rank, torch.tensor([1.0, 2.0, 3.0]) + 10 * world.rank)
    return sampler.state_dict()


@pytest.mark.dist
def test_loss_aware_ranks_share_one_history(tmp_path: Path) -> None:
    single = loss_aware(5, history=3)
    single.update(torch.tensor([0, 1, 2, 1, 2, 3]), torch.tensor([1.0, 2.0, 3.0, 11.0, 12.0, 13.0]))
    for state in on_two_ranks(tmp_path, update_on_rank):
        assert torch.equal(state["losses"], single.state_dict()["losses"])
        assert torch.equal(state["counts"], single.state_dict()["counts"])
