"""Clips longer than those of training, by windows of the trained length that overlap.

Two ways. `slide` samples one window after the other, each given the last frames of the one before: for networks that
were trained with given frames. `fused` samples all frames at once and lets every step average what the windows say
of them (MultiDiffusion, Bar-Tal et al. 2023, over time): for any network.

Letters: B clips, F frames, C channels, H W.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .guidance import Denoiser

METHODS = ("autoregressive", "fused")


def window_starts(total: int, window: int, overlap: int, method: str) -> list[int]:
    """First frames of the windows over `total` frames.

    Windows lie `window - overlap` frames apart. The last one goes beyond the end if need be (autoregressive; what is
    too much is cut off), or is moved back to end with the clip (fused).
    """
    if total <= window:
        return [0]
    starts = list(range(0, total - overlap, window - overlap))
    return starts if method == "autoregressive" else [*starts[:-1], total - window]


def seams(total: int, window: int, overlap: int, method: str) -> list[int]:
    """Frames at which another window takes over: where it is heard for the first time, or another for the last."""
    starts = window_starts(total, window, overlap, method)
    if method == "autoregressive":
        return [start + overlap for start in starts[1:]]
    edges = {*starts, *(start + window for start in starts)}
    return sorted(edges - {0, total})


def slide(
    sample_window: Callable[[Tensor, list[bool]], Tensor], known: Tensor, places: list[bool], window: int, overlap: int
) -> Tensor:
    """Clips (B, F, C, H, W), window after window.

    Args:
        sample_window: known frames (B, window, C, H, W) and which of them count -> the whole window.
        known: (B, F, C, H, W), the frames that are known from the start.
        places: F, which of them count.
        overlap: frames of a window that are given to the next, 1 to `window` - 1.
    """
    total = known.shape[1]
    starts = window_starts(total, window, overlap, "autoregressive")
    surplus = max(0, starts[-1] + window - total)
    clip = torch.cat([known, known.new_zeros(known.shape[0], surplus, *known.shape[2:])], dim=1)
    there = [*places, *[False] * surplus]
    for start in starts:
        part = slice(start, start + window)
        clip[:, part] = sample_window(clip[:, part], there[part])
        there[part] = [True] * window
    return clip[:, :total]


def fused(denoiser: Denoiser, window: int, overlap: int) -> Denoiser:
    """`denoiser` of `window` frames -> one of any number: the weighted mean of what the windows over a frame say.

    Within an overlap the weight passes linearly from one window to the next, so that no frame changes hands at once.
    """

    def averaged(x: Tensor, timesteps: Tensor) -> Tensor:
        starts = window_starts(x.shape[1], window, overlap, "fused")
        if len(starts) == 1:
            return denoiser(x, timesteps)
        weights = ramp(window, overlap, x)
        total, weight = None, torch.zeros(x.shape[1], dtype=weights.dtype, device=x.device)
        for start in starts:
            part = slice(start, start + window)
            output = denoiser(x[:, part], timesteps if timesteps.ndim == 1 else timesteps[:, part])
            if total is None:
                total = output.new_zeros(x.shape[0], x.shape[1], *output.shape[2:])
            total[:, part] += output * weights[:, None, None, None].to(output.dtype)
            weight[part] += weights
        assert total is not None
        return total / weight[:, None, None, None].to(total.dtype)

    return averaged


def ramp(window: int, overlap: int, x: Tensor) -> Tensor:
    """(window,) weights: 1, 2, ... over the overlap, level between, and down again; on x's device."""
    places = torch.arange(window, device=x.device)
    return torch.minimum(places + 1, window - places).clamp(max=overlap + 1).float()
