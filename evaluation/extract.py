"""Extracts features of clips with a detector; the bits do not depend on the number of ranks.

The clips' order alone decides the clips of each detector call; rank r of W takes the calls r, r + W, ...; and their
features are concatenated in the order of the calls. So every clip counts once, and nothing depends on W. Only features
are kept: the pixels of a few calls at a time are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, zip_longest
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets.catalog import Clip
from engine.distributed import World, gather_objects
from engine.stream import loaded_items, worker_loader

from .distances import Moments
from .protocols import SideRules
from .sources import (
    ClipReader,
    Lengths,
    Reading,
    Request,
    Source,
    Task,
    Window,
    draw,
    explain_unusable,
    group_clips,
    group_frames,
    select_frame_windows,
    shuffled,
)

GATHER_EVERY = 8  # calls of each rank between two gathers
MOMENT_ROWS = 1024  # features added to the moments at a time
PLAIN = "plain"
Variant = Callable[[Tensor, Clip], Tensor]  # frames (T, 3, H, W) of a clip -> frames for the detector


class DetectorLike(Protocol):
    """Interface of a detector; see `detectors.Detector`."""

    name: str
    sha256: str
    dims: int
    input: str

    def __call__(self, pixels: Tensor) -> Tensor: ...


def build_variant(name: str) -> Variant:
    """Returns the variant `plain`, `shuffled` (frames), or `first16` (the first 16 frames)."""
    if name == PLAIN:
        return lambda frames, clip: frames
    if name == "shuffled":
        return shuffled
    length = int(name.removeprefix("first"))
    return lambda frames, clip: frames[:length]


@dataclass
class FeatureSet:
    """Features and clips of one side. On ranks other than 0 without features.

    Args:
        rows: by variant, (N, D) float32, in the order of the windows' frames.
        moments: of all plain features, in two halves of the clips, if there are too many to keep; rows are then a
            random sample of them.
        kept: the numbers of the items in that sample, (rows,) int64; None if all are kept.
        windows: the windows that were read, in order.
        size: (H, W) of all frames.
        whole: all items were taken, and nothing was drawn; see `SideRules.whole`.
        short, unreadable, cut_off: clips by name, with the reason; the last were used, as far as they can be read.
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    moments: list[Moments] = field(default_factory=list)
    kept: Tensor | None = None
    windows: list[Window] = field(default_factory=list)
    size: tuple[int, int] | None = None
    whole: bool = False
    short: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    cut_off: dict[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """N: number of items."""
        return sum(half.count for half in self.moments) if self.moments else len(self.rows[PLAIN])

    def clips(self) -> np.ndarray:
        """Returns the clip of each row, as an index in the source."""
        of_clips = self.count == len(self.windows)
        items = np.repeat([window.clip for window in self.windows],
                          [1 if of_clips else window.frames for window in self.windows])  # fmt: skip
        return items if self.kept is None else items[self.kept.numpy()]


@dataclass
class Judged:
    """Result of a task: the readings without pixels, the features by variant, the frame sizes."""

    readings: list[Reading]
    rows: dict[str, Tensor]
    sizes: list[tuple[int, int]]


class Extractor:
    """Reads with `workers` loader processes per rank, and runs the detector in this process.

    Args:
        progress: called with (items done, items requested), on rank 0.
        timeout_s: a loader process that returns nothing in this time ends the run.
    """

    def __init__(
        self,
        world: World,
        workers: int = 2,
        progress: Callable[[int, int], None] | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self.world, self.workers, self.timeout_s = world, workers, timeout_s
        self.progress = progress if world.is_main else None

    def extract(
        self,
        source: Source,
        rules: SideRules,
        detector: DetectorLike,
        variants: Sequence[str] = (PLAIN,),
        windows: Sequence[Window] | None = None,
        max_rows: int | None = None,
    ) -> FeatureSet:
        """Extracts the features of one side.

        Args:
            windows: exactly these, instead of those of the rules.
            max_rows: above this number of frames, keeps exact moments and a random sample of `max_rows`, in constant
                memory.

        Raises:
            ValueError: no clip can be used, or frames differ in size.
        """
        gather = Gathered(source, self.world.is_main)
        if rules.unit == "clip":
            self._clips(gather, rules, detector, variants, windows)
        else:
            self._frames(gather, rules, detector, windows, max_rows)
        return gather.finish()

    def _clips(
        self,
        gather: Gathered,
        rules: SideRules,
        detector: DetectorLike,
        variants: Sequence[str],
        windows: Sequence[Window] | None,
    ) -> None:
        """Reads the requested number of clips: each unusable clip is replaced by the next one in the order."""
        source = gather.source
        requests = [Request(place) for place in source.order(rules)]
        if windows is not None:
            requests = [Request(window.clip, window) for window in windows]
        gather.most = wanted = len(requests) if rules.count is None else min(rules.count, len(requests))
        gather.result.whole = wanted == len(source.clips) and rules.offset == "start"
        tried = 0
        while tried < len(requests) and len(gather.result.windows) < wanted:
            some = requests[tried : tried + wanted - len(gather.result.windows)]
            tried += len(some)
            tasks = group_clips(some, rules.frames)
            self._judge(
                gather, rules, tasks, lambda readings: judge_clips(readings, source, detector, variants), wanted
            )

    def _frames(
        self,
        gather: Gathered,
        rules: SideRules,
        detector: DetectorLike,
        windows: Sequence[Window] | None,
        max_rows: int | None,
    ) -> None:
        """Reads single frames, selected once all lengths are known."""
        source = gather.source
        if windows is None:
            lengths = []
            for index, (length, problem) in enumerate(self.in_order(Lengths(source), lambda item: item)):
                lengths.append(length)
                gather.note(Reading(index, problem=problem))
            windows = select_frame_windows(lengths, rules)
            gather.result.whole = sum(window.frames for window in windows) == sum(lengths)
        gather.most = wanted = sum(window.frames for window in windows)
        if max_rows is not None and wanted > max_rows and self.world.is_main:
            gather.summarise(windows, max_rows, [Moments(detector.dims, self.world.device) for _ in range(2)])
        self._judge(gather, rules, group_frames(windows), lambda readings: judge_frames(readings, detector), wanted)

    def _judge(
        self,
        gather: Gathered,
        rules: SideRules,
        tasks: list[Task],
        judge: Callable[[list[Reading]], Judged],
        wanted: int,
    ) -> None:
        for judged in self.in_order(ClipReader(gather.source, rules, tasks), judge):
            gather.take(judged)
            if self.progress:
                self.progress(gather.done, wanted)

    def in_order(self, dataset: Dataset, process: Callable[[Any], Any]) -> Iterator[Any]:
        """Yields `process(item)` of every item of `dataset`, in order, on every rank; each is processed by one rank."""
        total, world = len(dataset), self.world  # type: ignore[arg-type]
        mine = range(world.rank, total, world.size)
        workers = min(self.workers, len(mine))
        loader = worker_loader(dataset, workers, batch_size=None, sampler=mine, prefetch_factor=2)
        items = loaded_items(loader, self.timeout_s)
        for _ in range(0, total, GATHER_EVERY * world.size):
            results = [process(item) for item in islice(items, GATHER_EVERY)]
            for turn in zip_longest(*gather_objects(results)):
                yield from islice(turn, sum(each is not None for each in turn))


def judge_clips(readings: list[Reading], source: Source, detector: DetectorLike, variants: Sequence[str]) -> Judged:
    """Runs a clip detector once for each variant."""
    good = [(each.frames, source.clips[each.clip]) for each in readings if each.frames is not None]
    sizes = sorted({(frames.shape[-2], frames.shape[-1]) for frames, _ in good})
    rows = {}
    if len(sizes) == 1:
        for name in variants:
            show = build_variant(name)
            rows[name] = detector(torch.stack([show(frames, clip) for frames, clip in good]))
    return Judged([replace(each, frames=None) for each in readings], rows, sizes)


def judge_frames(readings: list[Reading], detector: DetectorLike) -> Judged:
    """Runs a frame detector once."""
    good = [each.frames for each in readings if each.frames is not None]
    sizes = sorted({(frames.shape[-2], frames.shape[-1]) for frames in good})
    rows = {PLAIN: detector(torch.cat(good))} if len(sizes) == 1 else {}
    return Judged([replace(each, frames=None) for each in readings], rows, sizes)


class Gathered:
    """Concatenates the results of tasks, in order.

    Args:
        keep: whether to keep features (rank 0).
    """

    def __init__(self, source: Source, keep: bool) -> None:
        self.source, self.keep = source, keep
        self.result = FeatureSet()
        self.pending: list[list[Tensor]] = [[], []]  # rows not yet in the moments
        self.rows: dict[str, Tensor] = {}  # (most, D): one block each, against fragmentation
        self.most = 0  # upper bound of the rows
        self.second_half: set[int] = set()
        self.sampling = draw(0, "sample")
        self.done = 0  # items

    def summarise(self, windows: Sequence[Window], most: int, moments: list[Moments]) -> None:
        """From now on, adds the features of two random halves of the clips to `moments`, and keeps `most` rows."""
        self.result.moments, self.result.kept, self.most = moments, torch.arange(most), most
        self.second_half = set(split_halves([window.clip for window in windows], seed=0)[1].tolist())

    def note(self, reading: Reading) -> None:
        """Records the problem of a clip, if any."""
        name = self.source.clips[reading.clip].name
        if reading.problem:
            notes = self.result.short if reading.short else self.result.unreadable
            notes.setdefault(name, reading.problem)
        if reading.remark:
            self.result.cut_off.setdefault(name, reading.remark)

    def take(self, judged: Judged) -> None:
        """Adds the next task. Raises ValueError if the frame size differs from earlier ones."""
        for size in judged.sizes:
            self.result.size = self.result.size or size
            if size != self.result.size:
                (h, w), (height, width) = size, self.result.size
                raise ValueError(
                    f"the frames in '{self.source.root}' differ in size ({width}x{height} and {w}x{h}): "
                    "give --resolution, to which all are cropped and resized"
                )
        used = []
        for reading in judged.readings:
            self.note(reading)
            if reading.window is not None and not reading.problem:
                used.append(reading.window)
        self.result.windows += used
        if self.result.moments:
            self._add(judged.rows, used)
        if self.keep:
            self._keep(judged.rows)
        self.done += len(judged.rows.get(PLAIN, ()))

    def _keep(self, rows: Mapping[str, Tensor]) -> None:
        """Copies rows to the blocks. Once these are full, item i replaces a random row with probability most / (i + 1),
        so that all subsets are equally likely (Vitter, 1985, algorithm R).
        """
        free = self.most - self.done
        for name, features in rows.items():
            if name not in self.rows:
                self.rows[name] = torch.empty(self.most, features.shape[1])
            if free > 0:
                self.rows[name][self.done : self.done + len(features)] = features[:free]
        for item, row in islice(enumerate(rows.get(PLAIN, ()), self.done), max(free, 0), None):
            place = int(self.sampling.integers(item + 1))
            if place < self.most and self.result.kept is not None:
                self.rows[PLAIN][place], self.result.kept[place] = row, item

    def _add(self, rows: Mapping[str, Tensor], used: Sequence[Window]) -> None:
        """Adds rows to the moments of the clip's half; a task holds one clip."""
        for features in rows.values():
            half = int(used[0].clip in self.second_half)
            self.pending[half].append(features)
            if sum(map(len, self.pending[half])) >= MOMENT_ROWS:
                self._flush(half)

    def _flush(self, half: int) -> None:
        if self.pending[half]:
            self.result.moments[half].add(torch.cat(self.pending[half]))
            self.pending[half] = []

    def finish(self) -> FeatureSet:
        """Returns the features. Raises ValueError if no clip was usable."""
        result = self.result
        if not result.windows:
            raise explain_unusable(self.source, {**result.unreadable, **result.short})
        for half in range(len(result.moments)):
            self._flush(half)
        if result.kept is not None:
            result.kept = result.kept[: self.done]
        for name, block in self.rows.items():
            result.rows[name] = block if self.done >= len(block) else block[: self.done].clone()
        for name in {self.source.clips[window.clip].name for window in result.windows} & set(result.unreadable):
            result.cut_off[name] = f"used in part: {result.unreadable.pop(name)}"
        return result


def split_halves(clips: Iterable[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits the distinct clips into two random halves; the second has the extra clip of an odd number."""
    order = draw(seed, "halves").permutation(np.unique(list(clips)))
    return order[: len(order) // 2], order[len(order) // 2 :]
