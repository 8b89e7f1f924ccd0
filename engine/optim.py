"""Optimizer, learning-rate schedule, gradient clipping and EMA of the weights, per optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from .config import OptimConfig
from .distributed import local_shard
from .muon import MuonAdamW


def build_optimizer(model: Any, config: OptimConfig, others: Iterable[nn.Parameter] = ()) -> torch.optim.Optimizer:
    """Returns the optimizer of a network and `others`: AdamW; with `optim.name=muon`, Muon for the blocks' matrices."""
    trained = [parameter for parameter in (*model.parameters(), *others) if parameter.requires_grad]
    if config.name == "adamw":
        return _build_adamw(trained, config)
    matrices = [each for each in model.blocks.parameters() if each.requires_grad and each.ndim == 2]
    chosen = {id(matrix) for matrix in matrices}
    return MuonAdamW(_build_adamw([each for each in trained if id(each) not in chosen], config), matrices, config)


def _build_adamw(parameters: list[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    on_cuda = parameters[0].device.type == "cuda"
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=on_cuda if config.fused is None else config.fused,
    )


def step_unless(skip: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Runs the optimizer's step, unless `skip` (a scalar on the device) is true.

    The fused AdamW kernel reads `skip` as a gradient scaler's `found_inf`; others make the host wait.
    """
    if optimizer.defaults["fused"]:
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif not skip:
        optimizer.step()


def learning_rate_at(step: int, config: OptimConfig, max_steps: int) -> float:
    """Returns the learning rate of the update from `step` to `step + 1`: linear warm-up, then constant or cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + span * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Returns the total norm of all gradients, a scalar on the device."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_gradients(gradients: list[Tensor], norm: Tensor, limit: Tensor) -> None:
    """Scales `gradients` of total `norm` down to `limit` in place: torch's rule, but with `limit` on the device."""
    scale = (norm + 1e-6).reciprocal() * limit.to(norm.dtype)
    torch._foreach_mul_(gradients, scale.clamp(max=1.0))


class EMA:
    """`average <- decay * average + (1 - decay) * parameter`, once per optimizer step.

    Only trainable parameters are averaged. Buffers (position tables) are copies and constant; frozen parameters are
    shared with the network.

    It starts at the current weights. `decay` is in [0, 1); with `warmup`, update n uses
    min(decay, (1 + n) / (10 + n)).
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, warmup: bool = False) -> None:
        frozen = {id(each): each for each in model.parameters() if not each.requires_grad}
        self.model: Any = deepcopy(model, frozen).requires_grad_(False).eval()
        self.decay = decay
        self.warmup = warmup
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Updates the average with the parameters, after an optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        # lerp in fp32: 1 - decay = 1e-4 would be lost in half precision
        pairs = [each for each in zip(self.model.parameters(), model.parameters()) if each[1].requires_grad]
        averages, parameters = ([local_shard(value) for value in values] for values in zip(*pairs))
        torch._foreach_lerp_(averages, parameters, 1 - decay)
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the averaged weights, under the network's own keys."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Tensor], updates: int = 0) -> None:
        """Restores averaged weights and their number of `updates`."""
        self.model.load_state_dict(state)
        self.updates = updates
