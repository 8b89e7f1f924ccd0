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

from common.checks import require

from .readers import ARRAY_SUFFIX, HIDDEN, IMAGE_SUFFIXES, VIDEO_SUFFIXES
from .recipes import ARRAYS, FRAMES, VIDEOS

log = logging.getLogger(__name__)

LeftOut = Callable[[str, Path], object]  # called with (reason, path) for what is not a clip
NEITHER = "not a file (a broken link, a device)"


@dataclass(frozen=True)
class Clip:
    """One clip: its path, its name relative to the root ('/'-separated), its label.

    `size` is a video file's bytes or a folder's number of frames. `num_frames` is None for a video file: it is known
    only once the file is opened.
    """

    path: str
    name: str
    size: int
    num_frames: int | None = None
    label: int = 0
    caption: str | None = None


@dataclass(frozen=True)
class Catalog:
    """Clips sorted by name; `digest` identifies the content, not the location.

    A clip's class is `class_names[label]`; without classes the list is empty and labels are 0. With captions, the label
    is a caption number: `captions[label]`. `skipped` counts left-out files by reason.
    """

    root: str
    clips: list[Clip]
    class_names: list[str]
    digest: str
    skipped: dict[str, int] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)


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
    unpack = f"unpack it with `python -m tools.prepare_dataset folder '{path}' OUT`, and name OUT/train."
    packed = root.is_file() and root.suffix.lower() == ".zip"
    require(not packed, f"{key}: '{path}' is a zip archive: {unpack}")
    require(root.is_dir(), f"{key}: '{path}' is a file, not a folder of clips")
    return root


def find_clips(
    root: Path, kinds: Sequence[str], left_out: LeftOut, suffixes: Collection[str] = VIDEO_SUFFIXES
) -> Iterator[Clip]:
    """Yields all clips of `kinds` below the folder `root`, unsorted. Images next to videos or arrays are left out.

    Args:
        left_out: called with (reason, path) for everything that is not a clip.
        suffixes: those of video files, in lower case.
    """
    for folder, files in _walk(root, left_out):
        suffix = {file: Path(file).suffix.lower() for file in files}
        grids = ["samples.gif"] if "samples.json" in files else []  # all of the sampled videos next to it
        clips = [f for f in files if VIDEOS in kinds and suffix[f] in suffixes and f not in grids]
        clips += [f for f in files if ARRAYS in kinds and suffix[f] == ARRAY_SUFFIX and Path(f).stem.isdecimal()]
        frames = [f for f in files if FRAMES in kinds and suffix[f] in IMAGE_SUFFIXES]
        taken = set(clips or frames)
        for file in files:
            if file not in taken:
                left_out(f"*{suffix[file]}", folder / file)
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
        files: list[str] = []
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
        for entry in entries:
            kind = "hidden" if entry.name.startswith(HIDDEN) else _kind_of(entry)
            if kind == "file":
                files.append(entry.name)
            elif kind == "folder" and os.path.realpath(entry.path) not in seen:
                seen.add(os.path.realpath(entry.path))
                pending.append(Path(entry.path))
            elif kind != "folder":
                left_out(kind, Path(entry.path))
        yield folder, files


def _kind_of(entry: os.DirEntry[str]) -> str:
    """Returns "folder", "file" or another kind, following links; warns about a link that leads back to itself."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else NEITHER
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        log.warning("%r is left out: it is a link that leads back to itself", entry.path)
        return NEITHER


def resolve_below(root: Path, name: str, where: str) -> Path | None:
    """Returns the real path of `name` (from an untrusted list) below the resolved `root`, or None if there is none.

    Raises: ValueError naming `where` if `name` is not a plain relative path or leads out of the root.
    """
    plain = min(map(ord, name), default=32) >= 32 and "://" not in name and ":" not in name.split("/")[0]
    require(plain, f"{where}: {name!r} is not a plain path")
    relative = bool(name) and not Path(name).is_absolute() and ".." not in Path(name).parts
    require(relative, f"{where}: {name!r} must be a path below data.path")
    try:
        target = (root / name).resolve(strict=True)
    except (OSError, RuntimeError):
        return None
    require(target.is_relative_to(root), f"{where}: {name!r} leads out of data.path")
    return target
