"""Optimiser, learning-rate schedule and gradient clipping. All count optimiser steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SCHEDULES = ("constant", "cosine")
SPIKE_POLICIES = ("skip", "clip")


@dataclass(frozen=True)
class OptimConfig:
    """The `optim` section. Defaults are the official recipe."""

    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    schedule: str = "constant"  # constant | cosine (to min_learning_rate at train.max_steps)
    warmup_steps: int = 0  # linear from learning_rate / warmup_steps, under either schedule
    min_learning_rate: float = 0.0
    max_grad_norm: float = 0.1  # of the whole gradient, after accumulation
    clip_start_step: int = 20_000  # before it the norm is measured and not clipped
    spike_factor: float = 0.0  # a norm above this x the running median is a spike; 0: none is
    spike_policy: str = "skip"  # skip | clip (to the median)
    max_skips: int = 20  # skipped steps in a row (spikes, non-finite) that end the run
    fused: bool | None = None  # AdamW as one kernel: true, false (the plain one), null: on CUDA

    def __post_init__(self) -> None:
        positive = {"learning_rate": self.learning_rate, "eps": self.eps, "max_grad_norm": self.max_grad_norm}
        for key, value in positive.items():
            if not 0 < value < math.inf:
                raise ValueError(f"optim.{key} must be a positive finite number, not {value}.")
        counted = {
            "weight_decay": self.weight_decay,
            "warmup_steps": self.warmup_steps,
            "min_learning_rate": self.min_learning_rate,
            "clip_start_step": self.clip_start_step,
            "spike_factor": self.spike_factor,
        }
        for key, value in counted.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"optim.{key} must be zero or more, not {value}.")
        if self.min_learning_rate > (self.learning_rate if self.schedule == "cosine" else 0.0):
            raise ValueError(
                f"optim.min_learning_rate={self.min_learning_rate} is where optim.schedule=cosine ends: set that "
                "schedule, and a value up to optim.learning_rate."
            )
        for key, value in {"beta1": self.beta1, "beta2": self.beta2}.items():
            if not 0 <= value < 1:
                raise ValueError(f"optim.{key} must be in [0, 1), not {value}.")
        if 0 < self.spike_factor <= 1:
            raise ValueError(f"optim.spike_factor must be above 1, or 0 for none, not {self.spike_factor}.")
        if self.max_skips < 1:
            raise ValueError(f"optim.max_skips must be at least 1, not {self.max_skips}.")
        for key, choices in {"schedule": SCHEDULES, "spike_policy": SPIKE_POLICIES}.items():
            if getattr(self, key) not in choices:
                raise ValueError(f"optim.{key} must be one of {', '.join(choices)}, not {getattr(self, key)!r}.")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `model`."""
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
    """The optimiser's step, unless `skip` (a scalar on the device) is true.

    The fused kernel reads `skip` itself, as it does a scaler's `found_inf`; for the plain one the host must wait.
    """
    if optimizer.defaults["fused"]:
        optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif not skip:
        optimizer.step()


def learning_rate_at(step: int, config: OptimConfig, max_steps: int) -> float:
    """Learning rate of the update from `step` to `step + 1`: linear warm-up, then constant or cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + span * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Total norm of all gradients, a scalar on the device."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_limit(step: int, config: OptimConfig) -> float:
    """The norm that the gradient of the update from `step` is clipped to."""
    return config.max_grad_norm if step >= config.clip_start_step else math.inf


def clip_gradients(gradients: list[Tensor], norm: Tensor, limit: Tensor) -> None:
    """Scale `gradients` of total `norm` down to `limit`, in place: torch's rule, with the limit on the device too."""
    scale = (norm + 1e-6).reciprocal() * limit.to(norm.dtype)
    torch._foreach_mul_(gradients, scale.clamp(max=1.0))
