"""A folder on disk -> the list of its clips and their classes; sorted, so every machine numbers them alike.

What each data set expects on disk, and what is done with its clips, is one line of `RECIPES`.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .readers import ARRAY_SUFFIX, HIDDEN, IMAGE_SUFFIXES, VIDEO_SUFFIXES
from .safe_paths import below

if TYPE_CHECKING:
    from .clips import DataConfig

log = logging.getLogger(__name__)

VIDEOS, FRAMES, ARRAYS = "video files", "folders of frames", "sample arrays (000000.npy)"
LeftOut = Callable[[str, Path], object]  # (reason, path) of what is no clip


@dataclass(frozen=True)
class Recipe:
    """How one data set is read: what its clips are, where labels come from, how pixels are treated.

    Where a folder holds no clips of the kind, those of the other are read: a prepared set keeps its name.
    """

    clips: tuple[str, ...]
    labels: str
    transform: str
    horizontal_flip: bool


RECIPES: dict[str, Recipe] = {
    "ffs": Recipe((VIDEOS,), "none", "resize_then_center_crop", True),
    "sky": Recipe((FRAMES,), "none", "center_crop_then_resize", True),
    "taichi": Recipe((FRAMES,), "none", "resize_then_center_crop", True),
    "ucf101": Recipe((VIDEOS,), "class_folders", "resize_then_center_crop", True),
    "folder": Recipe((VIDEOS, FRAMES), "auto", "resize_then_center_crop", False),
    # No flip: mirrored, "moves right" would carry the label "moves left".
    "demo": Recipe((VIDEOS,), "class_folders", "resize_then_center_crop", False),
    # Clips with captions, of a list; their labels are the captions' numbers. No flip: captions say left and right.
    "captions": Recipe((VIDEOS, FRAMES), "captions", "resize_then_center_crop", False),
}
CAPTIONED = [name for name, recipe in RECIPES.items() if recipe.labels == "captions"]


@dataclass(frozen=True)
class Clip:
    """One clip: where it is, its name below the root ('/' between folders), its label.

    `size` is the bytes of a video file or the frames of a folder; `num_frames` of a video is known only when
    it is opened, and None here.
    """

    path: str
    name: str
    size: int
    num_frames: int | None = None
    label: int = 0
    caption: str | None = None


@dataclass(frozen=True)
class Catalog:
    """Clips in the order of their names; `class_names[label]`; `digest` names the content, not the place.

    `skipped` counts what was left out, by reason. Without labels `class_names` is empty and labels are 0. Of a set with
    captions labels are the numbers of these, `captions[label]`, and there are no classes.
    """

    root: str
    clips: list[Clip]
    class_names: list[str]
    digest: str
    skipped: dict[str, int] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def numbers(self) -> dict[str, int]:
        """Caption -> its number."""
        return {caption: number for number, caption in enumerate(self.captions)}


def window_span(num_frames: int, frame_interval: int) -> int:
    """Frames from the first to the last of a clip of `num_frames`, every `frame_interval`-th."""
    return (num_frames - 1) * frame_interval + 1


def build_catalog(config: DataConfig, *, held_out: bool = False) -> Catalog:
    """Find, sort, label and count the clips of `config.path`: those that `data.val_share` holds out, or the others.

    FileNotFoundError where there is no such folder; ValueError where it holds nothing of the kind asked for,
    or a clip has no class although classes are asked for.
    """
    root = _root(config.path)
    recipe = RECIPES[config.name]
    if config.name in CAPTIONED:
        from .captions import captioned_clips

        clips, skipped = captioned_clips(config, root)
        return catalog_of(str(root), clips, config, skipped, held_out=held_out)
    found, skipped = _found(root, recipe.clips)
    if not found:
        found, skipped = _found(root, (VIDEOS, FRAMES))
    if not found:
        raise ValueError(_nothing_found(config, skipped))
    return catalog_of(str(root), found, config, skipped, held_out=held_out)


def catalog_of(
    root: str, found: list[Clip], config: DataConfig, skipped: Counter[str] | None = None, *, held_out: bool = False
) -> Catalog:
    """The catalog of clips that were `found`: those long enough and (not) held out, labelled, at most `max_clips`."""
    recipe, skipped = RECIPES[config.name], Counter() if skipped is None else skipped
    found = _long_enough(found, config, skipped)
    captioned = config.name in CAPTIONED
    rule = recipe.labels if config.labels == "auto" else config.labels
    names = [clip.caption for clip in found] if captioned else class_names_of(found, rule)
    classes = sorted({name for name in names if name is not None})
    numbers = {name: label for label, name in enumerate(classes)}
    labelled = [
        replace(clip, label=numbers[name] if name is not None else 0) for clip, name in zip(found, names, strict=True)
    ]
    chosen = [clip for clip in labelled if is_held_out(clip.name, config.val_share) == held_out]
    if not chosen:
        raise ValueError(_nothing_chosen(config, len(labelled), held_out))
    if config.val_share:
        skipped["for training" if held_out else "held out"] = len(labelled) - len(chosen)
    clips = chosen[: config.max_clips]
    digest, left_out = digest_of(clips, classes), dict(sorted(skipped.items()))
    if captioned:
        return Catalog(root, clips, [], digest, left_out, captions=classes)
    return Catalog(root, clips, classes, digest, left_out)


def is_held_out(name: str, share: float) -> bool:
    """Whether `share` of all clips, from 0 to 1, includes the one of that name, whatever others there are."""
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _nothing_chosen(config: DataConfig, total: int, held_out: bool) -> str:
    what, remedy = ("none", "raise") if held_out else ("all", "lower")
    return (
        f"data.val_share={config.val_share} holds out {what} of the {total} clips of '{config.path}': {remedy} it, or "
        "set data.val_path instead"
    )


def _root(path: str) -> Path:
    if not path:
        raise ValueError("data.path is empty: give the folder of the data set")
    return find_root(path, "data.path")


def find_root(path: str, key: str) -> Path:
    """The folder of clips that `path` names; `key` is what it is called in the error."""
    root = Path(path)
    with suppress(RuntimeError):  # the home of a user that there is not
        root = root.expanduser()
    if not root.exists():
        raise FileNotFoundError(f"{key}: there is no folder '{path}'")
    if root.is_file() and root.suffix.lower() == ".zip":
        raise ValueError(
            f"{key}: '{path}' is a zip archive: unpack it with `python -m tools.prepare_dataset folder '{path}' OUT`, "
            "and name OUT/train."
        )
    if not root.is_dir():
        raise ValueError(f"{key}: '{path}' is a file, not a folder of clips")
    return root


# ------------------------------------------------------------------------------------------- finding clips


def _found(root: Path, kinds: Sequence[str]) -> tuple[list[Clip], Counter[str]]:
    """The clips of these kinds in the order of their names, and the count of all else by reason."""
    skipped: Counter[str] = Counter()
    clips = find_clips(root, kinds, lambda reason, path: skipped.update([reason]))
    return sorted(clips, key=lambda clip: clip.name), skipped


def find_clips(
    root: Path, kinds: Sequence[str], left_out: LeftOut, suffixes: Collection[str] = VIDEO_SUFFIXES
) -> Iterator[Clip]:
    """All clips below the folder `root`, in no order. In a folder with videos or arrays, images are strays.

    Args:
        kinds: VIDEOS, FRAMES, ARRAYS or some of them.
        left_out: told (reason, path) of everything that is no clip.
        suffixes: what the names of video files end in, in lower case.
    """
    for folder, files in _walk(root, left_out):
        clips = [f for f in files if VIDEOS in kinds and Path(f).suffix.lower() in suffixes]
        clips += [f for f in files if ARRAYS in kinds and is_sample_array(f)]
        frames = [f for f in files if FRAMES in kinds and Path(f).suffix.lower() in IMAGE_SUFFIXES]
        taken = set(clips or frames)
        for file in files:
            if file not in taken:
                left_out(f"*{Path(file).suffix.lower()}", folder / file)
        for file in clips:
            yield Clip(str(folder / file), _name(folder / file, root), (folder / file).stat().st_size)
        if frames and not clips:
            yield Clip(str(folder), _name(folder, root), len(frames), num_frames=len(frames))


def is_sample_array(name: str) -> bool:
    """Whether a file of this name is a sample in lossless form: those have numbers for names, other arrays not."""
    return Path(name).suffix.lower() == ARRAY_SUFFIX and Path(name).stem.isdecimal()


def _walk(root: Path, left_out: LeftOut) -> Iterator[tuple[Path, list[str]]]:
    """(folder, its visible files), links followed, each real folder once; hidden entries are left out."""
    pending, seen = [root], {os.path.realpath(root)}
    while pending:
        folder = pending.pop()
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
        visible = [entry for entry in entries if not entry.name.startswith(HIDDEN)]
        kinds = {entry.name: _kind_of(entry) for entry in visible}
        for entry in entries:
            if entry.name.startswith(HIDDEN):
                left_out("hidden", Path(entry.path))
            elif kinds[entry.name] == "folder" and os.path.realpath(entry.path) not in seen:
                seen.add(os.path.realpath(entry.path))
                pending.append(Path(entry.path))
            elif kinds[entry.name] == "neither":
                left_out("not a file (a broken link, a device)", Path(entry.path))
        yield folder, [entry.name for entry in visible if kinds[entry.name] == "file"]


def _kind_of(entry: os.DirEntry[str]) -> Literal["folder", "file", "neither"]:
    """Tell what a link or entry leads to; a link in a circle leads nowhere, which is said."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "neither"
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        log.warning("%r is left out: it is a link that leads back to itself", entry.path)
        return "neither"


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _long_enough(clips: list[Clip], config: DataConfig, skipped: Counter[str]) -> list[Clip]:
    """Drop folders of frames that hold no window; the length of a video is known when it is opened."""
    if config.short_clips == "loop":
        return clips
    span = window_span(config.num_frames, config.frame_interval)
    kept = [clip for clip in clips if clip.num_frames is None or clip.num_frames >= span]
    if len(kept) < len(clips):
        skipped[f"fewer than {span} frames"] = len(clips) - len(kept)
    if not kept:
        raise ValueError(
            f"data.path: none of the {len(clips)} clips in '{config.path}' has the {span} frames that "
            f"data.num_frames={config.num_frames} and data.frame_interval={config.frame_interval} need "
            f"(the longest has {max(clip.num_frames or 0 for clip in clips)})"
        )
    return kept


def _nothing_found(config: DataConfig, skipped: Counter[str]) -> str:
    wanted = f"{VIDEOS} or {FRAMES}"
    seen = ", ".join(f"{count} {what}" for what, count in sorted(skipped.items())) or "nothing at all"
    return f"data.path: data.name={config.name} needs {wanted}, but '{config.path}' holds none (found: {seen})"


# ------------------------------------------------------------------------------------------------ classes


def _class_of_folder(clip: Clip) -> str:
    """The first folder below the root."""
    first, *rest = clip.name.split("/")
    if not rest:
        raise ValueError(f"data.labels=class_folders: {clip.path!r} lies in no class folder")
    return first


def _class_of_file_name(clip: Clip) -> str:
    """What follows the last '__' of the file's own name, without its extension."""
    name = Path(clip.name).name
    stem = Path(name).stem if clip.num_frames is None else name
    *before, after = stem.rsplit("__", maxsplit=1)
    if not before or not after:
        raise ValueError(f"data.labels=file_name: the name of {clip.path!r} has no '__' before its class")
    return after


LABEL_RULES: dict[str, Callable[[Clip], str | None]] = {
    "class_folders": _class_of_folder,
    "file_name": _class_of_file_name,
    "none": lambda clip: None,
}


def class_names_of(clips: Sequence[Clip], rule: str) -> list[str | None]:
    """The class of each clip; `auto`: the first rule that fits all clips and gives two classes or more."""
    if rule != "auto":
        return [LABEL_RULES[rule](clip) for clip in clips]
    for name in ("class_folders", "file_name"):
        try:
            names = [LABEL_RULES[name](clip) for clip in clips]
        except ValueError:
            continue
        if len(set(names)) > 1:
            return names
    return [None] * len(clips)


def relabelled(catalog: Catalog, class_names: Sequence[str]) -> Catalog:
    """`catalog` with its labels numbered as in `class_names`; ValueError for a clip of a class that is not there."""
    numbers = {name: label for label, name in enumerate(class_names)}
    clips = []
    for clip in catalog.clips:
        name = catalog.class_names[clip.label] if catalog.class_names else None
        if numbers and name not in numbers:
            what = "no class" if name is None else f"class {name!r}"
            raise ValueError(f"data.path: {clip.path!r} is of {what}, and the clips to train on have no such")
        clips.append(replace(clip, label=numbers[name] if numbers and name is not None else 0))
    return replace(catalog, clips=clips, class_names=list(class_names), digest=digest_of(clips, class_names))


def digest_of(clips: Sequence[Clip], classes: Sequence[str]) -> str:
    """SHA-256 over names, sizes and classes: equal on two machines exactly if their catalogs are."""
    digest = hashlib.sha256()
    for clip in clips:
        label = classes[clip.label] if classes else ""
        digest.update(f"{clip.name}\0{clip.size}\0{label}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------- frame lists


def read_frame_list(config: DataConfig, catalog: Catalog) -> list[Clip]:
    """The images of `data.frame_list`, one a line: `path` or `path class`, relative to `data.path`.

    The class may be a name or a number. Without it, it is the folder of the path, or the `v_<Class>_` of the
    file name, that is a class of the catalog. A line that leaves the folder is refused with its number.
    """
    path = Path(config.frame_list or "").expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"data.frame_list: there is no file '{config.frame_list}'")
    root = Path(catalog.root).resolve()
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
        numbered = [(number, line.rstrip("\r\n")) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"data.frame_list: '{path}' is empty")
    return [_listed_frame(line, f"{path}, line {number}", root, catalog.class_names) for number, line in numbered]


def _listed_frame(line: str, where: str, root: Path, classes: list[str]) -> Clip:
    name, given = line.strip(), None
    if Path(name).suffix.lower() not in IMAGE_SUFFIXES and " " in name:
        name, given = name.rsplit(maxsplit=1)
    target = below(root, name, where)
    if Path(name).suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"{where}: {name!r} is no image ({' '.join(sorted(IMAGE_SUFFIXES))})")
    if target is None:
        raise FileNotFoundError(f"{where}: there is no file {name!r} in data.path")
    return Clip(str(target), name, target.stat().st_size, 1, _listed_label(name, given, where, classes))


def _listed_label(name: str, given: str | None, where: str, classes: list[str]) -> int:
    if not classes:
        return 0
    if given is not None and given.isdecimal() and given not in classes and int(given) < len(classes):
        return int(given)
    file_class = Path(name).name.removeprefix("v_").split("_")[0]
    for candidate in [given] if given is not None else [*Path(name).parts[:-1], file_class]:
        if candidate in classes:
            return classes.index(candidate)
    raise ValueError(f"{where}: {given or name!r} names none of the {len(classes)} classes of the data set")
