"""The output folder of a multi-process sampling job: videos and their settings.

    settings.json         everything the videos depend on; written before the first video
    videos/000000.mp4     one per index, for viewing
    lossless/000000.npy   the same frames for metrics: uint8 (F, H, W, 3), NumPy's .npy, format version 1
    samples.json          checkpoint, settings and every video; written last, so it marks a finished job
    samples.gif, .png     the first videos
    .unfinished/          files being written; cleared at the next start
    .lock                 locked while a job writes here

Files are written atomically, so a video is complete when both of its files exist.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.checks import require
from common.storage import FolderLock, find_changes, remove_unfinished, write_atomically, write_json
from engine.errors import SamplesNotWritten
from engine.keys import REMOVED

from .video_io import write_lossless, write_mp4

SUFFIXES = {"videos": ".mp4", "lossless": ".npy"}
NAME = re.compile(r"(\d{6})\.(mp4|npy)")
PROMPT_NAME = re.compile(r"\d{4,6}_.+\.(mp4|png)")
UNFINISHED_NAME = re.compile(r"\.?(\d{6}|samples|settings)(\.\d+)?\.(mp4|npy|json|gif|png)")
OVERVIEW = ("samples.json", "samples.gif", "samples.png")


class SampleFolder:
    """The videos of one job in `path`, with `lossless` also as arrays. Opened and closed by the main process only.

    `flag` names the folder in errors.
    """

    def __init__(self, path: Path, num_videos: int, lossless: bool, flag: str = "--save_video_path") -> None:
        self.path, self.flag = path, flag
        self.num_videos = num_videos
        self.kinds = ("videos", "lossless") if lossless else ("videos",)
        self.unfinished = path / ".unfinished"
        self._lock = FolderLock(path, flag)

    def file(self, kind: str, index: int) -> Path:
        """Returns the path of a video's mp4 (kind "videos") or array ("lossless")."""
        return self.path / kind / f"{index:06d}{SUFFIXES[kind]}"

    def list_files(self, kind: str) -> dict[int, Path]:
        """Returns the files of that kind by index."""
        found = sorted((self.path / kind).glob(f"*{SUFFIXES[kind]}"))
        return {int(file.stem): file for file in found if NAME.fullmatch(file.name)}

    def done(self) -> set[int]:
        """Returns the indices of the complete videos."""
        return set.intersection(*(set(self.list_files(kind)) for kind in self.kinds))

    def count_done(self) -> str:
        """Describes the number of complete videos."""
        return f"{len(self.done())} of {self.num_videos} videos are done"

    def missing_batches(self, size: int) -> list[int]:
        """Returns the first index of every batch (block of `size` indices) in which a video is missing."""
        done, end = self.done(), self.num_videos
        return [start for start in range(0, end, size) if not done.issuperset(range(start, min(start + size, end)))]

    def write(self, index: int, video: np.ndarray, fps: int) -> None:
        """Writes the missing files of video `index`, uint8 (F, H, W, 3). Raises: SamplesNotWritten."""
        for kind in self.kinds:
            file = self.file(kind, index)
            aside = self.unfinished / f"{index:06d}{file.suffix}"
            try:
                if not file.exists():
                    write_video(aside, video, fps).replace(file)
            except OSError as error:
                raise SamplesNotWritten(
                    f"{file} could not be written: {error.strerror or error}; finished videos are kept, "
                    "and the same command continues."
                ) from None

    # ---- the main process only -----------------------------------------------------------------

    def check(self, settings: dict[str, Any], unknown: Collection[str] = ()) -> list[str]:
        """Checks, without changes, that the folder belongs to this job; returns the machines that made its videos.

        Args:
            settings: those of this job, which existing videos must share.
            unknown: settings not known yet, which are not compared.

        Raises: ValueError if it belongs to another job or holds foreign files.
        """
        before, machines = self._read_settings()
        for kind in self.kinds:
            self._refuse_strangers(kind)
        if not self.find_videos():  # without videos, settings may still change
            return []
        now = json.loads(json.dumps(settings))
        before = {key: value for key, value in before.items() if value or key not in REMOVED}
        changes = find_changes(before, now, sorted({*before, *now} - set(unknown)))
        require(
            not changes,
            f"{self.flag} {self.path} holds videos with other settings ({', '.join(changes)}): name another "
            "folder, or use those settings.",
        )
        return machines

    def open(self, settings: dict[str, Any], machines: Iterable[str], shape: tuple) -> list[str]:
        """Locks the folder for a new or interrupted job, and deletes unfinished and damaged files.

        Args:
            settings: flat and JSON-serialisable.
            machines: device kinds and versions of the current processes.
            shape: (F, H, W, 3) of a video.

        Returns warnings, one sentence each. Raises: ValueError as for `check`; OSError if another process writes here.
        """
        self._lock.take()
        try:
            known = sorted({*self.check(settings), *machines})
            self.unfinished.mkdir(exist_ok=True)
            content = {"settings": settings, "machines": known}
            write_json(self.path / "settings.json", content, indent=2, temporary=self.unfinished / "settings.json")
            remove_unfinished(self.unfinished, UNFINISHED_NAME)
            for name in OVERVIEW:
                (self.path / name).unlink(missing_ok=True)
            mixed = f"sampled with {'; '.join(known)}: videos may differ in rounding."
            notes = [mixed] if len(known) > 1 else []
            for kind in self.kinds:
                self.file(kind, 0).parent.mkdir(exist_ok=True)
                damaged = [file for file in self.list_files(kind).values() if not is_complete(file, shape)]
                for file in damaged:
                    file.unlink()
                notes += [f"{file} is damaged and will be sampled again." for file in damaged]
            return notes
        except (OSError, ValueError):
            self._lock.release()
            raise

    def close(self) -> None:
        """Moves the overview files out of `unfinished`, samples.json last, clears that, and releases the lock."""
        for name in reversed(OVERVIEW):
            if (self.unfinished / name).exists():
                (self.unfinished / name).replace(self.path / name)
        remove_unfinished(self.unfinished, UNFINISHED_NAME)
        with contextlib.suppress(OSError):  # holds foreign files
            self.unfinished.rmdir()
        self._lock.release()

    def find_videos(self) -> list[Path]:
        """Returns the files of all videos, of this job or another."""
        return [file for kind in SUFFIXES for file in self.list_files(kind).values()]

    def list_places(self) -> list[Path]:
        """Returns the files and folders that only this job may fill."""
        return [self.path / name for name in (*SUFFIXES, *OVERVIEW)]

    def _read_settings(self) -> tuple[dict[str, Any], list[str]]:
        """Returns settings and machines from settings.json; empty if the folder has no files of a sampling job."""
        file = self.path / "settings.json"
        if file.exists():
            try:
                content = json.loads(file.read_text())
                return dict(content["settings"]), [str(each) for each in content["machines"]]
            except (OSError, ValueError, LookupError, TypeError, RecursionError):
                raise ValueError(f"{file} was not written by a sampling job; name another {self.flag}.") from None
        for place in self.list_places():
            is_free = not place.exists() or (place.is_dir() and not any(place.iterdir()))
            require(
                is_free and not place.is_symlink(),
                f"{place} exists and is not from a sampling job; name another {self.flag}.",
            )
        return {}, []

    def _refuse_strangers(self, kind: str) -> None:
        """Raises ValueError for files that would be mistaken for videos of this job."""
        folder = self.path / kind
        for entry in sorted(folder.rglob("*")):
            name = entry.relative_to(folder).as_posix()
            require(
                entry.suffix.lower() != SUFFIXES[kind] or NAME.fullmatch(name) is not None,
                f"{folder} holds {name}, which is not a video of this job: move it away.",
            )
        last = max(self.list_files(kind), default=0)
        require(
            last < self.num_videos,
            f"--num_videos {self.num_videos}, but {folder} holds video {last}: videos are never deleted, so ask for "
            "more or name another folder.",
        )


class PromptFolder(SampleFolder):
    """The videos or images of a list of prompts, directly in `path`; `names` are their file names."""

    def __init__(self, path: Path, names: list[str], flag: str) -> None:
        super().__init__(path, len(names), lossless=False, flag=flag)
        self.names = names

    def file(self, kind: str, index: int) -> Path:
        return self.path / self.names[index]

    def list_files(self, kind: str) -> dict[int, Path]:
        found = {file.name for file in self.find_videos()}
        return {index: self.path / name for index, name in enumerate(self.names) if name in found}

    def find_videos(self) -> list[Path]:
        return [file for file in sorted(self.path.iterdir()) if PROMPT_NAME.fullmatch(file.name)]

    def list_places(self) -> list[Path]:
        return [*(self.path / name for name in OVERVIEW), *self.find_videos()]

    def _refuse_strangers(self, kind: str) -> None:
        """Does nothing: names of other prompts are not mistaken for videos of this job."""


def write_video(file: Path, video: np.ndarray, fps: int) -> Path:
    """Writes a video (F, H, W, 3) atomically as .mp4 or .npy, or its only frame as .png; returns `file`."""
    if file.suffix == ".mp4":
        return write_mp4(file, video, fps)
    if file.suffix == ".npy":
        return write_lossless(file, video)
    return write_atomically(file, Image.fromarray(video[0]).save)


def is_complete(file: Path, shape: tuple) -> bool:
    """Returns whether `file` is a complete uint8 .npy of that shape, or an mp4 or png that is not empty."""
    if file.suffix != ".npy":
        return file.stat().st_size > 0
    try:
        array = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return array.shape == shape and array.dtype == np.uint8
