"""Classifier-free guidance (Ho & Salimans 2022) as a wrapper around a denoiser.

A denoiser maps noisy latents (B, F, C, H, W) and timesteps (B,) to the network's output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]


def guide_denoiser(
    model_fn: Callable[[Tensor, Tensor, Any], Tensor],
    condition: Any,
    scale: float,
    *,
    channels: int | None,
    batched: bool = True,
    active: Callable[[], bool] = lambda: True,
) -> Denoiser:
    """Returns a denoiser of unconditional + scale * (conditional - unconditional).

    Args:
        model_fn: (x, timesteps, condition) -> (B, F, C or 2C, H, W), of any batch size.
        condition: conditions of the batch, with methods `null()` (null conditions for the same batch) and
            `join(other)` (concatenates two batches).
        scale: 1 gives the conditional output only, 0 the unconditional one.
        channels: C; channels beyond it (a learned variance) are not guided; None: all are guided.
        batched: one call of 2B; False: two calls of B, with half the memory.
        active: checked in every call; False: no guidance (to guide only in an interval of noise levels,
            Kynkäänniemi et al. 2024).

    Raises ValueError if the scale is not 1 and the condition has no null.
    """
    if scale == 1.0:
        return lambda x, timesteps: model_fn(x, timesteps, condition)
    null = condition.null()
    joined = condition.join(null)

    def denoiser(x: Tensor, timesteps: Tensor) -> Tensor:
        if not active():
            return model_fn(x, timesteps, condition)
        if batched:
            output = model_fn(torch.cat([x, x]), torch.cat([timesteps, timesteps]), joined)
            conditional, unconditional = output.chunk(2)
        else:
            conditional, unconditional = model_fn(x, timesteps, condition), model_fn(x, timesteps, null)
        count = conditional.shape[2] if channels is None else channels
        noise, rest = conditional[:, :, :count], conditional[:, :, count:]
        baseline = unconditional[:, :, :count]
        return torch.cat([baseline + scale * (noise - baseline), rest], dim=2)

    return denoiser
