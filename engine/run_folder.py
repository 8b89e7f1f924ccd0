"""The folder of a run: its lock, its events, the markers that say how the last session ended, stacks of a hang.

.lock            locked while a run writes here; names its host and process
events.jsonl     starts, resumes, skipped steps, spikes, stops: one object a line
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
import os
import shutil
import socket
import tempfile
import time
import traceback
from pathlib import Path
from typing import IO, Any

from common.storage import FolderLock, write_json

log = logging.getLogger(__name__)

PREEMPTED, COMPLETED = "PREEMPTED", "COMPLETED"


class RunFolder:
    """The folder of one run. Only rank 0 opens it and writes markers; every rank may call `report_failure`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lock = FolderLock(path, "train.output_dir")

    def open(self) -> None:
        """Locks the folder and deletes the markers and errors of the last session.

        Raises: OSError if it or its checkpoints/ cannot be written, or another live process writes into it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.take()
            self.checkpoints.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=self.checkpoints):  # fails now, not after hours at the first checkpoint
                pass
        except OSError as error:
            self.close()
            if error.errno is None:  # a sentence of ours
                raise
            files = [place for place in (self.checkpoints, self.path, *self.path.parents) if place.is_file()]
            reason = f"{files[0]} is a file; name a folder" if files else error.strerror or str(error)
            raise OSError(f"train.output_dir={self.path} cannot be written: {reason}.") from None
        for marker in (PREEMPTED, COMPLETED):
            (self.path / marker).unlink(missing_ok=True)
            (self.path / f".{marker}.tmp").unlink(missing_ok=True)
        shutil.rmtree(self.path / "errors", ignore_errors=True)

    def close(self) -> None:
        """Releases the lock."""
        self._lock.release()

    def event(self, kind: str, step: int, **facts: Any) -> None:
        """Appends one event."""
        recreate_checkpoints(self.checkpoints)
        row = {"time": round(time.time(), 3), "step": step, "event": kind, **facts}
        with (self.path / "events.jsonl").open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    def mark(self, marker: str, step: int, **facts: Any) -> None:
        """Writes the file `marker` atomically."""
        recreate_checkpoints(self.checkpoints)
        content = {"step": step, "time": round(time.time(), 3), **facts}
        write_json(self.path / marker, content, indent=2, temporary=self.path / f".{marker}.tmp")

    def report_failure(self, rank: int, step: int, error: BaseException, **facts: Any) -> None:
        """Writes the error that ended this rank into a file of its own, so that no other rank overwrites it."""
        report = {
            "rank": rank,
            "host": socket.gethostname(),
            "step": step,
            "time": round(time.time(), 3),
            "error": f"{type(error).__name__}: {error}",
            **facts,
            "traceback": traceback.format_exception(error),
        }
        try:
            (self.path / "errors").mkdir(parents=True, exist_ok=True)
            (self.path / "errors" / f"rank{rank}.json").write_text(json.dumps(report, indent=2) + "\n")
        except OSError:  # the error itself matters more than its file
            return


def recreate_checkpoints(checkpoints: Path) -> None:
    """Creates the checkpoint and run folders again if somebody deleted them during the run, with a warning."""
    if checkpoints.is_dir():
        return
    gone = checkpoints if checkpoints.parent.is_dir() else checkpoints.parent
    checkpoints.mkdir(parents=True, exist_ok=True)
    log.warning("%s was deleted during the run: it was created again, and its content is lost", gone)


class HangWatch:
    """Writes the stack of every thread of this process into `file` when no step ended for `seconds` (0: never)."""

    def __init__(self, file: Path, seconds: float) -> None:
        self.seconds = seconds
        self._stream: IO[str] | None = None
        self._file = file

    def tick(self) -> None:
        """Restarts the countdown, after a step."""
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
            with contextlib.suppress(OSError):  # other ranks have theirs there
                self._file.parent.rmdir()
