"""Denoisers: what samplers and losses call, and classifier-free guidance as a wrapper around one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# (noisy_latents (B, F, C, H, W), timesteps (B,)) -> model_output (B, F, C or 2C, H, W)
Denoiser = Callable[[Tensor, Tensor], Tensor]
# (noisy_latents, timesteps, labels) -> model_output
ConditionalDenoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def guided(
    model_fn: ConditionalDenoiser,
    labels: Tensor | None,
    null_label: int | None,
    scale: float,
    *,
    channels: int,
    batched: bool = True,
    active: Callable[[], bool] = lambda: True,
) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022): unconditional + scale * (conditional - unconditional).

    Only the first `channels` output channels are guided; the rest (learned sigma) are the conditional ones. Scale 1
    is one plain conditional call.

    Args:
        model_fn: the network, called with (x, timesteps, labels).
        labels: (B,) or (B, 1+I) long; None for an unconditional network, which allows scale 1 only.
        null_label: the network's label for "no label"; may be None at scale 1.
        scale: guidance scale; 0 is unconditional, above 1 exaggerates the condition.
        channels: C, the latent channels.
        batched: conditional and unconditional in one call of 2B, else one after the other in half the memory.
        active: asked at every call; where it says no, it is a plain conditional call (Kynkaanniemi et al. 2024:
            guidance in a limited interval of the noise levels).

    Raises:
        ValueError: a scale other than 1 without labels or without a null label.
    """
    if scale == 1.0:
        return lambda x, timesteps: model_fn(x, timesteps, labels)
    if labels is None or null_label is None:
        lacking = "labels" if labels is None else "a null label (it was trained with model.label_dropout=0)"
        raise ValueError(f"Guidance scale {scale} needs a network with {lacking}: use guidance_scale=1.")
    null_labels = torch.full_like(labels, null_label)
    both_labels = torch.cat([labels, null_labels])

    def both(x: Tensor, timesteps: Tensor) -> tuple[Tensor, ...]:
        if batched:
            return model_fn(torch.cat([x, x]), torch.cat([timesteps, timesteps]), both_labels).chunk(2)
        return model_fn(x, timesteps, labels), model_fn(x, timesteps, null_labels)

    def denoiser(x: Tensor, timesteps: Tensor) -> Tensor:
        if not active():
            return model_fn(x, timesteps, labels)
        conditional, unconditional = both(x, timesteps)
        noise, rest = conditional[:, :, :channels], conditional[:, :, channels:]
        baseline = unconditional[:, :, :channels]
        return torch.cat([baseline + scale * (noise - baseline), rest], dim=2)

    return denoiser
