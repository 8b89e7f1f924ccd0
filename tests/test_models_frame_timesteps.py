"""A timestep for each frame: the same as frames evaluated by themselves, wherever frames do not see each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models import Latte
from models.blocks import LAYER_PLANS, Attention
from tests.latte_support import tiny_latte
from tests.t2v_support import inputs, ours_of, theirs

OPTIONS = {
    "adaln": {},
    "tubelet": {"patch_embedding": "tubelet"},
    "tokens": {"injection": "tokens"},
    "tubelet of tokens": {"patch_embedding": "tubelet", "injection": "tokens"},
    "unconditional": {"num_classes": 0},
}
FRAMES, IMAGES, SPAN = 4, 2, 2
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def network(*, mixing: bool, **changes: object) -> Latte:
    """Without `mixing` its attention over time says nothing."""
    model = tiny_latte(size=4, depth=2, **changes).double()
    for module in model.modules():
        if isinstance(module, Attention) and module.axis != "spatial" and not mixing:
            torch.nn.init.zeros_(module.proj.weight)
            torch.nn.init.zeros_(module.proj.bias)
    return model


def clip(images: int = 0) -> Tensor:
    return torch.randn(2, FRAMES + images, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def labels_of(model: Latte, images: int = 0) -> Tensor | None:
    return torch.tensor([[0, 2, 1], [1, 0, 3]])[:, : 1 + images] if model.config.num_classes else None


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("images", [0, IMAGES])
@torch.no_grad()
def test_the_same_timestep_for_all_frames_is_that_of_the_clip(name: str, images: int) -> None:
    model = network(mixing=True, **OPTIONS[name])
    timesteps = torch.tensor([5, 800])
    given = clip(images), labels_of(model, images)
    once = model(given[0], timesteps, given[1], num_images=images)
    each = model(given[0], timesteps[:, None].expand(-1, FRAMES + images), given[1], num_images=images)
    torch.testing.assert_close(each, once, **CLOSE)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("variant", LAYER_PLANS)
@torch.no_grad()
def test_frames_that_do_not_see_each_other_are_evaluated_by_themselves(name: str, variant: str) -> None:
    # rotary positions turn queries and keys only; a table would tell the frames apart
    model = network(mixing=False, variant=variant, temporal_position="rope", **OPTIONS[name])
    span = model.config.frames_per_token
    x, labels = clip(), labels_of(model)
    timesteps = torch.tensor([[0.0, 3.5, 400.0, 999.0], [7.0, 0.0, 0.0, 250.0]]).double()
    timesteps = timesteps[:, ::span].repeat_interleave(span, dim=1)
    together = model(x, timesteps, labels)
    for start in range(0, FRAMES, span):
        alone = model(x[:, start : start + span], timesteps[:, start], labels)
        torch.testing.assert_close(together[:, start : start + span], alone, **CLOSE)
    assert not torch.allclose(together, model(x, timesteps[:, 0], labels), atol=1e-3)


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_images_have_timesteps_of_their_own(name: str) -> None:
    model = network(mixing=True, **OPTIONS[name])
    x, labels = clip(IMAGES), labels_of(model, IMAGES)
    own = torch.tensor([[0, 0, 9, 9, 300, 300], [4, 4, 600, 600, 0, 0]])
    together = model(x, own, labels, num_images=IMAGES)
    of_clip = model(x[:, :FRAMES], own[:, :FRAMES], None if labels is None else labels[:, :1])
    of_images = model(x, own[:, -1], labels, num_images=IMAGES)
    torch.testing.assert_close(together[:, :FRAMES], of_clip, **CLOSE)
    torch.testing.assert_close(together[:, FRAMES:], of_images[:, FRAMES:], **CLOSE)


def test_other_shapes_are_refused() -> None:
    model = network(mixing=True)
    for shape in ((1,), (2, 3), (2, 5), (2, 4, 1)):
        with pytest.raises(ValueError, match=r"timesteps must be of shape \(2,\).* or \(2, 4\), one per frame"):
            model(clip(), torch.zeros(shape), labels_of(model))


@torch.no_grad()
def test_frames_of_the_text_network_by_themselves() -> None:
    model = ours_of(theirs()).double()
    given = inputs(dtype=torch.float64)
    each = model(**{**given, "timestep": given["timestep"][:, None].expand(-1, 4)}).sample
    torch.testing.assert_close(each, model(**given).sample, **CLOSE)
    x, timesteps = given.pop("hidden_states"), torch.tensor([[0, 3, 400, 999], [7, 0, 0, 250]])
    given["enable_temporal_attentions"] = False
    together = model(x, **{**given, "timestep": timesteps}).sample
    for frame in range(4):
        alone = model(x[:, :, [frame]], **{**given, "timestep": timesteps[:, frame]}).sample
        torch.testing.assert_close(together[:, :, [frame]], alone, **CLOSE)


@torch.no_grad()
def test_images_of_the_text_network_have_timesteps_of_their_own() -> None:
    """A block over time modulates each frame by its own timestep, and takes none of the images'."""
    model = ours_of(theirs()).double()
    given = inputs(frames=6, dtype=torch.float64, captions=3)
    x, captions = given["hidden_states"], given["encoder_hidden_states"]
    own = torch.tensor([[0, 9, 40, 9, 300, 300], [4, 600, 7, 600, 0, 0]])
    together = model(x, own, captions, num_images=2).sample
    torch.testing.assert_close(together[:, :, :4], model(x[:, :, :4], own[:, :4], captions[:, 0]).sample, **CLOSE)
    of_images = model(x, own[:, -1], captions, num_images=2).sample
    torch.testing.assert_close(together[:, :, 4:], of_images[:, :, 4:], **CLOSE)
