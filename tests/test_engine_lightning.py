"""The Lightning twins: the same numbers as the plain loop, and checkpoints that cross over."""

from pathlib import Path

import pytest

import train
import train_pl
from engine.config import load_config
from tests.fault_support import armed, assert_same, logged, main_rank, make, newest, on_two_ranks, rows, run, state_of
from tests.test_engine_callbacks import pictures, watched

pytest.importorskip("lightning", reason="the extra `lightning` is not installed")

from engine import lightning


def losses(folder: Path) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in rows(folder)]


@pytest.mark.parametrize(
    "extra",
    [["data.num_images=2"], ["train.grad_accum_steps=2", "optim.max_grad_norm=0.01", "data.num_workers=1"]],
    ids=["images", "accumulation"],
)
def test_training_and_callbacks_are_those_of_the_plain_loop(tiny: list[str], tmp_path: Path, extra: list[str]) -> None:
    """Bit for bit; clipping comes after the whole accumulation."""
    common = watched(tiny, *extra, "train.max_steps=5", "model.label_dropout=0.5")
    places = [[*common, f"train.output_dir={tmp_path / name}"] for name in ("plain", "twin")]
    plain, twin = (make(keys, callbacks=train.callbacks(load_config(None, keys))) for keys in places)
    assert plain.fit() and twin.fit(lightning.loop)
    assert_same(state_of(plain), state_of(twin))
    assert logged(tmp_path / "twin") == logged(tmp_path / "plain")
    assert pictures(tmp_path / "twin") == pictures(tmp_path / "plain")


def test_each_continues_the_other(tiny: list[str], tmp_path: Path) -> None:
    whole = run([*tiny, "train.max_steps=6", f"train.output_dir={tmp_path / 'whole'}"])
    run([*tiny, "train.max_steps=2"])
    trainer = make([*tiny, "train.max_steps=100"])
    with armed("term@0:3"):
        assert not trainer.fit(lightning.loop)
    assert trainer.state.step == 4 and (tmp_path / "run" / "PREEMPTED").exists()
    assert newest(tmp_path / "run").name == "step-0000004"
    assert_same(state_of(run([*tiny, "train.max_steps=6"])), state_of(whole))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.dist
def test_two_ranks(tiny: list[str], tmp_path: Path) -> None:
    common = [*tiny, "train.max_steps=4", "train.precision=fp64"]
    command = [*common, f"train.output_dir={tmp_path / 'two'}"]
    assert on_two_ranks(tmp_path, main_rank, train_pl.main, [command, command]) == [0, 0]
    run([*common, "train.batch_size=4", f"train.output_dir={tmp_path / 'one'}"])
    for a, b in zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True):
        assert a == pytest.approx(b, abs=1e-10)
