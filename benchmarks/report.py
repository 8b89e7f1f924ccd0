"""Prints tables, writes them as a Markdown page and a JSON file, and draws plots."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
# columns shown in percent; other numbers have three significant digits
SHARES = {*("spread", "MFU", "of 790", "share", "of the roof", "efficiency", "colour right", "motion right")}


@dataclass
class Table:
    """One table of a page."""

    title: str
    text: str
    heads: Sequence[str]  # columns after the first, which holds the row names
    rows: list[dict[str, Any]] = field(
        default_factory=list
    )  # column -> value, "" -> row name; other keys go to the JSON only
    picture: str | None = None  # image file in the page's folder

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
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    if head in SHARES:
        return f"{value:.1%}"
    return f"{value:.0f}" if abs(value) >= 100 or value == 0 else f"{value:#.3g}"


@dataclass
class Page:
    """The tables of one benchmark: printed and written to `name`.md and `name`.json in `out` as they come."""

    name: str
    title: str
    out: Path
    words: Sequence[str]  # of the command line
    tables: dict[str, Table] = field(default_factory=dict)
    shown: dict[str, int] = field(default_factory=dict)  # lines printed of each table
    load: float = field(default_factory=lambda: os.getloadavg()[0])

    def add(self, table: Table) -> None:
        """Adds a table, or the new rows of one that was added before."""
        lines = ["", *table.markdown().splitlines()]
        print("\n".join(lines[self.shown.get(table.title, 0) :]), flush=True)
        self.tables[table.title], self.shown[table.title] = table, len(lines)
        self.write()

    def write(self) -> str:
        """Writes both files; returns the facts about this run as a paragraph."""
        facts, tables = collect_facts(self.words, self.load), self.tables.values()
        described = "; ".join(f"{name} {value}" for name, value in facts.items()) + "."
        explained = "What is compared with what, and the columns: [README.md](README.md)."
        parts = [f"# {self.title}", explained, described, *(table.markdown() for table in tables)]
        content = {"facts": facts, "tables": [{"title": table.title, "rows": table.rows} for table in tables]}
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / f"{self.name}.md").write_text("\n\n".join(parts) + "\n")
        (self.out / f"{self.name}.json").write_text(json.dumps(content, indent=1) + "\n")
        return described

    def finish(self) -> None:
        """Writes the page one last time and prints the facts."""
        print(f"\n{self.write()}\nwritten: {self.out / self.name}.md, {self.out / self.name}.json")


def read_rows(file: Path) -> dict[str, dict[str, Any]]:
    """Returns the rows of all tables of a page's JSON file by name; {} if there is no file."""
    tables = json.loads(file.read_text())["tables"] if file.is_file() else []
    return {row[""]: row for table in tables for row in table["rows"]}


def collect_facts(words: Sequence[str], load: float) -> dict[str, Any]:
    """Returns the machine, the versions, the commit and the command."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processors = [" ".join(line.partition(":")[2].split()) for line in lines if line.startswith("model name")]
    facts: dict[str, Any] = {}
    if torch.cuda.is_available():
        asked = "nvidia-smi --query-gpu=driver_version,clocks.max.sm,power.limit --format=csv,noheader -i 0"
        name, cuda = torch.cuda.get_device_name(), torch.version.cuda
        facts["GPU"] = f"{name}, CUDA {cuda}, driver, clock, power {_output_of(asked)}"
    return facts | {
        "machine": f"{(processors or [platform.machine()])[0]}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads",
        "load": f"{load:.1f} before, {os.getloadavg()[0]:.1f} at the end",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "commit": find_commit(),
        "command": shlex.join(("python", "-m", "benchmarks", *words)),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def find_commit() -> str:
    """Returns the commit of the working tree, with a plus if tracked files differ from it."""
    changed = _output_of("git status --porcelain --untracked-files=no -- . :!docs")
    return (_output_of("git rev-parse --short HEAD") or "unknown") + ("+" if changed else "")


def _output_of(command: str) -> str:
    """Returns the output of a command, "" if it is missing or fails."""
    try:
        return subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


class Panel(NamedTuple):
    """One panel of a plot: `lines` maps label to (x, y); `logarithmic` lists the axes with a log scale."""

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
