"""The benchmarks: the reference is the official algorithm, and the commands run where little is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models import LatteConfig
from tools.bench.reference import ReferenceDiffusion, ReferenceLatte, ReferenceTraining, guided_network
from tools.parity.checks import empty_network
from tools.parity.goldens import Goldens

GOLDENS = Path(__file__).parent / "goldens"


def load(name: str) -> Goldens:
    return Goldens(GOLDENS / f"{name}.safetensors", "cpu")


def reference(golden: Goldens) -> ReferenceLatte:
    """The reference with the golden's weights."""
    ours = empty_network(golden.config)
    plain = ReferenceLatte(
        ours.config, in_channels=ours.in_channels, latent_size=ours.latent_size[0], num_frames=ours.num_frames
    )
    plain.load_state_dict(golden.group("state/"))
    return plain


def close(ours: Tensor, wanted: Tensor, relative: float = 1e-5) -> None:
    assert ours.shape == wanted.shape
    assert (ours.double() - wanted.double()).abs().max() <= relative * max(1.0, wanted.abs().max().item())


@pytest.mark.parametrize("name", ["latte_uncond", "latte_class", "latte_img_class", "latte_img_uncond"])
def test_the_reference_network_is_the_official_one(name: str) -> None:
    golden = load(name)
    labels, images = None, golden.config["use_image_num"]
    if golden.config["extras"] == 2:
        labels = torch.cat([golden["y"][:, None], golden["y_image"]], 1) if images else golden["y"]
    model = reference(golden)
    with torch.no_grad():
        close(model(golden["x"], golden["t"], labels, num_images=images), golden["out"])
        if name == "latte_class":
            network = guided_network(model, golden.config["cfg_scale"])
            close(network(golden["cfg_x"], golden["cfg_t"], golden["cfg_y"]), golden["cfg_out"])


def test_the_reference_step_is_the_official_one() -> None:
    golden = load("train_trajectory")
    training = ReferenceTraining(reference(golden), clip=True)
    for index, (loss, norm) in enumerate(zip(golden["loss"], golden["grad_norm"])):
        value = training.step(golden["x0"][index], None, golden["t"][index], golden["noise"][index])
        close(torch.tensor(value), loss)
        close(training.gradient_norm, norm)
    for prefix, model in (("final/", training.model), ("ema/", training.average)):
        state = model.state_dict()
        for key, wanted in golden.group(prefix).items():
            close(state[key], wanted)


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_the_reference_loop_is_the_official_one(method: str) -> None:
    golden, model = load("diffusion"), reference(load("latte_uncond"))
    torch.manual_seed(7)
    close(ReferenceDiffusion(1000, "10").sample(model, golden["loop/z"], method), golden[f"loop/{method}10"])


def test_our_network_equals_the_reference() -> None:
    """Same weights and inputs, output and gradients, labels per image as well."""
    golden = load("latte_img_class")
    ours = empty_network(golden.config)
    ours.load_state_dict(golden.group("state/"))
    plain = ReferenceLatte.like(ours)
    labels = torch.cat([golden["y"][:, None], golden["y_image"]], 1)
    first, second = (
        model(golden["x"], golden["t"], labels, num_images=golden.config["use_image_num"]) for model in (ours, plain)
    )
    close(first, second, 1e-6)
    first.square().mean().backward()
    second.square().mean().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        close(parameter.grad, theirs[name].grad, 1e-6)


def test_the_reference_refuses_what_the_official_code_lacks() -> None:
    with pytest.raises(ValueError, match="interleaved"):
        ReferenceLatte(LatteConfig(name="Latte-S/8", variant="parallel"))
