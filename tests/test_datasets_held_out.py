"""Clips held out of training: which they are, that nobody trains on them, and how they are read."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from datasets import DataConfig, build_dataset, build_held_out

COMMON = {"name": "folder", "num_frames": 4, "frame_interval": 1, "image_size": 8, "num_workers": 0}


@pytest.fixture
def config(frame_folders: Path) -> DataConfig:
    return DataConfig(path=str(frame_folders), **COMMON)


def names(dataset: object) -> set[str]:
    return {clip.name for clip in dataset.catalog.clips}  # type: ignore[attr-defined]


def hashed_below(name: str, share: float) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) / 2**256 < share


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_share_is_chosen_by_the_hash_of_the_name(config: DataConfig, share: float) -> None:
    everything = names(build_dataset(config, seed=0))
    split = replace(config, val_share=share)
    training = build_dataset(split, seed=0)
    held_out = build_held_out(split, training, seed=0)
    assert names(held_out) == {name for name in everything if hashed_below(name, share)}
    assert names(training) == everything - names(held_out)
    assert training.class_names == held_out.class_names == ["falls", "rises"]
    assert training.describe()["skipped"] == {"held out": len(held_out)}


def test_other_clips_move_none_to_the_other_side(config: DataConfig, frame_folders: Path, tmp_path: Path) -> None:
    shutil.copytree(frame_folders, tmp_path / "more")
    for place in range(20):
        shutil.copytree(frame_folders / "falls" / "clip0", tmp_path / "more" / "falls" / f"new{place}")
    before = build_dataset(replace(config, val_share=0.5), seed=0)
    after = build_dataset(replace(config, val_share=0.5, path=str(tmp_path / "more")), seed=0)
    assert {name for name in names(after) if "new" not in name} == names(before)


def test_the_digest_is_that_of_the_clips_trained_on(config: DataConfig) -> None:
    digests = {share: build_dataset(replace(config, val_share=share), seed=0).digest for share in (0.0, 0.2, 0.8)}
    assert len(set(digests.values())) == 3


def test_max_clips_limits_the_training_only(config: DataConfig) -> None:
    split = replace(config, val_share=0.5, max_clips=1)
    training = build_dataset(split, seed=0)
    assert (len(training), len(build_held_out(split, training, seed=0))) == (1, 2)


def test_no_image_of_joint_training_is_held_out(config: DataConfig) -> None:
    """Every file that 50 epochs open, on either side."""
    split = replace(config, val_share=0.5, num_images=3)
    training = build_dataset(split, seed=0)
    held_out = build_held_out(split, training, seed=0)
    for dataset in (training, held_out):
        opened: set[str] = set()
        dataset.on_open = opened.add
        for epoch in range(50):
            for index in range(len(dataset)):
                dataset[epoch, index]
        assert opened == {clip.path for clip in dataset.catalog.clips}


def test_a_folder_of_its_own_takes_the_labels_of_the_training(
    config: DataConfig, frame_folders: Path, tmp_path: Path
) -> None:
    """It has the second class only, whose number by itself would be 0; and it is never mirrored."""
    shutil.copytree(frame_folders / "rises", tmp_path / "test" / "rises")
    split = replace(config, labels="class_folders", val_path=str(tmp_path / "test"), horizontal_flip=True)
    training = build_dataset(split, seed=0)
    held_out = build_held_out(split, training, seed=0)
    assert len(training) == 6 and [clip.label for clip in held_out.catalog.clips] == [1, 1, 1]
    assert not held_out.flips and training.flips
    for index in range(3):
        assert torch.equal(held_out[0, index]["video"], held_out[0, index]["video"])
    plain = replace(split, path=split.val_path, val_path=None, horizontal_flip=False)
    assert torch.equal(held_out[0, 1]["video"], build_dataset(plain, seed=0)[0, 1]["video"])


def test_without_classes_labels_do_not_matter(config: DataConfig, frame_folders: Path) -> None:
    split = replace(config, labels="none", val_path=str(frame_folders))
    assert {clip.label for clip in build_held_out(split, build_dataset(split, seed=0), seed=0).catalog.clips} == {0}


def test_a_class_that_is_not_trained_on_is_refused(config: DataConfig, frame_folders: Path, tmp_path: Path) -> None:
    shutil.copytree(frame_folders / "rises", tmp_path / "test" / "turns")
    split = replace(config, labels="class_folders", val_path=str(tmp_path / "test"))
    with pytest.raises(ValueError, match=r"data\.val_path: '.*turns.*' is of class 'turns'"):
        build_held_out(split, build_dataset(split, seed=0), seed=0)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"val_path": "/nowhere"}, r"data\.val_path: there is no folder '/nowhere'"),
        ({"val_share": 0.001}, r"data\.val_share=0\.001 holds out none of the 6 clips"),
    ],
)
def test_nothing_to_hold_out_is_a_sentence(config: DataConfig, settings: dict[str, object], sentence: str) -> None:
    split = replace(config, **settings)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        build_held_out(split, build_dataset(split, seed=0), seed=0)


def test_nothing_left_to_train_on_is_a_sentence(config: DataConfig) -> None:
    with pytest.raises(ValueError, match=r"data\.val_share=0\.999 holds out all of the 6 clips .* lower it"):
        build_dataset(replace(config, val_share=0.999), seed=0)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"val_share": 0.5, "val_path": "a"}, "set only one of them"),
        ({"val_share": 0.5, "frame_list": "a.txt", "num_images": 1}, r"cannot tell which images"),
        ({"val_share": 1.0}, r"data\.val_share: 1\.0 must be a share"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DataConfig(**settings)  # type: ignore[arg-type]
