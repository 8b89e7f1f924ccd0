"""Clips of a folder on disk and their catalog."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .readers import ARRAY_SUFFIX, HIDDEN, IMAGE_SUFFIXES, VIDEO_SUFFIXES
from .recipes import ARRAYS, FRAMES, VIDEOS

log = logging.getLogger(__name__)

LeftOut = Callable[[str, Path], object]  # (reason, path) of a file that is not a clip


@dataclass(frozen=True)
class Clip:
    """One clip: its path, its name below the root (with '/' between folders), its label.

    `size` is the bytes of a video file or the number of frames of a folder. `num_frames` of a video file is None:
    it is known once the file is opened.
    """

    path: str
    name: str
    size: int
    num_frames: int | None = None
    label: int = 0
    caption: str | None = None


@dataclass(frozen=True)
class Catalog:
    """Clips in the order of their names; `class_names[label]`; `digest` identifies the content, not the location.

    `skipped` counts left-out files by reason. Without labels `class_names` is empty and labels are 0. In a set with
    captions the label is a caption number, `captions[label]`, and there are no classes.
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


def compute_digest(clips: Sequence[Clip], classes: Sequence[str]) -> str:
    """Returns a SHA-256 over names, sizes and classes: equal on two machines exactly if their catalogs are equal."""
    digest = hashlib.sha256()
    for clip in clips:
        label = classes[clip.label] if classes else ""
        digest.update(f"{clip.name}\0{clip.size}\0{label}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def find_root(path: str, key: str) -> Path:
    """Returns the folder of clips at `path`; `key` names the setting in errors."""
    root = Path(path)
    with suppress(RuntimeError):  # ~ of an unknown user
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


def find_clips(
    root: Path, kinds: Sequence[str], left_out: LeftOut, suffixes: Collection[str] = VIDEO_SUFFIXES
) -> Iterator[Clip]:
    """Yields all clips below the folder `root`, unsorted. Images next to videos or arrays are left out.

    Args:
        kinds: VIDEOS, FRAMES, ARRAYS or some of them.
        left_out: called with (reason, path) for everything that is not a clip.
        suffixes: suffixes of video files, in lower case.
    """
    for folder, files in _walk(root, left_out):
        clips = [f for f in files if VIDEOS in kinds and Path(f).suffix.lower() in suffixes]
        clips += [
            f for f in files if ARRAYS in kinds and Path(f).suffix.lower() == ARRAY_SUFFIX and Path(f).stem.isdecimal()
        ]
        frames = [f for f in files if FRAMES in kinds and Path(f).suffix.lower() in IMAGE_SUFFIXES]
        taken = set(clips or frames)
        for file in files:
            if file not in taken:
                left_out(f"*{Path(file).suffix.lower()}", folder / file)
        name = folder.relative_to(root)
        for file in clips:
            yield Clip(str(folder / file), (name / file).as_posix(), (folder / file).stat().st_size)
        if frames and not clips:
            yield Clip(str(folder), name.as_posix(), len(frames), num_frames=len(frames))


def _walk(root: Path, left_out: LeftOut) -> Iterator[tuple[Path, list[str]]]:
    """Yields (folder, its visible files), following links and visiting each real folder once."""
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
    """Returns the kind of an entry, with links followed; warns of a link that leads back to itself."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "neither"
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        log.warning("%r is left out: it is a link that leads back to itself", entry.path)
        return "neither"


def resolve_below(root: Path, name: str, where: str) -> Path | None:
    """Returns the path of `name`, from an untrusted list, below `root`, with links followed; None if there is none.

    Args:
        root: a resolved path.
        where: file and line of the name, for the error.

    Raises: ValueError for a name that is not a plain relative path, or that leads out of the root.
    """
    if any(ord(character) < 32 for character in name) or "://" in name or ":" in name.split("/")[0]:
        raise ValueError(f"{where}: {name!r} is not a plain path")
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{where}: {name!r} must be a path below data.path")
    try:
        target = (root / name).resolve(strict=True)
    except (OSError, RuntimeError):
        return None
    if not target.is_relative_to(root):
        raise ValueError(f"{where}: {name!r} leads out of data.path")
    return target
