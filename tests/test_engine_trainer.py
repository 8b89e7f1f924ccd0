"""The loop: accumulation, resume, ranks, joint training, initial weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import checkpoint as ckpt
from engine.config import OptimConfig, load_config
from engine.distributed import World
from engine.optim import learning_rate_at
from engine.trainer import Trainer
from engine.weights import load_model_weights

ROOT = Path(__file__).resolve().parents[1]
from tests.fault_support import restore


def run(overrides: list[str]) -> Trainer:
    trainer = Trainer(load_config(None, overrides), World())
    trainer.fit()
    return trainer


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}")


def test_a_run_leaves_what_it_promises(tiny: list[str], tmp_path: Path) -> None:
    trainer = run([*tiny, "train.max_steps=3", "train.checkpoint_every=2"])
    folder = tmp_path / "run"
    assert load_config(folder / "config.yaml") == trainer.config
    assert sorted(entry.name for entry in (folder / "checkpoints").iterdir()) == [
        "latest",
        "step-0000002",
        "step-0000003",
    ]
    table = rows(folder)
    assert [row["step"] for row in table] == [1, 2, 3]
    assert [row["samples_seen"] for row in table] == [2, 4, 6]
    assert {"loss", "mse", "vb", "grad_norm", "learning_rate", "videos_per_second"} <= table[0].keys()
    assert table[0]["loss"] == pytest.approx(table[0]["mse"] + table[0]["vb"], rel=1e-5)
    assert list((folder / "tensorboard").iterdir())


def test_accumulation_equals_one_large_batch_in_float64(tiny: list[str], tmp_path: Path) -> None:
    common = [*tiny, "train.max_steps=4", "train.precision=fp64", "optim.max_grad_norm=0.05"]
    splits = [
        [f"train.batch_size={6 // k}", f"train.grad_accum_steps={k}", f"train.output_dir={tmp_path / str(k)}"]
        for k in (1, 3, 6)
    ]
    trainers = [run([*common, *split]) for split in splits]
    for other in trainers[1:]:
        same(other.state.model.state_dict(), trainers[0].state.model.state_dict(), 1e-12)
        same(other.state.ema.state_dict(), trainers[0].state.ema.state_dict(), 1e-12)
    losses = [[row["loss"] for row in rows(tmp_path / str(k))] for k in (1, 3, 6)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-12) and losses[2] == pytest.approx(losses[0], abs=1e-12)


@pytest.mark.parametrize("extra", [[], ["diffusion.timestep_sampler=loss_aware", "model.label_dropout=0.5"]])
def test_resume_continues_bit_for_bit(tiny: list[str], tmp_path: Path, extra: list[str]) -> None:
    whole = run([*tiny, *extra, "train.max_steps=7", f"train.output_dir={tmp_path / 'whole'}"])
    parts = [*tiny, *extra, f"train.output_dir={tmp_path / 'parts'}"]
    run([*parts, "train.max_steps=4"])
    continued = run([*parts, "train.max_steps=7"])
    same(continued.state.model.state_dict(), whole.state.model.state_dict())
    same(continued.state.ema.state_dict(), whole.state.ema.state_dict())
    same(continued.state_dict().optim, whole.state_dict().optim)
    timing = {"videos_per_second", "seconds_per_step", "data_wait_share", "memory_gib"}
    names = ("whole", "parts")
    logs = [[{k: v for k, v in row.items() if k not in timing} for row in rows(tmp_path / name)] for name in names]
    assert logs[0] == logs[1]


def test_a_finished_run_does_nothing_when_started_again(tiny: list[str], tmp_path: Path) -> None:
    first = run([*tiny, "train.max_steps=2"])
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = run([*tiny, "train.max_steps=2"])
    same(first.state.model.state_dict(), again.state.model.state_dict())
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_resume_refuses_another_experiment(tiny: list[str]) -> None:
    run([*tiny, "train.max_steps=1"])
    with pytest.raises(ValueError, match=r"optim\.learning_rate: 0\.001 -> 0\.002"):
        run([*tiny, "train.max_steps=2", "optim.learning_rate=2e-3"])
    with pytest.raises(ValueError, match="global_batch_size: 2 -> 4"):
        run([*tiny, "train.max_steps=2", "train.batch_size=4"])


def test_a_damaged_checkpoint_gives_way_to_the_older_one(tiny: list[str], tmp_path: Path) -> None:
    run([*tiny, "train.max_steps=2", "train.checkpoint_every=1"])
    newest = ckpt.list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    weights = newest / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ckpt.CheckpointError, match=r"model\.safetensors does not match"):
        ckpt.verify(newest)
    trainer = Trainer(load_config(None, [*tiny, "train.max_steps=2"]), World())
    notes = restore(trainer)
    assert trainer.state.step == 1
    assert any("warning" in note and "step-0000002" in note for note in notes)


def test_joint_training_logs_image_and_video_loss_apart(tiny: list[str], tmp_path: Path) -> None:
    run([*tiny, "data.num_images=3", "train.max_steps=2"])
    for row in rows(tmp_path / "run"):
        assert row["loss"] == pytest.approx((4 * row["video_loss"] + 3 * row["image_loss"]) / 7, rel=1e-5)


@pytest.mark.parametrize(
    "extra",
    [
        ["model.variant=late_fusion", "model.temporal_position=rope"],
        ["model.variant=sequential", "model.patch_embedding=tubelet", "data.num_images=2"],
        ["model.variant=parallel", "model.injection=tokens"],
        ["model.num_classes=0", "model.learn_sigma=false"],
        ["diffusion.prediction=flow", "model.learn_sigma=false", "diffusion.timestep_density=logit_normal"],
        ["diffusion.prediction=velocity", "train.precision=bf16", "model.gradient_checkpointing=true"],
        ["diffusion.prediction=x_start", "diffusion.timestep_density=linear", "optim.schedule=cosine"],
    ],
    ids=lambda extra: extra[0].partition(".")[2],
)
def test_every_kind_of_run_trains(tiny: list[str], tmp_path: Path, extra: list[str]) -> None:
    """Twelve steps on one repeated batch bring the loss down."""
    steps = ["train.max_steps=12", "optim.learning_rate=1e-2", "data.max_clips=2", "optim.max_grad_norm=10"]
    trainer = Trainer(load_config(None, [*tiny, *extra, *steps]), World())
    trainer.parallel_model = trainer.state.model
    batch = next(trainer.run.batches(trainer.state.samples_seen))
    losses = [float(trainer.launch_step(batch)[0]["loss"]) for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0], losses


def test_init_from_takes_weights_and_starts_at_step_zero(tiny: list[str], tmp_path: Path) -> None:
    first = run([*tiny, "train.max_steps=2", f"train.output_dir={tmp_path / 'first'}"])
    source = str(tmp_path / "first")
    second = Trainer(load_config(None, [*tiny, f"train.init_from={source}"]), World())
    notes = restore(second)
    same(second.state.model.state_dict(), first.state.ema.state_dict())
    assert second.state.step == 0 and source in notes[0]
    official = tmp_path / "official.pt"
    torch.save({"ema": {f"module.{k}": v for k, v in first.state.model.state_dict().items()}}, official)
    third = Trainer(load_config(None, [*tiny, f"train.init_from={official}"]), World())
    restore(third)
    same(third.state.ema.state_dict(), first.state.model.state_dict())


def test_init_from_an_image_network_says_what_it_took(tiny: list[str], tmp_path: Path) -> None:
    first = run([*tiny, "train.max_steps=1"])
    image = {k: v for k, v in first.state.model.state_dict().items() if k != "temp_embed"}
    image["y_embedder.embedding_table.weight"] = torch.zeros(1001, 16)
    torch.save(image, tmp_path / "dit.pt")
    fresh = [f"train.init_from={tmp_path / 'dit.pt'}", "train.resume=never", f"train.output_dir={tmp_path / 'fresh'}"]
    trainer = Trainer(load_config(None, [*tiny, *fresh]), World())
    note = "\n".join(restore(trainer))
    assert "temp_embed" in note and "y_embedder.embedding_table.weight" in note
    torch.testing.assert_close(
        trainer.state.model.blocks[0].attn.qkv.weight, first.state.model.blocks[0].attn.qkv.weight
    )


def test_a_label_out_of_range_is_refused_before_training(tiny: list[str]) -> None:
    with pytest.raises(ValueError, match=r"label 1, but model\.num_classes=1 allows 0 to 0"):
        Trainer(load_config(None, [*tiny, "model.num_classes=1"]), World())


def test_learning_rate_schedules() -> None:
    constant = OptimConfig(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate_at(step, constant, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = OptimConfig(learning_rate=1.0, schedule="cosine", min_learning_rate=0.2)
    assert learning_rate_at(0, cosine, 10) == 1.0
    assert learning_rate_at(5, cosine, 10) == pytest.approx(0.6)
    assert learning_rate_at(10, cosine, 10) == pytest.approx(0.2)


def test_ema_is_the_closed_form(tiny: list[str]) -> None:
    overrides = [*tiny, "train.max_steps=5", "train.ema_decay=0.7"]
    trainer = Trainer(load_config(None, overrides), World())
    key = "blocks.0.mlp.fc1.weight"
    trajectory = [trainer.state.model.state_dict()[key].clone()]
    trainer.parallel_model = trainer.state.model
    for batch in islice(trainer.run.batches(trainer.state.samples_seen), 5):
        trainer.launch_step(batch)
        trajectory.append(trainer.state.model.state_dict()[key].clone())
    expected = 0.7**5 * trajectory[0] + sum(0.3 * 0.7 ** (5 - n) * trajectory[n] for n in range(1, 6))
    torch.testing.assert_close(trainer.state.ema.state_dict()[key], expected)


def torchrun(processes: int, overrides: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "train.py", *overrides], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.dist
def test_two_processes_equal_one_with_the_doubled_batch(tiny: list[str], tmp_path: Path) -> None:
    """gloo, float64: the same losses, gradient norms and weights to 1e-10."""
    common = [*tiny, "train.max_steps=5", "train.precision=fp64", "data.num_workers=1"]
    torchrun(2, [*common, "train.batch_size=2", f"train.output_dir={tmp_path / 'two'}"])
    one = run([*common, "train.batch_size=4", f"train.output_dir={tmp_path / 'one'}"])
    for a, b in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        for key in ("step", "samples_seen", "loss", "mse", "vb", "grad_norm"):
            assert a[key] == pytest.approx(b[key], abs=1e-10, rel=0), (key, a["step"])
    same(load_model_weights(tmp_path / "two", "raw"), one.state.model.state_dict(), 1e-10)
