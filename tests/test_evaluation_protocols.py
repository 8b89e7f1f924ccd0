"""The table of metrics, the protocols and the treatment of pixels, against what is published of each."""

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datasets.readers import open_video
from evaluation.pixels import MP4_FPS, fit, through_jpeg, through_mp4
from evaluation.protocols import OFFICIAL, build_protocol, parse_metric
from tests.conftest import CLIPS, needs_media, refuses


def test_shortest_videos() -> None:
    for metric, protocol, dataset, shortest in (
        ("fvd2048_16f", "stylegan-v", None, (16, 16)),
        ("fvd2048_128f_subsample8f", "stylegan-v", None, (128, 128)),  # not 121, which would hold the clip
        ("fvd2048_16f", "latte", None, (48, 16)),
        ("fvd2048_16f", "latte", "ucf101", (48, 16)),
        ("fvd2048_16f", "latte", "taichi", (96, 16)),
        ("fvd2048_16f", "latte-published", "taichi", (96, 16)),
        ("fvd2048_128f", "latte", "ffs", (384, 128)),
    ):
        of_sides = build_protocol(protocol, dataset)
        assert tuple(of_sides.side(side, parse_metric(metric), 0).span for side in ("real", "fake")) == shortest


def test_protocols_differ_as_published() -> None:
    ours, latte, published = (build_protocol(name) for name in ("stylegan-v", "latte", "latte-published"))
    assert (ours.selection, latte.selection) == ("first", "random")
    assert (ours.real_storage, latte.fake_storage) == ("as read", "as read")
    assert (published.real_storage, published.fake_storage) == ("jpeg75", "mp4 quality 9, jpeg75")
    assert {each.divisor for each in (ours, latte, published)} == {"n"}
    assert {each.split for each in (ours, latte, published)} == {"train"}
    assert build_protocol("latte", "ffs").resolution == 256 and build_protocol("latte").resolution is None


OFFICIAL_METRICS = {  # number of real and fake items, frames, their distance, family
    "fvd2048_16f": (2048, 2048, 16, 1, "fvd"),
    "fvd2048_128f": (2048, 2048, 128, 1, "fvd"),
    "fvd2048_128f_subsample8f": (2048, 2048, 16, 8, "fvd"),
    "kvd2048_16f": (2048, 2048, 16, 1, "kvd"),
    "fid50k_full": (None, 50_000, 1, 1, "fid"),
    "kid50k_full": (1_000_000, 50_000, 1, 1, "kid"),
    "is50k": (0, 50_000, 1, 1, "is"),
    "isv2048_ucf": (0, 2048, 16, 1, "isv"),
    "fid50k": (50_000, 50_000, 1, 1, "fid"),
    "kid50k": (50_000, 50_000, 1, 1, "kid"),
}


def test_official_metrics_have_the_official_counts() -> None:
    assert tuple(OFFICIAL_METRICS) == OFFICIAL
    for name, expected in OFFICIAL_METRICS.items():
        each = parse_metric(name)
        assert (each.num_real, each.num_fake, each.frames, each.subsample, each.family) == expected
    assert parse_metric("isv2048_ucf").shuffle_seed == 42


def test_other_numbers_and_wrong_names() -> None:
    small = parse_metric("fvd64_32f_subsample2f")
    assert (small.num_real, small.num_fake, small.frames, small.subsample) == (64, 64, 16, 2)
    assert (parse_metric("fid5k_full").num_real, parse_metric("fid5k_full").num_fake) == (None, 5000)
    assert parse_metric("isv64_ucf").shuffle_seed == 42
    for name, reason in (
        ("fid50k_fu", "did you mean 'fid50k_full'"),
        ("fvd2048", "'fvd2048' is unknown"),
        ("fvd64_16f_subsample3f", "16 frames are not divisible by the stride 3"),
        ("fvd1_16f", "at least 2 items"),
        ("fvd64_0f", "at least 1 frame"),
    ):
        refuses(reason, parse_metric, name)
    refuses("--protocol: 'late' is unknown, use one of stylegan-v, latte", build_protocol, "late")
    refuses("--real_stride is 0", build_protocol, "latte", real_stride=0)


def test_a_changed_protocol_says_so() -> None:
    assert build_protocol("latte", "ffs", real_stride=3, fake_stride=None).changed == ()
    assert build_protocol("latte", "ffs", real_stride=1, resolution=128).changed == ("real_stride=1",)


def picture(height: int, width: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, height, width), dtype=np.uint8))


def test_crops_are_pillows_filter_on_the_right_square() -> None:
    frames = picture(40, 60)
    image = Image.fromarray(frames[1].permute(1, 2, 0).numpy())
    square = image.crop((10, 0, 50, 40)).resize((32, 32), Image.Resampling.LANCZOS)
    assert np.array_equal(fit(frames, "center_crop_then_resize", 32)[1].permute(1, 2, 0), np.asarray(square))
    small = image.resize((48, 32), Image.Resampling.LANCZOS).crop((8, 0, 40, 32))
    assert np.array_equal(fit(frames, "resize_then_center_crop", 32)[1].permute(1, 2, 0), np.asarray(small))
    for crop in ("center_crop_then_resize", "resize_then_center_crop"):
        assert fit(frames, crop, 50).shape == (2, 3, 50, 50)  # also to larger sizes
        assert fit(frames, crop, None) is frames
        square_frames = picture(32, 32)
        assert fit(square_frames, crop, 32) is square_frames


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.double() - b.double()).square().mean()))


@needs_media
def test_published_storage_is_that_of_the_official_files(tmp_path: Path) -> None:
    """imageio's quality 9, and Pillow's JPEG with a `q` that it does not know, as the official tools write them."""
    reader = open_video(CLIPS / "action" / "vision__v_SoccerJuggling_g23_c01.avi")
    frames = fit(reader.read(range(40, 56)), "center_crop_then_resize", 256)
    shown, how = frames.permute(0, 2, 3, 1).numpy(), {"fps": MP4_FPS, "quality": 9, "codec": "libx264"}
    iio.imwrite(tmp_path / "a.mp4", shown, plugin="FFMPEG", **how)
    theirs, ours = open_video(tmp_path / "a.mp4").read(range(16)), through_mp4(frames)
    assert psnr(frames, ours) == pytest.approx(psnr(frames, theirs), abs=0.1)
    assert psnr(theirs, ours) > 50  # another build of the encoder
    Image.fromarray(frames[3].permute(1, 2, 0).contiguous().numpy()).save(tmp_path / "a.jpg", q=95)
    assert torch.equal(open_video(tmp_path / "a.jpg").read([0])[0], through_jpeg(frames)[3])
    assert 42 < psnr(frames, ours) < 45 and 36 < psnr(frames, through_jpeg(ours)) < 41  # measured beforehand


def test_sizes_that_the_official_files_would_stretch_are_refused() -> None:
    refuses("frames of 60x40 cannot be stored as the official mp4", through_mp4, picture(40, 60))
