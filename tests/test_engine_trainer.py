"""The loop: files of a run, joint training, every kind of run, initial weights; which folder is a checkpoint."""

from pathlib import Path

import pytest
import torch

from engine.checkpoint import CheckpointError, find_checkpoint, load_checkpoint, read_config
from engine.config import OptimConfig, load_config
from engine.optim import learning_rate_at
from engine.weights import export_weights, load_model_weights
from tests.fault_support import make, newest, restore, rows, run, same_tensors


def test_files_and_rows_of_a_run(tiny: list[str], tmp_path: Path) -> None:
    trainer = run([*tiny, "train.max_steps=3", "train.checkpoint_every=2"])
    folder = tmp_path / "run"
    assert load_config(folder / "config.yaml") == trainer.config
    names = sorted(entry.name for entry in (folder / "checkpoints").iterdir())
    assert names == ["latest", "step-0000002", "step-0000003"]
    table = rows(folder)
    assert [row["step"] for row in table] == [1, 2, 3]
    assert [row["samples_seen"] for row in table] == [2, 4, 6]
    assert {"loss", "mse", "vb", "grad_norm", "learning_rate", "videos_per_second"} <= table[0].keys()
    assert table[0]["loss"] == pytest.approx(table[0]["mse"] + table[0]["vb"], rel=1e-5)
    assert list((folder / "tensorboard").iterdir())


def test_joint_training_logs_image_and_video_loss_apart(tiny: list[str], tmp_path: Path) -> None:
    run([*tiny, "data.num_images=3", "train.max_steps=2"])
    for row in rows(tmp_path / "run"):
        assert row["loss"] == pytest.approx((4 * row["video_loss"] + 3 * row["image_loss"]) / 7, rel=1e-5)


@pytest.mark.parametrize(
    "extra",
    [
        ["model.variant=late_fusion", "model.temporal_position=rope", "diffusion.timestep_density=linear"],
        ["model.variant=sequential", "model.patch_embedding=tubelet", "data.num_images=2"],
        ["diffusion.prediction=flow", "model.learn_sigma=false", "model.num_classes=0", "model.injection=tokens"],
        ["diffusion.prediction=velocity", "train.precision=bf16", "model.gradient_checkpointing=true"],
    ],
    ids=lambda extra: extra[0].partition(".")[2],
)
def test_every_kind_of_run_trains(tiny: list[str], tmp_path: Path, extra: list[str]) -> None:
    steps = ["train.max_steps=12", "optim.learning_rate=1e-2", "data.max_clips=2", "optim.max_grad_norm=10"]
    trainer = make([*tiny, *extra, *steps])
    trainer.parallel_model = trainer.state.model
    batch = next(trainer.run.batches(trainer.state.samples_seen))
    losses = [float(trainer.launch_step(batch)[0]["loss"]) for _ in range(12)]
    assert losses[-1] < 0.9 * losses[0], losses


def check_extra_terms(overrides: list[str]) -> None:
    """A term on hidden states is added to the loss and logged; the loss terms of validation stay as they are."""
    trainer = make(overrides)
    objective, model = trainer.objective, trainer.state.model
    (batch,) = next(trainer.batches())
    plain = objective(model, batch)
    objective.hidden_blocks = (1,)
    objective.extra_terms = lambda states, _: {"size": states[1].square().mean((1, 2, 3))}  # type: ignore[method-assign]
    found = objective(model, batch)
    torch.testing.assert_close(found.loss, plain.loss + found.parts["size"])
    assert torch.equal(found.per_clip, plain.per_clip) and found.parts["size"] > 0
    assert all(torch.equal(found.parts[name], value) for name, value in plain.parts.items())


@pytest.mark.parametrize("extra", [[], ["data.num_images=2"], ["condition.frames=prefix"]], ids=str)
def test_a_term_on_hidden_states(tiny: list[str], extra: list[str]) -> None:
    check_extra_terms([*tiny, *extra])


def test_min_snr_weighs_the_trained_loss_only(tiny: list[str]) -> None:
    settings = ["diffusion.prediction=x_start", "model.learn_sigma=false", "diffusion.loss_weighting=min_snr"]
    trainer = make([*tiny, *settings])
    (batch,) = next(trainer.batches())
    found = trainer.objective(trainer.state.model, batch)
    signal = trainer.objective.diffusion.tables["alphas_cumprod"][found.timesteps]  # type: ignore[union-attr]
    weights = (signal / (1 - signal)).clamp(max=5).float()
    torch.testing.assert_close(found.loss, (weights * found.per_clip).mean())
    torch.testing.assert_close(found.parts["loss"], found.per_clip.mean())


def test_init_from_takes_weights_and_starts_at_step_zero(tiny: list[str], tmp_path: Path) -> None:
    first = run([*tiny, "train.max_steps=2", f"train.output_dir={tmp_path / 'first'}"])
    source = str(tmp_path / "first")
    second = make([*tiny, f"train.init_from={source}"])
    notes = restore(second)
    assert same_tensors(second.state.model.state_dict(), first.state.ema.state_dict())
    assert second.state.step == 0 and source in notes[0]


def test_learning_rate_schedules() -> None:
    constant = OptimConfig(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate_at(step, constant, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = OptimConfig(learning_rate=1.0, schedule="cosine", min_learning_rate=0.2)
    assert learning_rate_at(0, cosine, 10) == 1.0
    assert learning_rate_at(5, cosine, 10) == pytest.approx(0.6)
    assert learning_rate_at(10, cosine, 10) == pytest.approx(0.2)


def test_other_folders_are_named_and_an_export_holds_one_set_of_weights(finished: Path, tmp_path: Path) -> None:
    for place, sentence in ((tmp_path / "nothing", "does not exist"), (tmp_path, "holds no checkpoint")):
        with pytest.raises(CheckpointError, match=sentence):
            find_checkpoint(place)
    (tmp_path / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(CheckpointError, match="format 'other'"):
        find_checkpoint(tmp_path)
    saved = load_checkpoint(newest(finished))
    target = export_weights(finished, tmp_path / "export")
    assert same_tensors(load_model_weights(target, "ema"), saved.ema)
    assert same_tensors(load_model_weights(finished, "raw"), saved.model)
    with pytest.raises(CheckpointError, match="'raw' weights"):
        load_model_weights(target, "raw")
    assert read_config(target) == read_config(newest(finished))
