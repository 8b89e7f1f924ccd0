"""Extracts features of clips with a detector, bit-identically for any number of ranks.

The order of the clips alone determines which clips each detector call gets. Rank r of W runs calls r, r + W, ..., and
features are concatenated in call order, so every clip counts once and nothing depends on W. Memory holds all features,
but the pixels of only a few calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets.catalog import Clip
from engine.distributed import World, gather_objects
from engine.stream import loaded_items, worker_loader

from .detectors import Detector
from .distances import Moments
from .protocols import SideRules
from .sources import (
    NOTES,
    Reading,
    Request,
    Source,
    Task,
    Window,
    draw,
    group_frames,
    read_length,
    read_task,
    select_frame_windows,
    shuffle_frames,
)

CALL_FRAMES = 128  # frames per call of a clip detector; affects the last bits on a GPU
GATHER_EVERY = 8  # calls per rank between gathers
MOMENT_ROWS = 1024  # features added to the moments at a time
PLAIN, SHUFFLED = "plain", "shuffled"


def change_frames(variant: str, frames: Tensor, clip: Clip) -> Tensor:
    """Returns a variant of the frames (T, 3, H, W) of a clip: PLAIN, SHUFFLED, or `first16` (the first 16 frames)."""
    if variant.startswith("first"):
        return frames[: int(variant.removeprefix("first"))]
    return shuffle_frames(frames, clip) if variant == SHUFFLED else frames


@dataclass
class FeatureSet:
    """Features and clips of one side; only rank 0 has the features.

    If there are too many to keep, `moments` cover all plain features, one for each half of the clips; `rows` are a
    random sample, and `kept` (rows,) int64 are the item numbers of the sample.
    """

    rows: dict[str, Tensor] = field(default_factory=dict)  # by variant, (N, D) float32, in the order of the windows
    moments: list[Moments] = field(default_factory=list)
    kept: Tensor | None = None
    windows: list[Window] = field(default_factory=list)  # as read, in order
    size: tuple[int, int] | None = None  # (H, W) of all frames
    whole: bool = False  # all items were used, without random draws; see `SideRules.whole`
    notes: dict[str, dict[str, str]] = field(default_factory=lambda: {note: {} for note in NOTES})  # clip -> problem

    @property
    def count(self) -> int:
        """Number of items (N)."""
        return sum(half.count for half in self.moments) if self.moments else len(self.rows[PLAIN])

    def variant(self, name: str) -> FeatureSet:
        """Returns a set whose plain rows are those of variant `name`."""
        return replace(self, rows={PLAIN: self.rows[name]})

    def clips(self) -> np.ndarray:
        """Returns the source index of each row's clip."""
        of_clips = self.count == len(self.windows)
        repeats = [1 if of_clips else window.frames for window in self.windows]
        items = np.repeat([window.clip for window in self.windows], repeats)
        return items if self.kept is None else items[self.kept.numpy()]


class Mapped(Dataset):
    """Applies a function to each item, in loader processes."""

    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self.function, self.items = function, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.function(self.items[index])


@dataclass
class Extractor:
    """Reads clips in `workers` loader processes per rank, and runs the detector in this process."""

    world: World
    workers: int = 2
    progress: Callable[[int, int], None] | None = None  # called with (items done, items requested)
    timeout_s: float = 600.0  # ends the run if loaders return nothing for this long

    def extract(
        self,
        source: Source,
        rules: SideRules,
        detector: Detector,
        variants: Sequence[str] = (PLAIN,),
        windows: Sequence[Window] | None = None,
        max_rows: int | None = None,
    ) -> FeatureSet:
        """Extracts the features of one side. The next clip in order replaces an unusable one.

        `windows` replace those of the rules. Above `max_rows` frames, keeps exact moments and a random sample of
        `max_rows`, in constant memory. Raises: ValueError if no clip is usable, or frames differ in size.
        """
        gather = Gathered(source, self.world.is_main)
        read = partial(read_task, source, rules)

        def run(tasks: Sequence[Task], wanted: int) -> None:
            for result in self.in_order(read, tasks, lambda found: run_detector(found, source, detector, variants)):
                gather.take(*result)
                if self.progress:
                    self.progress(gather.done, wanted)

        if rules.unit == "frame":
            if windows is None:
                windows = self._select_frames(gather, rules)
            gather.most = wanted = sum(window.frames for window in windows)
            if max_rows is not None and wanted > max_rows and self.world.is_main:
                gather.summarise(windows, max_rows, [Moments(detector.dims, self.world.device) for _ in range(2)])
            run(group_frames(windows), wanted)
            return gather.finish()
        requests: list[Request] = [(window.clip, window) for window in windows or ()]
        requests = [(place, None) for place in source.order(rules)] if windows is None else requests
        gather.most = wanted = len(requests) if rules.count is None else min(rules.count, len(requests))
        gather.result.whole = wanted == len(source.clips) and rules.offset == "start"
        size = max(1, CALL_FRAMES // rules.frames)
        while requests and (missing := wanted - len(gather.result.windows)):
            some, requests = requests[:missing], requests[missing:]
            run([some[start : start + size] for start in range(0, len(some), size)], wanted)
        return gather.finish()

    def _select_frames(self, gather: Gathered, rules: SideRules) -> list[Window]:
        """Reads the lengths of all clips and selects single frames."""
        lengths = []
        for place, (length, problem) in enumerate(self.in_order(read_length, gather.source.clips)):
            lengths.append(length)
            gather.note(Reading(place, note="unreadable" if problem else None, reason=problem or ""))
        windows = select_frame_windows(lengths, rules)
        gather.result.whole = sum(window.frames for window in windows) == sum(lengths)
        return windows

    def in_order(
        self, read: Callable[[Any], Any], items: Sequence[Any], process: Callable[[Any], Any] = lambda found: found
    ) -> Iterator[Any]:
        """Yields `process(read(item))` for every item, in order, on every rank; each is computed by one rank.

        Loader processes call `read`, and this process calls `process`.
        """
        mine = range(self.world.rank, len(items), self.world.size)
        workers = min(self.workers, len(mine))
        loader = worker_loader(Mapped(read, items), workers, batch_size=None, sampler=mine, prefetch_factor=2)
        loaded = loaded_items(loader, self.timeout_s)
        for _ in range(0, len(items), GATHER_EVERY * self.world.size):
            results = [process(found) for found in islice(loaded, GATHER_EVERY)]
            for turn in zip_longest(*gather_objects(results)):
                yield from islice(turn, sum(each is not None for each in turn))


def run_detector(
    readings: list[Reading], source: Source, detector: Detector, variants: Sequence[str]
) -> tuple[list[Reading], dict[str, Tensor]]:
    """Runs the detector once per variant; returns the readings without pixels, and features by variant."""
    good = [(each.frames, source.clips[each.clip]) for each in readings if each.frames is not None]
    join = torch.stack if detector.input == "clip" else torch.cat
    rows = {}
    if len({frames.shape[-2:] for frames, _ in good}) == 1:  # otherwise `Gathered.take` raises
        for name in variants:
            rows[name] = detector(join([change_frames(name, frames, clip) for frames, clip in good]))
    return [replace(each, frames=None) for each in readings], rows


class Gathered:
    """Concatenates task results, in order; features only if `keep` (on rank 0)."""

    def __init__(self, source: Source, keep: bool) -> None:
        self.source, self.keep = source, keep
        self.result = FeatureSet()
        self.pending: list[list[Tensor]] = [[], []]  # rows not yet in the moments
        self.rows: dict[str, Tensor] = {}  # (most, D), preallocated against fragmentation
        self.most = 0  # maximum number of rows
        self.second_half: set[int] = set()
        self.sampling = draw(0, "sample")
        self.done = 0  # items

    def summarise(self, windows: Sequence[Window], most: int, moments: list[Moments]) -> None:
        """Switches to adding features to `moments`, one per random half of the clips, and keeping only `most` rows."""
        self.result.moments, self.result.kept, self.most = moments, torch.arange(most), most
        self.second_half = set(split_halves([window.clip for window in windows], seed=0)[1].tolist())

    def note(self, reading: Reading) -> None:
        """Records the problem of a clip, if any."""
        if reading.note:
            self.result.notes[reading.note].setdefault(self.source.clips[reading.clip].name, reading.reason)

    def take(self, readings: Sequence[Reading], rows: Mapping[str, Tensor]) -> None:
        """Adds the next task's results. Raises ValueError if the frame size differs from earlier ones."""
        for each in readings:
            self.note(each)
            if each.window is None or each.size is None:
                continue
            self.result.windows.append(each.window)
            self.result.size = self.result.size or each.size
            if each.size != self.result.size:
                (h, w), (height, width) = each.size, self.result.size
                raise ValueError(
                    f"the frames in '{self.source.root}' differ in size ({width}x{height} and {w}x{h}): "
                    "give --resolution to crop and resize all of them"
                )
        if self.result.moments and rows:  # unit "frame": a task has one clip
            half = int(readings[0].clip in self.second_half)
            self.pending[half].append(rows[PLAIN])
            if sum(map(len, self.pending[half])) >= MOMENT_ROWS:
                self._flush(half)
        if self.keep:
            self._keep(rows)
        self.done += len(rows.get(PLAIN, ()))

    def _keep(self, rows: Mapping[str, Tensor]) -> None:
        """Copies rows to the blocks. Once these are full, item i replaces a random row with probability most / (i + 1),
        so that all subsets are equally likely (Vitter, 1985, algorithm R).
        """
        for name, features in rows.items():
            if name not in self.rows:
                self.rows[name] = torch.empty(self.most, features.shape[1])
        for number, item in enumerate(range(self.done, self.done + len(rows.get(PLAIN, ())))):
            place = item if item < self.most else int(self.sampling.integers(item + 1))
            if place < self.most:
                for name, features in rows.items():
                    self.rows[name][place] = features[number]
                if self.result.kept is not None:
                    self.result.kept[place] = item

    def _flush(self, half: int) -> None:
        if self.pending[half]:
            self.result.moments[half].add(torch.cat(self.pending[half]))
            self.pending[half] = []

    def finish(self) -> FeatureSet:
        """Returns the result. Raises ValueError if no clip was usable."""
        result, notes = self.result, self.result.notes
        if not result.windows:
            raise self.source.explain_unusable({**notes["unreadable"], **notes["short"]})
        for half in range(len(result.moments)):
            self._flush(half)
        if result.kept is not None:
            result.kept = result.kept[: self.done]
        for name, block in self.rows.items():
            result.rows[name] = block if self.done >= len(block) else block[: self.done].clone()
        for name in {self.source.clips[window.clip].name for window in result.windows} & set(notes["unreadable"]):
            notes["cut_off"][name] = f"used in part: {notes['unreadable'].pop(name)}"
        return result


def split_halves(clips: Iterable[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits the distinct clips into two random halves; the second is larger if their number is odd."""
    order = draw(seed, "halves").permutation(np.unique(list(clips)))
    return order[: len(order) // 2], order[len(order) // 2 :]
