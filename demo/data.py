"""Draws the demo set: mp4 files of eight classes in the UCF101 layout.

    python -m demo.data               # fills data/demo, the folder that the demo configs read
    python -m demo.data --out data/demo64 --size 64

writes OUT/RedDiscRight/v_RedDiscRight_g01_c01.mp4 and so on, 25 groups a class as in UCF101. The same
parameters give the same files. An existing set is kept; one made with other parameters is replaced. The set is drawn in
a temporary folder and moved to OUT when complete, so OUT never holds half a set; OUT/.complete.json records the
parameters. OUT/captions.csv has a caption of every clip, in ten wordings a class.

The files are H.264 in yuv444p at a constant rate factor of 6. Bodies are a few pixels wide and known by their
hue: the usual half-resolution chroma (yuv420p) smears them to a round trip of 31 dB, 4:4:4 keeps 51 dB at 32
pixels. PyAV, decord and imageio-ffmpeg read the same pixels from it, and browsers built on Chromium play it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from engine import cli
from tools.frames import write_video

from .drawn import CLASSES, captions_of, draw_clip

FORMAT = 3  # raised when the drawing or the encoding changes, so that old sets are made anew
GROUPS = 25
FPS = 8
MARKER = ".complete.json"


def clip_path(root: Path, class_name: str, index: int) -> Path:
    """Returns the path of clip `index` of a class, spread over the groups as in UCF101: g01 to g25, then c01 on."""
    name = f"v_{class_name}_g{index % GROUPS + 1:02d}_c{index // GROUPS + 1:02d}.mp4"
    return root / class_name / name


def write_mp4(path: Path, video: Any, fps: int = FPS) -> None:
    """Writes a uint8 (T, 3, H, W) RGB array as H.264 on one thread, so that the bytes are reproducible."""
    write_video(path, (frame.transpose(1, 2, 0).copy() for frame in video), fps)


def make_clips(root: Path, label: int, indices: Iterable[int], size: int, frames: int, seed: int) -> None:
    """Draws and writes some clips of one class; clip `index` depends on (seed, label, index) alone."""
    name = CLASSES[label].name
    (root / name).mkdir(exist_ok=True)
    for index in indices:
        video = draw_clip(label, np.random.default_rng([seed, label, index]), size=size, frames=frames)
        write_mp4(clip_path(root, name, index), video)


def draw_set(root: Path, parameters: dict[str, int], workers: int) -> None:
    """Draws the whole set into the empty folder `root`."""
    clips, rest = parameters["clips_per_class"], [parameters[key] for key in ("size", "frames", "seed")]
    chunk = 50
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(make_clips, root, label, range(start, min(start + chunk, clips)), *rest)
            for label in range(len(CLASSES))
            for start in range(0, clips, chunk)
        ]
        for job in jobs:
            job.result()
    write_captions(root, clips)


def write_captions(root: Path, clips: int) -> None:
    """Writes `file,caption` of every clip, with the wordings of a class in turn."""
    with (root / "captions.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "caption"])
        for kind in CLASSES:
            wordings = captions_of(kind)
            for index in range(clips):
                file = clip_path(root, kind.name, index).relative_to(root).as_posix()
                writer.writerow([file, wordings[index % len(wordings)]])


def is_complete(out: Path, parameters: dict[str, Any]) -> bool:
    """Returns whether `out` holds the set with these parameters.

    Raises: ValueError if `out` holds other files, which are never overwritten.
    """
    marker = out / MARKER
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not marker.is_file():
        raise ValueError(f"{out} is not empty and not a demo set or another drawn one; use another folder.")
    made_with: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
    return made_with == parameters


def make_set(out: Path, parameters: dict[str, Any], draw: Callable[[Path], None]) -> bool:
    """Fills a folder with `draw` and moves it to `out`, unless the set exists; returns whether it was drawn."""
    if is_complete(out, parameters):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        fresh, old = Path(scratch) / "new", Path(scratch) / "old"
        fresh.mkdir()
        draw(fresh)
        (fresh / MARKER).write_text(json.dumps(parameters, indent=1) + "\n", encoding="utf-8")
        if out.exists():
            out.rename(old)
        fresh.rename(out)
    return True


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="folder of the set (data/demo)")
    parser.add_argument("--clips-per-class", type=int, default=200, help="clips of each of the 8 classes (200)")
    parser.add_argument("--size", type=int, default=32, help="height and width in pixels (32)")
    parser.add_argument("--frames", type=int, default=20, help="frames per clip, 16 to 32 (20)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other clips (0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (all cores)")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Draws the set of the command line, unless it exists."""
    arguments = parse(argv)
    for key, least in (("clips_per_class", 1), ("workers", 1), ("size", 16), ("frames", 16), ("seed", 0)):
        if getattr(arguments, key) < least:
            flag = f"--{key.replace('_', '-')}"
            raise ValueError(f"{flag} must be at least {least}, got {getattr(arguments, key)}.")
    if arguments.size % 2 or arguments.frames > 32:
        raise ValueError(f"--size must be even and --frames at most 32, got {arguments.size} and {arguments.frames}.")
    parameters = {
        "format": FORMAT,
        "clips_per_class": arguments.clips_per_class,
        "size": arguments.size,
        "frames": arguments.frames,
        "seed": arguments.seed,
    }
    drawn = make_set(arguments.out, parameters, lambda root: draw_set(root, parameters, arguments.workers))
    print(f"{arguments.out}: 8 classes of {arguments.clips_per_class} clips, {'drawn' if drawn else 'already there'}")


if __name__ == "__main__":
    cli.run(main)
