"""Video files through decord."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import VideoError
from .base import MAX_PIXELS, check_indices, load_package
from .containers import detect_container
from .pyav import VideoFile, open_container


class DecordReader:
    """Reader through decord 0.6, kept for its users: its frame count can be one too high, and it lacks new codecs."""

    def __init__(self, path: str | Path, max_pixels: int = MAX_PIXELS) -> None:
        decord = load_package("decord")
        self.path = str(path)
        self.damage: str | None = None
        self.cut_off: str | None = None
        self.failures = (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, UnicodeError)
        with open_container(VideoFile(self.path, detect_container(path), max_pixels)):  # checks limits
            pass
        try:
            self.video = decord.VideoReader(
                str(Path(path).absolute()),
                ctx=decord.cpu(0),
                num_threads=1,
                fault_tol=1e-9,  # otherwise undecodable frames become copies of the nearest frame
            )
            self.fps = float(self.video.get_avg_fps())
        except self.failures as error:
            raise VideoError(path, "decord cannot open it") from error

    def __len__(self) -> int:
        return len(self.video)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Returns these frames in order, uint8 (T, C, H, W) RGB, upright."""
        wanted = check_indices(indices, len(self))
        try:
            frames = self.video.get_batch(wanted).asnumpy()  # (T, H, W, C)
        except self.failures as error:
            raise VideoError(self.path, f"decord cannot read frames {wanted[0]} to {wanted[-1]}") from error
        return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()  # (T, C, H, W)
