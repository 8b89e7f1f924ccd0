"""Crash-safe files and folders: atomic writes, folder locks, comparison of settings, removal of leftovers.

Checkpoints, run folders, sampling jobs, caches and prepared data sets are all written with these functions.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)


# ---- files -------------------------------------------------------------------------------------------


def write_atomically(path: str | Path, write: Callable[[Path], object], temporary: Path | None = None) -> Path:
    """Writes a file completely or not at all: fills a temporary file, syncs it, renames it; returns `path`.

    Args:
        write: fills the temporary file, whose path it receives.
        temporary: its path, on the same file system; by default a hidden name next to `path` with the same suffix.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if temporary is None:
        temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")  # writers infer the format from it
    try:
        write(temporary)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: Path, content: Any, indent: int | None = None, temporary: Path | None = None) -> None:
    """Writes `content` as JSON, atomically."""
    text = json.dumps(content, indent=indent)
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"), temporary)


def write_synced(file: Path, content: bytes) -> None:
    """Writes `content` and waits until it is on disk."""
    file.write_bytes(content)
    sync(file)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(file: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tree_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, or of the names and contents of all files below a folder."""
    if path.is_file():
        return file_sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    names = [f"{file.relative_to(path).as_posix()}\0{file_sha256(file)}\0" for file in files]
    return hashlib.sha256("".join(names).encode(errors="surrogateescape")).hexdigest()


# ---- folders -----------------------------------------------------------------------------------------


def write_folder_atomically(folder: Path, write: Callable[[Path], object]) -> Path:
    """Writes a folder completely or not at all: `write` fills a hidden folder, which is renamed to `folder`.

    `folder` must be absent or empty. A hidden folder left by a killed process is deleted.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        write(temporary)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def make_once(
    folder: Path, settings: Mapping[str, Any], make: Callable[[Path], object], *, replace: bool = False
) -> bool:
    """Fills `folder` atomically with `make`, unless it already holds the result of these settings.

    Args:
        settings: everything the result depends on, as JSON; recorded in `folder`/.complete.json.
        replace: whether to replace the result of other settings instead of raising.

    Returns whether `make` was called. Raises ValueError if `folder` holds anything else.
    """
    marker = folder / ".complete.json"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not marker.is_file():
            raise ValueError(f"{folder} holds files that this tool did not make: name another folder.")
        before = json.loads(marker.read_text(encoding="utf-8"))
        if before == settings:
            return False
        if not replace:
            require_same_settings(folder, before, settings)

    def write(new: Path) -> None:
        make(new)
        write_json(new / marker.name, settings, indent=1)
        if folder.exists():
            shutil.rmtree(folder)

    write_folder_atomically(folder, write)
    return True


def require_same_settings(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ValueError, listing the differences, if `folder` was made with other settings."""
    if changes := find_changes(before, now):
        raise ValueError(
            f"{folder} was made with other settings ({', '.join(changes)}): use the same, or name another folder."
        )


class FolderLock:
    """A lock file that lets one process at a time write into a folder; the kernel releases it when the process dies.

    `key`: the setting that names the folder, for error messages; `file`: by default `.lock` in it.
    """

    def __init__(self, folder: Path, key: str, file: Path | None = None) -> None:
        self.folder, self.key = folder, key
        self.file = file or folder / ".lock"
        self._lock: IO[str] | None = None

    def take(self) -> None:
        """Takes the lock. Raises OSError, naming the owner, if another live process holds it."""
        lock = self.file.open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            lock.close()
            raise OSError(
                f"{self.key}={self.folder} is being written by {owner}; stop that run or name another folder."
            ) from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): make sure only one run writes there", self.folder, error.strerror)
        try:
            is_current = os.path.samestat(os.fstat(lock.fileno()), self.file.stat())
        except FileNotFoundError:
            is_current = False
        if not is_current:  # its last owner has just deleted it
            lock.close()
            self.take()
            return
        lock.truncate(0)
        lock.write(f"{socket.gethostname()}:{os.getpid()}\n")
        lock.flush()
        self._lock = lock

    def release(self) -> None:
        """Releases the lock, if this process holds it."""
        if self._lock is not None:
            self.file.unlink(missing_ok=True)
            self._lock.close()
            self._lock = None


def find_changes(before: Mapping[str, Any], now: Mapping[str, Any], keys: Collection[str] | None = None) -> list[str]:
    """Returns `key: old -> new` for each differing setting (of `keys`, in their order)."""
    compared = sorted({*before, *now}) if keys is None else keys
    return [f"{key}: {before.get(key)} -> {now.get(key)}" for key in compared if before.get(key) != now.get(key)]


def remove_unfinished(folder: Path, names: re.Pattern[str]) -> list[str]:
    """Deletes what a killed process left in `folder`: files and folders, no links, whose whole name matches `names`.

    Returns these names; logs a warning for an entry that cannot be deleted.
    """
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    unfinished = [entry for entry in entries if names.fullmatch(entry.name) and not entry.is_symlink()]
    for entry in unfinished:
        try:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        except OSError as error:
            log.warning("unfinished %s cannot be deleted: %s", entry, error.strerror or error)
    return [entry.name for entry in unfinished]


def free_bytes(folder: Path) -> int:
    """Returns the free bytes on the file system of `folder`, which need not exist yet."""
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free


@contextlib.contextmanager
def explain_write_errors(place: str, advice: str = "") -> Iterator[None]:
    """Turns an OSError into one sentence: `place` cannot be written, the reason, `advice`."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # already our own message
            raise
        raise OSError(f"{place} cannot be written: {error.strerror or error}{advice}") from error
