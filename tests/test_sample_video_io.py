"""The writers of videos, read back with libraries we did not write."""

import os
import resource
import tempfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

from sample.video_io import MARGIN, contact_sheet, write_contact_sheet, write_gif, write_lossless, write_mp4
from tests.conftest import refuses


def smooth_videos(count: int, frames: int, height: int, width: int) -> np.ndarray:
    """Colour ramps that differ by video and frame: what H.264 keeps well."""
    n, f, y, x = np.meshgrid(*(np.arange(size) for size in (count, frames, height, width)), indexing="ij")
    red = 40 + 150 * x // width
    green = 60 + 120 * y // height
    blue = 50 + 10 * f + 40 * n
    return np.stack([red, green, blue], -1).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(40, 24), (33, 47)])
def test_mp4_round_trip(tmp_path: Path, height: int, width: int) -> None:
    video = smooth_videos(1, 16, height, width)[0]
    with av.open(str(write_mp4(tmp_path / "a.mp4", video, fps=8))) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert (stream.average_rate, stream.codec_context.pix_fmt) == (8, "yuv420p")
    assert frames.shape == (16, height + height % 2, width + width % 2, 3)  # no padding to multiples of 16
    assert abs(frames[:, :height, :width].astype(int) - video).mean() < 3
    if height % 2:  # the repeated row
        assert abs(frames[:, -1].astype(int) - frames[:, -2]).mean() < 3


def test_same_frames_same_bytes(tmp_path: Path) -> None:
    videos = smooth_videos(3, 6, 24, 32)
    for write, captions in ((write_gif, ()), (write_contact_sheet, (["x", "y", "z"],))):
        first, second = (write(tmp_path / name, videos, *captions).read_bytes() for name in ("one.gif", "two.gif"))
        assert first == second


def test_same_bytes_whatever_lies_in_memory() -> None:
    """Small noisy frames between which the heap is filled with other noise: x264's assembly reads beyond such."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    ball = [np.hypot(x - 4 - 1.5 * frame, y - 16 - 3 * np.sin(frame)) < 5 for frame in range(16)]
    video = np.clip(np.stack(ball)[..., None] * 200 + rng.integers(0, 40, (16, 32, 32, 3)), 0, 255).astype(np.uint8)
    seen = set()
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(40):
            heap = [rng.integers(0, 255, rng.integers(1, 20_000), np.uint8) for _ in range(20)]
            seen.add(write_mp4(Path(folder) / "a.mp4", video).read_bytes())
            del heap
    assert len(seen) == 1


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    """The kernel lets no file grow beyond 500 bytes: both writers say so and leave nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        for write, name in ((write_mp4, "a.mp4"), (write_lossless, "a.npy")):
            refuses("File too large", write, tmp_path / name, smooth_videos(1, 8, 32, 32)[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_arrays_can_be_mapped(tmp_path: Path) -> None:
    video = smooth_videos(1, 5, 6, 10)[0]
    path = write_lossless(tmp_path / "a.npy", video[:, ::-1])  # a view that is not contiguous
    array = np.load(path, mmap_mode="r")
    assert isinstance(array, np.memmap) and array.dtype == np.uint8 and array.flags.c_contiguous
    np.testing.assert_array_equal(array, video[:, ::-1])
    with path.open("rb") as stream:
        assert np.lib.format.read_magic(stream) == (1, 0)
    refuses(r"uint8 of shape \(F, H, W, 3\)", write_lossless, path, video.astype(np.float32))


def test_gif_is_a_grid_that_plays_all_frames(tmp_path: Path) -> None:
    videos = smooth_videos(3, 5, 20, 30)
    with Image.open(write_gif(tmp_path / "a.gif", videos, fps=10, scale=2)) as gif:
        frames = [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(gif)]
        assert gif.info["duration"] == 100
        assert gif.info["loop"] == 0
    assert len(frames) == 5
    assert frames[0].shape == (2 * 40 + 2, 2 * 60 + 2, 3)  # 2 x 2 tiles of 40 x 60, a gap of 2
    enlarged = videos.repeat(2, 2).repeat(2, 3).astype(int)
    assert abs(frames[3][:40, :60] - enlarged[0, 3]).mean() < 8
    assert abs(frames[4][:40, 62:] - enlarged[1, 4]).mean() < 8
    assert abs(frames[2][42:, :60] - enlarged[2, 2]).mean() < 8


def test_contact_sheet_has_a_row_per_video_and_a_column_per_frame() -> None:
    videos = smooth_videos(2, 3, 10, 12)
    sheet = contact_sheet(videos, scale=4)
    assert sheet.shape == (MARGIN + 2 * (40 + MARGIN), MARGIN + 3 * (48 + MARGIN), 3)
    for row, column in np.ndindex(2, 3):
        top, left = MARGIN + row * (40 + MARGIN), MARGIN + column * (48 + MARGIN)
        np.testing.assert_array_equal(sheet[top : top + 40, left : left + 48][1::4, 1::4], videos[row, column])
    captioned = contact_sheet(videos, ["Aa", "HorseRiding"], scale=4)
    gutter = captioned.shape[1] - sheet.shape[1]
    np.testing.assert_array_equal(captioned[:, gutter:], sheet)
    ink = [(captioned[rows, :gutter] < 128).any(axis=(0, 2)).nonzero()[0] for rows in (slice(0, 44), slice(44, 88))]
    assert 0 < ink[0].max() < ink[1].max() < gutter  # a caption in each row, the second one longer
    long = contact_sheet(smooth_videos(1, 40, 32, 32), max_frames=4)
    assert long.shape == (64 + 2 * MARGIN, MARGIN + 4 * (64 + MARGIN), 3)  # enlarged to 64 pixels
    blues = [int(long[MARGIN, MARGIN + i * (64 + MARGIN), 2]) for i in range(4)]
    assert blues == [(50 + 10 * f) % 256 for f in (0, 13, 26, 39)]  # first to last


def test_wrong_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"uint8 of shape \(F, H, W, 3\), not float32"):
        write_mp4(tmp_path / "a.mp4", np.zeros((2, 8, 8, 3), np.float32))
    refuses(r"\(n, F, H, W, 3\)", write_gif, tmp_path / "a.gif", np.zeros((2, 3, 8, 8), np.uint8))
    refuses("1 captions for 2 videos", contact_sheet, smooth_videos(2, 1, 8, 8), ["a"])
    assert not list(tmp_path.iterdir())


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    honest = Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("sync"))
    monkeypatch.setattr(Path, "replace", lambda self, target: calls.append("rename") or honest(self, target))
    write_lossless(tmp_path / "a.npy", smooth_videos(1, 2, 8, 8)[0])
    assert calls == ["sync", "rename"]
