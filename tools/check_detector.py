"""Check a detector file: its hash, what it is, and whether it gives what is known of it.

    python -m tools.check_detector i3d_torchscript.pt [--kind i3d] [--sha256 HASH] [--device cpu|cuda] [--long]

Prints the SHA-256, the arguments of the network, and a line for each check: shapes, the same input twice, a sample
alone and among others, probabilities that sum to 1, and published values where there are any (I3D: zeros against
ones, 151.25648). Without --kind the file is told by its arguments. --long adds checks that take minutes on a CPU.
Exit code 0 if all hold, 1 if one does not, 2 for bad use. docs/metrics.md says where to get the files.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from engine import cli

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.detectors import Detector, DetectorSpec, Golden

SIZE = 64  # pixels
SAME = 1e-4  # how far a sample's features may move with its batch, as a share of the largest
SUM = 1e-3  # how far probabilities may be from 1
NOISE_VIDEOS, NOISE_BATCH, NOISE_SIZE = 128, 8, 224

Check = tuple[str, bool, str]  # name, holds, what was seen


def main(argv: list[str]) -> int:
    """Print all checks; 1 if one does not hold."""
    arguments = parse(argv)
    from evaluation.detectors import Detector, DetectorFile
    from sample.generate import usable_device

    device = usable_device(arguments.device)
    spec = spec_of(arguments.kind)
    file = DetectorFile.read(arguments.file, sha256=arguments.sha256, spec=spec)
    print(f"file    {file.path} ({file.path.stat().st_size / 1e6:.1f} MB)\nsha256  {file.sha256}")
    print(f"takes   {', '.join(file.arguments)}" if file.arguments else f"holds   {len(file.weights or {})} tensors")
    results = []
    kinds = [spec] if spec else file.told()
    for name, known in {each.file: each.sha256 for each in kinds if each.sha256}.items():
        print(f"known   {'this is' if known == file.sha256 else 'not'} {name}, SHA-256\n        {known}")
    for each in kinds:
        print(f"\n{each.name}: {', '.join(each.metrics)}{', a stand-in' if each.stand_in else ''}")
        for name, holds, seen in checks(Detector(each, file, device), arguments.long):
            print(f"{'ok  ' if holds else 'FAIL'}  {name:<24}{seen}", flush=True)
            results.append(holds)
        if not each.goldens:
            print(f"note  no published value is known for {each.name}")
    print(f"\n{sum(results)} of {len(results)} checks hold ({device})")
    return 0 if all(results) else 1


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; argparse exits with 2 for bad use."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--kind", metavar="NAME", help="what it is, e.g. i3d (default: told by its arguments)")
    parser.add_argument("--sha256", metavar="HASH", help="refuse any other file")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--long", action="store_true", help="also the checks that take minutes on a CPU")
    return parser.parse_args(argv)


def spec_of(kind: str | None) -> DetectorSpec | None:
    """The line of the table that --kind names; ValueError for none of them."""
    from evaluation.detectors import DETECTORS

    if kind is not None and kind not in DETECTORS:
        raise ValueError(f"--kind {kind}: there is no such detector; they are {', '.join(DETECTORS)}.")
    return DETECTORS[kind] if kind else None


def checks(detector: Detector, long: bool) -> Iterator[Check]:
    """All checks of a detector, those of `long` only if asked for."""
    import torch

    frames = max(16, detector.spec.frames[0])
    shape = (3, 3, SIZE, SIZE) if detector.input == "frame" else (3, frames, 3, SIZE, SIZE)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    try:
        features = detector(pixels)
    except ValueError as error:
        yield "shape", False, str(error)
        return
    yield "shape", True, f"{tuple(pixels.shape)} uint8 -> {tuple(features.shape)} float32"
    yield "same input twice", torch.equal(features, detector(pixels)), "to be equal in every bit"
    largest = features.abs().max().item()
    moved = (detector(pixels[1:2]) - features[1:2]).abs().max().item()
    yield "alone, among others", moved <= SAME * largest, f"moves by {moved:.1e} of {largest:.1e}"
    moved = (features[0] - features[1]).abs().max().item()
    yield "other input", moved > SAME * largest, f"moves by {moved:.1e} of {largest:.1e}"
    if detector.spec.output == "probabilities":
        gap = (features.sum(1) - 1).abs().max().item()
        yield "probabilities", gap <= SUM and features.min().item() >= 0, f"sum to 1 within {gap:.1e}"
    for golden in detector.spec.goldens:
        if long or not golden.minutes:
            yield published(detector, golden)


def published(detector: Detector, golden: Golden) -> Check:
    """A published value against ours."""
    name = f"{golden.check} T={golden.frames}"
    try:
        value = {"zeros against ones": constants, "noise of two seeds": noise}[golden.check](detector, golden.frames)
    except ValueError as error:
        return name, False, str(error)
    seen = f"{value:.4f}, published {golden.value:.4f} +- {golden.tolerance:g}"
    return name, abs(value - golden.value) <= golden.tolerance, seen


def constants(detector: Detector, frames: int) -> float:
    """Frechet distance between black and white clips; their number does not matter, for they are all the same."""
    import torch

    from evaluation.distances import frechet_distance

    sides = [torch.full((2, frames, 3, SIZE, SIZE), level, dtype=torch.uint8) for level in (0, 255)]
    return frechet_distance(*(detector(side) for side in sides))


def noise(detector: Detector, frames: int) -> float:
    """Frechet distance, divided by one less than the count, between 128 clips of uniform noise [0, 1] of two seeds.

    As its source calls I3D: 224 x 224 pixels, neither rescaled nor resized.
    """
    from evaluation.distances import Moments, frechet_from_moments

    real, fake = Moments(detector.dims), Moments(detector.dims)
    for seed, moments in ((2, real), (1, fake)):
        for clips in noise_clips(seed, frames):
            moments.add(detector.run(clips.to(detector.device), rescale=False, resize=False, return_features=True))
    return frechet_from_moments(real, fake, divisor="n-1")


def noise_clips(seed: int, frames: int) -> Iterator[Tensor]:
    """NumPy's uniform noise (128, T, H, W, 3) of that seed, a few clips at a time, as (8, 3, T, H, W)."""
    import numpy as np
    import torch

    draw = np.random.RandomState(seed)
    for _ in range(0, NOISE_VIDEOS, NOISE_BATCH):
        clips = draw.rand(NOISE_BATCH, frames, NOISE_SIZE, NOISE_SIZE, 3).astype(np.float32)
        yield torch.from_numpy(clips).permute(0, 4, 1, 2, 3)


if __name__ == "__main__":
    cli.run(main)
