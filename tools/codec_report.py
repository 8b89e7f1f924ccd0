"""Measures an autoencoder on clips: PSNR, SSIM and Frechet distance of the reconstructions; latents against the scale.

    python -m tools.codec_report --codec VAE --data CLIPS --detector i3d_torchscript.pt data.image_size=256
    python -m tools.codec_report --config configs/demo/demo_train.yaml --clips 200

A model trained on the latents cannot be better than these reconstructions. Every clip is a window of data.num_frames
frames, cropped and resized as in training. Writes report.json and samples.png to --out. See docs/codecs.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.checks import require
from common.console import progress_bar
from common.storage import write_json
from datasets import ClipDataset, build_dataset
from engine import cli
from engine.config import load_config
from engine.validation import spread
from evaluation.detectors import Detector, read_detector_files
from evaluation.distances import Moments, frechet_distance
from evaluation.report import list_versions
from evaluation.similarity import psnr, ssim
from models.autoencoder import LatentCodec
from sample.command import make_writable
from sample.decoding import to_uint8
from sample.generate import usable_device
from sample.video_io import write_contact_sheet

ROWS = ("clip", "codec", "4 x difference")  # of a clip in samples.png
SHOWN, SHOWN_FRAMES = 4, 8  # clips there, and frames of each
FAMILIES = {"fvd", "fid"}  # detectors whose features have a Frechet distance


def load_clips(dataset: ClipDataset, indices: Sequence[int]) -> Iterator[Tensor]:
    """Yields clips (F, 3, H, W) in [-1, 1], with a progress bar."""
    with progress_bar(len(indices), "clip") as bar:
        for index in indices:
            yield dataset[0, index]["video"]
            bar.update()


def measure(
    codec: LatentCodec, clips: Iterable[Tensor], detectors: Sequence[Detector], device: torch.device
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Returns the figures as JSON values, and the `ROWS` of the first clips, each uint8 (F, H, W, 3).

    Args:
        clips: each (F, 3, H, W) in [-1, 1].
    """
    quality: dict[str, list[float]] = {"psnr": [], "ssim": []}
    features: dict[str, tuple[list[Tensor], list[Tensor]]] = {each.name: ([], []) for each in detectors}
    latents = Moments(codec.config.latent_channels)  # of the posterior's means
    noise: list[Tensor] = []  # variance of the posterior
    rows: list[np.ndarray] = []
    for clip in clips:
        posterior = codec.posterior(clip[None].to(device))
        latents.add(posterior.mean.movedim(2, -1).flatten(0, 3).cpu())
        std = torch.zeros_like(posterior.mean) if posterior.std is None else posterior.std
        noise.append(std.double().square().mean((0, 1, 3, 4)).cpu())  # (C,)
        decoded = codec.decode(posterior.latents(codec.config))
        pair = [to_uint8(video)[0] for video in (clip[None], decoded)]
        frames = [torch.from_numpy(video).permute(0, 3, 1, 2) for video in pair]
        quality["psnr"] += psnr(*frames).tolist()
        quality["ssim"] += ssim(*frames).tolist()
        for detector in detectors:
            for side, pixels in zip(features[detector.name], frames):
                side.append(detector(pixels[None] if detector.input == "clip" else pixels))
        if len(rows) < SHOWN * len(ROWS):
            difference = 4 * np.abs(pair[0].astype(int) - pair[1])
            rows += [*pair, difference.clip(max=255).astype(np.uint8)]
    mean, variance = latents.mean, latents.covariance().diagonal() + torch.stack(noise).mean(0)
    deviation = ((variance + mean.square()).mean() - mean.mean().square()).sqrt().item()
    figures = {
        **{name: float(np.mean(values)) for name, values in quality.items()},
        "frechet": {name: frechet_distance(*map(torch.cat, sides)) for name, sides in features.items()},
        "latents": {"mean": mean.mean().item(), "deviation": deviation, "recommended_scale": 1 / deviation},
        "channels": {"mean": mean.tolist(), "deviation": variance.sqrt().tolist()},
    }
    return figures, rows


def format_report(found: dict[str, Any]) -> str:
    """Returns the readable report."""
    latents, scale = found["latents"], found["codec"]["scale"]
    channels = found["channels"]["deviation"]
    distances = {f"Frechet distance, {name}": f"{value:.4g}" for name, value in found["frechet"].items()}
    rows = {
        f"{found['codec']['path'] or 'pixel space'}": f"{found['clips']} clips of {found['data']}",
        "PSNR": f"{found['psnr']:.2f} dB",
        "SSIM": f"{found['ssim']:.4f}",
        **(distances or {"Frechet distance": "left out: name a --detector"}),
        "mean of the latents": f"{latents['mean']:.4g}, codec.shift={found['codec']['shift']:g}",
        "deviation of the latents": f"{latents['deviation']:.4g}, channels {min(channels):.4g} to {max(channels):.4g}",
        "scaled deviation": f"{scale * latents['deviation']:.4g}, codec.scale={scale:g}",
        "recommended codec.scale": f"{latents['recommended_scale']:.4g}",
    }
    return "\n".join(f"{name:36s}{value}" for name, value in rows.items())


def main(argv: list[str]) -> int:
    """Measures the codec of the command line; returns the exit code."""
    usage = "%(prog)s [--config FILE] [--codec PATH] [--data DIR] [flags] [key=value ...]"
    parser = cli.config_parser(__doc__ or "", usage)
    add = parser.add_argument
    add("--codec", metavar="PATH", help="the autoencoder: codec.path")
    add("--data", metavar="DIR", help="the clips: data.path")
    add("--clips", type=int, default=64, metavar="N", help="number of clips, evenly spread (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the windows in the clips (%(default)s)")
    add("--detector", action="append", default=[], metavar="[NAME=]FILE[@SHA256]", help="repeatable; NAME is detected")
    add("--out", type=Path, default=Path("results/codec_report"), metavar="DIR", help="(%(default)s)")
    add("--device", metavar="NAME", help="cpu, cuda, ...; default: CUDA if available")
    given = parser.parse_intermixed_args(argv)
    require(given.clips >= 2, f"--clips must be at least 2, got {given.clips}.")
    named = {"codec.path": given.codec, "data.path": given.data}
    config = load_config(given.config, [*(f"{key}={value}" for key, value in named.items() if value), *given.overrides])
    device = usable_device(given.device)
    make_writable(given.out, "--out")
    files = [(spec, file) for spec, file in read_detector_files(given.detector) if FAMILIES & set(spec.metrics)]
    data = replace(config.data, latents=None, num_images=0, frame_list=None, horizontal_flip=False)
    dataset = build_dataset(data, seed=given.seed)
    indices = spread(len(dataset), given.clips)
    codec = LatentCodec.from_config(config.codec, device)
    detectors = [Detector(spec, file, device) for spec, file in files]
    figures, rows = measure(codec, load_clips(dataset, indices), detectors, device)
    found = {
        "codec": asdict(config.codec),
        "data": config.data.path,
        "clips": len(indices),
        "clip_size": rows[0].shape[:3],
        "seed": given.seed,
        **figures,
        "detectors": {spec.name: file.sha256 for spec, file in files},
        "versions": list_versions(),
    }
    captions = [f"{ROWS[number % 3]} {number // 3}" for number in range(len(rows))]
    write_contact_sheet(given.out / "samples.png", np.stack(rows), captions, max_frames=SHOWN_FRAMES)
    write_json(given.out / "report.json", found, indent=2)
    print(f"{format_report(found)}\n\n{given.out}: report.json, samples.png")
    return 0


if __name__ == "__main__":
    cli.run(main)
