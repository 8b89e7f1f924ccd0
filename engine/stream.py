"""Which clip is trained on when: a pure function of (seed, position), position = samples seen so far.

There is no state to save beyond `samples_seen`. Position p is item p mod N of epoch p div N, in that
epoch's own permutation, so every clip comes once per epoch, none is dropped at an epoch's end, and the
number of workers or processes changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datasets.clips import ClipDataset

from .watch import prepare_worker


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    """The permutation of 0 .. length-1 of one epoch."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(length)


def clip_at(position: int, length: int, seed: int) -> tuple[int, int]:
    """(epoch, index) of the clip at `position` of the endless stream over `length` clips."""
    epoch, offset = divmod(position, length)
    return epoch, int(epoch_order(seed, epoch, length)[offset])


class ClipStream(Dataset):
    """The endless stream over a `ClipDataset`; items are asked for by position."""

    def __init__(self, clips: ClipDataset, seed: int) -> None:
        self.clips = clips
        self.seed = seed

    def __getitem__(self, position: int) -> dict[str, Any]:
        item = self.clips[clip_at(position, len(self.clips), self.seed)]
        return {**item, "position": position}


class PositionBatches:
    """Positions of each micro-batch of one rank, from `samples_seen` on, without end.

    Of a global batch of G = batch_size x world_size x grad_accum_steps positions, micro-step j of rank r
    takes the block j * world_size + r: more ranks or more micro-steps of the same G see the same clips.
    """

    def __init__(self, samples_seen: int, *, batch_size: int, rank: int, world_size: int) -> None:
        self.samples_seen = samples_seen
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[int]]:
        stride = self.batch_size * self.world_size
        for start in count(self.samples_seen + self.rank * self.batch_size, stride):
            yield list(range(start, start + self.batch_size))


def build_loader(
    stream: ClipStream, batches: PositionBatches, num_workers: int, pin_memory: bool, timeout_s: float
) -> DataLoader:
    """Loader of micro-batches {"video", "labels", "index", "position"}; RuntimeError where a worker dies or hangs."""
    return DataLoader(
        stream,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
        timeout=timeout_s if num_workers else 0,
        worker_init_fn=prepare_worker if num_workers else None,
        # without an explicit context a loader in a threaded parent may fork into a held lock
        multiprocessing_context="forkserver" if num_workers else None,
        generator=torch.Generator(),  # the loader's own seed draw must not touch the global generator
    )
