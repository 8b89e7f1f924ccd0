"""ClipDataset on a small set that carries its own answers in its pixels."""

import pickle
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import ClipDataset, DataConfig, build_dataset
from datasets.clips import Sample

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
    """Reads a number from the pixels of each frame: channel 0 its index, channel 1 its clip."""
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
        windows = [numbers(data[epoch, index], 0) for epoch in range(60 * (length - SPAN + 1))]
        assert all(np.diff(window).tolist() == [2, 2, 2] for window in windows)
        counts = np.bincount([window[0] for window in windows])
        assert len(counts) == length - SPAN + 1  # the last window too, and nothing beyond
        assert counts.min() > 30 and counts.max() < 95  # 60 expected


def test_a_clip_is_a_pure_function_of_seed_epoch_and_index(root: Path) -> None:
    keys = [(epoch, index) for epoch in range(3) for index in range(5)]
    one = dataset(root, num_images=2, horizontal_flip=True)
    samples = {key: one[key] for key in keys}
    for other in (dataset(root, num_images=2, horizontal_flip=True), pickle.loads(pickle.dumps(one))):  # noqa: S301, TID251
        assert all(equal(other[key], samples[key]) for key in reversed(keys))
    assert not all(equal(samples[0, index], samples[1, index]) for index in range(5))
    reseeded = dataset(root, seed=4, num_images=2, horizontal_flip=True)
    assert not all(equal(reseeded[key], samples[key]) for key in keys)
    assert equal(dataset(root, seed=-1)[0, 0], dataset(root, seed=-1)[0, 0])


def test_the_whole_clip_is_flipped_or_none_of_it_and_each_image_for_itself(root: Path) -> None:
    data = dataset(root, num_images=2, horizontal_flip=True)
    flips = [is_flipped(data[epoch, 0]) for epoch in range(200)]
    assert all(len(set(flip[:4])) == 1 for flip in flips)
    assert 70 < sum(flip[0] for flip in flips) < 130
    assert len({tuple(flip[3:]) for flip in flips}) == 8  # clip and two images: all combinations


@pytest.mark.parametrize("name", ["ffs", "taichi", "ucf101", "sky", "folder", "demo"])
def test_recipes(root: Path, name: str) -> None:
    data, flips = dataset(root, name=name), name in ("ffs", "taichi", "ucf101")
    transform = "center_crop_then_resize" if name == "sky" else "resize_then_center_crop"
    assert (data.flips, data.transform_name) == (flips, transform)
    assert any(is_flipped(data[epoch, 0])[0] for epoch in range(16)) == flips
    assert dataset(root, name=name, horizontal_flip=not flips).flips is not flips


def test_extra_images_come_from_other_videos_with_their_labels(root: Path) -> None:
    data = dataset(root, num_images=3)
    shown, places = set(), []
    for epoch in range(100):
        sample = data[epoch, 1]
        assert sample["video"].shape == (7, 3, 8, 8) and sample["labels"].shape == (4,)
        clips = numbers(sample, 1)
        assert clips[:4] == [1] * 4 and 1 not in clips[4:]
        assert sample["labels"].tolist() == [data.catalog.clips[clip].label for clip in [1, *clips[4:]]]
        shown |= set(zip(clips[4:], numbers(sample, 0)[4:]))
        places.append(clips[4:])
    assert all(a != b for a, b in combinations(zip(*places), 2))  # each place draws for itself
    assert numbers(dataset(root, num_images=2, max_clips=1)[0, 0], 1) == [0] * 6  # one video alone: its own images
    frames = {(clip, number) for clip, length in enumerate(LENGTHS.values()) for number in range(length) if clip != 1}
    assert len(shown & frames) == len(shown) > 0.9 * len(frames)
