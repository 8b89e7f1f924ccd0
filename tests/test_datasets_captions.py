"""Lists of captions: the kinds of file, the columns, what is refused with its line, and which clips they give."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from datasets import build_dataset, build_held_out
from datasets.config import DataConfig
from tests.conftest import refuses
from tests.text_support import CAPTIONS, draw_captioned, write_captions


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_captioned(tmp_path_factory.mktemp("captioned"))


def config(path: Path, **changes: object) -> DataConfig:
    settings = {"num_frames": 4, "frame_interval": 1, "image_size": 8, "num_workers": 0, **changes}
    return DataConfig(name="captions", path=str(path), **settings)  # type: ignore[arg-type]


def captions_by_clip(data: DataConfig) -> dict[str, str]:
    dataset = build_dataset(data, seed=0)
    return {clip.name: dataset.captions[clip.label] for clip in dataset.catalog.clips}


ROWS = [{"video": file, "text": caption} for file, caption in CAPTIONS.items()]
CSV = "video,text\n" + "".join(f'{row["video"]},"{row["text"]}"\n' for row in ROWS)
WRITERS: dict[str, Callable[[Path], object]] = {
    ".csv": lambda file: file.write_text(CSV, encoding="utf-8-sig"),
    ".jsonl": lambda file: file.write_text("".join(json.dumps(row) + "\n" for row in ROWS)),
    ".parquet": lambda file: parquet.write_table(pyarrow.Table.from_pylist(ROWS), file),
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_all_kinds_of_list_say_the_same(captioned: Path, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"list{suffix}"
    WRITERS[suffix](file)
    assert captions_by_clip(config(captioned, captions=str(file))) == CAPTIONS


def test_a_sample_carries_its_captions_number(captioned: Path, tmp_path: Path) -> None:
    dataset = build_dataset(config(captioned, num_images=1), seed=0)
    assert dataset.captions == sorted(set(CAPTIONS.values()))
    assert dataset.num_classes == 0
    for index, clip in enumerate(dataset.catalog.clips):
        sample = dataset[0, index]
        assert sample["video"].shape == (5, 3, 8, 8)
        assert dataset.captions[int(sample["labels"][0])] == CAPTIONS[clip.name]
    changed = tmp_path / "list.csv"
    changed.write_text((captioned / "captions.csv").read_text().replace("a kite", "a gull"))
    assert build_dataset(config(captioned, captions=str(changed)), seed=0).digest != dataset.digest


def test_a_clip_may_have_many_captions(captioned: Path, tmp_path: Path) -> None:
    file = tmp_path / "list.jsonl"
    rows = [{"file": "falls/clip0", "caption": text} for text in ("it falls", "something falls")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = build_dataset(config(captioned, captions=str(file)), seed=0)
    assert [clip.name for clip in dataset.catalog.clips] == ["falls/clip0"] * 2
    assert [clip.label for clip in dataset.catalog.clips] == [0, 1]


def test_webvid(tmp_path: Path) -> None:
    for folder, name in (("000_050", "11"), ("051_100", "12")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.mp4").write_bytes(b"not opened here")
    text = 'videoid,contentUrl,duration,page_dir,name\n11,https://a/11.mp4,PT00H00M10S,000_050,"Sea, at dusk"\n'
    (tmp_path / "results.csv").write_text(text + "12,https://a/12.mp4,PT00H00M11S,051_100,A cat\n")
    found = captions_by_clip(config(tmp_path, captions=str(tmp_path / "results.csv")))
    assert found == {"000_050/11.mp4": "Sea, at dusk", "051_100/12.mp4": "A cat"}


def test_image_text_pairs(captioned: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "images.csv"
    pairs.write_text("file,caption\nfalls/clip0/000.png,a still of a stone\nrises/clip1/003.png,smoke rises\n")
    dataset = build_dataset(config(captioned, num_images=2, frame_list=str(pairs)), seed=0)
    assert dataset.captions == [*sorted(set(CAPTIONS.values())), "a still of a stone"]
    seen = {dataset.captions[int(label)] for index in range(6) for label in dataset[0, index]["labels"][1:]}
    assert seen == {"a still of a stone", "smoke rises"}


def test_held_out_clips_keep_the_numbers(captioned: Path, tmp_path: Path) -> None:
    other = draw_captioned(tmp_path / "other")
    write_captions(other, {"falls/clip0": "a leaf falls", "rises/clip0": "an owl rises"})
    data = config(captioned, val_path=str(other))
    clips = build_dataset(data, seed=0)
    held_out = build_held_out(data, clips, seed=0)
    assert held_out.captions == [*clips.captions, "an owl rises"]
    labels = [clip.label for clip in held_out.catalog.clips]
    assert [held_out.captions[label] for label in labels] == ["a leaf falls", "an owl rises"]
    shared = config(captioned, val_share=0.4)
    parts = build_dataset(shared, seed=0), build_held_out(shared, build_dataset(shared, seed=0), seed=0)
    names = [clip.name for part in parts for clip in part.catalog.clips]
    assert sorted(names) == sorted(CAPTIONS)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (".csv", b"file,caption\nfalls/clip0,a\nfalls/clip1,\n", "line 3: the caption is empty"),
        (".csv", b"file,caption\nfalls/clip0,a\nfalls/clip9,b\n", "line 3: there is no 'falls/clip9' in data.path"),
        (".csv", b"file,caption\nfalls/clip0,a stone, falling\n", "line 2: values and columns differ in number"),
        (".csv", b"file,label\nfalls/clip0,a\n", "no column caption or text or prompt or name among file, label"),
        (".csv", b"clip,caption\nfalls/clip0,a\n", r"no column file or .* name it with data\.file_column"),
        (".csv", b"file,caption\n../secret,a\n", r"line 2: '\.\./secret' must be a path below data\.path"),
        (".csv", b"file,caption\nfalls/clip0/000.png,a\n", r"line 2: 'falls/clip0/000\.png' is not a video"),
        (".csv", b"file,caption\nfalls,a\n", "line 2: 'falls' is a folder without frames"),
        (".csv", b"", "is empty"),
        (".csv", b'file,caption\nfalls/clip0,"a\n', r"line \d+: unexpected end of data"),
        (".csv", b"file,caption\nfalls/clip0,\xff\n", "is not text in UTF-8"),
        (".jsonl", b'{"file": "falls/clip0", "caption": "a"}\nfalls', "line 2: this is not one JSON object"),
        (".jsonl", b"[" * 100_000, "line 1: this is not one JSON object"),
        (".jsonl", b'{"file": "falls/clip0", "caption": "a"}\n{"file": "x"}', "line 2: there is no 'caption'"),
        (".parquet", b"PAR1 and no more", "cannot be read as Parquet"),
        (".txt", b"a", r"is none of \.csv, \.jsonl, \.parquet"),
    ],
)
def test_broken_lists(captioned: Path, tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    file = tmp_path / f"list{name}"
    file.write_bytes(content)
    refuses(sentence, build_dataset, config(captioned, captions=str(file), strict=True), seed=0)


def test_a_list_must_be_found_and_links_to_elsewhere_are_refused(captioned: Path, tmp_path: Path) -> None:
    refuses(r"there is no file 'nothing.csv'", build_dataset, config(captioned, captions="nothing.csv"), seed=0)
    refuses("is not set, and .* holds neither of captions.csv", build_dataset, config(captioned / "falls"), seed=0)
    (tmp_path / "out").symlink_to(captioned / "falls" / "clip0")
    write_captions(tmp_path, {"out": "a stone falls"})
    refuses(r"line 2: 'out' leads out of data.path", build_dataset, config(tmp_path), seed=0)


def test_some_missing_videos_are_passed_over(captioned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "list.csv"
    file.write_text("file,caption\nfalls/clip0,a\ngone.mp4,b\nfalls/clip1,\nrises/clip0,c\n")
    with caplog.at_level(logging.WARNING):
        dataset = build_dataset(config(captioned, captions=str(file)), seed=0)
    assert [clip.name for clip in dataset.catalog.clips] == ["falls/clip0", "rises/clip0"]
    assert dataset.describe()["skipped"] == {"listed, but an empty caption": 1, "listed, but not there": 1}
    assert "line 3: there is no 'gone.mp4'" in caplog.text
    assert "2 of 4 lines cannot be used" in caplog.text
    with pytest.raises(ValueError, match=r"line 3: .*; 2 of 4 lines cannot be used, more than data.max_unusable=0.3"):
        build_dataset(config(captioned, captions=str(file), max_unusable=0.3), seed=0)
