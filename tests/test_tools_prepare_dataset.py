"""The four data sets in the layouts they are downloaded in -> what the training configs read, checked by reading it."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import train
from datasets import DataConfig, build_catalog, build_dataset
from datasets.catalog import Clip
from datasets.clips import ClipDataset
from datasets.labels import read_frame_list
from datasets.writer import write_video
from engine.config import load_config
from engine.start import check_clips
from tests.conftest import CLIPS, ROOT, needs_media, refuses
from tools import prepare_dataset
from tools.prepare_dataset import SOURCE_VIDEOS, Place, match_groups, split_by_hash, split_folders

RNG = np.random.default_rng(0)


def make(root: Path, *names: str, frames: int = 5) -> Path:
    """Writes noise under these names: folders of frames if they end in '/', else videos."""
    for name in names:
        path, clip = root / name, RNG.integers(0, 256, (frames, 24, 32, 3), dtype=np.uint8)
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
            for number, frame in enumerate(clip):
                Image.fromarray(frame).save(path / f"{path.name}_frames_{number:08d}.jpg")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, clip, 25)
    return root


def prepare(dataset: str, source: Path, out: Path, *flags: str) -> dict[str, Any]:
    prepare_dataset.main([dataset, str(source), str(out), "--workers", "1", *flags])
    return dict(json.loads((out / "report.json").read_text()))


def index_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]


def trained(dataset: str, out: Path, *more: str) -> ClipDataset:
    """The data set that the set's own training config gives with OUT/train; small windows."""
    small = ["data.num_frames=2", "data.frame_interval=2", "data.image_size=16", "data.num_workers=0"]
    overrides = [f"data.path={out / 'train'}", *small, *more]
    return build_dataset(load_config(ROOT / "configs" / dataset / f"{dataset}_train.yaml", overrides).data, seed=0)


CSV = "video_id,start,fps,partition\n_L745tFFmCQ,5583,25.0,test\nu6rJiF-gPx8,80,29.97,train\n"
TAICHI = ["_L745tFFmCQ#005583#005717.mp4", "_L745tFFmCQ#008295#008448.mp4", "u6rJiF-gPx8#000080#000300.mp4"]
BY_CSV = {f"c/{name}": f"{split}/c/{name}" for name, split in zip(TAICHI, ("test", "test", "train"))}
STRANGER = {"c/unknown0000#000001#000129.mp4": "its source video is not in the csv file"}
NESTED = {"a": "its folder holds other clips, and a link would list them twice: use --format png or jpeg"}
SKY = {f"s/sky_train/{name}": f"train/{name}" for name in ("A/A_1", "A/A_2", "B/B_1")}
ORIGINAL = {f"{split}/original/1.avi": f"{split}/original/1.avi" for split in ("train", "val", "test")}
ALTERED = {"train/altered/1.avi": "is in the folder altered, which holds no original videos"}


@pytest.mark.parametrize(
    ("dataset", "suffix", "texts", "flags", "paths", "skipped"),
    [
        ("sky", "/", {}, "", {**SKY, "s/sky_test/C/C_1": "test/C/C_1"}, {}),
        ("taichi", "", {"meta.csv": CSV}, "", BY_CSV, STRANGER),
        ("taichi", "", {}, "--format png", {f"val/{TAICHI[0]}": f"val/{TAICHI[0][:-4]}", "train/b.mkv": "train/b"}, {}),
        ("ffs", "", {}, "", ORIGINAL, ALTERED),
        ("folder", "/", {}, "--split all --labels none", {"a/b": "train/a/b"}, NESTED),
        ("folder", "/", {}, "--split all --labels none --format png", {"a/b": "train/a/b", "a": "train/a_"}, {}),
    ],
)  # fmt: skip
def test_layouts(
    tmp_path: Path, dataset: str, suffix: str, texts: dict[str, str], flags: str,
    paths: dict[str, str], skipped: dict[str, str],
) -> None:  # fmt: skip
    source, out = tmp_path / "in", tmp_path / "out"
    make(source, *(f"{name}{suffix}" for name in (*paths, *skipped)))
    for name, text in texts.items():
        (source / name).write_text(text)
    report = prepare(dataset, source, out, *flags.split())
    assert {entry["source"]: entry["path"] for entry in index_of(out)} == paths
    assert {entry["file"]: entry["reason"] for entry in report["skipped"]} == skipped
    below = sorted(path.removeprefix("train/") for path in paths.values() if path.startswith("train/"))
    data = trained(dataset, out, f"data.labels={report['labels']['train']}")
    assert [clip.name for clip in data.catalog.clips] == below
    assert (out / "train_clips.txt").read_text().splitlines() == below


def test_source_videos() -> None:
    for dataset, name, video in (
        ("ucf101", "Biking/v_Biking_g07_c02.avi", "Biking/v_Biking_g07"),
        ("taichi", "04ziAFt45qM#000104#000371.mp4", "04ziAFt45qM"),
        ("taichi", "a/_L745tFFmCQ_005583_005717", "_L745tFFmCQ"),  # as the official converter renames it
        ("sky", "07U1fSrk9oI/07U1fSrk9oI_1", "07U1fSrk9oI"),
        ("sky", "07U1fSrk9oI_12", "07U1fSrk9oI"),
        ("ffs", "videos/-2uYQt1Wm9I_2_3.avi", "-2uYQt1Wm9I"),
    ):
        assert match_groups([name], SOURCE_VIDEOS[dataset]) == [video]


def test_folders_called_train_count_only_if_all_clips_lie_in_one() -> None:
    for names, splits, below in (
        (["x/train/a/1.mp4", "test/2.mp4"], ["train", "test"], ["a/1.mp4", "2.mp4"]),
        (["train/1.mp4", "2.mp4"], ["", ""], ["train/1.mp4", "2.mp4"]),
        (["1/train.mp4"], [""], ["1/train.mp4"]),
    ):
        assert split_folders([Clip("", name, 1) for name in names], "folder") == (splits, below)


# By code point HammerThrow comes before Hammering, in classInd.txt after it; files of HandstandPushups say HandStand.
UCF = {"Hammering": "Hammering", "HammerThrow": "HammerThrow", "HandstandPushups": "HandStandPushups"}
ORDER = ["HammerThrow", "Hammering", "HandstandPushups"]
GROUPS, TEST_GROUPS = (1, 7, 8, 14, 15, 21, 25), {1: range(1, 8), 2: range(8, 15), 3: range(15, 22)}


@pytest.fixture(scope="module")
def ucf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive's class folders and the official lists, three classes of seven groups, and a clip in no list."""
    root = tmp_path_factory.mktemp("ucf")
    clips = [(f"{name}/v_{file}_g{group:02d}_c01.avi", group) for name, file in UCF.items() for group in GROUPS]
    make(root / "UCF-101", *(clip for clip, _ in clips), "Hammering/v_Hammering_g09_c07.avi")
    (root / "lists").mkdir()
    for number, test in TEST_GROUPS.items():
        label = {name: 35 + place for place, name in enumerate(UCF)}
        train = "".join(f"{clip} {label[clip.split('/')[0]]}\r\n" for clip, group in clips if group not in test)
        (root / "lists" / f"trainlist0{number}.txt").write_text(train)
        tested = "".join(f"{clip}\r\n" for clip, group in clips if group in test)
        (root / "lists" / f"testlist0{number}.txt").write_text(tested)
    return root


@pytest.mark.parametrize(("flag", "test"), [("auto", {1, 7}), ("2", {8, 14}), ("3", {15, 21})])
def test_ucf101_official_splits_and_class_order(ucf: Path, tmp_path: Path, flag: str, test: set[int]) -> None:
    report = prepare("ucf101", ucf, tmp_path, "--split", flag)
    assert report["splits"] == {"test": 6, "train": 15}
    [skipped] = report["skipped"]
    assert skipped["file"].endswith("g09_c07.avi") and skipped["reason"].startswith("is in neither list of split")
    index = index_of(tmp_path)
    assert {int(entry["source"][-10:-8]) for entry in index if entry["split"] == "test"} == test
    data = trained("ucf101", tmp_path)
    assert data.class_names == ORDER == [row["class"] for row in json.loads((tmp_path / "classes.json").read_text())]
    labels = {entry["path"].removeprefix("train/"): entry["label"] for entry in index}
    assert all(labels[clip.name] == clip.label for clip in data.catalog.clips)


def test_ucf101_frames_and_their_list_serve_joint_training(ucf: Path, tmp_path: Path) -> None:
    """`--group` decides what counts as one source video."""
    prepare("ucf101", ucf, tmp_path, "--format", "jpeg", "--size", "16", "--split", "all", "--group", r"(v_[A-Za-z]+)")
    assert {entry["source_video"] for entry in index_of(tmp_path)} == {f"v_{file}" for file in UCF.values()}
    data = trained("ucf101", tmp_path, "data.num_images=2", f"data.frame_list={tmp_path / 'train_frames.txt'}")
    assert len(data) == 22 and data.class_names == ORDER
    assert data.images is not None and len(data.images) == 22 * 5
    assert all(image.label == ORDER.index(image.name.split("/")[0]) for image in data.images)
    sample = data[0, 0]
    assert sample["video"].shape == (4, 3, 16, 16) and sample["labels"].shape == (3,)


def test_ucf101_without_lists_splits_by_group(ucf: Path, tmp_path: Path) -> None:
    source = ucf / "UCF-101"
    assert set(prepare("ucf101", source, tmp_path / "out", "--test_share", "0.4")["splits"]) == {"test", "train"}
    sentence = "--split 2 names a split of UCF101, whose lists were not found"
    refuses(sentence, prepare, "ucf101", source, tmp_path / "other", "--split", "2")


@needs_media
def test_real_clips_of_ucf101(tmp_path: Path) -> None:
    listed = json.loads((CLIPS.parent / "clips.json").read_text())
    known = {entry["file"].split("__")[-1]: (entry["bytes"], entry["sha256"]) for entry in listed}
    for name in ("C3D__v_ApplyEyeMakeup_g01_c01.avi", "vision__v_SoccerJuggling_g23_c01.avi"):
        real = name.split("__")[1]
        link = tmp_path / "in" / real.split("_")[1] / real
        link.parent.mkdir(parents=True)
        link.symlink_to(CLIPS / "action" / name)
    prepare("ucf101", tmp_path / "in", tmp_path / "out")
    entries = sorted(index_of(tmp_path / "out"), key=lambda entry: entry["label"])
    assert [(e["frames"], e["width"], e["height"]) for e in entries] == [(164, 320, 240), (240, 320, 240)]
    assert all((e["bytes"], e["sha256"]) == known[Path(e["source"]).name] for e in entries)


@pytest.mark.parametrize("dataset", ["sky", "taichi"])  # the two transforms
def test_training_sees_the_same_pixels_in_resized_frames(tmp_path: Path, dataset: str) -> None:
    make(tmp_path / "in", "train/A/A_1/", "train/B/B_1/")
    prepare(dataset, tmp_path / "in", tmp_path / "small", "--format", "png", "--size", "16")
    prepare(dataset, tmp_path / "in", tmp_path / "link")
    for index in range(2):
        small, full = (trained(dataset, tmp_path / out)[0, index]["video"] for out in ("small", "link"))
        assert (small - full).abs().max() < 0.501 / 127.5  # half a grey level
        assert not torch.equal(small, full)
    assert {(entry["height"], entry["source_height"]) for entry in index_of(tmp_path / "small")} == {(16, 24)}


def test_resized_videos_are_near_and_keep_their_rate(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    picture = np.stack([*np.meshgrid(ramp, ramp), np.full((64, 64), 90, np.uint8)], -1)
    write_video(tmp_path / "in" / "a.mp4", np.stack([np.roll(picture, shift, 1) for shift in range(6)]), 30)
    for kind in ("video", "png"):
        prepare("ffs", tmp_path / "in", tmp_path / kind, "--format", kind, "--size", "32", "--split", "all")
    flat = ["data.image_size=32", "data.horizontal_flip=false"]
    video, exact = (trained("ffs", tmp_path / kind, *flat)[0, 0]["video"] for kind in ("video", "png"))
    assert 10 * torch.log10(4 / (video - exact).square().mean()) > 40
    assert index_of(tmp_path / "video")[0]["fps"] == 30


def split_hashed(videos: list[tuple[str, str]], share: float, seed: int) -> list[str]:
    places = [Place(Clip("", "", 1), "", class_name=name, source_video=video) for name, video in videos]
    split_by_hash(places, share, seed)
    return [place.split for place in places]


PAIRS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("0123456789")), min_size=1)


@settings(deadline=None)
@given(PAIRS, PAIRS, st.floats(0, 0.99), st.integers(0, 5))
def test_no_source_video_is_on_both_sides(
    some: list[tuple[str, str]], more: list[tuple[str, str]], share: float, seed: int
) -> None:
    splits = split_hashed(some, share, seed)
    assert len({(video, split) for (_, video), split in zip(some, splits)}) == len({video for _, video in some})
    assert {name for name, _ in some} == {name for (name, _), split in zip(some, splits) if split == "train"}
    rest = [(f"{name}x", f"other{video}") for name, video in more]  # clips that are added move none
    assert split_hashed(some + rest, share, seed)[: len(some)] == splits


def test_hashed_share_and_seed() -> None:
    many = [("a", str(number)) for number in range(4000)]
    first = split_hashed(many, 0.1, 0)
    assert 340 < first.count("test") < 460  # 400, plus or minus three deviations
    assert first != split_hashed(many, 0.1, 1) and set(split_hashed(many, 0.0, 0)) == {"train"}


@pytest.mark.parametrize("classes", [0, 2])
@pytest.mark.parametrize("dataset", sorted(SOURCE_VIDEOS))
def test_the_printed_command_starts_as_it_is(
    tmp_path: Path, dataset: str, classes: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On clips of which one is too short for the recipe's window; it is said how many are."""
    names = [f"{'ab'[number % 2]}/v_{number}_g0{number}_c01.mp4" for number in range(3)]
    make(make(tmp_path / "my clips", *names, frames=48), "a/v_9_g09_c01.mp4", frames=9)
    labels = "class_folders" if classes or dataset == "ucf101" else "none"
    prepare(dataset, tmp_path / "my clips", tmp_path / "new set", "--split", "all", "--labels", labels)
    text = capsys.readouterr().out
    assert f"1 of 4 training clips have fewer than the {31 if dataset == 'folder' else 46} frames of a window" in text
    command = shlex.split(text.split("train with: ")[1].split("\nonce ")[0].replace("\\\n", ""))
    assert command[:2] == ["python", "train.py"]
    monkeypatch.chdir(ROOT)
    assert train.main([*command[2:], "--dry-run"]) == 0
    capsys.readouterr()
    config = load_config(command[3], command[4:])
    assert (config.codec.path is None, config.model.num_classes) == (False, 2 if labels != "none" else 0)
    check_clips(config, build_dataset(config.data, seed=0), world_size=1)
    assert ("once the autoencoder is in ./pretrained/taef2" in text) == (dataset == "folder")


def test_labels_of_file_names_and_the_printed_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "in", "a__again.mp4", "b__bird.mp4", "c__again.mp4")
    prepare("folder", tmp_path / "in", tmp_path / "out", "--split", "all", "--format", "png")
    text = capsys.readouterr().out
    assert "data.labels" not in text and "model.num_classes=2" in text  # the recipe reads file names
    joint = ["data.num_images=1", f"data.frame_list={tmp_path / 'out' / 'train_frames.txt'}"]
    data = trained("folder", tmp_path / "out", "data.labels=file_name", *joint)
    assert [data.class_names[clip.label] for clip in data.catalog.clips] == ["again", "bird", "again"]
    assert [image.label for image in (data.images or [])[::5]] == [0, 1, 0]


def test_awkward_names_survive_the_frame_list(tmp_path: Path) -> None:
    names = ("my class/a b", "my class/#1", "12:30/c", " lead/d", "1/e", "ü ß/f 1.png ", "%/g")
    make(tmp_path / "in", *(f"{name}.mp4" for name in names), frames=2)
    out = tmp_path / "out"
    prepare("folder", tmp_path / "in", out, "--split", "all", "--format", "png")
    config = DataConfig(path=str(out / "train"), num_frames=1, num_images=1, frame_list=str(out / "train_frames.txt"))
    catalog = build_catalog(config)
    images = read_frame_list(config, catalog)
    assert len(catalog.clips) == len(names) and len(images) == 2 * len(names)
    for image in images:
        assert Path(image.path).relative_to(out / "train").parts[0] == catalog.class_names[image.label]


def test_frames_of_different_sizes_and_short_clips_are_skipped(tmp_path: Path) -> None:
    source = make(make(tmp_path / "in", "mixed/", "good/"), "short/", frames=2)
    Image.new("RGB", (9, 9)).save(source / "mixed" / "mixed_frames_00000009.jpg")
    for name in ("notes.txt", ".hidden"):
        (source / name).write_text("")
    report = prepare("sky", source, tmp_path / "out", "--format", "png", "--min_frames", "3")
    reasons = {"mixed": "its frames differ in size (32x24, 9x9)", "short": "has 2 frames, fewer than min_frames=3"}
    assert {entry["file"]: entry["reason"] for entry in report["skipped"]} == reasons
    assert {entry["file"] for entry in report["left_out"]} == {"notes.txt", ".hidden"}
    assert [entry["source"] for entry in index_of(tmp_path / "out")] == ["good"]


def test_bad_values_are_sentences(tmp_path: Path) -> None:
    make(tmp_path / "in", "a.mp4")
    for flags, sentence in (
        ("--size 64", "size needs the format video, png or jpeg"),
        ("--group film", r"needs \(parentheses\)"),
        ("--test_share 1", "--test_share must be in"),
        ("--quality 0 --format jpeg", "quality must be in"),
        ("--quality 90 --format png", "quality needs the format jpeg, not png"),
        ("--labels class_folders", "is not in a class folder"),
    ):
        refuses(sentence, prepare, "folder", tmp_path / "in", tmp_path / "out", *flags.split())


def test_sources_without_clips_and_clips_of_others_are_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    refuses("holds no video files and no folders of frames", prepare, "sky", tmp_path / "in", tmp_path / "out")
    make(tmp_path / "in", "a.mp4")
    prepare("ffs", tmp_path / "in", tmp_path / "other", "--split", "all")
    make(tmp_path / "other", "train/b.mp4")
    sentence = "holds clips that this tool did not make"
    refuses(sentence, prepare, "ffs", tmp_path / "in", tmp_path / "other", "--split", "all")
