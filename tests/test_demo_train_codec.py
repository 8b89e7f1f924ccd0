"""demo/train_codec.py on a tiny set: what it writes is a codec, measured on clips that were kept out."""

import json
from pathlib import Path

import pytest
import torch

from demo import data, drawn, train_codec
from models.autoencoder import CodecConfig, LatentCodec
from tests.conftest import refuses


def test_it_trains_a_codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_codec, "STATISTICS_STEPS", 8)
    clips, out = tmp_path / "demo", tmp_path / "codec"
    parameters = {"seed": 0, "size": 32, "frames": 16}
    for label, kind in enumerate(drawn.CLASSES):
        (clips / kind.name).mkdir(parents=True)
        for index in (0, 1, 2, 3, 4, 24):  # the last one is of the group that is kept out
            data.make_clip(clips, parameters, (label, index))
    command = ["--data", str(clips), "--out", str(out), "--steps", "40", "--decoder-steps", "2"]
    train_codec.main(command)
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["command"] == "python -m demo.train_codec " + " ".join(command)
    figures = recipe["held_out"][str(clips)]
    assert figures["psnr"] > 12 and figures["latent_std"] == pytest.approx(1, abs=0.5)
    codec = LatentCodec.from_config(CodecConfig(path=str(out), latent_channels=16, scale=1.0))
    held_out, _ = train_codec.read_clips(clips, held_out=True)
    latents = codec.encode(held_out.float() / 127.5 - 1)
    assert latents.shape[2:] == (16, 4, 4) and latents.isfinite().all()
    assert latents.mean().item() == pytest.approx(figures["latent_mean"], abs=1e-3)
    refuses("exists already", train_codec.main, command)
    refuses("is not a demo set", train_codec.main, ["--data", str(tmp_path), "--out", str(tmp_path / "other")])


def test_the_statistics_are_of_every_channel() -> None:
    parts = [torch.randn(3, 16, 4, 4) * 3 + 2, torch.randn(2, 16, 8, 8) * 3 + 2]
    mean, std = train_codec.statistics(parts)
    values = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], 1)
    assert torch.allclose(mean.flatten(), values.mean(1)) and torch.allclose(std.flatten(), values.std(1), atol=1e-4)
