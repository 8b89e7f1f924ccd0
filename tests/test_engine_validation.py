"""Validation: its numbers by hand, on any number of ranks, and where they end up."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datasets import DataConfig, build_dataset
from engine.errors import CheckpointNotWritten
from engine.trainer import Trainer
from engine.validation import spread
from tests.fault_support import logged, make, rows, run
from tests.latent_support import cache

BUCKETS = 4
UNSEEN = ["diffusion.timestep_density=linear", "model.label_dropout=0.9"]  # validation reads neither


def validated(tiny: list[str], *extra: str, every: int = 2) -> list[str]:
    """The tiny run, validated on the clips that it is trained on: 6 of them."""
    path = next(each.partition("=")[2] for each in tiny if each.startswith("data.path="))
    return [*tiny, f"data.val_path={path}", f"monitor.val_every={every}", f"monitor.val_buckets={BUCKETS}", *extra]


def val_rows(folder: Path) -> list[dict[str, Any]]:
    return logged(folder, "val")


def by_hand(trainer: Trainer, network: torch.nn.Module, folder: Path) -> np.ndarray:
    """(clips, buckets) losses, from the definitions: one forward at a time, float64."""
    config = trainer.config
    data = DataConfig(path=str(folder), num_frames=4, frame_interval=1, image_size=8, num_images=config.data.num_images)
    dataset = build_dataset(data, seed=config.train.seed)
    signal = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    table = np.zeros((len(dataset), BUCKETS))
    for clip in range(len(dataset)):
        item = dataset[0, clip]
        x = item["video"].double()
        state = np.random.SeedSequence([config.train.seed, 2**48 + 2 * clip + 1]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state) >> 1)
        noise = torch.randn(BUCKETS, *x.shape, generator=generator).double()
        uniform = torch.rand(BUCKETS, generator=generator, dtype=torch.float64)
        for bucket in range(BUCKETS):
            time = 1000 * (bucket + float(uniform[bucket])) / BUCKETS
            if config.diffusion.prediction == "flow":
                step = torch.tensor([time], dtype=torch.float32)
                share = float(step) / 1000
                noisy, target = (1 - share) * x + share * noise[bucket], noise[bucket] - x
            else:
                step, kept = torch.tensor([int(time)]), signal[int(time)]
                noisy, target = kept**0.5 * x + (1 - kept) ** 0.5 * noise[bucket], noise[bucket]
            labels = item["labels"][None] if config.model.num_classes else None
            with torch.no_grad():
                output = network(noisy[None], step, labels, num_images=config.data.num_images)[0]
            table[clip, bucket] = float(((output - target) ** 2).mean())
    return table


@pytest.mark.parametrize(
    "extra", [["diffusion.prediction=flow"], ["data.num_images=2", *UNSEEN], ["model.num_classes=0"]], ids=str
)
def test_every_number_by_hand(tiny: list[str], frame_folders: Path, tmp_path: Path, extra: list[str]) -> None:
    """Average and raw weights after two steps; 1e-12 (flow: 1e-7, its times are float32)."""
    common = ["train.precision=fp64", "model.learn_sigma=false", "train.max_steps=2", "optim.learning_rate=1e-2"]
    trainer = run(validated(tiny, *common, "train.ema_decay=0.5", *extra))
    row = val_rows(tmp_path / "run")[-1]
    assert row["step"] == 2 and row["clips"] == 6
    tolerance = 1e-7 if "diffusion.prediction=flow" in extra else 1e-12
    for name, network in (("ema", trainer.state.ema.model), ("raw", trainer.state.model)):
        table = by_hand(trainer, network, frame_folders)
        assert row[f"{name}/loss"] == pytest.approx(table.mean(), abs=tolerance)
        shares = ["0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00"]
        assert [row[f"{name}/loss_t{share}"] for share in shares] == pytest.approx(table.mean(0), abs=tolerance)
    assert row["ema/loss"] != row["raw/loss"]
    if trainer.config.data.num_images:
        parts = (4 * row["raw/video_loss"] + 2 * row["raw/image_loss"]) / 6
        assert row["raw/loss"] == pytest.approx(parts, rel=1e-9)


def test_rows_and_tensorboard(tiny: list[str], tmp_path: Path) -> None:
    run(validated(tiny, "train.max_steps=5"))
    folder = tmp_path / "run"
    assert [row["step"] for row in val_rows(folder)] == [0, 2, 4, 5]
    assert {row["kind"] for row in rows(folder)} == {"train", "val"}
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    last = val_rows(folder)[-1]
    for name in set(last) - {"step", "kind"}:
        events = board.Scalars(f"val/{name}")
        assert [event.step for event in events] == [0, 2, 4, 5]
        assert events[-1].value == pytest.approx(last[name], rel=1e-6)
    assert len(board.Scalars("train/loss")) == 5


def test_a_loss_that_is_no_number_leaves_json_that_is(tiny: list[str], tmp_path: Path) -> None:
    """A run that has diverged cannot be saved, but what was seen of it stays readable."""
    trainer = make(validated(tiny, "train.max_steps=1"))
    with torch.no_grad():
        next(trainer.state.ema.model.parameters()).fill_(torch.nan)
    with pytest.raises(CheckpointNotWritten, match="non-finite"):
        trainer.fit()
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    row = val_rows(tmp_path / "run")[0]
    assert "NaN" not in text and row["ema/loss"] is None and row["raw/loss"] > 0


def test_clips_are_spread_over_the_set() -> None:
    assert spread(10, 4) == [0, 2, 5, 7]
    assert spread(3, 64) == [0, 1, 2]
    assert spread(1000, 999)[-1] < 1000 and len(set(spread(1000, 999))) == 999


def test_held_out_latents_give_what_held_out_videos_give(tiny: list[str], tmp_path: Path) -> None:
    share = [*tiny, "data.num_images=2", "data.val_share=0.4", "monitor.val_every=2", f"monitor.val_buckets={BUCKETS}"]
    cached = [f"data.latents={cache(share, tmp_path / 'latents')}", f"train.output_dir={tmp_path / 'cached'}"]
    run([*share, "train.max_steps=2"])
    run([*share, *cached, "train.max_steps=2"])
    online = val_rows(tmp_path / "run")
    assert online == val_rows(tmp_path / "cached")
    assert 0 < online[-1]["clips"] < 6
