"""Turn a downloaded data set into a folder that the training configs read, with index, splits and class map.

    python -m tools.prepare_dataset ucf101 DOWNLOADS data/ucf101                      links to the files, no copies
    python -m tools.prepare_dataset sky DOWNLOADS data/sky --format jpeg --size 256   resized frames
    python -m tools.prepare_dataset folder MY_VIDEOS data/mine --format video --size 64

SOURCE is the folder that holds what was unpacked, or a zip archive, which is checked and unpacked into OUT-unpacked.
OUT then holds:

    train/ test/ (val/)            the clips: data.path=OUT/train
    index.jsonl                    one clip a line: path, frames, size, rate, class, SHA-256, split, source video
    train_clips.txt ...            the clips of each split
    train_frames.txt ...           every frame, for data.frame_list (with --format png or jpeg)
    classes.json                   label -> class, as data.path=OUT/train numbers them
    report.json                    counts, and every file that was skipped, with the reason

A killed run goes on with the same command. Layouts, splits and what is assumed: docs/datasets.md.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import TimeoutError, get_context
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from engine import cli
from tools.frames import FORMATS, Form, Record, Task, frame_names, identity_of, output_names, unusable_name
from tools.output_folder import (
    LeftOut,
    OutputFolder,
    collect_settings,
    left_out_recorder,
    make_report,
    print_report,
    require_some,
)

if TYPE_CHECKING:
    from datasets.catalog import Clip

# Folders that say which split their clips belong to, in any of the data sets.
SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training", "sky_train"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "sky_val"), "val"),
    **dict.fromkeys(("test", "testing", "sky_test"), "test"),
}
GROUP_SECONDS = 20  # limit for matching --group, plus a millisecond per clip
SPLITS = ("auto", "1", "2", "3", "hash", "all")
# FaceForensics: manipulated videos and their masks, which are not what a generator should learn.
NOT_ORIGINAL = {"altered", "mask", "masks", "manipulated_sequences"}


@dataclass(frozen=True)
class Layout:
    """Meaning of the file names of a data set.

    `depth`: folders and file that count, from the end (None: all that stand below the split's folder).
    `source_video`: matches in a clip's name what it shares with the other clips of one source video.
    `refused`: folders whose clips are not wanted.
    """

    source_video: str
    depth: int | None = None
    refused: frozenset[str] = frozenset()


LAYOUTS: dict[str, Layout] = {
    "ffs": Layout(r"(?:^|/)([\w-]{11})_\d+(?:[_.]|$)", refused=frozenset(NOT_ORIGINAL)),
    "sky": Layout(r"^(.+)/[^/]+$|^(.+?)_\d+$"),
    "taichi": Layout(r"(?:^|/)([^/#]+?)[#_]\d+[#_]\d+(?:\.\w+)?$"),
    "ucf101": Layout(r"^(.+)_c\d+(?:\.\w+)?$", depth=2),
    "folder": Layout(r"^(.+)$"),
}


@dataclass(frozen=True)
class Place:
    """Place of a clip: split, class, source video; or the `problem` that leaves it out."""

    clip: Clip
    name: str  # below OUT/SPLIT, before its extension changes
    split: str = ""
    class_name: str | None = None
    source_video: str = ""
    problem: str | None = None


# --------------------------------------------------------------------------------- names, classes, splits


def places_of(clips: Sequence[Clip], arguments: argparse.Namespace) -> list[Place]:
    """The place of each clip by the data set's layout. ValueError where names do not fit it."""
    from datasets.labels import find_class_names
    from datasets.recipes import RECIPES

    layout = LAYOUTS[arguments.dataset]
    folders, names = split_folders(clips, layout)
    labels = arguments.labels if arguments.labels != "auto" else RECIPES[arguments.dataset].labels
    classes = find_class_names([replace(clip, name=name) for clip, name in zip(clips, names)], labels)
    videos = grouped(names, arguments.group) if arguments.group else source_videos_of(names, layout.source_video)
    places = [
        Place(clip, name, split or "", class_name, video)
        for clip, name, split, class_name, video in zip(clips, names, folders, classes, videos)
    ]
    nested = {str(above) for clip in clips for above in PurePosixPath(clip.name).parents}
    linked = nested if arguments.format == "link" else set()
    return [replace(place, problem=_problem(place, layout, linked)) for place in assign_splits(places, arguments)]


def split_folders(clips: Sequence[Clip], layout: Layout) -> tuple[list[str | None], list[str]]:
    """(split that the folders tell, name below it) of each clip; None for all unless every clip lies in one."""
    parts = [clip.name.split("/") for clip in clips]
    if layout.depth:
        return [None] * len(clips), ["/".join(each[-layout.depth :]) for each in parts]
    found = [next((i for i, folder in enumerate(each[:-1]) if folder in SPLIT_FOLDERS), None) for each in parts]
    if any(place is None for place in found):
        return [None] * len(clips), [clip.name for clip in clips]
    cuts = [place or 0 for place in found]
    return (
        [SPLIT_FOLDERS[each[cut]] for each, cut in zip(parts, cuts)],
        ["/".join(each[cut + 1 :]) for each, cut in zip(parts, cuts)],
    )


def source_videos_of(names: Sequence[str], pattern: str) -> list[str]:
    """Returns the text that the groups of `pattern` match in each name, or the whole name."""
    found = [(name, re.search(pattern, name)) for name in names]
    return ["".join(filter(None, match.groups())) if match else name for name, match in found]


def grouped(names: Sequence[str], pattern: str) -> list[str]:
    """Matches in a process with a time limit, because some patterns never end. Raises: ValueError for those."""
    seconds = GROUP_SECONDS + len(names) / 1000
    with get_context("spawn").Pool(1) as pool:
        try:
            return pool.apply_async(source_videos_of, (names, pattern)).get(seconds)
        except TimeoutError:
            raise ValueError(
                f"--group {pattern!r} was not matched in {seconds:.0f} s: it can match a name in too many ways. Write "
                "it without repetitions inside of repetitions, such as (.+)+."
            ) from None


def _problem(place: Place, layout: Layout, linked: set[str]) -> str | None:
    if place.clip.name in linked:
        return "its folder holds other clips, which a link to it would show twice: use --format png or jpeg"
    refused = layout.refused.intersection(place.clip.name.split("/")[:-1])
    if refused:
        return f"lies in the folder {min(refused)}, which holds no original videos"
    return place.problem or unusable_name(place.name)


def assign_splits(places: list[Place], arguments: argparse.Namespace) -> list[Place]:
    """The places with their splits, by --split: the data set's own division, or a hash of the source video."""
    rule = arguments.split
    if rule == "all":
        return [replace(place, split="train") for place in places]
    lists = list_folder(arguments) if arguments.dataset == "ucf101" and rule != "hash" else None
    if lists is not None:
        return split_by_lists(places, lists, "1" if rule == "auto" else rule)
    if rule.isdecimal():
        raise ValueError(f"--split {rule} names a split of UCF101, whose lists are not there: name them with --lists")
    if rule == "auto" and all(place.split for place in places):
        return places
    partition = read_partition(arguments) if arguments.dataset == "taichi" and rule == "auto" else None
    if partition is not None:
        return split_by_partition(places, partition)
    return split_by_hash(places, arguments.test_share, arguments.seed)


def split_by_hash(places: Sequence[Place], test_share: float, seed: int) -> list[Place]:
    """`train` or `test` by SHA-256 of (seed, source video): its clips stay together, whatever else is there.

    A class all of whose source videos would be for testing is for training.
    """
    videos = {place.source_video for place in places}
    test = {video for video in videos if _share(f"{seed}/{video}") < test_share}
    of_class: dict[str | None, set[str]] = {}
    for place in places:
        of_class.setdefault(place.class_name, set()).add(place.source_video)
    for _, own in sorted(of_class.items(), key=lambda item: str(item[0])):
        if own <= test:
            test -= own
    return [replace(place, split="test" if place.source_video in test else "train") for place in places]


def _share(text: str) -> float:
    """A number from 0 to 1 that only `text` decides."""
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def list_folder(arguments: argparse.Namespace) -> Path | None:
    """The folder of UCF101's official lists: --lists, or the one below SOURCE; None without one."""
    if arguments.lists is not None:
        if not (arguments.lists / "trainlist01.txt").is_file():
            raise FileNotFoundError(f"--lists: '{arguments.lists}' holds no trainlist01.txt")
        folder: Path = arguments.lists
        return folder
    found = sorted(arguments.source.rglob("trainlist01.txt"))
    return found[0].parent if found else None


def split_by_lists(places: Sequence[Place], folder: Path, number: str) -> list[Place]:
    """The places as trainlist0N.txt and testlist0N.txt say; a clip in neither gets a problem instead."""
    split_of: dict[str, str] = {}
    for split in ("train", "test"):
        file = folder / f"{split}list0{number}.txt"
        if not file.is_file():
            raise FileNotFoundError(f"there is no list '{file}' of the official splits")
        lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        split_of |= {_without_suffix(line.split()[0]): split for line in lines if line.strip()}
    absent = f"is in neither list of split {number}"
    return [
        replace(place, split=split, problem=None if split else absent)
        for place in places
        for split in [split_of.get(_without_suffix(place.name), "")]
    ]


def _without_suffix(name: str) -> str:
    return re.sub(r"\.\w+$", "", name)


def read_partition(arguments: argparse.Namespace) -> dict[str, str] | None:
    """Taichi-HD's metadata, source video -> split, from its columns video_id and partition; None without them."""
    files = [arguments.csv] if arguments.csv else sorted(arguments.source.rglob("*.csv"))
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"--csv: there is no file '{file}'")
        with file.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        if rows and {"video_id", "partition"} <= set(rows[0]):
            return {row["video_id"].split("#")[0]: SPLIT_FOLDERS.get(row["partition"], "") for row in rows}
    if arguments.csv:
        raise ValueError(f"--csv: '{arguments.csv}' has no rows with the columns video_id and partition")
    return None


def split_by_partition(places: Sequence[Place], partition: dict[str, str]) -> list[Place]:
    return [
        replace(place, split=split, problem=None if split else "its source video is not in the csv file")
        for place in places
        for split in [partition.get(place.source_video, "")]
    ]


# ------------------------------------------------------------------------------------------ what is written


def tasks_of(places: Sequence[Place], form: Form) -> list[Task]:
    """A task for each place, in the order of their outputs."""
    names = output_names([f"{place.split}/{place.name}" for place in places], form)
    return [
        Task(place.clip.name, place.clip.path, out, identity_of(place.clip.path, place.clip.size))
        for place, out in zip(places, names)
    ]


def index_of(places: Sequence[Place], records: Sequence[Record]) -> list[Record]:
    """One entry for each clip that was made, in the order of its path; labels as data.path=OUT/train numbers them."""
    place_of = {place.clip.name: place for place in places}
    entries = [_entry(record, place_of[record["name"]]) for record in records if "skipped" not in record]
    classes = class_list(entries)
    for entry in entries:
        entry["label"] = classes.index(entry["class"]) if entry["class"] in classes else None
    return sorted(entries, key=lambda entry: str(entry["path"]))


def class_list(index: Sequence[Record]) -> list[str]:
    """The classes of the clips to train on, in the order of their labels."""
    train = [entry for entry in index if entry["split"] == "train"] or index
    return sorted({entry["class"] for entry in train if entry["class"] is not None})


def _entry(record: Record, place: Place) -> Record:
    return {
        "path": record["out"],
        "source": record["name"],
        "split": place.split,
        "class": place.class_name,
        "label": None,
        "source_video": place.source_video,
        **{key: value for key, value in record.items() if key not in ("name", "out", "identity")},
    }


def write_results(folder: OutputFolder, index: Sequence[Record], form: Form, dataset: str) -> dict[str, Any]:
    """Write index, lists and class map; returns what report.json says of splits and classes."""
    folder.write_text("index.jsonl", (f"{json.dumps(entry)}\n" for entry in index))
    classes = class_list(index)
    splits = Counter(entry["split"] for entry in index)
    for split in splits:
        own = [entry for entry in index if entry["split"] == split]
        folder.write_text(f"{split}_clips.txt", (f"{_below(entry)}\n" for entry in own))
        if form.format in ("png", "jpeg"):
            folder.write_text(f"{split}_frames.txt", frame_lines(own, form, classes))
    if classes:
        folder.write_json("classes.json", [_class_row(label, name, index) for label, name in enumerate(classes)])
    read = {split: check_readable(folder.out, split, index, dataset) for split in sorted(splits)}
    return {
        "splits": dict(sorted(splits.items())),
        "classes": len(classes),
        "labels": {split: labels for split, (labels, _) in read.items()},
        "remarks": [remark for _, remarks in read.values() for remark in remarks],
    }


def _class_row(label: int, name: str, index: Sequence[Record]) -> Record:
    return {"label": label, "class": name, "clips": Counter(e["split"] for e in index if e["class"] == name)}


def _below(entry: Record) -> str:
    """The path of a clip below its split's folder."""
    path: str = entry["path"]
    return path.partition("/")[2]


def frame_lines(index: Iterable[Record], form: Form, classes: list[str]) -> Iterator[str]:
    """The lines of a frame list for datasets.catalog.read_frame_list: `path class`, the path below the split."""
    for entry in index:
        folder = _below(entry)
        # './' hides from the reader what would make it take the first folder for an address, or strip it
        start = "./" if ":" in folder.split("/")[0] or folder[:1].isspace() else ""
        end = f" {listed_class(entry['class'], classes)}" if entry["class"] in classes else ""
        for name in frame_names(entry["frames"], form):
            yield f"{start}{folder}/{name}{end}\n"


def listed_class(name: str, classes: list[str]) -> str:
    """Returns the label of a class in a frame list: its name, or its number if the name has a space."""
    number = str(classes.index(name))
    if not any(character.isspace() for character in name):
        return name
    if number in classes:
        raise ValueError(f"class {name!r} cannot be in a frame list together with a class named {number!r}: rename it")
    return number


def check_readable(out: Path, split: str, index: Sequence[Record], dataset: str) -> tuple[str, list[str]]:
    """Read OUT/SPLIT as training does; returns the data.labels that finds the classes, and remarks.

    ValueError unless the clips are those that were made.
    """
    from datasets.build import build_catalog
    from datasets.config import DataConfig

    own = {_below(entry): entry["class"] for entry in index if entry["split"] == split}
    labelled = any(name is not None for name in own.values())
    for labels in _label_rules(dataset, labelled):
        config = DataConfig(name=dataset, path=str(out / split), num_frames=1, frame_interval=1, labels=labels)
        try:
            catalog = build_catalog(config)
        except ValueError:  # the names do not fit this rule
            continue
        if {clip.name for clip in catalog.clips} != set(own):
            raise ValueError(f"{out / split} holds other clips than were made there: move away what is not listed")
        classes: list[str | None] = list(catalog.class_names) or [None]  # without classes every label is 0
        if own == {clip.name: classes[clip.label] for clip in catalog.clips}:
            same = not labelled or classes == class_list(index)
            few = f"{split} holds {len(classes)} of the {len(class_list(index))} classes: alone it numbers them anew"
            return labels, [] if same else [few]
    raise ValueError(f"no rule of data.labels finds the classes of {out / split}: rename the clips, or --labels none")


def _label_rules(dataset: str, labelled: bool) -> list[str]:
    """The values of data.labels that may find the classes; `auto` first where a config leaves it at that."""
    rules = ["class_folders", "file_name"] if labelled else ["none"]
    return rules if dataset == "folder" else ["auto", *rules]


# ------------------------------------------------------------------------------------------ command line


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("dataset", choices=sorted(LAYOUTS), help="whose layout SOURCE has")
    add("source", type=Path, metavar="SOURCE", help="folder with what was downloaded, or a zip archive")
    add("out", type=Path, metavar="OUT", help="folder to fill")
    add("--format", choices=FORMATS, default="link", help="link (no copies), video (mp4), png or jpeg frames (link)")
    add("--size", type=int, metavar="N", help="crop and resize to N x N as training does (unchanged)")
    add("--quality", type=int, metavar="Q", help="of JPEG files, 1 to 100 (95)")
    add("--min_frames", type=int, default=1, metavar="N", help="skip shorter clips (1)")
    add("--split", choices=SPLITS, default="auto", help="auto: the data set's own; 1, 2, 3: of UCF101 (auto)")
    add("--test_share", type=float, default=0.1, metavar="X", help="share of source videos to test, if hashed (0.1)")
    add("--seed", type=int, default=0, metavar="N", help="of the hashed split (0)")
    add(
        "--labels", choices=("auto", "class_folders", "file_name", "none"), default="auto", help="as data.labels (auto)"
    )
    add("--group", metavar="REGEX", help="its groups match, in a name, what clips of one source video share")
    add("--lists", type=Path, metavar="DIR", help="ucf101: folder of trainlist01.txt (found below SOURCE)")
    add("--csv", type=Path, metavar="FILE", help="taichi: metadata with video_id and partition (found below SOURCE)")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (all cores)")
    return check(parser.parse_args(argv))


def check(arguments: argparse.Namespace) -> argparse.Namespace:
    """The arguments, if their values make sense."""
    if arguments.workers < 1:
        raise ValueError(f"--workers is {arguments.workers}, but must be at least 1")
    for flag, dataset in (("lists", "ucf101"), ("csv", "taichi")):
        if getattr(arguments, flag) and arguments.dataset != dataset:
            raise ValueError(f"--{flag} is of {dataset}: leave it out for {arguments.dataset}")
    if not 0 <= arguments.test_share < 1:
        raise ValueError(f"--test_share is {arguments.test_share}, but must be at least 0 and below 1")
    try:
        groups = re.compile(arguments.group or "()").groups
    except re.error as error:
        raise ValueError(f"--group {arguments.group!r} is no regular expression: {error}") from None
    if not groups:
        raise ValueError(f"--group {arguments.group!r} needs (parentheses) around what clips of one video share")
    return arguments


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    from datasets.catalog import find_clips
    from datasets.recipes import FRAMES, RECIPES, VIDEOS
    from tools.unpack import unpack

    if arguments.source.is_file() and arguments.source.suffix.lower() == ".zip":
        out = arguments.out.resolve()
        print(f"unpacking {arguments.source}", flush=True)
        arguments.source = unpack(arguments.source, out.with_name(f"{out.name}-unpacked"))
        print(f"unpacked into {arguments.source}", flush=True)

    form = Form(
        arguments.format,
        arguments.quality,
        arguments.size,
        RECIPES[arguments.dataset].transform,
        min_frames=arguments.min_frames,
    )
    chosen = ("dataset", "split", "test_share", "seed", "labels", "group", "lists", "csv")
    given = {key: getattr(arguments, key) for key in chosen}
    paths = {key: str(path.resolve()) for key, path in given.items() if isinstance(path, Path)}
    settings = collect_settings("prepare_dataset", arguments.source, form, **given | paths)
    with OutputFolder(arguments.out, arguments.source, settings) as folder:
        left_out: LeftOut = []
        enter = left_out_recorder(left_out, arguments.source)
        clips = sorted(find_clips(arguments.source, (VIDEOS, FRAMES), enter), key=lambda clip: clip.name)
        if not clips:
            raise ValueError(f"'{arguments.source}' holds no video files and no folders of frames")
        places = places_of(clips, arguments)
        refused = [{"name": place.clip.name, "skipped": place.problem} for place in places if place.problem]
        good = [place for place in places if not place.problem]
        records = folder.make(tasks_of(good, form), form, arguments.workers)
        require_some([*records, *refused], arguments.source)
        index = index_of(good, records)
        report = make_report(settings, records, refused, left_out)
        report |= write_results(folder, index, form, arguments.dataset)
        folder.write_json("report.json", report)
    print_report(report, arguments.out)
    print_splits(report, arguments)


def print_splits(report: dict[str, Any], arguments: argparse.Namespace) -> None:
    print("splits: " + ", ".join(f"{split} {clips}" for split, clips in report["splits"].items()))
    for remark in report["remarks"]:
        print(remark)
    keys = [f"data.path={arguments.out / split}" for split in report["splits"] if split == "train"]
    labels = report["labels"].get("train", "auto")
    keys += [f"data.labels={labels}"] if labels != "auto" else []
    keys += [f"model.num_classes={report['classes']}"] if report["classes"] else []
    config = f"configs/{arguments.dataset}/{arguments.dataset}_train.yaml"
    print("train with:", " \\\n    ".join([f"python train.py --config {config}", *keys]))


if __name__ == "__main__":
    cli.run(main)
