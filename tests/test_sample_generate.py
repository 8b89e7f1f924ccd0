"""Sampling from checkpoints: closed forms with a constant network, a tiny Latte in all settings, and the command."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion
from datasets.readers import open_video
from engine.build import build_model
from engine.conditions import ClassConditions, class_conditions
from engine.config import Config, load_config
from engine.objective import sample_generator
from models.autoencoder import LatentCodec
from sample.decoding import decode_batches, to_uint8
from sample.generate import Generator, Settings, VideoNoise
from sample.labels import choose_labels, draw_number
from sample.network import GuidedEvaluations
from sample.sample import main
from sample.source import Source, sampling_config
from sample.video_io import contact_sheet
from tests.conftest import ROOT, TINY, random_weights, refuses, save_weights
from tests.fault_support import same_tensors
from tests.latent_support import save_codec

CLASSES = 3
NETWORK = [*TINY, f"model.num_classes={CLASSES}", "model.learn_sigma=false", "diffusion.prediction=x_start"]
NETWORK += ["sample.steps=5", "sample.num_videos=3"]
EPSILON = ["model.learn_sigma=true", "diffusion.prediction=epsilon", "model.depth=4"]
FLOW = ["diffusion.prediction=flow"]
CPU = torch.device("cpu")
Videos = np.ndarray


def network_config(*overrides: str) -> Config:
    return load_config(None, [*NETWORK, *overrides])


def tiny_generator(*overrides: str, device: str = "cpu", latents: bool = False, **network: Any) -> Generator:
    """A tiny network with random weights; `sample` returns latents instead of pixels if wanted."""
    config = network_config(*overrides)
    model = build_model(config)
    model.load_state_dict(random_weights(config, 0))
    codec = LatentCodec.from_config(config.codec, device)
    conditions = class_conditions(config.model, torch.device(device))
    generator = Generator(model.requires_grad_(False), codec, config, conditions, device=device, **network)
    if latents:
        generator.decode = lambda indices, latents: latents.cpu().numpy()  # type: ignore[method-assign]
    return generator


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ours with two checkpoints; averaged and raw weights differ, and it names its classes."""
    root = tmp_path_factory.mktemp("run")
    names = ["falls", "rises", "turns round"]
    for step in (1, 2):
        save_weights(network_config(), root / "checkpoints", step, seeds=(10 * step, 10 * step + 1), names=names)
    return root


class ConstantNetwork(nn.Module):
    """Predicts x_start = the level of its label, everywhere; records the size of each batch."""

    def __init__(self, levels: list[float]) -> None:
        super().__init__()
        self.register_buffer("levels", torch.tensor(levels))
        self.batches: list[int] = []

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        self.batches.append(len(x))
        return self.levels[labels].view(-1, 1, 1, 1, 1).expand_as(x)  # type: ignore[index]


def sample_constant(levels: list[float], *arguments: Any, **settings: Any) -> tuple[Videos, list[int]]:
    config = network_config()
    conditions = ClassConditions(CLASSES, CLASSES, 0.1, CPU)
    codec, network = LatentCodec.from_config(config.codec), ConstantNetwork(levels)
    videos = Generator(network, codec, config, conditions).sample(*arguments, **settings)  # type: ignore[arg-type]
    return videos, network.batches


@pytest.mark.parametrize("method", ["ddpm", "ddim", "auto"])
def test_a_network_that_knows_the_answer_is_sampled_exactly(method: str) -> None:
    videos, batches = sample_constant([-0.5, 0.0, 0.5, 0.9], [2, 0], num=3, steps=5, method=method, batch_size=2)
    assert videos.dtype == np.uint8 and videos.shape == (3, 4, 8, 8, 3) and batches == [2] * 5 + [1] * 5
    assert_levels(videos, (0.5, -0.5, 0.5))


def assert_levels(videos: Videos, levels: tuple[float, ...]) -> None:
    for video, level in zip(videos, levels, strict=True):
        assert np.abs(video.astype(int) - round((level + 1) * 127.5)).max() <= 1


def test_guidance_extrapolates_from_the_null_label() -> None:
    videos, batches = sample_constant([-0.4, 0.0, 0.2, 0.1], [0, 2], num=2, steps=3, guidance_scale=1.5)
    assert_levels(videos, (0.1 + 1.5 * -0.5, 0.1 + 1.5 * 0.1))
    assert batches == [4] * 3  # conditional and unconditional in one call


def test_to_uint8_rounds_to_the_nearest_level() -> None:
    for offset in (-0.4, 0.0, 0.4):  # of a level
        video = ((torch.arange(256) + offset) / 127.5 - 1).view(1, 1, 1, 16, 16).expand(1, 2, 3, 16, 16)
        out = to_uint8(video)
        assert out.shape == (1, 2, 16, 16, 3)
        np.testing.assert_array_equal(out[0, 1, :, :, 2].ravel(), np.arange(256))
    edges = torch.tensor([-3.0, -1.0, 1.0, 3.0]).view(1, 1, 1, 2, 2).expand(1, 1, 3, 2, 2)
    assert to_uint8(edges)[0, 0, :, :, 0].tolist() == [[0, 0], [255, 255]]


def test_noise_of_a_video_depends_on_seed_and_index_alone() -> None:
    together, alone = VideoNoise(5, [0, 1, 7], CPU), VideoNoise(5, [7], CPU)
    for _ in range(3):  # initial noise and that of the steps
        assert torch.equal(together.draw((2, 3, 4, 4))[2], alone.draw((2, 3, 4, 4))[0])
    draws = [VideoNoise(seed, [index], CPU).draw((2, 3, 4, 4)) for seed, index in ((5, 0), (5, 1), (0, 5), (1, 5))]
    assert len({float(draw.sum()) for draw in draws}) == 4


@pytest.mark.parametrize("extra", [[], FLOW], ids=str)
def test_a_video_depends_on_seed_and_index_alone(extra: list[str]) -> None:
    generator = tiny_generator(*extra)
    settings: dict[str, Any] = {"num": 5, "steps": 5, "seed": 3, "guidance_scale": 2.0}
    videos = generator.sample(batch_size=5, **settings)
    assert 20 < videos.mean() < 235 and videos.std() > 5  # not saturated, not flat
    changes: dict[str, Any]
    for changes in ({"batch_size": 2}, {"batch_size": 2, "indices": [4, 2]}):
        other, expected = generator.sample(**settings | changes), videos[changes.get("indices", range(5))]
        assert np.abs(other.astype(int) - expected).max() <= 1  # rounding of batched products
    method = "euler" if extra else "ddpm"  # the default
    np.testing.assert_array_equal(generator.sample(batch_size=5, method=method, **settings), videos)
    assert not np.array_equal(generator.sample(batch_size=5, **settings | {"seed": 4}), videos)


def labels_of(number: int, labels: list[int | str] | None = None, classes: int = 3, **options: Any) -> list[Any]:
    names = ["falls", "rises", "2"] if classes else None
    label_of = choose_labels(ClassConditions(classes, None, 0.0, CPU, names), labels, **options)
    return [label_of(index) for index in range(number)]


def test_labels_are_numbers_or_names_in_turn() -> None:
    assert labels_of(4, [0, "1", " rises", "falls"]) == [0, 1, 1, 0]
    assert labels_of(5) == [0, 1, 2, 0, 1] and labels_of(3, [2, 0]) == [2, 0, 2]
    assert labels_of(2, classes=0) == [None, None]
    counts = Counter(labels_of(2048, classes=101))
    assert len(counts) == 101 and sorted(set(counts.values())) == [20, 21]


def test_random_labels_are_drawn_by_seed_and_index() -> None:
    draws = [labels_of(4000, classes=10, rule="random", seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert ((np.bincount(draws[0], minlength=10) - 400) ** 2 / 400).sum() < 27.9  # chi-squared, 9 degrees: 1 in 1000
    assert set(labels_of(50, [7, 3], classes=10, rule="random")) == {7, 3}
    for index in range(5):  # other numbers than the seeds of the noise
        assert draw_number(3, index) >> 1 != sample_generator(3, index, CPU).initial_seed()
    refuses(r"sample\.label_rule must be one of balanced, random, not 'fair'", labels_of, 1, rule="fair")
    refuses("unconditional", labels_of, 1, [0], classes=0)


def test_settings_that_do_not_fit() -> None:
    refuses("cast_weights needs", tiny_generator, cast_weights=True)
    refuses("precision must be one of fp32, bf16, fp16, not 'x'", tiny_generator, precision="x")
    for overrides, settings, sentence in (
        (["model.num_classes=0"], {"guidance_scale": 2.0}, "guidance needs a network with labels"),
        (["model.label_dropout=0"], {"guidance_scale": 2.0}, "a null label"),
        ([], {"method": "euler"}, r"choose ddpm \| ddim"),
        (FLOW, {"method": "ddim"}, r"choose euler \| heun"),
        ([], {"eta": 0.5}, "eta=0.5 is read only by method ddim"),
        ([], {"steps": 2000}, "2000"),
    ):
        refuses(sentence, tiny_generator(*overrides).sample, num=1, **{"steps": 2, **settings})


def test_keys_that_do_not_fit() -> None:
    for overrides, sentence in (
        (["sample.guidance_interval=[0.2,0.8]"], "read only with sample.guidance_scale"),
        (["sample.guidance_scale=2", "sample.guidance_interval=[0.8,0.2]"], "guidance_interval must be two numbers"),
        (["sample.method=heun"], "does not belong to diffusion.prediction=x_start: use auto, ddpm, ddim, dpm_solver"),
        ([*FLOW, "sample.method=ddim"], "use auto, euler, heun, dpm_solver"),
        (["sample.cast_weights=true"], r"cast_weights=true stores .* set sample.precision to bf16"),
        (["model.num_classes=0", "sample.label_rule=random"], "label_rule=random: this network is unconditional"),
    ):
        refuses(sentence, network_config, *overrides)


def test_latents_have_the_codecs_channels_and_any_size(tmp_path: Path) -> None:
    assert tiny_generator().sample(num=1, steps=2, num_frames=6, image_size=12).shape == (1, 6, 12, 12, 3)
    generator = tiny_generator(*save_codec(tmp_path / "codec", "AutoencoderTiny"), "data.image_size=16")
    assert generator.sample(num=1, steps=2).shape == (1, 4, 16, 16, 3)
    assert generator.sample(num=1, steps=2, image_size=(24, 16)).shape == (1, 4, 24, 16, 3)
    sentence = r"image_size=17 must be a multiple of codec\.downsample_factor=2"
    refuses(sentence, generator.sample, num=1, steps=2, image_size=17)


def bound(plain: np.ndarray) -> dict[str, Any]:
    return {"rtol": 0, "atol": 1e-5 * max(1.0, float(np.abs(plain).max()))}


def test_guidance_one_by_one_and_in_an_interval() -> None:
    generator, sizes = tiny_generator(*EPSILON, latents=True), []
    for block in generator.model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    settings: dict[str, Any] = {"num": 2, "steps": 10, "method": "ddim", "guidance_scale": 3.0}
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


@pytest.mark.parametrize(("precision", "tolerance", "cast_weights"), [("bf16", 0.1, True), ("fp16", 0.02, False)])
def test_half_precision_is_near_full_precision(precision: str, tolerance: float, cast_weights: bool) -> None:
    full = tiny_generator(*EPSILON, latents=True)
    half = tiny_generator(*EPSILON, latents=True, precision=precision, cast_weights=cast_weights)
    sizes = [sum(each.nbytes for each in generator.model.parameters()) for generator in (full, half)]
    assert sizes[0] == sizes[1] * (2 if cast_weights else 1)
    settings: dict[str, Any] = {"num": 2, "steps": 4, "method": "ddim", "guidance_scale": 2.0}
    plain, found = full.sample(**settings), half.sample(**settings)
    assert 0 < np.abs(found - plain).mean() < tolerance * np.abs(plain).mean()  # another arithmetic, the same video


def test_the_network_compiles_without_graph_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced whole; only the compiler's backend is left out."""
    graphs: list[Any] = []
    real = torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, mode, **options: real(function, backend=backend, **options))
    settings: dict[str, Any] = {"num": 2, "steps": 4, "method": "ddim", "guidance_scale": 2.0}
    expected = tiny_generator(latents=True).sample(**settings)
    found = tiny_generator(latents=True, compiled=True).sample(**settings)
    np.testing.assert_allclose(found, expected, **bound(expected))
    assert len(graphs) == 1


class NoReading(TorchDispatchMode):
    """Fails where a value is read back from the device, for which the host would wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value is read back"
        assert func is not torch.ops.aten.nonzero.default, "a size depends on values"
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device_during_a_walk() -> None:
    generator = tiny_generator()
    wanted = Settings(steps=6, method="ddim", guidance_scale=2.0, guidance_interval=(0.2, 0.9))
    process = generator.build_process(wanted.steps)
    guided = GuidedEvaluations(generator.list_guided(process, wanted))
    denoiser = guided.count(generator.denoiser([0, 1], wanted, guided))
    with NoReading():
        diffusion.sample(process, denoiser, torch.zeros(2, 4, 3, 8, 8), method="ddim")
        with pytest.raises(AssertionError):
            torch.ones(1).item()


def test_decoding_ahead_gives_the_same_in_order() -> None:
    codec, sampled = tiny_generator().codec, []
    latents = [torch.full((1, 2, 3, 4, 4), number / 5) for number in range(4)]

    def batches() -> Iterator[tuple[list[int], Tensor]]:
        for number, each in enumerate(latents):
            sampled.append(number)
            yield [number], each

    for ahead in (True, False):
        del sampled[:]
        decoded = decode_batches(batches(), lambda _, z: codec.decode(z).numpy(), CPU, ahead=ahead)
        for number, (indices, videos) in enumerate(decoded):
            assert indices == [number] and sampled[-1] == min(number + ahead, 3)
            np.testing.assert_array_equal(videos, codec.decode(latents[number]))

    refuses("no room", list, decode_batches(batches(), Mock(side_effect=OSError("no room")), CPU, ahead=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_and_decoding_ahead_on_a_stream_of_its_own() -> None:
    plain, graphs = (tiny_generator(device="cuda", latents=True, compiled=each) for each in (False, True))
    settings: dict[str, Any] = {"num": 3, "steps": 6, "method": "ddim", "guidance_scale": 2.0, "batch_size": 1}
    np.testing.assert_allclose(graphs.sample(**settings), plain.sample(**settings), rtol=0, atol=1e-3)
    generator = tiny_generator(device="cuda")
    ahead, apart = (generator.sample(overlap_decode=each, **settings) for each in (True, False))
    np.testing.assert_array_equal(ahead, apart)


def test_our_checkpoint_needs_no_config(run_folder: Path) -> None:
    generator = Generator.from_checkpoint(run_folder, device="cpu")
    assert generator.conditions.names == ["falls", "rises", "turns round"]
    assert same_tensors(generator.model.state_dict(), random_weights(network_config(), 21))  # the newest step's average
    raw = Generator.from_checkpoint(run_folder / "checkpoints" / "step-0000001", weights="raw", device="cpu")
    assert same_tensors(raw.model.state_dict(), random_weights(network_config(), 10))


def test_an_official_file_needs_a_config(tmp_path: Path) -> None:
    config = network_config()
    ema = random_weights(config, 1)
    file = tmp_path / "official.pt"
    torch.save({"ema": {f"module.{key}": value for key, value in ema.items()}}, file)
    refuses(r"official\.pt holds weights only", Generator.from_checkpoint, file)
    generator = Generator.from_checkpoint(file, config=config, device="cpu")
    assert same_tensors(generator.model.state_dict(), ema)
    other = network_config("model.hidden_size=32")
    refuses(r"official\.pt does not fit", Generator.from_checkpoint, file, config=other)


def test_sizes_of_the_configuration_are_those_of_the_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The network of an official file is built for the size of its position tables, whatever the YAML says."""
    weights, yaml = random_weights(network_config(), 1), tmp_path / "c.yaml"
    torch.save({"ema": weights}, tmp_path / "official.pt")
    yaml.write_text(network_config("data.image_size=16", "data.num_frames=6").to_yaml())
    command = ["--config", str(yaml), "--ckpt", str(tmp_path / "official.pt"), "--device", "cpu", "--num_videos", "1"]
    sizes = ["data.image_size=12", "data.num_frames=5"]
    assert main([*command, "--save_video_path", str(tmp_path / "out"), "--fps", "4", *sizes]) == 0
    generator = Generator.from_checkpoint(tmp_path / "official.pt", config=network_config(), device="cpu")
    expected = contact_sheet(generator.sample(num=1, steps=5, image_size=12, num_frames=5), ["class-000"])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "samples.png")), expected)
    assert len(open_video(tmp_path / "out" / "0000_class-000.mp4")) == 5
    said = "sampling 5 frames of 12 pixels with a network trained on 4 frames of 8 pixels"
    assert said in capsys.readouterr().err


def test_layers_of_the_configuration(run_folder: Path, tmp_path: Path) -> None:
    yaml = tmp_path / "sample.yaml"
    yaml.write_text("model: {name: Latte-XL/2}\ncodec: {path: elsewhere}\nsample: {seed: 3, steps: 7, fps: 5}\n")
    config = sampling_config(Source.open(run_folder), load_config(yaml), {"steps": 9}, ["sample.fps=6"])
    assert config.model == network_config().model  # the checkpoint
    assert (config.codec.path, config.codec.latent_channels) == ("elsewhere", 3)
    assert (config.sample.seed, config.sample.steps, config.sample.fps) == (3, 9, 6)  # YAML, flag, override
    assert sampling_config(Source.open(run_folder), None, {}, []) == network_config()


def test_command_writes_the_promised_files_and_the_same_bytes_again(run_folder: Path, tmp_path: Path) -> None:
    flags = ["--ckpt", str(run_folder), "--labels", "1,turns round", "--guidance_scale", "2", "--device", "cpu"]
    folders = [tmp_path / "one", tmp_path / "two", tmp_path / "other"]
    for folder, seed in zip(folders, "001", strict=True):
        assert main([*flags, "--save_video_path", str(folder), "--seed", seed]) == 0
    videos = ["0000_rises.mp4", "0001_turns_round.mp4", "0002_rises.mp4"]
    names = [*videos, "samples.gif", "samples.json", "samples.png"]
    assert sorted(entry.name for entry in folders[0].iterdir()) == sorted(names)
    for name in set(names) - {"samples.json"}:  # that one names its folder
        assert (folders[1] / name).read_bytes() == (folders[0] / name).read_bytes(), name
        assert (folders[2] / name).read_bytes() != (folders[0] / name).read_bytes(), name
    facts = json.loads((folders[0] / "samples.json").read_text())
    assert facts["checkpoint"].endswith("step-0000002")
    assert [facts["sample"][key] for key in ("seed", "steps", "guidance_scale")] == [0, 5, 2.0]
    assert (facts["num_frames"], facts["height"], facts["width"]) == (4, 8, 8)
    assert facts["videos"][1] == {"file": videos[1], "index": 1, "label": 2, "class_name": "turns round"}


def test_command_hands_every_setting_on(run_folder: Path, tmp_path: Path) -> None:
    settings = {"seed": 4, "steps": 3, "method": "ddim", "eta": 0.5, "guidance_scale": 2.0, "batch_size": 2}
    flags = [f"--{key}={value}" for key, value in settings.items()]
    weights = ["--weights", "raw", "--precision", "bf16", "--device", "cpu", "--labels", "2,0"]
    assert main(["--ckpt", str(run_folder), "--save_video_path", str(tmp_path), *flags, *weights]) == 0
    generator = Generator.from_checkpoint(run_folder, weights="raw", device="cpu", precision="bf16")
    videos = generator.sample([2, 0], num=3, **settings)
    expected = contact_sheet(videos, ["turns round", "falls", "turns round"])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "samples.png")), expected)


def test_mistakes_are_found_before_anything_is_loaded(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, sentence in (
        ([], "no checkpoint: name one with --ckpt"),
        (["--ckpt", "nowhere"], "nowhere"),
        (["--ckpt", "RUN", "--lora", "nowhere"], "nowhere"),
        (["--ckpt", "RUN", "--first_frame", "nowhere.png"], r"sample.first_frame: nowhere\.png: is not a readable"),
        (["--ckpt", "RUN", "--save_video_path", "/dev/null/x"], "--save_video_path /dev/null/x cannot be written"),
        (["--ckpt", "RUN", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ):
        refuses(sentence, main, [str(run_folder) if each == "RUN" else each for each in arguments])
        assert "loading" not in capsys.readouterr().err


def test_script_from_the_shell(run_folder: Path, tmp_path: Path) -> None:
    """The file itself as users call it: its path, its exit code, its one sentence."""
    command = [sys.executable, "sample/sample.py", "--ckpt", str(run_folder), "--device", "cpu", "--labels", "7"]
    done = subprocess.run([*command, "--save_video_path", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: sample.labels: label 7 is out of range")
