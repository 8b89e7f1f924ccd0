"""Prints tables, writes them as a Markdown page and a JSON file, and draws plots."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# heads of shares, shown in percent; all other numbers have three significant digits
SHARES = {
    *("spread", "MFU", "of 790", "share", "of the roof", "efficiency", "inside `save`", "colour right", "motion right")
}


@dataclass
class Table:
    """One table of a page.

    Attributes:
        heads: columns after the first, which holds the names of the rows.
        rows: head -> value, "" for the name; values without a column are only in the JSON.
        picture: a file in the folder of the page.
    """

    title: str
    text: str
    heads: Sequence[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    picture: str | None = None

    def markdown(self) -> str:
        """Returns a section of a page, with aligned columns."""
        heads = ["", *self.heads]
        cells = [heads, *([_cell(row.get(head), head) for head in heads] for row in self.rows)]
        name, *widths = (max(map(len, column)) for column in zip(*cells))
        lines = [[row[0].ljust(name), *(cell.rjust(width) for cell, width in zip(row[1:], widths))] for row in cells]
        lines.insert(1, ["-" * name, *("-" * (width - 1) + ":" for width in widths)])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        picture = f"\n\n![{self.title}]({self.picture})" if self.picture else ""
        return f"## {self.title}\n\n{self.text}\n\n{table}{picture}"


def _cell(value: Any, head: str) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if head in SHARES:
        return f"{value:.1%}"
    return f"{value:.0f}" if abs(value) >= 100 or value == 0 else f"{value:#.3g}"


@dataclass
class Page:
    """The tables of one benchmark: printed and written to `name`.md and `name`.json in `out` as they come.

    Args:
        words: of the command line.
    """

    name: str
    title: str
    text: str
    out: Path
    words: Sequence[str]
    tables: dict[str, Table] = field(default_factory=dict)
    shown: dict[str, int] = field(default_factory=dict)  # lines of each table
    load: float = field(default_factory=lambda: os.getloadavg()[0])

    def add(self, table: Table) -> None:
        """Adds a table; one whose title is there already has got another row."""
        lines = ["", *table.markdown().splitlines()]
        self.show("\n".join(lines[self.shown.get(table.title, 0) :]))
        self.tables[table.title], self.shown[table.title] = table, len(lines)
        self.write()

    def write(self) -> dict[str, Any]:
        """Writes both files; returns the facts about this run."""
        known, tables = collect_facts(self.words, self.load), self.tables.values()
        parts = [f"# {self.title}", self.text, describe(known), *(table.markdown() for table in tables)]
        content = {"facts": known, "tables": [{"title": table.title, "rows": table.rows} for table in tables]}
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / f"{self.name}.md").write_text("\n\n".join(part.strip() for part in parts if part) + "\n")
        (self.out / f"{self.name}.json").write_text(json.dumps(content, indent=1) + "\n")
        return known

    def finish(self) -> None:
        """Writes the page a last time and prints the facts."""
        self.show("\n" + describe(self.write()))
        self.show(f"written: {self.out / self.name}.md, {self.out / self.name}.json")

    def show(self, text: str) -> None:
        """Prints `text` at once."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def read_rows(file: Path) -> dict[str, dict[str, Any]]:
    """Returns the rows of all tables of a page's JSON file by name; none if there is no file."""
    tables = json.loads(file.read_text())["tables"] if file.is_file() else []
    return {row[""]: row for table in tables for row in table["rows"]}


# ---- facts -------------------------------------------------------------------------------------


def collect_facts(words: Sequence[str], load: float) -> dict[str, Any]:
    """Returns the machine, the versions, the commit and the command."""
    cuda = torch.cuda.is_available()
    asked = "nvidia-smi --query-gpu=driver_version,clocks.max.sm,power.limit --format=csv,noheader -i 0"
    gpu = (
        cuda and f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, driver, clock, power {_output_of(asked)}"
    )
    command = ["python -m benchmarks", *(shlex.quote(Path(w).name if w.startswith("/") else w) for w in words)]
    return {
        **({"GPU": gpu} if gpu else {}),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "load": f"{load:.1f} before, {os.getloadavg()[0]:.1f} at the end",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "commit": find_commit(),
        "command": " ".join(command),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def describe(facts: Mapping[str, Any]) -> str:
    """Returns facts as a paragraph."""
    return "; ".join(f"{name} {value}" for name, value in facts.items()) + "."


def find_commit() -> str:
    """Returns the commit of the working tree, with a plus if files differ from it."""
    changed = _output_of("git status --porcelain --untracked-files=no -- . :!docs")
    return (_output_of("git rev-parse --short HEAD") or "unknown") + ("+" if changed else "")


def _output_of(command: str) -> str:
    """Returns what a command prints; nothing if it is missing or fails."""
    try:
        return subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _processor() -> str:
    """Returns the model name of the CPU."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [" ".join(line.partition(":")[2].split()) for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# ---- plots -------------------------------------------------------------------------------------


@dataclass
class Panel:
    """One panel of a plot: x and y of each line by label; `logarithmic` names the axes with such a scale."""

    title: str
    lines: dict[str, tuple[Sequence[Any], Sequence[float]]]
    x_label: str = ""
    logarithmic: str = ""


def plot(panels: Sequence[Panel], file: Path) -> bool:
    """Draws the panels side by side; returns False if matplotlib is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, places = pyplot.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.6), layout="constrained")
    for axes, panel in zip(places, panels):
        for label, (x, y) in panel.lines.items():
            axes.plot(x, y, "o-", label=label, markersize=4, linewidth=1.4)
        for axis in panel.logarithmic:
            axes.set(**{f"{axis}scale": "log"})
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel(panel.x_label)
        axes.tick_params(axis="x", rotation=30)
        axes.grid(alpha=0.3)
    figure.legend(*places[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return True
