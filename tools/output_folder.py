"""Converts many clips into one folder, in parallel and resumable, with a report of skipped files. No command line.

`tools.prepare_dataset` and `tools.convert_videos_to_frames` name the clips, `tools.frames` writes each. A clip is
written into OUT/.work/staged, entered into OUT/.work/journal.jsonl, then renamed into place. So after a kill every
clip in place is complete and in the journal, and the same command continues from there.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from common.console import progress_bar
from common.storage import FolderLock, explain_write_errors, find_changes, write_atomically
from common.text import printable
from engine.signals import die_with_parent
from tools.frames import Form, Record, Task, convert, remove

WORK, JOURNAL = ".work", "journal.jsonl"
RESUME_ADVICE = "; fix that, then repeat the command to continue"
SHOWN = 10  # entries of each list that the summary prints; report.json holds all


class OutputFolder:
    """The locked folder OUT and its journal. Use as a context manager.

    Raises: ValueError if OUT overlaps SOURCE, holds files of others, or was made with other settings; OSError if it
    cannot be written, or another process is writing it.
    """

    def __init__(self, out: Path, source: Path, settings: dict[str, Any]) -> None:
        self.out, self.work = out, out / WORK
        self.staged, self.journal = self.work / "staged", self.work / JOURNAL
        self.settings = json.loads(json.dumps(settings))
        self._lock = FolderLock(out, "OUT", self.work / "lock")
        _check_apart(out, source)

    def __enter__(self) -> OutputFolder:
        with explain_write_errors(str(self.out), RESUME_ADVICE):
            self._check_ours()
            self.work.mkdir(parents=True, exist_ok=True)
        self._lock.take()
        self.write_json(f"{WORK}/settings.json", self.settings)
        with explain_write_errors(str(self.out), RESUME_ADVICE):
            self.staged.mkdir(exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _check_ours(self) -> None:
        if not self.out.exists() or not any(self.out.iterdir()):
            return
        if not self.work.is_dir():
            raise ValueError(f"{self.out} holds files that this tool did not make: name another folder")
        check_settings(self.out, self.work / "settings.json", self.settings)

    def done(self, tasks: Sequence[Task]) -> dict[str, Record]:
        """Returns the records of finished tasks, by `out`; deletes journal clips that are not in `tasks`."""
        planned = {task.out: task for task in tasks}
        kept: dict[str, Record] = {}
        for record in self._read_journal():
            task, place = planned.get(record["out"]), self.out / record["out"]
            same = task is not None and [task.name, list(task.identity)] == [record["name"], record["identity"]]
            if task is not None and same:
                if not os.path.lexists(place) and os.path.lexists(self.staged / task.staged):
                    self._place(task)
                if os.path.lexists(place):
                    kept[record["out"]] = record
            else:
                remove(place)
                _remove_empty(place.parent, self.out)
        for task in tasks:
            if task.out not in kept and os.path.lexists(self.out / task.out):
                raise ValueError(f"{self.out / task.out} was not made by this tool: move it away")
        self._rewrite(kept.values())
        for leftover in self.staged.iterdir():
            remove(leftover)
        return kept

    def _read_journal(self) -> Iterator[Record]:
        if self.journal.is_file():
            for line in self.journal.read_text(encoding="utf-8", errors="surrogateescape").split("\n"):
                with contextlib.suppress(json.JSONDecodeError):  # the last line, if the run was killed in it
                    yield json.loads(line)

    def _rewrite(self, records: Iterable[Record]) -> None:
        """Writes the journal in the order of the clips, whatever order they were made in."""
        ordered = sorted(records, key=lambda record: str(record["out"]))
        self.write_text(f"{WORK}/{JOURNAL}", (f"{json.dumps(each)}\n" for each in ordered))

    def write_text(self, name: str, parts: Iterable[str]) -> None:
        """Writes the text file OUT/name atomically; names that are not UTF-8 keep their bytes."""

        def write(file: Path) -> None:
            with file.open("w", encoding="utf-8", errors="surrogateescape", newline="\n") as stream:
                stream.writelines(parts)

        with explain_write_errors(str(self.out / name), RESUME_ADVICE):
            write_atomically(self.out / name, write, temporary=self.work / "aside")

    def write_json(self, name: str, content: Any) -> None:
        """Writes OUT/name as indented JSON, atomically."""
        self.write_text(name, [json.dumps(content, indent=1), "\n"])

    def keep(self, task: Task, record: Record) -> None:
        """Enters a finished clip into the journal, then moves it into place."""
        with self.journal.open("a") as stream:
            stream.write(f"{json.dumps(record)}\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._place(task)

    def _place(self, task: Task) -> None:
        place = self.out / task.out
        if os.path.lexists(place):
            raise ValueError(f"{place} was not made by this tool: move it away")
        place.parent.mkdir(parents=True, exist_ok=True)
        (self.staged / task.staged).rename(place)

    def make(self, tasks: Sequence[Task], form: Form, workers: int) -> list[Record]:
        """Makes the missing clips; returns the record of every task, in the order of `tasks`."""
        done = self.done(tasks)
        records = {task.name: done[task.out] for task in tasks if task.out in done}
        missing = [task for task in tasks if task.name not in records]
        with progress_bar(len(tasks), "clip", initial=len(records)) as bar:
            for task, record in _convert_all(missing, self.staged, form, workers):
                records[task.name] = record
                if "skipped" not in record:
                    with explain_write_errors(str(self.out), RESUME_ADVICE):
                        self.keep(task, record)
                bar.update()
        self._rewrite(each for each in records.values() if "skipped" not in each)
        return [records[task.name] for task in tasks]


def _convert_all(tasks: Sequence[Task], staged: Path, form: Form, workers: int) -> Iterator[tuple[Task, Record]]:
    """Yields (task, record) as tasks finish; in this process, or in `workers` others."""
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
    """Sets up a worker: one thread, Ctrl-C left to the program, death with the program."""
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch  # slow to import: only workers need it

    torch.set_num_threads(1)


def check_settings(out: Path, marker: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError, with the differences, if `marker` (JSON) says that `out` was made with other settings."""
    if not marker.is_file():
        return
    there: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
    changes = find_changes(there, settings)
    if changes:
        both = ", ".join(changes)
        raise ValueError(f"{out} was made with other settings ({both}): repeat them, or name another folder")


def _check_apart(out: Path, source: Path) -> None:
    if not source.is_dir():
        raise FileNotFoundError(f"there is no folder '{source}'")
    one, other = out.resolve(), source.resolve()
    if one == other or one.is_relative_to(other) or other.is_relative_to(one):
        raise ValueError(f"the output folder '{out}' and the source '{source}' must not contain each other")


def _remove_empty(folder: Path, root: Path) -> None:
    """Deletes `folder` and the folders above it, below `root`, while they are empty."""
    while folder != root:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


# ----------------------------------------------------------------------------------------- the report


def make_report(
    settings: dict[str, Any],
    records: Sequence[Record],
    more_skipped: Sequence[Record],
    left_out: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """Returns the content of report.json: settings, counts, and every file that is not in the result, with the reason.

    Args:
        more_skipped: clips that never became tasks.
        left_out: (reason, name below SOURCE) of files that are not clips.
    """
    made = [each for each in records if "skipped" not in each]
    skipped = [*(each for each in records if "skipped" in each), *more_skipped]
    return {
        "settings": settings,
        "clips_found": len(records) + len(more_skipped),
        "clips_made": len(made),
        "frames": sum(each["frames"] for each in made),
        "skipped": _listed((each["name"], each["skipped"]) for each in skipped),
        "notes": _listed((each["name"], each["note"]) for each in made if each["note"]),
        "left_out": _listed((name, reason) for reason, name in left_out),
    }


def _listed(pairs: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"file": name, "reason": reason} for name, reason in sorted(pairs)]


def print_report(report: dict[str, Any], out: Path) -> None:
    """Prints the summary: the clips made, and the first entries of each list of exceptions."""
    print(f"{report['clips_made']} of {report['clips_found']} clips, {report['frames']:,} frames, in {out}")
    for key, title in (
        ("skipped", "skipped"),
        ("notes", "made, with a remark"),
        ("left_out", "not clips, left out"),
    ):
        entries = report[key]
        if entries:
            print(f"{title}: {len(entries)}")
        for entry in entries[:SHOWN]:
            print(f"  {printable(entry['file'])}\n      {printable(entry['reason'])}")
        if len(entries) > SHOWN:
            print(f"  and {len(entries) - SHOWN} more, in {out / 'report.json'}")


def require_some(records: Sequence[Record], source: Path) -> None:
    """Raises ValueError, with the first reasons, if no clip was made."""
    if not any("skipped" not in each for each in records):
        reasons = "; ".join(f"{each['name']}: {each['skipped']}" for each in records[:3])
        raise ValueError(f"none of the {len(records)} clips in '{source}' can be used ({reasons or 'there are none'})")


def collect_settings(tool: str, source: Path, form: Form, **more: Any) -> dict[str, Any]:
    """Returns the settings that a result depends on, for its marker and its report."""
    return {"tool": tool, "source": str(source.resolve()), **asdict(form), **more}


LeftOut = list[tuple[str, str]]  # (reason, name below SOURCE) of files that are not clips


def left_out_recorder(left_out: LeftOut, root: Path) -> Callable[[str, Path], object]:
    """Returns a callback for `datasets.catalog.find_clips` that adds each file that is not a clip to `left_out`."""

    def enter(reason: str, path: Path) -> None:
        words = f"not a clip: a file *{reason[1:]}" if reason.startswith("*") else reason
        left_out.append((words, path.relative_to(root).as_posix()))

    return enter
