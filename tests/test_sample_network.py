"""What sampling leaves out or makes ahead equals the plain loop, does what it says, and refuses what it is not for."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion import evaluations
from engine.build import build_model, build_process
from engine.config import Config, load_config
from models.autoencoder import LatentCodec
from sample.decoding import Decoder
from sample.generate import Generator, Guidance, VideoNoise
from sample.given import Windows
from sample.modulation import ModulationTable
from sample.network import Calls, Walk
from sample.step_cache import CacheSchedule
from tests.conftest import random_weights
from tools import fit_cache

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
    generator = Generator(model.requires_grad_(False), codec, config, device=device, **network)
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


# ------------------------------------------------------------------------------ modulations made ahead


@pytest.mark.parametrize("budget_mb", [1, 64])
@pytest.mark.parametrize(
    ("overrides", "settings"),
    [
        ([], {"method": "ddim"}),
        ([], {"method": "ddpm", "guidance_scale": 3.0}),
        ([], {"method": "ddim", "guidance_scale": 3.0, "batched_guidance": False}),
        (["model.num_classes=0"], {"method": "ddim"}),
        (FLOW, {"method": "heun", "guidance_scale": 2.0, "guidance_interval": (0.3, 0.8)}),
    ],
)
def test_modulations_made_ahead_change_nothing(overrides: list[str], settings: dict, budget_mb: int) -> None:
    generator = generator_of(*overrides)
    plain = generator.sample(num=5, steps=40, batch_size=3, **settings)
    heads: list[int] = []
    generator.model.final_layer.adaLN_modulation.register_forward_pre_hook(lambda *_: heads.append(1))
    found = generator.sample(num=5, steps=40, batch_size=3, modulation_mb=budget_mb, **settings)
    np.testing.assert_allclose(found, plain, **bound(plain))
    assert len(heads) <= 8  # of 80 and more evaluations


def test_a_table_keeps_to_its_budget_and_looks_up_what_it_was_asked_for() -> None:
    times, labels, asked = [9.0, 7.0, 5.0, 2.0, 1.0], [8, 3, 5], []

    def compute(timesteps: Tensor, labels: Tensor | None) -> Tensor:
        asked.append(len(timesteps))
        return (100 * timesteps + labels).view(-1, 1, 1, 1).expand(-1, 1, 1, 25)

    row = 3 * 25 * 4  # bytes of an evaluation
    for budget, length in ((0, 1), (2 * row + 1, 2), (99 * row, 5)):
        table = ModulationTable(compute, times, labels, budget, torch.device("cpu"))
        for number in (0, 1, 2, 3, 4, 0, 4):  # a second walk begins again
            found = table.rows(number, torch.tensor([5, 5, 8]))
            assert found[:, 0, 0, 0].tolist() == [100 * times[number] + label for label in (5, 5, 8)]
            assert table.nbytes == length * row


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


# ------------------------------------------------------------------------------------------- step cache


def schedule_of(
    generator: Generator, computed: list[int], span: tuple[int, int] = (0, 4), **settings: Any
) -> CacheSchedule:
    guidance = Guidance(settings.get("guidance_scale", 1.0), settings.get("guidance_interval"))
    shape = generator.latent_shape(None, None)
    known = generator.cache_settings(shape, len(computed), settings.get("method", "ddim"), 0.0, guidance)
    from engine.checkpoint import content_sha256

    known = json.loads(json.dumps(known))
    return CacheSchedule(tuple(map(bool, computed)), *span, content_sha256(generator.model), known, 0.0)


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 3.0}, {"method": "unipc"}])
def test_a_schedule_that_always_computes_is_the_plain_loop_bit_for_bit(settings: dict) -> None:
    generator = generator_of()
    plain = generator.sample(num=3, **{"steps": 6, "method": "ddim", **settings})
    schedule = schedule_of(generator, [1] * 6, (1, 3), **settings)
    found = generator.sample(num=3, cache=schedule, **{"steps": 6, "method": "ddim", **settings})
    np.testing.assert_array_equal(found, plain)


@pytest.mark.parametrize("span", [(0, 4), (1, 3)])
def test_reused_layers_add_what_they_added_last(span: tuple[int, int]) -> None:
    """Against the same written out as a loop."""
    generator, computed = generator_of("model.num_classes=0"), [1, 0, 0, 1, 0]
    sizes = layers_run(generator)
    found = generator.sample(num=2, steps=5, method="ddim", cache=schedule_of(generator, computed, span))
    assert len(sizes) == 2 * 4 + 3 * (4 - (span[1] - span[0]))

    model, process = generator.model, build_process(generator.config, respacing="5")
    change = torch.tensor(0.0)

    def denoiser(x: Tensor, timesteps: Tensor) -> Tensor:
        nonlocal change
        tokens, context = model.embed(x, timesteps)
        tokens = model.run_layers(tokens, context, 0, span[0])
        if computed[len(calls)]:
            change = model.run_layers(tokens, context, *span) - tokens
        calls.append(1)
        return model.unembed(model.run_layers(tokens + change, context, span[1]), context)

    from diffusion import sample

    calls: list[int] = []
    noise = VideoNoise(0, [0, 1], torch.device("cpu")).draw((4, 3, 8, 8))
    expected = sample(process, denoiser, noise, method="ddim").numpy()
    np.testing.assert_allclose(found, expected, **bound(expected))
    assert not np.allclose(found, generator.sample(num=2, steps=5, method="ddim"), atol=1e-3)


def test_where_guidance_comes_or_goes_all_layers_run() -> None:
    generator = generator_of()
    sizes = layers_run(generator)
    settings = {"method": "ddim", "guidance_scale": 2.0, "guidance_interval": (0.3, 0.7)}
    schedule = schedule_of(generator, [1] + [0] * 9, **settings)
    generator.sample(num=1, steps=10, cache=schedule, **settings)
    assert sizes == [1] * 4 + [2] * 4 + [1] * 4


def test_best_schedule_is_that_of_brute_force() -> None:
    rng = np.random.default_rng(0)
    for total, window in ((7, 9), (8, 3)):
        costs = [{i: float(rng.random()) for i in range(max(0, j - window), j)} for j in range(total)]
        costs[5].pop(4)  # where guidance comes, nothing can be reused
        costs[5].pop(3)
        costs[5] = {}

        def cost_of(computed: tuple[int, ...], costs: list = costs) -> float:
            last, found = 0, 0.0
            for j, full in enumerate(computed):
                last = j if full else last
                found += 0.0 if full else costs[j].get(last, math.inf)
            return found

        for compute in range(1, total + 1):
            ways = [way for way in itertools.product([0, 1], repeat=total) if way[0] and sum(way) == compute]
            least = min(map(cost_of, ways))
            if math.isinf(least):
                with pytest.raises(ValueError, match="too few"):
                    fit_cache.best_schedule(costs, compute)
                continue
            computed, error = fit_cache.best_schedule(costs, compute)
            assert sum(computed) == compute
            assert error == pytest.approx(least) == pytest.approx(cost_of(tuple(computed)))


def test_measured_costs_are_the_change_of_the_clean_clip() -> None:
    """One cost recomputed by hand: the second evaluation with the layers of the first."""
    generator = generator_of("sample.steps=4", "sample.method=ddim", "sample.num_videos=2", "sample.guidance_scale=2")
    costs, _ = fit_cache.measure(generator, generator.config, (0, 4), 10)
    assert [sorted(found) for found in costs] == [[], [0], [0, 1], [0, 1, 2]]
    process = build_process(generator.config, respacing="4")
    plan = evaluations(process, "ddim")
    found: dict[bool, Tensor] = {}
    for reuse in (False, True):
        walk = Walk([each.time for each in plan], 1000)
        schedule = schedule_of(generator, [1, not reuse, 1, 1], guidance_scale=2.0)
        network = Calls(generator.network, walk, None, schedule)
        denoiser = walk.counted(generator.denoiser([0, 1], Guidance(2.0), walk, network))
        x = VideoNoise(0, [0, 1], torch.device("cpu")).draw((4, 3, 8, 8))
        from diffusion.samplers import ddim_step

        x = ddim_step(process, denoiser, x, torch.tensor([3, 3])).x
        found[reuse] = ddim_step(process, denoiser, x, torch.tensor([2, 2])).pred_x_start
    level = [math.sqrt(1 / process.tables["alphas_cumprod"][index].item() - 1) for index in (1, 2)]
    expected = (1 - level[0] / level[1]) * (found[True] - found[False]).square().mean().sqrt().item()
    assert costs[1][0] == pytest.approx(expected, rel=1e-4)


def test_fit_cache_from_the_command_line(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sample.sample import main as sample_main

    out = tmp_path / "cache.json"
    how = ["--ckpt", str(checkpoint), "--device", "cpu", "--steps", "6", "--method", "ddim", "--num_videos", "2"]
    assert fit_cache.main([*how, "--compute", "3", "--out", str(out), "--guidance_scale", "2"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("3 of 6 evaluations run layers 0 to 1") and "grey levels" in said
    schedule = CacheSchedule.load(out)
    assert sum(schedule.computed) == 3 and schedule.computed[0]

    folder = ["--save_video_path", str(tmp_path / "videos")]
    assert sample_main([*how, *folder, "--guidance_scale", "2", "--cache", str(out)]) == 0
    for change, sentence in (
        (["--guidance_scale", "3"], r"another way of sampling \(guidance_scale 2.0 -> 3.0\)"),
        (["--guidance_scale", "2", "--steps", "5"], r"steps 6 -> 5"),
        (["--guidance_scale", "2", "--cache", "nowhere.json"], "no file nowhere.json"),
        (["--guidance_scale", "2", "--cache", str(checkpoint / "state.json")], "not what tools.fit_cache writes"),
    ):
        with pytest.raises((ValueError, OSError), match=sentence) as caught:
            sample_main([*how, *folder, "--cache", str(out), *change])
        assert "\n" not in str(caught.value)


def test_given_frames_and_windows_take_no_cache_and_no_tables() -> None:
    windows = Windows(4, 2, "fused")
    generator = generator_of()
    for extra in ({"modulation_mb": 8}, {"cache": schedule_of(generator, [1] * 3)}):
        with pytest.raises(ValueError, match="sampled at once and from noise alone"):
            generator.sample(num=1, steps=3, method="ddim", windows=windows, **extra)
    with pytest.raises(ValueError, match="sampled at once and from noise alone"):
        fit_cache.fit(generator, config_of("sample.window=4", "sample.overlap=2"), 2, (0, 4))


def test_a_schedule_for_other_weights_or_edited_is_refused(tmp_path: Path) -> None:
    generator = generator_of()
    schedule = schedule_of(generator, [1, 0, 1])
    generator.model.blocks[0].mlp.fc1.bias[0] += 1
    with pytest.raises(ValueError, match="other weights"):
        generator.sample(num=1, steps=3, method="ddim", cache=schedule)
    file = tmp_path / "cache.json"
    for change in ({"computed": []}, {"computed": [0, 1]}, {"first_layer": 3, "end_layer": 3}, {"format": 9}):
        schedule.save(file)
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(ValueError, match="not what tools"):
            CacheSchedule.load(file)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--compute", "9"], "has 6 evaluations; give 1 to 6"),
        (["--compute", "1", "--longest_reuse", "2"], "too few"),
        (["--compute", "3", "--longest_reuse", "0"], "--longest_reuse"),
        (["--compute", "3", "--layers", "1:9"], "0 <= FIRST < END <= 2"),
        (["--compute", "3", "--out", "nowhere/at/all.json"], "no folder nowhere/at"),
    ],
)
def test_mistakes_in_fitting(checkpoint: Path, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    how = ["--ckpt", str(checkpoint), "--device", "cpu", "--steps", "6", "--out", str(tmp_path / "cache.json")]
    with pytest.raises(ValueError, match=sentence):
        fit_cache.main([*how, *arguments])


# -------------------------------------------------------------------------------- weights, compilation


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.1), ("fp16", 0.02)])
def test_cast_weights_take_half_the_memory_and_sample_nearly_the_same(precision: str, tolerance: float) -> None:
    full, half = generator_of(), generator_of(precision=precision, cast_weights=True)
    sizes = [sum(each.nbytes for each in generator.model.parameters()) for generator in (full, half)]
    assert sizes[1] * 2 == sizes[0]
    settings = {"num": 2, "steps": 4, "method": "ddim", "guidance_scale": 2.0}
    plain, found = full.sample(**settings), half.sample(modulation_mb=8, **settings)
    assert 0 < np.abs(found - plain).mean() < tolerance * np.abs(plain).mean()


def test_weights_are_cast_to_a_precision_that_is_named() -> None:
    with pytest.raises(ValueError, match=r"cast_weights=true holds .* set that to bf16"):
        config_of("sample.cast_weights=true")
    with pytest.raises(ValueError, match="cast_weights needs"):
        generator_of(cast_weights=True)


def test_the_network_compiles_without_graph_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain call and both of a step cache, traced whole; what is made of the graphs is the compiler's affair."""
    graphs: list[Any] = []
    real = torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, mode, **options: real(function, backend=backend, **options))
    plain, compiled = generator_of(), generator_of(compiled=True)
    settings = {"num": 2, "steps": 4, "method": "ddim", "guidance_scale": 2.0, "modulation_mb": 8}
    schedule = schedule_of(plain, [1, 0, 1, 0], guidance_scale=2.0)
    for extra in ({}, {"cache": schedule}):
        expected = plain.sample(**settings, **extra)
        np.testing.assert_allclose(compiled.sample(**settings, **extra), expected, **bound(expected))
    assert len(graphs) == 3


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
    times = [each.time for each in evaluations(process, "ddim")]
    schedule = schedule_of(generator, [1, 0, 1, 0, 0, 0], guidance_scale=2.0)
    table = ModulationTable(generator.network.modulations, times, [0, 1, 3], 2**13, torch.device("cpu"))
    walk = Walk(times, 1000)
    denoiser = generator.denoiser([0, 1], guidance, walk, Calls(generator.network, walk, table, schedule))
    from diffusion import sample

    with NoReading():
        sample(process, walk.counted(denoiser), torch.zeros(2, 4, 3, 8, 8), method="ddim")
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
        (["sample.guidance_interval=[0.2,0.8]"], "read only with a sample.guidance_scale"),
        (["sample.guidance_scale=2", "sample.guidance_interval=[0.8,0.2]"], "guidance_interval must be two numbers"),
        (["sample.guidance_scale=2", "sample.guidance_interval=[0.8]"], "guidance_interval must be two numbers"),
        (["sample.modulation_mb=-1"], "modulation_mb must be zero or more"),
        (["sample.modulation_mb=9", "model.injection=tokens"], "injection=tokens has no modulations"),
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
    settings = {"num": 3, "steps": 6, "method": "ddim", "guidance_scale": 2.0, "modulation_mb": 8, "batch_size": 1}
    expected = plain.sample(**settings)
    np.testing.assert_allclose(graphs.sample(**settings), expected, rtol=0, atol=1e-3)
    schedule = schedule_of(plain, [1, 0, 1, 0, 0, 1], guidance_scale=2.0)
    cached = plain.sample(cache=schedule, **settings)
    np.testing.assert_allclose(graphs.sample(cache=schedule, **settings), cached, rtol=0, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_decoding_ahead_on_a_stream_of_its_own_changes_no_bit() -> None:
    generator = generator_of(device="cuda")
    del generator.decode  # the real one
    settings = {"num": 6, "steps": 4, "batch_size": 2, "method": "ddim"}
    ahead, plain = (generator.sample(overlap_decode=each, **settings) for each in (True, False))
    np.testing.assert_array_equal(ahead, plain)
