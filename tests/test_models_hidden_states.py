"""Hidden states of chosen blocks, and routes: tokens that skip a range of blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models import Latte, Route
from models.blocks import LAYER_PLANS
from tests.latte_support import tiny_latte
from tests.t2v_support import inputs, ours_of, theirs

OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"variant": name} for name in LAYER_PLANS},
    "tubelet": {"patch_embedding": "tubelet"},
    "tokens": {"injection": "tokens"},
    "rope": {"temporal_position": "rope"},
    "checkpointing": {"gradient_checkpointing": True},
}
TOKENS = 6  # of a frame
KEEP = torch.tensor([[4, 0, 3], [1, 5, 2]])  # a selection for each clip, not in order
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def network(**changes: Any) -> Latte:
    return tiny_latte(**changes).double()


def batch(images: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(2, 4 + images, 2, 4, 6, generator=generator, dtype=torch.float64),
        "timesteps": torch.tensor([5, 800]),
        "labels": torch.tensor([[0, 2, 1], [1, 0, 3]])[:, : 1 + images],
        "num_images": images,
    }


def record_blocks(blocks: Any) -> tuple[dict[int, Tensor], list[Any]]:
    """Returns a dictionary that hooks fill with the output of each block, and the hooks."""
    seen: dict[int, Tensor] = {}

    def note(index: int) -> Any:
        return lambda module, arguments, output: seen.__setitem__(index, output)

    return seen, [block.register_forward_hook(note(index)) for index, block in enumerate(blocks)]


@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("name", OPTIONS)
def test_hidden_states_are_the_outputs_of_the_blocks(name: str, images: int) -> None:
    model, arguments = network(**OPTIONS[name]), batch(images)
    plain = model(**arguments)
    seen, hooks = record_blocks(model.blocks)
    out, hidden = model(**arguments, return_hidden_states=(3, 1))
    for hook in hooks:
        hook.remove()
    assert torch.equal(out, plain)
    assert sorted(hidden) == [1, 3]
    for index, tokens in hidden.items():
        assert tokens.shape == (2, 4 // model.config.frames_per_token + images, TOKENS, 16)
        assert torch.equal(tokens, seen[index][:, :, :TOKENS])


@pytest.mark.parametrize("name", ["interleaved", "checkpointing"])
def test_a_loss_on_hidden_states_trains_the_blocks_before_them_only(name: str) -> None:
    model = network(**OPTIONS[name]).train()
    _, hidden = model(**batch(), return_hidden_states=[1])
    hidden[1].square().mean().backward()
    reached = [any(p.grad is not None for p in block.parameters()) for block in model.blocks]
    assert reached == [True, True, False, False]


@torch.no_grad()
def test_hidden_states_of_the_text_conditioned_network() -> None:
    model = ours_of(theirs())
    arguments = inputs()
    plain = model(**arguments)
    seen, hooks = record_blocks(model.blocks)
    output, hidden = model(**arguments, return_hidden_states=(1, 2))
    assert plain.hidden_states is None
    assert torch.equal(output, plain.sample)
    assert sorted(hidden) == [1, 2]
    assert all(torch.equal(tokens, seen[index]) for index, tokens in hidden.items())
    assert hidden[1].shape[:2] == (output.shape[0], output.shape[2])
    as_tuple = model(**arguments, return_dict=False, return_hidden_states=(1,))
    assert torch.equal(as_tuple[1][1], hidden[1])
    assert len(model(**arguments, return_dict=False)) == 1
    with pytest.raises(ValueError, match=r"return_hidden_states must be block indices in \[0, \d+\), got \(99,\)"):
        model(**arguments, return_hidden_states=(99,))
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("index", [-1, 4])
def test_a_block_that_does_not_exist_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match=rf"return_hidden_states must be block indices in \[0, 4\), got \({index},\)"):
        network()(**batch(), return_hidden_states=(index,))


def route_by_hand(model: Latte, arguments: dict[str, Any], start: int, stop: int) -> dict[int, Tensor]:
    """Outputs of all blocks, each clip by itself: blocks in [start, stop) get the kept tokens, cut out by indexing."""
    outputs: dict[int, list[Tensor]] = {}
    for row, keep in enumerate(KEEP):
        one = {key: value[row : row + 1] if isinstance(value, Tensor) else value for key, value in arguments.items()}
        images = one["num_images"]
        x = model.x_embedder(one["x"], images) + model.pos_embed
        frames = x.shape[1] - images
        x, condition = model._inject(x, one["timesteps"], one["labels"], frames)
        rotation = model._rotation(frames, x)
        rows = torch.cat([keep, torch.arange(TOKENS, x.shape[2])])
        for index, block in enumerate(model.blocks):
            if index == model.first_temporal_layer:
                x = model._add_time_positions(x, frames)
            if start <= index < stop:
                x = x.clone()
                x[:, :, rows] = block(x[:, :, rows], condition, frames, rotation)
                outputs.setdefault(index, []).append(x[:, :, keep])
            else:
                x = block(x, condition, frames, rotation)
                outputs.setdefault(index, []).append(x[:, :, :TOKENS])
    return {index: torch.cat(parts) for index, parts in outputs.items()}


@pytest.mark.parametrize(("start", "stop", "images"), [(0, 4, 2), (1, 3, 0), (3, 4, 2)])
@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_a_route_equals_blocks_applied_to_the_kept_tokens_of_each_clip(
    name: str, start: int, stop: int, images: int
) -> None:
    model, arguments = network(**OPTIONS[name]), batch(images)
    out, hidden = model(**arguments, route=Route(start, stop, KEEP), return_hidden_states=range(4))
    expected = route_by_hand(model, arguments, start, stop)
    for index in range(4):
        torch.testing.assert_close(hidden[index], expected[index], **CLOSE)
    assert out.shape == model(**arguments).shape
    assert not torch.allclose(out, model(**arguments))


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_a_route_that_keeps_all_tokens_in_any_order_changes_nothing(name: str) -> None:
    model, arguments = network(**OPTIONS[name]), batch(2)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model(**arguments, route=Route(0, 4, order)), model(**arguments), **CLOSE)


def test_gradients_pass_the_kept_tokens_through_the_blocks_and_the_others_past_them() -> None:
    model = network().train()
    entry: list[Tensor] = []
    hook = model.blocks[0].register_forward_hook(lambda module, arguments, output: entry.append(output))
    out = model(**batch(), route=Route(1, 3, KEEP))
    hook.remove()
    entry[0].retain_grad()
    out.sum().backward()
    assert entry[0].grad is not None
    assert bool((entry[0].grad.abs().sum((0, 1, 3)) > 0).all())
    assert all(isinstance(p.grad, Tensor) and p.grad.abs().sum() > 0 for p in model.blocks[1].mlp.parameters())


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 2), (1, 5)])
def test_an_impossible_range_of_blocks_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=rf"route must have 0 <= start < stop <= 4, got \({start}, {stop}\)"):
        network()(**batch(), route=Route(start, stop, KEEP))
