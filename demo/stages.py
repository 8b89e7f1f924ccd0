"""Runs and times the stages of a demo, and measures its samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets.readers import open_video

from .drawn import accuracy

ROOT = Path(__file__).resolve().parent.parent


def run_stage(name: str, command: list[str]) -> float:
    """Runs a command of the repository from its root; returns its seconds. Raises ValueError if it fails."""
    print(f"\n== {name}\n$ " + " ".join(["python" if part == sys.executable else part for part in command]), flush=True)
    threads = {"OMP_NUM_THREADS": "1"} if "torch.distributed.run" in command else {}
    start = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1", **threads}).returncode
    if code:
        raise ValueError(f"the demo's {name} failed with exit code {code}; see the lines above.")
    seconds = round(time.perf_counter() - start, 1)
    print(f"   {seconds} s", flush=True)
    return seconds


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Returns the entries of the videos in a folder of samples."""
    videos: list[dict[str, Any]] = json.loads((folder / "samples.json").read_text())["videos"]
    return videos


def measure_samples(folder: Path, label_of: Callable[[dict[str, Any]], int]) -> dict[str, float]:
    """Returns the tracker's accuracies on the mp4s of a folder of samples, and `videos`, their number.

    Args:
        label_of: returns the true label of a video from its entry.
    """
    videos = read_samples(folder)
    readers = [open_video(folder / video["file"]) for video in videos]
    found = accuracy([reader.read(range(len(reader))) for reader in readers], [label_of(video) for video in videos])
    return {**{name: round(value, 4) for name, value in found.items()}, "videos": len(videos)}
