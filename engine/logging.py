"""Where a run's numbers go: progress bar or lines, metrics.jsonl, TensorBoard. Other ranks log nowhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from .text import printable


class Logger(Protocol):
    """What the trainer needs of a log."""

    def say(self, text: str) -> None: ...

    def advance(self, step: int) -> None: ...

    def metrics(self, step: int, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class NullLogger:
    """Takes everything and keeps nothing: the log of every rank but the first."""

    def say(self, text: str) -> None:
        """Drop a line."""

    def advance(self, step: int) -> None:
        """Drop a step."""

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """Drop a row."""

    def close(self) -> None:
        """Nothing is open."""


class RunLogger:
    """The log of one run in `folder`.

    metrics.jsonl has one object a line. On a resume at step s its lines after s, which the continued run
    will write again, are dropped.
    """

    def __init__(self, folder: Path, *, start: int, total: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._total = total
        self._jsonl = _reopen_metrics(folder / "metrics.jsonl", start)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, disable=not self._terminal)

    def say(self, text: str) -> None:
        """One line for people, above the bar; what a file or class name brings in stays on it."""
        tqdm.write(printable(text), file=sys.stderr)

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        self._bar.update(step - self._bar.n)

    def metrics(self, step: int, values: dict[str, Any]) -> None:
        """One row of numbers at `step`."""
        self._jsonl.write(json.dumps({"step": step, **values}) + "\n")
        self._jsonl.flush()
        for name, value in values.items():
            self._board.add_scalar(f"train/{name}", value, step)
        rate = values.get("videos_per_second", 0.0)
        self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate:.1f} videos/s", refresh=False)
        if not self._terminal:
            eta = duration((self._total - step) * values["seconds_per_step"])
            self.say(f"step {step}/{self._total}  loss {values['loss']:.4f}  {rate:.1f} videos/s  ETA {eta}")

    def close(self) -> None:
        """Flush and close everything."""
        self._bar.close()
        self._jsonl.close()
        self._board.close()


def _reopen_metrics(file: Path, start: int) -> Any:
    lines = file.read_text().splitlines() if start and file.is_file() else []
    kept = [line for line in lines if _step_of(line) <= start]
    file.write_text("".join(f"{line}\n" for line in kept))
    return file.open("a")


def _step_of(line: str) -> float:
    """The step of a metrics row; a row cut by a kill counts as later than any step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")


def duration(seconds: float) -> str:
    """`seconds` as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
