"""The folder of a sampling job over many processes: its videos and the settings they were sampled with.

    settings.json         everything the videos depend on; written before the first of them
    videos/000000.mp4     one for each index, for people
    lossless/000000.npy   the same frames for metrics: uint8 (F, H, W, 3), numpy's .npy, format version 1
    samples.json          checkpoint, settings and every video; written last, so it marks a finished job
    samples.gif, .png     the first videos
    .unfinished/          files being written; cleared at the next start
    .lock                 locked while a job writes here

Files are written atomically, so a video is complete when both of its files exist.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from common.storage import FolderLock, find_changes, free_bytes, remove_unfinished, write_json
from common.text import gigabytes
from engine.errors import SamplesNotWritten
from engine.removed import REMOVED

from .video_io import write_lossless, write_mp4

SUFFIXES = {"videos": ".mp4", "lossless": ".npy"}
NAME = re.compile(r"(\d{6})\.(mp4|npy)")
UNFINISHED_NAME = re.compile(r"\.?(\d{6}|samples|settings)(\.\d+)?\.(mp4|npy|json|gif|png)")
OVERVIEW = ("samples.json", "samples.gif", "samples.png")


class SampleFolder:
    """The videos 0 to `num_videos` - 1 of one job in `path`. Every process writes; only the main one opens and closes.

    Args:
        lossless: whether each video also has an array.
    """

    def __init__(self, path: Path, num_videos: int, lossless: bool) -> None:
        self.path = path
        self.num_videos = num_videos
        self.kinds = ("videos", "lossless") if lossless else ("videos",)
        self.unfinished = path / ".unfinished"
        self._lock = FolderLock(path, "--save_video_path")

    def file(self, kind: str, index: int) -> Path:
        """Returns the path of a video's mp4 (kind "videos") or array ("lossless")."""
        return self.path / kind / f"{index:06d}{SUFFIXES[kind]}"

    def done(self) -> set[int]:
        """Returns the indices of the complete videos."""
        return set.intersection(*(self._present(kind) for kind in self.kinds))

    def missing_batches(self, size: int) -> list[int]:
        """Returns the first index of every batch (block of `size` indices) in which a video is missing."""
        done, end = self.done(), self.num_videos
        starts = range(0, end, size)
        return [start for start in starts if not done.issuperset(range(start, min(start + size, end)))]

    def write(self, index: int, video: np.ndarray, fps: int) -> None:
        """Writes those files of video `index` that are missing; `video` is uint8 (F, H, W, 3).

        Raises:
            SamplesNotWritten: the disk is full or another write error occurred.
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
                    f"{file} could not be written: {error.strerror or error}; finished videos are kept, "
                    "and the same command continues."
                ) from None

    # ---- the main process only -----------------------------------------------------------------

    def open(self, settings: dict[str, Any], machines: Iterable[str], shape: tuple) -> list[str]:
        """Locks the folder for this job, new or interrupted, and clears unfinished files.

        Args:
            settings: flat and JSON-able; existing videos must have been made with the same.
            machines: kinds of device and versions that this session samples with.
            shape: (F, H, W, 3) of a video.

        Returns:
            warnings, one sentence each.

        Raises:
            ValueError: the folder belongs to another job or holds files of others, which the message names.
            OSError: another process writes here.
        """
        self._lock.take()
        try:
            notes = self._check_settings(settings, set(machines))
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
        """Moves the overview files out of `unfinished`, samples.json last."""
        for name in reversed(OVERVIEW):
            (self.unfinished / name).replace(self.path / name)

    def close(self) -> None:
        """Clears unfinished files and releases the lock."""
        self._clear_unfinished()
        with contextlib.suppress(OSError):  # it holds files of others
            self.unfinished.rmdir()
        self._lock.release()

    def _check_settings(self, settings: dict[str, Any], machines: set[str]) -> list[str]:
        """Compares the settings with settings.json and writes it; returns warnings."""
        file = self.path / "settings.json"
        known: set[str] = set()
        if file.exists():
            before, sampled_with = self._read_settings(file)
            if self._has_videos():  # without any, the settings of a mistaken command may still change
                self._refuse_changes(before, settings)
                known = sampled_with
        else:
            self._refuse_other_work()
        content = {"settings": settings, "machines": sorted(known | machines)}
        self.unfinished.mkdir(exist_ok=True)
        write_json(file, content, indent=2, temporary=self.unfinished / file.name)
        if len(known | machines) == 1:
            return []
        return [f"sampled with {'; '.join(content['machines'])}: videos may differ by the rounding of these."]

    def _read_settings(self, file: Path) -> tuple[dict[str, Any], set[str]]:
        """Returns the settings and machines in `file`. Raises: ValueError if no sampling job wrote it."""
        try:
            content = json.loads(file.read_text())
            return dict(content["settings"]), {str(each) for each in content["machines"]}
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            raise ValueError(f"{file} was not written by a sampling job; name another --save_video_path.") from None

    def _has_videos(self) -> bool:
        """Whether any video has been written."""
        return any(entry.suffix in SUFFIXES.values() for kind in SUFFIXES for entry in (self.path / kind).glob("*"))

    def _refuse_changes(self, before: dict[str, Any], settings: dict[str, Any]) -> None:
        """Raises ValueError that lists the differing settings, if any."""
        now = json.loads(json.dumps(settings))
        before = {key: value for key, value in before.items() if value or key not in REMOVED}
        changes = find_changes(before, now)
        if changes:
            raise ValueError(
                f"--save_video_path {self.path} holds videos of other settings ({', '.join(changes)}): name another "
                "folder, or sample with those."
            )

    def _refuse_other_work(self) -> None:
        """Raises ValueError if a folder without settings.json already holds files that the job would write."""
        for name in (*SUFFIXES, *OVERVIEW):
            place = self.path / name
            if place.is_symlink() or (place.exists() and not (place.is_dir() and not any(place.iterdir()))):
                raise ValueError(f"{place} exists and is from no sampling job; name another --save_video_path.")

    def _refuse_strangers(self, kind: str) -> None:
        """Raises ValueError for files that would wrongly count as videos of this job."""
        folder = self.path / kind
        found = [entry for entry in folder.rglob("*") if entry.suffix.lower() == SUFFIXES[kind]]
        names = sorted(entry.relative_to(folder).as_posix() for entry in found)
        strange = [name for name in names if not NAME.fullmatch(name)]
        if strange:
            raise ValueError(f"{folder} holds {strange[0]}, which is not a video of this job: move it away.")
        beyond = {index for index in self._present(kind) if index >= self.num_videos}
        if beyond:
            raise ValueError(
                f"--num_videos {self.num_videos}, but {folder} holds video {max(beyond)}: videos are never "
                "deleted, so ask for more or name another folder."
            )

    def _clear_unfinished(self) -> None:
        remove_unfinished(self.unfinished, UNFINISHED_NAME)

    def _remove_damaged(self, shape: tuple) -> list[str]:
        """Deletes files that were truncated after they were written, so that they are sampled again."""
        notes = []
        for kind in self.kinds:
            for index in sorted(self._present(kind)):
                file = self.file(kind, index)
                if not (is_array(file, shape) if kind == "lossless" else file.stat().st_size):
                    file.unlink()
                    notes.append(f"{file} is damaged and is sampled again.")
        return notes

    def _room(self, shape: tuple) -> list[str]:
        """Returns a warning if the disk is too small for the missing arrays."""
        missing = self.num_videos - len(self._present("lossless")) if "lossless" in self.kinds else 0
        needed = missing * math.prod(shape)
        free = free_bytes(self.path)
        if free >= needed:
            return []
        return [f"the missing arrays take {gigabytes(needed)}, and {self.path} has {gigabytes(free)} free."]

    def _present(self, kind: str) -> set[int]:
        names = [NAME.fullmatch(entry.name) for entry in (self.path / kind).iterdir()]
        return {int(name[1]) for name in names if name and f".{name[2]}" == SUFFIXES[kind]}


def is_array(file: Path, shape: tuple) -> bool:
    """Whether `file` is a complete .npy of uint8 in that shape."""
    try:
        array = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return array.shape == shape and array.dtype == np.uint8
