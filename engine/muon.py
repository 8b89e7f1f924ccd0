"""Muon for the matrices of the blocks, AdamW for the rest (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .config import OptimConfig


class MuonAdamW(torch.optim.Optimizer):
    """One optimizer of two groups of parameters: `adamw`'s, then those of torch.optim.Muon.

    Muon orthogonalises the momentum of each matrix and scales it by 0.2 sqrt(max(rows, columns)), the usual size of an
    AdamW update, so both groups share learning rate and weight decay (Liu et al. 2025, arXiv 2502.16982, section 2.2).
    """

    def __init__(self, adamw: torch.optim.AdamW, matrices: list[nn.Parameter], config: OptimConfig) -> None:
        rate, decay = config.learning_rate, config.weight_decay
        muon = torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        self.parts = adamw, muon
        super().__init__([part.param_groups[0] for part in self.parts], {"fused": False})
        self._share()

    def _share(self) -> None:
        """Lets both parts read the groups and write the state of this optimizer."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates all parameters."""
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a `state_dict()`."""
        super().load_state_dict(state_dict)
        self._share()
