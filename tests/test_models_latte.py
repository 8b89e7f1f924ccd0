"""The network against the official outputs, the paper's counts, and what its parts mean."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models import Latte, LatteConfig
from models.blocks import LAYER_PLANS

GOLDENS = Path(__file__).resolve().parent / "goldens"
TINY = LatteConfig(name="custom", hidden_size=16, depth=4, num_heads=4, patch_size=2, num_classes=3)
OPTIONS = {
    "plain": {},
    "tubelet": {"patch_embedding": "tubelet"},
    "tokens": {"injection": "tokens"},
    "rope": {"temporal_position": "rope"},
}
networks = pytest.mark.parametrize(
    ("variant", "option"), [*((variant, "plain") for variant in LAYER_PLANS), *product(["interleaved"], OPTIONS)][1:]
)


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = GOLDENS / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"no {path.name} in {GOLDENS}")
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def network_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> Latte:
    """The network of a golden, its weights loaded strictly."""
    own = LatteConfig(
        name="custom",
        **{key: config[key] for key in ("hidden_size", "depth", "num_heads", "patch_size", "learn_sigma")},
        num_classes=config["num_classes"] if config["extras"] == 2 else 0,
        label_dropout=config.get("class_dropout_prob", 0.1),
    )
    sizes = {"in_channels": config["in_channels"], "latent_size": config["input_size"]}
    model = Latte(own, **sizes, num_frames=config["num_frames"])
    state = {key.removeprefix("state/"): value for key, value in tensors.items() if key.startswith("state/")}
    for table in ("pos_embed", "temp_embed"):
        assert torch.equal(model.get_buffer(table), state[table]), f"{table} is computed otherwise"
    model.load_state_dict(state, strict=True)
    return model.eval()


def assert_golden(ours: Tensor, expected: Tensor, bound: float = 1e-6) -> None:
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max().item() <= bound * max(1.0, expected.abs().max().item())


def tiny(seed: int = 0, **changes: Any) -> Latte:
    """A small network with random weights everywhere, for latents (B, 4, 2, 4, 6)."""
    torch.manual_seed(seed)
    model = Latte(replace(TINY, **changes), in_channels=2, latent_size=(4, 6), num_frames=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def batch(images: int = 0, size: tuple[int, int, int] = (4, 4, 6)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    frames, height, width = size
    x = torch.randn(2, frames + images, 2, height, width, generator=generator)
    return x, torch.tensor([5, 800]), torch.randint(0, 4, (2, 1 + images), generator=generator)


# --- official outputs


@torch.no_grad()
def test_unconditional_golden() -> None:
    config, tensors = golden("latte_uncond")
    assert_golden(network_of(config, tensors)(tensors["x"], tensors["t"]), tensors["out"])


@torch.no_grad()
def test_class_conditional_golden_and_guidance() -> None:
    config, tensors = golden("latte_class")
    model = network_of(config, tensors)
    assert model.null_label == config["num_classes"]
    assert_golden(model(tensors["x"], tensors["t"], tensors["y"]), tensors["out"])
    out = model(tensors["cfg_x"], tensors["cfg_t"], tensors["cfg_y"])
    noise, rest = out[:, :, : config["in_channels"]], out[:, :, config["in_channels"] :]
    with_label, without = noise.chunk(2)
    guided = without + config["cfg_scale"] * (with_label - without)
    ours = torch.cat([torch.cat([guided, guided]), rest], dim=2)
    assert_golden(ours, tensors["cfg_out"], bound=1e-5)  # guidance multiplies rounding by its scale


@torch.no_grad()
def test_joint_training_golden() -> None:
    config, tensors = golden("latte_img_uncond")
    images = config["use_image_num"]
    model = network_of(config, tensors)
    assert_golden(model(tensors["x"], tensors["t"], num_images=images), tensors["out"])

    config, tensors = golden("latte_img_class")
    model = network_of(config, tensors)
    labels = torch.cat([tensors["y"][:, None], tensors["y_image"]], dim=1)
    assert model.null_label is None
    assert_golden(model(tensors["x"], tensors["t"], labels, num_images=images), tensors["out"])


@pytest.mark.parametrize("name", ["Latte-S/2", "Latte-XL/2"])
@pytest.mark.parametrize("classes", [0, 101])
def test_keys_and_shapes_are_the_official_ones(name: str, classes: int) -> None:
    path = GOLDENS / "state_dict_keys.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    expected = json.loads(path.read_text())[f"{name} extras={2 if classes else 1}"]
    total = expected.pop("__params__")
    with torch.device("meta"):
        state = Latte(LatteConfig(name=name, num_classes=classes)).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == expected
    assert sum(value.numel() for value in state.values()) == total


# --- counts

PARAMETERS = {"S": 32_480_672, "B": 129_547_040, "L": 456_815_648, "XL": 673_681_568}


def trainable(**fields: Any) -> int:
    with torch.device("meta"):
        model = Latte(LatteConfig(**fields))
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_trainable_parameters() -> None:
    assert {size: trainable(name=f"Latte-{size}/2") for size in PARAMETERS} == PARAMETERS
    assert trainable(name="Latte-XL/2", num_classes=101) == 673_799_072
    assert trainable(name="Latte-XL/2", variant="late_fusion") == PARAMETERS["XL"]


@pytest.mark.parametrize("variant", ["sequential", "parallel"])
@pytest.mark.parametrize("size", PARAMETERS)
def test_variants_with_two_attentions_are_of_the_same_size(variant: str, size: str) -> None:
    ratio = trainable(name=f"Latte-{size}/2", variant=variant) / PARAMETERS[size]
    assert abs(ratio - 1) < (0.01 if size == "XL" else 0.02)


@pytest.mark.parametrize(("variant", "macs"), [("interleaved", 1.8628e12), ("parallel", 2.0598e12)])
def test_forward_on_meta_counts_multiply_adds(variant: str, macs: float) -> None:
    """XL/2, 16 frames of 32x32 latents; by hand: 3.7257 and 4.12 TFLOP, attention included."""
    with torch.device("meta"):
        model = Latte(LatteConfig(variant=variant))
        x, timesteps = torch.empty(1, 16, 4, 32, 32), torch.empty(1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = model(x, timesteps)
    assert out.shape == (1, 16, 8, 32, 32)
    assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=1e-4)


# --- meaning


@networks
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


def test_positions_count_on_or_stretch() -> None:
    """At twice the size, every second stretched row is a trained one; counted-on tables start with it."""
    counted, stretched = tiny(), tiny(position_interpolation=True)
    trained_time, trained_space = counted.temp_embed, counted.pos_embed.unflatten(1, (2, 3))
    assert torch.equal(counted._time_table(8)[:, :4].float(), trained_time)
    assert torch.equal(stretched._time_table(8)[:, ::2].float(), trained_time)
    wide = counted._space_table((4, 6)).unflatten(1, (4, 6)).float()
    fine = stretched._space_table((4, 6)).unflatten(1, (4, 6)).float()
    assert torch.equal(wide[:, :2, :3], trained_space)
    assert torch.equal(fine[:, ::2, ::2], trained_space)
    assert not torch.allclose(fine[:, :2, :3], trained_space)


def test_position_tables_are_those_of_diffusers() -> None:
    """Another implementation of the same tables, on a stretched grid that is not square."""
    from diffusers.models.embeddings import get_1d_sincos_pos_embed_from_grid, get_2d_sincos_pos_embed

    model = Latte(replace(TINY, position_interpolation=True), latent_size=8, num_frames=5)
    plane = get_2d_sincos_pos_embed(16, (8, 6), base_size=4, output_type="pt")
    line = get_1d_sincos_pos_embed_from_grid(16, torch.arange(5), output_type="pt")
    torch.testing.assert_close(model._space_table((8, 6))[0].float(), plane.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(model.temp_embed[0], line.float(), rtol=0, atol=1e-6)


# --- options that change no number


@networks
def test_gradient_checkpointing_changes_no_gradient(variant: str, option: str) -> None:
    x, timesteps, labels = batch(images=1)
    gradients = []
    for checkpointing in (False, True):
        model = tiny(variant=variant, **OPTIONS[option], gradient_checkpointing=checkpointing).train()
        runs = []
        model.blocks[0].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        model(x, timesteps, labels, num_images=1).square().sum().backward()
        assert len(runs) == 1 + checkpointing
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*gradients))


@torch.no_grad()
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(option: str, dtype: torch.dtype) -> None:
    """Position tables follow the network's type, and so do tables computed for another size."""
    model = tiny(**OPTIONS[option])
    for size in ((4, 4, 6), (6, 4, 4)):
        x, timesteps, labels = batch(size=size)
        exact = model(x, timesteps, labels)
        half = tiny(**OPTIONS[option]).to(dtype)(x.to(dtype), timesteps, labels)
        assert half.dtype == dtype
        assert (half.float() - exact).abs().max() < 0.05 * exact.abs().max()
    with torch.autocast("cpu", dtype):
        assert (model(x, timesteps, labels).float() - exact).abs().max() < 0.05 * exact.abs().max()


@torch.no_grad()
def test_labels_variance_and_positions_decide_channels_and_keys() -> None:
    model = Latte(replace(TINY, learn_sigma=False, num_classes=0), in_channels=3, latent_size=4, num_frames=2)
    assert model.out_channels == 3
    assert model(torch.randn(1, 2, 3, 4, 4), torch.tensor([7])).shape == (1, 2, 3, 4, 4)
    assert not any("y_embedder" in key for key in model.state_dict())
    model = tiny()
    assert model.out_channels == 4
    assert (len(model.y_embedder.embedding_table.weight), model.null_label) == (4, 3)
    bare = tiny(label_dropout=0.0)
    assert (len(bare.y_embedder.embedding_table.weight), bare.null_label) == (3, None)
    assert {"pos_embed", "temp_embed"} <= set(model.state_dict())
    assert not {"pos_embed", "temp_embed"} & {name for name, _ in model.named_parameters()}
    assert "temp_embed" not in tiny(temporal_position="rope").state_dict()


# --- mistakes


@pytest.mark.parametrize(
    ("changes", "sizes", "words"),
    [
        ({}, {"latent_size": 5}, ["5 x 5", "2 x 2", "data.image_size"]),
        ({}, {"latent_size": (4, 7)}, ["4 x 7", "2 x 2"]),
        ({"patch_embedding": "tubelet"}, {"num_frames": 5}, ["5 frames", "model.tubelet_size=2"]),
        ({}, {"num_frames": 0}, ["at least one frame", "0"]),
    ],
)
def test_impossible_sizes(changes: dict, sizes: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        Latte(replace(TINY, **changes), **sizes)
    assert all(word in str(raised.value) for word in words)


@pytest.mark.parametrize(
    ("changes", "shape", "labels", "images", "words"),
    [
        ({}, (2, 4, 3, 4, 6), (2,), 0, ["(B, F+I, 2, H, W)", "(2, 4, 3, 4, 6)"]),
        ({}, (2, 2, 4, 6), (2,), 0, ["(2, 2, 4, 6)"]),
        ({}, (2, 4, 2, 4, 5), (2,), 0, ["4 x 5", "2 x 2"]),
        ({}, (2, 4, 2, 4, 6), (2,), 4, ["at least one frame"]),
        ({}, (2, 4, 2, 4, 6), (2,), -1, ["num_images", "-1"]),
        ({}, (2, 4, 2, 4, 6), None, 0, ["model.num_classes=3", "labels", "3"]),
        ({}, (2, 4, 2, 4, 6), (2, 3), 0, ["labels", "(2,) or (2, 1)", "(2, 3)"]),
        ({}, (2, 4, 2, 4, 6), (2,), 1, ["labels", "(2, 2)", "(2,)"]),
        ({"num_classes": 0}, (2, 4, 2, 4, 6), (2,), 0, ["labels", "unconditional"]),
        ({"patch_embedding": "tubelet"}, (2, 4, 2, 4, 6), (2, 2), 1, ["3 frames", "model.tubelet_size"]),
    ],
)
def test_inputs_that_do_not_fit(
    changes: dict, shape: tuple, labels: tuple | None, images: int, words: list[str]
) -> None:
    given = None if labels is None else torch.zeros(labels, dtype=torch.long)
    with pytest.raises(ValueError) as raised:
        tiny(**changes)(torch.zeros(shape), torch.zeros(2), given, num_images=images)
    assert all(word in str(raised.value) for word in words), str(raised.value)
