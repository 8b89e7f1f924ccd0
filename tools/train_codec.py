"""Train the demo's own autoencoder on the demo set, and write it in the diffusers folder format.

    python -m tools.make_demo_data
    python -m tools.make_demo_data --out data/demo64 --size 64 --clips-per-class 50
    python -m tools.train_codec --data data/demo data/demo64

An AutoencoderTiny: 8-fold down-sampling, 16 latent channels, convolutions only, small enough that a
training run encodes its clips online on a CPU. Several --data folders may hold clips of several sizes; every
step takes the same number of pixels from each. Clips of group 25 are kept out, to measure with.

The latents are standardised, each channel by its mean and variance in the batch, and noise of a random
strength is added before they are decoded. So the decoder learns to draw clean pictures from slightly wrong
latents, as a diffusion model makes them, and no channel is wasted or louder than another. At the end the
statistics of many frames are folded into the encoder's last convolution: latents come out with mean about 0
and deviation about 1.

A run writes its state into --work; --resume continues it, with the same arguments.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
import math
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine import cli

if TYPE_CHECKING:
    from torch import Tensor, nn

LATENT_CHANNELS = 16
ARCHITECTURE = {
    "latent_channels": LATENT_CHANNELS,
    "encoder_block_out_channels": (32, 32, 32, 32),
    "decoder_block_out_channels": (32, 32, 32, 32),
    "num_encoder_blocks": (0, 1, 1, 2),  # none at full resolution, which would cost more than all others
    "num_decoder_blocks": (2, 2, 2, 0),
}
HELD_OUT = "_g25_"  # in the file names of the clips to measure with
PIXELS_PER_STEP = 64 * 32 * 32
LEARNING_RATE = 1.5e-3
WARMUP_STEPS = 100
NOISE = 0.3  # strongest noise in the latents, in units of their deviation
EDGE_WEIGHT = 0.5
LOG_EVERY, SAVE_EVERY = 100, 250


@dataclass(frozen=True)
class Clips:
    """The clips of one folder, (clips, T, 3, H, W) uint8: to train on, and kept out with their classes."""

    train: Tensor
    held_out: Tensor
    held_out_classes: list[str]


def read_clips(root: Path) -> Clips:
    """Read every mp4 of a demo set.

    Raises: FileNotFoundError if there is none, ValueError if none or all are of the group kept out.
    """
    import torch

    from datasets.readers import open_video

    paths = sorted(root.glob("*/*.mp4"))
    if not paths:
        raise FileNotFoundError(f"{root} holds no CLASS/*.mp4; make a demo set there: python -m tools.make_demo_data")
    apart = [path for path in paths if HELD_OUT in path.name]
    rest = [path for path in paths if HELD_OUT not in path.name]
    if not apart or not rest:
        raise ValueError(f"{root} needs clips of group 25, to measure with, and of others, to train on")

    def read(files: list[Path]) -> Tensor:
        readers = [open_video(file) for file in files]
        return torch.stack([reader.read(range(len(reader))) for reader in readers])

    return Clips(read(rest), read(apart), [path.parent.name for path in apart])


# ----------------------------------------------------------------------------------------- training


def draw_batch(clips: Clips, share: int, step: int, seed: int) -> Tensor:
    """Frames for one step, (N, 3, H, W) in [-1, 1], flipped at random; a function of (seed, step).

    share: how many pixels to take.
    """
    import torch

    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    frames = clips.train.flatten(0, 1)
    count = max(1, share // (frames.shape[-1] * frames.shape[-2]))
    batch = frames[torch.randint(len(frames), (count,), generator=generator)].float() / 127.5 - 1.0
    flips = torch.rand(count, 2, 1, 1, 1, generator=generator) < 0.5
    batch = torch.where(flips[:, 0], batch.flip(-1), batch)
    return torch.where(flips[:, 1], batch.flip(-2), batch)


def statistics(latents: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over latents (N, C, h, w) of several sizes, each (C, 1, 1)."""
    import torch

    values = torch.cat([part.transpose(0, 1).flatten(1) for part in latents], dim=1)  # (C, values)
    return values.mean(dim=1)[:, None, None], values.std(dim=1)[:, None, None] + 1e-5


def picture_loss(picture: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of the pixels, and of their differences to the next pixel in both directions."""
    error = picture - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + EDGE_WEIGHT * edges


def step_loss(network: Any, batches: list[Tensor], step: int, seed: int) -> Tensor:
    """The loss of one step over one batch per folder."""
    import torch

    generator = torch.Generator().manual_seed(seed * 1_000_003 + step + 500_000)
    latents = [network.encode(batch).latents for batch in batches]
    mean, std = statistics(latents)
    losses = []
    for raw, batch in zip(latents, batches):
        strength = NOISE * torch.rand(len(raw), 1, 1, 1, generator=generator)
        noise = torch.randn(raw.shape, generator=generator)
        losses.append(picture_loss(network.decode((raw - mean) / std + strength * noise).sample, batch))
    return torch.stack(losses).mean()


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero at `steps`."""
    return LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def new_network() -> nn.Module:
    """The untrained autoencoder."""
    import torch
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(**ARCHITECTURE).to(memory_format=torch.channels_last)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the state of the run, whole or not at all."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    torch.save(state, scratch)
    scratch.replace(path)


def load_state(path: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """The state of a run to resume.

    Raises: FileNotFoundError without one, ValueError for that of a run with other arguments.
    """
    import torch

    if not path.is_file():
        raise FileNotFoundError(f"--resume: there is no run to resume at {path}")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if state["recipe"] != recipe:
        raise ValueError(f"--resume: the run at {path} has other arguments: {state['recipe']}")
    return state


def train(folders: list[Clips], steps: int, seed: int, state_path: Path, resume: bool, recipe: dict[str, Any]) -> Any:
    """Train for `steps` steps in all, saving the state on the way; returns the network."""
    import torch

    torch.manual_seed(seed)
    network: Any = new_network()
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    start = 0
    if resume:
        state = load_state(state_path, recipe)
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
        start = state["step"]

    share, running, since = PIXELS_PER_STEP // len(folders), 0.0, time.perf_counter()
    for step in range(start, steps):
        optimiser.param_groups[0]["lr"] = learning_rate(step, steps)
        loss = step_loss(network, [draw_batch(clips, share, step, seed) for clips in folders], step, seed)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        running += loss.item()
        done = step + 1
        if done % SAVE_EVERY == 0 or done == steps:
            save_state(
                state_path,
                {
                    "network": network.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "step": done,
                    "recipe": recipe,
                },
            )
        if done % LOG_EVERY == 0:
            pace = (time.perf_counter() - since) / LOG_EVERY
            print(f"step {done}/{steps}  loss {running / LOG_EVERY:.4f}  {pace:.3f} s/step", flush=True)
            running, since = 0.0, time.perf_counter()
    return network


def fold_statistics(network: Any, folders: list[Clips], seed: int) -> None:
    """Make the encoder's last convolution standardise its latents, by statistics over many frames."""
    import torch

    with torch.no_grad():
        batches = [draw_batch(clips, 16 * PIXELS_PER_STEP, step=-1, seed=seed) for clips in folders]
        latents = [network.encode(part).latents for batch in batches for part in batch.split(64)]
        mean, std = (value.flatten() for value in statistics(latents))
        last = network.encoder.layers[-1]
        last.weight.div_(std[:, None, None, None])
        last.bias.sub_(mean).div_(std)


# ------------------------------------------------------------------------------------------- export


def measure(codec: Any, clips: Clips) -> tuple[dict[str, float], Tensor]:
    """Figures over the clips kept out, through `LatentCodec` as a run uses it; and the reconstructions, uint8."""
    import torch

    from datasets.demo import CLASSES, accuracy

    names = [kind.name for kind in CLASSES]
    labels = [names.index(name) for name in clips.held_out_classes]
    latents = codec.encode(clips.held_out.float() / 127.5 - 1.0)
    decoded = ((codec.decode(latents) + 1.0) * 127.5).round().to(torch.uint8)
    error = (decoded.float() - clips.held_out.float()).square().mean().item()
    figures = {
        "psnr": 10.0 * math.log10(255.0**2 / error),
        "latent_mean": latents.mean().item(),
        "latent_std": latents.std().item(),
        **accuracy(decoded, labels),
    }
    return {key: round(value, 4) for key, value in figures.items()}, decoded


def write_sheet(path: Path, clips: Clips, decoded: Tensor) -> None:
    """A PNG: one clip of each class a row pair, frames above, reconstructions below, every fourth frame."""
    import torch
    from PIL import Image

    first = [clips.held_out_classes.index(name) for name in sorted(set(clips.held_out_classes))]
    pairs = torch.stack([clips.held_out[first, ::4], decoded[first, ::4]], dim=1)  # (classes, 2, T, 3, H, W)
    rows = pairs.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(0, 2)  # (rows, columns, 3)
    picture = Image.fromarray(rows.numpy())
    zoom = max(1, 128 // clips.held_out.shape[-1])
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(path)


def readme(report: dict[str, Any]) -> str:
    """The README of the shipped folder."""
    lines = [
        f"- {name}: PSNR {figures['psnr']:.1f} dB, tracker right on {figures['appearance_accuracy']:.1%} (colour)"
        f" and {figures['motion_accuracy']:.1%} (motion) of the reconstructions"
        for name, figures in report["held_out"].items()
    ]
    return "\n".join(
        [
            "# The demo's autoencoder",
            "",
            "A diffusers AutoencoderTiny (8-fold down-sampling, 16 latent channels), trained by this repository",
            f"on its own demo set with `{report['command']}`. On clips that it was not trained on:",
            "",
            *lines,
            "",
            "Its latents have mean about 0 and deviation about 1: in a config `codec.scale: 1.0`,",
            "`codec.shift: 0.0`, `codec.latent_channels: 16`, `codec.downsample_factor: 8`. `recipe.json` holds",
            "the figures in full.",
            "Licence: that of the repository.",
            "",
        ]
    )


def export(network: Any, folders: dict[str, Clips], out: Path, work: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """Write the folder `out`, complete or not at all, measured on the clips kept out; returns the report."""
    from models.autoencoder import CodecConfig, LatentCodec

    scratch = out.with_name(f".{out.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    network.save_pretrained(scratch)
    config = CodecConfig(path=str(scratch), latent_channels=LATENT_CHANNELS, scale=1.0, chunk_size=64)
    codec = LatentCodec.from_config(config)
    report: dict[str, Any] = {**recipe, "held_out": {}}
    for name, clips in folders.items():
        report["held_out"][name], decoded = measure(codec, clips)
        write_sheet(work / f"{Path(name).name}.png", clips, decoded)
    (scratch / "recipe.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (scratch / "README.md").write_text(readme(report), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    scratch.rename(out)
    return report


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["data/demo"], help="folders of demo clips (data/demo)")
    parser.add_argument("--out", type=Path, default=Path("assets/demo/codec"), help="where the codec goes")
    parser.add_argument("--work", type=Path, default=Path("results/train_codec"), help="state and contact sheets")
    parser.add_argument("--steps", type=int, default=4000, help="optimiser steps in all (4000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and noise (0)")
    parser.add_argument("--resume", action="store_true", help="continue the run whose state lies in --work")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    if arguments.steps < 1:
        raise ValueError(f"--steps is {arguments.steps}, but must be at least 1")
    flags = f"--data {' '.join(arguments.data)} --steps {arguments.steps} --seed {arguments.seed}"
    recipe = {
        "command": f"python -m tools.train_codec {flags}",
        "steps": arguments.steps,
        "parameters": sum(p.numel() for p in new_network().parameters()),
    }
    folders = {name: read_clips(Path(name)) for name in arguments.data}
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    sets, state = list(folders.values()), arguments.work / "state.pt"
    network = train(sets, arguments.steps, arguments.seed, state, arguments.resume, recipe)
    network.eval()
    fold_statistics(network, sets, arguments.seed)
    report = export(network, folders, arguments.out, arguments.work, recipe)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    cli.run(main)
