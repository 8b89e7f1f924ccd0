"""A sampling job on any number of processes: each one's share of the videos, stop signals, waiting for the others."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from common.checks import require
from common.storage import file_sha256
from engine.cli import leave
from engine.distributed import World, close_world, init_world, on_all, on_main
from engine.errors import PREEMPTED_EXIT, SamplesNotWritten
from engine.signals import StopSignals

from .command import SHOWN, say, show_steps
from .generate import Generator, usable_device
from .sample_folder import SampleFolder
from .video_io import read_video

START_TIMEOUT_S = 1800.0  # until the slowest process has loaded the checkpoint
POLL_S = 1.0  # between checks for the last videos of other processes
# rank 0 gives up once others finish no video for PATIENCE_S seconds and for the time of PATIENCE_BATCHES batches
PATIENCE_S = 1800.0
PATIENCE_BATCHES = 10


class Stopped(Exception):
    """A signal asked this process to stop; the message says what is done."""


def run_job(run: Callable[[StopSignals], object]) -> int:
    """Calls `run`; returns the exit code."""
    with StopSignals((signal.SIGTERM, signal.SIGUSR1)) as signals:  # not SIGINT: Ctrl-C ends at once
        try:
            run(signals)
        except Stopped as stop:
            say(f"stopped by a signal; {stop}; the same command continues")
            return leave(PREEMPTED_EXIT)
    close_world()  # only after a clean end
    return leave(0)


def join(device: torch.device) -> World:
    """Joins the process group; each process has its own GPU.

    Uses gloo even with GPUs: messages are small, and gloo notices a dead process at once.
    """
    require(device.index is None, f"--device {device}: use cpu or cuda; each process takes its own GPU.")
    if device.type == "cuda":
        usable_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    return init_world(device.type, START_TIMEOUT_S, backend="gloo")


class SampleJob:
    """One process's share of the videos of `folder`, in batches of `batch_size` consecutive indices."""

    def __init__(self, folder: SampleFolder, world: World, signals: StopSignals, batch_size: int) -> None:
        self.folder, self.world, self.signals, self.batch_size = folder, world, signals, batch_size

    def open(self, prepare: Callable[[], dict[str, Any]], shape: tuple[int, ...]) -> None:
        """Opens the folder and sets the batches to sample. Collective.

        Args:
            prepare: returns everything the videos depend on; called on every rank.
            shape: (F, H, W, 3) of a video.

        Raises: ValueError if ranks differ, or the folder belongs to another job.
        """
        everyone = on_all(lambda: (prepare(), machine(self.world.device)))
        self.settings = everyone[self.world.rank][0]
        self.starts = on_main(lambda: self._open(everyone, shape))[self.world.rank :: self.world.size]

    def _open(self, everyone: list[tuple[dict[str, Any], str]], shape: tuple[int, ...]) -> list[int]:
        """Locks the folder on rank 0; returns the first index of each batch with missing videos."""
        for rank, (settings, _) in enumerate(everyone):
            for key, value in settings.items():
                same = value == self.settings[key]
                require(same, f"{key} of rank {rank} differs from rank 0: give all ranks the same files.")
        for note in self.folder.open(self.settings, {each for _, each in everyone}, shape):
            say(f"warning: {note}")
        starts, size = self.folder.missing_batches(self.batch_size), self.batch_size
        say(f"{self.folder.count_done()}; {len(starts)} batches of {size} to sample, on {self.world.size} process(es)")
        if 0 < len(starts) < self.world.size:
            remedy = "; use a smaller --batch_size to occupy all" if size > 1 else ""
            say(f"warning: some processes have nothing to do{remedy}.")
        return starts

    @property
    def indices(self) -> list[int]:
        """All indices of this process's batches.

        Batches are sampled whole, even if some videos exist: the bytes of a video depend on its batch.
        """
        return [index for start in self.starts for index in range(start, start + self.batch_size)]

    def write_batches(self, generator: Generator, fps: int, **settings: Any) -> float:
        """Samples and writes the missing videos of this process's batches; returns seconds of the slowest.

        Raises: Stopped, within a sampler step of a signal; SamplesNotWritten if the disk is full.
        """
        slowest, start = 0.0, time.monotonic()
        with show_steps(len(self.starts), self.folder.count_done, self._check_signals) as show:
            for batch, videos in generator.batches(indices=self.indices, callback=show, **settings):
                for index, video in zip(batch, videos, strict=True):
                    if index < self.folder.num_videos:
                        self.folder.write(index, video, fps)
                slowest, start = max(slowest, time.monotonic() - start), time.monotonic()
        return slowest

    def _check_signals(self) -> None:
        if self.signals.received:
            raise Stopped(self.folder.count_done())

    def collect(
        self, slowest: float, facts: Callable[[int], dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], np.ndarray]:
        """Waits for all videos, on rank 0; returns `videos` for samples.json and the first `SHOWN` (n, F, H, W, 3).

        Args:
            slowest: seconds of this process's slowest batch.
            facts: maps an index to further samples.json entries.

        Raises: Stopped; SamplesNotWritten if the other processes stopped.
        """
        self._wait_for_others(max(PATIENCE_S, PATIENCE_BATCHES * slowest))
        folder, files = self.folder, []
        for index in range(folder.num_videos):
            paths = [folder.file(kind, index) for kind in folder.kinds]
            hashes = {path.relative_to(folder.path).as_posix(): file_sha256(path) for path in paths}
            files.append({"index": index, **facts(index), "file": next(iter(hashes)), "sha256": hashes})
        first = [folder.file(folder.kinds[-1], index) for index in range(min(SHOWN, folder.num_videos))]
        return files, np.stack([read_video(file) for file in first])

    def _wait_for_others(self, patience: float) -> None:
        """Waits for all videos. Raises: SamplesNotWritten if no new one appears for `patience` seconds."""
        before, since = -1, time.monotonic()
        while (done := len(self.folder.done())) < self.folder.num_videos:
            self._check_signals()
            if done > before:
                say(f"waiting for the other processes: {self.folder.count_done()}")
                before, since = done, time.monotonic()
            if time.monotonic() - since > patience:
                raise SamplesNotWritten(
                    f"{self.folder.num_videos - done} videos of other processes are missing, and none has appeared for "
                    f"{patience:.0f} s: run the same command to continue."
                )
            time.sleep(POLL_S)


def machine(device: torch.device) -> str:
    """Returns the torch version and device kind, which may affect the last bits of a video."""
    kind = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else torch.cuda.get_device_name(device)
    return f"torch {torch.__version__} on {device.type} {kind}"
