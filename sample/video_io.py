"""Writes videos as mp4, GIF, contact sheet or array, atomically; the same frames give the same bytes.

Videos are uint8 RGB: (F, H, W, 3) for one, (n, F, H, W, 3) for several of the same size.
Letters: n videos, F frames, H W height and width in pixels.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from common.storage import write_atomically
from common.text import printable
from datasets.readers import open_video

MARGIN = 4  # pixels between the tiles of a contact sheet
GIF_GAP = 2  # pixels between the tiles of a GIF
BACKGROUND = 255
# One thread and bit-exact muxing, so that the bytes depend only on the frames, not on the number of cores.
# Without cpu-independent, the macroblock-tree assembly reads past the end of small frames.
X264_OPTIONS = {
    "crf": "10",
    "preset": "medium",
    "threads": "1",
    "flags": "+bitexact",
    "x264-params": "cpu-independent=1",
}
MP4_OPTIONS = {"fflags": "+bitexact"}


def slug(name: str, max_length: int = 80) -> str:
    """Returns `name` as a safe part of a file name: only letters, digits, `.`, `-`, `_`; never empty or hidden."""
    safe = re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII).strip("._-")
    return safe[:max_length] or "unnamed"


def read_video(path: str | Path) -> np.ndarray:
    """Reads all frames of a video or array file as uint8 (F, H, W, 3)."""
    reader = open_video(path)
    return reader.read(range(len(reader))).permute(0, 2, 3, 1).numpy()


def write_mp4(path: str | Path, video: np.ndarray, fps: float = 8) -> Path:
    """Writes one video (F, H, W, 3) as H.264 in yuv420p, which every player and browser supports.

    The format needs even sizes: if height or width is odd, the last row or column is repeated.
    """
    import av

    frames = as_frames(video, ndim=4)
    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")

    def write(temporary: Path) -> None:
        # in this process: a separate ffmpeg could fail unnoticed and leave a truncated file
        with av.open(str(temporary), "w", format="mp4", container_options=MP4_OPTIONS) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=X264_OPTIONS)
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))

    return write_atomically(path, write)


def write_lossless(path: str | Path, video: np.ndarray) -> Path:
    """Writes one video (F, H, W, 3) unchanged: NumPy's .npy, format version 1, for `np.load(..., mmap_mode="r")`."""
    buffer = io.BytesIO()  # writing by NumPy would not report a full disk
    np.lib.format.write_array(buffer, np.ascontiguousarray(as_frames(video, ndim=4)), version=(1, 0))
    return write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def write_gif(path: str | Path, videos: np.ndarray, fps: float = 8, scale: int | None = 1) -> Path:
    """Writes the videos (n, F, H, W, 3) as one looping GIF, side by side in a near-square grid.

    All frames share a palette, so that still parts do not flicker. `scale`: integer enlargement; None enlarges tiny
    videos to about 64 pixels.
    """
    tiles = enlarge(as_frames(videos, ndim=5), scale)
    frames = [Image.fromarray(frame) for frame in grid(tiles)]
    palette = Image.fromarray(np.concatenate([np.asarray(frame) for frame in frames])).quantize(256)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]

    def write(temporary: Path) -> None:
        first, *rest = frames
        first.save(temporary, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, optimize=False)

    return write_atomically(path, write)


def write_contact_sheet(
    path: str | Path, videos: np.ndarray, captions: Sequence[str] | None = None, **options: Any
) -> Path:
    """Writes `contact_sheet` of the videos as a PNG; `options` are its `scale` and `max_frames`."""
    sheet = Image.fromarray(contact_sheet(videos, captions, **options))
    return write_atomically(path, lambda temporary: sheet.save(temporary))


def contact_sheet(
    videos: np.ndarray, captions: Sequence[str] | None = None, scale: int | None = None, max_frames: int = 16
) -> np.ndarray:
    """Returns an image (h, w, 3) of the videos (n, F, H, W, 3): a row per video, a column per frame, captions left.

    Args:
        captions: one per video, or None for no caption column.
        scale: integer enlargement without smoothing; None enlarges tiny videos to about 64 pixels.
        max_frames: of longer videos, shows this many evenly spaced frames, including first and last.
    """
    videos = as_frames(videos, ndim=5)
    if captions is not None and len(captions) != len(videos):
        raise ValueError(f"{len(captions)} captions for {len(videos)} videos: give one caption per video.")
    captions = [printable(caption) for caption in captions or []]
    shown = np.linspace(0, videos.shape[1] - 1, min(max_frames, videos.shape[1])).round().astype(int)
    tiles = enlarge(videos[:, shown], scale)
    font = ImageFont.load_default(13)  # Pillow's own; needs no font file
    gutter = max((math.ceil(font.getlength(caption)) + MARGIN for caption in captions), default=0)
    rows = np.pad(tiles, ((0, 0), (0, 0), (0, MARGIN), (0, MARGIN), (0, 0)), constant_values=BACKGROUND)
    pixels = rearrange(rows, "n f h w c -> (n h) (f w) c")
    pixels = np.pad(pixels, ((MARGIN, 0), (gutter + MARGIN, 0), (0, 0)), constant_values=BACKGROUND)
    if not captions:
        return pixels
    sheet = Image.fromarray(pixels)
    for row, caption in enumerate(captions):
        middle = MARGIN + row * rows.shape[2] + tiles.shape[2] // 2
        ImageDraw.Draw(sheet).text((MARGIN, middle), caption, fill=(0, 0, 0), font=font, anchor="lm")
    return np.asarray(sheet)


def enlarge(videos: np.ndarray, scale: int | None) -> np.ndarray:
    """Repeats every pixel of videos (n, F, H, W, 3) `scale` times in height and width; None: to about 64 pixels."""
    if scale is None:
        scale = max(1, round(64 / max(videos.shape[2:4])))
    return videos.repeat(scale, axis=2).repeat(scale, axis=3) if scale > 1 else videos


def grid(videos: np.ndarray) -> np.ndarray:
    """Tiles the videos (n, F, H, W, 3) into a near-square grid, (F, height, width, 3)."""
    count = len(videos)
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    around = ((0, rows * columns - count), (0, 0), (0, GIF_GAP), (0, GIF_GAP), (0, 0))
    tiles = np.pad(videos, around, constant_values=BACKGROUND)
    return rearrange(tiles, "(r c) f h w k -> f (r h) (c w) k", r=rows)[:, :-GIF_GAP, :-GIF_GAP]


def as_frames(videos: np.ndarray, ndim: int) -> np.ndarray:
    """Returns the videos, an array or a CPU tensor, as an array. Raises: ValueError unless uint8 (..., 3)."""
    array = np.asarray(videos)
    if array.dtype != np.uint8 or array.ndim != ndim or array.shape[-1] != 3 or array.size == 0:
        wanted = "(n, F, H, W, 3)" if ndim == 5 else "(F, H, W, 3)"
        raise ValueError(f"videos must be uint8 of shape {wanted}, not {array.dtype} of shape {array.shape}.")
    return array
