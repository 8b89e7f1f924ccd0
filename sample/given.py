"""Videos with known frames, or longer than a window: from files to passes of the sampler.

Letters: V given sets of frames, k frames each, B videos of a batch, F frames, C latent channels, h w latent pixels,
H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.checks import require
from datasets.clips import Pixels
from datasets.config import DataConfig
from datasets.readers import VideoError, open_video
from diffusion import ConditionConfig, Denoiser, Given
from diffusion.windows import fuse_windows, slide_windows, window_starts


@dataclass(frozen=True)
class GivenFrames:
    """Known frames: video i shows set i modulo V.

    Attributes:
        pixels: (V, k, 3, H, W) in [-1, 1].
        places: k places in the video, ascending.
    """

    pixels: Tensor
    places: tuple[int, ...]


@dataclass(frozen=True)
class Windows:
    """Frames per window, frames shared with the next window, and a method of `diffusion.windows`."""

    size: int
    overlap: int
    method: str


# ------------------------------------------------------------------------------------------- files


def read_given(wanted: Any, data: DataConfig, prefix: str = "sample.") -> GivenFrames | None:
    """Reads `first_frame`, `given` and `last_frame`, resized and cropped as training clips are.

    Args:
        wanted: has these keys; `prefix` precedes them in errors.
        data: length and size of the videos, and how clips are read.

    Raises:
        ValueError: a file that cannot be read or has too few frames, in one sentence that names it.
    """
    first = [_image(path, f"{prefix}first_frame", data) for path in wanted.first_frame or []]
    begin = [_end_of(path, f"{prefix}given", wanted.given_frames, data) for path in wanted.given or []] or first
    end = [_image(path, f"{prefix}last_frame", data) for path in wanted.last_frame or []]
    require(
        not (begin and end) or len(begin) == len(end),
        f"{prefix}last_frame names {len(end)} files, but {len(begin)} say how the videos begin: name as many.",
    )
    if not (begin or end):
        return None
    parts = [torch.stack(sets) for sets in (begin, end) if sets]
    places = [*range(len(begin[0]) if begin else 0), *([data.num_frames - 1] if end else [])]
    return GivenFrames(torch.cat(parts, dim=1), tuple(places))


def _image(path: str, key: str, data: DataConfig) -> Tensor:
    """Reads an image: (1, 3, H, W) in [-1, 1]."""
    return _frames(path, key, data, lambda length: [0] if length == 1 else None, "must be one image")


def _end_of(path: str, key: str, count: int, data: DataConfig) -> Tensor:
    """Reads the last frames of a video, as far apart as those of a training clip: (`count`, 3, H, W)."""
    span = (count - 1) * data.frame_interval + 1
    return _frames(
        path,
        key,
        data,
        lambda length: range(length - span, length, data.frame_interval) if length >= span else None,
        f"are too few for {key}_frames={count}, {data.frame_interval} apart",
    )


def _frames(
    path: str, key: str, data: DataConfig, choose: Callable[[int], Sequence[int] | None], complaint: str
) -> Tensor:
    """Reads the frames that `choose` picks. Raises: ValueError with the `complaint` if it picks none."""
    pixels = Pixels(data)
    try:
        reader = open_video(path, data.reader, data.max_pixels)
        chosen = choose(len(reader))
        require(chosen is not None, f"{key}: the {len(reader)} frames of {path} {complaint}.")
        return pixels.finish(reader.read(chosen or []), mirrored=False)
    except VideoError as error:
        raise ValueError(f"{key}: {error}.") from None


# ------------------------------------------------------------------------------------------ passes


@dataclass(frozen=True)
class Plan:
    """Known frames and windows of the videos of a job, and the resulting passes of the sampler.

    Attributes:
        shape: (F, C, h, w) of a video's latents.
        latents: (V, k, C, h, w) of the known frames, on the sampler's device.
        places: where they belong.
        windows: None: one pass over all frames.
    """

    shape: tuple[int, int, int, int]
    latents: Tensor
    places: tuple[int, ...] = ()
    windows: Windows | None = None

    @property
    def slides(self) -> bool:
        """Whether windows are sampled one after the other."""
        return self.windows is not None and self.windows.method == "autoregressive"

    def known(self) -> list[set[int]]:
        """Returns the frames of each window that are known when it is sampled, counted from its first."""
        frames, windows = self.shape[0], self.windows
        if windows is None or frames <= windows.size:
            return [set(self.places)]
        starts = window_starts(frames, windows.size, windows.overlap, windows.method)
        given = [{place - start for place in self.places if start <= place < start + windows.size} for start in starts]
        before = set(range(windows.overlap)) if self.slides else set()
        return [given[0], *(each | before for each in given[1:])]

    @property
    def num_passes(self) -> int:
        """Number of passes of the sampler for each batch."""
        return len(self.known()) if self.slides else 1

    def check(self, condition: ConditionConfig, span: int) -> None:
        """Raises ValueError if a network trained with `condition` does not support the known frames of a window."""
        size = min(self.shape[0], self.windows.size) if self.windows else self.shape[0]
        for places in self.known():
            condition.check_given(places, size, span)

    def denoiser(self, denoiser: Denoiser) -> Denoiser:
        """Returns `denoiser`, or the mean of its windows."""
        if self.windows is None or self.slides:
            return denoiser
        return fuse_windows(denoiser, self.windows.size, self.windows.overlap)

    def sample(self, sample_pass: Callable[[Given | None, int], Tensor], indices: Sequence[int]) -> Tensor:
        """Samples the latents (B, F, C, h, w) of the videos `indices`.

        Args:
            sample_pass: (what is known, frames) -> latents (B, frames, C, h, w).
        """
        known = self.latents.new_zeros(len(indices), *self.shape)
        if self.places:
            known[:, list(self.places)] = self.latents[[index % len(self.latents) for index in indices]]
        there = [place in self.places for place in range(self.shape[0])]

        def sample_window(latents: Tensor, places: list[bool]) -> Tensor:
            given = Given(latents, torch.tensor([places], device=latents.device)) if any(places) else None
            return sample_pass(given, latents.shape[1])

        if not self.slides or self.num_passes == 1 or self.windows is None:
            return sample_window(known, there)
        return slide_windows(sample_window, known, there, self.windows.size, self.windows.overlap)
