"""ClipDataset on small sets that carry their own answers in their pixels, and on the real clips."""

from __future__ import annotations

import logging
import pickle
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import imageio
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from datasets import ClipDataset, DataConfig, VideoError, build_dataset
from datasets.clips import MAX_ATTEMPTS, Sample

CLIPS = Path(__file__).resolve().parents[2] / "shared" / "media" / "clips"
needs_media = pytest.mark.skipif(not CLIPS.is_dir(), reason="the sample clips of ../shared/media are not here")
LENGTHS = {"A/0": 9, "A/1": 11, "B/2": 7, "B/3": 10, "C/4": 12}
SPAN = 7  # 4 frames, every second


def picture(number: int, clip: int) -> np.ndarray:
    """8x8: red is the frame's number, green the clip's, blue is full in the left half only."""
    image = np.zeros((8, 8, 3), np.uint8)
    image[..., 0], image[..., 1], image[:, :4, 2] = number, clip, 255
    return image


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("set")
    for clip, (name, length) in enumerate(LENGTHS.items()):
        (root / name).mkdir(parents=True)
        for number in range(length):
            Image.fromarray(picture(number, clip)).save(root / name / f"{number}.png")
    return root


def dataset(path: Path, seed: int = 3, **keys: object) -> ClipDataset:
    settings = {"num_frames": 4, "frame_interval": 2, "image_size": 8, **keys}
    return build_dataset(DataConfig(path=str(path), **settings), seed=seed)  # type: ignore[arg-type]


def numbers(sample: Sample, channel: int) -> list[int]:
    """What the pixels of each frame say: channel 0 its number, 1 its clip."""
    return ((sample["video"][:, channel, 0, 0] + 1) / 2 * 255).round().int().tolist()


def is_flipped(sample: Sample) -> list[bool]:
    return [bool(frame[2, 0, 0] < frame[2, 0, -1]) for frame in sample["video"]]


def equal(a: Sample, b: Sample) -> bool:
    same = torch.equal(a["video"], b["video"]) and torch.equal(a["labels"], b["labels"])
    return same and a["index"] == b["index"]


def test_sample_is_what_the_files_hold(root: Path) -> None:
    data = dataset(root)
    assert len(data) == 5 and data.class_names == ["A", "B", "C"]
    for index in range(5):
        sample = data[0, index]
        assert sample["video"].shape == (4, 3, 8, 8) and sample["video"].dtype == torch.float32
        assert sample["labels"].tolist() == [[0, 0, 1, 1, 2][index]] and sample["labels"].dtype == torch.int64
        assert sample["index"] == index
        first = numbers(sample, 0)[0]
        expected = np.stack([picture(first + step, index) for step in (0, 2, 4, 6)])
        expected_video = torch.from_numpy(expected).permute(0, 3, 1, 2).double() / 255 * 2 - 1
        assert torch.allclose(sample["video"].double(), expected_video, atol=1e-6)


def test_every_window_is_drawn_evenly_and_no_other(root: Path) -> None:
    data = dataset(root)
    for index, length in enumerate(LENGTHS.values()):
        starts = [numbers(data[epoch, index], 0)[0] for epoch in range(60 * (length - SPAN + 1))]
        counts = np.bincount(starts)
        assert len(counts) == length - SPAN + 1  # the last window too, and nothing beyond
        assert counts.min() > 30 and counts.max() < 95  # 60 expected


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_stride_is_exact(root: Path, interval: int) -> None:
    data = dataset(root, num_frames=3, frame_interval=interval)
    for epoch in range(10):
        for index in range(len(data)):
            assert set(np.diff(numbers(data[epoch, index], 0))) == {interval}


def test_a_clip_is_a_pure_function_of_seed_epoch_and_index(root: Path) -> None:
    """Read in another order, by another object, from a pickle: the same. Other seed or epoch: another."""
    keys = [(epoch, index) for epoch in range(3) for index in range(5)]
    one = dataset(root, num_images=2, horizontal_flip=True)
    samples = {key: one[key] for key in keys}
    for other in (dataset(root, num_images=2, horizontal_flip=True), pickle.loads(pickle.dumps(one))):  # noqa: S301
        assert all(equal(other[key], samples[key]) for key in reversed(keys))
    assert not all(equal(samples[0, index], samples[1, index]) for index in range(5))
    reseeded = dataset(root, seed=4, num_images=2, horizontal_flip=True)
    assert not all(equal(reseeded[key], samples[key]) for key in keys)
    assert equal(dataset(root, seed=-1)[0, 0], dataset(root, seed=-1)[0, 0])


def test_loader_workers_change_nothing(root: Path) -> None:
    data = dataset(root, num_images=1, horizontal_flip=True)
    keys = [(epoch, index) for epoch in range(2) for index in range(5)]
    loader = DataLoader(data, sampler=keys, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    for key, sample in zip(keys, loader):
        assert equal(sample, data[key])


def test_the_whole_clip_is_flipped_or_none_of_it(root: Path) -> None:
    data = dataset(root, horizontal_flip=True)
    flips = [is_flipped(data[epoch, 0]) for epoch in range(200)]
    assert all(len(set(flip)) == 1 for flip in flips)
    assert 70 < sum(flip[0] for flip in flips) < 130


@pytest.mark.parametrize(
    ("name", "flips", "transform"),
    [
        ("ffs", True, "resize_then_center_crop"),
        ("sky", True, "center_crop_then_resize"),
        ("taichi", True, "resize_then_center_crop"),
        ("ucf101", True, "resize_then_center_crop"),
        ("folder", False, "resize_then_center_crop"),
        ("demo", False, "resize_then_center_crop"),
    ],
)
def test_recipes(tmp_path: Path, root: Path, name: str, flips: bool, transform: str) -> None:
    """The recipe decides; `horizontal_flip` overrides it; the real flip rate follows."""
    if name in ("sky", "taichi", "folder"):
        path = root
    else:
        path = tmp_path
        (path / "A").mkdir()
        frames = [picture(number, 0) for number in range(8)]
        imageio.mimwrite(path / "A" / "a.mp4", frames, macro_block_size=1)  # type: ignore[arg-type]
    data = dataset(path, name=name)
    assert (data.flips, data.transform_name) == (flips, transform)
    assert any(is_flipped(data[epoch, 0])[0] for epoch in range(16)) == flips
    assert dataset(path, name=name, horizontal_flip=not flips).flips is not flips


def test_extra_images_come_from_other_videos_with_their_labels(root: Path) -> None:
    data = dataset(root, num_images=3)
    shown: set[tuple[int, int]] = set()
    places: list[list[int]] = []
    for epoch in range(100):
        sample = data[epoch, 1]
        assert sample["video"].shape == (7, 3, 8, 8) and sample["labels"].shape == (4,)
        clips = numbers(sample, 1)
        assert clips[:4] == [1] * 4 and 1 not in clips[4:]
        assert sample["labels"].tolist() == [data.catalog.clips[clip].label for clip in [1, *clips[4:]]]
        shown |= set(zip(clips[4:], numbers(sample, 0)[4:]))
        places.append(clips[4:])
    assert all(a != b for a, b in combinations(zip(*places), 2))  # each place draws for itself
    frames = {(clip, number) for clip, length in enumerate(LENGTHS.values()) for number in range(length) if clip != 1}
    assert len(shown & frames) == len(shown) > 0.9 * len(frames)


def test_extra_images_are_flipped_each_for_itself(root: Path) -> None:
    data = dataset(root, num_images=2, horizontal_flip=True)
    patterns = {tuple(is_flipped(data[epoch, 0])[3:]) for epoch in range(60)}
    assert len(patterns) == 8  # clip and two images: all combinations


def test_one_video_alone_gives_its_own_images(root: Path) -> None:
    assert numbers(dataset(root, num_images=2, max_clips=1)[0, 0], 1) == [0] * 6


def test_images_of_a_frame_list(root: Path, tmp_path: Path) -> None:
    (tmp_path / "train_list.txt").write_text("C/4/11.png\nB/2/0.png A\n")
    data = dataset(root, num_images=4, frame_list=str(tmp_path / "train_list.txt"))
    seen = set()
    for epoch in range(20):
        sample = data[epoch, 0]
        seen |= set(zip(numbers(sample, 0)[4:], numbers(sample, 1)[4:], sample["labels"].tolist()[1:]))
    assert seen == {(11, 4, 2), (0, 2, 0)}


# ------------------------------------------------------------------------------- clips that cannot be used


@pytest.fixture
def partly_broken(tmp_path: Path) -> Path:
    """Two good videos, a text file, a playlist, a short video."""
    for name, length in (("a/good1", 12), ("b/good2", 9), ("b/short", 5)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        frames = [np.full((16, 16, 3), 100, np.uint8)] * length
        imageio.mimwrite(tmp_path / f"{name}.mp4", frames)  # type: ignore[arg-type]
    (tmp_path / "a" / "text.mp4").write_text("not a video " * 30)
    (tmp_path / "b" / "list.mp4").write_text("ffconcat version 1.0\nfile good2.mp4\n")
    return tmp_path


def test_unusable_clips_are_replaced_named_and_counted(partly_broken: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = dataset(partly_broken, max_unusable=1.0)
    names = [clip.name for clip in data.catalog.clips]
    with caplog.at_level(logging.WARNING):
        samples = {(epoch, index): data[epoch, index] for epoch in range(4) for index in range(len(data))}
    assert {Path(path).name: reason for path, reason in data.skipped.items()} == {
        "text.mp4": "is not a video: its first bytes belong to no video container",
        "list.mp4": "is an ffconcat playlist, not a video",
        "short.mp4": "has 5 frames, a window needs 7",
    }
    assert len(caplog.messages) == 3  # one warning for each file
    for (epoch, index), sample in samples.items():
        shown = names[sample["index"]]
        assert "good" in shown and sample["labels"].item() == "ab".index(shown[0])
        assert sample["index"] == index or "good" not in names[index]
        fresh = dataset(partly_broken, max_unusable=1.0)  # nothing learned before: the same replacement
        assert equal(fresh[epoch, index], sample)
    bad = [index for index, name in enumerate(names) if "good" not in name]
    drawn = [[data[epoch, index]["index"] for epoch in range(20)] for index in bad]
    assert all(len(set(replacements)) > 1 for replacements in drawn)  # anew in every epoch
    assert drawn[0] != drawn[1] != drawn[2]  # and for every clip


def test_extra_images_skip_broken_videos_too(partly_broken: Path) -> None:
    data = dataset(partly_broken, num_images=4)
    assert data[0, 0]["video"].shape == (8, 3, 8, 8)


@pytest.mark.parametrize("name", ["text.mp4", "list.mp4", "short.mp4"])
def test_strict_stops_at_the_clip(partly_broken: Path, name: str) -> None:
    data = dataset(partly_broken, strict=True)
    index = [clip.name.split("/")[1] for clip in data.catalog.clips].index(name)
    with pytest.raises(VideoError, match=name):
        data[0, index]


def test_a_set_of_broken_clips_ends_with_the_list(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.mp4").write_bytes(b"")
    with pytest.raises(
        VideoError, match=f"{MAX_ATTEMPTS} clips in a row cannot be used: .*the file is empty"
    ) as caught:
        dataset(tmp_path, max_unusable=1.0)[0, 0]
    assert caught.value.path == str(tmp_path)
    assert all(f"{number}.mp4" in str(caught.value) for number in range(3))


def test_a_file_that_goes_away_is_replaced(partly_broken: Path) -> None:
    data = dataset(partly_broken, max_unusable=1.0)
    (partly_broken / "a" / "good1.mp4").unlink()
    sample = data[0, 0]
    assert data.catalog.clips[sample["index"]].name == "b/good2.mp4"
    assert any("cannot be opened" in reason for reason in data.skipped.values())


def test_describe_says_what_a_log_should(partly_broken: Path) -> None:
    (partly_broken / "stray.txt").write_text("")
    said = dataset(partly_broken).describe()
    assert (said["clips"], said["classes"], said["skipped"]) == (5, 2, {"*.txt": 1})
    assert said["digest"] == dataset(partly_broken).catalog.digest


@needs_media
def test_every_sample_clip_in_one_set() -> None:
    """63 files (the mp3 is no video by name): 58 give two frames; each other one is named with its reason."""
    data = dataset(CLIPS, num_frames=2, frame_interval=1, image_size=32, labels="none")
    assert len(data) == 63 and data.catalog.skipped == {"*.mp3": 1}
    for index in range(len(data)):
        video = data[0, index]["video"]
        assert video.shape == (2, 3, 32, 32) and video.min() >= -1 and video.max() <= 1
    assert {Path(path).name for path in data.skipped} == {
        "ExoPlayer__invalid-bitstream.webm",
        "moviepy__result.webm",
        "derived_truncated_bikes.mp4",
        "decord__corrupted.mp4",
        "torchcodec__testsrc2_mpeg4.mp4",  # one frame
        "mp4parse-rust__bbb_sunflower_QCIF_30fps_mp4v_noaudio_1f.mp4",  # one frame
    }
    assert {Path(path).name for path in data.cut_off} == {
        "derived_truncated_again.mkv",
        "nestegg__dancer1.webm",
    }


@needs_media
def test_cut_off_clip_is_used_if_long_enough_else_skipped(tmp_path: Path) -> None:
    """31 of 77 frames are there: windows of 25 fit, windows of 46 do not; a strict run takes neither."""
    (tmp_path / "cut.mkv").symlink_to(CLIPS / "odd" / "derived_truncated_again.mkv")
    (tmp_path / "whole.mkv").symlink_to(CLIPS / "asl" / "sample-videos__again.mkv")
    fits = dataset(tmp_path, num_frames=9, frame_interval=3, labels="none")
    assert fits[0, 0]["index"] == 0 and not fits.skipped and len(fits.cut_off) == 1
    longer = dataset(tmp_path, num_frames=16, frame_interval=3, labels="none")
    assert longer[0, 0]["index"] == 1
    assert list(longer.skipped.values()) == ["has 31 frames, a window needs 46"]
    strict = ClipDataset(replace(fits.config, strict=True), fits.catalog, 0)
    with pytest.raises(VideoError, match="the file is cut off: 102688 of 205376 bytes are there"):
        strict[0, 0]
