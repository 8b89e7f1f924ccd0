"""What a run's folder tells others: who is writing it, how the last session ended, what happened on the way.

.lock            held while a run writes here; names its host and process
events.jsonl     starts, resumes, skipped steps, spikes, stops: one object a line
errors/rank1.json  what ended rank 1: step, batch, error, traceback
PREEMPTED        a signal stopped the run at this step; start it again to go on
COMPLETED        the run reached train.max_steps; hashes of the last checkpoint
"""

from __future__ import annotations

import contextlib
import fcntl
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

log = logging.getLogger(__name__)

PREEMPTED, COMPLETED = "PREEMPTED", "COMPLETED"


class FolderLock:
    """The file `.lock` in a folder that one process at a time writes into.

    Args:
        key: the setting that names the folder, for the sentence that refuses it.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self.key = key
        self._lock: IO[str] | None = None

    def take(self) -> None:
        """Hold the folder. Raises: OSError, a sentence, if another live process holds it."""
        file = self.folder / ".lock"
        lock = file.open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of a dead process's lock
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            lock.close()
            raise OSError(
                f"{self.key}={self.folder} is being written by {owner}; stop that run or name another folder."
            ) from None
        except OSError as error:
            log.warning(
                "%s cannot be locked (%s): see to it that only one run writes there", self.folder, error.strerror
            )
        if not is_same_file(lock, file):  # its last holder deleted it meanwhile
            lock.close()
            self.take()
            return
        lock.truncate(0)
        lock.write(f"{socket.gethostname()}:{os.getpid()}\n")
        lock.flush()
        self._lock = lock

    def release(self) -> None:
        """Let go of the folder, if this process holds it."""
        if self._lock is not None:
            (self.folder / ".lock").unlink(missing_ok=True)
            self._lock.close()
            self._lock = None


class RunFolder:
    """The folder of one run. Only rank 0 opens and marks it; every rank may `report_failure`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lock = FolderLock(path, "train.output_dir")

    def open(self) -> None:
        """Take the folder for this process and clear what the last session left.

        Raises: OSError if it or its checkpoints/ cannot be written, or another live process writes into it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.take()
            self.checkpoints.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=self.checkpoints):  # now, and not after hours at the first checkpoint
                pass
        except OSError as error:
            self.close()
            if error.errno is None:  # a sentence of ours
                raise
            raise OSError(f"train.output_dir={self.path} cannot be written: {self._obstacle(error)}.") from None
        for marker in (PREEMPTED, COMPLETED):
            (self.path / marker).unlink(missing_ok=True)
            (self.path / f".{marker}.tmp").unlink(missing_ok=True)
        shutil.rmtree(self.path / "errors", ignore_errors=True)

    def _obstacle(self, error: OSError) -> str:
        """What was in the way, in words."""
        files = [place for place in (self.checkpoints, self.path, *self.path.parents) if place.is_file()]
        return f"{files[0]} is a file; name a folder" if files else error.strerror or str(error)

    def close(self) -> None:
        """Let go of the folder."""
        self._lock.release()

    def event(self, kind: str, step: int, **facts: Any) -> None:
        """Append one event."""
        make_again(self.checkpoints)
        row = {"time": round(time.time(), 3), "step": step, "event": kind, **facts}
        with (self.path / "events.jsonl").open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    def mark(self, marker: str, step: int, **facts: Any) -> None:
        """Leave `marker`, complete or not at all."""
        make_again(self.checkpoints)
        aside = self.path / f".{marker}.tmp"
        with aside.open("w") as stream:
            json.dump({"step": step, "time": round(time.time(), 3), **facts}, stream, indent=2)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(self.path / marker)

    def report_failure(self, rank: int, step: int, error: BaseException, **facts: Any) -> None:
        """Say what ended this rank, in a file of its own that no other rank's error overwrites."""
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


def make_again(checkpoints: Path) -> None:
    """Make the folder of checkpoints, and the run's around it, that somebody deleted during the run; say so."""
    if checkpoints.is_dir():
        return
    gone = checkpoints if checkpoints.parent.is_dir() else checkpoints.parent
    checkpoints.mkdir(parents=True, exist_ok=True)
    log.warning("%s was deleted during the run: it is made again, and what was in it is lost", gone)


def is_same_file(stream: IO[str], path: Path) -> bool:
    """Whether `path` still names the open file."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    return False
