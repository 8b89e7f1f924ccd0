"""tools.codec_report: PSNR by its formula, SSIM against torchmetrics, latents and distances computed anew."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure

from datasets import build_dataset
from datasets.config import DataConfig
from demo import data, drawn
from evaluation.similarity import psnr, ssim
from tests.latent_support import save_codec, tiny_codec
from tests.test_models_autoencoder import SHARED
from tools import codec_report

MOBILENET = SHARED / "weights" / "mobilenet_v2_imagenet_dequantized.pth"


def images(count: int = 3, height: int = 21, width: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)


@pytest.mark.parametrize("offset", [1, 7, 100])
def test_psnr_of_a_constant_error(offset: int) -> None:
    real = images() // 2
    expected = torch.full((3,), 20 * math.log10(255 / offset), dtype=torch.float64)
    torch.testing.assert_close(psnr(real, real + offset), expected)


def test_psnr_of_an_exact_copy_is_that_of_one_wrong_value() -> None:
    real = images() // 2
    other = real.clone()
    other[:, 0, 0, 0] += 1
    assert torch.equal(psnr(real, real), psnr(real, other))


@pytest.mark.parametrize("noise", [0, 5, 60])
def test_ssim_is_that_of_torchmetrics(noise: int) -> None:
    real = images(height=40)
    real[0] = 128  # without contrast
    fake = (real + noise * torch.randn(real.shape)).clamp(0, 255).to(torch.uint8)
    maps = [structural_similarity_index_measure(a[None].double(), b[None].double(), data_range=255.0,
                                                return_full_image=True)[1] for a, b in zip(real, fake)]  # fmt: skip
    expected = [full[..., 5:-5, 5:-5].mean() for full in maps]  # only windows that fit, as Wang et al. count
    torch.testing.assert_close(ssim(real, fake), torch.stack(expected), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="11 pixels or more, not 16x10"):
        ssim(images(height=10), images(height=10))


def report(out: Path, clips: Path, *arguments: str) -> dict[str, Any]:
    fixed = ["--data", str(clips), "--out", str(out), "--device", "cpu", "data.num_frames=4", "data.frame_interval=1"]
    assert codec_report.main([*fixed, *arguments]) == 0
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn")
    for label, kind in enumerate(drawn.CLASSES):
        (root / kind.name).mkdir()
        data.make_clip(root, {"seed": 0, "size": 32, "frames": 16}, (label, 0))
    return root


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderTiny"])
def test_latents_are_those_that_training_gets(name: str, clips: Path, tmp_path: Path) -> None:
    """Mean and deviation of many samples of diffusers' own posterior."""
    settings = [*save_codec(tmp_path / "codec", name)[1:], "data.image_size=32"]
    found = report(tmp_path, clips, "--codec", str(tmp_path / "codec"), "--clips", "5", "--seed", "3", *settings)
    read = build_dataset(DataConfig(path=str(clips), num_frames=4, frame_interval=1, image_size=32), seed=3)
    frames = torch.cat([read[0, index]["video"] for index in (0, 1, 3, 4, 6)])
    with torch.no_grad():
        encoded = tiny_codec(name).encode(frames)
    draws = [encoded.latent_dist.sample() for _ in range(300)] if name == "AutoencoderKL" else [encoded.latents]
    latents, ours = torch.cat(draws).double().transpose(0, 1).flatten(1), found["latents"]
    assert ours["mean"] == pytest.approx(latents.mean().item(), rel=0.02, abs=0.01)
    assert ours["deviation"] == pytest.approx(latents.std().item(), rel=0.02)
    np.testing.assert_allclose(found["channels"]["deviation"], latents.std(1), rtol=0.03)
    assert ours["recommended_scale"] * ours["deviation"] == pytest.approx(1)
    assert found["codec"]["scale"] == 0.7 and found["clips"] == 5 and found["clip_size"] == [4, 32, 32]
    assert 0 < found["psnr"] < 20 and found["frechet"] == {}


def test_pixel_space_reconstructs_exactly(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = ["codec.latent_channels=3", "codec.downsample_factor=1", "codec.scale=1", "data.image_size=32"]
    found = report(tmp_path, clips, "--clips", "2", *pixels)
    assert found["psnr"] == pytest.approx(10 * math.log10(255**2 * 3 * 32 * 32))
    assert found["ssim"] == pytest.approx(1)
    sheet = np.asarray(Image.open(tmp_path / "samples.png"))
    assert (sheet == 0).all(-1).any(), "the differences are black"
    assert "left out: name a --detector" in capsys.readouterr().out


@pytest.mark.skipif(not MOBILENET.is_file(), reason="../shared/weights is absent")
def test_a_real_autoencoder_and_a_real_detector(clips: Path, tmp_path: Path) -> None:
    found = report(
        tmp_path, clips, "--codec", str(SHARED / "weights"), "--clips", "2", "codec.latent_channels=32",
        "codec.scale=1", "data.image_size=64", "--detector", f"mobilenet_v2={MOBILENET}",
    )  # fmt: skip
    assert 25 < found["psnr"] < 45 and 0.85 < found["ssim"] < 1
    assert 0 < found["frechet"]["mobilenet_v2"] < 500 and len(found["detectors"]["mobilenet_v2"]) == 64
    assert 0.5 < found["latents"]["deviation"] < 1.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--clips", "1"], "--clips must be at least 2"),
        (["--codec", "/no/codec"], "/no/codec"),
        (["--detector", "x=f.pt"], "--detector: there is no detector 'x'"),
        (["--device", "tpu"], "--device tpu"),
    ],
)
def test_mistakes(arguments: list[str], words: str, clips: Path, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        report(tmp_path, clips, "data.image_size=32", *arguments)
