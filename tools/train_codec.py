"""Train the demo's own autoencoder on the demo set, and write it in the diffusers folder format.

    python -m tools.make_demo_data
    python -m tools.make_demo_data --out data/demo64 --size 64 --clips-per-class 50
    python -m tools.train_codec --data data/demo data/demo64

An AutoencoderTiny: 8-fold down-sampling, 16 latent channels, convolutions only, small enough that a
training run encodes its clips online on a CPU. Several --data folders may hold clips of several sizes; the
first counts most. Clips of group 25 are kept out, to measure with. One thread is as fast as two.

The latents are standardised, each channel by its mean and variance in the batch, and noise of a random
strength is added before they are decoded. So the decoder learns to draw clean pictures from slightly wrong
latents, as a diffusion model makes them, and no channel is wasted or louder than another. Then the statistics
of many frames are folded into the encoder's last convolution, so that latents come out with mean about 0 and
deviation about 1, and the decoder alone is trained on, without the first stage's extra weight on bodies.

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
    from torch import Tensor

LATENT_CHANNELS = 16
ARCHITECTURE = {
    "latent_channels": LATENT_CHANNELS,
    "act_fn": "silu",  # learns faster than relu here, and leaves no unit dead
    "encoder_block_out_channels": (32, 32, 32, 32),
    "decoder_block_out_channels": (32, 32, 32, 32),
    "num_encoder_blocks": (0, 1, 1, 2),  # none at full resolution, which would cost more than all others
    "num_decoder_blocks": (2, 2, 2, 0),
}
HELD_OUT = "_g25_"  # in the file names of the clips to measure with
PIXELS_PER_STEP = 20 * 32 * 32  # many small steps learn faster than few large ones
FIRST_SHARE = 0.75  # of the pixels of a step come from the first folder, the rest from the others
LEARNING_RATE = 2e-3
WARMUP_STEPS = 50
NOISE = 0.2  # strongest noise in the latents, in units of their deviation
BODY_WEIGHT = 10.0
STATISTICS_STEPS = 256  # steps whose latents decide what is folded into the encoder
LOG_EVERY, SAVE_EVERY = 250, 250


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


@dataclass(frozen=True)
class Run:
    """What a run does and where it keeps its state; `recipe` identifies it."""

    steps: int
    decoder_steps: int
    seed: int
    state_path: Path
    resume: bool
    recipe: dict[str, Any]

    @property
    def total(self) -> int:
        return self.steps + self.decoder_steps


# ----------------------------------------------------------------------------------------- training


def draw_batch(clips: Clips, pixels: int, step: int, seed: int) -> Tensor:
    """Frames for one step, (N, 3, H, W) in [-1, 1], flipped at random; a function of (seed, step).

    pixels: how many pixels to take, at least one frame.
    """
    import torch

    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    frames = clips.train.flatten(0, 1)
    count = max(1, pixels // (frames.shape[-1] * frames.shape[-2]))
    batch = frames[torch.randint(len(frames), (count,), generator=generator)].float() / 127.5 - 1.0
    flips = torch.rand(count, 2, 1, 1, 1, generator=generator) < 0.5
    batch = torch.where(flips[:, 0], batch.flip(-1), batch)
    return torch.where(flips[:, 1], batch.flip(-2), batch)


def draw_batches(folders: list[Clips], step: int, seed: int) -> list[Tensor]:
    """The batches of one step, one per folder: `FIRST_SHARE` of the pixels from the first."""
    others = (1.0 - FIRST_SHARE) / max(1, len(folders) - 1)
    shares = [FIRST_SHARE if len(folders) > 1 else 1.0] + [others] * (len(folders) - 1)
    return [draw_batch(clips, round(share * PIXELS_PER_STEP), step, seed) for clips, share in zip(folders, shares)]


def statistics(latents: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over latents (N, C, h, w) of several sizes, each (C, 1, 1)."""
    import torch

    values = torch.cat([part.transpose(0, 1).flatten(1) for part in latents], dim=1)  # (C, values)
    return values.mean(dim=1)[:, None, None], values.std(dim=1)[:, None, None] + 1e-5


def picture_loss(picture: Tensor, target: Tensor, body_weight: float) -> Tensor:
    """Weighted mean squared error: a pixel counts the more, the more it differs from the frame's median colour.

    Without the weights (or with absolute errors) the easy way out is to draw the ground and no body.
    """
    ground = target.flatten(2).median(dim=-1).values[..., None, None]
    weight = 1.0 + body_weight * (target - ground).abs().amax(dim=1, keepdim=True)
    return (weight * (picture - target).square()).mean()


def step_loss(network: Any, batches: list[Tensor], step: int, seed: int, stage: Stage) -> Tensor:
    """The loss of one step over one batch per folder."""
    import torch

    generator = torch.Generator().manual_seed(seed * 1_000_003 + step + 500_000)
    with torch.set_grad_enabled(not stage.decoder_only):
        latents = [network.encode(batch).latents for batch in batches]
        if not stage.decoder_only:
            mean, std = statistics(latents)
            latents = [(raw - mean) / std for raw in latents]
    total, pixels = torch.zeros(()), sum(batch.numel() for batch in batches)
    for clean, batch in zip(latents, batches):
        strength = NOISE * torch.rand(len(clean), 1, 1, 1, generator=generator)
        noisy = clean + strength * torch.randn(clean.shape, generator=generator)
        loss = picture_loss(network.decode(noisy).sample, batch, stage.body_weight)
        total = total + loss * (batch.numel() / pixels)
    return total


def new_network() -> Any:
    """The untrained autoencoder.

    He initialisation, and residual branches that start at zero: without normalisation layers, PyTorch's own
    initialisation lets the signal fade out on its way.
    """
    import torch
    from diffusers import AutoencoderTiny
    from torch import nn

    network = AutoencoderTiny(**ARCHITECTURE)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in network.named_parameters():
        if name.endswith("conv.4.weight"):  # the last of a block's three convolutions
            nn.init.zeros_(parameter)
    for last in (network.encoder.layers[-1], network.decoder.layers[-1]):
        nn.init.xavier_normal_(last.weight, gain=0.3)
    return network.to(memory_format=torch.channels_last)


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
    from models.convert import load_pickled

    if not path.is_file():
        raise FileNotFoundError(f"--resume: there is no run to resume at {path}")
    state = load_pickled(path)
    made_with = state.get("recipe") if isinstance(state, dict) else None
    if made_with is None:
        raise ValueError(f"--resume: {path} is not the state of such a run")
    if made_with != recipe:
        raise ValueError(f"--resume: the run at {path} has other arguments: {state['recipe']}")
    return state


@dataclass(frozen=True)
class Stage:
    """A part of the run: the steps from `start` to `stop` of the whole."""

    start: int
    stop: int
    body_weight: float
    decoder_only: bool

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero at the stage's end."""
        done, steps = step - self.start, self.stop - self.start
        warmup = min(1.0, (done + 1) / WARMUP_STEPS)
        return LEARNING_RATE * warmup * 0.5 * (1.0 + math.cos(math.pi * done / steps))


def stages(steps: int, decoder_steps: int) -> tuple[Stage, Stage]:
    """Both networks together, bodies first; then the decoder alone, on the final latents, every pixel alike."""
    joint = Stage(0, steps, BODY_WEIGHT, decoder_only=False)
    return joint, Stage(steps, steps + decoder_steps, 0.0, decoder_only=True)


def train(folders: list[Clips], run: Run) -> Any:
    """Train through both stages, saving the state on the way; returns the network."""
    import torch

    torch.manual_seed(run.seed)
    network = new_network()
    state = load_state(run.state_path, run.recipe) if run.resume else None
    step = 0
    if state:
        network.load_state_dict(state["network"])
        step = state["step"]
    for stage in stages(run.steps, run.decoder_steps):
        if step > stage.stop:
            continue
        if stage.decoder_only and step == stage.start:
            fold_statistics(network, folders, run.seed)
        part = network.decoder if stage.decoder_only else network
        optimiser = torch.optim.AdamW(part.parameters(), weight_decay=0.0)
        if state and step > stage.start:
            optimiser.load_state_dict(state["optimiser"])
        step = train_stage(network, optimiser, folders, stage, step, run)
    return network.eval()


def train_stage(network: Any, optimiser: Any, folders: list[Clips], stage: Stage, start: int, run: Run) -> int:
    """The steps of one stage from `start` on; returns the step it ends with."""
    import torch

    losses, since = 0.0, time.perf_counter()
    for step in range(start, stage.stop):
        optimiser.param_groups[0]["lr"] = stage.learning_rate(step)
        loss = step_loss(network, draw_batches(folders, step, run.seed), step, run.seed, stage)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimiser.param_groups[0]["params"], 1.0)
        optimiser.step()

        done = step + 1
        losses += loss.item()
        if done % SAVE_EVERY == 0 or done == stage.stop:
            state = {"network": network.state_dict(), "optimiser": optimiser.state_dict()}
            save_state(run.state_path, {**state, "step": done, "recipe": run.recipe})
        if done % LOG_EVERY == 0:
            pace = (time.perf_counter() - since) / LOG_EVERY
            print(f"step {done}/{run.total}  loss {losses / LOG_EVERY:.4f}  {pace:.3f} s/step", flush=True)
            losses, since = 0.0, time.perf_counter()
    return stage.stop


def fold_statistics(network: Any, folders: list[Clips], seed: int) -> None:
    """Make the encoder's last convolution standardise its latents, by statistics over many frames."""
    import torch

    with torch.no_grad():
        latents = [
            network.encode(batch).latents
            for step in range(STATISTICS_STEPS)
            for batch in draw_batches(folders, step, seed)
        ]
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
    described = json.loads((scratch / "config.json").read_text(encoding="utf-8"))
    described.pop("block_out_channels", None)  # diffusers writes it, then warns that it does not know it
    (scratch / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    config = CodecConfig(path=str(scratch.resolve()), latent_channels=LATENT_CHANNELS, scale=1.0, chunk_size=64)
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
    """The command line; ValueError for an --out that holds something else."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["data/demo"], help="folders of demo clips (data/demo)")
    parser.add_argument("--out", type=Path, default=Path("assets/demo/codec"), help="where the codec goes")
    parser.add_argument("--work", type=Path, default=Path("results/train_codec"), help="state and contact sheets")
    parser.add_argument("--steps", type=int, default=9000, help="steps of both networks together (9000)")
    parser.add_argument("--decoder-steps", type=int, default=6000, help="then of the decoder alone (6000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and noise (0)")
    parser.add_argument("--resume", action="store_true", help="continue the run whose state lies in --work")
    arguments = parser.parse_args(argv)
    out = arguments.out
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "recipe.json").is_file())):
        raise ValueError(f"--out {out} is there already and is no codec made by this tool; name another folder.")
    return arguments


def main(argv: list[str]) -> None:
    """Train, export, and print what the codec does on clips it was not trained on."""
    arguments = parse_arguments(argv)
    data, steps, more = " ".join(arguments.data), arguments.steps, arguments.decoder_steps
    if steps < 1 or more < 0:
        raise ValueError(f"--steps is {steps} and --decoder-steps {more}, but there must be at least 1 and 0")
    recipe = {
        "command": f"python -m tools.train_codec --data {data} --steps {steps} --decoder-steps {more}"
        f" --seed {arguments.seed}",
        "parameters": sum(p.numel() for p in new_network().parameters()),
    }
    folders = {name: read_clips(Path(name)) for name in arguments.data}
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    state_path = arguments.work / "state.pt"
    run = Run(steps, more, arguments.seed, state_path, arguments.resume, recipe)
    network = train(list(folders.values()), run)
    report = export(network, folders, arguments.out, arguments.work, recipe)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    cli.run(main)
