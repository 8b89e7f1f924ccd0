"""Writes the video files of data sets: nearly lossless, with frequent key frames and reproducible bytes."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np

from .readers import load_package


def write_video(path: Path, frames: Iterable[np.ndarray], fps: Fraction | int) -> None:
    """Writes frames (H, W, 3) as H.264 (constant rate factor 6) on one thread, for reproducible bytes.

    Colour is kept at full resolution (yuv444p), so odd sizes need no padding. Every eighth frame is a key frame, so
    seeking decodes few frames.
    """
    av = load_package("av")
    with av.open(str(path), "w") as container:
        stream = None
        for frame in frames:
            if stream is None:
                stream = container.add_stream("libx264", rate=fps)
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = "yuv444p"
                stream.codec_context.thread_count = 1
                # x264's macroblock tree reads past the edge of tiny frames: the bytes would differ from run to run
                stream.options = {"crf": "6", "preset": "medium", "g": "8", "mbtree": "0"}
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        if stream is not None:
            container.mux(stream.encode())
