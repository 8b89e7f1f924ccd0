"""Guidance, precision, compilation and overlapped decoding: equal to the plain loop where they must be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion import list_evaluations
from engine.build import build_model, build_process
from engine.conditions import class_conditions
from engine.config import Config, load_config
from models.autoencoder import LatentCodec
from sample.decoding import Decoder
from sample.generate import Generator, Guidance
from sample.network import EvaluationCounter
from tests.conftest import random_weights

NETWORK = {
    "model": {"name": "custom", "hidden_size": 32, "depth": 4, "num_heads": 2, "patch_size": 2, "num_classes": 3},
    "codec": {"latent_channels": 3, "downsample_factor": 1, "scale": 1.0},
    "data": {"num_frames": 4, "image_size": 8},
}
FLOW = ["diffusion.prediction=flow", "model.learn_sigma=false"]


def config_of(*overrides: str) -> Config:
    return load_config(None, list(overrides), base=NETWORK)


def generator_of(*overrides: str, device: str = "cpu", **network: Any) -> Generator:
    """A tiny network with random weights, whose `sample` gives latents instead of pixels."""
    config = config_of(*overrides)
    model = build_model(config)
    model.load_state_dict(random_weights(config, 0))
    codec = LatentCodec.from_config(config.codec, device)
    conditions = class_conditions(config.model, torch.device(device))
    generator = Generator(model.requires_grad_(False), codec, config, conditions, device=device, **network)
    generator.decode = lambda indices, latents: latents.cpu().numpy()  # type: ignore[method-assign]
    return generator


def layers_run(generator: Generator) -> list[int]:
    """Filled with the batch size of every call of a layer of `generator`."""
    sizes: list[int] = []
    for block in generator.model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    return sizes


def bound(plain: np.ndarray) -> dict[str, float]:
    return {"rtol": 0, "atol": 1e-5 * max(1.0, float(np.abs(plain).max()))}


# --------------------------------------------------------------------------------------------- guidance


def test_guidance_one_by_one_and_in_an_interval() -> None:
    generator = generator_of()
    sizes = layers_run(generator)
    settings = {"num": 2, "steps": 10, "method": "ddim", "guidance_scale": 3.0}
    joint = generator.sample(**settings)
    assert sizes == [4] * 40
    apart = generator.sample(batched_guidance=False, **settings)
    assert sizes[40:] == [2] * 80
    np.testing.assert_allclose(apart, joint, **bound(joint))

    del sizes[:]
    within = generator.sample(guidance_interval=(0.3, 0.7), **settings)
    times = torch.linspace(999, 0, 10) / 1000  # as respaced
    assert sizes[::4] == [4 if 0.3 <= time <= 0.7 else 2 for time in times.tolist()]
    assert not np.allclose(within, joint, atol=1e-3)
    np.testing.assert_allclose(generator.sample(guidance_interval=(0, 1), **settings), joint, **bound(joint))
    plain = generator.sample(**settings | {"guidance_scale": 1.0})
    np.testing.assert_array_equal(generator.sample(guidance_interval=(0.9995, 1.0), **settings), plain)


# -------------------------------------------------------------------------------- weights, compilation


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.1), ("fp16", 0.02)])
def test_cast_weights_take_half_the_memory_and_sample_nearly_the_same(precision: str, tolerance: float) -> None:
    full, half = generator_of(), generator_of(precision=precision, cast_weights=True)
    sizes = [sum(each.nbytes for each in generator.model.parameters()) for generator in (full, half)]
    assert sizes[1] * 2 == sizes[0]
    settings = {"num": 2, "steps": 4, "method": "ddim", "guidance_scale": 2.0}
    plain, found = full.sample(**settings), half.sample(**settings)
    assert 0 < np.abs(found - plain).mean() < tolerance * np.abs(plain).mean()


def test_weights_are_cast_to_a_precision_that_is_named() -> None:
    with pytest.raises(ValueError, match=r"cast_weights=true holds .* set that to bf16"):
        config_of("sample.cast_weights=true")
    with pytest.raises(ValueError, match="cast_weights needs"):
        generator_of(cast_weights=True)


def test_the_network_compiles_without_graph_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced whole; what is made of the graph is the compiler's affair."""
    graphs: list[Any] = []
    real = torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, mode, **options: real(function, backend=backend, **options))
    plain, compiled = generator_of(), generator_of(compiled=True)
    settings = {"num": 2, "steps": 4, "method": "ddim", "guidance_scale": 2.0}
    expected = plain.sample(**settings)
    np.testing.assert_allclose(compiled.sample(**settings), expected, **bound(expected))
    assert len(graphs) == 1


@pytest.mark.slow
def test_compiled_samples_are_the_plain_ones() -> None:
    plain, compiled = generator_of(), generator_of(compiled=True)
    expected = plain.sample(num=2, steps=4, method="ddim")
    np.testing.assert_allclose(compiled.sample(num=2, steps=4, method="ddim"), expected, **bound(expected))


class NoReading(TorchDispatchMode):
    """Fails where a value is read back from the device, for which the host would wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read back"
        assert func is not torch.ops.aten.nonzero.default, "a size depends on values"
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_during_a_walk() -> None:
    generator = generator_of()
    process, guidance = build_process(generator.config, respacing="6"), Guidance(2.0, (0.2, 0.9))
    times = list_evaluations(process, "ddim")
    walk = EvaluationCounter(times, 1000)
    denoiser = generator.denoiser([0, 1], guidance, walk)
    from diffusion import sample

    with NoReading():
        sample(process, walk.count(denoiser), torch.zeros(2, 4, 3, 8, 8), method="ddim")
        with pytest.raises(AssertionError):
            torch.ones(1).item()


# --------------------------------------------------------------------------------------- decoding ahead


def test_decoding_ahead_gives_the_same_in_order() -> None:
    codec = generator_of().codec
    batches = [([number], torch.full((1, 2, 3, 4, 4), number / 5)) for number in range(4)]

    def run(ahead: bool) -> list[tuple[list[int], np.ndarray]]:
        with Decoder(lambda _, z: codec.decode(z).numpy(), torch.device("cpu"), ahead=ahead) as decoder:
            pushed = [batch for each in batches for batch in decoder.push(*each)]
            assert len(pushed) == len(batches) - ahead  # the last one is still to come
            return [*pushed, *decoder.rest()]

    for (indices, videos), (expected, plain) in zip(run(True), run(False), strict=True):
        assert indices == expected
        np.testing.assert_array_equal(videos, plain)


def test_an_error_of_the_decoder_arrives() -> None:
    def broken(indices: Sequence[int], latents: Tensor) -> np.ndarray:
        raise OSError("no room")

    with Decoder(broken, torch.device("cpu"), ahead=True) as decoder:
        assert not list(decoder.push([0], torch.zeros(1)))
        with pytest.raises(OSError, match="no room"):
            list(decoder.push([1], torch.zeros(1)))


# -------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["sample.guidance_interval=[0.2,0.8]"], "read only with sample.guidance_scale"),
        (["sample.guidance_scale=2", "sample.guidance_interval=[0.8,0.2]"], "guidance_interval must be two numbers"),
        (["sample.guidance_scale=2", "sample.guidance_interval=[0.8]"], "guidance_interval must be two numbers"),
        (["sample.method=heun"], "does not belong to diffusion.prediction=epsilon: use auto, ddpm, ddim, dpm_solver"),
        ([*FLOW, "sample.method=ddim"], "use auto, euler, heun, dpm_solver"),
    ],
)
def test_keys_that_do_not_fit(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        config_of(*overrides)


# -------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_sample_the_same_without_a_wait() -> None:
    plain = generator_of(device="cuda")
    graphs = generator_of(device="cuda", compiled=True)
    settings = {"num": 3, "steps": 6, "method": "ddim", "guidance_scale": 2.0, "batch_size": 1}
    expected = plain.sample(**settings)
    np.testing.assert_allclose(graphs.sample(**settings), expected, rtol=0, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_decoding_ahead_on_a_stream_of_its_own_changes_no_bit() -> None:
    generator = generator_of(device="cuda")
    del generator.decode  # the real one
    settings = {"num": 6, "steps": 4, "batch_size": 2, "method": "ddim"}
    ahead, plain = (generator.sample(overlap_decode=each, **settings) for each in (True, False))
    np.testing.assert_array_equal(ahead, plain)
