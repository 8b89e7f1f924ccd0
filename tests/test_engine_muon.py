"""MuonAdamW against torch's own two optimizers, each on its share of the parameters."""

from copy import deepcopy

import pytest
import torch

from engine.config import OptimConfig, load_config
from engine.optim import build_optimizer
from models.latte import Latte, LatteConfig


def test_both_groups_step_as_torch_does() -> None:
    network = LatteConfig(name="custom", hidden_size=32, depth=2, num_heads=2, patch_size=2)
    model = Latte(network, in_channels=4, latent_size=(4, 4), num_frames=2)
    config = OptimConfig(name="muon", learning_rate=1e-2, weight_decay=0.1)
    ours, theirs = build_optimizer(model, config), deepcopy(model)
    matrices = [p for name, p in theirs.named_parameters() if name.startswith("blocks") and p.ndim == 2]
    rest = [p for name, p in theirs.named_parameters() if not name.startswith("blocks") or p.ndim != 2]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.1)
    for seed in range(3):
        torch.manual_seed(seed)
        for mine, copy in zip(model.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            copy.grad = mine.grad.clone()
        if seed == 2:  # a restored optimizer goes on in the same way
            saved = deepcopy(ours.state_dict())
            ours = build_optimizer(model, config)
            ours.load_state_dict(saved)
        for optimizer in (ours, muon, adamw):
            optimizer.step()
    for mine, copy in zip(model.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, copy)
    assert len(matrices) == len(ours.param_groups[1]["params"]) == 2 * 5  # per block: qkv, proj, two of the MLP, adaLN


def test_sharded_matrices_are_refused(tiny: list[str]) -> None:
    with pytest.raises(ValueError, match=r"optim\.name=muon needs whole matrices"):
        load_config(None, [*tiny, "optim.name=muon", "train.parallel=fsdp"])
