"""Reads video files with decord."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .base import MAX_PIXELS, Reader, VideoError, load_package
from .containers import detect_container
from .pyav import VideoFile, open_container


class DecordReader(Reader):
    """Reads with decord 0.6, kept for its users: its frame count can be one too high, and it lacks new codecs."""

    def __init__(self, path: str | Path, max_pixels: int = MAX_PIXELS) -> None:
        super().__init__(path)
        decord = load_package("decord")
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

    def read_images(self, indices: list[int]) -> dict[int, np.ndarray]:
        try:
            frames = self.video.get_batch(indices).asnumpy()  # (T, H, W, C), upright
        except self.failures as error:
            raise VideoError(self.path, f"decord cannot read frames {indices[0]} to {indices[-1]}") from error
        return dict(zip(indices, frames, strict=True))
