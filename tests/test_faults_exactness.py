"""Faults B: to stop and go on is to have never stopped, bit for bit."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import checkpoint as ckpt
from engine.config import OptimConfig
from engine.distributed import World
from engine.optim import EMA, learning_rate_at
from engine.start import STATE_KEYS
from engine.stream import clip_at, position_batches
from engine.trainer import Trainer
from tests.fault_support import fit_rank, make, on_two_ranks, restore, rows, run, run_ranks, seal
from tests.latent_support import cache, save_codec

# 6 clips, global batch 4: an epoch ends within a step, and step 7 lies amid one
LENGTH = ["train.max_steps=12", "train.checkpoint_every=100", "model.label_dropout=0.5", "optim.warmup_steps=3"]
TIMING = {"videos_per_second", "seconds_per_step", "data_wait_share", "memory_gib"}


def logged(folder: Path) -> list[dict[str, Any]]:
    """The log without what is about time."""
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows(folder)]


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether both hold the same names and bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Weights, average and moments are equal in every bit."""
    assert [kind for kind in ("model", "ema", "optim") if not same_tensors(a[kind], b[kind])] == []


def state_of(trainer: Trainer) -> dict[str, Any]:
    saved = trainer.state_dict()
    return {kind: {k: v.clone() for k, v in getattr(saved, kind).items()} for kind in ("model", "ema", "optim")}


@pytest.fixture(scope="module")
def reference(frame_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The run that nothing disturbed, on two ranks: its folder, and what each rank ended with."""
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("whole")
    overrides = [*TINY, *LENGTH, f"data.path={frame_folders}", f"train.output_dir={folder / 'run'}"]
    return folder / "run", on_two_ranks(folder, fit_rank, overrides)


@pytest.mark.dist
@pytest.mark.parametrize("workers", [0, 2])
def test_B1_resume_equals_the_uninterrupted_run(
    tiny: list[str], tmp_path: Path, reference: tuple[Path, list[dict[str, Any]]], workers: int
) -> None:
    """Stopped by SIGTERM at step 7, amid an epoch; the same files, losses, weights, average and moments."""
    overrides = [*tiny, *LENGTH, f"data.num_workers={workers}"]
    before = on_two_ranks(tmp_path, fit_rank, overrides, "term@1:6")
    assert [result["step"] for result in before] == [7, 7]
    after = on_two_ranks(tmp_path, fit_rank, overrides)
    folder, whole = reference
    for rank in (0, 1):
        assert before[rank]["trace"] + after[rank]["trace"] == whole[rank]["trace"]
        assert_same(after[rank], whole[rank])
    assert logged(tmp_path / "run") == logged(folder)


@pytest.mark.parametrize(
    "extra",
    [
        ["data.num_images=2"],
        ["train.precision=bf16"],
        ["train.grad_accum_steps=4", "train.batch_size=1"],
        ["diffusion.timestep_sampler=loss_aware"],
        ["model.variant=parallel", "model.temporal_position=rope"],
        ["diffusion.prediction=flow", "model.learn_sigma=false", "diffusion.timestep_density=logit_normal"],
        ["train.ema_warmup=true", "optim.schedule=cosine", "train.async_checkpoint=true"],
        ["data.latents=", "data.num_images=1", "data.horizontal_flip=true"],
    ],
    ids=lambda extra: extra[0].partition(".")[2],
)
def test_B1_every_kind_of_run_resumes_exactly(tiny: list[str], tmp_path: Path, extra: list[str]) -> None:
    if extra[0] == "data.latents=":  # of a stochastic codec
        tiny = [*tiny, *save_codec(tmp_path / "codec", "AutoencoderKL")]
        extra = [f"data.latents={cache([*tiny, *extra[1:]], tmp_path / 'cache')}", *extra[1:]]
    common = [*tiny, *LENGTH, *extra, "train.max_steps=8", "train.checkpoint_every=5"]
    whole = run([*common, f"train.output_dir={tmp_path / 'whole'}"])
    parts = tmp_path / "parts"
    run([*common, f"train.output_dir={parts}"])
    checkpoints = parts / "checkpoints"
    for newer in ckpt.list_checkpoints(checkpoints)[1:]:  # as if the run had been killed after step 5
        newer.rename(checkpoints / f"{newer.name}.tmp-gone")
    continued = run([*common, f"train.output_dir={parts}"])
    assert_same(state_of(continued), state_of(whole))
    assert logged(parts) == logged(tmp_path / "whole")


def test_B2_missing_generator_states_are_refused(tiny: list[str], tmp_path: Path) -> None:
    """The negative control. Noise is drawn from (seed, position) here, so even what the flag admits is exact."""
    run([*tiny, "train.max_steps=2"])
    folder = ckpt.list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    spoil(folder, "rng.safetensors", lambda tensors: {"other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"rng\.safetensors lacks cpu/0.*--allow-inexact-resume"):
        run([*tiny, "train.max_steps=3"])
    trainer = make([*tiny, "train.max_steps=3"], allow_inexact_resume=True)
    assert any("warning" in note and "not exact" in note for note in restore(trainer))


def test_B2_noise_depends_on_seed_and_position(tiny: list[str]) -> None:
    """The negative control of a generator that is restored wrongly: another seed gives another loss."""
    losses = []
    for seed in (0, 0, 1):
        trainer = make(tiny)
        trainer.objective.seed = seed
        losses.append(float(trainer.launch_step(next(trainer.run.batches(trainer.state.samples_seen)))[0]["loss"]))
    assert losses[0] == losses[1] != losses[2]


def test_B3_save_at_an_epoch_end(tiny: list[str]) -> None:
    """6 clips, batch 2: step 3 ends the epoch; what continues its checkpoint is a whole one in another order."""
    run([*tiny, "train.max_steps=3"])
    trainer = make([*tiny, "train.max_steps=6"])
    orders = []
    for epoch in (0, 1):
        batches = [batch for (batch,) in islice(trainer.run.batches(trainer.state.samples_seen), 3)]
        positions, order = (torch.cat([batch[key] for batch in batches]).tolist() for key in ("position", "index"))
        assert positions == list(range(6 * epoch, 6 * epoch + 6)) and sorted(order) == list(range(6))
        orders.append(order)
        restore(trainer)
    assert orders[0] != orders[1]


def test_B4_two_resumes_at_step_zero_and_at_the_end(tiny: list[str], tmp_path: Path) -> None:
    whole = run([*tiny, "train.max_steps=6", f"train.output_dir={tmp_path / 'whole'}"])
    for steps in (2, 4, 6):
        continued = run([*tiny, f"train.max_steps={steps}"])
    assert_same(state_of(continued), state_of(whole))
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
    again = make([*tiny, "train.max_steps=6"])
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert again.fit() and again.state.samples_seen == 12  # exits well and does nothing
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    fresh = make([*tiny, "train.max_steps=6", f"train.output_dir={tmp_path / 'zero'}"])
    fresh.run.save(fresh.state)  # a checkpoint of step 0
    assert_same(state_of(run([*tiny, "train.max_steps=6", f"train.output_dir={tmp_path / 'zero'}"])), state_of(whole))


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0)])
def test_B5_other_workers(tiny: list[str], tmp_path: Path, before: int, after: int) -> None:
    whole = run([*tiny, "train.max_steps=6", f"train.output_dir={tmp_path / 'whole'}"])
    run([*tiny, "train.max_steps=3", f"data.num_workers={before}"])
    continued = run([*tiny, "train.max_steps=6", f"data.num_workers={after}"])
    assert_same(state_of(continued), state_of(whole))
    last = [ckpt.load_checkpoint(ckpt.find_checkpoint(tmp_path / name)).rng["cpu/0"] for name in ("run", "whole")]
    assert torch.equal(*last)  # loading draws nothing from the generator of the training


@pytest.mark.dist
def test_B6_two_ranks_then_one(tiny: list[str], tmp_path: Path, reference: tuple[Path, list[dict[str, Any]]]) -> None:
    overrides = [*tiny, *LENGTH]
    before = on_two_ranks(tmp_path, fit_rank, overrides, "term@0:6")
    (alone, error), *_ = run_ranks(1, tmp_path / "alone", fit_rank, [*overrides, "train.batch_size=4"])
    assert error is None
    folder, whole = reference
    for step, (files, _) in enumerate(alone["trace"], start=7):
        assert files == whole[0]["trace"][step][0] + whole[1]["trace"][step][0]
    losses = [[row["loss"] for row in rows(place)] for place in (tmp_path / "run", folder)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert before[0]["step"] == 7
    trainer = make([*overrides, "train.batch_size=4"])
    on_two_ranks(tmp_path, fit_rank, [*overrides, "train.max_steps=13"])
    assert any("warning: saved by 2 process(es), continued on 1" in note for note in restore(trainer))
    with pytest.raises(ValueError, match="global_batch_size: 4 -> 3"):
        run([*overrides, "train.batch_size=3", "train.max_steps=14"])


@pytest.mark.parametrize(("batch", "accumulate", "world"), [(6, 1, 1), (2, 3, 1), (3, 1, 2), (1, 2, 3), (2, 1, 3)])
def test_B7_each_sample_once_per_epoch(batch: int, accumulate: int, world: int) -> None:
    """13 clips, a global batch of 6 however it is split: the same positions, and none dropped at an epoch's end."""
    ranks = [position_batches(0, batch_size=batch, rank=rank, world_size=world) for rank in range(world)]
    micro = [list(islice(rank, 13 * accumulate)) for rank in ranks]
    for step in range(13):
        parts = [each for rank in micro for each in rank[step * accumulate : (step + 1) * accumulate]]
        assert sorted(position for part in parts for position in part) == list(range(6 * step, 6 * step + 6))
    visits = [clip_at(position, 13, seed=3) for position in range(78)]
    assert sorted(visits) == [(epoch, index) for epoch in range(6) for index in range(13)]


def test_B8_micro_batches_equal_one_batch(tiny: list[str], tmp_path: Path) -> None:
    """Gradients, float64."""
    gradients = []
    for batch, accumulate in ((6, 1), (2, 3), (1, 6)):
        extra = [f"train.batch_size={batch}", f"train.grad_accum_steps={accumulate}", "train.precision=fp64"]
        trainer = make([*tiny, *extra])
        trainer.launch_step(next(trainer.run.batches(trainer.state.samples_seen)))
        gradients.append([parameter.grad.clone() for parameter in trainer.state.model.parameters()])
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=1e-12)


def test_B9_one_step_advances_everything_once(tiny: list[str]) -> None:
    """Learning rate, average and clipping count optimiser steps, whatever the accumulation."""
    extra = ["train.grad_accum_steps=3", "optim.warmup_steps=4", "optim.clip_start_step=1", "optim.max_grad_norm=1e-3"]
    trainer = make([*tiny, *extra])
    batches = trainer.run.batches(trainer.state.samples_seen)
    for step in range(3):
        trainer.launch_step(next(batches))
        assert (trainer.state.step, trainer.state.ema.updates) == (step + 1, step + 1)
        assert {float(state["step"]) for state in trainer.state.optimizer.state.values()} == {step + 1.0}
        config = trainer.config.optim
        assert trainer.state.optimizer.param_groups[0]["lr"] == learning_rate_at(
            step, config, trainer.config.train.max_steps
        )
        norm = torch.nn.utils.get_total_norm([p.grad for p in trainer.state.model.parameters()])
        assert (float(norm) <= 1.001e-3) == (step >= 1)
    assert learning_rate_at(0, OptimConfig(warmup_steps=4, learning_rate=1.0), 10) == 0.25


def one_step(world: World, overrides: list[str]) -> dict[str, Any]:
    """Loss and gradients of the first step on one rank."""
    trainer = make(overrides, world)
    trainer.prepare()
    parts, _ = trainer.launch_step(next(trainer.run.batches(trainer.state.samples_seen)))
    return {"loss": float(parts["loss"]), "gradients": [p.grad.clone() for p in trainer.state.model.parameters()]}


@pytest.mark.dist
@pytest.mark.parametrize("micro_batches", [3, 1], ids=["B8", "B10"])
def test_B8_B10_two_ranks_equal_one(tiny: list[str], tmp_path: Path, micro_batches: int) -> None:
    """DDP on two ranks, 3 micro-batches of 1 (B8) or 1 x 1 (B10), against one batch on one, float64."""
    common = [*tiny, "train.precision=fp64"]
    split = [*common, "train.batch_size=1", f"train.grad_accum_steps={micro_batches}"]
    ranks = on_two_ranks(tmp_path, one_step, split)
    alone = one_step(World(), [*common, f"train.batch_size={2 * micro_batches}"])
    assert (ranks[0]["loss"] + ranks[1]["loss"]) / 2 == pytest.approx(alone["loss"], abs=1e-12)
    for rank in ranks:
        for a, b in zip(rank["gradients"], alone["gradients"], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_B5_from_latents_and_back(tiny: list[str], tmp_path: Path) -> None:
    """A run may go on from a cache, or without it: in pixel space no bit differs."""
    made = cache(tiny, tmp_path / "cache")
    whole = run([*tiny, "train.max_steps=6", f"train.output_dir={tmp_path / 'whole'}"])
    for steps, latents in ((2, []), (4, [f"data.latents={made}"]), (6, [])):
        continued = run([*tiny, *latents, f"train.max_steps={steps}"])
    assert_same(state_of(continued), state_of(whole))


@pytest.mark.dist
def test_B10_from_latents_two_ranks_equal_one(tiny: list[str], tmp_path: Path) -> None:
    """DDP 2 x 1 against 1 x 2 from a cache, float64."""
    common = [*tiny, *save_codec(tmp_path / "codec", "AutoencoderKL"), "train.precision=fp64"]
    common = [*common, f"data.latents={cache(common, tmp_path / 'cache')}"]
    ranks = on_two_ranks(tmp_path, one_step, [*common, "train.batch_size=1"])
    losses, alone = [rank["loss"] for rank in ranks], one_step(World(), [*common, "train.batch_size=2"])
    assert sum(losses) / 2 == pytest.approx(alone["loss"], abs=1e-12)


def test_B11_frozen_losses(tiny: list[str], tmp_path: Path) -> None:
    """Twenty steps as they were when this test was written, on whatever torch: 1e-5."""
    run([*tiny, "train.max_steps=20"])
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    frozen = json.loads((Path(__file__).parent / "frozen_losses.json").read_text())
    assert losses == pytest.approx(frozen, abs=1e-5)


def test_B12_the_average_is_the_closed_form_and_resumes() -> None:
    model = torch.nn.Linear(3, 2).double()
    start = model.weight.detach().clone()
    ema, weights = EMA(model, 0.8), [start]
    for step in range(6):
        with torch.no_grad():
            model.weight += step + 1.0
        ema.update(model)
        weights.append(model.weight.detach().clone())
        if step == 2:  # through a checkpoint
            saved, ema = {k: v.clone() for k, v in ema.state_dict().items()}, EMA(model, 0.8)
            ema.load_state_dict(saved, 3)
    expected = 0.8**6 * start + sum(0.2 * 0.8 ** (6 - n) * weights[n] for n in range(1, 7))
    torch.testing.assert_close(ema.model.weight, expected)
    assert ema.updates == 6


def spoil(folder: Path, name: str, change: Any) -> None:
    """Changes one file of a checkpoint and makes its manifest true again, as a faulty writer would have."""
    file = folder / name
    if name.endswith(".safetensors"):
        save_file(change(load_file(file)), file)
    else:
        file.write_text(json.dumps(change(json.loads(file.read_text()))))
    seal(folder)


FACTS = ["step", "samples_seen", *STATE_KEYS]
GONE = "blocks.1.attn.qkv.weight"
MISSING = [
    *[("state.json", fact, rf"state\.json(: {fact} must| lacks .*{fact})") for fact in FACTS],
    *[(f"{file}.safetensors", GONE, re.escape(GONE)) for file in ("model", "ema")],
    *[
        ("optim.safetensors", f"{kind}/{GONE}", f"{kind}/{re.escape(GONE)}")
        for kind in ("exp_avg", "exp_avg_sq", "step")
    ],
]


@pytest.mark.parametrize(("file", "gone", "said"), MISSING, ids=[f"{file}-{gone}" for file, gone, _ in MISSING])
def test_B13_missing_content_is_named(tiny: list[str], tmp_path: Path, file: str, gone: str, said: str) -> None:
    run([*tiny, "train.max_steps=1"])
    folder = ckpt.list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    spoil(folder, file, lambda content: {key: value for key, value in content.items() if key != gone})
    with pytest.raises(ValueError, match=said):
        run([*tiny, "train.max_steps=2"])


CHANGES = {
    "model.hidden_size: 16 -> 32": "model.hidden_size=32",
    "optim.schedule: constant -> cosine": "optim.schedule=cosine",
    "train.seed: 0 -> 1": "train.seed=1",
    "diffusion.schedule: linear -> cosine": "diffusion.schedule=cosine",
    "data_digest: ": "data.max_clips=5",
}


@pytest.mark.parametrize("said", CHANGES)
def test_B14_another_experiment_is_refused_with_a_diff(tiny: list[str], said: str) -> None:
    run([*tiny, "train.max_steps=1"])
    with pytest.raises(ValueError, match=f"this is another experiment: .*{said}"):
        run([*tiny, "train.max_steps=2", CHANGES[said]])


def test_B14_what_is_named_is_accepted(tiny: list[str]) -> None:
    run([*tiny, "train.max_steps=1"])
    changed = [*tiny, "train.max_steps=2", "optim.learning_rate=5e-4", "optim.beta2=0.99"]
    with pytest.raises(ValueError, match=r"optim\.beta2: 0\.999 -> 0\.99") as refusal:
        run(changed, override=["optim.learning_rate"])
    assert "learning_rate" not in str(refusal.value).partition("experiment:")[2].partition(". Restore")[0]
    assert run(changed, override=["optim.learning_rate", "optim.beta2"]).state.step == 2


def test_B15_no_step_twice_none_missing(tiny: list[str], tmp_path: Path) -> None:
    """A run killed after step 5 was logged, its newest checkpoint at step 3, a row cut in the middle."""
    run([*tiny, "train.max_steps=5", "train.checkpoint_every=3"])
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-0000005").rename(checkpoints / "step-0000005.tmp-gone")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')
    run([*tiny, "train.max_steps=8", "train.checkpoint_every=3"])
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 9))
