"""Faults B: to stop and go on is to have never stopped, bit for bit."""

import json
import re
import signal
from collections.abc import Callable
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
from tests.conftest import TINY
from tests.fault_support import (
    assert_same,
    fit_rank,
    logged,
    make,
    newest,
    on_two_ranks,
    restore,
    rows,
    run,
    run_ranks,
    seal,
    state_of,
)
from tests.latent_support import cache, features, save_codec, save_image_encoder

# 6 clips, global batch 4: an epoch ends within a step, and step 7 lies amid one
LENGTH = ["train.max_steps=12", "train.checkpoint_every=100", "model.label_dropout=0.5", "optim.warmup_steps=3"]
Whole = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def reference(frame_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The run that nothing disturbed, on two ranks: its folder, and what each rank ended with."""
    folder = tmp_path_factory.mktemp("whole")
    overrides = [*TINY, *LENGTH, f"data.path={frame_folders}", f"train.output_dir={folder / 'run'}"]
    return folder / "run", on_two_ranks(folder, fit_rank, overrides)


@pytest.mark.dist
@pytest.mark.parametrize(("workers", "number"), [(0, signal.SIGTERM), (2, signal.SIGUSR1)])
def test_A6_B1_resume_equals_the_uninterrupted_run(
    tiny: list[str], tmp_path: Path, reference: Whole, workers: int, number: signal.Signals
) -> None:
    """A signal to one rank stops both, amid an epoch; the same files, losses, weights, average and moments."""
    overrides = [*tiny, *LENGTH, f"data.num_workers={workers}"]
    before = on_two_ranks(tmp_path, fit_rank, overrides, f"{number.name[3:].lower()}@1:6")
    assert [result["step"] for result in before] == [7, 7] and newest(tmp_path / "run").name == "step-0000007"
    assert json.loads((tmp_path / "run" / "PREEMPTED").read_text())["signal"] == number
    after = on_two_ranks(tmp_path, fit_rank, overrides)
    folder, whole = reference
    for rank in (0, 1):
        assert before[rank]["trace"] + after[rank]["trace"] == whole[rank]["trace"]
        assert_same(after[rank], whole[rank])
    assert logged(tmp_path / "run") == logged(folder)


def lose_newest(run: Path) -> None:
    """Takes the newest checkpoint away, as if the run had been killed before it."""
    folder = ckpt.list_checkpoints(run / "checkpoints")[-1]
    folder.rename(folder.with_name(f"{folder.name}.tmp-gone"))


ROUTED = ["model.depth=4", "objective.route_blocks=[1,3]", "objective.sync_blocks=[0,3]"]


@pytest.mark.parametrize(
    "extra",
    [
        ["data.num_images=2", "train.precision=bf16", "train.ema_warmup=true", "optim.schedule=cosine", *ROUTED],
        ["train.grad_accum_steps=4", "train.batch_size=1", "diffusion.timestep_sampler=loss_aware"],
        ["model.variant=parallel", "model.temporal_position=rope", "train.async_checkpoint=true", "optim.name=muon"],
        ["diffusion.prediction=flow", "model.learn_sigma=false", "diffusion.frame_timesteps=monotone"],
        ["data.latents=", "data.num_images=1", "data.horizontal_flip=true", "diffusion.loss_weighting=min_snr"],
        ["objective.features=", "data.num_images=1", "data.horizontal_flip=true", "objective.features_until=7"],
    ],
    ids=lambda extra: extra[0].partition(".")[2],
)
def test_B1_every_kind_of_run_resumes_exactly(tiny: list[str], tmp_path: Path, extra: list[str]) -> None:
    """Steps 6 to 8 of a run are made again, from the checkpoint of step 5."""
    if extra[0] == "data.latents=":  # of a stochastic codec
        tiny = [*tiny, *save_codec(tmp_path / "codec", "AutoencoderKL")]
        extra = [f"data.latents={cache([*tiny, *extra[1:]], tmp_path / 'cache')}", *extra[1:]]
    if extra[0] == "objective.features=":
        encoder = save_image_encoder(tmp_path / "encoder")
        extra = [*features([*tiny, *extra[1:3]], encoder, tmp_path / "cache"), *extra[1:]]
    overrides = [*tiny, *LENGTH, *extra, "train.max_steps=8", "train.checkpoint_every=5"]
    whole = run(overrides)
    table = logged(tmp_path / "run")
    lose_newest(tmp_path / "run")
    continued = run(overrides)
    assert_same(state_of(continued), state_of(whole))
    assert logged(tmp_path / "run") == table and len(table) == 8
    assert [row["step"] for row in rows(tmp_path / "run", "events.jsonl") if row["event"] == "resume"] == [5]


def test_B2_noise_depends_on_seed_and_position(tiny: list[str]) -> None:
    """The negative control of a generator that is restored wrongly: another seed gives another loss."""
    losses = []
    for seed in (0, 0, 1):
        trainer = make(tiny)
        trainer.objective.seed = seed
        losses.append(float(trainer.launch_step(next(trainer.run.batches(0)))[0]["loss"]))
    assert losses[0] == losses[1] != losses[2]


def test_B3_save_at_an_epoch_end(stopped: Callable[..., Trainer]) -> None:
    """6 clips, batch 2: step 3 ends the epoch; what continues its checkpoint is a whole one in another order."""
    trainer = stopped()
    orders = []
    for epoch in (0, 1):
        batches = [batch for (batch,) in islice(trainer.run.batches(trainer.state.samples_seen), 3)]
        positions, order = (torch.cat([batch[key] for batch in batches]).tolist() for key in ("position", "index"))
        assert positions == list(range(6 * epoch, 6 * epoch + 6)) and sorted(order) == list(range(6))
        orders.append(order)
        restore(trainer)
    assert orders[0] != orders[1]


def test_B4_B5_many_resumes(tiny: list[str], tmp_path: Path) -> None:
    """With other loader workers, from a cache of latents and back (in pixel space), and at the last step."""
    latents = f"data.latents={cache(tiny, tmp_path / 'cache')}"
    whole = run([*tiny, "train.max_steps=6", f"train.output_dir={tmp_path / 'whole'}"])
    for steps, extra in ((2, []), (3, [latents]), (4, ["data.num_workers=2"]), (6, ["data.num_workers=0"])):
        continued = run([*tiny, *extra, f"train.max_steps={steps}"])
    assert_same(state_of(continued), state_of(whole))
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
    last = [ckpt.load_checkpoint(ckpt.find_checkpoint(tmp_path / name)).rng["cpu/0"] for name in ("run", "whole")]
    assert torch.equal(*last)  # loading draws nothing from the generator of the training
    again = make([*tiny, "train.max_steps=6"])
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert again.fit() and again.state.samples_seen == 12  # exits well and does nothing
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_B4_resume_at_step_zero(tiny: list[str]) -> None:
    whole = run([*tiny, "train.max_steps=2"])
    fresh = make([*tiny, "train.max_steps=2", f"train.output_dir={whole.run.folder.path.with_name('zero')}"])
    fresh.run.save(fresh.state)
    continued = Trainer(fresh.config, World())
    assert continued.fit()
    assert_same(state_of(continued), state_of(whole))


@pytest.mark.dist
def test_B6_two_ranks_then_one(tiny: list[str], tmp_path: Path, reference: Whole) -> None:
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
    assert any("warning: saved by 2 process(es), resumed on 1" in note for note in restore(trainer))
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


def one_step(world: World, overrides: list[str]) -> dict[str, Any]:
    trainer = make(overrides, world)
    trainer.prepare()
    parts, _ = trainer.launch_step(next(trainer.run.batches(0)))
    return {"loss": float(parts["loss"]), "gradients": [p.grad.clone() for _, p in trainer.state.named_parameters()]}


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_B8_micro_batches_equal_one_batch(tiny: list[str]) -> None:
    sizes = ((6, 1), (2, 3), (1, 6))
    splits = [[f"train.batch_size={size}", f"train.grad_accum_steps={count}"] for size, count in sizes]
    whole, *others = (one_step(World(), [*tiny, *split, "train.precision=fp64"])["gradients"] for split in splits)
    for other in others:
        assert_close(other, whole)


@pytest.mark.dist
@pytest.mark.parametrize(("micro_batches", "latents"), [(3, False), (1, True)], ids=["B8", "B10"])
def test_B8_B10_two_ranks_equal_one(tiny: list[str], tmp_path: Path, micro_batches: int, latents: bool) -> None:
    """DDP on two ranks, 3 micro-batches of 1 (B8), or 1 x 1 from a cache (B10), against one batch on one, float64."""
    common = [*tiny, "train.precision=fp64"]
    if latents:
        common += save_codec(tmp_path / "codec", "AutoencoderKL")
        encoder = save_image_encoder(tmp_path / "encoder")
        common += features(common, encoder, tmp_path / "features")
        common.append(f"data.latents={cache(common, tmp_path / 'cache')}")
    ranks = on_two_ranks(tmp_path, one_step, [*common, "train.batch_size=1", f"train.grad_accum_steps={micro_batches}"])
    alone = one_step(World(), [*common, f"train.batch_size={2 * micro_batches}"])
    assert (ranks[0]["loss"] + ranks[1]["loss"]) / 2 == pytest.approx(alone["loss"], abs=1e-12)
    for rank in ranks:
        assert_close(rank["gradients"], alone["gradients"])


def test_B9_one_step_advances_everything_once(tiny: list[str]) -> None:
    """Learning rate, average and clipping count optimiser steps, whatever the accumulation."""
    extra = ["train.grad_accum_steps=3", "optim.warmup_steps=4", "optim.clip_start_step=1", "optim.max_grad_norm=1e-3"]
    trainer = make([*tiny, *extra])
    state, optim, batches = trainer.state, trainer.config.optim, trainer.run.batches(0)
    for step in range(3):
        trainer.launch_step(next(batches))
        assert (state.step, state.ema.updates) == (step + 1, step + 1)
        assert {float(moments["step"]) for moments in state.optimizer.state.values()} == {step + 1.0}
        assert state.optimizer.param_groups[0]["lr"] == learning_rate_at(step, optim, trainer.config.train.max_steps)
        norm = torch.nn.utils.get_total_norm([p.grad for p in state.model.parameters()])
        assert (float(norm) <= 1.001e-3) == (step >= 1)
    assert learning_rate_at(0, OptimConfig(warmup_steps=4, learning_rate=1.0), 10) == 0.25


def test_B11_frozen_losses(tiny: list[str], tmp_path: Path) -> None:
    """Twenty steps as they were when this test was written, on whatever torch: 1e-5."""
    run([*tiny, "train.max_steps=20"])
    frozen = json.loads((Path(__file__).parent / "frozen_losses.json").read_text())
    assert [row["loss"] for row in rows(tmp_path / "run")] == pytest.approx(frozen, abs=1e-5)


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


def spoil(run: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Changes one file of the newest checkpoint and makes its manifest true again, as a faulty writer would have."""
    folder = ckpt.list_checkpoints(run / "checkpoints")[-1]
    file = folder / name
    if name.endswith(".safetensors"):
        save_file(change(load_file(file)), file)
    else:
        file.write_text(json.dumps(change(json.loads(file.read_text()))))
    seal(folder)


def test_B2_missing_generator_states_are_refused(stopped: Callable[..., Trainer], tmp_path: Path) -> None:
    """The negative control. Noise is drawn from (seed, position) here, so even what the flag admits is exact."""
    spoil(tmp_path / "run", "rng.safetensors", lambda tensors: {"other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"rng\.safetensors lacks cpu/0.*--allow-inexact-resume"):
        stopped().fit()
    notes = restore(stopped(allow_inexact_resume=True))
    assert any("warning" in note and "not exact" in note for note in notes)


FACTS = ["step", "samples_seen", *STATE_KEYS]
GONE = "blocks.1.attn.qkv.weight"
MISSING = [
    *[("state.json", fact, rf"state\.json(: {fact} must| lacks .*{fact})") for fact in FACTS],
    *[(f"{file}.safetensors", GONE, re.escape(GONE)) for file in ("model", "ema")],
    *[("optim.safetensors", f"{kind}/{GONE}", f"{kind}/{re.escape(GONE)}") for kind in ("exp_avg", "step")],
]


@pytest.mark.parametrize(("file", "gone", "said"), MISSING, ids=[f"{file}-{gone}" for file, gone, _ in MISSING])
def test_B13_missing_content_is_named(
    stopped: Callable[..., Trainer], tmp_path: Path, file: str, gone: str, said: str
) -> None:
    spoil(tmp_path / "run", file, lambda content: {key: value for key, value in content.items() if key != gone})
    with pytest.raises(ValueError, match=said):
        restore(stopped())


CHANGES = {
    "model.hidden_size: 16 -> 32": "model.hidden_size=32",
    "optim.schedule: constant -> cosine": "optim.schedule=cosine",
    "train.seed: 0 -> 1": "train.seed=1",
    "diffusion.schedule: linear -> cosine": "diffusion.schedule=cosine",
    "data_digest: ": "data.max_clips=5",
}


@pytest.mark.parametrize("said", CHANGES)
def test_B14_another_experiment_is_refused_with_a_diff(stopped: Callable[..., Trainer], said: str) -> None:
    with pytest.raises(ValueError, match=f"this is a different experiment: .*{said}"):
        stopped(CHANGES[said]).fit()


def test_B14_what_is_named_is_accepted(stopped: Callable[..., Trainer]) -> None:
    changed = ["optim.learning_rate=5e-4", "optim.beta2=0.99"]
    with pytest.raises(ValueError, match=r"optim\.beta2: 0\.999 -> 0\.99") as refusal:
        restore(stopped(*changed, override=["optim.learning_rate"]))
    assert "learning_rate" not in str(refusal.value).partition("experiment:")[2].partition(". Restore")[0]
    trainer = stopped(*changed, override=["optim.learning_rate", "optim.beta2"])
    assert trainer.fit() and trainer.state.step == 5


def test_B15_no_step_twice_none_missing(tiny: list[str], tmp_path: Path) -> None:
    """A run killed after step 5 was logged, its newest checkpoint at step 3, a row cut in the middle."""
    run([*tiny, "train.max_steps=5", "train.checkpoint_every=3"])
    lose_newest(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')
    run([*tiny, "train.max_steps=8", "train.checkpoint_every=3"])
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 9))
