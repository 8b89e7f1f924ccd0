"""Sampling from checkpoints: closed forms with a constant network, and a tiny Latte end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from engine.build import build_model
from engine.checkpoint import Checkpoint, save_checkpoint
from engine.conditions import ClassConditions, class_conditions
from engine.config import Config, load_config
from models.autoencoder import LatentCodec
from sample.generate import Generator, VideoNoise, resolve_labels, to_uint8
from sample.sample import main
from sample.source import Source, sampling_config
from sample.video_io import contact_sheet
from tests.conftest import random_weights

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 3
NETWORK = [
    "model.name=custom",
    "model.hidden_size=32",
    "model.depth=2",
    "model.num_heads=2",
    "model.patch_size=2",
    f"model.num_classes={CLASSES}",
    "model.learn_sigma=false",
    "diffusion.prediction=x_start",
    "codec.latent_channels=3",
    "codec.downsample_factor=1",
    "codec.scale=1.0",
    "data.num_frames=4",
    "data.image_size=8",
    "sample.steps=5",
    "sample.num_videos=3",
]
CPU = torch.device("cpu")


def network_config(*overrides: str) -> Config:
    return load_config(None, [*NETWORK, *overrides])


def tiny_generator(*overrides: str, precision: str = "fp32") -> Generator:
    config = network_config(*overrides)
    model = build_model(config)
    model.load_state_dict(random_weights(config, 0))
    conditions = class_conditions(config.model, CPU)
    return Generator(model, LatentCodec.from_config(config.codec), config, conditions, precision=precision)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ours with two checkpoints; averaged and raw weights differ, and it names its classes."""
    root = tmp_path_factory.mktemp("run")
    config = network_config()
    for step in (1, 2):
        weights = {kind: random_weights(config, seed) for seed, kind in enumerate(("model", "ema"), 10 * step)}
        names = {"class_names": ["falls", "rises", "turns round"]}
        saved = Checkpoint(step=step, samples_seen=step, optim={}, rng={}, state=names, **weights)
        save_checkpoint(saved, config, root / "checkpoints")
    return root


class ConstantNetwork(nn.Module):
    """Predicts x_start = the level of its label, everywhere; remembers what it was asked."""

    in_channels = 3

    def __init__(self, levels: list[float], null_label: int | None) -> None:
        super().__init__()
        self.register_buffer("levels", torch.tensor(levels))
        self.null_label = null_label
        self.batches: list[int] = []

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        self.batches.append(len(x))
        return self.levels[labels].view(-1, 1, 1, 1, 1).expand_as(x)


def constant_generator(levels: list[float]) -> Generator:
    config = network_config()
    network = ConstantNetwork(levels, null_label=CLASSES)
    conditions = ClassConditions(CLASSES, CLASSES, 0.1, CPU)
    return Generator(network, LatentCodec.from_config(config.codec), config, conditions)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("method", ["ddpm", "ddim", "auto"])
def test_a_network_that_knows_the_answer_is_sampled_exactly(method: str) -> None:
    generator = constant_generator([-0.5, 0.0, 0.5, 0.9])
    videos = generator.sample([2, 0], num=3, steps=5, method=method, batch_size=2)
    assert videos.dtype == np.uint8 and videos.shape == (3, 4, 8, 8, 3)
    for video, level in zip(videos, (0.5, -0.5, 0.5), strict=True):
        assert np.abs(video.astype(int) - round((level + 1) * 127.5)).max() <= 1
    assert generator.model.batches == [2] * 5 + [1] * 5


def test_guidance_extrapolates_from_the_null_label() -> None:
    generator = constant_generator([-0.4, 0.0, 0.2, 0.1])
    videos = generator.sample([0, 2], num=2, steps=3, guidance_scale=1.5)
    for video, level in zip(videos, (0.1 + 1.5 * -0.5, 0.1 + 1.5 * 0.1), strict=True):
        assert np.abs(video.astype(int) - round((level + 1) * 127.5)).max() <= 1
    assert generator.model.batches == [4] * 3  # conditional and unconditional in one call


def test_to_uint8_rounds_to_the_nearest_level() -> None:
    for offset in (-0.4, 0.0, 0.4):  # of a level
        video = ((torch.arange(256) + offset) / 127.5 - 1).view(1, 1, 1, 16, 16).expand(1, 2, 3, 16, 16)
        out = to_uint8(video)
        assert out.shape == (1, 2, 16, 16, 3)
        np.testing.assert_array_equal(out[0, 1, :, :, 2].ravel(), np.arange(256))
    edges = torch.tensor([-3.0, -1.0, 1.0, 3.0]).view(1, 1, 1, 2, 2).expand(1, 1, 3, 2, 2)
    assert to_uint8(edges)[0, 0, :, :, 0].tolist() == [[0, 0], [255, 255]]


# ------------------------------------------------------------------------------------------ seeds


def test_noise_of_a_video_is_its_own() -> None:
    device = torch.device("cpu")
    together, alone = VideoNoise(5, [0, 1, 7], device), VideoNoise(5, [7], device)
    for _ in range(3):  # initial noise and that of the steps
        assert torch.equal(together.draw((2, 3, 4, 4))[2], alone.draw((2, 3, 4, 4))[0])
    draws = [VideoNoise(seed, [index], device).draw((2, 3, 4, 4)) for seed, index in ((5, 0), (5, 1), (0, 5), (1, 5))]
    assert len({float(draw.sum()) for draw in draws}) == 4


@pytest.mark.parametrize("extra", [[], ["diffusion.prediction=flow"]])
def test_a_video_depends_on_seed_and_index_alone(extra: list[str]) -> None:
    generator = tiny_generator(*extra)
    settings = {"num": 5, "steps": 5, "seed": 3, "guidance_scale": 2.0}
    videos = generator.sample(batch_size=5, **settings)
    assert 20 < videos.mean() < 235 and videos.std() > 5  # not saturated, not flat
    for batch_size in (1, 2):
        other = generator.sample(batch_size=batch_size, **settings)
        assert np.abs(other.astype(int) - videos).max() <= 1  # rounding of batched products
    picked = generator.sample(indices=[4, 2], batch_size=2, **settings)
    assert np.abs(picked.astype(int) - videos[[4, 2]]).max() <= 1
    np.testing.assert_array_equal(generator.sample(batch_size=5, **settings), videos)
    assert not np.array_equal(generator.sample(batch_size=5, **{**settings, "seed": 4}), videos)


# ------------------------------------------------------------------------------- labels and errors


def test_labels_are_numbers_or_names() -> None:
    names = ["falls", "rises", "2"]
    assert resolve_labels([0, "1", " rises", "falls"], 3, names) == [0, 1, 1, 0]
    assert resolve_labels([], 3, None) == []


@pytest.mark.parametrize(
    ("labels", "classes", "sentence"),
    [
        ([3], 3, "label 3 is out of range; the network has 3 classes, 0 to 2"),
        (["-1"], 3, "label -1 is out of range"),
        (["jumps"], 3, "'jumps' is not a class of this network; its classes are falls, rises, turns"),
        ([0], 0, "unconditional"),
    ],
)
def test_wrong_labels(labels: list[int | str], classes: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        resolve_labels(labels, classes, ["falls", "rises", "turns"])


def test_classes_come_in_turn() -> None:
    generator = constant_generator([0.0] * 4)
    assert [generator.labels_for()(index) for index in range(5)] == [0, 1, 2, 0, 1]
    assert [generator.labels_for([2, 0])(index) for index in range(3)] == [2, 0, 2]


@pytest.mark.parametrize(
    ("overrides", "settings", "sentence"),
    [
        (
            ["model.num_classes=0"],
            {"guidance_scale": 2.0},
            "guidance needs a network with labels",
        ),
        (["model.label_dropout=0"], {"guidance_scale": 2.0}, "a null label"),
        ([], {"method": "euler"}, r"choose ddpm \| ddim"),
        (["diffusion.prediction=flow"], {"method": "ddim"}, r"choose euler \| heun"),
        ([], {"eta": 0.5}, "eta=0.5 is read only by method ddim"),
        ([], {"steps": 2000}, "2000"),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides: list[str], settings: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        tiny_generator(*overrides).sample(num=1, **{"steps": 2, **settings})
    assert "\n" not in str(caught.value)


def test_flow_is_sampled_with_euler_unless_told_otherwise() -> None:
    generator = tiny_generator("diffusion.prediction=flow")
    auto, euler, heun = (generator.sample(num=1, steps=4, method=each) for each in ("auto", "euler", "heun"))
    np.testing.assert_array_equal(auto, euler)
    assert not np.array_equal(auto, heun)


def test_an_unconditional_network_is_sampled_without_labels() -> None:
    videos = tiny_generator("model.num_classes=0").sample(num=2, steps=3)
    assert videos.shape == (2, 4, 8, 8, 3)
    assert not np.array_equal(videos[0], videos[1])


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 6.0), ("fp16", 1.5)])
def test_half_precision_is_near_full_precision(precision: str, tolerance: float) -> None:
    full = tiny_generator().sample(num=2, steps=4, method="ddim").astype(int)
    half = tiny_generator(precision=precision).sample(num=2, steps=4, method="ddim").astype(int)
    assert 0 < np.abs(half - full).mean() < tolerance  # another arithmetic, the same video


def test_other_sizes_than_trained() -> None:
    videos = tiny_generator().sample(num=1, steps=2, num_frames=6, image_size=12)
    assert videos.shape == (1, 6, 12, 12, 3)


class DoublingCodec(nn.Module):
    """Decodes five latent channels to pixels of twice the size: the first three, enlarged."""

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :, :3].repeat_interleave(2, dim=3).repeat_interleave(2, dim=4).clamp(-1, 1)


def test_latents_have_the_codecs_channels_and_size() -> None:
    config = network_config("codec.latent_channels=5", "codec.downsample_factor=2", "data.image_size=16")
    conditions = class_conditions(config.model, CPU)
    generator = Generator(build_model(config), DoublingCodec(), config, conditions)  # type: ignore[arg-type]
    videos = generator.sample(num=1, steps=2)
    assert videos.shape == (1, 4, 16, 16, 3)
    assert generator.sample(num=1, steps=2, image_size=24).shape == (1, 4, 24, 24, 3)
    with pytest.raises(ValueError, match=r"image_size=17 must be a multiple of codec\.downsample_factor=2"):
        generator.sample(num=1, steps=2, image_size=17)


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    tiny_generator().sample(num=3, steps=2, batch_size=2, callback=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


# ------------------------------------------------------------------------------------ checkpoints


def test_our_checkpoint_needs_no_config(run_folder: Path) -> None:
    generator = Generator.from_checkpoint(run_folder, device="cpu")
    assert generator.conditions.names == ["falls", "rises", "turns round"]
    expected = random_weights(network_config(), 21)  # the newest step's average
    assert all(torch.equal(value, expected[key]) for key, value in generator.model.state_dict().items())
    raw = Generator.from_checkpoint(run_folder / "checkpoints" / "step-0000001", weights="raw", device="cpu")
    expected = random_weights(network_config(), 10)
    assert all(torch.equal(value, expected[key]) for key, value in raw.model.state_dict().items())


def test_an_official_file_needs_a_config(tmp_path: Path) -> None:
    config = network_config()
    ema = random_weights(config, 1)
    file = tmp_path / "official.pt"
    torch.save({"ema": {f"module.{key}": value for key, value in ema.items()}}, file)
    with pytest.raises(ValueError, match=r"official\.pt holds weights only"):
        Generator.from_checkpoint(file)
    generator = Generator.from_checkpoint(file, config=config, device="cpu")
    assert all(torch.equal(value, ema[key]) for key, value in generator.model.state_dict().items())
    with pytest.raises(ValueError, match=r"official\.pt does not fit"):
        Generator.from_checkpoint(file, config=network_config("model.hidden_size=16"))


def test_what_the_checkpoint_and_what_the_yaml_decide(run_folder: Path, tmp_path: Path) -> None:
    yaml = tmp_path / "sample.yaml"
    yaml.write_text("model: {name: Latte-XL/2}\ncodec: {path: elsewhere}\nsample: {seed: 3, steps: 7, fps: 5}\n")
    config = sampling_config(Source.open(run_folder), yaml, {"steps": 9}, ["sample.fps=6"])
    assert config.model == network_config().model  # the checkpoint
    assert config.codec.path == "elsewhere"
    assert config.codec.latent_channels == 3
    assert (config.sample.seed, config.sample.steps, config.sample.fps) == (3, 9, 6)  # YAML, flag, override
    assert sampling_config(Source.open(run_folder), None, {}, []) == network_config()


# ------------------------------------------------------------------------------------ the command


def test_command_writes_the_promised_files_and_the_same_bytes_again(run_folder: Path, tmp_path: Path) -> None:
    flags = [
        "--ckpt",
        str(run_folder),
        "--labels",
        "1,turns round",
        "--guidance_scale",
        "2",
        "--device",
        "cpu",
    ]
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
    assert (facts["sample"]["seed"], facts["sample"]["steps"], facts["sample"]["guidance_scale"]) == (
        0,
        5,
        2.0,
    )
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


def test_command_takes_other_frame_counts(run_folder: Path, tmp_path: Path) -> None:
    import av

    flags = ["--ckpt", str(run_folder), "--num_videos", "1", "--save_video_path", str(tmp_path), "--fps", "4"]
    assert main([*flags, "--device", "cpu", "data.num_frames=6", "data.image_size=16"]) == 0
    with av.open(str(tmp_path / "0000_falls.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (16, 16, 4)
        assert len(list(container.decode(stream))) == 6


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "no checkpoint: name one with --ckpt"),
        (["--ckpt", "nowhere"], "nowhere"),
        (["--ckpt", "RUN", "--labels", "9"], "label 9 is out of range; the network has 3 classes, 0 to 2"),
        (["--ckpt", "RUN", "--method", "magic"], "sample.method must be one of"),
        (["--ckpt", "RUN", "--precision", "fp8"], "sample.precision"),
        (["--ckpt", "RUN", "--num_videos", "0"], "sample.num_videos"),
        (["--ckpt", "RUN", "sample.stepz=3"], "stepz"),
        (["--ckpt", "RUN", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_on_the_command_line(run_folder: Path, arguments: list[str], sentence: str) -> None:
    with pytest.raises((ValueError, OSError), match=sentence) as caught:
        main([str(run_folder) if each == "RUN" else each for each in arguments])
    assert "\n" not in str(caught.value)


def test_script_from_the_shell(run_folder: Path, tmp_path: Path) -> None:
    """The file itself as users call it: its path, its exit code, its one sentence."""
    command = [sys.executable, "sample/sample.py", "--ckpt", str(run_folder), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--save_video_path", str(tmp_path), "--labels", "7"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: sample.labels: label 7 is out of range")
    helped = subprocess.run([sys.executable, "-m", "sample.sample", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert helped.returncode == 0
    assert all(f"--{flag}" in helped.stdout for flag in ("labels", "num_videos", "method", "guidance_scale", "weights"))
