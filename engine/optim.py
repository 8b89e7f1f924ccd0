"""Optimizer, learning-rate schedule and gradient clipping. All count optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Returns AdamW over the trainable parameters of `model`."""
    on_cuda = next(model.parameters()).device.type == "cuda"
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=on_cuda if config.fused is None else config.fused,
    )


def step_unless(skip: Tensor, optimizer: torch.optim.AdamW) -> None:
    """Runs the optimizer's step, unless `skip` (a scalar on the device) is true.

    The fused kernel reads `skip` itself, as it does a gradient scaler's `found_inf`; the plain one makes the host wait.
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


def clip_limit(step: int, config: OptimConfig) -> float:
    """Returns the norm that the gradient of the update from `step` is clipped to."""
    return config.max_grad_norm if step >= config.clip_start_step else math.inf


def clip_gradients(gradients: list[Tensor], norm: Tensor, limit: Tensor) -> None:
    """Scales `gradients` of total `norm` down to `limit` in place: torch's rule, with the limit on the device too."""
    scale = (norm + 1e-6).reciprocal() * limit.to(norm.dtype)
    torch._foreach_mul_(gradients, scale.clamp(max=1.0))
