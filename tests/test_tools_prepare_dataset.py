"""The four data sets in the layouts they are downloaded in -> what the training configs read, checked by reading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets import DataConfig, build_catalog, build_dataset
from datasets.catalog import Clip
from datasets.clips import ClipDataset
from datasets.labels import read_frame_list
from engine.config import load_config
from tools import prepare_dataset
from tools.frames import write_video
from tools.prepare_dataset import LAYOUTS, Place, source_videos_of, split_by_hash, split_folders

ROOT = Path(__file__).resolve().parents[1]
CLIPS = ROOT.parent / "shared" / "media" / "clips"
needs_media = pytest.mark.skipif(not CLIPS.is_dir(), reason="the sample clips of ../shared/media are not here")
RNG = np.random.default_rng(0)


def noise(frames: int, height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def make_video(path: Path, frames: int = 5) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, noise(frames, 24, 32), 25)


def make_frames(folder: Path, frames: int = 5, suffix: str = ".jpg") -> None:
    folder.mkdir(parents=True)
    for number, frame in enumerate(noise(frames, 24, 32)):
        Image.fromarray(frame).save(folder / f"{folder.name}_frames_{number:08d}{suffix}")


def prepare(dataset: str, source: Path, out: Path, *flags: str) -> dict[str, Any]:
    prepare_dataset.main([dataset, str(source), str(out), "--workers", "1", *flags])
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def index_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]


def by_split(out: Path) -> dict[str, list[str]]:
    """Split -> the sources of its clips, from the index."""
    entries = index_of(out)
    return {split: [e["source"] for e in entries if e["split"] == split] for split in {e["split"] for e in entries}}


def trained(dataset: str, path: Path, *more: str) -> ClipDataset:
    """The data set that the set's own training config gives with this data.path; small windows."""
    small = ["data.num_frames=2", "data.frame_interval=2", "data.image_size=16", "data.num_workers=0"]
    overrides = [f"data.path={path}", *small, *more]
    return build_dataset(load_config(ROOT / "configs" / dataset / f"{dataset}_train.yaml", overrides).data, seed=0)


# -------------------------------------------------------------------------------------------------- UCF101

# By code point HammerThrow comes before Hammering, in classInd.txt after it; files of HandstandPushups say HandStand.
UCF = {"Hammering": "Hammering", "HammerThrow": "HammerThrow", "HandstandPushups": "HandStandPushups"}
ORDER = ["HammerThrow", "Hammering", "HandstandPushups"]
GROUPS, TEST_GROUPS = (1, 7, 8, 14, 15, 21, 25), {1: range(1, 8), 2: range(8, 15), 3: range(15, 22)}


@pytest.fixture(scope="module")
def ucf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive's class folders and the official lists, three classes of seven groups."""
    root = tmp_path_factory.mktemp("ucf")
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("".join(f"{i} {name}\r\n" for i, name in enumerate(UCF, 35)))
    clips = [(name, f"{name}/v_{file}_g{group:02d}_c01.avi", group) for name, file in UCF.items() for group in GROUPS]
    for _, clip, _ in clips:
        make_video(root / "UCF-101" / clip)
    for split, test in TEST_GROUPS.items():
        numbered = {name: i for i, name in enumerate(UCF, 35)}
        train_lines = [f"{clip} {numbered[name]}\r\n" for name, clip, group in clips if group not in test]
        (lists / f"trainlist0{split}.txt").write_text("".join(train_lines))
        test_lines = [f"{clip}\r\n" for _, clip, group in clips if group in test]
        (lists / f"testlist0{split}.txt").write_text("".join(test_lines))
    return root


@pytest.mark.parametrize(("flag", "test"), [("auto", (1, 7)), ("1", (1, 7)), ("2", (8, 14)), ("3", (15, 21))])
def test_ucf101_official_splits_and_class_order(ucf: Path, tmp_path: Path, flag: str, test: tuple[int, ...]) -> None:
    report = prepare("ucf101", ucf, tmp_path / "out", "--split", flag)
    assert report["splits"] == {"test": 6, "train": 15} and report["skipped"] == report["remarks"] == []
    assert {int(name[-10:-8]) for name in by_split(tmp_path / "out")["test"]} == set(test)
    data = trained("ucf101", tmp_path / "out" / "train")
    assert (
        data.class_names == ORDER == [row["class"] for row in json.loads((tmp_path / "out/classes.json").read_text())]
    )
    labels = {entry["path"].removeprefix("train/"): entry["label"] for entry in index_of(tmp_path / "out")}
    assert all(labels[clip.name] == clip.label for clip in data.catalog.clips)
    assert data[0, 3]["video"].shape == (2, 3, 16, 16)
    listed = (tmp_path / "out" / "train_clips.txt").read_text().splitlines()
    assert listed == [clip.name for clip in data.catalog.clips]


def test_ucf101_frames_and_their_list_serve_joint_training(ucf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare("ucf101", ucf, out, "--format", "jpeg", "--size", "16", "--split", "all")
    joint = ["data.num_images=2", f"data.frame_list={out / 'train_frames.txt'}"]
    data = trained("ucf101", out / "train", *joint)
    assert len(data) == 21 and data.class_names == ORDER
    assert data.images is not None and len(data.images) == 21 * 5
    assert all(image.label == ORDER.index(image.name.split("/")[0]) for image in data.images)
    sample = data[0, 0]
    assert sample["video"].shape == (4, 3, 16, 16) and sample["labels"].shape == (3,)


def test_ucf101_without_lists_splits_by_group(ucf: Path, tmp_path: Path) -> None:
    source = tmp_path / "videos"
    source.symlink_to(ucf / "UCF-101")
    report = prepare("ucf101", source, tmp_path / "out", "--test_share", "0.4")
    assert set(report["splits"]) == {"test", "train"}
    with pytest.raises(ValueError, match="--split 2 names a split of UCF101, whose lists are not there"):
        prepare("ucf101", source, tmp_path / "other", "--split", "2")
    lists = prepare("ucf101", source, tmp_path / "third", "--lists", str(ucf / "ucfTrainTestlist"))
    assert lists["splits"] == {"test": 6, "train": 15}


def test_ucf101_clip_in_no_list_is_skipped(ucf: Path, tmp_path: Path) -> None:
    make_video(tmp_path / "in" / "UCF-101" / "Hammering" / "v_Hammering_g09_c07.avi")
    make_video(tmp_path / "in" / "UCF-101" / "Hammering" / "v_Hammering_g08_c01.avi")
    report = prepare("ucf101", tmp_path / "in", tmp_path / "out", "--lists", str(ucf / "ucfTrainTestlist"))
    assert report["skipped"] == [
        {"file": "UCF-101/Hammering/v_Hammering_g09_c07.avi", "reason": "is in neither list of split 1"}
    ]


@needs_media
def test_real_clips_of_ucf101(tmp_path: Path) -> None:
    for name in ("C3D__v_ApplyEyeMakeup_g01_c01.avi", "vision__v_SoccerJuggling_g23_c01.avi"):
        real = name.split("__")[1]
        folder = tmp_path / "in" / "UCF-101" / real.split("_")[1]
        folder.mkdir(parents=True)
        (folder / real).symlink_to(CLIPS / "action" / name)
    prepare("ucf101", tmp_path / "in", tmp_path / "out")
    entries = {entry["class"]: entry for entry in index_of(tmp_path / "out")}
    assert [(e["frames"], e["width"], e["height"], e["label"]) for _, e in sorted(entries.items())] == [
        (164, 320, 240, 0),
        (240, 320, 240, 1),
    ]
    listed = json.loads((CLIPS.parent / "clips.json").read_text())
    sums = {entry["file"].split("__")[-1]: (entry["bytes"], entry["sha256"]) for entry in listed}
    assert all((e["bytes"], e["sha256"]) == sums[Path(e["source"]).name] for e in entries.values())


# -------------------------------------------------------------------------- SkyTimelapse, Taichi-HD, FaceForensics


def make_sky(root: Path) -> Path:
    for clip in ("sky_train/A/A_1", "sky_train/A/A_2", "sky_train/B/B_1", "sky_test/C/C_1"):
        make_frames(root / "sky_timelapse" / clip)
    return root


def test_sky_timelapse(tmp_path: Path) -> None:
    make_sky(tmp_path / "in")
    prepare("sky", tmp_path / "in", tmp_path / "out")
    data = trained("sky", tmp_path / "out" / "train")
    assert [clip.name for clip in data.catalog.clips] == ["A/A_1", "A/A_2", "B/B_1"]
    assert by_split(tmp_path / "out")["test"] == ["sky_timelapse/sky_test/C/C_1"]
    assert [entry["source_video"] for entry in index_of(tmp_path / "out")] == ["C", "A", "A", "B"]


@pytest.mark.parametrize("dataset", ["sky", "taichi"])  # the two transforms
def test_training_sees_the_same_pixels_in_resized_frames(tmp_path: Path, dataset: str) -> None:
    make_sky(tmp_path / "in")
    prepare(dataset, tmp_path / "in", tmp_path / "small", "--format", "png", "--size", "16")
    prepare(dataset, tmp_path / "in", tmp_path / "link")
    for index in range(3):
        small, full = (trained(dataset, tmp_path / out / "train")[0, index]["video"] for out in ("small", "link"))
        assert (small - full).abs().max() < 0.501 / 127.5  # half a grey level
        assert not torch.equal(small, full)
    assert {(entry["height"], entry["source_height"]) for entry in index_of(tmp_path / "small")} == {(16, 24)}


def test_resized_videos_are_near_and_keep_their_rate(tmp_path: Path) -> None:
    path = tmp_path / "in" / "a.mp4"
    path.parent.mkdir()
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    picture = np.stack([*np.meshgrid(ramp, ramp), np.full((64, 64), 90, np.uint8)], -1)
    smooth = np.stack([np.roll(picture, shift, 1) for shift in range(6)])
    write_video(path, smooth, 30)
    prepare("ffs", tmp_path / "in", tmp_path / "out", "--format", "video", "--size", "32", "--split", "all")
    prepare("ffs", tmp_path / "in", tmp_path / "png", "--format", "png", "--size", "32", "--split", "all")
    flat = ["data.image_size=32", "data.horizontal_flip=false"]
    small, exact = (trained("ffs", tmp_path / out / "train", *flat)[0, 0]["video"] for out in ("out", "png"))
    assert 10 * torch.log10(4 / (small - exact).square().mean()) > 40
    assert (index_of(tmp_path / "out")[0]["fps"], index_of(tmp_path / "out")[0]["path"]) == (30, "train/a.mp4")


TAICHI = ["_L745tFFmCQ#005583#005717", "_L745tFFmCQ#008295#008448", "u6rJiF-gPx8#000080#000300"]


@pytest.mark.parametrize("kind", ["videos", "frames"])
def test_taichi_by_the_partition_of_its_csv(tmp_path: Path, kind: str) -> None:
    for name in TAICHI:
        make = make_video if kind == "videos" else make_frames
        make(tmp_path / "in" / "taichi" / f"{name}.mp4")
    make_video(tmp_path / "in" / "taichi" / "unknown0000#000001#000129.mp4")
    rows = "video_id,start,end,bbox,fps,width,height,partition\n_L745tFFmCQ,5583,5717,1-2-3-4,25.0,9,9,test\n"
    (tmp_path / "in" / "taichi-metadata.csv").write_text(rows + "u6rJiF-gPx8,80,300,1-2-3-4,29.97,9,9,train\n")
    report = prepare("taichi", tmp_path / "in", tmp_path / "out")
    assert report["splits"] == {"test": 2, "train": 1}
    assert report["skipped"][0]["reason"] == "its source video is not in the csv file"
    assert {Path(name).name for name in by_split(tmp_path / "out")["test"]} == {f"{name}.mp4" for name in TAICHI[:2]}
    assert [clip.name for clip in trained("taichi", tmp_path / "out" / "train").catalog.clips] == [
        f"taichi/{TAICHI[2]}.mp4"
    ]


def test_taichi_with_folders_of_splits_keeps_them(tmp_path: Path) -> None:
    for split, name in zip(("train", "test", "train"), TAICHI):
        make_frames(tmp_path / "in" / split / f"{name}.mp4", suffix=".png")
    prepare("taichi", tmp_path / "in", tmp_path / "out", "--format", "png", "--size", "16")
    assert [entry["path"] for entry in index_of(tmp_path / "out")] == [
        f"{split}/{name}" for split, name in (("test", TAICHI[1]), ("train", TAICHI[0]), ("train", TAICHI[2]))
    ]
    joint = ["data.num_images=1", f"data.frame_list={tmp_path / 'out' / 'train_frames.txt'}"]
    assert trained("taichi", tmp_path / "out" / "train", *joint)[0, 0]["video"].shape == (3, 3, 16, 16)


def test_face_forensics_takes_the_originals(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        for kind in ("original", "altered", "mask"):
            make_video(tmp_path / "in" / split / kind / f"{split}.avi")
    report = prepare("ffs", tmp_path / "in", tmp_path / "out")
    assert report["splits"] == {"test": 1, "train": 1, "val": 1} and len(report["skipped"]) == 6
    assert all("no original videos" in entry["reason"] for entry in report["skipped"])
    assert len(trained("ffs", tmp_path / "out" / "train")) == 1


@pytest.mark.parametrize(
    ("dataset", "name", "video"),
    [
        ("ucf101", "Biking/v_Biking_g07_c02.avi", "Biking/v_Biking_g07"),
        ("taichi", "04ziAFt45qM#000104#000371.mp4", "04ziAFt45qM"),
        ("taichi", "a/_L745tFFmCQ_005583_005717", "_L745tFFmCQ"),  # as the official converter renames it
        ("sky", "07U1fSrk9oI/07U1fSrk9oI_1", "07U1fSrk9oI"),
        ("sky", "07U1fSrk9oI_12", "07U1fSrk9oI"),
        ("ffs", "videos/-2uYQt1Wm9I_2_3.avi", "-2uYQt1Wm9I"),
        ("ffs", "000.mp4", "000.mp4"),
        ("folder", "a/b c.mp4", "a/b c.mp4"),
    ],
)
def test_source_videos(dataset: str, name: str, video: str) -> None:

    assert source_videos_of([name], LAYOUTS[dataset].source_video) == [video]


# ---------------------------------------------------------------------------------------------- hashed splits


def places(videos: list[tuple[str, str]]) -> list[Place]:
    """Places of (class, source video), a clip each."""
    clip = Clip("", "", 1)
    return [
        Place(clip, str(number), class_name=name, source_video=video) for number, (name, video) in enumerate(videos)
    ]


PAIRS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("0123456789")), min_size=1)


@settings(deadline=None)
@given(PAIRS, PAIRS, st.floats(0, 0.99), st.integers(0, 5))
def test_no_source_video_is_on_both_sides(
    some: list[tuple[str, str]], more: list[tuple[str, str]], share: float, seed: int
) -> None:
    done = split_by_hash(places(some), share, seed)
    sides: dict[str, set[str]] = {}
    for place in done:
        sides.setdefault(place.source_video, set()).add(place.split)
    assert all(len(side) == 1 for side in sides.values())
    assert {p.class_name for p in done} == {p.class_name for p in done if p.split == "train"}
    rest = [(f"{name}x", f"other{video}") for name, video in more]  # what is added elsewhere moves nothing
    assert [place.split for place in split_by_hash(places(some + rest), share, seed)[: len(some)]] == [
        place.split for place in done
    ]


def test_hashed_share_and_seed() -> None:
    many = [("a", str(number)) for number in range(4000)]
    first = [place.split for place in split_by_hash(places(many), 0.1, 0)]
    assert 340 < first.count("test") < 460  # 400, plus or minus three deviations
    assert first != [place.split for place in split_by_hash(places(many), 0.1, 1)]
    assert {place.split for place in split_by_hash(places(many), 0.0, 0)} == {"train"}


def test_folders_called_train_count_only_if_all_clips_lie_in_one() -> None:
    def clips(*names: str) -> list[Clip]:
        return [Clip("", name, 1) for name in names]

    layout = LAYOUTS["folder"]
    assert split_folders(clips("x/train/a/1.mp4", "test/2.mp4"), layout) == (["train", "test"], ["a/1.mp4", "2.mp4"])
    assert split_folders(clips("train/1.mp4", "2.mp4"), layout) == ([None, None], ["train/1.mp4", "2.mp4"])
    assert split_folders(clips("1/train.mp4"), layout) == ([None], ["1/train.mp4"])


# ------------------------------------------------------------------------------------------------ any folder


def test_labels_of_file_names_and_the_printed_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a__again", "b__bird", "c__again"):
        make_video(tmp_path / "in" / f"{name}.mp4")
    prepare("folder", tmp_path / "in", tmp_path / "out", "--split", "all", "--format", "png")
    text = capsys.readouterr().out
    assert "data.labels=file_name" in text and "model.num_classes=2" in text
    data = trained("folder", tmp_path / "out" / "train", "data.labels=file_name")
    assert [data.class_names[clip.label] for clip in data.catalog.clips] == ["again", "bird", "again"]
    joint = ["data.num_images=1", f"data.frame_list={tmp_path / 'out' / 'train_frames.txt'}"]
    images = trained("folder", tmp_path / "out" / "train", "data.labels=file_name", *joint).images or []
    assert [image.label for image in images[::5]] == [0, 1, 0]


AWKWARD = [
    "my class/a b.mp4",
    "my class/#1.mp4",
    "12:30/c.mp4",
    " lead/d.mp4",
    "1/e.mp4",
    "ü ß/f 1.png .mp4",
    "%/g.mp4",
]


def test_awkward_names_survive_the_frame_list(tmp_path: Path) -> None:
    for name in AWKWARD:
        make_video(tmp_path / "in" / name, 2)
    out = tmp_path / "out"
    prepare("folder", tmp_path / "in", out, "--split", "all", "--format", "png")
    wanted = DataConfig(
        path=str(out / "train"), num_frames=1, frame_interval=1, num_images=1, frame_list=str(out / "train_frames.txt")
    )
    catalog = build_catalog(wanted)
    images = read_frame_list(wanted, catalog)
    assert len(catalog.clips) == len(AWKWARD) and len(images) == 2 * len(AWKWARD)
    folder = {image.path: catalog.class_names[image.label] for image in images}
    assert all(Path(path).relative_to(out / "train").parts[0] == name for path, name in folder.items())


def test_nested_folders_of_frames(tmp_path: Path) -> None:
    make_frames(tmp_path / "in" / "a")
    make_frames(tmp_path / "in" / "a" / "b", frames=2)
    report = prepare("folder", tmp_path / "in", tmp_path / "link", "--labels", "none", "--split", "all")
    assert [entry["file"] for entry in report["skipped"]] == ["a"]
    prepare("folder", tmp_path / "in", tmp_path / "png", "--format", "png", "--labels", "none", "--split", "all")
    assert [(e["path"], e["frames"]) for e in index_of(tmp_path / "png")] == [("train/a/b", 2), ("train/a_", 5)]
    assert not list((tmp_path / "in").rglob("*.png"))


def test_frames_of_different_sizes_and_short_clips_are_skipped(tmp_path: Path) -> None:
    make_frames(tmp_path / "in" / "mixed")
    Image.new("RGB", (9, 9)).save(tmp_path / "in" / "mixed" / "mixed_frames_00000009.jpg")
    make_frames(tmp_path / "in" / "short", frames=2)
    make_frames(tmp_path / "in" / "good", frames=4)
    (tmp_path / "in" / "notes.txt").write_text("")
    (tmp_path / "in" / ".hidden").write_text("")
    report = prepare("sky", tmp_path / "in", tmp_path / "out", "--format", "png", "--min_frames", "3")
    assert {entry["file"]: entry["reason"] for entry in report["skipped"]} == {
        "mixed": "its frames differ in size (32x24, 9x9)",
        "short": "has 2 frames, fewer than min_frames=3",
    }
    assert {entry["file"] for entry in report["left_out"]} == {"notes.txt", ".hidden"}
    assert [entry["source"] for entry in index_of(tmp_path / "out")] == ["good"]


def test_group_keeps_what_belongs_together(tmp_path: Path) -> None:
    for video in range(6):
        for part in range(2):
            make_video(tmp_path / "in" / f"film{video} part{part}.mp4", 2)
    prepare("folder", tmp_path / "in", tmp_path / "out", "--group", r"(film\d+)", "--test_share", "0.5")
    entries = index_of(tmp_path / "out")
    assert {entry["source_video"] for entry in entries} == {f"film{video}" for video in range(6)}
    sides = {(entry["source_video"], entry["split"]) for entry in entries}
    assert len(sides) == 6 and {split for _, split in sides} == {"train", "test"}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--size", "64"], "size needs the format video, png or jpeg"),
        (["--group", "film"], r"needs \(parentheses\)"),
        (["--group", "("], "is no regular expression"),
        (["--test_share", "1"], "--test_share is 1.0"),
        (["--workers", "0"], "--workers is 0"),
        (["--quality", "90", "--format", "png"], "quality is of JPEG files: it needs the format jpeg, not png"),
        (["--lists", "x"], "--lists is of ucf101: leave it out for folder"),
        (["--csv", "x"], "--csv is of taichi: leave it out for folder"),
        (["--labels", "class_folders"], "lies in no class folder"),
    ],
)
def test_bad_values_are_sentences(tmp_path: Path, flags: list[str], sentence: str) -> None:
    make_video(tmp_path / "in" / "a.mp4")
    with pytest.raises(ValueError, match=sentence):
        prepare("folder", tmp_path / "in", tmp_path / "out", *flags)


def test_sources_without_clips_are_sentences(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match="holds no video files and no folders of frames"):
        prepare("sky", tmp_path / "in", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        prepare("sky", tmp_path / "gone", tmp_path / "out2")


def test_a_strange_clip_in_the_result_is_noticed(tmp_path: Path) -> None:
    make_video(tmp_path / "in" / "a.mp4")
    prepare("ffs", tmp_path / "in", tmp_path / "out", "--split", "all")
    make_video(tmp_path / "out" / "train" / "b.mp4")
    with pytest.raises(ValueError, match="holds other clips than were made there"):
        prepare("ffs", tmp_path / "in", tmp_path / "out", "--split", "all")
