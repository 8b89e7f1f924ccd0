"""Zip archives: prepare_dataset unpacks them whole or not at all; a key that names one is answered with the command."""

import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from datasets import DataConfig, build_catalog
from evaluation.sources import Source
from sample.video_io import write_mp4
from tests.conftest import refuses, tree
from tools import prepare_dataset
from tools import unpack as unpack_module
from tools.unpack import MAX_ENTRIES, unpack


def pack(file: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("folder/", b"")
        for name, content in members.items():
            archive.writestr(name, content)
    return file


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_all_members_are_unpacked_once(tmp_path: Path, method: int) -> None:
    members = {"a.mp4": os.urandom(3_000_000), "deep/er/b.txt": b"text" * 1000, "empty": b""}
    archive = pack(tmp_path / "set.zip", members, method)
    folder = unpack(archive, tmp_path / "out")
    assert tree(folder) == members and (folder / "folder").exists() is False
    (folder / "a.mp4").write_bytes(b"changed")
    assert unpack(archive, folder) == folder and (folder / "a.mp4").read_bytes() == b"changed"
    later = folder.stat().st_mtime + 10
    os.utime(archive, (later, later))
    refuses(r"was unpacked before .* was last changed", unpack, archive, folder)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out", "set.zip"]


@pytest.mark.parametrize("content", [b"", b"PK", b"no archive", b"PK\5\6" + bytes(8), b"PK\5\6" + b"\xff" * 18])
def test_a_file_that_is_no_archive_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "set.zip").write_bytes(content)
    refuses(r"set\.zip: (is not a readable zip|its directory has)", unpack, tmp_path / "set.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_room_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = pack(tmp_path / "set.zip", {"a": bytes(1000)})
    monkeypatch.setattr(unpack_module, "free_bytes", lambda folder: 999)
    refuses(r"unpacks to 1000 bytes, but .* has 999 free", unpack, archive, tmp_path / "out")


def test_too_many_entries_are_counted_before_they_are_parsed(tmp_path: Path) -> None:
    """The end record states one entry only."""
    entry = b"PK\1\2" + bytes(24) + struct.pack("<H", 1) + bytes(16) + b"a"
    directory = entry * MAX_ENTRIES
    end = b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 1, 1, len(directory), 0, 0)
    (tmp_path / "set.zip").write_bytes(directory + end)
    refuses("holds 1000000 entries, but must have fewer than 1000000", unpack, tmp_path / "set.zip", tmp_path / "out")


def test_prepare_dataset_takes_an_archive(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", np.zeros((5, 16, 24, 3), np.uint8))
    archive = pack(tmp_path / "set.zip", {"videos/a.mp4": (tmp_path / "a.mp4").read_bytes()})
    for _ in range(2):
        prepare_dataset.main(["folder", str(archive), str(tmp_path / "out"), "--split", "all", "--workers", "1"])
    (link,) = (tmp_path / "out" / "train").rglob("*.mp4")
    assert link.resolve() == tmp_path / "out-unpacked" / "videos" / "a.mp4"


def test_a_path_that_names_an_archive_is_answered_with_the_command(tmp_path: Path) -> None:
    archive = pack(tmp_path / "set.zip", {"a.mp4": b"x"})
    sentence = r"is a zip archive: unpack it with `python -m tools\.prepare_dataset folder '.*set\.zip' OUT`"
    for name in ("folder", "captions"):
        refuses(r"data\.path: .*" + sentence, build_catalog, DataConfig(name=name, path=str(archive)))
    refuses("--real_data_path: .*" + sentence, Source.find, str(archive), "--real_data_path")
    write_folder = tmp_path / "folder.zip"  # a folder may be called so
    write_folder.mkdir()
    refuses("holds none", build_catalog, DataConfig(path=str(write_folder)))
