"""Lists warnings about metric values, and formats evaluation results as an 80-column table."""

from __future__ import annotations

import platform
import subprocess
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy
import PIL
import torch

from common.text import printable
from datasets.readers import VIDEO_SUFFIXES

from .detectors import Detector
from .protocols import Metric, Protocol
from .sources import Source

ROOT = Path(__file__).resolve().parents[1]
WRAP: dict[str, Any] = {"width": 80, "break_long_words": False, "break_on_hyphens": False}
NAMED = 5  # dropped clips named in the table; the result file names all
ENOUGH = 2048  # items below which the Frechet distance is strongly biased


def list_versions() -> dict[str, str | None]:
    """Returns the versions of the code, Python and the libraries that determine the values."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {"commit": git.stdout.strip() or None, "python": platform.python_version(), **list_library_versions()}


def list_library_versions() -> dict[str, str]:
    """Returns the versions of the libraries that may affect the last bits of features."""
    import av  # slow to import

    modules = {"torch": torch, "numpy": numpy, "av": av, "pillow": PIL}
    return {name: module.__version__ for name, module in modules.items()}


# ---- warnings ------------------------------------------------------------------------------------------


def list_warnings(
    metric: Metric,
    protocol: Protocol,
    detector: Detector,
    sources: Mapping[str, Source],
    counts: Mapping[str, Mapping[str, Any]],
    values: Mapping[str, Any],
) -> Iterator[str]:
    """Yields warnings about a value, one sentence each. `counts` (by side), `values`: as in the result file."""
    fake = sources["fake"]
    used = {side: each["used"] for side, each in counts.items()}
    asked = {side: getattr(metric, f"num_{side}") for side in counts if side == "fake" or metric.unit == "clip"}
    few = [f"{used[side]} {side}" for side, most in asked.items() if used[side] < most]
    if few:
        yield f"{' and '.join(few)} {metric.unit}s were used; {asked['fake']} are requested"
    if metric.kind == "frechet" and min(used.values()) < ENOUGH:
        first, second = values.get("floor_counts", (0, 0))
        floor = f"the floor, {first} real ones against {second} others, is {_number(values.get('floor'))}; "
        yield (
            f"fewer than {ENOUGH} {metric.unit}s: the small number raises the value; "
            f"{floor if first else ''}compare only at equal counts"
        )
    if metric.unit == "clip" and len(set(used.values())) > 1:
        yield f"{used['real']} real against {used['fake']} fake clips: give both sides equally many"
    for side, each in counts.items():
        if each["unreadable"] or each["too_short"]:
            dropped = f"{each['unreadable']} unreadable, {each['too_short']} too short"
            yield f"{side} clips were left out: {dropped}; the result file names them"
        if each["cut_off"]:
            yield f"{each['cut_off']} {side} files are cut off or damaged; their readable part was used"
    if "real" in counts:
        root = sources["real"].root
        if Path(root).resolve() == Path(fake.root).resolve():
            yield f"real and fake clips are the same, '{fake.root}': the value says nothing about samples"
        words = {word.lower() for word in PurePath(root).parts}
        if protocol.split == "train" and words & {"test", "val", "valid", "validation"}:
            yield f"'{root}' does not look like the training split: see --split"
    lossy = any(PurePath(clip.name).suffix.lower() in VIDEO_SUFFIXES for clip in fake.clips)
    if lossy and protocol.fake_storage == "as read":
        yield "the fakes are video files, whose compression worsens the value: evaluate the lossless arrays"
    if detector.spec.stand_in:
        yield f"{detector.name} is a stand-in: the value is not comparable with published ones"
    elif detector.spec.sha256 and detector.sha256 != detector.spec.sha256:
        yield f"the detector is not the known {detector.spec.file}: its SHA-256 differs"
    if metric.kind == "frechet" and min(used.values()) <= detector.dims:
        yield f"{min(used.values())} items for {detector.dims} features: the covariance does not have full rank"
    if protocol.changed:
        yield f"not the standard protocol {protocol.name}: {', '.join(protocol.changed)}"


def group_warnings(metrics: Mapping[str, Any]) -> dict[str, list[str]]:
    """Maps every distinct warning to the names of its metrics."""
    about: dict[str, list[str]] = {}
    for name, entry in metrics.items():
        for warning in entry["warnings"]:
            about.setdefault(warning, []).append(name)
    return about


# ---- table ---------------------------------------------------------------------------------------------


def format_table(result: Mapping[str, Any]) -> str:
    """Formats an evaluation result for the terminal."""
    metrics, detectors = result["metrics"], result["detectors"].items()
    files = [f"{name}: {printable(each['path'])}\n  sha256 {each['sha256']}" for name, each in detectors]
    warnings = [
        _wrap(f"warning: {warning}" + ("" if len(names) == len(metrics) else f" ({', '.join(names)})"))
        for warning, names in group_warnings(metrics).items()
    ]
    parts: list[Iterable[str]] = [_head(result), _values(metrics), _along(metrics), files, _dropped(metrics), warnings]
    return "\n\n".join(text for part in parts if (text := "\n".join(part)))


def _head(result: Mapping[str, Any]) -> Iterator[str]:
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
    for side, source in result["sources"].items():
        facts[side] = f"{source['clips']} clips in {source['path']}"
    for name, text in facts.items():
        yield _wrap(text, first=f"{name:<9} ", indent=" " * 10)


def _values(metrics: Mapping[str, Any]) -> Iterator[str]:
    rows: list[tuple[str, ...]] = [("metric", "value", "±", "floor", "shuffled", "real", "fake", "dropped")]
    for name, entry in metrics.items():
        used = {side: str(counts["used"]) for side, counts in entry["counts"].items()}
        lost = [counts["too_short"] + counts["unreadable"] for counts in entry["counts"].values()]
        spread = entry["std"] if entry["std"] is not None else entry.get("spread")
        numbers = [_number(each) for each in (entry["value"], spread, entry.get("floor"), entry.get("shuffled"))]
        dropped = "+".join(map(str, lost)) if any(lost) else "0"
        rows.append((name, *numbers, used.get("real", "-"), used.get("fake", "-"), dropped))
    name_width, *widths = (max(map(len, column)) for column in zip(*rows))
    for name, *cells in rows:
        yield "  ".join([name.ljust(name_width), *(cell.rjust(width) for cell, width in zip(cells, widths))])


def _number(value: float | None) -> str:
    """Formats with four or five digits; "-" for None; rounding errors as 0."""
    if value is None:
        return "-"
    value = value if abs(value) > 1e-9 else 0.0
    return f"{value:.2f}" if abs(value) >= 100 else f"{value:.4g}"


def _along(metrics: Mapping[str, Any]) -> Iterator[str]:
    for name, entry in metrics.items():
        for key, what in (("by_length", "first frames"), ("by_frame", "frame")):
            if entry.get(key):
                steps = "  ".join(f"{place}: {_number(value)}" for place, value in entry[key].items())
                yield _wrap(f"{name} by {what}  {steps}")


def _dropped(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Lists the first few unreadable clips by name."""
    names: dict[str, str] = {}
    for entry in metrics.values():
        for side, notes in entry["dropped"].items():
            names |= {f"{side} {clip}": reason for clip, reason in notes["unreadable"].items()}
    for clip, reason in list(names.items())[:NAMED]:
        yield _wrap(f"left out: {clip}: {reason}")
    if len(names) > NAMED:
        yield f"left out: {len(names) - NAMED} more, named in the result file"


def _wrap(text: str, first: str = "", indent: str = "  ") -> str:
    return textwrap.fill(printable(text), initial_indent=first, subsequent_indent=indent, **WRAP)
