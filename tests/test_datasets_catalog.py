"""Catalogs of small folders made here, in each layout; order, counts, labels, digests and error sentences."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest

from datasets import DataConfig, build_catalog
from datasets.labels import LABEL_RULES, read_frame_list
from datasets.recipes import CAPTIONED, LABEL_CHOICES, RECIPES

ROOT = Path(__file__).resolve().parents[1]
FOUND = sorted({*RECIPES} - {*CAPTIONED})  # those whose clips no list names
ASL = ROOT.parent / "shared" / "media" / "clips" / "asl"


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


def test_video_files_are_found_sorted_and_strays_counted(tmp_path: Path) -> None:
    touch(tmp_path, "b.mp4", "a.MP4", "deep/er/c é -x.mkv", "-dash.avi", "notes.txt", "x.jpg", "no_suffix")
    touch(tmp_path, ".DS_Store", "._a.mp4", ".git/d.mp4", "__MACOSX/e.mp4")
    catalog = build_catalog(config(tmp_path, "ffs"))
    assert [clip.name for clip in catalog.clips] == ["-dash.avi", "a.MP4", "b.mp4", "deep/er/c é -x.mkv"]
    assert all(Path(clip.path).is_file() for clip in catalog.clips)
    assert catalog.skipped == {"*": 1, "*.jpg": 1, "*.txt": 1, "hidden": 4}
    assert (catalog.class_names, catalog.num_classes) == ([], 0)


@pytest.mark.parametrize("name", ["sky", "taichi"])
def test_folders_of_frames_at_any_depth(tmp_path: Path, name: str) -> None:
    touch(tmp_path, *frames("v1/v1_1", 9), *frames("v1/v1_2", 7), *frames("v2/v2_1", 6), *frames("one", 8))
    touch(tmp_path, "v1/readme.txt", "v1/v1_1/.hidden.jpg")
    catalog = build_catalog(config(tmp_path, name))
    assert [(clip.name, clip.num_frames) for clip in catalog.clips] == [
        ("one", 8),
        ("v1/v1_1", 9),
        ("v1/v1_2", 7),
    ]
    assert catalog.skipped == {"*.txt": 1, "fewer than 7 frames": 1, "hidden": 1}


@pytest.mark.parametrize("name", FOUND)
def test_the_other_kind_is_read_where_there_is_none_of_its_own(tmp_path: Path, name: str) -> None:
    """A set that was turned into frames, or into videos, keeps its name; strays beside its own kind stay strays."""
    (tmp_path / "videos").mkdir()
    touch(tmp_path / "frames", *frames("A/c1", 7), *frames("B/c2", 8))
    touch(tmp_path / "videos", "A/1.mp4", "B/2.mp4")
    for kind, clips in (("frames", ["A/c1", "B/c2"]), ("videos", ["A/1.mp4", "B/2.mp4"])):
        catalog = build_catalog(config(tmp_path / kind, name))
        assert [clip.name for clip in catalog.clips] == clips and not catalog.skipped
        assert catalog.class_names == ([] if name in ("ffs", "sky", "taichi") else ["A", "B"])
    both = build_catalog(config(tmp_path, name, labels="none"))
    kinds = {clip.name.split("/")[0] for clip in both.clips}
    assert kinds == {"folder": {"frames", "videos"}, "sky": {"frames"}, "taichi": {"frames"}}.get(name, {"videos"})


@pytest.mark.parametrize("name", ["ucf101", "demo"])
def test_class_folders(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "Yo/v_Yo_g01_c01.avi", "Archery/v_Archery_g01_c02.mp4", "Archery/v_Archery_g01_c01.avi")
    catalog = build_catalog(config(tmp_path, name))
    assert catalog.class_names == ["Archery", "Yo"]
    assert [clip.label for clip in catalog.clips] == [0, 0, 1]
    unlabelled = build_catalog(config(tmp_path, name, labels="none"))
    assert unlabelled.num_classes == 0 and [clip.label for clip in unlabelled.clips] == [0, 0, 0]


def test_clip_outside_the_class_folders_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "Yo/a.avi", "stray.avi")
    with pytest.raises(ValueError, match=r"stray\.avi' lies in no class folder"):
        build_catalog(config(tmp_path, "ucf101"))


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["a/1.mp4", "b/2.mp4"], ["a", "b"]),
        (["a/1.mp4", "a/2.mp4"], []),  # one class says nothing
        (["1__x.mp4", "2__y.mp4"], ["x", "y"]),
        (["a/1__x.mp4", "2__y.mp4"], ["x", "y"]),  # not all in folders
        (["1.mp4", "a/2.mp4"], []),
        (["1__.mp4", "2__y.mp4"], []),
        ([*frames("a/c1", 7), *frames("b/c2", 7)], ["a", "b"]),
        ([*frames("c1", 7), *frames("c2", 7)], []),
        ([*frames("c1__x", 7), *frames("c2__y.z", 7)], ["x", "y.z"]),
    ],
)
def test_auto_labels_follow_the_layout(tmp_path: Path, names: list[str], classes: list[str]) -> None:
    assert build_catalog(config(touch(tmp_path, *names))).class_names == classes


def test_labels_from_file_names(tmp_path: Path) -> None:
    touch(tmp_path, "set/a__b__hello.world.mkv", "set/c__again.mkv", "set/d__again.mp4")
    catalog = build_catalog(config(tmp_path, labels="file_name"))
    assert catalog.class_names == ["again", "hello.world"]
    assert [clip.label for clip in catalog.clips] == [1, 0, 0]
    touch(tmp_path, "set/unnamed.mp4")
    with pytest.raises(ValueError, match=r"unnamed\.mp4' has no '__'"):
        build_catalog(config(tmp_path, labels="file_name"))


@pytest.mark.skipif(not ASL.is_dir(), reason="the sample clips of ../shared/media are not here")
def test_sign_language_clips_give_13_classes() -> None:
    for labels in ("file_name", "auto"):
        catalog = build_catalog(config(ASL, labels=labels))
        assert catalog.num_classes == len(catalog.clips) == 13
        assert catalog.class_names[0] == "again" and catalog.class_names[-1] == "want"


def test_images_beside_videos_are_strays(tmp_path: Path) -> None:
    touch(tmp_path, "a/clip.mp4", *frames("a", 9), *frames("b", 9))
    catalog = build_catalog(config(tmp_path))
    assert [clip.name for clip in catalog.clips] == ["a/clip.mp4", "b"]
    assert catalog.skipped == {"*.jpg": 9}


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


def test_order_does_not_depend_on_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, *(f"{folder}/{name}.mp4" for folder in "cab" for name in "312"))
    listed = build_catalog(config(tmp_path))
    scan = os.scandir

    class Reversed:
        def __init__(self, path: object) -> None:
            self.entries = sorted(scan(path), key=lambda entry: entry.name, reverse=True)  # type: ignore[call-overload]

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Reversed)
    assert build_catalog(config(tmp_path)) == listed


def test_max_clips_keeps_all_class_names(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.mp4", "b/2.mp4", "c/3.mp4")
    catalog = build_catalog(config(tmp_path, max_clips=2))
    assert len(catalog.clips) == 2 and catalog.class_names == ["a", "b", "c"]


@pytest.mark.parametrize("name", FOUND)
def test_missing_and_empty_folders_are_sentences(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.path: there is no folder '.*gone'"):
        build_catalog(config(tmp_path / "gone", name))
    with pytest.raises(ValueError, match=r"holds none \(found: nothing at all\)"):
        build_catalog(config(tmp_path, name))
    touch(tmp_path, "a.txt", "b.txt", ".hidden")
    with pytest.raises(ValueError, match=rf"data\.name={name} needs .* holds none \(found: 2 \*\.txt, 1 hidden\)"):
        build_catalog(config(tmp_path, name))
    with pytest.raises(ValueError, match="is a file, not a folder"):
        build_catalog(config(tmp_path / "a.txt", name))
    with pytest.raises(ValueError, match=r"data\.path is empty"):
        build_catalog(DataConfig(name=name))


def test_only_short_folders_is_a_sentence(tmp_path: Path) -> None:
    touch(tmp_path, *frames("a", 3), *frames("b", 5))
    with pytest.raises(ValueError, match=r"none of the 2 clips .* has the 7 frames .* \(the longest has 5\)"):
        build_catalog(config(tmp_path, "sky"))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"name": "ucf"}, r"data\.name: 'ucf' is unknown.*did you mean 'ucf101'"),
        ({"labels": "folders"}, r"data\.labels: 'folders' is unknown"),
        ({"reader": "opencv"}, r"data\.reader: 'opencv' is unknown"),
        ({"num_frames": 0}, r"data\.num_frames: 0 must be a whole number of at least 1"),
        ({"frame_interval": -5}, r"data\.frame_interval: -5"),
        ({"image_size": 1.5}, r"data\.image_size: 1\.5"),
        ({"num_images": -1}, r"data\.num_images: -1"),
        ({"max_clips": True}, r"data\.max_clips: True"),
        ({"frame_list": "train_list.txt"}, r"data\.frame_list is read only in joint training"),
    ],
)
def test_wrong_values_are_sentences(keys: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DataConfig(**keys)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------- frame lists


def listed(root: Path, text: str, **keys: object) -> list[tuple[str, int]]:
    """(name, label) of the images in a frame list."""
    (root / "train_list.txt").write_text(text)
    wanted = config(root, num_images=1, frame_list=str(root / "train_list.txt"), **keys)
    return [(clip.name, clip.label) for clip in read_frame_list(wanted, build_catalog(wanted))]


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    return touch(tmp_path, "A/v_A_g01_c01.avi", "B/v_B_g01_c01.avi", "B/b 1.jpg", "f/v_B_g01_c01_7.jpg", "f/x.jpg")


def test_frame_list_labels(classes: Path) -> None:
    rows = "B/b 1.jpg\nf/v_B_g01_c01_7.jpg\n\nf/x.jpg A\nf/x.jpg 1\r\n"
    assert listed(classes, rows, labels="class_folders") == [
        ("B/b 1.jpg", 1),
        ("f/v_B_g01_c01_7.jpg", 1),
        ("f/x.jpg", 0),
        ("f/x.jpg", 1),
    ]
    assert listed(classes, "f/x.jpg\n", labels="none") == [("f/x.jpg", 0)]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("../out.jpg", "must be a path below"),
        ("f/../../out.jpg", "must be a path below"),
        ("/etc/out.jpg", "must be a path below"),
        ("http://localhost/x.jpg", "is not a plain path"),
        ("concat:f/x.jpg", "is not a plain path"),
        ("f/\0x.jpg", "is not a plain path"),
        ("f/\rx.jpg", "is not a plain path"),
        ("link.jpg", "leads out of"),
        ("f/gone.jpg", "there is no file"),
        ("f/x.jpg C", "'C' names none of the 2 classes"),
        ("f/x.jpg 2", "'2' names none of the 2 classes"),
        ("f/x.jpg", "names none of the 2 classes"),
        ("A/v_A_g01_c01.avi", "is not an image"),
    ],
)
def test_bad_frame_list_entries_name_their_line(classes: Path, row: str, sentence: str) -> None:
    outside = touch(classes.parent / f"{classes.name}_outside", "out.jpg") / "out.jpg"
    (classes / "link.jpg").symlink_to(outside)
    with pytest.raises((ValueError, FileNotFoundError), match=f"line 2: .*{sentence}"):
        listed(classes, f"B/b 1.jpg\n{row}\n", labels="class_folders")


def test_missing_and_empty_frame_lists(classes: Path) -> None:
    with pytest.raises(ValueError, match="is empty"):
        listed(classes, "\n")
    wanted = dataclasses.replace(config(classes, num_images=1), frame_list="gone.txt")
    with pytest.raises(FileNotFoundError, match=r"data\.frame_list: there is no file 'gone\.txt'"):
        read_frame_list(wanted, build_catalog(config(classes)))


def test_every_choice_of_labels_has_a_rule() -> None:
    assert {"auto", *LABEL_RULES} == set(LABEL_CHOICES)
    assert {recipe.labels for recipe in RECIPES.values()} <= {*LABEL_CHOICES, "captions"}
