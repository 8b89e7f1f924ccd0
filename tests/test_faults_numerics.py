"""Faults F: numbers that are not finite, gradients that leap, replicas that drift."""

import statistics
from pathlib import Path

import pytest
import torch

from engine import checkpoint as ckpt
from engine.config import OptimConfig
from engine.errors import TrainingAborted
from engine.guard import StepGuard, fingerprint
from engine.optim import gradient_norm
from engine.trainer import Trainer
from tests.fault_support import armed, assert_same, fit_rank, on_two_ranks, rows, run, run_ranks, same_tensors, state_of

STEPS = ["train.max_steps=6", "train.checkpoint_every=3"]


def flat(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Returns copies of weights, average, moments and the timestep sampler's history."""
    groups = {**state_of(trainer), "sampler": trainer.state.timestep_sampler.state_dict()}
    return {f"{kind}/{name}": value.clone() for kind, group in groups.items() for name, value in group.items()}


def judge(guard: StepGuard, norm: float, *, finite: bool = True, step: int = 0) -> tuple[str | None, float]:
    """A step as the device judges it and the host records it: why it is skipped, and what it is clipped to."""
    bounds = guard.bounds(step)
    skip, limit = bounds.judge(torch.tensor(not finite), torch.tensor(norm, dtype=torch.float64))
    return guard.record(bounds, bool(skip), finite, norm), float(limit)


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["nan", "inf", "report"], ids=["F1", "F2", "F1-report"])
def test_F1_F2_one_rank_not_finite(tiny: list[str], tmp_path: Path, kind: str) -> None:
    """All ranks skip the same step, go on with the next clips, and the log names files and timesteps."""
    late = [] if kind == "nan" else ["train.log_every=6"]  # the host learns of it in the next step
    first, second = on_two_ranks(tmp_path, fit_rank, [*tiny, *STEPS, *late], f"{kind}@1:3")
    for result in (first, second):
        assert (result["step"], result["skipped"], result["samples_seen"]) == (6, 1, 7 * 4)
    assert_same(first, second)
    assert all(value.isfinite().all() for group in ("model", "ema", "optim") for value in first[group].values())
    (skip,) = [row for row in rows(tmp_path / "run", "events.jsonl") if row["event"] == "skip"]
    assert skip["step"] == 3 and len(skip["files"]) == 4 and len(skip["timesteps"]) == 4
    assert all(Path(file).exists() for file in skip["files"])
    assert rows(tmp_path / "run")[-1]["skipped_steps"] == 1


@pytest.mark.parametrize("kind", ["nan", "inf"], ids=["F1", "F2"])
def test_F1_F2_a_skipped_step_changes_nothing(tiny: list[str], kind: str) -> None:
    trainer = run([*tiny, "train.max_steps=2", "diffusion.timestep_sampler=loss_aware"])
    before = flat(trainer)
    rate, updates = trainer.state.optimizer.param_groups[0]["lr"], trainer.state.ema.updates
    batches = trainer.run.batches(trainer.state.samples_seen)
    with armed(f"{kind}@0:2"):
        trainer.launch_step(next(batches))
    assert same_tensors(before, flat(trainer))
    assert (trainer.state.step, trainer.state.ema.updates) == (2, updates)
    assert trainer.state.optimizer.param_groups[0]["lr"] == rate
    trainer.launch_step(next(batches))
    assert trainer.state.step == 3


def test_F3_a_streak_aborts_with_a_code_and_a_dump(tiny: list[str], tmp_path: Path) -> None:
    faults = ",".join(["nan@0:2"] * 9)
    with armed(faults), pytest.raises(TrainingAborted, match=r"3 steps in a row were skipped \(optim\.max_skips\)"):
        run([*tiny, *STEPS, "optim.max_skips=3"])
    assert TrainingAborted.exit_code == 3
    report = (tmp_path / "run" / "errors" / "rank0.json").read_text()
    assert '"step": 2' in report and "TrainingAborted" in report and ".png" not in report and "clip" in report
    assert [row["event"] for row in rows(tmp_path / "run", "events.jsonl")] == ["start", "skip", "skip", "skip"]


def test_F3_skips_count_in_a_row_and_over_a_resume() -> None:
    guard = StepGuard(OptimConfig(max_skips=2))
    for finite in (False, True, False):
        judge(guard, 1.0, finite=finite)
        guard.check_streak()
    continued = StepGuard(guard.config)
    continued.load_state_dict(guard.state_dict())
    judge(continued, 1.0, finite=False)
    with pytest.raises(TrainingAborted, match="2 steps in a row"):
        continued.check_streak()


@pytest.mark.parametrize("policy", ["skip", "clip"])
def test_F4_spikes_by_policy(tiny: list[str], policy: str) -> None:
    extra = ["optim.spike_factor=10", f"optim.spike_policy={policy}", "optim.max_grad_norm=1e9", "train.log_every=24"]
    with armed("spike@0:23"):
        trainer = run([*tiny, *extra, "train.max_steps=24"])
    assert trainer.state.guard.spikes == 1
    assert trainer.state.guard.skipped == (policy == "skip")
    assert trainer.state.samples_seen == 2 * (24 + (policy == "skip"))
    *earlier, last = trainer.state.guard.norms
    applied = float(gradient_norm(trainer.state.model.parameters()))
    assert applied == pytest.approx(statistics.median(earlier) if policy == "clip" else last)
    continued = run([*tiny, *extra, "train.max_steps=25"])
    assert (continued.state.guard.spikes, continued.state.guard.skipped) == (1, trainer.state.guard.skipped)
    assert list(continued.state.guard.norms)[:-1] == [*earlier, last]
    assert continued.state.guard.norms.maxlen == StepGuard.WINDOW


def test_F4_bounds_of_a_spike() -> None:
    """Above the factor: clipped to the median, or to `max_grad_norm` if that is stricter; or skipped and forgotten."""
    clip, skip = (StepGuard(OptimConfig(spike_factor=5.0, spike_policy=policy)) for policy in ("clip", "skip"))
    for norm in [2.0] * (StepGuard.MINIMUM - 1) + [8.0]:
        assert judge(clip, norm) == (None, float("inf"))
        judge(skip, 2.0)
    assert judge(clip, 10.1) == (None, 2.0) and clip.spikes == 1
    assert judge(clip, 9.9) == (None, float("inf")) and clip.spikes == 1
    assert judge(clip, 10.1, step=20_000) == (None, 0.1)
    assert judge(skip, 10.1)[0] == "gradient norm 10.1 is a spike over the median 2"
    assert (skip.spikes, skip.skipped, max(skip.norms)) == (1, 1, 2.0)
    assert judge(skip, 10.0)[0] is None  # no more than the factor


def test_F5_not_finite_in_an_accumulation_micro_step(tiny: list[str], tmp_path: Path) -> None:
    """In a step that writes no log row, and only in one of its micro-batches."""
    extra = ["train.grad_accum_steps=3", "train.batch_size=1", "train.log_every=6"]
    with armed("nan@0:3"):
        trainer = run([*tiny, *STEPS, *extra])
    assert trainer.state.guard.skipped == 1
    assert all(value.isfinite().all() for value in flat(trainer).values())
    assert ckpt.newest_verified(tmp_path / "run" / "checkpoints")[0] is not None


def test_F6_one_ulp_changes_the_fingerprint() -> None:
    tensors = {"a": torch.randn(7, 5), "b": torch.arange(3), "c": torch.ones(3, dtype=torch.bfloat16)}
    before = fingerprint(tensors)
    tensors["a"][3, 2] = torch.nextafter(tensors["a"][3, 2], torch.tensor(10.0))
    after = fingerprint(tensors)
    assert [name for name in tensors if before[name] != after[name]] == ["a"]


@pytest.mark.dist
def test_F6_drift_names_rank_and_tensor(tiny: list[str], tmp_path: Path) -> None:
    overrides = [*tiny, *STEPS, "train.drift_check_every=2", "optim.learning_rate=1e-30"]
    results = run_ranks(2, tmp_path / "rendezvous", fit_rank, overrides, "ulp@1:3")
    for _, error in results:
        assert error is not None
        assert "drifted apart at step 4: rank 1 differs from rank 0 in blocks.0.mlp.fc1.weight" in error
