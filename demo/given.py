"""Measures sampling with given frames and with windows, on unseen clips of the demo set.

    python -m demo.given --ckpt results/demo_condition --out results/demo_given

Draws clips of 32 frames, gives a network some of their frames and samples the others. The tracker of demo/drawn.py
measures how far the body is from the real one and how often colour and motion match the label; evaluation/seams.py
measures the change between frames where windows meet. Prints a table; writes given.json and, for each case, a contact
sheet with the real clip above the sampled one.

Letters: n videos, F frames, H W pixels.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common.checks import require
from diffusion.windows import find_seams
from engine import cli
from evaluation.seams import seam_change
from sample.generate import Generator
from sample.given import GivenFrames, Windows
from sample.video_io import write_contact_sheet

from .drawn import CLASSES, accuracy, draw_clip, track

REAL_FRAMES, SIZE = 32, 32  # of the drawn clips
SET = 1  # their seed; the training set has seed 0
OVERLAP = 4
SHOWN = 4  # clips on a contact sheet

Measured = dict[str, float | None]


class Case(NamedTuple):
    """Given frames, the length of the videos, and the method that combines their windows ("": one window)."""

    given: tuple[int, ...]
    frames: int
    method: str = ""


CASES = {
    "nothing given": Case((), 16),
    "first frame": Case((0,), 16),
    "first 4 frames": Case((0, 1, 2, 3), 16),
    "first and last frame": Case((0, 15), 16),
    "first 4, 32 frames at once": Case((0, 1, 2, 3), 32),
    "first 4, 32 frames, sliding": Case((0, 1, 2, 3), 32, "autoregressive"),
    "first 4, 32 frames, fused": Case((0, 1, 2, 3), 32, "fused"),
    "first 4, 64 frames, sliding": Case((0, 1, 2, 3), 64, "autoregressive"),
    "32 frames, fused": Case((), 32, "fused"),
    "64 frames, fused": Case((), 64, "fused"),
}


def draw_real_clips(number: int) -> tuple[np.ndarray, list[int]]:
    """Returns unseen clips, cycling through the classes, uint8 (n, F, H, W, 3), and their labels."""
    labels = [index % len(CLASSES) for index in range(number)]
    generators = (np.random.default_rng([SET, label, index]) for index, label in enumerate(labels))
    clips = [draw_clip(label, rng, size=SIZE, frames=REAL_FRAMES) for label, rng in zip(labels, generators)]
    return np.stack(clips).transpose(0, 1, 3, 4, 2), labels


def sample_case(generator: Generator, case: Case, clips: np.ndarray, steps: int) -> np.ndarray:
    """Samples the videos of a case, uint8 (n, F, H, W, 3)."""
    pixels = torch.from_numpy(clips[:, list(case.given)]).permute(0, 1, 4, 2, 3) / 127.5 - 1
    window = generator.config.data.num_frames
    given = GivenFrames(pixels, case.given) if case.given else None
    windows = Windows(window, OVERLAP, case.method) if case.method else None
    options: dict[str, Any] = {"steps": steps, "method": "ddim", "batch_size": 16, "num_frames": case.frames}
    return generator.sample(num=len(clips), given=given, windows=windows, **options)


def measure(videos: np.ndarray, clips: np.ndarray, labels: list[int], case: Case, window: int) -> Measured:
    """Measures the videos of a case with the tracker and at the seams.

    `next_error` is the distance between the sampled and the real body's centre in the first frame that is not given,
    `mean_error` its mean over all such frames; both in pixels, median over videos, None without given frames.
    """
    named = accuracy(videos.transpose(0, 1, 4, 2, 3), labels)
    found: Measured = {"colour": named["appearance_accuracy"], "motion": named["motion_accuracy"]}
    found |= dict.fromkeys(("next_error", "mean_error", "seam_ratio", "seam_error"))
    if case.given and case.frames <= clips.shape[1]:
        free = [frame for frame in range(case.frames) if frame not in case.given]
        errors = position_errors(videos, clips[:, : case.frames])[:, free]
        found |= {"next_error": float(np.median(errors[:, 0])), "mean_error": float(np.median(errors.mean(axis=1)))}
    places = find_seams(case.frames, window, OVERLAP, case.method or "autoregressive")
    if places:
        seam = seam_change(videos, places)
        found |= {"seam_ratio": seam.ratio, "seam_error": seam.error}
    return found


def position_errors(videos: np.ndarray, clips: np.ndarray) -> np.ndarray:
    """Returns distances in pixels, (n, F), between tracked bodies; infinite unless both are found in every frame."""
    errors = np.full(videos.shape[:2], np.inf)
    for row, pair in zip(errors, zip(videos, clips, strict=True), strict=True):
        sampled, real = (track(video.transpose(0, 3, 1, 2)) for video in pair)
        if len(sampled.x) == len(real.x) == len(row):
            row[:] = SIZE * np.hypot(sampled.x - real.x, sampled.y - real.y)
    return errors


def format_table(rows: dict[str, Measured]) -> str:
    """Formats the measurements as Markdown."""
    lines = ["| | colour | motion | next frame, px | all frames, px | seams |", "|---|---|---|---|---|---|"]
    for name, found in rows.items():
        shares = " | ".join(f"{found[key]:.0%}" for key in ("colour", "motion"))
        pixels = " | ".join("" if found[key] is None else f"{found[key]:.1f}" for key in ("next_error", "mean_error"))
        seam = "" if found["seam_ratio"] is None else f"{found['seam_ratio']:.2f} ± {found['seam_error']:.2f}"
        lines.append(f"| {name} | {shares} | {pixels} | {seam} |")
    return "\n".join(lines)


def write_sheet(out: Path, name: str, clips: np.ndarray, labels: list[int], videos: np.ndarray) -> None:
    """Writes the contact sheet of a case; beyond its end, the real clip repeats its last frame."""
    frames = np.minimum(np.arange(videos.shape[1]), clips.shape[1] - 1)
    shown = [video for index in range(SHOWN) for video in (clips[index, frames], videos[index])]
    captions = [text for label in labels[:SHOWN] for text in (f"real {CLASSES[label].name}", "sampled")]
    write_contact_sheet(out / f"{name.replace(',', '').replace(' ', '_')}.png", np.stack(shown), captions)


def main(argv: list[str]) -> None:
    """Measures the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, required=True, metavar="PATH", help="checkpoint trained on the demo set")
    parser.add_argument(
        "--out", type=Path, default=Path("results/demo_given"), metavar="DIR", help="folder (%(default)s)"
    )
    parser.add_argument("--videos", type=int, default=64, metavar="N", help="videos per case (%(default)s)")
    parser.add_argument("--steps", type=int, default=25, metavar="N", help="DDIM steps (%(default)s)")
    parser.add_argument("--case", action="append", choices=CASES, metavar="NAME", help="only this case; repeatable")
    arguments = parser.parse_args(argv)
    require(arguments.videos >= 8, f"--videos must be at least 8, one per class, got {arguments.videos}.")

    generator = Generator.from_checkpoint(arguments.ckpt)
    conditional = generator.config.condition.frames != "none"
    clips, labels = draw_real_clips(arguments.videos)
    window = generator.config.data.num_frames
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = {"real clips": measure(clips, clips, labels, Case((), REAL_FRAMES), window)}
    for name in arguments.case or CASES:
        case = CASES[name]
        if conditional or not case.given:
            videos = sample_case(generator, case, clips, arguments.steps)
            rows[name] = measure(videos, clips, labels, case, window)
            write_sheet(arguments.out, name, clips, labels, videos)
    content = {"ckpt": str(arguments.ckpt), "videos": arguments.videos, "steps": arguments.steps}
    (arguments.out / "given.json").write_text(json.dumps(content | {"measured": rows}, indent=2) + "\n")
    print(format_table(rows))


if __name__ == "__main__":
    cli.run(main)
