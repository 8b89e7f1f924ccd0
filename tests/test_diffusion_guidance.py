"""Classifier-free guidance: its formula, its neutral scale, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diffusion import guide_denoiser
from tests.conftest import refuses

CHANNELS, NULL = 3, 9


@dataclass
class Labels:
    """Conditions of a batch: labels (B, 1), or None of an unconditional network."""

    values: Tensor | None
    has_null: bool = True

    def null(self) -> Labels:
        if self.values is None or not self.has_null:
            raise ValueError("no null label")
        return Labels(torch.full_like(self.values, NULL))

    def join(self, other: Labels) -> Labels:
        assert self.values is not None and other.values is not None
        return Labels(torch.cat([self.values, other.values]))


class Network:
    """Output (B, F, 2C, H, W) that depends on every input; counts its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, Tensor | None]] = []

    def __call__(self, x: Tensor, timesteps: Tensor, condition: Labels) -> Tensor:
        labels = condition.values
        self.calls.append((len(x), labels))
        value = timesteps.double().view(-1, 1, 1, 1, 1) / 100
        if labels is not None:
            value = value + labels.double().flatten(1).sum(-1).view(-1, 1, 1, 1, 1)
        return torch.cat([x * value, x + value], 2)


def inputs() -> tuple[Tensor, Tensor, Labels]:
    x = torch.randn(2, 4, CHANNELS, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([10, 700]), Labels(torch.tensor([[1], [5]]))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("scale", [7.0, 0.0])
def test_guided_noise_is_the_formula_and_sigma_is_conditional(scale: float, batched: bool) -> None:
    x, timesteps, labels = inputs()
    network = Network()
    conditional, unconditional = Network()(x, timesteps, labels), Network()(x, timesteps, labels.null())
    found = guide_denoiser(network, labels, scale, channels=CHANNELS, batched=batched)(x, timesteps)
    expected = unconditional + scale * (conditional - unconditional)
    torch.testing.assert_close(found[:, :, :CHANNELS], expected[:, :, :CHANNELS])
    assert torch.equal(found[:, :, CHANNELS:], conditional[:, :, CHANNELS:])
    calls = [(size, seen.tolist()) for size, seen in network.calls if seen is not None]
    halves = [(2, [[1], [5]]), (2, [[NULL], [NULL]])]
    assert calls == ([(4, [[1], [5], [NULL], [NULL]])] if batched else halves)


def test_outside_of_its_interval_guidance_is_one_plain_conditional_call() -> None:
    x, timesteps, labels = inputs()
    network, answers = Network(), iter([False, True])
    denoiser = guide_denoiser(network, labels, 7.0, channels=CHANNELS, active=lambda: next(answers))
    assert torch.equal(denoiser(x, timesteps), Network()(x, timesteps, labels))
    assert not torch.equal(denoiser(x, timesteps), Network()(x, timesteps, labels))
    assert [size for size, _ in network.calls] == [2, 4]


@pytest.mark.parametrize("condition", [Labels(None), Labels(torch.tensor([[1], [5]]), has_null=False)])
def test_a_condition_without_a_null_needs_scale_one_which_is_one_plain_call(condition: Labels) -> None:
    x, timesteps, _ = inputs()
    network = Network()
    found = guide_denoiser(network, condition, 1.0, channels=CHANNELS)(x, timesteps)
    assert torch.equal(found, Network()(x, timesteps, condition))
    assert [size for size, _ in network.calls] == [2]
    refuses("no null label", guide_denoiser, Network(), condition, 4.0, channels=CHANNELS)
