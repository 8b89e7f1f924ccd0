"""Real clips against codec reconstructions of three qualities, shuffled frames and other clips: the order of values.

With the MobileNetV2 stand-in, whose values compare with nothing published: their order is what counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.readers import open_video
from evaluation.pixels import fit
from evaluation.sources import shuffle_frames
from models.autoencoder import CodecConfig, LatentCodec
from tools import calc_metrics_for_dataset as command

SHARED = Path(__file__).resolve().parents[2] / "shared"
DETECTOR = SHARED / "weights" / "mobilenet_v2_imagenet_dequantized.pth"
SIZE, SIZES = 128, (128, 96, 64)  # pixels of the clips, and at which they go through the codec
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DETECTOR.is_file(), reason="needs ../shared: real clips, a codec, a detector"),
]


ROLES = {
    "signing against the rest": (("asl",), ("action", "open")),
    "actions against signing": (("action",), ("asl",)),
    "open clips against signing": (("open",), ("asl",)),
}


def clips_of(*folders: str) -> list[np.ndarray]:
    """The middle 16 frames of each of up to 13 videos, 128 x 128."""
    clips = []
    files = [file for folder in folders for file in sorted((SHARED / "media" / "clips" / folder).iterdir())]
    for file in files[:13]:
        reader = open_video(file)
        start = (len(reader) - 16) // 2
        frames = fit(reader.read(range(start, start + 16)), "center_crop_then_resize", SIZE)
        clips.append(frames.permute(0, 2, 3, 1).numpy())
    return clips


def through_codec(codec: LatentCodec, size: int) -> Callable[[np.ndarray], np.ndarray]:
    """Encoded and decoded at `size` pixels: the smaller, the less is kept."""

    def scaled(frames: Tensor, side: int) -> Tensor:
        return F.interpolate(frames, (side, side), mode="bilinear", antialias=True)

    def change(clip: np.ndarray) -> np.ndarray:
        frames = torch.from_numpy(clip).permute(0, 3, 1, 2).float() / 127.5 - 1
        back = codec.decode(codec.encode(scaled(frames, size)[None]))[0]
        pixels = (scaled(back, SIZE) * 127.5 + 127.5).round().clamp(0, 255)
        return pixels.byte().permute(0, 2, 3, 1).numpy()

    return change


def save(folder: Path, clips: list[np.ndarray]) -> Path:
    folder.mkdir(parents=True)
    for number, clip in enumerate(clips):
        np.save(folder / f"{number:06d}.npy", clip)
    return folder


def psnr(clips: list[np.ndarray], others: list[np.ndarray]) -> float:
    squared = [np.square(a.astype(float) - b).mean() for a, b in zip(clips, others)]
    return float(np.mean(10 * np.log10(255**2 / np.array(squared))))


def order(clip: np.ndarray, name: str) -> np.ndarray:
    from datasets.catalog import Clip

    return shuffle_frames(torch.from_numpy(clip), Clip("", name, 0)).numpy()


@pytest.mark.parametrize("roles", ROLES.values(), ids=ROLES)
def test_values_come_in_the_right_order(
    roles: tuple[tuple[str, ...], tuple[str, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real, others = (clips_of(*folders) for folders in roles)
    config = CodecConfig(path=str(SHARED / "weights"), latent_channels=32, scale=1.0)
    codec = LatentCodec.from_config(config)
    sets = {f"codec at {size} px": list(map(through_codec(codec, size), real)) for size in SIZES}
    quality = {name: psnr(real, made) for name, made in sets.items()}
    sets |= {"the same clips": real, "shuffled frames": [order(clip, str(i)) for i, clip in enumerate(real)]}
    sets |= {"other clips": others}
    folder, rows = save(tmp_path / "real", real), {}
    for number, (name, made) in enumerate(sets.items()):
        out = tmp_path / f"{number}.json"
        command.main(
            ["--real_data_path", str(folder), "--fake_data_path", str(save(tmp_path / f"fake{number}", made)),
             "--metrics", "fvd2048_16f,kvd2048_16f,fid50k_full", "--protocol", "stylegan-v",
             "--detector", str(DETECTOR), "--out", str(out),
             "--cache_dir", str(tmp_path / "cache"), "--workers", "0", "--verbose", "0"]
        )  # fmt: skip
        rows[name] = json.loads(out.read_text())["metrics"]
    values = {name: {metric[:3]: entry["value"] for metric, entry in row.items()} for name, row in rows.items()}
    floor = rows["other clips"]["fvd2048_16f"]["floor"]
    with capsys.disabled():
        print(f"\n{len(real)} real clips, floor (half against half) {floor:.2f}")
        for name, row in sorted(values.items(), key=lambda item: item[1]["fvd"]):
            said = "  ".join(f"{metric} {value:8.3f}" for metric, value in row.items())
            print(f"{name:<16} {said}  {quality.get(name, float('nan')):5.1f} dB")
    for metric in ("fvd", "kvd", "fid"):
        ranked = ["the same clips", *(f"codec at {size} px" for size in SIZES), "other clips"]
        found = [values[name][metric] for name in ranked]
        assert found == sorted(found) and len(set(found)) == len(found), metric
    assert list(quality.values()) == sorted(quality.values(), reverse=True)
    assert values["shuffled frames"]["fvd"] > 10 * abs(values["the same clips"]["fvd"]) + 1e-3
    assert values["shuffled frames"]["fid"] == pytest.approx(0, abs=1e-6)  # frames by themselves have no order
    assert values["shuffled frames"]["fvd"] < values["other clips"]["fvd"]
    shuffled_real = rows["the same clips"]["fvd2048_16f"]["shuffled"]
    assert shuffled_real == pytest.approx(values["shuffled frames"]["fvd"], rel=0.5)
