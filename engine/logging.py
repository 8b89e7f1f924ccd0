"""The log of a run: progress bar or lines, metrics.jsonl, TensorBoard, written by rank 0; and the meter of its rows."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.storage import is_same_file
from common.text import printable

from .run_folder import recreate_checkpoints


class NullLogger:
    """Discards everything: the log of every rank but the first."""

    def __getattr__(self, name: str) -> Callable[..., bool]:
        return lambda *_, **__: False


class RunLogger:
    """The log of one run in `folder`.

    metrics.jsonl holds one object a line, of `kind` `train` or that of a callback. A resume at step s drops the lines
    after s, which the continued run writes again. In TensorBoard a number is called `<kind>/<name>`.
    """

    def __init__(self, folder: Path, *, start: int, total: int) -> None:
        self._folder = folder
        self._total = total
        self._step = start
        self._open(start)
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, disable=not self._terminal)

    def _open(self, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        file, kept = self._folder / "metrics.jsonl", []
        for line in file.read_text().splitlines() if start and file.is_file() else []:
            with suppress(ValueError, KeyError):  # a row that a kill cut
                kept += [f"{line}\n"] if json.loads(line)["step"] <= start else []
        file.write_text("".join(kept))
        self._jsonl = file.open("a")
        self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=start + 1 if start else None)

    def _open_again(self) -> None:
        """Reopens files that were deleted during the run, with a warning."""
        present = {
            "metrics.jsonl": is_same_file(self._jsonl, self._folder / "metrics.jsonl"),
            "tensorboard": (self._folder / "tensorboard").is_dir(),
        }
        if all(present.values()):
            return
        if self._folder.is_dir():
            gone = " and ".join(name for name, there in present.items() if not there)
            self.say(f"warning: {gone} of {self._folder} was deleted during the run and is started again")
        else:
            recreate_checkpoints(self._folder / "checkpoints")
        self._jsonl.close()
        (self._folder / "tensorboard").mkdir(exist_ok=True)  # for rows that its writer still buffers
        with suppress(OSError):  # the writer may have failed already
            self._board.close()
        self._open(self._step)

    def say(self, text: str) -> None:
        """Prints one line above the bar; line breaks in file and class names are escaped."""
        tqdm.write(printable(text), file=sys.stderr)

    def advance(self, step: int) -> None:
        """Moves the bar to `step`."""
        self._step = step
        self._bar.update(step - self._bar.n)

    def metrics(self, step: int, values: dict[str, Any], kind: str = "train") -> None:
        """Writes one row of numbers at `step`; a number that is not finite becomes null, as JSON has no NaN."""
        self._open_again()
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._jsonl.write(json.dumps({"step": step, "kind": kind, **row}) + "\n")
        self._jsonl.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)
        if kind != "train":
            return
        loss, rate = f"loss {values['loss']:.4f}", f"{values['videos_per_second']:.1f} videos/s"
        self._bar.set_postfix_str(f"{loss}, {rate}", refresh=False)
        if not self._terminal:
            eta = duration((self._total - step) * values["seconds_per_step"])
            self.say(f"step {step}/{self._total}  {loss}  {rate}  ETA {eta}")

    def picture(self, step: int, tag: str, pixels: np.ndarray) -> None:
        """Writes one picture (H, W, 3) uint8 at `step` to TensorBoard."""
        self._open_again()
        self._board.add_image(tag, pixels, step, dataformats="HWC")

    def holds(self, step: int, kind: str) -> bool:
        """Returns whether there is a row of that kind at `step`."""
        self._open_again()
        return any(row["step"] == step for row in read_rows(Path(self._jsonl.name), kind))

    def close(self) -> None:
        """Flushes and closes everything."""
        self._open_again()
        self._bar.close()
        self._jsonl.close()
        self._board.close()


def read_rows(file: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Returns the rows of that kind in a metrics.jsonl, in order; rows without a kind are of `train`."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row for row in rows if row.get("kind", "train") == kind]


def duration(seconds: float) -> str:
    """Formats `seconds` as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


# ---- the numbers of a row --------------------------------------------------------------------------


class Meter:
    """Averages device scalars and measures time over steps, without waiting for the device until `means`."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Starts a new row."""
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._waited = 0.0
        self._started = time.perf_counter()

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds the values of one step."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time spent inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time spent inside out of the time per step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - start

    def means(self) -> tuple[dict[str, Tensor], float, float]:
        """Returns the mean of each value, seconds per step, and the share of them spent waiting for data."""
        means = {name: total / self._steps for name, total in self._sums.items()}
        passed = time.perf_counter() - self._started
        return means, passed / self._steps, self._waited / passed


def peak_memory_gib(device: torch.device) -> float:
    """Returns the peak memory so far: allocated by torch on a GPU; resident set of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
