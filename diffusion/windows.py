"""Sampling of clips longer than in training, in overlapping windows of the trained length.

`slide_windows` samples one window after another, each with the last frames of the previous one given; it needs a
network that was trained with given frames. `fuse_windows` samples all frames at once and averages the windows' outputs
in every step (MultiDiffusion, Bar-Tal et al. 2023, along time); it works with any network.

Letters: B clips, F frames, C channels, H W.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .guidance import Denoiser

WINDOW_METHODS = ("autoregressive", "fused")


def window_starts(total: int, window: int, overlap: int, method: str) -> list[int]:
    """Returns the first frame of each window over `total` frames, `window - overlap` apart.

    The last window may extend beyond the end (autoregressive), or is moved back to end with the clip (fused).
    """
    if total <= window:
        return [0]
    starts = list(range(0, total - overlap, window - overlap))
    return starts if method == "autoregressive" else [*starts[:-1], total - window]


def find_seams(total: int, window: int, overlap: int, method: str) -> list[int]:
    """Returns the frame indices at which a window starts or stops contributing."""
    starts = window_starts(total, window, overlap, method)
    if method == "autoregressive":
        return [start + overlap for start in starts[1:]]
    edges = {*starts, *(start + window for start in starts)}
    return sorted(edges - {0, total})


def slide_windows(
    sample_window: Callable[[Tensor, list[bool]], Tensor], known: Tensor, places: list[bool], window: int, overlap: int
) -> Tensor:
    """Samples clips (B, F, C, H, W) window by window.

    Args:
        sample_window: maps frames (B, window, C, H, W) and one flag per frame, True if known, to the sampled window.
        known: (B, F, C, H, W), holds the frames known in advance.
        places: F flags, True where `known` holds a known frame.
        overlap: number of frames passed from each window to the next, 1 to `window` - 1.
    """
    total = known.shape[1]
    starts = window_starts(total, window, overlap, "autoregressive")
    surplus = max(0, starts[-1] + window - total)
    clip = torch.cat([known, known.new_zeros(known.shape[0], surplus, *known.shape[2:])], dim=1)
    is_known = [*places, *[False] * surplus]
    for start in starts:
        part = slice(start, start + window)
        clip[:, part] = sample_window(clip[:, part], is_known[part])
        is_known[part] = [True] * window
    return clip[:, :total]


def fuse_windows(denoiser: Denoiser, window: int, overlap: int) -> Denoiser:
    """Wraps a denoiser of `window` frames for any number of frames: a weighted mean over overlapping windows.

    Within an overlap the weights change linearly from one window to the next.
    """

    def averaged(x: Tensor, timesteps: Tensor) -> Tensor:
        starts = window_starts(x.shape[1], window, overlap, "fused")
        if len(starts) == 1:
            return denoiser(x, timesteps)
        weights = ramp(window, overlap, x)
        total, weight = torch.empty(0), torch.zeros(x.shape[1], dtype=weights.dtype, device=x.device)
        for start in starts:
            part = slice(start, start + window)
            output = denoiser(x[:, part], timesteps if timesteps.ndim == 1 else timesteps[:, part])
            if start == 0:
                total = output.new_zeros(x.shape[0], x.shape[1], *output.shape[2:])
            total[:, part] += output * weights[:, None, None, None].to(output.dtype)
            weight[part] += weights
        return total / weight[:, None, None, None].to(total.dtype)

    return averaged


def ramp(window: int, overlap: int, x: Tensor) -> Tensor:
    """Returns weights (window,) on the device of x: rising 1, 2, ... over the overlap, constant, then falling."""
    places = torch.arange(window, device=x.device)
    return torch.minimum(places + 1, window - places).clamp(max=overlap + 1).float()
