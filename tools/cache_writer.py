"""Writes a cache folder that a killed run can resume: plan, shards with their records, index.

    plan.json                the identity of the cache, written first
    shard-00000.safetensors  written atomically
    shard-00000.json         its record, written next; a shard that has a record is done
    index.json               written last; the plan and the records are then deleted

After a kill, the same command writes the missing shards. Used by `tools.cache_latents` and `tools.cache_text`.
"""

from __future__ import annotations

import argparse
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor
from tqdm import tqdm

from common import storage
from common.console import progress_bar
from datasets.shards import INDEX, shard_file, write_shard
from engine import cli
from engine.distributed import World, broadcast_object, gather_objects, on_main
from models.identity import is_same_codec

PLAN = "plan.json"
UNFINISHED_NAME = re.compile(r"\.(shard-|captions\.|plan\.|index\.).*")  # see `storage.write_atomically`
PATIENCE_S = 30 * 86400.0  # how long ranks wait for the slowest one
Plan = TypeVar("Plan")


def build_parser(description: str) -> argparse.ArgumentParser:
    """Returns the parser of a cache command: the config, its overrides, --out and --device."""
    parser = cli.config_parser(description, "%(prog)s --config FILE --out DIR [flags] [section.key=value ...]")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--device", metavar="NAME", choices=("cpu", "cuda"), help="default: cuda if available")
    return parser


class CacheWriter(ABC):
    """The cache folder `out`, written by all ranks of `world`, and resumed only with the same `identity`."""

    layout: ClassVar[tuple[str, str]]  # name of the tensor in a shard, format of the cache

    def __init__(self, out: Path, identity: dict[str, Any], world: World) -> None:
        self.out, self.identity, self.world = out, identity, world

    @abstractmethod
    def read_finished(self) -> dict[str, Any]:
        """Returns the identity of the finished cache in `out`. Raises ValueError if it is damaged."""

    @abstractmethod
    def encode(self) -> int:
        """Writes the plan and this rank's missing shards; returns the total number of shards. Collective."""

    @abstractmethod
    def finish(self, records: list[Any]) -> str:
        """Writes the index once all shards are done; returns a summary for the user. Runs on rank 0."""

    def write(self) -> None:
        """Writes or resumes the cache; collective. Raises ValueError or OSError for a bad folder or bad data."""
        lock = storage.FolderLock(self.out, "--out")
        on_main(lambda: self._take_folder(lock))
        try:
            if on_main(self._is_finished):
                summary = f"{self.out} is complete already"
            else:
                count = self.encode()
                gather_objects(None)  # waits until every rank has written its shards
                summary = on_main(
                    lambda: self.finish([json.loads(self._record(number).read_text()) for number in range(count)])
                )
        finally:
            lock.release()
        if self.world.is_main:
            print(summary, flush=True)

    def _take_folder(self, lock: storage.FolderLock) -> None:
        """Creates and locks the folder, and deletes unfinished files."""
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out {self.out} is a file; name a folder")
        names = sorted(file.name for file in self.out.iterdir()) if self.out.exists() else []
        foreign = [name for name in names if name != ".lock" and not UNFINISHED_NAME.fullmatch(name)]
        if foreign and not {PLAN, INDEX} & set(names):
            raise ValueError(f"--out {self.out} holds {foreign[0]!r}, which is not part of a cache; name a new folder")
        with storage.explain_write_errors(f"--out {self.out}"):
            self.out.mkdir(parents=True, exist_ok=True)
            lock.take()
        storage.remove_unfinished(self.out, UNFINISHED_NAME)

    def _is_finished(self) -> bool:
        """Returns whether the cache is complete. Raises ValueError if the folder holds another cache."""
        if not (self.out / INDEX).exists():
            return False
        self.check_identity(self.read_finished())
        self._remove_working_files()
        return True

    def check_identity(self, before: dict[str, Any]) -> None:
        """Raises ValueError, listing the differences, unless `before` is this cache's identity."""
        made, now = before.get("codec"), self.identity.get("codec")
        same_codec = isinstance(made, dict) and now and is_same_codec(made, now)
        keys = [key for key in self.identity if not (key == "codec" and same_codec)]
        if changes := storage.find_changes(before, self.identity, keys):
            raise ValueError(f"--out {self.out} holds another cache ({'; '.join(changes)}); name a new folder")

    def read_plan(self, parse: Callable[[Any], Plan]) -> Plan | None:
        """Returns plan.json through `parse`, or None if it is missing. Raises ValueError if it is unreadable."""
        if not (self.out / PLAN).exists():
            return None
        try:
            return parse(json.loads((self.out / PLAN).read_text(encoding="utf-8")))
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            raise ValueError(f"{self.out / PLAN} cannot be read; delete {self.out} and start again") from None

    def find_missing(self, count: int) -> list[int]:
        """Returns the numbers of the shards, out of `count`, that are not done."""
        return [number for number in range(count) if not self._record(number).exists()]

    def assign_shards(self, count: int) -> list[int]:
        """Returns this rank's share of the missing shards; collective."""
        return broadcast_object(self.find_missing(count))[self.world.rank :: self.world.size]

    def write_shard(self, number: int, dtype: str, shape: Sequence[int], rows: Iterable[Tensor], record: Any) -> None:
        """Writes one shard, then its `record` for the index; iterating over `rows` may still fill `record`."""
        file = shard_file(self.out, number)
        storage.write_atomically(file, lambda temporary: write_shard(temporary, dtype, shape, rows, *self.layout))
        storage.write_json(self._record(number), record)

    def write_index(self, index: dict[str, Any]) -> None:
        """Writes the index, which marks the cache as finished, and deletes the plan and the records."""
        storage.write_json(self.out / INDEX, index)
        self._remove_working_files()

    def progress(self, label: str, unit: str, total: int) -> tqdm:
        """Returns a progress bar of rank 0's share, shown on rank 0 only."""
        size = self.world.size
        share = label if size == 1 else f"{label} (share of rank 0 of {size})"
        return progress_bar(total, unit, share, shown=self.world.is_main)

    def _record(self, number: int) -> Path:
        return shard_file(self.out, number).with_suffix(".json")

    def _remove_working_files(self) -> None:
        for file in [self.out / PLAN, *self.out.glob("shard-*.json")]:
            file.unlink(missing_ok=True)
