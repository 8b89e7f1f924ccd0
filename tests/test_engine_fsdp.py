"""FSDP2 against DDP: equal losses, and checkpoints that either, or one process, can continue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.distributed import World, local_shard
from tests.fault_support import fit_rank, make, on_two_ranks, rows, run

pytestmark = pytest.mark.dist
FP64 = ["train.precision=fp64", "optim.max_grad_norm=0.05", "train.checkpoint_every=100"]
LEVERS = ["model.depth=4", "objective.route_blocks=[1,3]", "objective.sync_blocks=[0,3]"]
LEVERS += ["diffusion.loss_weighting=min_snr"]


def two(folder: Path, name: str, overrides: list[str]) -> list[dict[str, Any]]:
    return on_two_ranks(folder, fit_rank, [*overrides, f"train.output_dir={folder / name}"])


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("extra", [[], LEVERS], ids=["plain", "levers"])
def test_losses_and_weights_are_those_of_ddp(tiny: list[str], tmp_path: Path, extra: list[str]) -> None:
    """float64, with accumulation and clipping: 1e-12."""
    common = [
        *tiny,
        *FP64,
        *extra,
        "train.grad_accum_steps=2",
        "train.batch_size=1",
        "train.log_every=2",
        "train.max_steps=4",
    ]
    ddp, fsdp = (two(tmp_path, kind, [*common, f"train.parallel={kind}"]) for kind in ("ddp", "fsdp"))
    for rank in (0, 1):
        losses = [[loss for _, loss in result[rank]["trace"]] for result in (ddp, fsdp)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-12)
        for kind in ("model", "ema", "optim"):
            assert_close(fsdp[rank][kind], ddp[rank][kind], 1e-12)
    norms = [[row["grad_norm"] for row in rows(tmp_path / kind)] for kind in ("ddp", "fsdp")]
    assert norms[0] == pytest.approx(norms[1], abs=1e-12)


def test_bf16_losses_are_near_those_of_ddp(tiny: list[str], tmp_path: Path) -> None:
    """Parameters are gathered in bf16; with DDP autocast casts them where they are used. Masters stay fp32."""
    common = [*tiny, "train.precision=bf16", "train.max_steps=2"]
    ddp, fsdp = (two(tmp_path, kind, [*common, f"train.parallel={kind}"]) for kind in ("ddp", "fsdp"))
    losses = [[loss for _, loss in result[0]["trace"]] for result in (ddp, fsdp)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert {value.dtype for value in fsdp[0]["model"].values()} == {torch.float32}


def test_checkpoints_interchange(tiny: list[str], tmp_path: Path) -> None:
    """FSDP, then DDP, then one process, then FSDP: as if one process had trained all along."""
    common = [*tiny, *FP64]
    stages = [("fsdp", 1), ("ddp", 2), ("alone", 3), ("fsdp", 4)]
    for kind, steps in stages:
        overrides = [*common, f"train.max_steps={steps}", f"train.output_dir={tmp_path / 'run'}"]
        if kind == "alone":
            run([*overrides, "train.batch_size=4"])
            continue
        found = on_two_ranks(tmp_path, fit_rank, [*overrides, f"train.parallel={kind}"])
    whole = run([*common, "train.max_steps=4", "train.batch_size=4", f"train.output_dir={tmp_path / 'whole'}"])
    last = found[0]
    assert last["step"] == 4
    assert_close(last["model"], whole.state.model.state_dict(), 1e-10)
    assert_close(last["ema"], whole.state.ema.state_dict(), 1e-10)


def shard_sizes(world: World, overrides: list[str]) -> list[tuple[int, int, int]]:
    """Elements that this rank holds of (weights, average, all)."""
    trainer = make(overrides, world)
    held = [
        sum(local_shard(p).numel() for p in net.parameters()) for net in (trainer.state.model, trainer.state.ema.model)
    ]
    return [(*held, sum(p.numel() for p in trainer.state.model.parameters()))]


def test_each_rank_holds_half(tiny: list[str], tmp_path: Path) -> None:
    for ((weights, average, total),) in on_two_ranks(tmp_path, shard_sizes, [*tiny, "train.parallel=fsdp"]):
        assert weights == average and 0.45 < weights / total < 0.55
