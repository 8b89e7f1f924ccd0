"""The storage kit: atomic files, folder locks, comparing settings, removing unfinished files."""

import json
import logging
import re
from pathlib import Path

import pytest

from common.checks import require
from common.storage import (
    FolderLock,
    explain_write_errors,
    file_sha256,
    free_bytes,
    make_once,
    remove_unfinished,
    write_atomically,
    write_folder_atomically,
    write_json,
)
from common.text import gigabytes, printable
from tests.conftest import refuses


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    file, temporary = tmp_path / "a.json", tmp_path / "other" / "a.tmp"
    write_json(file, {"a": 1})
    temporary.parent.mkdir()
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    for place in (None, temporary):

        def fail(path: Path) -> None:
            path.write_text("half")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_atomically(file, fail, place)
    assert json.loads(file.read_text()) == {"a": 1}
    assert sorted(tmp_path.rglob("*")) == [file, temporary.parent]


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail(new: Path) -> None:
        (new / "half").write_text("")
        raise KeyboardInterrupt

    (tmp_path / ".out.new").mkdir()  # of a killed process
    (tmp_path / ".out.new" / "half").write_text("")
    with pytest.raises(KeyboardInterrupt):
        write_folder_atomically(tmp_path / "out", fail)
    assert list(tmp_path.iterdir()) == []
    out = write_folder_atomically(tmp_path / "deep" / "out", lambda new: (new / "a").write_text("b"))
    assert sorted(tmp_path.rglob("*")) == [out.parent, out, out / "a"] and (out / "a").read_text() == "b"


def test_a_folder_is_made_once_for_the_same_settings(tmp_path: Path) -> None:
    folder, made = tmp_path / "out", []

    def make(seed: int, **options: bool) -> bool:
        write = lambda new: made.append((new / "clip").write_text(str(seed)))  # noqa: E731
        return make_once(folder, {"seed": seed}, write, **options)

    assert make(0) and not make(0)
    refuses(r"out was made with other settings \(seed: 0 -> 1\)", make, 1)
    assert make(1, replace=True) and len(made) == 2
    assert (folder / "clip").read_text() == "1" and list(tmp_path.iterdir()) == [folder]
    (folder / ".complete.json").unlink()
    for place in (folder, folder / "clip"):
        refuses("holds files that this tool did not make", make_once, place, {}, lambda new: None, replace=True)
    assert (folder / "clip").read_text() == "1"


def test_a_lock_names_its_owner_and_is_released(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path, "out"), FolderLock(tmp_path, "out")
    first.take()
    owner = (tmp_path / ".lock").read_text().strip()
    refuses(re.escape(f"out={tmp_path} is being written by {owner}; stop that run"), second.take)
    first.release()
    second.take()
    first.release()  # not its lock any more
    assert (tmp_path / ".lock").exists()
    second.release()
    assert not (tmp_path / ".lock").exists()


def test_only_unfinished_files_are_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.tmp-1").write_text("")
    (tmp_path / "b.tmp-2").mkdir()
    (tmp_path / "b.tmp-2" / "inside").write_text("")
    (tmp_path / "keep").write_text("")
    (tmp_path / "c.tmp-3").symlink_to(tmp_path / "keep")
    with caplog.at_level(logging.WARNING):
        assert remove_unfinished(tmp_path, re.compile(r"\w\.tmp-\d")) == ["a.tmp-1", "b.tmp-2"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c.tmp-3", "keep"] and not caplog.text
    assert remove_unfinished(tmp_path / "absent", re.compile(".*")) == []


def test_write_errors_are_sentences(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^--out x cannot be written: Not a directory; fix that$"):  # noqa: SIM117
        with explain_write_errors("--out x", "; fix that"):
            (tmp_path / "file" / "b").write_text("")
    with pytest.raises(OSError, match=r"^a sentence$"), explain_write_errors("--out x"):
        raise OSError("a sentence")


def test_small_helpers(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a").startswith("ba7816bf")
    assert free_bytes(tmp_path / "not" / "there") > 0
    assert gigabytes(1.5e9) == "1.500 GB" and printable("a\n\x1b[1m\u00e9") == "a\\n\\x1b[1m\u00e9"
    require(True, "no")
    refuses(r"^yes$", require, False, "yes")
