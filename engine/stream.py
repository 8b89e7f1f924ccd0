"""The order of clips in training: a pure function of (seed, position), where position counts samples seen.

`samples_seen` is the only state to save. Position p is item p mod N of epoch p div N, in that epoch's own permutation,
so every clip comes once per epoch, none is dropped at an epoch's end, and the number of workers or processes changes
nothing.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from multiprocessing import popen_forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from datasets.clips import ClipDataset
from datasets.readers import VideoError

from .signals import LOADER_PARENT, block_in_children, die_with_parent


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    """Returns the permutation of 0 .. length-1 of one epoch."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(length)


def clip_at(position: int, length: int, seed: int) -> tuple[int, int]:
    """Returns (epoch, index) of the clip at `position` of the endless stream over `length` clips."""
    epoch, offset = divmod(position, length)
    return epoch, int(epoch_order(seed, epoch, length)[offset])


@dataclass(eq=False)
class ClipStream(Dataset):
    """The endless stream over a `ClipDataset`, indexed by position."""

    clips: ClipDataset
    seed: int

    def __getitem__(self, position: int) -> dict[str, Any] | VideoError:
        epoch, index = clip_at(position, len(self.clips), self.seed)
        try:
            item = self.clips[epoch, index]
        except VideoError as error:
            return error
        return {**item, "position": position, "replaced": item["index"] != index}


def collate(items: list[dict[str, Any] | VideoError]) -> dict[str, torch.Tensor] | VideoError:
    """Returns a micro-batch, or the first error as a value: torch would turn a raised one into text."""
    return next((item for item in items if isinstance(item, VideoError)), None) or default_collate(items)


# Workers are children of the fork server, so their death raises no signal here: torch checks when a wait times out.
POLL_S = 5.0


def position_batches(samples_seen: int, batch_size: int, rank: int, world_size: int) -> Iterator[list[int]]:
    """Yields the positions of each micro-batch of one rank, from `samples_seen` on, endlessly.

    Of a global batch of G = batch_size x world_size x grad_accum_steps positions, micro-step j of rank r
    takes block j * world_size + r, so the same G has the same clips however it is split.
    """
    for start in count(samples_seen + rank * batch_size, batch_size * world_size):
        yield list(range(start, start + batch_size))


def load_micro_batches(
    stream: ClipStream, batches: Iterator[list[int]], num_workers: int, pin_memory: bool, timeout_s: float
) -> Iterator[dict[str, torch.Tensor]]:
    """Yields micro-batches {"video", "labels", "index", "position", "replaced"} endlessly.

    Raises VideoError if a clip ends the run (see ClipDataset); RuntimeError as `loaded_items`.
    """
    loader = worker_loader(stream, num_workers, batch_sampler=batches, collate_fn=collate, pin_memory=pin_memory)
    for batch in loaded_items(loader, timeout_s):
        if isinstance(batch, VideoError):
            raise batch
        yield batch


# ---- loader workers --------------------------------------------------------------------------------


class Breadcrumbs:
    """Records the file that each loader worker of this rank opened last; workers call it before opening."""

    def __init__(self, run: Path, rank: int) -> None:
        name = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:12]
        self.folder = Path(tempfile.gettempdir()) / f"latte-{os.getuid()}-{name}-rank{rank}"

    def clear(self) -> None:
        """Deletes all records."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __call__(self, path: str) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / str(os.getpid())).write_bytes(os.fsencode(path))

    def read(self, pids: list[int] | None = None) -> list[str]:
        """Returns the files that the workers `pids` (None: all) read last."""
        if not self.folder.is_dir():
            return []
        files = [file for file in self.folder.iterdir() if pids is None or int(file.name) in pids]
        return sorted({os.fsdecode(file.read_bytes()) for file in files})

    def explain(self, error: RuntimeError) -> str | None:
        """Returns a sentence about a loader worker that died or hung; None for any other error."""
        text = str(error)
        if text.startswith("Caught ") or not re.search("DataLoader (worker|timed out)", text):  # worker is alive
            return None
        dead = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", text)
        files = self.read([int(pid) for pid in dead[1].split(",")] if dead else None) or self.read()
        what = "did not answer in time" if "timed out" in text else "died"
        named = ", ".join(files) or "its first file"
        return f"a data loader worker {what} while it read {named}: {text.splitlines()[0]}"


def prepare_worker(worker_id: int) -> None:
    """Ties a loader worker to its fork server, and through it to the training process; runs first in each worker."""
    die_with_parent()
    trainer = multiprocessing.parent_process()
    if trainer is not None and not trainer.is_alive():  # both may have died before the call above
        os.kill(os.getpid(), signal.SIGKILL)


class _WorkerProcess(ForkServerProcess):
    @staticmethod
    def _Popen(process: Any) -> popen_forkserver.Popen:
        popen = popen_forkserver.Popen(process)
        popen.terminate = popen.kill  # type: ignore[method-assign]  # workers block SIGTERM
        return popen


class WorkerContext(ForkServerContext):
    """The forkserver start method, with workers that a DataLoader can terminate although they block SIGTERM."""

    Process = _WorkerProcess


def worker_loader(dataset: Dataset, num_workers: int, prefetch_factor: int = 4, **settings: Any) -> DataLoader:
    """Returns a DataLoader whose workers end with this process; `loaded_items` detects their death."""
    if num_workers:  # the default context may fork while another thread holds a lock
        settings |= {"multiprocessing_context": WorkerContext(), "worker_init_fn": prepare_worker}
        settings |= {"prefetch_factor": prefetch_factor, "timeout": POLL_S}
    # the loader's own seed draw must not touch the global generator
    return DataLoader(dataset, num_workers=num_workers, generator=torch.Generator(), **settings)


def loaded_items(loader: DataLoader, timeout_s: float) -> Iterator[Any]:
    """Yields the items of `loader`; torch's RuntimeError if a worker died or returned nothing for `timeout_s`."""
    loader.timeout = min(loader.timeout, timeout_s)
    multiprocessing.set_forkserver_preload(["engine.loader_server"])
    os.environ[LOADER_PARENT] = str(os.getpid())
    with block_in_children():
        loaded = iter(loader)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            item = next(loaded)
        except StopIteration:
            return
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            if time.monotonic() + loader.timeout > deadline:  # torch's message names a shorter timeout
                raise RuntimeError(f"DataLoader timed out after {timeout_s:g} seconds") from error
            continue
        yield item
        deadline = time.monotonic() + timeout_s
