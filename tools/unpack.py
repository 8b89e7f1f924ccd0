"""Unpacks a zip archive of a data set after checking its directory; the first thing wrong refuses it as a whole."""

from __future__ import annotations

import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from common.storage import free_bytes, write_folder_atomically
from datasets import VideoError

MAX_ENTRIES = 10**6  # an archive with this many is refused; each takes half a kilobyte of memory
MAX_DIRECTORY = 2**28  # bytes of the archive's directory
MAX_RATIO = 200  # pictures, videos and arrays of real pixels do not shrink further ...
SMALL = 2**24  # ... and those of one colour, which do, are smaller than this many bytes
SYMLINK = 0o120000
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def unpack(archive: Path, folder: Path) -> Path:
    """Unpacks `archive` into the new folder `folder`, whole or not at all; returns it. An unpacked one is kept."""
    if folder.is_dir():
        if folder.stat().st_mtime < archive.stat().st_mtime:
            raise ValueError(f"'{folder}' was unpacked before '{archive}' was last changed: remove it, then repeat")
        return folder
    try:
        check_directory(archive)
        with zipfile.ZipFile(archive) as opened:
            members = check_members(archive, opened.infolist())
            needed, free = sum(each.file_size for each in members), free_bytes(folder.parent)
            if needed > free:
                raise OSError(f"'{archive}' unpacks to {needed} bytes, and '{folder.parent}' has {free} left")

            return write_folder_atomically(folder, lambda new: extract(opened, members, new, archive))
    except (zipfile.BadZipFile, struct.error, NotImplementedError, UnicodeError) as error:
        raise VideoError(archive, "is not a readable zip archive: incomplete or damaged") from error


def extract(opened: zipfile.ZipFile, members: Iterable[zipfile.ZipInfo], folder: Path, archive: Path) -> None:
    """Writes the members; no more bytes than their entries state, and the checksums must be right."""
    for member in members:
        target = folder / member.filename
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with opened.open(member) as source, target.open("xb") as file:
                shutil.copyfileobj(source, file, 2**20)
        except (FileExistsError, NotADirectoryError):
            raise VideoError(archive, f"is refused: its entry {member.filename!r} is there twice") from None
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise VideoError(archive / member.filename, "cannot be unpacked: the archive is damaged") from error


def check_directory(path: Path) -> None:
    """Refuses too many entries by counting them in the raw directory, whatever number the archive states."""
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
            raise VideoError(path, f"its directory has {length} bytes, more than {MAX_DIRECTORY}: unpack it yourself")
        file.seek(max(0, size - len(tail) + end - length - 76))  # 76: the records of zip64 between the two
        entries = file.read(length + 76).count(b"PK\1\2")
    if entries >= MAX_ENTRIES:
        raise VideoError(path, f"holds {entries} entries; fewer than {MAX_ENTRIES} are unpacked: unpack it yourself")


def check_members(path: Path, entries: list[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    """Returns the entries that are files. Raises VideoError where one of them, or their sum, is suspicious."""
    members: dict[str, zipfile.ZipInfo] = {}
    for entry in entries:
        name, packed, unpacked = entry.orig_filename, entry.compress_size, entry.file_size
        above = ".." in PurePosixPath(name.replace("\\", "/")).parts
        more = f"more than {MAX_RATIO} times as many"
        for problem, found in {
            "leads out of the archive": above or name.startswith(("/", "\\")) or "\0" in name or name[1:2] == ":",
            "is encrypted": entry.flag_bits & 1,
            "is a symbolic link": entry.external_attr >> 16 & 0o170000 == SYMLINK,
            f"is packed by method {entry.compress_type}, which is not read": entry.compress_type not in METHODS,
            f"unpacks from {packed} bytes to {unpacked}, {more}": unpacked > max(SMALL, MAX_RATIO * packed),
            "is there twice": entry.filename in members,
        }.items():
            if found:
                raise VideoError(path, f"is refused: its entry {name!r} {problem}")
        if not entry.is_dir():
            members[entry.filename] = entry
    size, total = path.stat().st_size, sum(entry.file_size for entry in members.values())
    if total > max(MAX_RATIO * size, SMALL):
        raise VideoError(path, f"is refused: its {size} bytes unpack to {total}, more than {MAX_RATIO} times more")
    return list(members.values())
