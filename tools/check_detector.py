"""Checks a detector file: its hash, its kind, and whether it reproduces known values.

    python -m tools.check_detector i3d_torchscript.pt [--kind i3d] [--sha256 HASH] [--device cpu|cuda] [--long]

Prints the SHA-256, the network's arguments, and a line for each check: shapes, the same input twice, a sample alone and
in a batch, probabilities that sum to 1, and published values if there are any (I3D: zeros against ones, 151.25648).
Without --kind the detector is identified by its arguments. --long adds checks that take minutes on a CPU. Exit code 0
if all hold, 1 if one fails, 2 for bad usage. docs/metrics.md says where to get the files.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine import cli
from evaluation.detectors import Detector, DetectorFile, find_spec
from evaluation.distances import Moments, frechet_distance, frechet_from_moments
from sample.generate import usable_device

SIZE = 64  # pixels
SAME = 1e-4  # tolerated change of a sample's features between batches, relative to the largest
SUM = 1e-3  # tolerance of the sum of probabilities
NOISE_VIDEOS, NOISE_BATCH, NOISE_SIZE = 128, 8, 224

Check = tuple[str, bool, str]  # name, holds, observation


def main(argv: list[str]) -> int:
    """Prints all checks; returns 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--kind", metavar="NAME", help="kind, such as i3d (default: from the file's arguments)")
    parser.add_argument("--sha256", metavar="HASH", help="refuse a file with another hash")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--long", action="store_true", help="also run the checks that take minutes on a CPU")
    arguments = parser.parse_args(argv)

    device = usable_device(arguments.device)
    spec = find_spec(arguments.kind, "--kind") if arguments.kind is not None else None
    file = DetectorFile.read(arguments.file, sha256=arguments.sha256, spec=spec)
    print(f"file    {file.path} ({file.path.stat().st_size / 1e6:.1f} MB)\nsha256  {file.sha256}")
    print(f"takes   {', '.join(file.arguments)}" if file.arguments else f"holds   {len(file.weights or {})} tensors")
    results, kinds = [], [spec] if spec else file.kinds()
    for name, known in {each.file: each.sha256 for each in kinds if each.sha256}.items():
        print(f"known   {'this is' if known == file.sha256 else 'not'} {name}, SHA-256\n        {known}")
    for each in kinds:
        print(f"\n{each.name}: {', '.join(each.metrics)}{', a stand-in' if each.stand_in else ''}")
        for name, holds, seen in run_checks(Detector(each, file, device), arguments.long):
            print(f"{'ok  ' if holds else 'FAIL'}  {name:<24}{seen}", flush=True)
            results.append(holds)
        if each.name not in PUBLISHED:
            print(f"note  no published value is known for {each.name}")
    print(f"\n{sum(results)} of {len(results)} checks hold ({device})")
    return 0 if all(results) else 1


def run_checks(detector: Detector, long: bool) -> Iterator[Check]:
    """Yields all checks of a detector; slow ones only if `long`."""
    frames = max(16, detector.spec.frames[0])
    shape = (3, 3, SIZE, SIZE) if detector.input == "frame" else (3, frames, 3, SIZE, SIZE)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    try:
        features = detector(pixels)
    except ValueError as error:
        yield "shape", False, str(error)
        return
    yield "shape", True, f"{tuple(pixels.shape)} uint8 -> {tuple(features.shape)} float32"
    yield "same input twice", torch.equal(features, detector(pixels)), "must be bit-identical"
    largest = features.abs().max().item()
    moved = (detector(pixels[1:2]) - features[1:2]).abs().max().item()
    yield "alone, among others", moved <= SAME * largest, f"moves by {moved:.1e} of {largest:.1e}"
    moved = (features[0] - features[1]).abs().max().item()
    yield "other input", moved > SAME * largest, f"moves by {moved:.1e} of {largest:.1e}"
    if {"is", "isv"} & set(detector.spec.metrics):
        gap = (features.sum(1) - 1).abs().max().item()
        yield "probabilities", gap <= SUM and features.min().item() >= 0, f"sum to 1 within {gap:.1e}"
    for golden in PUBLISHED.get(detector.name, ()):
        name = f"{golden.name} T={golden.frames}"
        if long or not golden.minutes:
            try:
                value = golden.measure(detector, golden.frames)
            except ValueError as error:
                yield name, False, str(error)
            else:
                seen = f"{value:.4f}, published {golden.value:.4f} +- {golden.tolerance:g}"
                yield name, abs(value - golden.value) <= golden.tolerance, seen


def measure_constants(detector: Detector, frames: int) -> float:
    """Returns the Frechet distance between black and white clips, independent of the number of clips."""
    sides = [torch.full((2, frames, 3, SIZE, SIZE), level, dtype=torch.uint8) for level in (0, 255)]
    return frechet_distance(*(detector(side) for side in sides))


def measure_noise(detector: Detector, frames: int) -> float:
    """Returns the Frechet distance (divisor n-1) between two sets of 128 uniform-noise clips, as in fvd-comparison."""
    real, fake = Moments(detector.dims), Moments(detector.dims)
    for seed, moments in ((2, real), (1, fake)):
        for clips in draw_noise(seed, frames):
            moments.add(detector.run(clips.to(detector.device), rescale=False, resize=False, return_features=True))
    return frechet_from_moments(real, fake, divisor="n-1")


def draw_noise(seed: int, frames: int) -> Iterator[Tensor]:
    """Yields 128 clips of NumPy's uniform noise in batches (8, 3, T, H, W)."""
    draw = np.random.RandomState(seed)
    for _ in range(0, NOISE_VIDEOS, NOISE_BATCH):
        clips = draw.rand(NOISE_BATCH, frames, NOISE_SIZE, NOISE_SIZE, 3).astype(np.float32)
        yield torch.from_numpy(clips).permute(0, 4, 1, 2, 3)


class Golden(NamedTuple):
    """Published value that a detector must reproduce for clips of `frames` frames."""

    name: str
    measure: Callable[[Detector, int], float]
    frames: int
    value: float
    tolerance: float
    minutes: bool = False  # takes minutes on a CPU


PUBLISHED = {  # by detector
    "i3d": (
        # JunyaoHu/common_metrics_on_video_quality, README: deviations of about 1 between PyTorch versions
        Golden("zeros against ones", measure_constants, 10, 569.2296294, 4.0),  # tolerance scaled to the value
        Golden("zeros against ones", measure_constants, 16, 152.9175031, 1.0),
        Golden("zeros against ones", measure_constants, 30, 151.2564850, 1.0),
        # universome/fvd-comparison, README
        Golden("noise of two seeds", measure_noise, 16, 10.138084767, 0.05, minutes=True),
    )
}


if __name__ == "__main__":
    cli.run(main)
