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
) -> Denoiser:
    """Classifier-free guidance (Ho & Salimans 2022): unconditional + scale * (conditional - unconditional).

    Conditional and unconditional run as one batch of 2B. Only the first `channels` output channels
    are guided; the rest (learned sigma) are the conditional ones. Scale 1 is one plain conditional call.

    Args:
        model_fn: the network, called with (x, timesteps, labels).
        labels: (B,) or (B, 1+I) long; None for an unconditional network, which allows scale 1 only.
        null_label: the network's label for "no label"; may be None at scale 1.
        scale: guidance scale; 0 is unconditional, above 1 exaggerates the condition.
        channels: C, the latent channels.

    Raises:
        ValueError: a scale other than 1 without labels or without a null label.
    """
    if scale == 1.0:
        return lambda x, timesteps: model_fn(x, timesteps, labels)
    if labels is None or null_label is None:
        lacking = "labels" if labels is None else "a null label (it was trained with model.label_dropout=0)"
        raise ValueError(f"Guidance scale {scale} needs a network with {lacking}: use guidance_scale=1.")
    both_labels = torch.cat([labels, torch.full_like(labels, null_label)])

    def denoiser(x: Tensor, timesteps: Tensor) -> Tensor:
        output = model_fn(torch.cat([x, x]), torch.cat([timesteps, timesteps]), both_labels)
        conditional, unconditional = output.chunk(2)
        noise, rest = conditional[:, :, :channels], conditional[:, :, channels:]
        baseline = unconditional[:, :, :channels]
        return torch.cat([baseline + scale * (noise - baseline), rest], dim=2)

    return denoiser
