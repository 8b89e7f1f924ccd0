"""Finds, selects and reads clips for evaluation, from a folder of videos, frame folders or arrays.

Letters: T frames per window, H W height and width in pixels.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets.catalog import Clip, find_clips, find_root
from datasets.readers import Reader, VideoError, list_frames, open_video
from datasets.recipes import ARRAYS, FRAMES, VIDEOS

from .pixels import STORAGE, fit
from .protocols import SideRules

PURPOSES = {"offset": 1, "selection": 2, "shuffle": 3, "halves": 4, "sample": 5}
TASK_FRAMES = 32  # frames read at a time if the unit is "frame"
NOTES = ("short", "unreadable", "cut_off")  # problems of clips; the readable part of those cut off is used


class TooShort(VideoError):
    """The video has fewer frames than a clip needs."""


class Window(NamedTuple):
    """Frames of source clip number `clip`: `frames` of them, `stride` apart, from `offset`."""

    clip: int
    offset: int
    stride: int
    frames: int

    @property
    def indices(self) -> range:
        return range(self.offset, self.offset + self.frames * self.stride, self.stride)


Request = tuple[int, Window | None]  # a clip and its window; None: chosen once the length is known
Task = Sequence[Request]  # read and passed to the detector together


@dataclass
class Reading:
    """Result of a request."""

    clip: int
    window: Window | None = None
    frames: Tensor | None = None  # (T, 3, H, W)
    size: tuple[int, int] | None = None  # (H, W)
    note: str | None = None  # problem of the clip, one of NOTES
    reason: str = ""  # description of the problem


@dataclass(frozen=True)
class Source:
    """The clips of one side, sorted by folder and name; `skipped` counts other files by reason."""

    root: str
    clips: list[Clip]
    skipped: dict[str, int] = field(default_factory=dict)

    @classmethod
    def find(cls, path: str, key: str) -> Source:
        """Finds the clips in the folder `path`; `key` names it in errors. Raises: FileNotFoundError, ValueError.

        If there are arrays, only they are used, and videos are assumed to be previews of them.
        """
        root = find_root(path, key)
        for kinds in ((ARRAYS,), (VIDEOS, FRAMES)):
            skipped: Counter[str] = Counter()
            clips = list(find_clips(root, kinds, lambda reason, _: skipped.update([reason])))  # noqa: B023 called at once
            if clips:
                clips.sort(key=lambda clip: clip.name.split("/"))
                return cls(str(root), clips, dict(sorted(skipped.items())))
        seen = ", ".join(f"{count} {what}" for what, count in sorted(skipped.items())) or "nothing at all"
        raise ValueError(f"{key}: '{path}' holds no video, no folder of frames and no sample array (found: {seen})")

    def order(self, rules: SideRules) -> list[int]:
        """Returns the indices of all clips in order of use: by name, or random if `rules` draw a subset."""
        if rules.selection == "first" or rules.count is None or rules.count >= len(self.clips):
            return list(range(len(self.clips)))
        return draw(rules.seed, "selection").permutation(len(self.clips)).tolist()

    def explain_unusable(self, problems: Mapping[str, str]) -> ValueError:
        """Returns the error for a source without usable clips; `problems` maps clip names to problems."""
        some = "; ".join(f"{name}: {problem}" for name, problem in islice(problems.items(), 3))
        return ValueError(f"none of the {len(self.clips)} clips in '{self.root}' can be used: {some}")


def draw(seed: int | None, purpose: str, name: str = "") -> np.random.Generator:
    """Returns a random generator for a purpose and clip, independent of all others."""
    words = np.frombuffer(hashlib.sha256(name.encode(errors="surrogateescape")).digest(), np.uint32)
    entropy = [(seed or 0) % 2**64, PURPOSES[purpose], *words.tolist()]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def shuffle_frames(frames: Tensor, clip: Clip) -> Tensor:
    """Returns the frames (T, ...) in a random order that is fixed per clip."""
    order = draw(0, "shuffle", clip.name).permutation(len(frames))
    return frames[torch.from_numpy(order)]


# ---- reading -------------------------------------------------------------------------------------------


def read_task(source: Source, rules: SideRules, task: Task) -> list[Reading]:
    """Reads and preprocesses the frames of a task; opens each clip once. Notes problems of clips instead of raising."""
    readings: list[Reading] = []
    for place, requests in groupby(task, key=lambda request: request[0]):
        windows = [window for _, window in requests]
        clip = source.clips[place]
        try:
            reader = open_video(clip.path)
            chosen = [window or choose_window(rules, clip, place, len(reader)) for window in windows]
            frames = read_frames(reader, clip, [index for window in chosen for index in window.indices])
            frames = STORAGE[rules.storage](fit(frames, rules.crop, rules.resolution))
        except VideoError as error:
            kind = "short" if isinstance(error, TooShort) else "unreadable"
            readings += [Reading(place, window, note=kind, reason=error.reason) for window in windows]
            continue
        size, note = (frames.shape[-2], frames.shape[-1]), "cut_off" if reader.cut_off else None
        for window, own in zip(chosen, frames.split([window.frames for window in chosen])):
            readings.append(Reading(place, window, own, size, note, reader.cut_off or ""))
    return readings


def choose_window(rules: SideRules, clip: Clip, place: int, length: int) -> Window:
    """Returns the window of a clip of `length` frames. Raises TooShort if it does not fit."""
    if length < rules.span:
        raise TooShort(clip.path, f"has {length} frames, a clip needs {rules.span}")
    offset = 0
    if rules.offset == "uniform":
        last = length - rules.span + rules.stride - 1  # offset of a clip that ends with the video's last frame
        offset = int(draw(rules.seed, "offset", clip.name).integers(last + 1))
    return Window(place, offset, rules.stride, rules.frames)


def read_frames(reader: Reader, clip: Clip, indices: list[int]) -> Tensor:
    """Reads frames. Raises VideoError if they are missing, or damage makes them unreliable."""
    if max(indices) >= len(reader):
        raise VideoError(clip.path, f"has {len(reader)} frames, but frame {max(indices)} is requested")
    frames = reader.read(indices)
    if reader.damage:
        raise VideoError(clip.path, reader.damage)
    return frames


def read_length(clip: Clip) -> tuple[int, str | None]:
    """Returns (number of frames, None), or (0, reason) if the clip cannot be read."""
    try:
        return len(open_video(clip.path)), None
    except VideoError as error:
        return 0, error.reason


def find_first_size(source: Source, rules: SideRules) -> tuple[int, int]:
    """Returns (H, W) after preprocessing of the first usable clip. Raises ValueError if there is none."""
    problems: dict[str, str] = {}
    for place in source.order(rules):
        (reading,) = read_task(source, rules, [(place, None)])
        if reading.size:
            return reading.size
        problems[source.clips[place].name] = reading.reason
    raise source.explain_unusable(problems)


# ---- single frames -------------------------------------------------------------------------------------


def select_frame_windows(lengths: Sequence[int], rules: SideRules) -> list[Window]:
    """Selects single frames: all, or the first or random `rules.count`; returns runs of at most TASK_FRAMES."""
    total = sum(lengths)
    count = total if rules.count is None else min(rules.count, total)
    numbers = np.arange(count)  # over the frames of all clips
    if rules.selection == "random" and count < total:
        numbers = np.sort(draw(rules.seed, "selection").choice(total, count, replace=False))
    ends = np.cumsum(lengths)
    clips = np.searchsorted(ends, numbers, side="right")
    frames = numbers - (ends - lengths)[clips]
    windows = []
    for run in np.split(np.arange(count), np.flatnonzero((np.diff(clips) != 0) | (np.diff(frames) != 1)) + 1):
        for part in (run[start : start + TASK_FRAMES] for start in range(0, len(run), TASK_FRAMES)):
            windows.append(Window(int(clips[part[0]]), int(frames[part[0]]), 1, len(part)))
    return windows


def group_frames(windows: Iterable[Window]) -> list[list[Request]]:
    """Groups consecutive windows of a clip into tasks of up to TASK_FRAMES frames."""
    tasks: list[list[Request]] = []
    clip, held = -1, 0
    for window in windows:
        held += window.frames
        if window.clip != clip or held > TASK_FRAMES:
            tasks.append([])
            clip, held = window.clip, window.frames
        tasks[-1].append((window.clip, window))
    return tasks


def digest_content(clip: Clip, windows: Iterable[Window] | None) -> str:
    """Returns the SHA-256 of the file or frame files that `windows` (None: all frames) read."""
    files = [Path(clip.path)]
    if clip.num_frames is not None:
        files = list_frames(files[0])
        if windows is not None:
            files = [files[index] for index in sorted({index for window in windows for index in window.indices})]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()
