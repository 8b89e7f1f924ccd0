"""Sample arrays as clips: their frames, and sentences for the rest."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets import DataConfig, VideoError, build_catalog, open_video
from sample.video_io import write_mp4


def pixels(seed: int, frames: int = 6, height: int = 16, width: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def test_an_array_gives_its_frames_and_is_not_read_whole(tmp_path: Path) -> None:
    video = pixels(1, frames=9)
    np.save(tmp_path / "000000.npy", video)
    reader = open_video(tmp_path / "000000.npy")
    assert (len(reader), reader.fps, reader.damage, reader.cut_off) == (9, 0.0, None, None)
    frames = reader.read([8, 0, 0])
    assert frames.dtype == torch.uint8
    assert np.array_equal(frames.permute(0, 2, 3, 1).numpy(), video[[8, 0, 0]])
    assert isinstance(reader.array, np.memmap)  # type: ignore[attr-defined]
    np.save(tmp_path / "000001.npy", np.asfortranarray(video))
    assert torch.equal(open_video(tmp_path / "000001.npy").read([8, 0, 0]), frames)
    with pytest.raises(IndexError):
        reader.read([9])


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), "holds values of type float32; a clip is uint8"),
        (np.zeros((2, 4, 4, 3), np.int8), "holds values of type int8"),
        (np.zeros((4, 4, 3), np.uint8), r"holds an array of shape \(4, 4, 3\); a clip is \(frames, height"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"shape \(2, 3, 4, 4\)"),
        (np.zeros((0, 4, 4, 3), np.uint8), r"shape \(0, 4, 4, 3\)"),
        (np.zeros((1, 8193, 4321, 3), np.uint8), "frames of 4321x8193 are larger than data.max_pixels"),
    ],
)
def test_arrays_that_are_no_clips_are_named(tmp_path: Path, array: np.ndarray, reason: str) -> None:
    np.save(tmp_path / "000000.npy", array)
    with pytest.raises(VideoError, match=reason):
        open_video(tmp_path / "000000.npy")


def test_an_array_of_objects_is_never_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    np.save(tmp_path / "000000.npy", np.array([Payload(marker)], dtype=object))
    with pytest.raises(VideoError, match="holds values of type object"):
        open_video(tmp_path / "000000.npy")
    assert not marker.exists()
    assert b"mkdir" in (tmp_path / "000000.npy").read_bytes()  # the payload is there


def test_cut_off_and_strange_arrays_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "whole.npy", pixels(0))
    whole = (tmp_path / "whole.npy").read_bytes()
    header = b"\x93NUMPY\1\0" + struct.pack("<H", 118)
    claim = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 4000, 4000, 3), }".ljust(117) + b"\n"
    for name, content, reason in (
        ("cut", whole[:-1], "is cut off or too long: 6911 of 6912 bytes"),
        ("long", whole + b"x", "is cut off or too long"),
        ("head", whole[:20], r"is not a readable \.npy array"),
        ("empty", b"", r"is not a readable \.npy array"),
        ("text", b"not an array", r"is not a readable \.npy array"),
        ("version", b"\x93NUMPY\3\0" + whole[8:], r"is not a readable \.npy array"),
        ("claim", header + claim, "is cut off or too long: 0 of 48000000000000 bytes"),
    ):
        (tmp_path / f"{name}.npy").write_bytes(content)
        with pytest.raises(VideoError, match=reason):
            open_video(tmp_path / f"{name}.npy")


def test_arrays_in_a_training_folder_are_strays(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", pixels(0))
    np.save(tmp_path / "000000.npy", pixels(1))
    catalog = build_catalog(DataConfig(path=str(tmp_path), num_frames=2))
    assert [clip.name for clip in catalog.clips] == ["a.mp4"] and catalog.skipped["*.npy"] == 1
