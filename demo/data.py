"""Draws the demo set: mp4 files of eight classes in the UCF101 layout.

    python -m demo.data               # fills data/demo, the folder that the demo configs read
    python -m demo.data --out data/demo64 --size 64

Writes OUT/RedDiscRight/v_RedDiscRight_g01_c01.mp4 and so on, 25 groups per class as in UCF101, and OUT/captions.csv,
a caption for every clip, in ten wordings per class. The same parameters give the same files. An existing set is kept;
one made with other parameters is replaced. OUT never holds a partial set.

The files are H.264 with full colour (yuv444p), because bodies are a few pixels wide and recognised by their hue, which
the usual yuv420p blurs.
"""

from __future__ import annotations

import argparse
import csv
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from common.checks import Limit, at_least, check_limits, within
from common.storage import make_once
from datasets.writer import write_video
from engine import cli

from .drawn import CLASSES, captions_of, draw_clip

FORMAT = 3  # raised when the drawing or the encoding changes, so that old sets are redrawn
GROUPS = 25
FPS = 8
LIMITS = {
    "clips_per_class workers": at_least(1),
    "size": Limit("even and at least 16", lambda size: size >= 16 and size % 2 == 0),
    "frames": within(16, 32),  # longer clips would move too little in a window of 16
    "seed": at_least(0),
}


def clip_path(root: Path, class_name: str, index: int) -> Path:
    """Returns the path of clip `index` of a class, numbered as in UCF101: c01 of groups g01 to g25, then c02."""
    return root / class_name / f"v_{class_name}_g{index % GROUPS + 1:02d}_c{index // GROUPS + 1:02d}.mp4"


def write_mp4(path: Path, video: Any, fps: int = FPS) -> None:
    """Writes a uint8 (T, 3, H, W) RGB array as H.264 on one thread, so that the bytes are reproducible."""
    write_video(path, (frame.transpose(1, 2, 0).copy() for frame in video), fps)


def make_clip(root: Path, parameters: dict[str, int], clip: tuple[int, int]) -> None:
    """Draws and writes the clip (label, index), which depends on these and the seed alone."""
    rng = np.random.default_rng([parameters["seed"], *clip])
    video = draw_clip(clip[0], rng, size=parameters["size"], frames=parameters["frames"])
    write_mp4(clip_path(root, CLASSES[clip[0]].name, clip[1]), video)


def draw_set(root: Path, parameters: dict[str, int], workers: int) -> None:
    """Draws the whole set into the empty folder `root`, with captions that cycle through their class's wordings."""
    clips = list(product(range(len(CLASSES)), range(parameters["clips_per_class"])))
    for kind in CLASSES:
        (root / kind.name).mkdir()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(make_clip, root, parameters), clips, chunksize=50))
    with (root / "captions.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "caption"])
        for label, index in clips:
            kind = CLASSES[label]
            wordings = captions_of(kind)
            file = clip_path(root, kind.name, index).relative_to(root)
            writer.writerow([file.as_posix(), wordings[index % len(wordings)]])


def main(argv: list[str]) -> None:
    """Draws the set of the command line, unless it exists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("data/demo"), help="folder of the set (data/demo)")
    add("--clips-per-class", "--clips_per_class", type=int, default=200, help="clips of each of the 8 classes (200)")
    add("--size", type=int, default=32, help="height and width in pixels (32)")
    add("--frames", type=int, default=20, help="frames per clip, 16 to 32 (20)")
    add("--seed", type=int, default=0, help="random seed (0)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (all cores)")
    arguments = parser.parse_args(argv)
    check_limits(arguments, "--", LIMITS)
    out, workers, count = arguments.out, arguments.workers, arguments.clips_per_class
    parameters = {"format": FORMAT, "clips_per_class": count, "size": arguments.size}
    parameters |= {"frames": arguments.frames, "seed": arguments.seed}
    made = make_once(out, parameters, lambda root: draw_set(root, parameters, workers), replace=True)
    print(f"{out}: 8 classes of {count} clips, {'drawn' if made else 'already there'}")


if __name__ == "__main__":
    cli.run(main)
