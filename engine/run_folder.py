"""The run folder: lock, events, end markers, errors, stacks of hung steps, the log, and the meter for it.

.lock            locked while a run writes here; names its host and process
events.jsonl     starts, resumes, skipped steps, spikes, stops: one object per line
metrics.jsonl    numbers of training and of each callback; also in tensorboard/
errors/rank1.json  the error that ended rank 1: step, batch, error, traceback
errors/rank1.stacks.txt  the stack of each thread of rank 1 when a step hung
PREEMPTED        a signal stopped the run at this step; start it again to continue
COMPLETED        the run reached train.max_steps; hashes of the last checkpoint
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import math
import os
import resource
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.storage import FolderLock, write_json
from common.text import printable

log = logging.getLogger(__name__)

PREEMPTED, COMPLETED = "PREEMPTED", "COMPLETED"


class RunFolder:
    """The folder of one run. Only rank 0 (`is_main`) opens it and writes events and markers."""

    def __init__(self, path: Path, is_main: bool = True) -> None:
        self.path, self.is_main = path, is_main
        self.checkpoints = path / "checkpoints"
        self.lock = FolderLock(path, "train.output_dir")

    def open(self) -> None:
        """Locks the folder and deletes the markers and errors of the previous session; OSError if not writable."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock.take()
            self.checkpoints.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=self.checkpoints):  # fails now, not after hours at the first checkpoint
                pass
        except OSError as error:
            self.lock.release()
            if error.errno is None:  # our own message
                raise
            files = [place for place in (self.checkpoints, self.path, *self.path.parents) if place.is_file()]
            reason = f"{files[0]} is a file; name a folder" if files else error.strerror or str(error)
            raise OSError(f"train.output_dir={self.path} cannot be written: {reason}.") from None
        for marker in (PREEMPTED, COMPLETED):
            (self.path / marker).unlink(missing_ok=True)
            (self.path / f".{marker}.tmp").unlink(missing_ok=True)
        shutil.rmtree(self.path / "errors", ignore_errors=True)

    def event(self, kind: str, step: int, **facts: Any) -> None:
        """Appends one event, on rank 0."""
        if not self.is_main:
            return
        recreate_checkpoints(self.checkpoints)
        row = {"time": round(time.time(), 3), "step": step, "event": kind, **facts}
        with (self.path / "events.jsonl").open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    def mark(self, marker: str, step: int, **facts: Any) -> None:
        """Writes the file `marker` atomically, on rank 0."""
        if self.is_main:
            recreate_checkpoints(self.checkpoints)
            content = {"step": step, "time": round(time.time(), 3), **facts}
            write_json(self.path / marker, content, indent=2, temporary=self.path / f".{marker}.tmp")

    def report_failure(self, rank: int, step: int, error: BaseException, **facts: Any) -> None:
        """Writes the error that ended this rank to errors/."""
        report = {
            "rank": rank,
            "host": socket.gethostname(),
            "step": step,
            "time": round(time.time(), 3),
            "error": f"{type(error).__name__}: {error}",
            **facts,
            "traceback": traceback.format_exception(error),
        }
        with contextlib.suppress(OSError):  # the error itself matters more than its file
            (self.path / "errors").mkdir(parents=True, exist_ok=True)
            (self.path / "errors" / f"rank{rank}.json").write_text(json.dumps(report, indent=2) + "\n")


def recreate_checkpoints(checkpoints: Path) -> None:
    """Recreates the checkpoint and run folders if they were deleted during the run, with a warning."""
    if checkpoints.is_dir():
        return
    gone = checkpoints if checkpoints.parent.is_dir() else checkpoints.parent
    checkpoints.mkdir(parents=True, exist_ok=True)
    log.warning("%s was deleted during the run: recreated, but its content is lost", gone)


class HangWatch:
    """Writes the stacks of all threads to `file` if no step ends within `seconds` (0: never)."""

    def __init__(self, file: Path, seconds: float) -> None:
        self.seconds = seconds
        self._stream: IO[str] | None = None
        self._file = file

    def tick(self) -> None:
        """Restarts the countdown after a step."""
        if not self.seconds:
            return
        if self._stream is None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._file.open("w")
        faulthandler.dump_traceback_later(self.seconds, file=self._stream)

    def stop(self) -> None:
        """Ends the countdown, and deletes the file if it is empty."""
        if self._stream is None:
            return
        faulthandler.cancel_dump_traceback_later()
        empty = os.fstat(self._stream.fileno()).st_size == 0
        self._stream.close()
        self._stream = None
        if empty:
            self._file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other ranks may have files there
                self._file.parent.rmdir()


# ---- the log ---------------------------------------------------------------------------------------


class NullLogger:
    """Discards everything: the log of every rank but the first."""

    def __getattr__(self, name: str) -> Callable[..., bool]:
        return lambda *_, **__: False


class RunLogger:
    """The log of one run in `folder`.

    metrics.jsonl holds one object per line; its `kind` is `train` or the `kind` of a callback. A resume at step s drops
    the lines of later steps, which will be written again. TensorBoard tags are `<kind>/<name>`.
    """

    def __init__(self, folder: Path, *, start: int, total: int) -> None:
        self._folder, self._total, self._step = folder, total, start
        self._open(start)
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, disable=not self._terminal)

    def _open(self, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        file, kept = self._folder / "metrics.jsonl", []
        for line in file.read_text().splitlines() if start and file.is_file() else []:
            with contextlib.suppress(ValueError, KeyError):  # a row cut short by a kill
                kept += [f"{line}\n"] if json.loads(line)["step"] <= start else []
        file.write_text("".join(kept))
        self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=start + 1 if start else None)

    def _open_again(self) -> None:
        """Reopens files that were deleted during the run, with a warning."""
        gone = [name for name in ("metrics.jsonl", "tensorboard") if not (self._folder / name).exists()]
        if not gone:
            return
        if self._folder.is_dir():
            self.say(f"warning: {' and '.join(gone)} of {self._folder} was deleted during the run and is recreated")
        else:
            recreate_checkpoints(self._folder / "checkpoints")
        (self._folder / "tensorboard").mkdir(exist_ok=True)  # for rows that its writer still buffers
        with contextlib.suppress(OSError):  # the writer may have failed already
            self._board.close()
        self._open(self._step)

    def say(self, text: str) -> None:
        """Prints one line above the bar; line breaks in file and class names are escaped."""
        tqdm.write(printable(text), file=sys.stderr)

    def advance(self, step: int) -> None:
        """Moves the bar to `step`."""
        self._step = step
        self._bar.update(step - self._bar.n)

    def metrics(self, step: int, values: dict[str, Any], kind: str = "train") -> None:
        """Writes one row of numbers at `step`; a number that is not finite becomes null, as JSON has no NaN."""
        self._open_again()
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with (self._folder / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps({"step": step, "kind": kind, **row}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)
        if kind != "train":
            return
        loss, rate = f"loss {values['loss']:.4f}", f"{values['videos_per_second']:.1f} videos/s"
        self._bar.set_postfix_str(f"{loss}, {rate}", refresh=False)
        if not self._terminal:
            eta = timedelta(seconds=round((self._total - step) * values["seconds_per_step"]))
            self.say(f"step {step}/{self._total}  {loss}  {rate}  ETA {eta}")

    def picture(self, step: int, tag: str, pixels: np.ndarray) -> None:
        """Writes one picture (H, W, 3) uint8 at `step` to TensorBoard."""
        self._open_again()
        self._board.add_image(tag, pixels, step, dataformats="HWC")

    def holds(self, step: int, kind: str) -> bool:
        """Returns whether there is a row of `kind` at `step`."""
        self._open_again()
        return any(row["step"] == step for row in read_rows(self._folder / "metrics.jsonl", kind))

    def close(self) -> None:
        """Flushes and closes everything."""
        self._open_again()
        self._bar.close()
        self._board.close()


def read_rows(file: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Returns the rows of `kind` in a metrics.jsonl, in order; a row with no `kind` counts as `train`."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row for row in rows if row.get("kind", "train") == kind]


# ---- the numbers of a row --------------------------------------------------------------------------


class Meter:
    """Averages device scalars and measures time over steps, without waiting for the device."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Starts a new row."""
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._waited = 0.0
        self._started = time.perf_counter()

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds the values of one step."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time spent inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent inside from the time per step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - start

    def means(self) -> tuple[dict[str, Tensor], float, float]:
        """Returns the mean of each value, seconds per step, and the share of time spent waiting for data."""
        means = {name: total / self._steps for name, total in self._sums.items()}
        passed = time.perf_counter() - self._started
        return means, passed / self._steps, self._waited / passed


def peak_memory_gib(device: torch.device) -> float:
    """Returns the peak memory so far: allocated by torch on a GPU; resident set of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
