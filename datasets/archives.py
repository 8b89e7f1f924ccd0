"""Zip archives read in place, as if they were folders: `set.zip/a/clip.mp4` is a path like any other.

Nothing is ever extracted. An archive is checked once, from its directory, before any member is read; the first
thing wrong with it refuses it as a whole, in one sentence.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections import defaultdict
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from .errors import VideoError

ARCHIVE_SUFFIX = ".zip"
MAX_ENTRIES = 10**6  # an archive with so many is refused; each takes half a kilobyte of memory
MAX_DIRECTORY = 2**28  # bytes of the directory of so many entries, with long names
MAX_MEMBER = 2**31  # bytes of one unpacked member: it is held in memory while it is read
MAX_RATIO = 200  # pictures, videos and arrays of real pixels do not shrink so far ...
SMALL = 2**24  # ... and those of one colour, which do, are smaller than this many bytes
SYMLINK = 0o120000
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class Archive:
    """The visible files of a zip: `folders[folder] -> file names` ("" is the top), with or without folder entries.

    Raises VideoError where the archive is damaged or anything in it is suspicious.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            _check_directory(path)
            self.zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, struct.error, NotImplementedError, UnicodeError) as error:
            raise VideoError(path, "is not a readable zip archive: incomplete or damaged") from error
        self.members = _checked(path, self.zip.infolist())
        self.folders: dict[str, list[str]] = defaultdict(list)
        for name in self.members:
            folder, _, file = name.rpartition("/")
            self.folders[folder].append(file)

    def read(self, name: str) -> bytes:
        """The bytes of a member, checked against its sum."""
        if name not in self.members:
            raise VideoError(self.path / name, "is not in the archive")
        try:
            with self.zip.open(self.members[name]) as member:
                return member.read(self.members[name].file_size)  # without a number it would unpack all there is
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
            reason = f"cannot be unpacked: the archive is damaged ({type(error).__name__})"
            raise VideoError(self.path / name, reason) from error


def _check_directory(path: Path) -> None:
    """Refuse too many entries by counting them in the raw directory, whatever number the archive states."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 2**16 - 42))
        tail = file.read()
        end = tail.rfind(b"PK\5\6")
        if end < 0:
            raise zipfile.BadZipFile("no end record")
        length = int(struct.unpack_from("<L", tail, end + 12)[0])
        larger = tail.rfind(b"PK\6\6", 0, end)  # the record of a zip64 archive
        if length == 2**32 - 1 and larger >= 0:
            length = int(struct.unpack_from("<Q", tail, larger + 40)[0])
        if length > MAX_DIRECTORY:
            raise VideoError(path, f"its directory has {length} bytes, more than {MAX_DIRECTORY}: unpack it")
        file.seek(max(0, size - len(tail) + end - length - 76))  # 76: the records of zip64 between the two
        entries = file.read(length + 76).count(b"PK\1\2")
    if entries >= MAX_ENTRIES:
        raise VideoError(path, f"holds {entries} entries; fewer than {MAX_ENTRIES} are read: unpack it into a folder")


def _checked(path: Path, entries: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Name -> entry of all files."""
    members: dict[str, zipfile.ZipInfo] = {}
    for entry in entries:
        refusal = _refusal(entry)
        if refusal is None and entry.filename in members:
            refusal = "is there twice"
        if refusal:
            raise VideoError(path, f"is refused: its entry {entry.orig_filename!r} {refusal}")
        if not entry.is_dir():
            members[entry.filename] = entry
    packed, unpacked = path.stat().st_size, sum(entry.file_size for entry in members.values())
    if unpacked > max(MAX_RATIO * packed, SMALL):
        raise VideoError(path, f"is refused: its {packed} bytes unpack to {unpacked}, more than {MAX_RATIO} times more")
    return members


def _refusal(entry: zipfile.ZipInfo) -> str | None:
    """What is wrong with one entry, or None."""
    name = entry.orig_filename
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if name.startswith(("/", "\\")) or ".." in parts or "\0" in name or name[1:2] == ":":
        return "leads out of the archive"
    if entry.flag_bits & 1:
        return "is encrypted"
    if entry.external_attr >> 16 & 0o170000 == SYMLINK:
        return "is a symbolic link"
    if entry.compress_type not in METHODS:
        return f"is packed by method {entry.compress_type}; only stored and deflated ones are read"
    if entry.file_size > MAX_MEMBER:
        return f"unpacks to {entry.file_size} bytes; at most {MAX_MEMBER} are read"
    if entry.file_size > max(SMALL, MAX_RATIO * entry.compress_size):
        return f"unpacks from {entry.compress_size} bytes to {entry.file_size}, more than {MAX_RATIO} times as many"
    return None


@lru_cache(maxsize=8)
def _open(path: Path, size: int, modified_ns: int, process: int) -> Archive:
    """One archive, opened once per process: a forked one must not share the place in the file."""
    return Archive(path)


@lru_cache(maxsize=1)
def _last_member(archive: Archive, name: str) -> bytes:
    """A video is opened several times while it is read; only one member is kept."""
    return archive.read(name)


def is_archive(path: Path) -> bool:
    """Whether this is a zip file."""
    return path.suffix.lower() == ARCHIVE_SUFFIX and path.is_file()


def open_archive(path: Path) -> Archive:
    """The archive in the file `path`; an unchanged one is opened once. VideoError, OSError."""
    stat = path.stat()
    return _open(path, stat.st_size, stat.st_mtime_ns, os.getpid())


def inside_archive(path: Path) -> tuple[Path, str] | None:
    """(archive, name inside it) of a path that leads into a zip, "" for the archive itself; None for all others."""
    if ARCHIVE_SUFFIX not in str(path).lower():
        return None
    archive = next((each for each in (path, *path.parents) if is_archive(each)), None)
    if archive is None:
        return None
    name = path.relative_to(archive).as_posix()
    return archive, "" if name == "." else name


def open_binary(path: str | Path) -> BinaryIO:
    """A file, or a member of an archive, for reading. OSError, VideoError."""
    inside = inside_archive(Path(path))
    if inside is None:
        return Path(path).open("rb")
    return io.BytesIO(_last_member(open_archive(inside[0]), inside[1]))


def is_folder(path: Path) -> bool:
    """Whether this is a folder, on the disk or in an archive."""
    inside = inside_archive(path)
    return path.is_dir() if inside is None else inside[1] in open_archive(inside[0]).folders


def names_in(folder: Path) -> list[str]:
    """Names of what lies directly in `folder`; in an archive, of the files."""
    inside = inside_archive(folder)
    if inside is None:
        return [entry.name for entry in folder.iterdir()]
    return open_archive(inside[0]).folders.get(inside[1], [])


def size_and_time(path: Path) -> tuple[int, int]:
    """Bytes and time of change of a file or member (a member's time is its archive's). OSError, VideoError."""
    inside = inside_archive(path)
    stat = (path if inside is None else inside[0]).stat()
    if inside is None or not inside[1]:
        return stat.st_size, stat.st_mtime_ns
    member = open_archive(inside[0]).members.get(inside[1])
    if member is None:
        raise VideoError(path, "is not in the archive")
    return member.file_size, stat.st_mtime_ns
