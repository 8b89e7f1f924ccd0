"""Converts a downloaded data set to a folder for the training configs, with index, splits and class map.

    python -m tools.prepare_dataset ucf101 DOWNLOADS data/ucf101                      links to the files, no copies
    python -m tools.prepare_dataset sky DOWNLOADS data/sky --format jpeg --size 256   resized frames
    python -m tools.prepare_dataset folder MY_VIDEOS data/mine --format video --size 64

SOURCE is the unpacked folder, or a zip archive, which is checked and unpacked into OUT-unpacked. OUT then holds:

    train/ test/ (val/)            the clips: data.path=OUT/train
    index.jsonl                    one clip per line: path, frames, size, rate, class, SHA-256, split, source video
    train_clips.txt ...            the clips of each split
    train_frames.txt ...           every frame, for data.frame_list (with --format png or jpeg)
    classes.json                   label -> class, as data.path=OUT/train numbers them
    report.json                    counts, and every file that was skipped, with the reason

After a kill, the same command continues. Layouts, splits and assumptions: docs/datasets.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shlex
import signal
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from common.checks import at_least, check_limits, require, within
from datasets.build import build_catalog, is_held_out
from datasets.catalog import Clip
from datasets.clips import window_span
from datasets.config import DataConfig
from datasets.labels import find_class_names
from datasets.recipes import FRAMES, LABEL_CHOICES, RECIPES, SPLIT_FOLDERS, VIDEOS
from engine import cli
from engine.config import load_config
from tools.frames import FORMATS, Form, Record, frame_names, plan_tasks
from tools.output_folder import OutputFolder
from tools.unpack import unpack

ROOT = Path(__file__).resolve().parents[1]
# The groups match the part of a clip's name that identifies its source video.
SOURCE_VIDEOS = {
    "ffs": r"(?:^|/)([\w-]{11})_\d+(?:[_.]|$)",
    "sky": r"^(.+)/[^/]+$|^(.+?)_\d+$",
    "taichi": r"(?:^|/)([^/#]+?)[#_]\d+[#_]\d+(?:\.\w+)?$",
    "ucf101": r"^(.+)_c\d+(?:\.\w+)?$",
    "folder": r"^(.+)$",
}
# FaceForensics: folders of manipulated videos and of their masks, which are not training data.
NOT_ORIGINAL = {"altered", "mask", "masks", "manipulated_sequences"}
GROUP_SECONDS = 20  # limit for matching --group, plus a millisecond per clip
SPLITS = ("auto", "1", "2", "3", "hash", "all")


@dataclass
class Place:
    """Place of a clip: split, class, source video; or the `problem` that excludes it."""

    clip: Clip
    name: str  # below OUT/SPLIT, with the source's extension
    split: str = ""
    class_name: str | None = None
    source_video: str = ""
    problem: str = ""


def place_clips(clips: Sequence[Clip], arguments: argparse.Namespace) -> list[Place]:
    """Returns the place of each clip in the data set's layout. Raises ValueError if names do not fit it."""
    dataset = arguments.dataset
    splits, names = split_folders(clips, dataset)
    labels = arguments.labels if arguments.labels != "auto" else RECIPES[dataset].labels
    classes = find_class_names([replace(clip, name=name) for clip, name in zip(clips, names)], labels)
    videos = match_groups(names, arguments.group or SOURCE_VIDEOS[dataset])
    places = [Place(*each) for each in zip(clips, names, splits, classes, videos)]
    assign_splits(places, arguments)
    above = {str(folder) for clip in clips for folder in PurePosixPath(clip.name).parents}
    for place in places:
        refused = NOT_ORIGINAL.intersection(place.clip.name.split("/")[:-1]) if dataset == "ffs" else None
        if arguments.format == "link" and place.clip.name in above:
            place.problem = "its folder holds other clips, and a link would list them twice: use --format png or jpeg"
        elif refused:
            place.problem = f"is in the folder {min(refused)}, which holds no original videos"
    return places


def split_folders(clips: Sequence[Clip], dataset: str) -> tuple[list[str], list[str]]:
    """Returns each clip's split, from its folders, and name below that folder; "" for all if any clip has no split."""
    names = [clip.name for clip in clips]
    if dataset == "ucf101":
        return [""] * len(clips), ["/".join(name.split("/")[-2:]) for name in names]
    parts = [name.split("/") for name in names]
    cuts = [next((i for i, folder in enumerate(each[:-1]) if folder in SPLIT_FOLDERS), -1) for each in parts]
    if -1 in cuts:
        return [""] * len(clips), names
    splits = [SPLIT_FOLDERS[each[cut]] for each, cut in zip(parts, cuts)]
    return splits, ["/".join(each[cut + 1 :]) for each, cut in zip(parts, cuts)]


def match_groups(names: Sequence[str], pattern: str) -> list[str]:
    """Returns what the groups of `pattern` match in each name, else the name; stops patterns that never finish."""
    seconds = GROUP_SECONDS + len(names) / 1000

    def stop(*_: object) -> None:
        raise ValueError(
            f"--group {pattern!r} was not matched in {seconds:.0f} s: it can match a name in too many ways. Write "
            "it without nested repetitions such as (.+)+."
        )

    previous = signal.signal(signal.SIGALRM, stop)  # `re` handles signals while matching
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        found = [(name, re.search(pattern, name)) for name in names]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    return ["".join(filter(None, match.groups())) if match else name for name, match in found]


def assign_splits(places: Sequence[Place], arguments: argparse.Namespace) -> None:
    """Sets the splits by --split: the data set's own division, or a hash of the source video."""
    rule, dataset, source = arguments.split, arguments.dataset, arguments.source
    lists = sorted(source.rglob("trainlist01.txt")) if dataset == "ucf101" and rule not in ("all", "hash") else []
    table: dict[str, str] | None = None
    if lists:
        number = "1" if rule == "auto" else rule
        table = read_lists(lists[0].parent, number)
        keys, absent = [drop_suffix(place.name) for place in places], f"is in neither list of split {number}"
    elif rule.isdecimal():
        raise ValueError(f"--split {rule} names a split of UCF101, whose lists were not found: put them below SOURCE")
    elif rule == "all":
        table, keys, absent = {"": "train"}, [""] * len(places), ""
    elif rule == "auto" and all(place.split for place in places):
        return
    elif rule == "auto" and dataset == "taichi":
        table = read_partition(source)
        keys, absent = [place.source_video for place in places], "its source video is not in the csv file"
    if table is None:
        split_by_hash(places, arguments.test_share, arguments.seed)
        return
    for place, key in zip(places, keys, strict=True):
        place.split = table.get(key, "")
        place.problem = "" if place.split else absent


def read_lists(folder: Path, number: str) -> dict[str, str]:
    """Returns clip name without suffix -> split, from trainlist0N.txt and testlist0N.txt of UCF101."""
    table: dict[str, str] = {}
    for split in ("train", "test"):
        file = folder / f"{split}list0{number}.txt"
        require(file.is_file(), f"there is no list '{file}' of the official splits")
        lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        table |= {drop_suffix(line.split()[0]): split for line in lines if line.strip()}
    return table


def drop_suffix(name: str) -> str:
    """Returns the name of a clip without its suffix."""
    return re.sub(r"\.\w+$", "", name)


def read_partition(source: Path) -> dict[str, str] | None:
    """Returns source video -> split, from Taichi-HD's csv file below `source`; None if there is none."""
    for file in sorted(source.rglob("*.csv")):
        with file.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        if rows and {"video_id", "partition"} <= set(rows[0]):
            return {row["video_id"].split("#")[0]: SPLIT_FOLDERS.get(row["partition"], "") for row in rows}
    return None


def split_by_hash(places: Sequence[Place], test_share: float, seed: int) -> None:
    """Sets the splits by SHA-256 of (seed, source video), so a video's clips share a split, whatever else there is.

    A class whose source videos would all be in test goes to train.
    """
    by_class: dict[str, set[str]] = defaultdict(set)
    for place in places:
        by_class[str(place.class_name)].add(place.source_video)
    test = {video for videos in by_class.values() for video in videos if is_held_out(f"{seed}/{video}", test_share)}
    for _, videos in sorted(by_class.items()):
        if videos <= test:
            test -= videos
    for place in places:
        place.split = "test" if place.source_video in test else "train"


def make_index(places: Sequence[Place], records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """Returns an entry per converted clip, sorted by path, and the training classes, in label order."""
    place_of = {place.clip.name: place for place in places}
    made = [(place_of[record["name"]], record) for record in records]
    names = [place.class_name for place, _ in made if place.split == "train"] or [place.class_name for place, _ in made]
    classes = sorted({name for name in names if name is not None})
    index = []
    for place, record in made:
        name = place.class_name
        entry = {"path": record["out"], "source": record["name"], "split": place.split, "class": name}
        entry |= {"label": classes.index(name) if name in classes else None, "source_video": place.source_video}
        index.append(entry | {key: record[key] for key in record if key not in ("name", "out", "identity")})
    return sorted(index, key=lambda entry: str(entry["path"])), classes


def write_results(folder: OutputFolder, index: Sequence[Record], classes: list[str], dataset: str) -> dict[str, Any]:
    """Writes index, lists and class map; returns the part of report.json on splits and classes."""
    folder.write_text("index.jsonl", (f"{json.dumps(entry)}\n" for entry in index))
    splits: dict[str, dict[str, Record]] = {split: {} for split in sorted({entry["split"] for entry in index})}
    for entry in index:
        splits[entry["split"]][entry["path"].partition("/")[2]] = entry  # keyed by the path below the split
    for split, own in splits.items():
        folder.write_text(f"{split}_clips.txt", (f"{path}\n" for path in own))
        if folder.form.format in ("png", "jpeg"):
            folder.write_text(f"{split}_frames.txt", list_frames(own, folder.form, classes))
    if classes:
        clips = [Counter(entry["split"] for entry in index if entry["class"] == name) for name in classes]
        rows = [{"label": label, "class": name, "clips": clips[label]} for label, name in enumerate(classes)]
        folder.write_text("classes.json", [json.dumps(rows, indent=1), "\n"])
    labels = {
        split: find_label_rule(folder.out / split, {path: entry["class"] for path, entry in own.items()}, dataset)
        for split, own in splits.items()
    }
    return {"splits": {split: len(own) for split, own in splits.items()}, "classes": len(classes), "labels": labels}


def list_frames(entries: Mapping[str, Record], form: Form, classes: list[str]) -> Iterator[str]:
    """Yields lines of a frame list: `path class`, with the path below the split; a class with a space is its number."""
    for folder, entry in entries.items():
        name, end = entry["class"], ""
        if name in classes:
            number = str(classes.index(name))
            spaced = any(character.isspace() for character in name)
            clash = f"class {name!r} cannot be in a frame list together with a class named {number!r}: rename it"
            require(not spaced or number not in classes, clash)
            end = f" {number if spaced else name}"
        # './' keeps the reader from taking a first folder with ':' for a URL, or stripping its leading space
        start = "./" if ":" in folder.split("/")[0] or folder[:1].isspace() else ""
        for file in frame_names(entry["frames"], form):
            yield f"{start}{folder}/{file}{end}\n"


def find_label_rule(folder: Path, own: Mapping[str, str | None], dataset: str) -> str:
    """Returns the data.labels with which training reads the classes `own` (path -> class) from a split."""
    rules = ["none"] if set(own.values()) == {None} else ["class_folders", "file_name"]
    for labels in rules if dataset == "folder" else ["auto", *rules]:  # the other configs use `auto`
        config = DataConfig(name=dataset, path=str(folder), num_frames=1, frame_interval=1, labels=labels)
        try:
            catalog = build_catalog(config)
        except ValueError:  # the names do not fit this rule
            continue
        if {clip.name for clip in catalog.clips} != set(own):
            raise ValueError(f"{folder} holds clips that this tool did not make: move away those not in index.jsonl")
        classes: list[str | None] = [*catalog.class_names] or [None]  # without classes every label is 0
        if own == {clip.name: classes[clip.label] for clip in catalog.clips}:
            return labels
    raise ValueError(f"no rule of data.labels finds the classes of {folder}: rename the clips, or use --labels none")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("dataset", choices=sorted(SOURCE_VIDEOS), help="layout of SOURCE")
    add("source", type=Path, metavar="SOURCE", help="downloaded folder, or a zip archive")
    add("out", type=Path, metavar="OUT", help="folder to fill")
    add("--format", choices=FORMATS, default="link", help="link (no copies), video (mp4), png or jpeg frames (link)")
    add("--size", type=int, metavar="N", help="crop and resize to N x N as training does (unchanged)")
    add("--quality", type=int, metavar="Q", help="JPEG quality, 1 to 100 (95)")
    add("--min_frames", type=int, default=1, metavar="N", help="skip shorter clips (1)")
    add("--split", choices=SPLITS, default="auto", help="auto: the data set's own; 1, 2, 3: UCF101's (auto)")
    add("--test_share", type=float, default=0.1, metavar="X", help="test share of source videos, if hashed (0.1)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the hashed split (0)")
    add("--labels", choices=LABEL_CHOICES, default="auto", help="as data.labels (auto)")
    add("--group", metavar="REGEX", help="its groups match the part of a name that identifies the source video")
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (all cores)")
    arguments = parser.parse_args(argv)
    check_limits(arguments, "--", {"workers": at_least(1), "test_share": within(0, 1, "[)")})
    try:
        groups = re.compile(arguments.group or "()").groups
    except re.error as error:
        raise ValueError(f"--group {arguments.group!r} is not a regular expression: {error}") from None
    require(groups > 0, f"--group {arguments.group!r} needs (parentheses) around what identifies the source video")
    return arguments


def main(argv: list[str]) -> None:
    """Prepares the data set of the command line."""
    arguments = parse_arguments(argv)
    if arguments.source.is_file() and arguments.source.suffix.lower() == ".zip":
        out = arguments.out.resolve()
        print(f"unpacking {arguments.source}", flush=True)
        arguments.source = unpack(arguments.source, out.with_name(f"{out.name}-unpacked"))

    transform = RECIPES[arguments.dataset].transform
    form = Form(arguments.format, arguments.quality, arguments.size, transform, min_frames=arguments.min_frames)
    chosen = ("dataset", "split", "test_share", "seed", "labels", "group")
    settings = {key: getattr(arguments, key) for key in chosen}
    with OutputFolder(arguments.out, arguments.source, form, "prepare_dataset", **settings) as folder:
        places = place_clips(folder.find_clips((VIDEOS, FRAMES)), arguments)
        for place in places:
            if place.problem:
                folder.skip(place.clip, place.problem)
        good = [place for place in places if not place.problem]
        names = [f"{place.split}/{place.name}" for place in good]
        made = folder.make(plan_tasks([place.clip for place in good], names, form), arguments.workers)
        index, classes = make_index(good, made)
        results = write_results(folder, index, classes, arguments.dataset)
        folder.report(made, **results)
    print("splits: " + ", ".join(f"{split} {clips}" for split, clips in results["splits"].items()))
    lengths = [entry["frames"] for entry in index if entry["split"] == "train"]
    if lengths:
        print_next_step(arguments, lengths, results)


def print_next_step(arguments: argparse.Namespace, lengths: Sequence[int], results: Mapping[str, Any]) -> None:
    """Prints the training command, and which clips it skips; `lengths` are the frames of each training clip."""
    file = f"configs/{arguments.dataset}/{arguments.dataset}_train.yaml"
    config = load_config(ROOT / file, [])
    span = window_span(config.data.num_frames, config.data.frame_interval)
    long = sum(frames >= span for frames in lengths)
    if long < len(lengths):
        print(
            f"{len(lengths) - long} of {len(lengths)} training clips have fewer than the {span} frames of a window: "
            "training skips them, unless data.frame_interval is lower or data.short_clips=loop repeats their frames"
        )
    wanted = {
        "data.path": str(arguments.out / "train"),
        "data.labels": results["labels"].get("train", "auto"),
        "model.num_classes": results["classes"],
        "train.batch_size": min(config.train.batch_size, max(1, long)),
    }
    usual = config.to_flat_dict()
    changed = [f"{key}={shlex.quote(str(value))}" for key, value in wanted.items() if value != usual[key]]
    print("train with:", " \\\n    ".join([f"python train.py --config {file}", *changed]))
    codec = str(config.codec.path)
    if codec.startswith(".") and not Path(codec).exists():
        print(f"once the autoencoder is in {codec}: docs/own_data.md has the command that fetches it")


if __name__ == "__main__":
    cli.run(main)
