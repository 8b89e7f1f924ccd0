"""Exponential moving average of a network's parameters."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import local_shard


class EMA:
    """`average <- decay * average + (1 - decay) * parameter`, once per optimizer step.

    Only trainable parameters are averaged. Buffers (position tables) are constant and stay as copied; frozen
    parameters are the network's own, shared.

    Args:
        model: the network, whose current weights are the initial average.
        decay: weight of the old average, in [0, 1).
        warmup: use the decay min(decay, (1 + n) / (10 + n)) at update n.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, warmup: bool = False) -> None:
        frozen = {id(each): each for each in model.parameters() if not each.requires_grad}
        self.model: Any = deepcopy(model, frozen).requires_grad_(False).eval()
        self.decay = decay
        self.warmup = warmup
        self.updates = 0

    def current_decay(self) -> float:
        """Returns the decay of the next update."""
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Averages in the parameters after one optimizer step."""
        # lerp in fp32: 1 - decay = 1e-4 would be lost in half precision
        pairs = [each for each in zip(self.model.parameters(), model.parameters()) if each[1].requires_grad]
        averages, parameters = ([local_shard(value) for value in values] for values in zip(*pairs))
        torch._foreach_lerp_(averages, parameters, 1 - self.current_decay())
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the averaged weights, under the network's own keys."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Tensor], updates: int = 0) -> None:
        """Continues from averaged weights after `updates` optimizer steps."""
        self.model.load_state_dict(state)
        self.updates = updates
