"""Unpacks a data set's zip archive after checking its directory; any problem rejects the whole archive."""

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
MAX_RATIO = 200  # real images, videos and arrays do not compress further ...
SMALL = 2**24  # ... and single-colour ones, which do, are smaller than this many bytes
SYMLINK = 0o120000
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def unpack(archive: Path, folder: Path) -> Path:
    """Unpacks `archive` atomically into the new `folder` and returns it; an existing `folder` is kept."""
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
                raise OSError(f"'{archive}' unpacks to {needed} bytes, but '{folder.parent}' has {free} free")

            return write_folder_atomically(folder, lambda new: extract(opened, members, new, archive))
    except (zipfile.BadZipFile, struct.error, NotImplementedError, UnicodeError) as error:
        raise VideoError(archive, "is not a readable zip archive: incomplete or damaged") from error


def extract(opened: zipfile.ZipFile, members: Iterable[zipfile.ZipInfo], folder: Path, archive: Path) -> None:
    """Writes the members, at most the bytes that their entries state, and verifies the checksums."""
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
    """Raises VideoError for too many entries, counted in the raw directory; the archive's own count is not trusted."""
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
        file.seek(max(0, size - len(tail) + end - length - 76))  # 76: zip64 records in between
        entries = file.read(length + 76).count(b"PK\1\2")
    if entries >= MAX_ENTRIES:
        raise VideoError(path, f"holds {entries} entries, but must have fewer than {MAX_ENTRIES}: unpack it yourself")


def check_members(path: Path, entries: list[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    """Returns the entries that are files. Raises VideoError if one of them, or their total size, is suspicious."""
    members: dict[str, zipfile.ZipInfo] = {}
    for entry in entries:
        name, packed, unpacked = entry.orig_filename, entry.compress_size, entry.file_size
        above = ".." in PurePosixPath(name.replace("\\", "/")).parts
        more = f"more than {MAX_RATIO} times as many"
        for problem, found in {
            "leads out of the archive": above or name.startswith(("/", "\\")) or "\0" in name or name[1:2] == ":",
            "is encrypted": entry.flag_bits & 1,
            "is a symbolic link": entry.external_attr >> 16 & 0o170000 == SYMLINK,
            f"is compressed by method {entry.compress_type}, which is not supported": entry.compress_type
            not in METHODS,
            f"unpacks from {packed} bytes to {unpacked}, {more}": unpacked > max(SMALL, MAX_RATIO * packed),
            "is there twice": entry.filename in members,
        }.items():
            if found:
                raise VideoError(path, f"is refused: its entry {name!r} {problem}")
        if not entry.is_dir():
            members[entry.filename] = entry
    size, total = path.stat().st_size, sum(entry.file_size for entry in members.values())
    if total > max(MAX_RATIO * size, SMALL):
        raise VideoError(path, f"is refused: its {size} bytes unpack to {total}, more than {MAX_RATIO} times as many")
    return list(members.values())
