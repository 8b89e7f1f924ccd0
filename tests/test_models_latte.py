"""The network: its parameter counts and what its parts mean. Its outputs: test_tools_check_parity.py (the official
ones) and test_models_reference.py."""

import re
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import Latte, LatteConfig, Route
from models.blocks import LAYER_PLANS
from tests.conftest import refuses
from tests.latte_support import TINY, tiny_latte

OPTIONS = {
    "plain": {},
    "tubelet": {"patch_embedding": "tubelet"},
    "tokens": {"injection": "tokens"},
    "rope": {"temporal_position": "rope"},
}


def batch(images: int = 0, size: tuple[int, int, int] = (4, 4, 6)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    frames, height, width = size
    x = torch.randn(2, frames + images, 2, height, width, generator=generator)
    return x, torch.tensor([5, 800]), torch.randint(0, 4, (2, 1 + images), generator=generator)


PARAMETERS = {"S": 32_480_672, "B": 129_547_040, "L": 456_815_648, "XL": 673_681_568}


def trainable(**fields: Any) -> int:
    with torch.device("meta"):
        model = Latte(LatteConfig(**fields))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_trainable_parameters() -> None:
    assert {size: trainable(name=f"Latte-{size}/2") for size in PARAMETERS} == PARAMETERS
    assert trainable(name="Latte-XL/2", num_classes=101) == 673_799_072
    assert trainable(name="Latte-XL/2", variant="late_fusion") == PARAMETERS["XL"]


@pytest.mark.parametrize(
    ("variant", "patch", "printed"),
    [("interleaved", 2, 5572.69), ("late_fusion", 2, 5572.69), ("sequential", 2, 6153.15), ("parallel", 4, 1545.15)],
)
@torch.no_grad()
def test_costs_printed_in_the_paper(variant: str, patch: int, printed: float) -> None:
    """Multiply-adds of three clips in linear layers and norms, in G: the last variant's are at patch size 4.

    The official code computes the modulation once for each frame in layers over space, and once for each position in
    layers over time. No timestep embedding is counted and, in variants 3 and 4, no patch embedding.
    """
    with torch.device("meta"):
        model = Latte(LatteConfig(name=f"Latte-XL/{patch}", variant=variant))
    positions = (32 // patch) ** 2
    tokens, rows = 16 * positions, {"spatial": 16, "temporal": positions}
    total = 2 * 1152 * 1152 * 16 + 2 * 1152 * tokens  # modulation and norm of the final layer
    for layer, block in zip(LAYER_PLANS[variant](len(model.blocks)), model.blocks, strict=True):
        total += block.adaLN_modulation[1].weight.numel() * sum(rows[axis] for branch in layer for axis in branch)
        total += 2 * 1152 * tokens * (len(layer) + 1)  # a norm before each branch and the MLP
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not re.search("t_embedder|adaLN", name):
            counted = name != "x_embedder.proj" or variant in ("interleaved", "late_fusion")
            total += tokens * module.weight.numel() * counted
    assert 3 * total / 1e9 == pytest.approx(printed, abs=0.006)


@pytest.mark.parametrize("variant", ["sequential", "parallel"])
@pytest.mark.parametrize("size", PARAMETERS)
def test_variants_with_two_attentions_are_of_the_same_size(variant: str, size: str) -> None:
    ratio = trainable(name=f"Latte-{size}/2", variant=variant) / PARAMETERS[size]
    assert abs(ratio - 1) < (0.01 if size == "XL" else 0.02)


@pytest.mark.parametrize(
    ("variant", "option"), [*((variant, "plain") for variant in LAYER_PLANS), *product(["interleaved"], OPTIONS)][1:]
)
def test_a_new_network_outputs_zero_and_learns(variant: str, option: str) -> None:
    config = replace(TINY, variant=variant, **OPTIONS[option])
    model = Latte(config, in_channels=2, latent_size=(4, 6), num_frames=4)
    x, timesteps, labels = batch(images=1)
    out = model(x, timesteps, labels, num_images=1)
    assert torch.equal(out, torch.zeros(2, 5, 4, 4, 6))
    (out - 1).square().sum().backward()
    assert model.final_layer.linear.weight.grad.abs().max() > 0


@torch.no_grad()
def test_new_adaln_layers_are_the_identity_and_new_tables_as_configured() -> None:
    model = Latte(replace(TINY, label_init_std=1.0, num_classes=500))
    x = torch.randn(2, 3, 5, 16)
    for block in model.blocks:
        assert torch.equal(block(x, torch.randn(2, 1, 1, 16), 3), x)
    assert model.y_embedder.embedding_table.weight.std() == pytest.approx(1.0, abs=0.05)
    assert model.t_embedder.mlp[0].weight.std() == pytest.approx(0.02, abs=0.002)


@torch.no_grad()
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(option: str, dtype: torch.dtype) -> None:
    """Position tables follow the network's type, and so do tables computed for another size."""
    model = tiny_latte(**OPTIONS[option])
    for size in ((4, 4, 6), (6, 4, 4)):
        x, timesteps, labels = batch(size=size)
        exact = model(x, timesteps, labels)
        half = tiny_latte(**OPTIONS[option]).to(dtype)(x.to(dtype), timesteps, labels)
        assert half.dtype == dtype
        assert (half.float() - exact).abs().max() < 0.05 * exact.abs().max()
    with torch.autocast("cpu", dtype):
        assert (model(x, timesteps, labels).float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    ("changes", "sizes", "words"),
    [
        ({}, {"latent_size": 5}, ["5 x 5", "2 x 2", "data.image_size"]),
        ({"patch_embedding": "tubelet"}, {"num_frames": 5}, ["5 frames", "model.tubelet_size=2"]),
        ({}, {"num_frames": 0}, ["at least one frame", "0"]),
    ],
)
def test_impossible_sizes(changes: dict, sizes: dict, words: list[str]) -> None:
    refuses(".*".join(map(re.escape, words)), Latte, replace(TINY, **changes), **sizes)


@pytest.mark.parametrize(
    ("changes", "given", "words"),
    [
        ({}, {"x": (2, 4, 3, 4, 6)}, ["(B, F+I, 2, H, W)", "(2, 4, 3, 4, 6)"]),
        ({}, {"x": (2, 4, 2, 4, 5)}, ["4 x 5", "2 x 2"]),
        ({}, {"num_images": 4}, ["at least one frame"]),
        ({}, {"labels": None}, ["model.num_classes=3", "labels", "3"]),
        ({}, {"labels": (2, 3)}, ["labels", "(2,) or (2, 1)", "(2, 3)"]),
        ({}, {"num_images": 1}, ["labels", "(2, 2)", "(2,)"]),
        ({"num_classes": 0}, {}, ["unconditional", "labels"]),
        ({"patch_embedding": "tubelet"}, {"labels": (2, 2), "num_images": 1}, ["3 frames", "model.tubelet_size"]),
        *(
            ({}, {"timesteps": shape}, ["timesteps must be of shape (2,)", "or (2, 4), one per frame"])
            for shape in ((1,), (2, 3), (2, 5), (2, 4, 1))
        ),
        *(
            ({}, {"return_hidden_states": [index]}, [f"must be block indices in [0, 4), got ({index},)"])
            for index in (-1, 4)
        ),
        *(
            ({}, {"route": Route(*ends, torch.arange(2))}, [f"route must have 0 <= start < stop <= 4, got {ends}"])
            for ends in ((-1, 2), (2, 2), (1, 5))
        ),
    ],
)
def test_inputs_that_do_not_fit(changes: dict, given: dict[str, Any], words: list[str]) -> None:
    given = {"x": (2, 4, 2, 4, 6), "timesteps": (2,), "labels": (2,), **given}
    given |= {key: torch.zeros(shape) for key, shape in given.items() if type(shape) is tuple}
    labels = None if given["labels"] is None else given["labels"].long()
    refuses(".*".join(map(re.escape, words)), tiny_latte(**changes), **{**given, "labels": labels})
