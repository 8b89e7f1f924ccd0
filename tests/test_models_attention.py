"""Attention over space and over time: against plain softmax, kernels against brute force, receptive fields."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.nn.attention import SDPBackend

from engine.config import load_config
from engine.distributed import World
from engine.trainer import Trainer
from models import attention
from models.attention import BACKENDS, Call, attend, choose, fused_attention, plain_attention
from models.blocks import MIXERS, Block
from tests.conftest import refuses
from tests.latte_support import brute_force, relative_error

B, F, N, D, HEADS = 2, 5, 6, 12, 3


def tokens(frames: int = F) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, frames, N, D, dtype=torch.float64, generator=generator, requires_grad=True)


def mixer(axis: str) -> torch.nn.Module:
    torch.manual_seed(1)
    return MIXERS[axis](D, HEADS).double()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[tuple[int, ...]], list[int]]]:
    """Shapes of q, k and v, and the order of the kernels, at each call of torch's fused attention."""
    found = []
    original = functional.scaled_dot_product_attention

    def spy(*args: Tensor, **options: object) -> Tensor:
        found.append(([tuple(tensor.shape) for tensor in args], torch._C._get_sdp_priority_order()))
        return original(*args, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    return found


@pytest.mark.parametrize(
    ("axis", "shape"), [("spatial", (B * F, HEADS, N, D // HEADS)), ("temporal", (B, N * HEADS, F, D // HEADS))]
)
def test_fused_attention_gets_four_dimensions(axis: str, shape: tuple[int, ...], seen: list[Any]) -> None:
    """Fused kernels take 4-D tensors only; 5-D ones fall back to the slow path without a word."""
    mixer(axis)(tokens(), F)
    assert [shapes for shapes, _ in seen] == [[shape] * 3]


def test_modulation_is_computed_once_per_sample() -> None:
    block = Block((("spatial",),), D, 2, 2.0, adaln=True).double()
    rows = []
    block.adaLN_modulation.register_forward_hook(lambda module, inputs, output: rows.append(output.shape))
    block(tokens(), torch.randn(B, 1, 1, D, dtype=torch.float64), F)
    block(tokens(F + 2), torch.randn(B, 3, 1, D, dtype=torch.float64), F)
    assert rows == [(B, 1, 1, 6 * D), (B, 3, 1, 6 * D)]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64], ids=["kept", "added"])
@pytest.mark.parametrize("view", ["spatial", "temporal", "clip"])
def test_masks_mean_the_same_to_both_kernels(view: str, dtype: torch.dtype) -> None:
    q, k, v = (tokens().detach().roll(shift, -1).requires_grad_() for shift in range(3))
    rows, length = {"spatial": (B * F, N), "temporal": (B, F), "clip": (B, F * N)}[view]
    keep = torch.rand(rows, 1, length, length, generator=torch.Generator().manual_seed(4)) < 0.7
    keep |= torch.eye(length, dtype=torch.bool)  # no row without a key
    call = Call(q, k, v, view, HEADS, keep if dtype == torch.bool else keep.log().to(dtype))
    first, second = fused_attention(call), plain_attention(call)
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (first, second)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


def test_backends_are_tried_in_the_order_of_the_table(monkeypatch: pytest.MonkeyPatch, seen: list[Any]) -> None:
    monkeypatch.setitem(BACKENDS, "cpu", BACKENDS["cuda"])
    before = torch._C._get_sdp_priority_order()
    mixer("spatial")(tokens(), F)
    wanted = [int(backend) for backend in BACKENDS["cuda"]]
    assert seen[0][1][: len(wanted)] == wanted
    assert torch._C._get_sdp_priority_order() == before
    assert all(order[-1] == SDPBackend.MATH for order in BACKENDS.values())  # which takes every call


@pytest.mark.slow  # compiles with inductor
def test_plain_stays_plain_when_compiled() -> None:
    """Inductor replaces what it takes for attention by torch's kernels, which in bf16 are slow on a CPU."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    q, k, v = torch.randn(3, 1, 4, 6, 16, requires_grad=True).bfloat16()  # of a single clip it did
    torch.compile(lambda: plain_attention(Call(q, k, v, "temporal", 2)), fullgraph=True)()
    assert "fuse_attention" not in counters["inductor"]


@pytest.fixture(autouse=True)
def default() -> Iterator[None]:
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


@pytest.mark.parametrize("view", ["spatial", "temporal", "clip"])
@pytest.mark.parametrize("name", ["fused", "plain"])
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


def test_more_heads_than_a_grid_has_room_for(monkeypatch: pytest.MonkeyPatch, seen: list[Any]) -> None:
    parts = torch.randn(3, 2, 5, 3, 16)
    usual = attend(*parts, "temporal", 2)
    for most, shape in ((5, (6, 2, 5, 8)), (6, (2, 6, 5, 8))):
        monkeypatch.setattr(attention, "MAX_HEADS", most)
        assert torch.equal(attend(*parts, "temporal", 2), usual)
        assert seen[-1][0][0] == shape


def test_the_key_of_a_run_chooses(tiny: list[str]) -> None:
    for name in ("plain", "auto"):
        Trainer(load_config(None, [*tiny, f"train.attention={name}"]), World())
        assert attention._kernel is {"plain": plain_attention, "auto": fused_attention}[name]
    refuses("attention must be one of auto, fused, plain, got 'xformers'", choose, "xformers")
