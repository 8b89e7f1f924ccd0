"""The folder of a sampling job over many processes: which of its videos are there, and what they were made with.

    settings.json         what the videos depend on; written before the first of them
    videos/000000.mp4     one for each index, for people
    lossless/000000.npy   the same frames for metrics: uint8 (F, H, W, 3), numpy's .npy, format version 1
    samples.json          checkpoint, settings and every video; written last: where it is, all is there
    samples.gif, .png     the first videos
    .unfinished/          files being written; what a kill leaves here goes at the next start
    .lock                 held while a job writes here

A file gets its name when it is whole and on the disk, so a video is there when both of its files are.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import SamplesNotWritten
from engine.removed import REMOVED
from engine.run_folder import FolderLock

from .video_io import write_atomically, write_lossless, write_mp4

SUFFIXES = {"videos": ".mp4", "lossless": ".npy"}
NAME = re.compile(r"(\d{6})\.(mp4|npy)")
UNFINISHED_NAME = re.compile(r"\.?(\d{6}|samples|settings)(\.\d+)?\.(mp4|npy|json|gif|png)")
OVERVIEW = ("samples.json", "samples.gif", "samples.png")


class SampleFolder:
    """The videos 0 to `num_videos` - 1 of one job in `path`. Every process writes; only the main one opens and closes.

    Args:
        lossless: whether each video has an array beside its mp4.
    """

    def __init__(self, path: Path, num_videos: int, lossless: bool) -> None:
        self.path = path
        self.num_videos = num_videos
        self.kinds = ("videos", "lossless") if lossless else ("videos",)
        self.unfinished = path / ".unfinished"
        self._lock = FolderLock(path, "--save_video_path")

    def file(self, kind: str, index: int) -> Path:
        """Where the mp4 (kind "videos") or the array ("lossless") of a video belongs."""
        return self.path / kind / f"{index:06d}{SUFFIXES[kind]}"

    def done(self) -> set[int]:
        """Indices of the videos that are there."""
        return set.intersection(*(self._present(kind) for kind in self.kinds))

    def missing_batches(self, size: int) -> list[int]:
        """The first indices of those batches, blocks of `size` indices, of which a video is missing."""
        done, end = self.done(), self.num_videos
        starts = range(0, end, size)
        return [start for start in starts if not done.issuperset(range(start, min(start + size, end)))]

    def write(self, index: int, video: np.ndarray, fps: int) -> None:
        """Write those files of video `index` that are missing; `video` is uint8 (F, H, W, 3).

        Raises:
            SamplesNotWritten: the disk is full, or the like.
        """
        for kind in self.kinds:
            file = self.file(kind, index)
            aside = self.unfinished / file.name
            try:
                if not file.exists():
                    written = write_mp4(aside, video, fps) if kind == "videos" else write_lossless(aside, video)
                    written.replace(file)
            except OSError as error:
                raise SamplesNotWritten(
                    f"{file} could not be written: {error.strerror or error}; the videos that are there stay, "
                    "and the same command goes on."
                ) from None

    # ---- the main process only -----------------------------------------------------------------

    def open(self, settings: dict[str, Any], machines: Iterable[str], shape: tuple) -> list[str]:
        """Take the folder for this job, new or begun, and clear what a kill left.

        Args:
            settings: flat and JSON-able; the videos that are there must have been made with the same.
            machines: kinds of device and versions that this session samples with.
            shape: (F, H, W, 3) of a video.

        Returns:
            warnings, a sentence each.

        Raises:
            ValueError: the folder is another job's or holds what is not ours; the message says what.
            OSError: another process writes here.
        """
        self._lock.take()
        try:
            notes = self._begin(settings, set(machines))
            for kind in self.kinds:
                (self.path / kind).mkdir(exist_ok=True)
                self._refuse_strangers(kind)
            self._clear_unfinished()
            for name in OVERVIEW:
                (self.path / name).unlink(missing_ok=True)
            return notes + self._remove_damaged(shape) + self._room(shape)
        except (OSError, ValueError):
            self._lock.release()
            raise

    def publish_overview(self) -> None:
        """Give what was written into `unfinished` under the names of the overview its place, samples.json last."""
        for name in reversed(OVERVIEW):
            (self.unfinished / name).replace(self.path / name)

    def close(self) -> None:
        """Let go of the folder."""
        self._clear_unfinished()
        with contextlib.suppress(OSError):  # something is in it that is not ours
            self.unfinished.rmdir()
        self._lock.release()

    def _begin(self, settings: dict[str, Any], machines: set[str]) -> list[str]:
        """Compare settings.json, or write it in a new folder."""
        file = self.path / "settings.json"
        known: set[str] = set()
        if file.exists():
            before, sampled_with = self._read_settings(file)
            if self._is_begun():  # else settings may still change: those of a mistaken command, say
                self._refuse_changes(before, settings)
                known = sampled_with
        else:
            self._refuse_other_work()
        content = {"settings": settings, "machines": sorted(known | machines)}
        text = json.dumps(content, indent=2) + "\n"
        self.unfinished.mkdir(exist_ok=True)
        aside = write_atomically(self.unfinished / file.name, lambda temporary: temporary.write_text(text))
        aside.replace(file)
        if len(known | machines) == 1:
            return []
        return [f"sampled with {'; '.join(content['machines'])}: videos may differ by the rounding of these."]

    def _read_settings(self, file: Path) -> tuple[dict[str, Any], set[str]]:
        """Settings and machines of a job that was begun here. Raises: ValueError if `file` is not its."""
        try:
            content = json.loads(file.read_text())
            return dict(content["settings"]), {str(each) for each in content["machines"]}
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            raise ValueError(f"{file} is not what a sampling job wrote; name another --save_video_path.") from None

    def _is_begun(self) -> bool:
        """Whether anything has been written."""
        return any(entry.suffix in SUFFIXES.values() for kind in SUFFIXES for entry in (self.path / kind).glob("*"))

    def _refuse_changes(self, before: dict[str, Any], settings: dict[str, Any]) -> None:
        """Raise ValueError with the differences, if there are any."""
        now = json.loads(json.dumps(settings))
        before = {key: value for key, value in before.items() if value or key not in REMOVED}
        keys = sorted(before.keys() | now.keys())
        changes = [f"{key}: {before.get(key)} -> {now.get(key)}" for key in keys if before.get(key) != now.get(key)]
        if changes:
            raise ValueError(
                f"--save_video_path {self.path} holds videos of other settings ({', '.join(changes)}): name another "
                "folder, or sample with those."
            )

    def _refuse_other_work(self) -> None:
        """Raise ValueError if a folder without settings.json holds something where the job would write."""
        for name in (*SUFFIXES, *OVERVIEW):
            place = self.path / name
            if place.is_symlink() or (place.exists() and not (place.is_dir() and not any(place.iterdir()))):
                raise ValueError(f"{place} is there already and of no sampling job; name another --save_video_path.")

    def _refuse_strangers(self, kind: str) -> None:
        """Raise ValueError for files that would count as videos of this job and are none."""
        folder = self.path / kind
        found = [entry for entry in folder.rglob("*") if entry.suffix.lower() == SUFFIXES[kind]]
        names = sorted(entry.relative_to(folder).as_posix() for entry in found)
        strange = [name for name in names if not NAME.fullmatch(name)]
        if strange:
            raise ValueError(f"{folder} holds {strange[0]}, which is no video of this job: move it away.")
        beyond = {index for index in self._present(kind) if index >= self.num_videos}
        if beyond:
            raise ValueError(
                f"--num_videos {self.num_videos}, but {folder} holds video {max(beyond)}: videos are never "
                "deleted, so ask for more or name another folder."
            )

    def _clear_unfinished(self) -> None:
        for entry in self.unfinished.iterdir():
            if UNFINISHED_NAME.fullmatch(entry.name):
                entry.unlink()

    def _remove_damaged(self, shape: tuple) -> list[str]:
        """Delete files that were cut after they were written, so that they are written again."""
        notes = []
        for kind in self.kinds:
            for index in sorted(self._present(kind)):
                file = self.file(kind, index)
                if not (is_array(file, shape) if kind == "lossless" else file.stat().st_size):
                    file.unlink()
                    notes.append(f"{file} is damaged and is sampled again.")
        return notes

    def _room(self, shape: tuple) -> list[str]:
        """A warning if the disk is too small for the arrays that are still to come."""
        missing = self.num_videos - len(self._present("lossless")) if "lossless" in self.kinds else 0
        needed = missing * math.prod(shape)
        free = shutil.disk_usage(self.path).free
        if free >= needed:
            return []
        return [f"the arrays to come take {needed / 1e9:.3f} GB, and {self.path} has {free / 1e9:.3f} GB free."]

    def _present(self, kind: str) -> set[int]:
        names = [NAME.fullmatch(entry.name) for entry in (self.path / kind).iterdir()]
        return {int(name[1]) for name in names if name and f".{name[2]}" == SUFFIXES[kind]}


def is_array(file: Path, shape: tuple) -> bool:
    """Whether `file` is a whole .npy of uint8 in that shape."""
    try:
        array = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return array.shape == shape and array.dtype == np.uint8
