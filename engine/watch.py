"""Diagnosis of hangs and dead loader workers: the file that each worker reads, and stacks of a step that hangs."""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
from pathlib import Path
from typing import IO

from .signals import die_with_parent


class Breadcrumbs:
    """Records the file that each loader worker of this rank opened last, where it survives the worker.

    A worker calls it with a path, before it opens the file.
    """

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
        """Returns the files that the workers of these process ids (None: all) read last."""
        if not self.folder.is_dir():
            return []
        crumbs = {int(file.name): os.fsdecode(file.read_bytes()) for file in self.folder.iterdir()}
        return sorted({path for pid, path in crumbs.items() if pids is None or pid in pids})

    def explain(self, error: RuntimeError) -> str | None:
        """Returns a sentence on a loader worker that died or hung; None for any other error."""
        text = str(error)
        if text.startswith("Caught "):  # an error in a worker that is alive
            return None
        if "DataLoader worker" not in text and "DataLoader timed out" not in text:
            return None
        dead = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", text)
        files = self.read([int(pid) for pid in dead[1].split(",")] if dead else None) or self.read()
        what = "did not answer in time" if "timed out" in text else "died"
        return (
            f"a data loader worker {what} while it read {', '.join(files) or 'its first file'}: {text.splitlines()[0]}"
        )


def prepare_worker(worker_id: int) -> None:
    """Ties a loader worker to its fork server, and through it to the training process; runs first in each worker."""
    die_with_parent()
    trainer = multiprocessing.parent_process()
    if trainer is not None and not trainer.is_alive():  # the server may have died with it before the call above
        os.kill(os.getpid(), signal.SIGKILL)


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
