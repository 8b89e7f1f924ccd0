"""models/attention.py: every kernel equals brute force in float64 in every view, and `choose` decides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import load_config
from engine.distributed import World
from engine.trainer import Trainer
from models import attention
from models.attention import attend, choose, fused_attention, plain_attention
from tests.temporal_kernel_support import brute_force, relative_error

VIEWS = ("spatial", "temporal", "text")


@pytest.fixture(autouse=True)
def default() -> Iterator[None]:
    """Each test begins and ends with the default."""
    choose("auto")
    yield
    choose("auto")


def expected(q: Tensor, k: Tensor, v: Tensor, view: str) -> Tensor:
    """By definition: frames, tokens, or both stand where `brute_force` has its frames."""
    if view == "temporal":
        return brute_force(q, k, v, 2)
    if view == "spatial":
        return brute_force(*(each.transpose(1, 2) for each in (q, k, v)), 2).transpose(1, 2)
    flat = [each.flatten(1, 2)[:, :, None] for each in (q, k, v)]
    return brute_force(*flat, 2)[:, :, 0].unflatten(1, q.shape[1:3])


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["auto", "fused", "plain"])
def test_equals_brute_force(name: str, view: str) -> None:
    choose(name)
    qkv = torch.randn(2, 5, 3, 3 * 16, requires_grad=True)
    parts = qkv.chunk(3, dim=-1)
    out, exact = attend(*parts, view, 2), expected(*parts, view)
    assert relative_error(out, exact) < 1e-6
    grad = torch.randn(out.shape)
    (found,) = torch.autograd.grad(out, qkv, grad)
    (wanted,) = torch.autograd.grad(exact, qkv, grad.double())
    assert relative_error(found, wanted.double()) < 1e-6


def test_more_heads_than_a_grid_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [torch.randn(2, 5, 3, 16) for _ in range(3)]
    usual = attend(*parts, "temporal", 2)
    seen = []
    fused_attention = torch.nn.functional.scaled_dot_product_attention

    def watched(q: Tensor, *others: Tensor, **options: Any) -> Tensor:
        seen.append(tuple(q.shape))
        return fused_attention(q, *others, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(attention, "MAX_HEADS", 5)
    assert torch.equal(attend(*parts, "temporal", 2), usual)
    monkeypatch.setattr(attention, "MAX_HEADS", 6)
    assert torch.equal(attend(*parts, "temporal", 2), usual)
    assert seen == [(6, 2, 5, 8), (2, 6, 5, 8)]


def test_unknown_choice_is_named() -> None:
    with pytest.raises(ValueError, match="attention must be one of auto, fused, plain, got 'xformers'"):
        choose("xformers")


def test_the_key_of_a_run_chooses(tiny: list[str]) -> None:
    for name in ("plain", "auto"):
        Trainer(load_config(None, [*tiny, f"train.attention={name}"]), World())
        assert attention._kernel is {"plain": plain_attention, "auto": fused_attention}[name]
    with pytest.raises(ValueError, match=r"train.attention must be one of auto, fused, plain, got 'math'"):
        load_config(None, [*tiny, "train.attention=math"])
