"""Similarity of an image and its reconstruction: PSNR, and SSIM as Wang et al. (2004) define it.

Letters: N images, H W height and width in pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from common.checks import require

PEAK = 255.0
WINDOW, SIGMA = 11, 1.5  # side and deviation, in pixels, of SSIM's Gaussian window
K1, K2 = 0.01, 0.03


def psnr(real: Tensor, fake: Tensor) -> Tensor:
    """Returns the PSNR (N,) in dB of uint8 images (N, 3, H, W), in float64.

    For an exact copy it is that of a copy with a single value off by one, so that means stay finite.
    """
    errors = (real.double() - fake.double()).square().flatten(1)
    return 10 * torch.log10(PEAK**2 / errors.mean(1).clamp(min=1 / errors.shape[1]))


def ssim(real: Tensor, fake: Tensor) -> Tensor:
    """Returns the SSIM (N,) of uint8 images (N, 3, H, W): the mean over channels and windows, in float64.

    Raises: ValueError for images smaller than a window.
    """
    height, width = real.shape[-2:]
    require(min(height, width) >= WINDOW, f"SSIM needs images of {WINDOW} pixels or more, not {width}x{height}.")
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=real.device) - WINDOW // 2
    line = torch.exp(-offsets.square() / (2 * SIGMA**2))
    line = line / line.sum()

    def blur(images: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(images, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    x, y = (images.double().flatten(0, 1)[:, None] for images in (real, fake))  # (3 N, 1, H, W)
    mean_x, mean_y = blur(x), blur(y)
    products, squares = mean_x * mean_y, mean_x.square() + mean_y.square()
    covariance, variances = blur(x * y) - products, blur(x.square() + y.square()) - squares
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    values = (2 * products + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))
    return values.view(len(real), -1).mean(1)
