"""LatentCodec against diffusers' own classes on tiny random models in the real format, and on real weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from datasets.readers import open_video
from demo.drawn import accuracy, draw_clip
from models.autoencoder import CodecConfig, LatentCodec
from tests.conftest import refuses
from tests.latent_support import tiny_codec

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(__file__).resolve().parents[2] / "shared"
Saved = dict[str, tuple[Any, Path]]
CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "AutoencoderKLTemporalDecoder")
PLAIN = {"AutoencoderTiny": "latents", "AutoencoderDC": "latent"}  # not stochastic -> name of the encoder's output


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    models = {name: (tiny_codec(name), tmp_path_factory.mktemp(name)) for name in CLASSES}
    for model, folder in models.values():
        model.save_pretrained(folder)
    return models


def config(folder: Path, **changes: Any) -> CodecConfig:
    values = {"path": str(folder), "latent_channels": 5, "downsample_factor": 2, "scale": 0.7, "shift": 0.2}
    return CodecConfig(**(values | changes))


def clips(batch: int = 2, frames: int = 3, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, frames, 3, size, size, generator=generator) * 2 - 1


@pytest.mark.parametrize("class_name", CLASSES)
@torch.no_grad()
def test_encode_and_decode_are_those_of_diffusers(saved: Saved, class_name: str) -> None:
    model, folder = saved[class_name]
    codec, video = LatentCodec.from_config(config(folder)), clips()
    encoded = model.encode(video.flatten(0, 1))
    plain = PLAIN.get(class_name)
    raw = encoded[plain] if plain else encoded.latent_dist.mode()
    latents = codec.encode(video)
    torch.testing.assert_close(latents, ((raw - 0.2) * 0.7).view(2, 3, 5, 8, 8), rtol=1e-5, atol=1e-5)
    assert codec.latent_shape(video.shape) == latents.shape
    extra = {"num_frames": 3} if class_name == "AutoencoderKLTemporalDecoder" else {}
    pictures = model.decode(raw, **extra).sample.view(video.shape)
    torch.testing.assert_close(codec.decode(latents), pictures.clamp(-1, 1), rtol=1e-5, atol=1e-5)

    assert codec.stochastic == (not plain)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    if plain:
        refuses("not stochastic", codec.encode, video, noise)
        return
    posterior = encoded.latent_dist
    sample = (posterior.mean + torch.exp(0.5 * posterior.logvar) * noise.flatten(0, 1)).view(noise.shape)
    torch.testing.assert_close(codec.encode(video, noise), (sample - 0.2) * 0.7, rtol=1e-5, atol=1e-5)
    refuses("noise has shape", codec.encode, video, noise[..., 1:])


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_chunks_bound_the_calls_and_change_nothing(saved: Saved, class_name: str, chunk_size: int) -> None:
    _, folder = saved[class_name]
    video = clips(batch=3)
    whole = LatentCodec.from_config(config(folder, chunk_size=100))
    parts = LatentCodec.from_config(config(folder, chunk_size=chunk_size))
    sizes: list[int] = []
    parts.network.encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    noise = torch.randn(whole.latent_shape(video.shape)) if whole.stochastic else None
    latents = whole.encode(video, noise)
    torch.testing.assert_close(parts.encode(video, noise), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.decode(latents), whole.decode(latents), rtol=1e-5, atol=1e-5)
    assert sizes == {1: [1] * 9, 4: [4, 4, 1]}[chunk_size]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_frozen_clamped_and_low_precision_stays_inside(saved: Saved, dtype: str) -> None:
    _, folder = saved["AutoencoderTiny"]
    exact, low = (LatentCodec.from_config(config(folder, dtype=kind)) for kind in ("fp32", dtype))
    torch.nn.ModuleList([low]).train()
    assert not any(module.training for module in low.modules())
    assert not any(parameter.requires_grad for parameter in low.parameters())
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16 if dtype == "bf16" else torch.float16}
    video = clips().requires_grad_()
    latents = low.encode(video)
    assert latents.dtype == low.decode(latents).dtype == torch.float32
    assert not latents.requires_grad
    assert not low.decode(latents.requires_grad_()).requires_grad
    torch.testing.assert_close(latents.detach(), exact.encode(video), rtol=0.1, atol=0.02)
    assert not torch.equal(latents, exact.encode(video))
    assert exact.decode(1e4 * torch.randn(1, 2, 5, 8, 8)).abs().max() == 1


def test_a_scaling_factor_of_the_autoencoder_is_not_read(saved: Saved, tmp_path: Path) -> None:
    model, folder = saved["AutoencoderTiny"]
    model.save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": 99.0, "shift_factor": 7.0}))
    nested, direct = LatentCodec.from_config(config(tmp_path, subfolder="vae")), LatentCodec.from_config(config(folder))
    assert torch.equal(nested.encode(clips()), direct.encode(clips()))


def test_pixel_space_is_the_identity() -> None:
    codec = LatentCodec.from_config(CodecConfig(latent_channels=3, downsample_factor=1, scale=0.5, shift=0.1))
    video = clips(size=10)
    assert not codec.stochastic
    assert codec.latent_shape(video.shape) == video.shape
    torch.testing.assert_close(codec.encode(video), (video - 0.1) * 0.5)
    torch.testing.assert_close(codec.decode(codec.encode(video)), video)
    refuses(r"codec\.latent_channels is 4, but that of pixel space is 3", LatentCodec.from_config, CodecConfig())


@pytest.mark.parametrize("class_name", CLASSES)
def test_values_of_another_autoencoder_are_named(saved: Saved, class_name: str) -> None:
    for key, given, found in (("latent_channels", 4, 5), ("downsample_factor", 8, 2)):
        sentence = f"codec.{key} is {given}, but .* is {found}; set codec.{key}={found}"
        refuses(sentence, LatentCodec.from_config, config(saved[class_name][1], **{key: given}))


def test_folders_that_hold_no_autoencoder(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", "./nowhere", "assets/demo/nowhere", "vae"):
        refuses(r"codec\.path: there is no folder", LatentCodec.from_config, config(Path(path)))
    refuses(r"holds neither config\.json nor taef2_encoder\.pth", LatentCodec.from_config, config(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    refuses("holds a UNet2DModel, but a codec must be one of AutoencoderKL", LatentCodec.from_config, config(tmp_path))


@pytest.mark.parametrize("fault", ["no weights", "a tensor missing", "cut short"])
def test_weights_that_do_not_fill_the_autoencoder(saved: Saved, tmp_path: Path, fault: str) -> None:
    saved["AutoencoderTiny"][0].save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    if fault == "no weights":
        file.unlink()
    elif fault == "cut short":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        weights = load_file(file)
        weights.pop("encoder.layers.0.bias")
        save_file(weights, file)
    refuses(r"codec\.path=", LatentCodec.from_config, config(tmp_path))


def test_videos_that_do_not_fit(saved: Saved) -> None:
    codec = LatentCodec.from_config(config(saved["AutoencoderTiny"][1]))
    refuses(r"15x15 pixels .* codec\.downsample_factor=2", codec.encode, clips(size=15))
    refuses("a video must be", codec.encode, clips()[0])


BIRD = SHARED / "media" / "clips" / "asl" / "sample-videos__bird.mkv"


@pytest.mark.skipif(not (SHARED / "weights" / "taef2_encoder.pth").is_file(), reason="no TAEF2 in ../shared/weights")
@pytest.mark.skipif(not BIRD.is_file(), reason="the clips of ../shared/media are absent")
def test_taef2_round_trip_on_a_real_clip() -> None:
    codec = LatentCodec.from_config(CodecConfig(path=str(SHARED / "weights"), latent_channels=32, scale=1.0))
    frames = open_video(BIRD).read([0, 20, 40])
    side = min(frames.shape[-2:])
    top, left = (frames.shape[-2] - side) // 2, (frames.shape[-1] - side) // 2
    square = frames[..., top : top + side, left : left + side].float() / 127.5 - 1
    video = torch.nn.functional.interpolate(square, (256, 256), mode="bilinear", antialias=True)[None]
    latents = codec.encode(video)
    assert latents.shape == (1, 3, 32, 32, 32)
    assert abs(latents.mean()) < 0.1
    assert 0.7 < latents.std() < 0.95
    error = (codec.decode(latents) - video).square().mean()
    assert 10 * torch.log10(4 / error) > 35


def test_the_shipped_codec_is_what_its_recipe_says() -> None:
    """Round trip of freshly drawn clips through assets/demo/codec, at both sizes."""
    folder = ROOT / "assets" / "demo" / "codec"
    recipe = json.loads((folder / "recipe.json").read_text())
    assert sum(file.stat().st_size for file in folder.iterdir()) < 3e6
    codec = LatentCodec.from_config(CodecConfig(path=str(folder), latent_channels=16, scale=1.0, chunk_size=64))
    for (_, figures), size in zip(recipe["held_out"].items(), (32, 64)):
        rng = np.random.default_rng(size)
        drawn = np.stack([draw_clip(label % 8, rng, size=size)[:16] for label in range(16)])
        video = torch.from_numpy(drawn).float() / 127.5 - 1
        latents = codec.encode(video)
        decoded = ((codec.decode(latents) + 1) * 127.5).round().to(torch.uint8)
        psnr = 10 * np.log10(255**2 / np.square(decoded.numpy().astype(float) - drawn).mean())
        assert psnr == pytest.approx(figures["psnr"], abs=1.5)
        assert latents.mean().item() == pytest.approx(0, abs=0.2)
        assert latents.std().item() == pytest.approx(figures["latent_std"], abs=0.2)
        assert min(accuracy(decoded, [label % 8 for label in range(16)]).values()) == 1.0
