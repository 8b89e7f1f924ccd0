"""Given frames and windows: reads the frames, and plans and runs the sampler passes.

Letters: V sets of given frames, k frames each, B videos per batch, F frames, C latent channels, h w latent pixels,
H W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.checks import require
from datasets.clips import Pixels
from datasets.config import DataConfig
from datasets.readers import VideoError, open_video
from diffusion import ConditionConfig, Denoiser, Given, sample_given, sample_rolling
from diffusion.frame_noise import FRAME_METHODS
from diffusion.windows import fuse_windows, slide_windows, window_starts
from engine.config import Config


@dataclass(frozen=True)
class GivenFrames:
    """Known frames; video i uses set i modulo V."""

    pixels: Tensor  # (V, k, 3, H, W) in [-1, 1]
    places: tuple[int, ...]  # k frame indices in the video, ascending


def hash_given(given: GivenFrames) -> str:
    """Returns the SHA-256 of the given frames and their indices."""
    return hashlib.sha256(repr(given.places).encode() + given.pixels.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Windows:
    """Frames per window, frames shared with the next window, and a `diffusion.windows` method or "rolling"."""

    size: int
    overlap: int
    method: str


def read_given(wanted: Any, data: DataConfig, prefix: str = "sample.") -> GivenFrames | None:
    """Reads `first_frame`, `given` and `last_frame`, resized and cropped like training clips.

    Args:
        wanted: has these keys as attributes; errors put `prefix` before them.
        data: length and size of the videos, and clip-reading settings.

    Raises: ValueError, naming the file, if it cannot be read or has too few frames.
    """
    first = [_read_frames(path, f"{prefix}first_frame", data) for path in wanted.first_frame or []]
    videos = [_read_frames(path, f"{prefix}given", data, wanted.given_frames) for path in wanted.given or []]
    begin, end = first or videos, [_read_frames(path, f"{prefix}last_frame", data) for path in wanted.last_frame or []]
    require(
        not (begin and end) or len(begin) == len(end),
        f"{prefix}last_frame names {len(end)} files, but first_frame or given names {len(begin)}: name as many.",
    )
    if not (begin or end):
        return None
    parts = [torch.stack(sets) for sets in (begin, end) if sets]
    places = [*range(len(begin[0]) if begin else 0), *([data.num_frames - 1] if end else [])]
    return GivenFrames(torch.cat(parts, dim=1), tuple(places))


def _read_frames(path: str, key: str, data: DataConfig, count: int | None = None) -> Tensor:
    """Reads an image, or the last `count` frames of a video, spaced as in training, as (k, 3, H, W) in [-1, 1]."""
    pixels, apart = Pixels(data), data.frame_interval
    try:
        reader = open_video(path, data.reader, data.max_pixels)
        length, span = len(reader), ((count or 1) - 1) * apart + 1
        found = f"{key}: the {length} frames of {path}"
        require(count is not None or length == 1, f"{found} must be one image.")
        require(length >= span, f"{found} are too few for {key}_frames={count}, {apart} apart.")
        return pixels.finish(reader.read(range(length - span, length, apart)), mirrored=False)
    except VideoError as error:
        raise ValueError(f"{key}: {error}.") from None


@dataclass(frozen=True)
class Plan:
    """Known frames and windows of a job's videos, and the resulting sampler passes."""

    shape: tuple[int, int, int, int]  # (F, C, h, w) of the latents of one video
    places: tuple[int, ...] = ()  # indices of the known frames of each video
    windows: Windows | None = None  # None: one pass over all frames

    def list_known(self) -> list[set[int]]:
        """Returns for each window the frames known when it is sampled, as indices within the window."""
        frames, windows = self.shape[0], self.windows
        if windows is None or frames <= windows.size:
            return [set(self.places)]
        starts = window_starts(frames, windows.size, windows.overlap, windows.method)
        given = [{place - start for place in self.places if start <= place < start + windows.size} for start in starts]
        before = set(range(windows.overlap)) if windows.method == "autoregressive" else set()
        return [given[0], *(each | before for each in given[1:])]

    @property
    def num_passes(self) -> int:
        """Number of sampler passes per batch."""
        slides = self.windows is not None and self.windows.method == "autoregressive"
        return len(self.list_known()) if slides else 1

    def check(self, condition: ConditionConfig, span: int) -> None:
        """Raises ValueError if a network trained with `condition` does not support the known frames of any window."""
        size = min(self.shape[0], self.windows.size) if self.windows else self.shape[0]
        for places in self.list_known():
            condition.check_given(places, size, span)

    def check_rolling(self, config: Config, wanted: Any) -> None:
        """Raises ValueError if the network of `config` cannot sample rolling windows with `Settings` `wanted`."""
        windows, span, count = self.windows, config.model.frames_per_token, len(self.places)
        assert windows is not None
        broken = {
            "need a network trained with a timestep per frame: train it with diffusion.frame_timesteps=independent or "
            "monotone, or choose another window_method": config.diffusion.frame_timesteps == "shared",
            f"need sample.method={' | '.join(FRAME_METHODS)}, not {wanted.method}": (
                wanted.method not in ("auto", *FRAME_METHODS)
            ),
            "have several noise levels at once: leave guidance_interval out": wanted.guidance_interval is not None,
            f"need window and overlap in multiples of model.tubelet_size={span}, got {windows.size} and "
            f"{windows.overlap}": windows.size % span or windows.overlap % span,
            f"can be given first frames only, in whole tubelets, and fewer than all {self.shape[0]}": (
                self.places != tuple(range(count)) or count % span or count == self.shape[0]
            ),
        }
        for sentence, is_broken in broken.items():
            require(not is_broken, f"rolling windows {sentence}.")

    def denoiser(self, denoiser: Denoiser) -> Denoiser:
        """Returns `denoiser`; for fused windows, one that averages it over the windows."""
        if self.windows is None or self.windows.method != "fused":
            return denoiser
        return fuse_windows(denoiser, self.windows.size, self.windows.overlap)

    def sampler(self, span: int) -> Callable[..., Tensor]:
        """Returns the function that samples a pass: `sample_given`, or for rolling windows `sample_rolling`."""
        if self.windows is None or self.windows.method != "rolling":
            return sample_given
        return partial(sample_rolling, window=self.windows.size, overlap=self.windows.overlap, span=span)

    def sample(self, sample_pass: Callable[[Given | None, int], Tensor], known: Tensor) -> Tensor:
        """Returns latents (B, F, C, h, w), of which those at `places` are taken from `known` (B, F, C, h, w).

        `sample_pass` maps (known frames, number of frames) to latents (B, frames, C, h, w).
        """

        def sample_window(latents: Tensor, is_known: list[bool]) -> Tensor:
            given = Given(latents, torch.tensor([is_known], device=latents.device)) if any(is_known) else None
            return sample_pass(given, latents.shape[1])

        is_known = [place in self.places for place in range(self.shape[0])]
        if self.windows is None or self.num_passes == 1:
            return sample_window(known, is_known)
        return slide_windows(sample_window, known, is_known, self.windows.size, self.windows.overlap)
