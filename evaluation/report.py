"""Formats the result of an evaluation as a table of 80 columns."""

from __future__ import annotations

import platform
import subprocess
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import PIL
import torch

from common.text import printable

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 80
NAMED = 5  # dropped clips in the table; the file lists all


def list_versions() -> dict[str, str | None]:
    """Returns the versions of the code and of all libraries behind the numbers."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "commit": git.stdout.strip() or None,
        "python": platform.python_version(),
        **list_library_versions(),
    }


def list_library_versions() -> dict[str, str]:
    """Returns the versions of the libraries that may change the last bits of features."""
    import av  # slow to import

    modules = {"torch": torch, "numpy": numpy, "av": av, "pillow": PIL}
    return {name: module.__version__ for name, module in modules.items()}


def format_table(result: Mapping[str, Any]) -> str:
    """Formats the result for the terminal."""
    parts = [_head(result), _values(result["metrics"]), _along(result["metrics"]), _detectors(result["detectors"])]
    parts += [_dropped(result["metrics"]), _warnings(result["metrics"])]
    return "\n\n".join(part for part in parts if part)


def _head(result: Mapping[str, Any]) -> str:
    protocol = result["protocol"]
    named = f"{protocol['name']}" + (f", {protocol['dataset']}" if protocol["dataset"] else "")
    size = protocol["resolution"] and "{0} x {0}, {1}".format(protocol["resolution"], protocol["crop"])
    facts = {
        "protocol": f"{named}; real split: {protocol['split']}",
        "clips": f"{protocol['selection']}; real stride {protocol['real_stride']}, fake {protocol['fake_stride']}; "
        f"real offset {protocol['real_offset']}, fake {protocol['fake_offset']}",
        "pixels": f"{size or 'size as it is'}; real {protocol['real_storage']}, fake {protocol['fake_storage']}",
        "seeds": ", ".join(map(str, result["seeds"])) + f"; covariance divided by {protocol['divisor']}",
    }
    for side in ("real", "fake"):
        if result["sources"].get(side):
            facts[side] = f"{result['sources'][side]['clips']} clips in {result['sources'][side]['path']}"
    return "\n".join(_fact(name, text) for name, text in facts.items())


def _fact(name: str, text: str) -> str:
    return _wrapped(text, initial_indent=f"{name:<9} ", subsequent_indent=" " * 10)


def _values(metrics: Mapping[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [("metric", "value", "±", "floor", "shuffled", "real", "fake", "dropped")]
    for name, entry in metrics.items():
        used = {side: str(counts["used"]) for side, counts in entry["counts"].items()}
        lost = {side: counts["too_short"] + counts["unreadable"] for side, counts in entry["counts"].items()}
        spread = entry["std"] if entry["std"] is not None else entry.get("spread")
        numbers = [_number(each) for each in (entry["value"], spread, entry.get("floor"), entry.get("shuffled"))]
        dropped = "+".join(str(each) for each in lost.values()) if any(lost.values()) else "0"
        rows.append((name, *numbers, used.get("real", "-"), used.get("fake", "-"), dropped))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join(
        "  ".join(each.ljust(width) if place == 0 else each.rjust(width) for place, (each, width) in enumerate(cells))
        for cells in (list(zip(row, widths)) for row in rows)
    )


def _number(value: float | None) -> str:
    """Formats four or five digits; "-" for None; rounding errors as 0."""
    if value is None:
        return "-"
    value = value if abs(value) > 1e-9 else 0.0
    return f"{value:.2f}" if abs(value) >= 100 else f"{value:.4g}"


def _along(metrics: Mapping[str, Any]) -> str:
    lines = []
    for name, entry in metrics.items():
        for key, what in (("by_length", "first frames"), ("by_frame", "frame")):
            if entry.get(key):
                steps = "  ".join(f"{place}: {_number(value)}" for place, value in entry[key].items())
                lines.append(_wrapped(f"{name} by {what}  {steps}"))
    return "\n".join(lines)


def _detectors(detectors: Mapping[str, Any]) -> str:
    lines = []
    for name, each in detectors.items():
        lines += [f"{name}: {printable(each['path'])}", f"  sha256 {each['sha256']}"]
    return "\n".join(lines)


def _dropped(metrics: Mapping[str, Any]) -> str:
    """Lists the first few unreadable clips by name."""
    names: dict[str, str] = {}
    for entry in metrics.values():
        for side, notes in entry["dropped"].items():
            names |= {f"{side} {clip}": reason for clip, reason in notes["unreadable"].items()}
    shown = [f"left out: {clip}: {reason}" for clip, reason in list(names.items())[:NAMED]]
    shown += [f"left out: and {len(names) - NAMED} more, named in the result file"] if len(names) > NAMED else []
    return "\n".join(_wrapped(line) for line in shown)


def _warnings(metrics: Mapping[str, Any]) -> str:
    """Lists each warning once, with its metrics."""
    about: dict[str, list[str]] = {}
    for name, entry in metrics.items():
        for warning in entry["warnings"]:
            about.setdefault(warning, []).append(name)
    everywhere = len(metrics)
    return "\n".join(
        _wrapped(f"warning: {warning}" + ("" if len(names) == everywhere else f" ({', '.join(names)})"))
        for warning, names in about.items()
    )


def _wrapped(text: str, **indents: str) -> str:
    """Wraps `text` to 80 columns without breaking paths."""
    indents = {"subsequent_indent": "  "} | indents
    return textwrap.fill(printable(text), WIDTH, break_long_words=False, break_on_hyphens=False, **indents)  # type: ignore[arg-type]


def merge_warnings(metrics: Mapping[str, Any]) -> Sequence[str]:
    """Returns every warning once."""
    return list(dict.fromkeys(warning for entry in metrics.values() for warning in entry["warnings"]))
