"""Measures the change between frames at the seams of sampling windows, relative to elsewhere.

    python -m evaluation.seams results/samples [...]

Each folder is an output of sample/sample.py, whose samples.json describes the windows.

Letters: n videos, F frames, H W pixels.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion.windows import find_seams
from engine import cli
from sample.video_io import read_video


class SeamChange(NamedTuple):
    """Mean change between frames in grey levels, at seams and elsewhere; the ratio and its standard error."""

    at_seams: float
    elsewhere: float
    ratio: float
    error: float


def frame_changes(videos: np.ndarray) -> np.ndarray:
    """Returns the mean change (n, F-1) between consecutive frames of uint8 (n, F, H, W, 3), in grey levels."""
    return np.stack([np.abs(np.diff(video.astype(np.int16), axis=0)).mean(axis=(1, 2, 3)) for video in videos])


def seam_change(videos: np.ndarray, seams: Sequence[int]) -> SeamChange:
    """Compares how much `videos`, uint8 (n, F, H, W, 3), change into the frames `seams` and into all others.

    A seam is given by the first frame after it, 1 to F-1. The ratio is of the means over all videos; its error, the
    jackknife estimate over videos. Raises: ValueError if there are no seams, only seams, or frames out of range.
    """
    changes = frame_changes(videos)
    places = sorted({seam - 1 for seam in seams})
    if not places or places[0] < 0 or places[-1] >= changes.shape[1] or len(places) == changes.shape[1]:
        raise ValueError(f"seams must be some, but not all, of the frames 1 to {changes.shape[1]}, got {list(seams)}.")
    at, rest = changes[:, places].mean(axis=1), np.delete(changes, places, axis=1).mean(axis=1)
    ratio = at.mean() / max(rest.mean(), 1e-12)
    error = np.nan  # for a single video
    if len(at) > 1:
        without = (at.sum() - at) / np.maximum(rest.sum() - rest, 1e-12)
        error = np.sqrt((len(at) - 1) * np.mean((without - without.mean()) ** 2))
    return SeamChange(*map(float, (at.mean(), rest.mean(), ratio, error)))


def read_samples(folder: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Reads the videos, uint8 (n, F, H, W, 3), and windows of a sample folder. Raises ValueError."""
    try:
        written: dict[str, Any] = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
        files = [folder / str(video["file"]) for video in written["videos"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder} is not a folder of samples from sample/sample.py.") from None
    windows = written.get("windows")
    if not windows or windows["method"] == "rolling":
        raise ValueError(
            f"the videos in {folder} were sampled in one window, or a rolling one: there is no seam to measure."
        )
    videos = [read_video(file) for file in files]
    if len({video.shape for video in videos}) != 1:
        raise ValueError(f"the videos in {folder} differ in length or size.")
    return np.stack(videos), windows


def main(argv: list[str]) -> int:
    """Prints the seam change of each folder; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    print(f"{'videos':40s}{'at seams':>10s}{'elsewhere':>11s}{'ratio':>8s}{'error':>8s}")
    for folder in parser.parse_args(argv).folders:
        videos, windows = read_samples(folder)
        found = seam_change(videos, find_seams(videos.shape[1], windows["size"], windows["overlap"], windows["method"]))
        numbers = f"{found.at_seams:10.2f}{found.elsewhere:11.2f}{found.ratio:8.2f}{found.error:8.2f}"
        print(f"{str(folder)[-39:]:40s}{numbers}")
    return 0


if __name__ == "__main__":
    cli.run(main)
