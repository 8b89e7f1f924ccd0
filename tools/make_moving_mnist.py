"""Draws Moving MNIST: clips of handwritten digits that move in straight lines and bounce off the edges.

    python -m tools.make_moving_mnist --mnist train-images-idx3-ubyte.gz data/mnist --clips 10000

The set of arXiv 1502.04681: 20 frames of 64 x 64 with two MNIST digits of 28 x 28, each with a random start, direction
and constant speed; where they overlap, the brighter pixel shows. Each clip depends on (seed, index) alone.

--labels digit makes ten classes (all digits of a clip are of its class). --labels direction makes three: all digits
move along `horizontal`, `vertical` or `diagonal` lines, which bouncing never changes. OUT, or OUT/CLASS, holds mp4
files (H.264 in yuv444p) or, with --format png, folders of frames; train on them with data.name=folder. OUT is written
atomically; an existing set is kept.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from common.checks import at_least, check_limits, require
from common.storage import make_once
from datasets.writer import write_video
from engine import cli
from tools.frames import SUFFIXES, Form, write_frames

VERSION = 1  # raised when the drawing changes
SPEED = (2.0, 5.0)  # pixels per frame, for frames of 64 pixels
FPS = 8
DIRECTIONS = {"horizontal": 0.0, "vertical": 0.5, "diagonal": 0.25}  # angle of the line, in half turns
CLASSES = {"none": [""], "digit": [str(digit) for digit in range(10)], "direction": sorted(DIRECTIONS)}


def read_idx(path: Path) -> np.ndarray:
    """Reads an MNIST file (IDX format, uint8, plain or gzipped). Raises: FileNotFoundError, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{path}': name MNIST's train-images-idx3-ubyte.gz, or t10k-...")
    data = path.read_bytes()
    try:
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError, zlib.error):
        raise ValueError(f"'{path}' is a damaged gzip file: download it again") from None
    dimensions = data[3] if data[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(data[place : place + 4], "big") for place in range(4, start, 4)]
    if not dimensions or len(data) - start != math.prod(shape):
        raise ValueError(f"'{path}' is not a complete MNIST file: it must hold uint8 values in the IDX format")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_mnist(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray | None]:
    """Reads the digits (n, h, w), and with --labels digit their labels (n,)."""
    images = read_idx(arguments.mnist)
    small = images.ndim == 3 and max(images.shape[1:]) < arguments.size
    require(small, f"'{arguments.mnist}' must hold images smaller than --size, not {images.shape}")
    if arguments.labels != "digit":
        return images, None
    own = arguments.mnist.name.replace("images", "labels").replace("idx3", "idx1")
    labels = read_idx(arguments.mnist_labels or arguments.mnist.with_name(own))
    fit = labels.shape == images.shape[:1]
    require(fit, f"{len(images)} digits do not match labels of shape {labels.shape}")
    return images, labels


def bounce(start: np.ndarray, velocity: np.ndarray, limit: float, frames: int) -> np.ndarray:
    """Returns positions (frames, n) in [0, limit] of n points at constant speed, reflected at both ends."""
    free = start + velocity * np.arange(frames)[:, None]
    return limit - np.abs(np.mod(free, 2 * limit) - limit)  # unfold the reflections: a triangle wave


def draw_clip(sprites: np.ndarray, rng: np.random.Generator, size: int, frames: int, direction: str | None) -> Any:
    """Returns uint8 (frames, size, size) of moving `sprites` (n, h, w); without `direction`, each draws its own."""
    count, height, width = map(int, sprites.shape)
    limits = np.array([size - height, size - width])
    starts = rng.uniform(0, 1, (2, count)) * limits[:, None]
    speed = rng.uniform(*SPEED, count) * size / 64
    if direction is None:
        angles = rng.uniform(0, 2, count).tolist()  # in half turns, as DIRECTIONS
    else:
        angles = [DIRECTIONS[direction] + sense for sense in rng.integers(0, 2, count)]
    velocities = speed * np.array([[f(np.pi * angle) for angle in angles] for f in (np.sin, np.cos)])  # in y and x
    ys, xs = (np.rint(bounce(*each, frames)).astype(int) for each in zip(starts, velocities, limits))
    video = np.zeros((frames, size, size), np.uint8)
    for frame, number in np.ndindex(frames, count):
        y, x = ys[frame, number], xs[frame, number]
        part = video[frame, y : y + height, x : x + width]
        np.maximum(part, sprites[number], out=part)
    return video


def draw_set(root: Path, images: np.ndarray, labels: np.ndarray | None, parameters: dict[str, Any]) -> None:
    """Draws all clips into the empty folder `root`; clip i has class i modulo the number of classes."""
    size, frames, count = (parameters[key] for key in ("size", "frames", "digits"))
    names = CLASSES[parameters["labels"]]
    form = Form(parameters["format"])
    for index in range(parameters["clips"]):
        name = names[index % len(names)]
        rng = np.random.default_rng([parameters["seed"], index])
        pool = np.arange(len(images)) if labels is None else np.flatnonzero(labels == index % len(names))
        sprites = images[rng.choice(pool, count)]
        video = draw_clip(sprites, rng, size, frames, name if name in DIRECTIONS else None)
        pixels = np.repeat(video[..., None], 3, axis=-1)  # (T, H, W, 3)
        (root / name).mkdir(exist_ok=True)
        clip = root / name / f"{index:06d}"
        if form.format == "video":
            write_video(clip.with_suffix(SUFFIXES["video"]), pixels, FPS)
        else:
            write_frames(clip, pixels, form, frames)


def main(argv: list[str]) -> None:
    """Draws the set of the command line, unless it exists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder of the set")
    add("--mnist", type=Path, required=True, metavar="FILE", help="images of MNIST, ...-images-idx3-ubyte(.gz)")
    add("--mnist_labels", type=Path, metavar="FILE", help="for --labels digit (the labels-idx1 file next to --mnist)")
    add("--clips", type=int, default=1000, metavar="N", help="number of clips (1000)")
    add("--frames", type=int, default=20, metavar="N", help="frames per clip (20)")
    add("--size", type=int, default=64, metavar="N", help="height and width in pixels, at least 32 (64)")
    add("--digits", type=int, default=2, metavar="N", help="digits per clip (2)")
    add("--seed", type=int, default=0, metavar="N", help="random seed (0)")
    add("--labels", choices=sorted(CLASSES), default="none", help="the classes (none)")
    add("--format", choices=("video", "png"), default="video", help="mp4 files, or folders of frames (video)")
    arguments = parser.parse_args(argv)
    check_limits(arguments, "--", {"clips frames digits": at_least(1), "size": at_least(32), "seed": at_least(0)})
    images, labels = read_mnist(arguments)
    keys = ("clips", "frames", "size", "digits", "seed", "labels", "format")
    parameters = {key: getattr(arguments, key) for key in keys}
    parameters |= {"moving_mnist": VERSION, "mnist": hashlib.sha256(images.tobytes()).hexdigest()}
    drawn = make_once(arguments.out, parameters, lambda root: draw_set(root, images, labels, parameters))
    classes = len(CLASSES[arguments.labels])
    kind = f" of {classes} classes" if classes > 1 else ""
    print(f"{arguments.out}: {arguments.clips} clips{kind}, {'drawn' if drawn else 'already there'}")


if __name__ == "__main__":
    cli.run(main)
