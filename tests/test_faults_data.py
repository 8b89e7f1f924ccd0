"""Faults E1 to E13: broken, short, huge, changing and oddly named clips, and sets that do not fit the run.

One tiny clip of 24 frames, frame i of grey level 20 + 8 i, is encoded once; what is broken is made from its bytes.
Caches of latents (E13) are made from the tiny set of conftest.py.
"""

import contextlib
import errno
import io
import json
import os
import random
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from datasets import ClipDataset, DataConfig, VideoError, build_catalog, build_dataset, clips, open_video
from datasets.clips import MAX_ATTEMPTS
from datasets.readers import pyav
from demo.data import write_mp4
from engine.checkpoint import list_checkpoints, load_checkpoint
from engine.config import load_config
from engine.distributed import World
from engine.stream import Breadcrumbs, ClipStream, load_micro_batches, position_batches
from tests.conftest import TINY
from tests.fault_support import Job, little_memory, make, restore, rows, run
from tests.latent_support import cache, save_codec
from tools import prepare_dataset

LENGTH = 24
Bytes = dict[str, bytes]


def grey(count: int, size: int = 32) -> np.ndarray:
    """uint8 (T, 3, size, size), frame i of level 20 + 8 i."""
    levels = 20 + 8 * np.arange(count, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, 3, size, size))


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Bytes:
    """The bytes of the clip, by container."""
    folder = tmp_path_factory.mktemp("clip")
    for kind in ("mp4", "mkv", "avi", "ts"):
        write_mp4(folder / f"clip.{kind}", grey(LENGTH))
    return {file.suffix[1:]: file.read_bytes() for file in folder.iterdir()}


def levels(frames: torch.Tensor) -> list[int]:
    """The number of each frame, read from its pixels."""
    return ((frames.float().mean((1, 2, 3)) - 20) / 8).round().int().tolist()


def dataset(path: Path, seed: int = 3, **keys: object) -> ClipDataset:
    settings = {"num_frames": 4, "frame_interval": 2, "image_size": 8, **keys}
    return build_dataset(DataConfig(path=str(path), **settings), seed=seed)  # type: ignore[arg-type]


def shown(sample: Any) -> list[int]:
    return levels((sample["video"] + 1) / 2 * 255)


def make_set(root: Path, clip: Bytes, good: int = 4, bad: int = 0) -> Path:
    """good0.mp4 ... and zbad0.mp4 ..., the latter text."""
    root.mkdir(exist_ok=True)
    for number in range(good):
        (root / f"good{number}.mp4").write_bytes(clip["mp4"])
    for number in range(bad):
        (root / f"zbad{number}.mp4").write_text("this is not a video " * 20)
    return root


def patched(data: bytes, box: bytes, offset: int, value: int | bytes) -> bytes:
    """`data` with a 32-bit number (or bytes) written `offset` bytes behind the name `box`."""
    place = data.index(box) + len(box) + offset
    new = value if isinstance(value, bytes) else struct.pack(">I", value)
    return data[:place] + new + data[place + len(new) :]


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "no_moov": (lambda data: data[: len(data) // 3], "cannot be read as mov: incomplete or damaged"),
    "text": (lambda data: b"just text " * 50, "is not a video: its first bytes belong to no video container"),
    "flipped_codec": (lambda data: data.replace(b"avc1\0", b"avq1\0"), "its video codec is unknown"),
    "flipped_in_the_middle": (
        lambda data: data[: data.index(b"moov") - 400] + bytes(200) + data[data.index(b"moov") - 200 :],
        "packets cannot be decoded|none of its frames",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_E1_broken_clip_is_skipped_with_a_warning(clip: Bytes, tmp_path: Path, kind: str, caplog: Any) -> None:
    damage, reason = BROKEN[kind]
    (make_set(tmp_path, clip) / "zbroken.mp4").write_bytes(damage(clip["mp4"]))
    data = dataset(tmp_path)
    samples = [data[epoch, 4] for epoch in range(3)]
    assert all(sample["index"] < 4 and np.diff(shown(sample)).tolist() == [2, 2, 2] for sample in samples)
    assert list(data.skipped) == [str(tmp_path / "zbroken.mp4")]
    (message,) = caplog.messages  # once, though met three times
    assert "zbroken.mp4" in message and any(part in message for part in reason.split("|"))
    with pytest.raises(VideoError, match=rf"zbroken\.mp4: .*({reason})"):
        dataset(tmp_path, strict=True)[0, 4]


def test_E1_strict_ends_the_run_from_a_worker_with_the_sentence(clip: Bytes, tmp_path: Path) -> None:
    """torch alone would turn the error into the text of a traceback, and the run's end into a worker's death."""
    data = dataset(make_set(tmp_path, clip, good=1, bad=1), strict=True)
    positions = position_batches(0, batch_size=2, rank=0, world_size=1)
    batches = load_micro_batches(ClipStream(data, 0), positions, num_workers=1, pin_memory=False, timeout_s=60)
    with pytest.raises(VideoError) as caught:
        next(batches)
    assert str(caught.value).startswith(f"{tmp_path / 'zbad0.mp4'}: is not a video")


def test_E1_no_flipped_bit_raises_anything_but_VideoError(clip: Bytes, tmp_path: Path) -> None:
    """Headers, tags, names, tables, pictures: one bit each, at 200 places. Nothing is read without a count."""
    draw = random.Random(0)
    path, outcomes = tmp_path / "clip.mp4", {"read": 0, "refused": 0, "damaged": 0}
    data = clip["mp4"]
    tags = [data.index(tag) + 1 for tag in (b"isom", b"avc1\0", b"VideoHandler", b"Lavf")]  # each was a crash once
    for number, place in enumerate([*tags, *draw.sample(range(len(data)), 200)]):
        path.write_bytes(data[:place] + bytes([data[place] ^ (0x80 if place in tags else 1)]) + data[place + 1 :])
        os.utime(path, ns=(number, number))
        try:
            reader = open_video(path)
            frames = reader.read(range(len(reader)))
        except VideoError as error:
            assert error.path == str(path)
            outcomes["refused"] += 1
            continue
        assert frames.shape == (len(reader), 3, 32, 32)
        outcomes["damaged" if reader.damage or reader.cut_off else "read"] += 1
    assert min(outcomes.values()) > 5, outcomes


@pytest.mark.parametrize(("kind", "share"), [("mkv", 0.6), ("mkv", 0.95), ("ts", 0.8)])
def test_E2_missing_tail_is_seen_and_never_filled_up(clip: Bytes, tmp_path: Path, kind: str, share: float) -> None:
    """Frames that are there are the true ones, in order; there are fewer of them; none stands in for another."""
    path = tmp_path / f"cut.{kind}"
    path.write_bytes(clip[kind][: int(share * len(clip[kind]))])
    reader = open_video(path)
    found = len(reader)
    assert 1 < found < LENGTH
    assert levels(reader.read(range(found))) == list(range(found))
    assert kind == "ts" or (reader.cut_off and "the file is cut off" in reader.cut_off)  # TS promises no length
    with pytest.raises(IndexError, match=f"do not fit a clip of {found} frames"):
        reader.read(range(LENGTH))


def test_E2_what_is_missing_when_it_is_read_is_not_filled_up(clip: Bytes, tmp_path: Path) -> None:
    """Opened whole, cut before it is read: the last key frame's group cannot be had."""
    path = tmp_path / "a.mkv"
    path.write_bytes(clip["mkv"])
    reader = open_video(path)
    path.write_bytes(clip["mkv"][: int(0.8 * len(clip["mkv"]))])
    assert levels(reader.read([1, 2])) == [1, 2]
    with pytest.raises(VideoError, match=r"a\.mkv: frame \d+ of 24 cannot be decoded"):
        reader.read(range(LENGTH))


def test_E2_cut_off_clip_follows_the_policy(clip: Bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Too short for a window: skipped, though short clips are looped. Long enough: used and named. Strict: raised."""
    make_set(tmp_path, clip, good=3)
    (tmp_path / "zcut.mkv").write_bytes(clip["mkv"][: int(0.8 * len(clip["mkv"]))])
    for policy in ("skip", "loop"):
        data = dataset(tmp_path, num_frames=11, short_clips=policy)
        assert data[0, 3]["index"] != 3
        assert "a window needs 21" in data.skipped[str(tmp_path / "zcut.mkv")]
    fits = dataset(tmp_path, num_frames=3)
    assert fits[0, 3]["index"] == 3 and np.diff(shown(fits[0, 3])).tolist() == [2, 2]
    assert list(fits.cut_off) == [str(tmp_path / "zcut.mkv")]
    assert sum("the file is cut off" in message and "zcut.mkv" in message for message in caplog.messages) == 3
    with pytest.raises(VideoError, match=r"zcut\.mkv: the file is cut off"):
        dataset(tmp_path, num_frames=3, strict=True)[0, 3]


def test_E2_decord_does_not_fill_up_either(clip: Bytes, tmp_path: Path) -> None:
    """By default decord returns copies of the nearest frame for those that it cannot decode."""
    pytest.importorskip("decord")
    path = tmp_path / "broken.mp4"
    path.write_bytes(BROKEN["flipped_in_the_middle"][0](clip["mp4"]))
    reader = open_video(path, "decord")
    with pytest.raises(VideoError, match="decord cannot read"):
        reader.read(range(len(reader)))


def short_set(root: Path, clip: Bytes, length: int, folder: bool) -> Path:
    """Three good clips and, last, one of `length` frames: a video, or a folder of images."""
    make_set(root, clip, good=3)
    if folder:
        (root / "zshort").mkdir()
        for number, image in enumerate(grey(length)):
            Image.fromarray(image.transpose(1, 2, 0).copy()).save(root / "zshort" / f"{number}.png")
    else:
        write_mp4(root / "zshort.mp4", grey(length))
    return root


@pytest.mark.parametrize("folder", [False, True], ids=["video", "frames"])
@pytest.mark.parametrize("length", [1, 5])
def test_E3_short_clip_is_skipped_or_looped_and_counted(clip: Bytes, tmp_path: Path, length: int, folder: bool) -> None:
    data = dataset(short_set(tmp_path, clip, length, folder))
    reason = f"has {length} frames, a window needs 7"
    if folder:  # its length is known before it is opened
        assert len(data) == 3 and data.catalog.skipped == {"fewer than 7 frames": 1}
    else:
        assert data[0, 3]["index"] != 3
        assert data.skipped == {str(tmp_path / "zshort.mp4"): reason}
        with pytest.raises(VideoError, match=rf"zshort\.mp4: {reason}"):
            dataset(tmp_path, strict=True)[0, 3]
    looped = dataset(tmp_path, short_clips="loop", strict=True)
    windows = [shown(looped[epoch, 3]) for epoch in range(40)]
    assert {window[0] for window in windows} == set(range(length))  # any frame begins one
    assert all(window == [(window[0] + step) % length for step in (0, 2, 4, 6)] for window in windows)
    assert list(looped.looped.values()) == [reason] and not looped.skipped
    assert torch.equal(looped[1, 0]["video"], data[1, 0]["video"])  # a long one is unchanged


def visit(root: Path, positions: list[int]) -> dict[int, tuple[int, bool, bytes]]:
    """(index, replaced, pixels) at each position, by a data set that has seen nothing before."""
    stream = ClipStream(dataset(root, num_images=1, max_unusable=1.0), seed=7)
    items: dict[int, Any] = {position: stream[position] for position in positions}
    return {at: (item["index"], item["replaced"], item["video"].numpy().tobytes()) for at, item in items.items()}


def test_E4_replacements_do_not_depend_on_resume_or_world(clip: Bytes, tmp_path: Path) -> None:
    root = make_set(tmp_path, clip, good=3, bad=2)
    whole = visit(root, list(range(20)))
    assert sum(replaced for _, replaced, _ in whole.values()) == 8  # 2 of 5 clips, over four epochs
    assert {index for index, replaced, _ in whole.values() if replaced} == {0, 1, 2}
    assert visit(root, list(range(11, 20))) == {at: whole[at] for at in range(11, 20)}  # resumed in mid-epoch
    for world in (2, 4):  # as many ranks, each with its own share and memory
        batches = [position_batches(0, batch_size=1, rank=rank, world_size=world) for rank in range(world)]
        shares = [visit(root, [at for (at,) in islice(rank, 20 // world)]) for rank in batches]
        assert {at: item for share in shares for at, item in share.items()} == whole
    assert visit(root, list(reversed(range(20)))) == whole  # in any order: any worker


def test_E4_the_log_counts_replaced_clips(clip: Bytes, tmp_path: Path, tiny: list[str]) -> None:
    """As a share of the samples, equal for any number of workers: 2 of 4 clips, a whole epoch a step."""
    root = make_set(tmp_path / "set", clip, good=2, bad=2)
    keys = [f"data.path={root}", "model.num_classes=0", "train.batch_size=4", "train.max_steps=1"]
    run([*tiny, *keys])
    assert rows(tmp_path / "run")[0]["replaced_share"] == 0.5


def test_E5_all_bad_ends_with_the_list(clip: Bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the share, or, where any share is allowed, after MAX_ATTEMPTS in a row; never by trying for ever."""
    root = make_set(tmp_path, clip, good=0, bad=3)
    opened: list[object] = []
    honest = clips.open_video
    monkeypatch.setattr(clips, "open_video", lambda *arguments: (opened.append(arguments[0]), honest(*arguments))[1])
    with pytest.raises(VideoError, match=r"2 of 3 clips cannot be used, more than data\.max_unusable=0\.5.*zbad\d"):
        dataset(root)[0, 0]
    del opened[:]
    with pytest.raises(VideoError, match=f"{MAX_ATTEMPTS} clips in a row cannot be used") as caught:
        dataset(root, max_unusable=1.0)[0, 0]
    assert len(opened) == MAX_ATTEMPTS
    assert all(str(caught.value).count(f"zbad{number}.mp4: is not a video") == 1 for number in range(3))


@pytest.mark.parametrize(("limit", "fits"), [(0.0, 0), (0.25, 3), (0.5, 6), (0.6, 7)])
def test_E5_more_than_the_share_ends_the_run(clip: Bytes, tmp_path: Path, limit: float, fits: int) -> None:
    """`fits` of 12 clips may be bad, in whatever order one data set (a loader worker) meets them."""
    for bad in (fits, fits + 1):
        root = make_set(tmp_path / str(bad), clip, good=12 - bad, bad=bad)
        for order in (range(12), reversed(range(12))):
            data = dataset(root, max_unusable=limit)
            if bad <= fits:
                assert [data[0, index]["video"].shape[0] for index in order] == [4] * 12
                continue
            with pytest.raises(VideoError, match=rf"{bad} of 12 clips cannot be used, more than data\.max_unusable"):
                for index in order:
                    data[0, index]


def test_E5_the_run_ends_with_the_sentence(clip: Bytes, tmp_path: Path, tiny: list[str]) -> None:
    root = make_set(tmp_path / "set", clip, good=1, bad=3)
    keys = [f"data.path={root}", "model.num_classes=0", "train.max_steps=4"]
    with pytest.raises(VideoError, match=r"3 of 4 clips cannot be used, more than data\.max_unusable=0\.5"):
        run([*tiny, *keys])
    assert "3 of 4 clips" in (tmp_path / "run" / "errors" / "rank0.json").read_text()


def encode(path: Path, frames: list[np.ndarray], pts: list[int] | None = None, **options: str) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.options = "yuv420p", {"preset": "ultrafast", **options}
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = pts[number] if pts else number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One frame of 4096x2048."""
    return encode(tmp_path_factory.mktemp("large") / "large.mp4", [np.full((2048, 4096, 3), 90, np.uint8)])


@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_E6_large_frames_are_refused_before_decoding(large: Path, reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(open_video(large, reader)) == 1  # within the default, which the largest cameras keep
    pyav._index_frames.cache_clear()

    for decoder in ("datasets.readers.pyav._decode_packets", "decord.VideoReader"):
        monkeypatch.setattr(decoder, lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(VideoError, match=r"its frames of 4096x2048 are larger than data\.max_pixels=2073600"):
        open_video(large, reader, max_pixels=1920 * 1080)


def test_E6_the_limit_is_the_pictures_not_the_decoders(tmp_path: Path) -> None:
    """24x24 is coded as 32x32: it fits 576 pixels, and no fewer."""
    path = encode(tmp_path / "a.mp4", [np.full((24, 24, 3), 90, np.uint8)] * 3)
    assert open_video(path, max_pixels=576).read([0]).shape == (1, 3, 24, 24)
    with pytest.raises(VideoError, match="24x24"):
        open_video(path, max_pixels=575)


def test_E6_frames_that_grow_in_mid_stream_are_not_decoded(tmp_path: Path) -> None:
    """Eight seconds of 32x32, more than anybody probes, then 512x512."""
    small, large = ([np.full((size, size, 3), 90, np.uint8)] * count for size, count in ((32, 80), (512, 4)))
    parts = [encode(tmp_path / f"{len(frames)}.ts", frames) for frames in (small, large)]
    (tmp_path / "grows.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    reader = open_video(tmp_path / "grows.ts", max_pixels=32 * 32)
    assert len(reader) == 80 and reader.damage
    assert reader.read(range(4)).shape[-2:] == (32, 32)


def test_E6_an_image_whose_header_claims_too_much(tmp_path: Path) -> None:
    """A PNG of some hundred bytes that claims 8000 x 5000 pixels, in a folder of frames."""
    folder = tmp_path / "clip"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    data = (folder / "0.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 8000, 5000) + data[24:29]
    (folder / "0.png").write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])
    with pytest.raises(VideoError, match=r"0\.png: its frames of 8000x5000 are larger than data\.max_pixels=35389440"):
        open_video(folder).read([0])


def test_E6_the_key_reaches_the_reader(large: Path, clip: Bytes, tmp_path: Path) -> None:
    make_set(tmp_path, clip, good=3)
    (tmp_path / "zlarge.mp4").symlink_to(large)
    data = dataset(tmp_path, max_pixels=1920 * 1080)
    assert data[0, 3]["index"] != 3
    assert "4096x2048" in data.skipped[str(tmp_path / "zlarge.mp4")]


def read_all(path: Path) -> list[int]:
    """The number of each frame, read with at most 256 MiB."""
    with little_memory(2**28):
        reader = open_video(path)
        return levels(reader.read(range(len(reader))))


def avi_claims(data: bytes, count: int) -> bytes:
    """An AVI whose two headers state `count` frames."""
    for box, offset in ((b"avih", 20), (b"strh", 36)):
        data = patched(data, box, offset, struct.pack("<I", count))
    return data


def mp4_claims(data: bytes, count: int) -> bytes:
    """An MP4 whose tables state `count` samples of one byte, in one chunk."""
    for box, offset, value in ((b"stsz", 4, 1), (b"stsz", 8, count), (b"stsc", 12, count), (b"stts", 8, count)):
        data = patched(data, box, offset, value)
    return data


def test_E7_a_header_that_claims_ten_million_frames(clip: Bytes, tmp_path: Path) -> None:
    """It changes nothing if the frames can be found without it, else the file is refused."""
    (tmp_path / "a.avi").write_bytes(avi_claims(clip["avi"], 10**7))
    assert read_all(tmp_path / "a.avi") == list(range(LENGTH))
    (tmp_path / "a.mp4").write_bytes(mp4_claims(clip["mp4"], 10**7))
    with pytest.raises(VideoError, match=r"a\.mp4: "):
        read_all(tmp_path / "a.mp4")


def test_E7_more_frames_than_any_clip_has_are_refused(
    clip: Bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the header states (mp4), and by counting where it states nothing (mkv)."""
    monkeypatch.setattr(pyav, "MAX_FRAMES", 20)
    for kind in ("mp4", "mkv"):
        (tmp_path / f"a.{kind}").write_bytes(clip[kind])
        with pytest.raises(VideoError, match=r"states more frames \(2[14]\) than a clip may have \(20\)"):
            open_video(tmp_path / f"a.{kind}")


TIMELESS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "0_fps": ("mp4", lambda data: patched(patched(data, b"stts", 12, 0), b"ctts", 0, 0)),
    "huge_time_scale": ("mp4", lambda data: patched(data, b"mdhd", 12, 2**31 - 1)),
    "nan_duration": ("mkv", lambda data: patched(data, b"\x44\x89\x88", 0, struct.pack(">d", float("nan")))),
    "no_pts": ("avi", lambda data: data),
}


@pytest.mark.parametrize("name", TIMELESS)
def test_E7_frames_are_counted_not_timed(clip: Bytes, tmp_path: Path, name: str) -> None:
    kind, spoil = TIMELESS[name]
    path = tmp_path / f"a.{kind}"
    path.write_bytes(spoil(clip[kind]))
    reader = open_video(path)
    assert np.isfinite(reader.fps) and len(reader) == LENGTH
    assert levels(reader.read([20, 3, 4, 23])) == [20, 3, 4, 23]


def test_E7_variable_frame_rate(tmp_path: Path) -> None:
    pts = [0, 1, 2, 50, 51, 400, 401, 402, 403, 1000]
    frames = list(grey(10).transpose(0, 2, 3, 1))
    assert levels(open_video(encode(tmp_path / "a.mkv", frames, pts, qp="0")).read(range(10))) == list(range(10))


def test_E7_rotation_is_applied(tmp_path: Path) -> None:
    """A display matrix of a quarter turn, patched into the header: the picture is turned, not stretched."""
    image = np.zeros((32, 48, 3), np.uint8)
    image[:16, :24] = 200
    plain = encode(tmp_path / "plain.mp4", [image] * 3)
    turn = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(patched(plain.read_bytes(), b"tkhd", 40, turn))
    upright, turned = (open_video(file).read([1]) for file in (plain, tmp_path / "turned.mp4"))
    assert turned.shape == (1, 3, 48, 32)
    assert torch.equal(turned, torch.rot90(upright, k=-1, dims=(-2, -1)))


def shuffled(path: Any = ".", scan: Callable[..., Any] = os.scandir) -> Any:
    """os.scandir in an order of its own."""
    entries = list(scan(path))
    random.Random(str(path)).shuffle(entries)
    return contextlib.nullcontext(iter(entries))


def test_E8_directory_order_changes_nothing(
    frame_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it choose the name of a folder that several links lead to."""
    for name in "abcdef":
        (tmp_path / name).symlink_to(frame_folders / "falls" / "clip0")
    (linked,) = dataset(tmp_path).catalog.clips
    plain = dataset(frame_folders)
    samples = [plain[1, index]["video"] for index in range(6)]
    names = sorted(f"{label}/clip{number}" for label in ("falls", "rises") for number in range(3))
    listdir = os.listdir
    monkeypatch.setattr(os, "scandir", shuffled)
    monkeypatch.setattr(os, "listdir", lambda path=".": random.Random(0).sample(listdir(path), len(listdir(path))))
    other = dataset(frame_folders)
    assert [clip.name for clip in other.catalog.clips] == [clip.name for clip in plain.catalog.clips] == names
    assert other.digest == plain.digest
    assert all(torch.equal(other[1, index]["video"], sample) for index, sample in enumerate(samples))
    assert dataset(tmp_path).catalog.clips == [linked]


def copied(source: Path, target: Path) -> Path:
    """A copy of a tree, by links to its files."""
    for file in source.rglob("*.png"):
        (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        (target / file.relative_to(source)).symlink_to(file)
    return target


def test_E8_the_list_is_in_the_checkpoint(frame_folders: Path, tiny: list[str], tmp_path: Path) -> None:
    """Another frame, another clip: refused on resume. The same files elsewhere: continued."""
    first, second = copied(frame_folders, tmp_path / "first"), copied(frame_folders, tmp_path / "second")
    run([*tiny, f"data.path={first}", "train.max_steps=1"])
    (folder,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    digest = build_catalog(load_config(None, [*tiny, f"data.path={first}"]).data).digest
    assert load_checkpoint(folder).state["data_digest"] == digest
    moved = [*tiny, f"data.path={second}", "train.max_steps=2"]
    restore(make(moved))
    (second / "falls" / "clip0" / "007.png").symlink_to(frame_folders / "falls" / "clip0" / "006.png")
    with pytest.raises(ValueError, match=f"data_digest: {digest} -> "):
        restore(make(moved))


def test_E8_the_frame_list_is_part_of_it(frame_folders: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("falls/clip0/000.png\nrises/clip1/003.png\n")
    keys = {"num_images": 1, "frame_list": str(tmp_path / "list.txt")}
    digest = dataset(frame_folders, **keys).digest
    assert digest == dataset(frame_folders, **keys).digest != dataset(frame_folders).digest
    (tmp_path / "list.txt").write_text("falls/clip0/001.png\nrises/clip1/003.png\n")
    assert dataset(frame_folders, **keys).digest != digest


def _swap_for_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "deleted": (Path.unlink, "cannot be opened (FileNotFoundError)"),
    "replaced": (lambda path: write_mp4(path, grey(12)), "changed after the run started"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-200]), "cannot be read as mov: incomplete or damaged"),
    "a_folder": (_swap_for_folder, "the folder holds no images"),
    "a_loop_of_links": (lambda path: (path.unlink(), path.symlink_to(path)), "cannot be opened (OSError)"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_E9_a_clip_that_changes_is_replaced_or_named(clip: Bytes, tmp_path: Path, name: str) -> None:
    change, reason = CHANGES[name]
    data = dataset(make_set(tmp_path, clip))
    path = tmp_path / "good2.mp4"
    assert data[0, 2]["index"] == 2
    change(path)
    assert data[1, 2]["index"] != 2
    assert list(data.skipped) == [str(path)] and reason in data.skipped[str(path)]
    with pytest.raises(VideoError, match=r"good2\.mp4: ") as caught:
        ClipDataset(replace(data.config, strict=True), data.catalog, 0)[0, 2]
    assert caught.value.path == str(path)


class FailingDisk(io.FileIO):
    """Reads well at first, then not at all."""

    good = 6

    def read(self, size: int = -1) -> bytes:  # type: ignore[override]
        FailingDisk.good -= 1
        if FailingDisk.good < 0:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(size)


def test_E9_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), dtype=np.uint8)
    path = encode(tmp_path / "a.mkv", list(noise), crf="1", g="8")  # large enough for several reads
    monkeypatch.setattr(Path, "open", lambda self, *_: FailingDisk(self))
    with pytest.raises(VideoError, match=r"a\.mkv: cannot be read to its end \(OSError\)"):
        open_video(path)


def test_E9_a_place_that_cannot_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale network handle makes even `is it a folder` fail."""

    def stale(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "stat", stale)
    with pytest.raises(VideoError, match=r"a\.mp4: cannot be opened \(OSError\)"):
        open_video(tmp_path / "a.mp4")


@pytest.mark.parametrize("change", ["goes_away", "breaks"])
def test_E9_a_frame_that_changes(frame_folders: Path, tmp_path: Path, change: str) -> None:
    """However many frames of a folder are at fault, it counts as one clip."""
    clip = copied(frame_folders, tmp_path / "set") / "falls" / "clip0"
    data = dataset(tmp_path / "set")
    reason = "changed after the run started: 7 frames then, 6 now"
    if change == "goes_away":
        (clip / "003.png").unlink()
    else:
        reason = "is not a readable image"
        for frame in clip.iterdir():
            frame.unlink()  # a link to a file of another test's set
            frame.write_bytes(b"no image")
    assert all(data[epoch, 0]["index"] != 0 for epoch in range(4))
    assert list(data.skipped) == [str(clip)] and reason in data.skipped[str(clip)]


NAMES = ["with some  spaces .mp4", "ünï-視頻 🎬.mp4", "x" * 251 + ".mp4", "-rf.mp4", "UPPER.MP4", "100%s {0}.mp4"]
NAMES += ["line\nbreak\x1b[31m.mp4", os.fsdecode(b"not-utf8-\xff\xfe.mp4")]


@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_E10_odd_names_are_read(clip: Bytes, tmp_path: Path, reader: str) -> None:
    root = tmp_path / "-a set\u202f with é"
    root.mkdir()
    for name in NAMES:
        (root / name).write_bytes(clip["mp4"])
    data = dataset(root, reader=reader)
    assert [c.name for c in data.catalog.clips] == sorted(NAMES) and len(data.digest) == 64
    readable = [index for index, name in enumerate(sorted(NAMES)) if reader == "pyav" or name.isprintable()]
    assert [data[0, index]["index"] for index in readable] == readable
    assert set(data.skipped) <= {str(root / name) for name in NAMES if not name.isprintable()}


def test_E10_odd_names_in_warnings_and_breadcrumbs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A warning is one line of plain text; the breadcrumb of a dead worker is the very path."""
    crumbs = Breadcrumbs(tmp_path / "run", 0)
    for number, name in enumerate(NAMES):
        path = tmp_path / str(number) / name
        path.parent.mkdir()
        path.touch()
        with pytest.raises(VideoError):
            dataset(path.parent)[0, 0]
        assert not any(ord(character) < 32 for character in caplog.messages[-1])
        caplog.messages[-1].encode()
        crumbs(str(path))
        assert crumbs.read() == [str(path)]
    assert len(caplog.messages) == len(NAMES)
    crumbs.clear()


@pytest.mark.parametrize(
    ("keys", "world", "sentence"),
    [
        (["train.batch_size=7"], World(), "has 6 clips, fewer than the global batch of 7 "),
        (["train.grad_accum_steps=4"], World(), "has 6 clips, fewer than the global batch of 8 "),
        (["train.batch_size=2"], World(rank=1, size=4), "has 6 clips, fewer than the global batch of 8 "),
        (["data.max_clips=1"], World(), "has 1 clips, fewer than the global batch of 2 "),
        (["train.batch_size=3", "train.grad_accum_steps=2"], World(), ""),  # exactly the global batch is enough
    ],
)
def test_E11_a_set_that_is_too_small(tiny: list[str], keys: list[str], world: World, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) if sentence else contextlib.nullcontext():
        make([*tiny, *keys], world)


def test_E12_a_label_out_of_range_names_file_and_class(tiny: list[str], frame_folders: Path) -> None:
    clip = frame_folders / "rises" / "clip0"
    with pytest.raises(
        ValueError, match=rf"{clip} is of class 'rises', label 1, but model\.num_classes=1 allows 0 to 0"
    ):
        make([*tiny, "model.num_classes=1"])


def test_E12_a_class_that_comes_later_is_named(frame_folders: Path, tiny: list[str], tmp_path: Path) -> None:
    """On resume it would move the labels of all classes after it; accepting other files does not accept that."""
    root = copied(frame_folders, tmp_path / "set")
    keys = [*tiny, f"data.path={root}", "model.num_classes=3", "train.max_steps=1"]
    run(keys)
    copied(frame_folders / "falls", root / "bounces")
    for override in ([], ["data_digest"]):
        with pytest.raises(ValueError, match=r"class_names: \[\] -> \['bounces'\]"):
            restore(make(keys, override=override))


@pytest.fixture(scope="module")
def tiny_cache(frame_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny autoencoder and its cache of the tiny set."""
    folder = tmp_path_factory.mktemp("tiny_cache")
    codec = save_codec(folder / "codec", "AutoencoderTiny")
    return cache([*TINY, f"data.path={frame_folders}", *codec], folder / "cache").parent


@pytest.fixture
def cached(tiny: list[str], tiny_cache: Path, tmp_path: Path) -> tuple[list[str], Path]:
    """A copy of the cache, and the overrides of a run on it."""
    shutil.copytree(tiny_cache, tmp_path, dirs_exist_ok=True)
    codec = ["codec.latent_channels=5", "codec.downsample_factor=2", "codec.scale=0.7"]
    made = tmp_path / "cache"
    return [*tiny, *codec, f"codec.path={tmp_path / 'codec'}", f"data.latents={made}"], made


def shard_with_nan(made: Path) -> None:
    """One value of every shard is overwritten, as a faulty disk might."""
    for file in made.glob("shard-*"):
        file.write_bytes(file.read_bytes()[:-4] + struct.pack("<f", float("nan")))


def index_with(**changes: object) -> Callable[[Path], object]:
    """Returns what changes entries of a cache's index."""

    def change(made: Path) -> None:
        index = json.loads((made / "index.json").read_text())
        (made / "index.json").write_text(json.dumps({**index, **changes}))

    return change


def other_weights(made: Path) -> None:
    save_codec(made.parent / "codec", "AutoencoderTiny", seed=1)


def one_shard(made: Path) -> Path:
    return sorted(made.glob("shard-*"))[0]


UNREADABLE_INDEX, DAMAGED_INDEX = r"index\.json cannot be read", r"index\.json is damaged"
# what is done to a cache, to its files or by a key of the run; and the sentence
BAD_CACHES: dict[str, tuple[Callable[[Path], object] | str, str]] = {
    "not_finite": (shard_with_nan, r"shard-\d+\.safetensors: holds non-finite latents of '\w+/clip\d'"),
    "other_weights": (other_weights, r"was made with another codec than codec\.path=.*sha256 \w+ -> \w+"),
    "other_precision": ("codec.dtype=bf16", r"another codec .*dtype fp32 -> bf16"),
    "wrong_shape": (index_with(shape=[1, 1, 5, 2, 2]), r"shard-00000.*holds F32 .* not F32 .*2, 2"),
    "wrong_format": (index_with(dtype="fp16"), r"shard-00000.*holds F32 .*, not F16"),
    "cut_shard": (lambda made: os.truncate(one_shard(made), 999), r"shard-00000.*holds F32 .* in \d+ bytes, not"),
    "no_shard": (lambda made: one_shard(made).unlink(), r"shard-00000\.safetensors: is missing"),
    "text_shard": (lambda made: one_shard(made).write_text("text " * 99), r"shard-00000.*cannot be read"),
    "no_index": (lambda made: (made / "index.json").unlink(), r"is not a finished cache: it has no index\.json"),
    "text_index": (lambda made: (made / "index.json").write_text("[[["), UNREADABLE_INDEX),
    "deep_index": (lambda made: (made / "index.json").write_text("[" * 99999), UNREADABLE_INDEX),
    "other_format": (index_with(format="x-2"), r"is of format 'x-2'; this version reads"),
    "no_clips": (index_with(clips=[{"name": "a"}]), DAMAGED_INDEX),
    "no_list": (index_with(clips=3), DAMAGED_INDEX),
    "out_of_shard": (index_with(shards=[1]), rf"{DAMAGED_INDEX} at '\w+/clip\d'"),
    "no_folder": (lambda made: made.rename(f"{made}-gone"), r"there is no folder '.*'; tools\.cache_latents"),
    "other_size": ("data.image_size=4", r"was made with image_size 8, but this run needs 4"),
    "other_limit": ("data.max_pixels=500", r"with max_pixels 35389440, but this run needs 500"),
    "other_transform": ("data.name=sky", r"with transform resize_then_.* needs center_crop_then"),
    "not_mirrored": ("data.horizontal_flip=true", r"with mirrored False, but this run needs True"),
}


@pytest.mark.parametrize("kind", BAD_CACHES)
def test_E13_a_latent_cache_that_does_not_fit_is_refused(cached: tuple[list[str], Path], kind: str) -> None:
    """In one sentence, before the first step or, where only reading can tell, at the step that reads it."""
    keys, made = cached
    spoil, sentence = BAD_CACHES[kind]
    extra = [spoil] if isinstance(spoil, str) else []
    if not isinstance(spoil, str):
        spoil(made)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
        run([*keys, *extra, "train.max_steps=9"])
    assert "\n" not in str(caught.value) and str(caught.value).count(". ") == 0


@pytest.mark.parametrize("change", ["longer", "more", "renamed"])
def test_E13_a_latent_cache_of_other_data_is_refused(
    cached: tuple[list[str], Path], frame_folders: Path, tmp_path: Path, change: str
) -> None:
    keys, _ = cached
    root = copied(frame_folders, tmp_path / "set")
    clip = root / "rises" / "clip1"
    if change == "longer":
        (clip / "007.png").write_bytes((clip / "006.png").read_bytes())
    elif change == "more":
        copied(clip, root / "rises" / "clip1a")
    else:
        clip.rename(root / "rises" / "clip1a")
    number = 7 if change == "more" else 6
    with pytest.raises(ValueError, match=rf"other data: 1 of {number} clips are missing.*first: 'rises/clip1a?'"):
        make([*keys, f"data.path={root}"])


BROKEN_PACKAGE = "raise ImportError('libavcodec.so.61: cannot open shared object file', name='av._core')\n"


def test_H5_a_decoder_that_cannot_be_loaded(clip: Bytes, tmp_path: Path, tiny: list[str]) -> None:
    (tmp_path / "av").mkdir()
    (tmp_path / "av/__init__.py").write_text(BROKEN_PACKAGE)
    keys = [*tiny, f"data.path={make_set(tmp_path / 'clips', clip)}"]
    with Job([sys.executable, "train.py", *keys], PYTHONPATH=str(tmp_path)) as job:
        code, output = job.wait()
    assert code == 2 and "Traceback" not in output, output
    assert "'av' cannot be loaded (libavcodec.so.61: cannot open shared object file)" in output
    assert "pip install --force-reinstall av" in output


def test_H5_a_pattern_that_never_ends(clip: Bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_dataset, "GROUP_SECONDS", 1)
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / f"{'a' * 60}.mp4").write_bytes(clip["mp4"])
    with pytest.raises(ValueError, match=r"--group '\(\.\+\)\+\$x' was not matched in 1 s"):
        prepare_dataset.main(["folder", str(folder), str(tmp_path / "out"), "--group", "(.+)+$x"])


def test_H10_a_link_that_leads_back_to_itself(clip: Bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_set(tmp_path / "clips", clip)
    (root / "again.mp4").symlink_to("again.mp4")
    (root / "one").symlink_to("two")
    (root / "two").symlink_to("one")
    catalog = build_catalog(DataConfig(path=str(root)))
    assert len(catalog.clips) == 4 and catalog.skipped == {"not a file (a broken link, a device)": 3}
    assert caplog.text.count("leads back to itself") == 3 and f"{str(root / 'again.mp4')!r} is left out" in caplog.text
