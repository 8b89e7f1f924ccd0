"""FSDP2 against DDP: equal losses, and checkpoints that either, or one process, can continue."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.distributed import World, local_shard
from tests.conftest import TINY
from tests.fault_support import fit_rank, make, on_two_ranks, rows, run

pytestmark = pytest.mark.dist
KINDS = ("ddp", "fsdp")
FP64 = ["train.precision=fp64", "optim.max_grad_norm=0.05", "train.checkpoint_every=100"]
MICRO = [*FP64, "train.grad_accum_steps=2", "train.batch_size=1", "train.log_every=2", "train.max_steps=4"]
LEVERS = ["model.depth=4", "objective.route_blocks=[1,3]", "objective.sync_blocks=[0,3]"]
LEVERS += ["diffusion.loss_weighting=min_snr"]
Ranks = tuple[Path, list[dict[str, Any]]]


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def fit_all(world: World, runs: dict[str, list[str]]) -> dict[str, Any]:
    """Trains each run as one rank; returns their ends, and the shares of all weights and averages on this rank."""
    found = {name: fit_rank(world, overrides) for name, overrides in runs.items()}
    state = make(runs["fsdp"], world).state
    held = [sum(local_shard(p).numel() for p in net.parameters()) for net in (state.model, state.ema.model)]
    return {**found, "shares": [each / sum(p.numel() for p in state.model.parameters()) for each in held]}


@pytest.fixture(scope="module")
def ranks(frame_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """The folder of all runs of two ranks, and the results of both."""
    folder = tmp_path_factory.mktemp("fsdp")
    runs = {}
    for kind in KINDS:
        keys = [*TINY, f"data.path={frame_folders}", f"train.parallel={kind}"]
        runs[kind] = [*keys, *MICRO, f"train.output_dir={folder / kind}"]
        runs[f"{kind}-levers"] = [*keys, *MICRO, *LEVERS, f"train.output_dir={folder / f'{kind}-levers'}"]
        bf16 = ["train.precision=bf16", "train.max_steps=2", f"train.output_dir={folder / 'bf16' / kind}"]
        runs[f"{kind}-bf16"] = [*keys, *bf16]
    for steps, kind in enumerate(("fsdp", "ddp"), 1):
        last = [f"train.parallel={kind}", f"train.max_steps={steps}", f"train.output_dir={folder / 'mixed'}"]
        runs[f"{kind}-mixed"] = [*TINY, *FP64, f"data.path={frame_folders}", *last]
    return folder, on_two_ranks(folder, fit_all, runs)


@pytest.mark.parametrize("suffix", ["", "-levers"])
def test_losses_and_weights_are_those_of_ddp(ranks: Ranks, suffix: str) -> None:
    """float64, with accumulation and clipping: 1e-12."""
    folder, found = ranks
    for rank in found:
        ddp, fsdp = (rank[kind + suffix] for kind in KINDS)
        assert [loss for _, loss in ddp["trace"]] == pytest.approx([loss for _, loss in fsdp["trace"]], abs=1e-12)
        for part in ("model", "ema", "optim"):
            assert_close(fsdp[part], ddp[part], 1e-12)
    norms = [[row["grad_norm"] for row in rows(folder / f"{kind}{suffix}")] for kind in KINDS]
    assert norms[0] == pytest.approx(norms[1], abs=1e-12)


def test_bf16_losses_are_near_those_of_ddp(ranks: Ranks) -> None:
    """Parameters are gathered in bf16; with DDP autocast casts them where they are used. Masters stay fp32."""
    ends = [ranks[1][0][f"{kind}-bf16"] for kind in KINDS]
    losses = [[loss for _, loss in end["trace"]] for end in ends]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert {value.dtype for value in ends[1]["model"].values()} == {torch.float32}


def test_checkpoints_interchange(ranks: Ranks, tiny: list[str], tmp_path: Path) -> None:
    """FSDP, then DDP, then one process, then FSDP: as if one process had trained all along."""
    mixed = [*tiny, *FP64, f"train.output_dir={ranks[0] / 'mixed'}"]
    run([*mixed, "train.max_steps=3", "train.batch_size=4"])
    last = on_two_ranks(tmp_path, fit_rank, [*mixed, "train.max_steps=4", "train.parallel=fsdp"])[0]
    whole = run([*tiny, *FP64, "train.max_steps=4", "train.batch_size=4", f"train.output_dir={tmp_path / 'whole'}"])
    assert last["step"] == 4
    assert_close(last["model"], whole.state.model.state_dict(), 1e-10)
    assert_close(last["ema"], whole.state.ema.state_dict(), 1e-10)


def test_each_rank_holds_half(ranks: Ranks) -> None:
    for weights, average in (rank["shares"] for rank in ranks[1]):
        assert weights == average and 0.45 < weights < 0.55
