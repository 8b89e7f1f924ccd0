"""Clips of an evaluation and their selection, from a folder of videos, of folders of frames, or of arrays.

Letters: T frames of a window, H W height and width in pixels, L frames of a video.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets.catalog import Clip, find_clips, find_root
from datasets.readers import Reader, VideoError, list_frames, open_video
from datasets.recipes import ARRAYS, FRAMES, VIDEOS

from .pixels import STORAGE, fit
from .protocols import SideRules

PURPOSES = {"offset": 1, "selection": 2, "shuffle": 3, "halves": 4, "sample": 5}
CALL_FRAMES = 128  # frames in one call of a clip detector; changes the last bits on a GPU
TASK_FRAMES = 32  # frames read at a time if frames are the items


class TooShort(VideoError):
    """A video with fewer frames than a clip needs."""


class Window(NamedTuple):
    """Frames of a clip: `clip` is an index in the source; `frames` of them, `stride` apart, from `offset`."""

    clip: int
    offset: int
    stride: int
    frames: int

    @property
    def indices(self) -> range:
        return range(self.offset, self.offset + self.frames * self.stride, self.stride)


class Request(NamedTuple):
    """A clip to be read; without a window, one is drawn once the length is known."""

    clip: int
    window: Window | None = None


Task = tuple[Request, ...]  # read and passed to the detector together


@dataclass
class Reading:
    """Result of a request: frames (T, 3, H, W), or the `problem` that prevented them."""

    clip: int
    window: Window | None = None
    frames: Tensor | None = None
    problem: str | None = None
    short: bool = False
    remark: str | None = None  # read, but the file is cut off


@dataclass(frozen=True)
class Source:
    """The clips of one side, in the order of their names, folder by folder; `skipped` counts other files by reason."""

    root: str
    clips: list[Clip]
    skipped: dict[str, int] = field(default_factory=dict)

    @classmethod
    def find(cls, path: str, key: str) -> Source:
        """Finds the clips in the folder `path`; `key` names it in errors.

        If there are arrays, they are the samples, and videos are taken for previews of them.

        Raises: FileNotFoundError; ValueError if there is nothing to read.
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

    def listing(self) -> list[tuple[str, int]]:
        """Returns (name, size) of every clip: bytes of a file, frames of a folder."""
        return [(clip.name, clip.size) for clip in self.clips]

    def order(self, rules: SideRules) -> list[int]:
        """Returns the indices of all clips in the order of their use: by name, unless some are drawn."""
        if rules.selection == "first" or rules.count is None or rules.count >= len(self.clips):
            return list(range(len(self.clips)))
        return draw(rules.seed, "selection").permutation(len(self.clips)).tolist()


def draw(seed: int | None, purpose: str, name: str = "") -> np.random.Generator:
    """Returns a random generator for a purpose and clip, independent of all other draws."""
    words = np.frombuffer(hashlib.sha256(name.encode(errors="surrogateescape")).digest(), np.uint32)
    entropy = [(seed or 0) % 2**64, PURPOSES[purpose], *words.tolist()]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def choose_window(rules: SideRules, clip: Clip, place: int, length: int) -> Window:
    """Returns the window of a clip of `length` frames. Raises TooShort if it does not fit."""
    if length < rules.span:
        raise TooShort(clip.path, f"has {length} frames, a clip needs {rules.span}")
    offset = 0
    if rules.offset == "uniform":
        last = length - rules.span + rules.stride - 1  # where the clip ends with the last frame of the video
        offset = int(draw(rules.seed, "offset", clip.name).integers(last + 1))
    return Window(place, offset, rules.stride, rules.frames)


def shuffled(frames: Tensor, clip: Clip) -> Tensor:
    """Returns the frames (T, ...) in a random order, fixed for this clip."""
    order = draw(0, "shuffle", clip.name).permutation(len(frames))
    return frames[torch.from_numpy(order)]


class ClipReader(Dataset[list[Reading]]):
    """`reader[i]`: the preprocessed frames of task i. Problems of clips are in the readings, not raised."""

    def __init__(self, source: Source, rules: SideRules, tasks: Sequence[Task]) -> None:
        self.source, self.rules, self.tasks = source, rules, tasks

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, index: int) -> list[Reading]:
        groups = groupby(self.tasks[index], key=lambda request: request.clip)
        return [reading for place, requests in groups for reading in self._read(place, list(requests))]

    def _read(self, place: int, requests: list[Request]) -> Iterator[Reading]:
        """Reads all windows of one clip, which is opened once."""
        clip = self.source.clips[place]
        try:
            reader = open_video(clip.path)
            windows = [window or choose_window(self.rules, clip, place, len(reader)) for _, window in requests]
            frames = self._preprocess(
                read_frames(reader, clip, [index for window in windows for index in window.indices])
            )
        except VideoError as error:
            short = isinstance(error, TooShort)
            yield from (Reading(place, window, problem=error.reason, short=short) for _, window in requests)
            return
        for window, own in zip(windows, frames.split([window.frames for window in windows])):
            yield Reading(place, window, own, remark=reader.cut_off)

    def _preprocess(self, frames: Tensor) -> Tensor:
        return STORAGE[self.rules.storage](fit(frames, self.rules.crop, self.rules.resolution))


def find_first_size(source: Source, rules: SideRules) -> tuple[int, int]:
    """Returns (H, W) of the first usable clip after preprocessing. Raises ValueError if there is none."""
    problems: dict[str, str] = {}
    for place in source.order(rules):
        (reading,) = ClipReader(source, rules, [(Request(place),)])[0]
        if reading.frames is not None:
            height, width = reading.frames.shape[-2:]
            return height, width
        problems[source.clips[place].name] = str(reading.problem)
    raise explain_unusable(source, problems)


def explain_unusable(source: Source, problems: Mapping[str, str]) -> ValueError:
    """Returns the error for a side without a usable clip; `problems`: by name."""
    some = "; ".join(f"{name}: {problem}" for name, problem in islice(problems.items(), 3))
    return ValueError(f"none of the {len(source.clips)} clips in '{source.root}' can be used: {some}")


def read_frames(reader: Reader, clip: Clip, indices: list[int]) -> Tensor:
    """Reads the frames. Raises VideoError if damaged parts make them unreliable."""
    if max(indices) >= len(reader):
        raise VideoError(clip.path, f"has {len(reader)} frames, but frame {max(indices)} is asked for")
    frames = reader.read(indices)
    if reader.damage:
        raise VideoError(clip.path, reader.damage)
    return frames


class Lengths(Dataset[tuple[int, str | None]]):
    """`lengths[i]`: (frames of clip i, None), or (0, the reason that it cannot be read)."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source.clips)

    def __getitem__(self, index: int) -> tuple[int, str | None]:
        try:
            return len(open_video(self.source.clips[index].path)), None
        except VideoError as error:
            return 0, error.reason


# ------------------------------------------------------------------------------------------------ tasks


def group_clips(requests: Sequence[Request], frames: int) -> list[Task]:
    """Groups requests in fixed blocks: their order alone decides the clips of each detector call."""
    size = max(1, CALL_FRAMES // frames)
    return [tuple(requests[start : start + size]) for start in range(0, len(requests), size)]


def select_frame_windows(lengths: Sequence[int], rules: SideRules) -> list[Window]:
    """Selects single frames: all, the first or a random set of `rules.count`, as runs, clip by clip."""
    total = sum(lengths)
    count = total if rules.count is None else min(rules.count, total)
    if rules.selection == "random" and count < total:
        taken: Iterable[int] = np.sort(draw(rules.seed, "selection").choice(total, count, replace=False))
    else:
        taken = range(count)
    return list(_runs(taken, lengths))


def _runs(taken: Iterable[int], lengths: Sequence[int]) -> Iterator[Window]:
    """Converts frame numbers over all clips to windows of consecutive frames, of at most TASK_FRAMES."""
    ends = np.cumsum(lengths)
    starts = ends - lengths
    numbers = np.fromiter(taken, dtype=np.int64)
    clips = np.searchsorted(ends, numbers, side="right")
    frames = numbers - starts[clips]
    begin = 0
    for place in range(1, len(numbers) + 1):
        ended = place == len(numbers) or clips[place] != clips[begin] or frames[place] != frames[place - 1] + 1
        if ended or place - begin == TASK_FRAMES:
            yield Window(int(clips[begin]), int(frames[begin]), 1, place - begin)
            begin = place


def group_frames(windows: Sequence[Window]) -> list[Task]:
    """Groups consecutive windows of one clip, up to TASK_FRAMES frames."""
    tasks: list[list[Request]] = []
    held = TASK_FRAMES
    for before, window in zip([None, *windows], windows):
        held += window.frames
        if before is None or before.clip != window.clip or held > TASK_FRAMES:
            tasks.append([])
            held = window.frames
        tasks[-1].append(Request(window.clip, window))
    return [tuple(task) for task in tasks]


# ---------------------------------------------------------------------------------------------- content


def digest_content(clip: Clip, windows: Iterable[Window] | None) -> str:
    """Returns the SHA-256 of the file, or of the frame files, behind these windows (None: behind all frames).

    Raises: OSError, VideoError if they cannot be read.
    """
    digest = hashlib.sha256()
    files = [Path(clip.path)]
    if clip.num_frames is not None:
        frames = list_frames(files[0])
        if windows is not None:
            frames = [frames[index] for index in sorted({index for window in windows for index in window.indices})]
        files = frames
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def window_to_json(window: Window, source: Source) -> list[Any]:
    """Returns [file, offset, stride, frames], a line of a manifest."""
    return [source.clips[window.clip].name, *window[1:]]


def windows_from_json(lines: Sequence[Any], source: Source, where: str) -> list[Window]:
    """Inverts `window_to_json`.

    Raises: ValueError, with `where`, for malformed lines or missing clips.
    """
    places = {clip.name: place for place, clip in enumerate(source.clips)}
    windows = []
    for number, line in enumerate(lines, 1):
        whole = isinstance(line, list) and len(line) == 4 and all(type(each) is int for each in line[1:])
        if not whole or line[1] < 0 or min(line[2:]) < 1:
            raise ValueError(f"{where}: line {number} is not [file, offset, stride, frames]")
        if line[0] not in places:
            raise ValueError(f"{where}: '{line[0]}' is not in '{source.root}'")
        windows.append(Window(places[line[0]], *line[1:]))
    return windows
