"""Trains the demo's autoencoder on the demo set, and writes it as a diffusers folder: the recipe of assets/demo/codec.

    python -m demo.data
    python -m demo.data --out data/demo64 --size 64 --clips-per-class 50
    python -m demo.train_codec --data data/demo data/demo64 --out results/codec

Encoder and decoder are first trained together on standardised latents with noise of random strength, so that the
decoder tolerates the imperfect latents of a diffusion model. Then the latents' statistics are folded into the encoder's
last convolution, and the decoder alone is trained further. Clips of group 25 are held out.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.checks import require
from datasets.readers import open_video
from demo.drawn import CLASSES, accuracy
from engine import cli
from models.autoencoder import CodecConfig, LatentCodec

LATENT_CHANNELS = 16
HELD_OUT = "_g25_"  # in the file names of held-out clips
PIXELS_PER_STEP = 20 * 32 * 32  # many small steps learn faster than few large ones
FIRST_SHARE = 0.75  # of a step's pixels come from the first folder, the rest from the others
LEARNING_RATE, WARMUP_STEPS = 2e-3, 50
NOISE = 0.2  # strongest noise in the latents, in units of their deviation
BODY_WEIGHT = 10.0  # extra weight of pixels unlike the background, in the first stage; without it no body is drawn
STATISTICS_STEPS = 256  # steps whose latents give the statistics folded into the encoder
LOG_EVERY = 250


def read_clips(root: Path, *, held_out: bool) -> tuple[Tensor, list[str]]:
    """Returns the clips of a demo set, uint8 (clips, T, 3, H, W), and the class name of each."""
    paths = [path for path in sorted(root.glob("*/*.mp4")) if (HELD_OUT in path.name) == held_out]
    if not paths:
        raise FileNotFoundError(f"{root} is not a demo set of 25 groups: make one with python -m demo.data.")
    readers = [open_video(path) for path in paths]
    return torch.stack([reader.read(range(len(reader))) for reader in readers]), [path.parent.name for path in paths]


def new_network() -> Any:
    """Returns the untrained autoencoder: He initialisation, and residual branches that start at zero."""
    from diffusers import AutoencoderTiny

    widths = {f"{part}_block_out_channels": (32, 32, 32, 32) for part in ("encoder", "decoder")}
    # no blocks at full resolution, which would cost more than all others
    blocks = {"num_encoder_blocks": (0, 1, 1, 2), "num_decoder_blocks": (2, 2, 2, 0)}
    network = AutoencoderTiny(latent_channels=LATENT_CHANNELS, act_fn="silu", **widths, **blocks)
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith("conv.4"):  # the last of a block's three convolutions
                nn.init.zeros_(module.weight)
    for last in (network.encoder.layers[-1], network.decoder.layers[-1]):
        nn.init.xavier_normal_(last.weight, gain=0.3)
    return network.to(memory_format=torch.channels_last)


def draw_batches(folders: list[Tensor], step: int, seed: int) -> list[Tensor]:
    """Returns frames (N, 3, H, W) in [-1, 1] of each folder, flipped at random; they depend on (seed, step) alone."""
    more = len(folders) - 1
    shares = [FIRST_SHARE, *[(1.0 - FIRST_SHARE) / more] * more] if more else [1.0]
    batches = []
    for clips, share in zip(folders, shares, strict=True):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        frames = clips.flatten(0, 1)
        count = max(1, round(share * PIXELS_PER_STEP) // (frames.shape[-1] * frames.shape[-2]))
        batch = frames[torch.randint(len(frames), (count,), generator=generator)].float() / 127.5 - 1.0
        flips = torch.rand(count, 2, 1, 1, 1, generator=generator) < 0.5
        batch = torch.where(flips[:, 0], batch.flip(-1), batch)
        batches.append(torch.where(flips[:, 1], batch.flip(-2), batch))
    return batches


def statistics(latents: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns mean and deviation per channel, each (C, 1, 1), of latents (N, C, h, w) of several sizes."""
    values = torch.cat([part.transpose(0, 1).flatten(1) for part in latents], dim=1)  # (C, values)
    return values.mean(dim=1)[:, None, None], values.std(dim=1)[:, None, None] + 1e-5


def step_loss(network: Any, batches: list[Tensor], step: int, seed: int, *, joint: bool) -> Tensor:
    """Returns the loss of one step: squared error, in the `joint` stage with more weight on bodies."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step + 500_000)
    with torch.set_grad_enabled(joint):
        latents = [network.encode(batch).latents for batch in batches]
        if joint:
            mean, std = statistics(latents)
            latents = [(raw - mean) / std for raw in latents]
    total, pixels = torch.zeros(()), sum(batch.numel() for batch in batches)
    for clean, target in zip(latents, batches):
        strength = NOISE * torch.rand(len(clean), 1, 1, 1, generator=generator)
        noisy = clean + strength * torch.randn(clean.shape, generator=generator)
        ground = target.flatten(2).median(dim=-1).values[..., None, None]
        weight = 1.0 + (BODY_WEIGHT if joint else 0.0) * (target - ground).abs().amax(dim=1, keepdim=True)
        loss = (weight * (network.decode(noisy).sample - target).square()).mean()
        total = total + loss * (target.numel() / pixels)
    return total


def train_stage(network: Any, folders: list[Tensor], steps: range, seed: int, *, joint: bool) -> None:
    """Trains encoder and decoder (`joint`), or the decoder alone, for `steps`, numbered across both stages."""
    parameters = list((network if joint else network.decoder).parameters())
    optimiser = torch.optim.AdamW(parameters, weight_decay=0.0)
    for done, step in enumerate(steps):
        warmup = min(1.0, (done + 1) / WARMUP_STEPS)
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * warmup * 0.5 * (1 + math.cos(math.pi * done / len(steps)))
        loss = step_loss(network, draw_batches(folders, step, seed), step, seed, joint=joint)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if (step + 1) % LOG_EVERY == 0:
            print(f"step {step + 1}  loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def fold_statistics(network: Any, folders: list[Tensor], seed: int) -> None:
    """Folds the mean and deviation of the latents of many frames into the encoder's last convolution."""
    batches = (batch for step in range(STATISTICS_STEPS) for batch in draw_batches(folders, step, seed))
    mean, std = (value.flatten() for value in statistics([network.encode(batch).latents for batch in batches]))
    last = network.encoder.layers[-1]
    last.weight.div_(std[:, None, None, None])
    last.bias.sub_(mean).div_(std)


def measure(out: Path, root: Path) -> dict[str, float]:
    """Returns PSNR, latent statistics and tracker accuracies of the codec in `out` on the held-out clips of `root`."""
    codec = LatentCodec.from_config(CodecConfig(path=str(out.resolve()), latent_channels=LATENT_CHANNELS, scale=1.0))
    clips, names = read_clips(root, held_out=True)
    latents = codec.encode(clips.float() / 127.5 - 1.0)
    decoded = ((codec.decode(latents) + 1.0) * 127.5).round().to(torch.uint8)
    psnr = 10.0 * math.log10(255.0**2 / (decoded.float() - clips.float()).square().mean().item())
    spread = {"latent_mean": latents.mean().item(), "latent_std": latents.std().item()}
    right = accuracy(decoded, [[kind.name for kind in CLASSES].index(name) for name in names])
    return {key: round(value, 4) for key, value in {"psnr": psnr, **spread, **right}.items()}


def main(argv: list[str]) -> None:
    """Trains the codec, writes its folder, and prints its measurements on held-out clips."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", type=Path, default=[Path("data/demo")], help="demo sets (data/demo)")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the codec")
    parser.add_argument("--steps", type=int, default=9000, help="steps of encoder and decoder together (9000)")
    parser.add_argument("--decoder-steps", type=int, default=6000, help="further steps of the decoder alone (6000)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    require(not arguments.out.exists(), f"--out {arguments.out} exists already: name a new folder.")
    folders = [read_clips(root, held_out=False)[0] for root in arguments.data]
    steps, total = arguments.steps, arguments.steps + arguments.decoder_steps
    torch.manual_seed(arguments.seed)
    network = new_network()
    train_stage(network, folders, range(steps), arguments.seed, joint=True)
    fold_statistics(network, folders, arguments.seed)
    train_stage(network, folders, range(steps, total), arguments.seed, joint=False)
    network.save_pretrained(arguments.out)
    figures = {str(root): measure(arguments.out, root) for root in arguments.data}
    report = json.dumps({"command": "python -m demo.train_codec " + " ".join(argv), "held_out": figures}, indent=1)
    (arguments.out / "recipe.json").write_text(report + "\n", encoding="utf-8")
    print(report)


if __name__ == "__main__":
    cli.run(main)
