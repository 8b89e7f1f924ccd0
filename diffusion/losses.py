"""Loss terms and the likelihoods behind them.

Letters: B clips, F frames. Terms are means over all other dimensions, in nats unless bits are stated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

NATS_PER_BIT = math.log(2.0)
MIN_PROBABILITY = 1e-12


@dataclass
class LossTerms:
    """Training loss per clip and per frame.

    Attributes:
        loss: (B,) the value to minimise: the mean over frames of the sum of the terms.
        mse: (B, F) squared error of the prediction; None if the loss is the variational bound alone.
        vb: (B, F) variational bound in bits per dimension, with its weight in the loss; None if unused.
        extra: (B,) further terms of the training loss by name, which `loss` does not contain.
    """

    loss: Tensor
    mse: Tensor | None
    vb: Tensor | None
    extra: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_frames(cls, mse: Tensor | None = None, vb: Tensor | None = None) -> LossTerms:
        """Builds terms whose loss is the mean over frames of `mse` + `vb`, each (B, F) or None."""
        terms = cls(torch.empty(0), mse, vb)
        terms.loss = terms.per_frame().mean(1)
        return terms

    def without(self, given: Tensor) -> LossTerms:
        """Returns the terms without the clip's `given` frames, (B, F) bool; images, which follow the clip, stay.

        The k given frames become 0 and the others are scaled by F / (F - k), so the mean over all F frames is the mean
        over the learned ones, and the relative weight of clip and images does not change.
        """
        learned = ~given
        weight = learned.shape[1] / learned.sum(1, keepdim=True)  # (B, 1)

        def only(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            clip, images = values[:, : given.shape[1]], values[:, given.shape[1] :]
            return torch.cat([torch.where(learned, clip * weight.to(clip.dtype), 0), images], dim=1)

        return LossTerms.from_frames(only(self.mse), only(self.vb))

    def per_frame(self) -> Tensor:
        """Returns the loss of each frame, (B, F)."""
        return torch.stack([term for term in (self.mse, self.vb) if term is not None]).sum(0)


def append_dims(values: Tensor, x: Tensor) -> Tensor:
    """Reshapes per-clip (B,) or per-frame (B, F) values to broadcast over `x` (B, F, ...)."""
    return values.view(*values.shape, *[1] * (x.ndim - values.ndim))


def frame_mean(values: Tensor) -> Tensor:
    """Averages (B, F, ...) to (B, F)."""
    return values.flatten(2).mean(2)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Returns KL(N1 || N2) of diagonal Gaussians, elementwise in nats; shapes broadcast."""
    ratio = -1.0 + log_variance2 - log_variance1 + torch.exp(log_variance1 - log_variance2)
    return 0.5 * (ratio + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def approx_normal_cdf(x: Tensor) -> Tensor:
    """Approximates the standard normal distribution function with tanh (Page 1977); error below 4e-4."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Returns the log probability, elementwise in nats, of the 8-bit level that `x` in [-1, 1] represents.

    Each of the 256 levels covers the interval of width 2/255 around it; the outermost two extend to infinity (Ho et al.
    2020, eq. 13). `log_scale` is the logarithm of the standard deviation.
    """
    centered, inverse_scale = x - mean, torch.exp(-log_scale)
    upper = approx_normal_cdf(inverse_scale * (centered + 1 / 255))
    lower = approx_normal_cdf(inverse_scale * (centered - 1 / 255))
    inside = torch.where(x > 0.999, 1 - lower, upper - lower)
    return torch.where(x < -0.999, upper, inside).clamp(min=MIN_PROBABILITY).log()
