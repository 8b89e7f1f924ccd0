"""Given frames and windows in text to video, with tiny random networks of diffusers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusion import Given
from models.text_encoder import TextEncoder
from sample.generate import to_uint8
from sample.t2x_config import T2XConfig
from sample.text_model import FolderModel
from sample.text_to_video import Sampler, build_schedule, denoise
from tests.t2v_support import ours_of, theirs, tiny_pipeline

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def latte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Latte folder, saved by diffusers."""
    folder = tmp_path_factory.mktemp("latte")
    tiny_pipeline(theirs()).save_pretrained(folder)
    return folder


def tiny(folder: Path, **changes: Any) -> T2XConfig:
    settings: dict[str, Any] = {"image_size": [16, 16], "video_length": 4, "num_sampling_steps": 3, "precision": "fp32"}
    return T2XConfig(**{"pretrained_model_path": str(folder), **settings, **changes})


def given_image(folder: Path) -> tuple[Path, np.ndarray]:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "first.png")
    return folder / "first.png", pixels


@pytest.mark.parametrize("method", ["DDIM", "DDPM", "EulerDiscrete", "DPMSolverMultistep"])
def test_known_frames_stay_and_frames_by_themselves_are_sampled_as_ever(latte: Path, method: str) -> None:
    config = tiny(latte, sample_method=method, enable_temporal_attentions=False, guidance_scale=3.0)
    features = TextEncoder.from_folder(latte, torch.float64, CPU).encode("a red disc", "", clean=False)
    seeded = torch.Generator().manual_seed(1)  # float64: in three steps DDPM makes a rounding 10^3 times as large
    noise, clean = torch.randn(2, 1, 4, 4, 8, 8, generator=seeded, dtype=torch.float64)
    noise = noise.transpose(1, 2)  # (1, F, C, h, w), drawn in diffusers' order
    known = Given(clean, torch.tensor([[True, False, False, True]]))

    def latents(**options: Any) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        model, schedule = ours_of(theirs()).double(), build_schedule(config, FolderModel(latte))
        return denoise(model, schedule, features, noise, config, generator, **options)

    found, plain = latents(known=known), latents()
    assert torch.equal(found[known.frames], known.latents[known.frames])
    torch.testing.assert_close(found[:, 1:3], plain[:, 1:3], rtol=1e-8, atol=1e-8)


def test_videos_begin_with_an_image_also_in_windows(latte: Path, tmp_path: Path) -> None:
    file, pixels = given_image(tmp_path)
    prompt = TextEncoder.from_folder(latte, torch.float32, CPU).encode("a red disc", "")
    for window_method in ("fused", "autoregressive"):
        long = {"video_length": 9, "window": 4, "overlap": 2, "window_method": window_method}
        sampler = Sampler(tiny(latte, first_frame=[str(file)], **long), FolderModel(latte), CPU)
        steps: list[int] = []
        video = sampler.sample(prompt, 0, lambda *_, steps=steps: steps.append(1))
        assert video.shape == (9, 16, 16, 3) and len(steps) == sampler.num_steps
        clip = torch.from_numpy(pixels).permute(2, 0, 1)[None, None] / 127.5 - 1
        expected = to_uint8(sampler.codec.decode(sampler.codec.encode(clip)))[0, 0]
        assert np.abs(video[0].astype(int) - expected).max() <= 1  # what the codec makes of it
    one = Sampler(tiny(latte, window=4), FolderModel(latte), CPU).sample(prompt, 0)
    np.testing.assert_array_equal(one, Sampler(tiny(latte), FolderModel(latte), CPU).sample(prompt, 0))


def test_wrong_given_frames_are_one_sentence(latte: Path, tmp_path: Path) -> None:
    file = str(given_image(tmp_path)[0])
    for changes, sentence in (
        ({"first_frame": [file], "image_size": [16, 32]}, "cut to a square"),
        ({"given_frames": 2}, "given_frames is read only with given"),
        ({"window": 4, "overlap": 4}, "from 1 to window - 1 = 3"),
    ):
        with pytest.raises(ValueError, match=sentence):
            tiny(latte, **changes)
    with pytest.raises(ValueError, match=r"first_frame: \S+ is not a readable image"):
        Sampler(tiny(latte, first_frame=[str(tmp_path / "none.png")]), FolderModel(latte), CPU)
    with pytest.raises(ValueError, match="leave nothing to sample"):
        Sampler(tiny(latte, first_frame=[file], video_length=1), FolderModel(latte), CPU)
