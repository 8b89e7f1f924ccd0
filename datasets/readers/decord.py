"""Reads video files with decord."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .base import MAX_PIXELS, Reader, VideoError, load_package
from .containers import detect_container
from .pyav import VideoFile, open_container

# In others (HEVC, VP9, MPEG-2, WMV; MPEG transport and program streams) it returns wrong frames without an error.
CODECS, CONTAINERS = ("h264", "h263", "mpeg4", "mjpeg", "vp8"), ("mov", "matroska", "avi", "flv")


class DecordReader(Reader):
    """Reads with decord 0.6, kept for its users: its frame count can be one too high, and it lacks new codecs."""

    def __init__(self, path: str | Path, max_pixels: int = MAX_PIXELS) -> None:
        super().__init__(path)
        decord = load_package("decord")
        self.failures = (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, UnicodeError)
        container = detect_container(path)
        with open_container(VideoFile(self.path, container, max_pixels)) as (_, stream):  # checks limits
            codec = stream.codec_context.codec.canonical_name
        if codec not in CODECS or container not in CONTAINERS:
            raise VideoError(path, f"decord is not reliable for {codec} in {container}: set data.reader=auto")
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
