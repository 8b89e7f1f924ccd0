"""Writes tables to the terminal (80 columns), a Markdown page and a JSON file."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = 80
_start: dict[str, Any] = {"words": sys.argv[1:], "load": os.getloadavg()[0]}  # of the current benchmark


@dataclass
class Section:
    """One table.

    Attributes:
        columns: head -> format of its cells (`.2f`, `.0%`, empty for text); a row omits unknown values.
        rows: head -> value; values without a column are only in the JSON.
        picture: a file in the folder of the page.
    """

    title: str
    text: str
    columns: dict[str, str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    picture: str | None = None

    def cells(self) -> list[list[str]]:
        """Returns the heads, then every row, as text."""
        return [
            list(self.columns),
            *([_cell(row.get(head), how) for head, how in self.columns.items()] for row in self.rows),
        ]

    def terminal(self) -> str:
        """Returns aligned text, at most COLUMNS wide."""
        cells = self.cells()
        widths = [max(len(row[place]) for row in cells) for place in range(len(self.columns))]
        room = COLUMNS - sum(widths[1:]) - 2 * (len(widths) - 1)
        lines = [f"\n{self.title}", *textwrap.wrap(self.text, COLUMNS), ""]
        for row in cells:
            figures = "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:]))
            first, *more = textwrap.wrap(row[0], room) or [""]
            lines += [f"{first:<{min(widths[0], room)}}{figures}", *(f"  {rest}" for rest in more)]
        return "\n".join(lines)

    def markdown(self) -> str:
        """Returns a section of a page."""
        head, *rows = ([cell.replace("|", "\\|") for cell in row] for row in self.cells())
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        picture = f"\n![{self.title}]({self.picture})\n" if self.picture else ""
        return f"## {self.title}\n\n{self.text}\n\n{table}\n{picture}"


def _cell(value: Any, how: str) -> str:
    if value is None or value == "":
        return "-"
    return format(value, how) if how and not isinstance(value, str) else str(value)


def start(words: Sequence[str]) -> None:
    """Records the command line and the load of the machine."""
    _start.update(words=list(words), load=os.getloadavg()[0])


def facts(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Returns the machine, the versions, the commit and the command."""
    found = {
        "machine": f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "load": f"{_start['load']:.1f} before, {os.getloadavg()[0]:.1f} at the end",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "command": command(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if torch.device(device).type == "cuda":
        found["gpu"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {_driver()}"
    return found


def _driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader", "-i", "0"]
    try:
        return (
            "driver, clock, power " + subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.strip()
        )
    except (OSError, subprocess.TimeoutExpired):
        return "driver unknown"


def processor() -> str:
    """Returns the model name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return " ".join(names[0].split()) if names else platform.machine()


def commit() -> str:
    """Returns the commit of the working tree, with a plus if files differ from it."""

    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def command() -> str:
    """Returns the command line, with absolute paths shortened to file names."""
    words = [Path(word).name if word.startswith("/") else word for word in _start["words"]]
    return " ".join(["python -m benchmarks", *map(shlex.quote, words)])


def describe(found: dict[str, Any]) -> str:
    """Returns the facts as a paragraph."""
    gpu = f"{found['gpu']}; " if "gpu" in found else ""
    return (
        f"{gpu}{found['machine']}; load {found['load']}; Python {found['python']}, torch {found['torch']}; "
        f"commit {found['commit']}, {found['date']}, `{found['command']}`."
    )


def write(
    name: str, title: str, text: str, sections: Sequence[Section], out: Path, device: torch.device | str = "cpu"
) -> None:
    """Prints `sections`, and writes them as `name`.md and `name`.json to `out`."""
    for section in sections:
        show(section)
    known = save(name, title, text, sections, out, device)
    sys.stdout.write("\n" + textwrap.fill(describe(known), COLUMNS) + "\n")
    sys.stdout.write(f"written: {out / name}.md, {out / name}.json\n")
    sys.stdout.flush()


def show(section: Section) -> None:
    """Prints a section."""
    sys.stdout.write(section.terminal() + "\n")
    sys.stdout.flush()


def save(
    name: str, title: str, text: str, sections: Sequence[Section], out: Path, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Writes `sections` as `name`.md and `name`.json to `out`; returns the facts about this run."""
    known = facts(device)
    out.mkdir(parents=True, exist_ok=True)
    parts = [f"# {title}", " ".join(text.split()), describe(known), *(section.markdown() for section in sections)]
    (out / f"{name}.md").write_text("\n\n".join(part.strip() for part in parts if part) + "\n")
    tables = [{"title": section.title, "rows": section.rows} for section in sections]
    (out / f"{name}.json").write_text(json.dumps({"facts": known, "tables": tables}, indent=1) + "\n")
    return known
