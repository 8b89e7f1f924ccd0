"""Catalogs of small folders in each layout: order, counts, labels, digests, error sentences; held-out clips."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from datasets import ClipDataset, DataConfig, build_catalog, build_dataset, build_held_out
from datasets.labels import LABEL_RULES, read_frame_list
from datasets.recipes import CAPTIONED, LABEL_CHOICES, RECIPES
from tests.conftest import refuses

FOUND = sorted({*RECIPES} - {CAPTIONED})  # those whose clips no list names


def touch(root: Path, *names: str) -> Path:
    """Files of one byte each; a catalog opens none of them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def frames(folder: str, count: int) -> list[str]:
    return [f"{folder}/{Path(folder).name}_{number}.jpg" for number in range(count)]


def config(path: Path, name: str = "folder", **keys: object) -> DataConfig:
    return DataConfig(name=name, path=str(path), num_frames=4, frame_interval=2, **keys)  # type: ignore[arg-type]


TREES = [*frames("v1/v1_1", 9), *frames("v1/v1_2", 7), *frames("v2/v2_1", 6), *frames("one", 8)]
TREES += ["v1/readme.txt", "v1/v1_1/.hidden.jpg"]
VIDEOS = ["b.mp4", "a.MP4", "deep/er/c é -x.mkv", "-dash.avi"]
OVERVIEWS, STRAY_OVERVIEWS = ["samples.gif", "samples.json"], {"*.gif": 1, "*.json": 1}
STRAYS = ["notes.txt", "x.jpg", "no_suffix", ".DS_Store", "._a.mp4", ".git/d.mp4", "__MACOSX/e.mp4"]


@pytest.mark.parametrize(
    ("name", "files", "clips", "skipped"),
    [
        ("ffs", [*VIDEOS, *STRAYS], dict.fromkeys(sorted(VIDEOS)), {"*": 1, "*.jpg": 1, "*.txt": 1, "hidden": 4}),
        ("sky", TREES, {"one": 8, "v1/v1_1": 9, "v1/v1_2": 7}, {"*.txt": 1, "fewer than 7 frames": 1, "hidden": 1}),
        # images next to videos are left out
        ("folder", ["a/clip.mp4", *frames("a", 9), *frames("b", 9)], {"a/clip.mp4": None, "b": 9}, {"*.jpg": 9}),
        # and overviews of sampled videos
        ("folder", ["0.mp4", *OVERVIEWS, "a/samples.gif"], {"0.mp4": None, "a/samples.gif": None}, STRAY_OVERVIEWS),
    ],
)
def test_clips_are_found_sorted_and_other_files_counted(
    tmp_path: Path, name: str, files: list[str], clips: dict[str, int | None], skipped: dict[str, int]
) -> None:
    catalog = build_catalog(config(touch(tmp_path, *files), name))
    assert [(clip.name, clip.num_frames) for clip in catalog.clips] == list(clips.items())
    assert all(Path(clip.path).exists() for clip in catalog.clips)
    assert (catalog.skipped, catalog.class_names) == (skipped, [])


@pytest.mark.parametrize("name", FOUND)
def test_the_other_kind_is_read_if_there_is_none_of_its_own(tmp_path: Path, name: str) -> None:
    """A set that was turned into frames, or into videos, keeps its name; files of the other kind stay strays."""
    touch(tmp_path / "frames", *frames("A/c1", 7), *frames("B/c2", 8))
    touch(tmp_path / "videos", "A/1.mp4", "B/2.mp4")
    for kind, clips in (("frames", ["A/c1", "B/c2"]), ("videos", ["A/1.mp4", "B/2.mp4"])):
        catalog = build_catalog(config(tmp_path / kind, name))
        assert [clip.name for clip in catalog.clips] == clips and not catalog.skipped
        assert catalog.class_names == ([] if name in ("ffs", "sky", "taichi") else ["A", "B"])
    both = build_catalog(config(tmp_path, name, labels="none"))
    kinds = {clip.name.split("/")[0] for clip in both.clips}
    assert kinds == {"folder": {"frames", "videos"}, "sky": {"frames"}, "taichi": {"frames"}}.get(name, {"videos"})


@pytest.mark.parametrize(
    ("keys", "names", "classes"),
    [
        ({}, ["a/1.mp4", "b/2.mp4"], ["a", "b"]),
        ({}, ["a/1.mp4", "a/2.mp4"], []),  # one class says nothing
        ({}, ["1__x.mp4", "2__y.mp4"], ["x", "y"]),
        ({}, ["a/1__x.mp4", "2__y.mp4"], ["x", "y"]),  # not all in folders
        ({}, ["1.mp4", "a/2.mp4"], []),
        ({}, ["1__.mp4", "2__y.mp4"], []),
        ({}, [*frames("a/c1", 7), *frames("b/c2", 7)], ["a", "b"]),
        ({}, [*frames("c1", 7), *frames("c2", 7)], []),
        ({}, [*frames("c1__x", 7), *frames("c2__y.z", 7)], ["x", "y.z"]),
        ({"labels": "file_name"}, ["s/a__b__hello.world.mkv", "s/c__again.mkv"], ["again", "hello.world"]),
        ({"name": "ucf101"}, ["Yo/v_Yo_g01_c01.avi", "Archery/v_g01_c02.mp4", "Archery/c.avi"], ["Archery", "Yo"]),
        ({"name": "ucf101", "labels": "none"}, ["Yo/a.avi", "Archery/c.avi"], []),
        ({"max_clips": 2}, ["a/1.mp4", "b/2.mp4", "c/3.mp4"], ["a", "b", "c"]),  # keeps all class names
    ],
)
def test_labels(tmp_path: Path, keys: dict[str, str], names: list[str], classes: list[str]) -> None:
    catalog = build_catalog(config(touch(tmp_path, *names), **keys))
    assert catalog.class_names == classes
    for clip in catalog.clips:
        assert classes[clip.label] in clip.name if classes else clip.label == 0
    assert len(catalog.clips) == keys.get("max_clips", len(catalog.clips))
    assert {"auto", *LABEL_RULES} == set(LABEL_CHOICES)
    assert {recipe.labels for recipe in RECIPES.values()} <= {*LABEL_CHOICES, CAPTIONED}


def test_links_are_followed_once_and_broken_ones_counted(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    touch(elsewhere, "a.mp4")
    touch(root, "z/b.mp4")
    (root / "linked").symlink_to(elsewhere)
    (root / "loop").symlink_to(root)
    (root / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    catalog = build_catalog(config(root, "ffs"))
    assert [clip.name for clip in catalog.clips] == ["linked/a.mp4", "z/b.mp4"]
    assert sum(catalog.skipped.values()) == 1


def test_digest_names_the_content(tmp_path: Path) -> None:
    first = touch(tmp_path / "first", "a/1.mp4", "b/2.mp4")
    second = tmp_path / "second"
    shutil.copytree(first, second)
    digest = build_catalog(config(first)).digest
    assert build_catalog(config(second)).digest == digest
    assert build_catalog(config(first, labels="none")).digest != digest
    assert build_catalog(config(first, max_clips=1)).digest != digest
    (second / "a/1.mp4").write_bytes(b"longer")
    assert build_catalog(config(second)).digest != digest


@pytest.mark.parametrize("name", FOUND)
def test_unusable_folders_are_named(tmp_path: Path, name: str) -> None:
    touch(tmp_path / "strays", "a.txt", "b.txt", ".hidden")
    (tmp_path / "empty").mkdir()
    for path, sentence in (
        ("gone", r"data\.path: there is no folder '.*gone'"),
        ("empty", r"holds none \(found: nothing at all\)"),
        ("strays", rf"data\.name={name} needs .* holds none \(found: 2 \*\.txt, 1 hidden\)"),
        ("strays/a.txt", "is a file, not a folder"),
    ):
        refuses(sentence, build_catalog, config(tmp_path / path, name))


@pytest.mark.parametrize(
    ("names", "keys", "sentence"),
    [
        ([*frames("a", 3), *frames("b", 5)], {"name": "sky"}, r"none of the 2 .* has the 7 frames .*longest has 5\)"),
        (["Yo/a.avi", "stray.avi"], {"name": "ucf101"}, r"stray\.avi' is not in a class folder"),
        (["a__b.mp4", "unnamed.mp4"], {"labels": "file_name"}, r"unnamed\.mp4' has no '__'"),
        (["1.mp4", "2.mp4"], {"val_share": 0.999}, r"data\.val_share=0\.999 holds out all of the 2 clips .* lower it"),
    ],
)
def test_folders_that_do_not_fit(tmp_path: Path, names: list[str], keys: dict[str, str], sentence: str) -> None:
    refuses(sentence, build_catalog, config(touch(tmp_path, *names), **keys))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"name": "ucf"}, r"data\.name must be one of ffs, .*, got 'ucf'"),
        ({"labels": "folders"}, r"data\.labels must be one of auto, .* got 'folders'"),
        ({"frame_list": "train_list.txt"}, r"data\.frame_list is read only with data\.num_images"),
        ({"name": "captions", "labels": "none"}, r"data\.labels=none: with data\.name=captions"),
        ({"val_share": 0.5, "val_path": "a"}, "set only one of them"),
        ({"val_share": 0.5, "frame_list": "a.txt", "num_images": 1}, r"cannot tell which images"),
    ],
)
def test_settings_that_are_refused(keys: dict[str, object], sentence: str) -> None:
    refuses(sentence, DataConfig, **keys)


def listed(root: Path, text: str, **keys: object) -> list[tuple[str, int]]:
    """(name, label) of the images in a frame list."""
    (root / "train_list.txt").write_text(text)
    wanted = config(root, num_images=1, frame_list=str(root / "train_list.txt"), **keys)  # type: ignore[arg-type]
    return [(clip.name, clip.label) for clip in read_frame_list(wanted, build_catalog(wanted))]


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    return touch(tmp_path, "A/v_A_g01_c01.avi", "B/v_B_g01_c01.avi", "B/b 1.jpg", "f/v_B_g01_c01_7.jpg", "f/x.jpg")


def test_frame_list_labels(classes: Path) -> None:
    rows = "B/b 1.jpg\nf/v_B_g01_c01_7.jpg\n\nf/x.jpg A\nf/x.jpg 1\r\n"
    labels = [("B/b 1.jpg", 1), ("f/v_B_g01_c01_7.jpg", 1), ("f/x.jpg", 0), ("f/x.jpg", 1)]
    assert listed(classes, rows, labels="class_folders") == labels
    assert listed(classes, "f/x.jpg\n", labels="none") == [("f/x.jpg", 0)]
    refuses("is empty", listed, classes, "\n")
    wanted = config(classes, num_images=1, frame_list="gone.txt")
    refuses(r"data\.frame_list: there is no file 'gone\.txt'", read_frame_list, wanted, build_catalog(config(classes)))


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("f/gone.jpg", "there is no file"),
        ("f/x.jpg C", "'C' names none of the 2 classes"),
        ("f/x.jpg 2", "'2' names none of the 2 classes"),
        ("f/x.jpg", "names none of the 2 classes"),
        ("A/v_A_g01_c01.avi", "is not an image"),
    ],
)
def test_bad_frame_list_entries_name_their_line(classes: Path, row: str, sentence: str) -> None:
    refuses(f"line 2: .*{sentence}", listed, classes, f"B/b 1.jpg\n{row}\n", labels="class_folders")


@pytest.fixture
def plain(frame_folders: Path) -> DataConfig:
    return DataConfig(path=str(frame_folders), num_frames=4, frame_interval=1, image_size=8)


def names(dataset: ClipDataset) -> set[str]:
    return {clip.name for clip in dataset.catalog.clips}


def split(settings: DataConfig) -> tuple[ClipDataset, ClipDataset]:
    training = build_dataset(settings, seed=0)
    return training, build_held_out(settings, training, seed=0)


def test_a_share_is_chosen_by_the_hash_of_the_name(plain: DataConfig) -> None:
    everything, digests = build_dataset(plain, seed=0), set()
    for share in (0.2, 0.5, 0.8):
        training, held_out = split(replace(plain, val_share=share))
        digest = {name: int(hashlib.sha256(name.encode()).hexdigest(), 16) for name in names(everything)}
        expected = {name for name, number in digest.items() if number / 2**256 < share}
        assert names(held_out) == expected and names(training) == names(everything) - expected
        assert training.class_names == held_out.class_names == ["falls", "rises"]
        assert training.describe()["skipped"] == {"held out": len(held_out)}
        digests |= {training.digest}
    assert len({everything.digest} | digests) == 3  # the digest is that of the clips trained on


def test_other_clips_move_none_to_the_other_side(plain: DataConfig, frame_folders: Path, tmp_path: Path) -> None:
    shutil.copytree(frame_folders, tmp_path / "more")
    for place in range(20):
        shutil.copytree(frame_folders / "falls" / "clip0", tmp_path / "more" / "falls" / f"new{place}")
    half = replace(plain, val_share=0.5)
    before, after = (build_dataset(each, seed=0) for each in (half, replace(half, path=str(tmp_path / "more"))))
    assert {name for name in names(after) if "new" not in name} == names(before)
    assert [len(part) for part in split(replace(half, max_clips=1))] == [1, 2]  # of the training only


def test_no_image_of_joint_training_is_held_out(plain: DataConfig) -> None:
    for dataset in split(replace(plain, val_share=0.5, num_images=3)):
        opened: set[str] = set()
        dataset.on_open = opened.add
        for epoch in range(50):
            for index in range(len(dataset)):
                dataset[epoch, index]
        assert opened == {clip.path for clip in dataset.catalog.clips}


def test_a_held_out_folder_takes_the_training_labels(plain: DataConfig, frame_folders: Path, tmp_path: Path) -> None:
    """It has the second class only, whose number by itself would be 0; and it is never mirrored."""
    shutil.copytree(frame_folders / "rises", tmp_path / "test" / "rises")
    settings = replace(plain, labels="class_folders", val_path=str(tmp_path / "test"), horizontal_flip=True)
    training, held_out = split(settings)
    assert len(training) == 6 and [clip.label for clip in held_out.catalog.clips] == [1, 1, 1]
    assert not held_out.flips and training.flips
    alone = replace(plain, path=str(tmp_path / "test"), horizontal_flip=False)
    assert torch.equal(held_out[0, 1]["video"], build_dataset(alone, seed=0)[0, 1]["video"])
    unlabelled = replace(plain, labels="none", val_path=str(frame_folders))
    assert {clip.label for clip in split(unlabelled)[1].catalog.clips} == {0}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"val_path": "/nowhere"}, r"data\.val_path: there is no folder '/nowhere'"),
        ({"val_share": 0.001}, r"data\.val_share=0\.001 holds out none of the 6 clips"),
        ({"val_path": ".", "labels": "class_folders"}, r"data\.val_path: '.*turns.*' is of class 'turns'"),
    ],
)
def test_held_out_clips_that_do_not_fit(
    plain: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(Path(plain.path) / "rises", "turns")
    refuses(sentence, split, replace(plain, **settings))


@pytest.mark.parametrize("name", FOUND)
def test_a_folder_of_splits_is_refused(tmp_path: Path, name: str) -> None:
    """Else test clips are trained on, and the classes of UCF101 are `test` and `train`."""
    touch(tmp_path, "train/A/1.mp4", "train/B/2.mp4", "test/A/3.mp4", *frames("train/A/c1", 7))
    refuses(r"name one, .*/test or .*/train", build_catalog, config(tmp_path, name))
    assert all("train" not in clip.name for clip in build_catalog(config(tmp_path / "train", name)).clips)
