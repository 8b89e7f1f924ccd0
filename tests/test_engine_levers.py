"""The levers of the `objective` section inside a training step, against the seams of the network they stand on."""

import pytest
import torch

from engine.config import load_config
from models import Route
from tests.fault_support import make

GIVEN = "condition.frames=prefix"
TUBELETS = ["model.patch_embedding=tubelet", "model.tubelet_size=2"]
FLOW = ["diffusion.prediction=flow", "model.learn_sigma=false"]


@pytest.mark.parametrize("extra", [[], ["data.num_images=2"], [GIVEN], ["model.temporal_position=rope"]], ids=str)
def test_routed_tokens_are_the_drawn_ones(tiny: list[str], extra: list[str]) -> None:
    """The network gets a route of half the tokens, those of the smallest draws; all other draws stay the same."""
    trainer = make([*tiny, *extra, "objective.route_blocks=[1,3]", "model.depth=4"])
    plain = make([*tiny, *extra, "model.depth=4"])
    (batch,) = next(trainer.batches())
    objective, model = trainer.objective, trainer.state.model
    seen: list[Route] = []
    hook = model.register_forward_pre_hook(lambda _, __, options: seen.append(options["route"]), with_kwargs=True)
    objective(model, batch)
    hook.remove()
    arguments = batch["position"].tolist(), objective.posterior(batch).mean.shape, batch["labels"].shape[1]
    draws, before = objective.draw(*arguments), plain.objective.draw(*arguments)
    assert torch.equal(draws.noise, before.noise) and torch.equal(draws.uniform, before.uniform)
    assert draws.route is not None and before.route is None
    keep = draws.route.argsort(1)[:, : draws.route.shape[1] // 2]
    assert seen[0][:2] == (1, 3) and torch.equal(seen[0].keep, keep)


@pytest.mark.parametrize("extra", [[GIVEN], ["data.num_images=2"], TUBELETS, FLOW], ids=str)
@pytest.mark.parametrize("kind", ["independent", "monotone"])
def test_each_frame_has_the_timestep_of_its_own_draw(tiny: list[str], kind: str, extra: list[str]) -> None:
    trainer, plain = make([*tiny, *extra, f"diffusion.frame_timesteps={kind}"]), make([*tiny, *extra]).objective
    (batch,), objective, seen = next(trainer.batches()), trainer.objective, []
    trainer.state.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    objective(trainer.state.model, batch)
    arguments = batch["position"].tolist(), objective.posterior(batch).mean.shape, batch["labels"].shape[1]
    draws, before = objective.draw(*arguments), plain.draw(*arguments)
    assert torch.equal(draws.noise, before.noise) and torch.equal(draws.label_uniform, before.label_uniform)
    clip, span = draws.uniform[:, : arguments[1][1] - objective.num_images], objective.tubelet_size
    assert draws.uniform.shape == arguments[1][:2] and (clip.diff(dim=1) >= 0).all() == (kind == "monotone")
    assert torch.equal(clip, clip[:, ::span].repeat_interleave(span, 1)) and len(clip.unique()) == clip.numel() // span
    times = draws.uniform * 1000 if extra == FLOW else (draws.uniform * 1000).long()
    assert torch.equal(seen[0], times if draws.given is None else times.masked_fill(draws.given, 0))


def test_layer_sync_is_minus_the_cosine_of_two_blocks(tiny: list[str]) -> None:
    trainer = make([*tiny, "objective.sync_blocks=[0,2]", "objective.sync_weight=0.5", "model.depth=4"])
    (batch,) = next(trainer.batches())
    objective, model = trainer.objective, trainer.state.model
    states: dict[int, torch.Tensor] = {}
    for block in (0, 2):
        model.blocks[block].register_forward_hook(lambda _, __, out, block=block: states.__setitem__(block, out))  # type: ignore[misc]
    result = objective(model, batch)
    early, late = (states[block].double() for block in (0, 2))
    cosine = (early * late).sum(-1) / (early.norm(dim=-1) * late.norm(dim=-1))
    torch.testing.assert_close(result.parts["sync"].double(), -0.5 * cosine.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.loss, result.parts["loss"] + result.parts["sync"])
    gradients = torch.autograd.grad(
        objective.extra_terms(states, {})["sync"].sum(), [states[0], states[2]], allow_unused=True
    )
    assert gradients[0] is not None and gradients[1] is None  # the later block is the target


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["objective.route_blocks=[2]"], r"objective\.route_blocks must be two ascending block indices"),
        (["objective.route_blocks=[1,99]"], r"objective\.route_blocks=\[1, 99\] must end at most at 4"),
        (["objective.sync_blocks=[1,4]"], r"objective\.sync_blocks=\[1, 4\]: the network has only blocks 0 to 3"),
        (["objective.sync_blocks=[0,2]", "objective.route_blocks=[1,3]"], "only one of the two lies inside"),
        (
            ["diffusion.frame_timesteps=monotone", "diffusion.timestep_sampler=loss_aware"],
            r"diffusion\.frame_timesteps=monotone has no meaning with diffusion\.timestep_sampler=loss_aware",
        ),
        (["objective.route_keep=0.3"], r"objective\.route_keep is read only with objective\.route_blocks"),
    ],
)
def test_combinations_without_meaning_are_refused(tiny: list[str], overrides: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load_config(None, [*tiny, "model.depth=4", *overrides])
