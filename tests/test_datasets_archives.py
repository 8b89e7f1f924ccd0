"""Zip archives and sample arrays as clips: the same frames as from the folder, and sentences for the rest."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import struct
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import DataConfig, VideoError, build_catalog, build_dataset, open_video
from datasets.archives import MAX_ENTRIES
from datasets.catalog import ARRAYS, FRAMES, VIDEOS, Clip, find_clips
from sample.video_io import write_mp4


def pixels(seed: int, frames: int = 6, height: int = 16, width: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two videos, two folders of frames, two arrays, strays and hidden files."""
    root = tmp_path / "set"
    for number, name in enumerate(("a.mp4", "deep/er/b.mp4")):
        write_mp4(root / name, pixels(number))
    for number, name in enumerate(("deep/clip", "deep/clip-1")):
        (root / name).mkdir(parents=True)
        for frame, image in enumerate(pixels(number + 10)):
            Image.fromarray(image).save(root / name / f"{frame}.png")
    (root / "arrays").mkdir()
    for number in range(2):
        np.save(root / "arrays" / f"{number:06d}.npy", pixels(number + 20))
    (root / "arrays" / "labels.npy").write_bytes(b"stray")
    (root / "__MACOSX").mkdir()
    (root / "__MACOSX" / "a.mp4").write_bytes(b"x")
    (root / ".hidden.mp4").write_bytes(b"x")
    return root


def pack(folder: Path, file: Path, entries_of_folders: bool, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(file, "w", method) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() or entries_of_folders:
                archive.write(path, path.relative_to(folder))
    return file


def found(root: Path, *kinds: str) -> tuple[list[Clip], Counter[str]]:
    skipped: Counter[str] = Counter()
    clips = sorted(find_clips(root, kinds, lambda reason, _: skipped.update([reason])), key=lambda clip: clip.name)
    return clips, skipped


@pytest.mark.parametrize("entries_of_folders", [False, True])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_read_as_its_folder_is(folder: Path, tmp_path: Path, entries_of_folders: bool, method: int) -> None:
    archive = pack(folder, tmp_path / "set.zip", entries_of_folders, method)
    before = sorted(tmp_path.rglob("*"))
    plain, strays = found(folder, VIDEOS, FRAMES, ARRAYS)
    zipped, others = found(archive, VIDEOS, FRAMES, ARRAYS)
    assert [clip.name for clip in plain] == [
        *("a.mp4", "arrays/000000.npy", "arrays/000001.npy", "deep/clip", "deep/clip-1", "deep/er/b.mp4")
    ]
    assert [(c.name, c.size, c.num_frames) for c in zipped] == [(c.name, c.size, c.num_frames) for c in plain]
    assert strays["*.npy"] == others["*.npy"] == 1 and strays["hidden"] == others["hidden"] == 2
    for own, other in zip(plain, zipped):
        assert torch.equal(open_video(own.path).read([0, 5, 3]), open_video(other.path).read([0, 5, 3]))
    assert sorted(tmp_path.rglob("*")) == before  # nothing was unpacked


def test_the_memory_of_a_member_stays_its_own(tmp_path: Path) -> None:
    """Each array is compared after others have been opened, read and let go."""
    for number in range(12):
        (tmp_path / "set").mkdir(exist_ok=True)
        np.save(tmp_path / "set" / f"{number:06d}.npy", pixels(number, frames=16 + number))
    archive = pack(tmp_path / "set", tmp_path / "set.zip", False)
    opened = [open_video(archive / f"{number:06d}.npy") for number in range(12)]
    read = [reader.read(range(len(reader))) for reader in opened]
    for number, frames in enumerate(read):
        assert np.array_equal(frames.permute(0, 2, 3, 1), pixels(number, frames=16 + number))


def test_decord_reads_a_member(tmp_path: Path) -> None:
    levels = np.arange(20, 100, 2, dtype=np.uint8)
    write_mp4(tmp_path / "set" / "a.mp4", np.tile(levels[:, None, None, None], (1, 32, 64, 3)))
    archive = pack(tmp_path / "set", tmp_path / "set.zip", False)
    own, other = (open_video(root / "a.mp4", "decord") for root in (tmp_path / "set", archive))
    assert len(own) == len(other) == 40 and torch.equal(own.read([30, 3]), other.read([30, 3]))


def test_training_reads_a_zip_too(folder: Path, tmp_path: Path) -> None:
    archive = pack(folder, tmp_path / "set.zip", False)
    keys = {"num_frames": 4, "frame_interval": 1, "image_size": 16}
    plain = build_dataset(DataConfig(path=str(folder), **keys), seed=3)  # type: ignore[arg-type]
    zipped = build_dataset(DataConfig(path=str(archive), **keys), seed=3)  # type: ignore[arg-type]
    assert [clip.name for clip in plain.catalog.clips] == ["a.mp4", "deep/clip", "deep/clip-1", "deep/er/b.mp4"]
    assert zipped.digest == plain.digest
    for index in range(len(plain)):
        assert torch.equal(zipped[0, index]["video"], plain[0, index]["video"])


def read_first(path: str) -> bytes:
    return open_video(path).read([0]).numpy().tobytes()


def test_a_forked_process_opens_the_archive_anew(folder: Path, tmp_path: Path) -> None:
    """Forked workers that shared one open file would share the place in it."""
    archive = pack(folder, tmp_path / "set.zip", False)
    paths = [clip.path for clip in found(archive, ARRAYS, FRAMES)[0]] * 20
    expected = [read_first(path) for path in paths]  # the archive is open here when the workers begin
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(read_first, paths, chunksize=1) == expected


def test_a_replaced_archive_is_read_anew(folder: Path, tmp_path: Path) -> None:
    archive = pack(folder, tmp_path / "set.zip", False)
    clip = archive / "arrays" / "000000.npy"
    assert torch.equal(open_video(clip).read([0])[0].permute(1, 2, 0), torch.from_numpy(pixels(20)[0]))
    np.save(folder / "arrays" / "000000.npy", pixels(77))
    pack(folder, archive, False)
    assert torch.equal(open_video(clip).read([0])[0].permute(1, 2, 0), torch.from_numpy(pixels(77)[0]))


def test_a_missing_member_and_a_damaged_one_are_named(folder: Path, tmp_path: Path) -> None:
    archive = pack(folder, tmp_path / "set.zip", False, zipfile.ZIP_STORED)
    with pytest.raises(VideoError, match=r"set\.zip/gone\.mp4: is not in the archive"):
        open_video(archive / "gone.mp4")
    raw = bytearray(archive.read_bytes())
    place = raw.index(pixels(20)[2].tobytes())
    raw[place] ^= 1
    archive.write_bytes(bytes(raw))
    with pytest.raises(VideoError, match=r"000000\.npy: cannot be unpacked: the archive is damaged"):
        open_video(archive / "arrays" / "000000.npy")
    assert len(open_video(archive / "arrays" / "000001.npy")) == 6


@pytest.mark.parametrize("content", [b"", b"PK", b"no archive", b"PK\5\6" + bytes(18), b"PK\5\6" + b"\xff" * 18])
def test_what_is_no_archive_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "set.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"set\.zip|holds none"):
        build_catalog(DataConfig(path=str(tmp_path / "set.zip")))


def test_a_folder_may_be_called_zip(tmp_path: Path) -> None:
    write_mp4(tmp_path / "set.zip" / "a.mp4", pixels(0))
    assert [clip.name for clip in build_catalog(DataConfig(path=str(tmp_path / "set.zip"))).clips] == ["a.mp4"]


def test_too_many_entries_are_counted_before_they_are_parsed(tmp_path: Path) -> None:
    """The end record states one entry only."""
    entry = b"PK\1\2" + bytes(24) + struct.pack("<H", 1) + bytes(16) + b"a"
    directory = entry * MAX_ENTRIES
    end = b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 1, 1, len(directory), 0, 0)
    (tmp_path / "set.zip").write_bytes(directory + end)
    with pytest.raises(VideoError, match="holds 1000000 entries; fewer than 1000000 are read"):
        build_catalog(DataConfig(path=str(tmp_path / "set.zip")))


# ------------------------------------------------------------------------------------------------ arrays


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
    pack_one = tmp_path / "set.zip"
    with zipfile.ZipFile(pack_one, "w") as archive:
        archive.write(tmp_path / "000000.npy", "000000.npy")
    for path in (tmp_path / "000000.npy", pack_one / "000000.npy"):
        with pytest.raises(VideoError, match="holds values of type object"):
            open_video(path)
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


def test_arrays_in_a_training_folder_are_strays(folder: Path) -> None:
    catalog = build_catalog(DataConfig(path=str(folder), num_frames=2))
    assert not [clip for clip in catalog.clips if clip.name.endswith(".npy")]
    assert catalog.skipped["*.npy"] == 3
    shutil.rmtree(folder)
