"""Converts many clips into one folder, in parallel and resumably, and reports skipped files. Not a command.

`tools.prepare_dataset` and `tools.convert_videos_to_frames` choose the clips; `tools.frames` writes each one. A clip is
written to OUT/.work/staged, recorded in OUT/.work/journal.jsonl, then renamed into place. So after a kill every clip in
place is complete and recorded, and the same command continues.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch

from common.checks import require
from common.console import progress_bar
from common.storage import FolderLock, explain_write_errors, require_same_settings, write_atomically
from common.text import printable
from datasets.catalog import Clip, find_clips
from datasets.readers import VIDEO_SUFFIXES
from engine.signals import die_with_parent
from tools.frames import Form, Record, Task, convert, remove

WORK = ".work"
RESUME_ADVICE = "; fix that, then repeat the command to continue"
SHOWN = 10  # entries of each list printed in the summary; report.json holds all


class OutputFolder:
    """The locked folder OUT, its journal and its report. Use as a context manager.

    OUT stores `tool` (the program's name), `source`, `form` and `settings` (everything else the result depends on).
    Raises ValueError or OSError if OUT overlaps SOURCE, holds other files or a result of other settings, or is in use.
    """

    def __init__(self, out: Path, source: Path, form: Form, tool: str, **settings: Any) -> None:
        if not source.is_dir():
            raise FileNotFoundError(f"there is no folder '{source}'")
        one, other = out.resolve(), source.resolve()
        nested = one.is_relative_to(other) or other.is_relative_to(one)
        require(not nested, f"the output folder '{out}' and the source '{source}' must not contain each other")
        self.out, self.source, self.form, self.work = out, source, form, out / WORK
        self.staged, self.journal = self.work / "staged", self.work / "journal.jsonl"
        self.settings = {"tool": tool, "source": str(other), **asdict(form), **settings}
        self.skipped: list[Record] = []  # clips that are not converted: {"name", "skipped": reason}
        self.left_out: list[tuple[str, str]] = []  # (name, reason) of files that are not clips
        self._lock = FolderLock(out, "OUT", self.work / "lock")

    def __enter__(self) -> OutputFolder:
        marker = self.work / "settings.json"
        with explain_write_errors(str(self.out), RESUME_ADVICE):
            ours = not self.out.exists() or self.work.is_dir() or not any(self.out.iterdir())
            require(ours, f"{self.out} holds files that this tool did not make: name another folder")
            if marker.is_file():
                require_same_settings(self.out, json.loads(marker.read_text(encoding="utf-8")), self.settings)
            self.staged.mkdir(parents=True, exist_ok=True)
        self._lock.take()
        self.write_text(f"{WORK}/{marker.name}", [json.dumps(self.settings, indent=1), "\n"])
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def find_clips(self, kinds: Sequence[str], suffixes: Collection[str] = VIDEO_SUFFIXES) -> list[Clip]:
        """Returns the clips of SOURCE, sorted; skips names that a text file cannot list."""

        def leave_out(reason: str, path: Path) -> None:
            words = f"not a clip: a file *{reason[1:]}" if reason.startswith("*") else reason
            self.left_out.append((path.relative_to(self.source).as_posix(), words))

        clips = sorted(find_clips(self.source, kinds, leave_out, suffixes), key=lambda clip: clip.name)
        require(bool(clips), f"'{self.source}' holds no {' and no '.join(kinds)} ({' '.join(sorted(suffixes))})")
        for clip in clips:
            if min(map(ord, clip.name)) < 32:
                self.skip(clip, "its name holds a line break or another control character")
        return [clip for clip in clips if min(map(ord, clip.name)) >= 32]

    def skip(self, clip: Clip, reason: str) -> None:
        """Records in the report that a clip is not converted."""
        self.skipped.append({"name": clip.name, "skipped": reason})

    def make(self, tasks: Sequence[Task], workers: int) -> list[Record]:
        """Converts missing clips; returns all records, in the order of `tasks`. Raises ValueError if there are none."""
        done = self._resume(tasks)
        missing = [task for task in tasks if task.out not in done]
        with progress_bar(len(tasks), "clip", initial=len(done)) as bar:
            for task, record in _convert_all(missing, self.staged, self.form, workers):
                if "skipped" in record:
                    self.skipped.append(record)
                else:
                    with explain_write_errors(str(self.out), RESUME_ADVICE), self.journal.open("a") as journal:
                        journal.write(f"{json.dumps(record)}\n")
                        journal.flush()
                        os.fsync(journal.fileno())
                        self._place(task)
                    done[task.out] = record
                bar.update()
        self._write_journal(done.values())
        if not done:
            reasons = "; ".join(f"{each['name']}: {each['skipped']}" for each in self.skipped[:3])
            raise ValueError(f"none of the {len(self.skipped)} clips in '{self.source}' can be used ({reasons})")
        return [done[task.out] for task in tasks if task.out in done]

    def _resume(self, tasks: Sequence[Task]) -> dict[str, Record]:
        """Returns the records of finished tasks, by `out`; deletes recorded clips that are not in `tasks`."""
        planned = {task.out: task for task in tasks}
        kept: dict[str, Record] = {}
        for line in self.journal.read_text().split("\n") if self.journal.is_file() else []:
            with contextlib.suppress(json.JSONDecodeError):  # a last line cut off by a kill
                record = json.loads(line)
                task, place = planned.get(record["out"]), self.out / record["out"]
                if task and [task.name, list(task.identity)] == [record["name"], record["identity"]]:
                    if not os.path.lexists(place) and os.path.lexists(self.staged / task.staged):
                        self._place(task)
                    if os.path.lexists(place):
                        kept[task.out] = record
                else:
                    remove(place)
                    with contextlib.suppress(OSError):
                        os.removedirs(place.parent)  # stops at a folder that is not empty, at the latest OUT
        for task in tasks:
            if task.out not in kept and os.path.lexists(self.out / task.out):
                raise ValueError(f"{self.out / task.out} was not made by this tool: move it away")
        self._write_journal(kept.values())
        for unfinished in self.staged.iterdir():
            remove(unfinished)
        return kept

    def _place(self, task: Task) -> None:
        """Moves a finished clip into place."""
        place = self.out / task.out
        place.parent.mkdir(parents=True, exist_ok=True)
        (self.staged / task.staged).rename(place)

    def _write_journal(self, records: Iterable[Record]) -> None:
        """Writes the journal sorted by output name."""
        ordered = sorted(records, key=lambda record: str(record["out"]))
        self.write_text(f"{WORK}/{self.journal.name}", (f"{json.dumps(each)}\n" for each in ordered))

    def write_text(self, name: str, parts: Iterable[str]) -> None:
        """Writes the text file OUT/name atomically; names that are not UTF-8 keep their bytes."""
        content = "".join(parts).encode(errors="surrogateescape")
        with explain_write_errors(str(self.out / name), RESUME_ADVICE):
            write_atomically(self.out / name, lambda file: file.write_bytes(content), temporary=self.work / "aside")

    def report(self, made: Sequence[Record], **more: Any) -> None:
        """Writes report.json: settings, counts, every omitted file, and `more`; prints a summary."""
        lists = {
            "skipped": ("skipped", [(each["name"], each["skipped"]) for each in self.skipped]),
            "notes": ("made, with a remark", [(each["name"], each["note"]) for each in made if each["note"]]),
            "left_out": ("not clips, left out", self.left_out),
        }
        found, frames = len(made) + len(self.skipped), sum(each["frames"] for each in made)
        report = {"settings": self.settings, "clips_found": found, "clips_made": len(made), "frames": frames}
        print(f"{len(made)} of {found} clips, {frames:,} frames, in {self.out}")
        for key, (title, pairs) in lists.items():
            report[key] = [{"file": name, "reason": reason} for name, reason in sorted(pairs)]
            if pairs:
                print(f"{title}: {len(pairs)}")
            for name, reason in sorted(pairs)[:SHOWN]:
                print(f"  {printable(name)}\n      {printable(reason)}")
            if len(pairs) > SHOWN:
                print(f"  and {len(pairs) - SHOWN} more, in {self.out / 'report.json'}")
        self.write_text("report.json", [json.dumps(report | more, indent=1), "\n"])


def _convert_all(tasks: Sequence[Task], staged: Path, form: Form, workers: int) -> Iterator[tuple[Task, Record]]:
    """Yields (task, record) as tasks finish, run in this process or in `workers` others."""
    if min(workers, len(tasks)) <= 1:
        yield from ((task, convert(task, staged / task.staged, form)) for task in tasks)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)), mp_context=get_context("spawn"), initializer=_start_worker, initargs=(os.getpid(),)
    )
    try:
        jobs = {pool.submit(convert, task, staged / task.staged, form): task for task in tasks}
        for job in as_completed(jobs):
            yield jobs.pop(job), job.result()
    except BrokenProcessPool as error:
        raise OSError(
            "a worker process was killed (out of memory?): repeat the command with fewer "
            "--workers; it continues where it stopped"
        ) from error
    except BaseException:  # Ctrl-C, a full disk: unfinished clips are made again, so do not wait for them
        for worker in active_children():
            worker.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(parent: int) -> None:
    """Sets up a worker: one thread, ignores Ctrl-C, dies with its parent."""
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
