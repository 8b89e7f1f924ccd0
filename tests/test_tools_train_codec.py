"""The codec's training tool on a tiny set: what it writes loads and measures, and resuming changes nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from models.autoencoder import CodecConfig, LatentCodec
from tools import make_demo_data, train_codec


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo set just large enough to hold group 25."""
    out = tmp_path_factory.mktemp("set") / "demo"
    arguments = ["--out", str(out), "--clips-per-class", "25", "--frames", "16", "--workers", "1"]
    make_demo_data.main(arguments)
    for file in out.glob("*/*_g[01]?_c01.mp4"):  # six clips a class are enough here
        file.unlink()
    return out


@pytest.fixture(autouse=True)
def few_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_codec, "STATISTICS_STEPS", 24)


def train(clips: Path, work: Path, *flags: str) -> Path:
    out = work / "codec"
    train_codec.main(["--data", str(clips), "--out", str(out), "--work", str(work), *flags])
    return out


def test_the_folder_is_a_codec_with_its_recipe(clips: Path, tmp_path: Path) -> None:
    out = train(clips, tmp_path, "--steps", "3", "--decoder-steps", "1")
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["command"] == f"python -m tools.train_codec --data {clips} --steps 3 --decoder-steps 1 --seed 0"
    figures = recipe["held_out"][str(clips)]
    assert f"PSNR {figures['psnr']:.1f} dB" in (out / "README.md").read_text()
    assert (tmp_path / "demo.png").is_file()
    codec = LatentCodec.from_config(CodecConfig(path=str(out), latent_channels=16, scale=1.0))
    latents = codec.encode(train_codec.read_clips(clips).held_out.float() / 127.5 - 1)
    assert latents.shape[2:] == (16, 4, 4)
    assert latents.mean().item() == pytest.approx(figures["latent_mean"], abs=1e-3)
    assert latents.std().item() == pytest.approx(figures["latent_std"], abs=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codec", "demo.png", "state.pt"]


@pytest.mark.parametrize("stopped_at", [2, 3, 4, 5])
def test_a_resumed_run_is_the_same_run(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: int
) -> None:
    """Stopped within the first stage, between the two, within the second, and when all was done."""
    monkeypatch.setattr(train_codec, "SAVE_EVERY", 1)
    folders = [train_codec.read_clips(clips)]
    run = train_codec.Run(3, 2, 0, tmp_path / "state.pt", False, {})
    whole = train_codec.train(folders, run).state_dict()

    saved = train_codec.save_state

    def stop(path: Path, state: dict[str, Any]) -> None:
        saved(path, state)
        if state["step"] == stopped_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_codec, "save_state", stop)
    with pytest.raises(KeyboardInterrupt):
        train_codec.train(folders, run)
    monkeypatch.setattr(train_codec, "save_state", saved)
    parts = train_codec.train(folders, replace(run, resume=True)).state_dict()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_the_second_stage_trains_the_decoder_alone(clips: Path, tmp_path: Path) -> None:
    """And on the folded latents: only the encoder's last convolution changes, by the folding."""
    folders = [train_codec.read_clips(clips)]

    def weights(decoder_steps: int) -> dict[str, torch.Tensor]:
        run = train_codec.Run(2, decoder_steps, 0, tmp_path / "state.pt", False, {})
        return train_codec.train(folders, run).state_dict()

    before, after = weights(0), weights(2)
    for key in before:
        assert torch.equal(before[key], after[key]) == key.startswith("encoder."), key


def test_training_lowers_the_loss(clips: Path) -> None:
    """Fifty small steps bring the loss below half."""
    few = train_codec.read_clips(clips)
    torch.manual_seed(0)
    network = train_codec.new_network()
    optimiser = torch.optim.AdamW(network.parameters(), lr=train_codec.LEARNING_RATE)
    losses, (stage, _) = [], train_codec.stages(50, 0)
    for step in range(50):
        batches = [train_codec.draw_batch(few, 8 * 1024, step, 0)]
        loss = train_codec.step_loss(network, batches, step, 0, stage)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_folding_standardises_each_channel_and_does_no_more(clips: Path) -> None:
    """Mean 0, deviation 1, and an affine function of what the encoder gave before."""
    folder = train_codec.read_clips(clips)
    torch.manual_seed(0)
    network = train_codec.new_network().eval()
    frames = [train_codec.draw_batch(folder, 2**19, 0, 0)]
    with torch.no_grad():
        raw = network.encode(frames[0]).latents
        train_codec.fold_statistics(network, [folder], seed=0)
        folded = network.encode(frames[0]).latents
    assert folded.mean(dim=(0, 2, 3)).abs().max() < 0.1
    assert (folded.std(dim=(0, 2, 3)) - 1).abs().max() < 0.1
    slope = (folded.std(dim=(0, 2, 3)) / raw.std(dim=(0, 2, 3)))[:, None, None]
    torch.testing.assert_close(
        folded - folded.mean(dim=(0, 2, 3), keepdim=True),
        slope * (raw - raw.mean(dim=(0, 2, 3), keepdim=True)),
        rtol=1e-3,
        atol=1e-4,
    )


def test_statistics_pool_latents_of_several_sizes() -> None:
    parts = [torch.randn(3, 2, 4, 4), torch.randn(1, 2, 8, 8) * 5 + 2]
    values = torch.cat([part.transpose(0, 1).reshape(2, -1) for part in parts], dim=1).double()
    mean, std = train_codec.statistics(parts)
    torch.testing.assert_close(mean.flatten().double(), values.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(std.flatten().double(), values.std(1), rtol=1e-4, atol=1e-4)


def test_a_body_left_out_costs_more_than_a_wrong_ground() -> None:
    target = torch.full((1, 3, 16, 16), -0.5)
    target[:, 0, :4, :4] = 1.0
    without_body, off_ground = torch.full_like(target, -0.5), target + 0.375
    plain = (without_body - target).square().mean(), (off_ground - target).square().mean()
    assert plain[0] < plain[1]
    loss = partial(train_codec.picture_loss, target=target, body_weight=train_codec.BODY_WEIGHT)
    assert loss(without_body) > loss(off_ground)
    assert train_codec.picture_loss(off_ground, target, 0.0) == (off_ground - target).square().mean()


def test_the_rate_of_each_stage_warms_up_and_ends_at_zero() -> None:
    for stage in train_codec.stages(1000, 500):
        rates = [stage.learning_rate(step) for step in range(stage.start, stage.stop)]
        assert rates[0] == pytest.approx(train_codec.LEARNING_RATE / train_codec.WARMUP_STEPS, rel=1e-3)
        assert max(rates) == pytest.approx(train_codec.LEARNING_RATE, rel=0.03)
        assert rates[-1] < 1e-4 * train_codec.LEARNING_RATE


def test_mistakes_are_sentences(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make_demo_data"):
        train(tmp_path / "nowhere", tmp_path)
    with pytest.raises(FileNotFoundError, match="--resume: there is no run"):
        train(clips, tmp_path, "--resume", "--steps", "2")
    with pytest.raises(ValueError, match="--steps is 0"):
        train(clips, tmp_path, "--steps", "0")
    one = tmp_path / "one" / "RedDiscRight"
    one.mkdir(parents=True)
    shutil.copy(next(clips.glob("*/*_g24_*.mp4")), one)
    with pytest.raises(ValueError, match="group 25"):
        train(one.parent, tmp_path)


def test_resuming_with_other_arguments_is_refused(clips: Path, tmp_path: Path) -> None:
    train(clips, tmp_path, "--steps", "1", "--decoder-steps", "0")
    with pytest.raises(ValueError, match="has other arguments"):
        train(clips, tmp_path, "--steps", "2", "--decoder-steps", "0", "--resume")
