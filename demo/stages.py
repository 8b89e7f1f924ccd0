"""Runs and times the stages of a demo, measures its samples, plots losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datasets.readers import open_video

from .drawn import accuracy

ROOT = Path(__file__).resolve().parent.parent


def run_stage(name: str, command: list[str]) -> float:
    """Runs a command of the repository from its root; returns the seconds it took. Raises ValueError if it fails."""
    print(f"\n== {name}\n$ " + " ".join(["python" if part == sys.executable else part for part in command]), flush=True)
    threads = {"OMP_NUM_THREADS": "1"} if "engine.elastic" in command else {}
    start = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1", **threads}).returncode
    if code:
        raise ValueError(f"the demo's {name} failed with exit code {code}; see its output above.")
    seconds = round(time.perf_counter() - start, 1)
    print(f"   {seconds} s", flush=True)
    return seconds


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Returns the entries of the videos in a folder of samples."""
    return json.loads((folder / "samples.json").read_text())["videos"]


def measure_samples(folder: Path, label_of: Callable[[dict[str, Any]], int]) -> dict[str, float]:
    """Returns the tracker's accuracies on a folder's mp4 files, and their number; `label_of` gives an entry's label."""
    videos = read_samples(folder)
    readers = [open_video(folder / video["file"]) for video in videos]
    found = accuracy([reader.read(range(len(reader))) for reader in readers], [label_of(video) for video in videos])
    return {**{name: round(value, 4) for name, value in found.items()}, "videos": len(videos)}


def plot_losses(curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]], target: Path, label: str) -> None:
    """Plots losses by step on a logarithmic axis: for each name the mean over its runs, with their range as a band."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for name, runs in curves.items():
        steps, losses = [step for step, _ in runs[0]], np.array([[loss for _, loss in run] for run in runs])
        (line,) = axes.plot(steps, losses.mean(0), linewidth=1.4, label=name)
        axes.fill_between(steps, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="optimiser step", ylabel=label, yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="both", labelsize=8)
    axes.grid(alpha=0.3, which="both")
    if len(curves) > 1:
        axes.legend()
    figure.savefig(target, dpi=120)
    plt.close(figure)
