"""Workloads: a network, a batch and what to run on them, with the project's code or the reference's.

Nothing is downloaded: random latents are written to a latent cache in the project's format, so that the trainer's
whole step is timed, data loading included. Needs only torch, numpy, einops, timm and safetensors.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from datasets.latents import FORMAT, TENSOR, FrameRun, StoredClip
from datasets.recipes import RECIPES
from datasets.shards import INDEX, shard_file, write_shard
from engine.build import PRECISIONS, build_model, forward_inputs
from engine.config import Config
from engine.distributed import World
from engine.trainer import Trainer
from models import attention
from models.blocks import compile_blocks
from models.identity import codec_identity
from models.latte import Latte

from .reference import ReferenceLatte, ReferenceTraining
from .timing import Call, Case, Timer

PIXELS = 8  # per latent pixel side
TINY = {"model.name": "custom", "model.hidden_size": 32, "model.depth": 2, "model.num_heads": 2, "model.patch_size": 2}
# changes to a workload: its fields, or config keys as section.key
Changes = Mapping[str, Any]
REFERENCE: Changes = {"reference": True}
# `recomputing` reruns each block in the backward pass, so only training steps differ
MODES: dict[str, Changes] = {
    "eager": {},
    "compiled": {"train.compile": True},
    "recomputing": {"train.compile": True, "model.gradient_checkpointing": True},
}


@dataclass(frozen=True)
class Workload:
    """A network, latents of `batch` x `frames` (+ `images`) x 4 x `latent` x `latent`, and what to run."""

    size: str = "Latte-S/2"  # a `model.name`, or `tiny` for a smoke test
    batch: int = 2
    frames: int = 16
    latent: int = 32
    images: int = 0
    classes: int = 0
    part: str = "step"  # or forward
    reference: bool = False  # the reference instead of the project's code
    keys: Changes = field(default_factory=dict)  # further configuration keys: {"train.precision": "bf16"}

    def but(self, *several: Changes) -> Workload:
        """Returns a copy with these changes."""
        changes = {name: value for one in several for name, value in one.items()}
        keys = {name: changes.pop(name) for name in list(changes) if "." in name}
        return replace(self, **changes, keys={**self.keys, **keys})

    def config(self, folder: Path = Path()) -> Config:
        """Returns the config of a training run in `folder` that reads the latent cache there."""
        values = {
            **(TINY if self.size == "tiny" else {"model.name": self.size}),
            "model.num_classes": self.classes,
            "codec.downsample_factor": PIXELS,
            "train.batch_size": self.batch,
            "data.num_frames": self.frames,
            "data.num_images": self.images,
            "data.image_size": PIXELS * self.latent,
            "data.frame_interval": 1,
            "data.num_workers": 0,
            "data.horizontal_flip": False,
            "data.latents": str(folder / "latents"),
            "train.output_dir": str(folder / "run"),
            **self.keys,
        }
        sections: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            section, _, key = name.partition(".")
            sections.setdefault(section, {})[key] = value
        blank = Config()
        return replace(blank, **{name: replace(getattr(blank, name), **keys) for name, keys in sections.items()})

    @property
    def precision(self) -> str:
        return str(self.keys.get("train.precision", "fp32"))

    def flop(self) -> float:
        """Returns the FLOP of one forward pass of the batch, attention included, counted on the meta device."""
        config = self.config()
        model = build_model(config, "meta").to("meta").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**forward_inputs(config, 1, "meta"))
        return float(counter.get_total_flops() * self.batch)

    def random_batch(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Returns latents (B, F+I, 4, h, w), and labels (B, 1+I) for a class-conditional network."""
        generator = torch.Generator().manual_seed(2)
        shape = (self.batch, self.frames + self.images, 4, self.latent, self.latent)
        latents = torch.randn(shape, generator=generator).to(device)
        if not self.classes:
            return latents, None
        return latents, torch.randint(self.classes, (self.batch, 1 + self.images), generator=generator).to(device)

    def networks(self, device: torch.device) -> tuple[Latte, ReferenceLatte]:
        """Returns our network and the reference with the same weights, for forward passes."""
        torch.manual_seed(0)
        model = cast(Latte, build_model(self.config())).to(device).eval()
        randomise(model)
        plain = ReferenceLatte.like(model)
        if self.config().train.compile:
            compile_blocks(model.blocks)
        return model, plain

    def autocast(self, device: torch.device) -> torch.autocast:
        """Returns autocast for the workload's precision."""
        dtype = PRECISIONS[self.precision].autocast
        return torch.autocast(device.type, dtype, enabled=dtype is not None)

    def __str__(self) -> str:
        images = f" + {self.images} images" if self.images else ""
        return f"{self.size}, batch {self.batch} x {self.frames} frames{images} x 4 x {self.latent} x {self.latent}"


def randomise(model: torch.nn.Module) -> None:
    """Randomises zero-initialised weights: arithmetic on zeros is faster than on other numbers."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


class Ours:
    """Runs training steps of a workload with the project's trainer, in a temporary folder."""

    def __init__(self, workload: Workload, device: torch.device, world: World | None = None) -> None:
        world = world or World(device=device)
        self.folder = tempfile.TemporaryDirectory()
        config = workload.config(Path(self.folder.name))
        write_latents(config, workload.batch * world.size)
        self.trainer = Trainer(config, world)
        state = self.trainer.state
        randomise(state.model)
        state.ema.load_state_dict(state.model.state_dict())
        self.trainer.prepare()
        self.batches = self.trainer.run.batches(0)

    def step(self) -> None:
        """Runs the trainer's step: loading, forward, backward, gradient norm, AdamW, EMA."""
        attention.choose(self.trainer.config.train.attention)  # a process-wide setting
        self.trainer.launch_step(next(self.batches))


def write_latents(config: Config, batch: int) -> None:
    """Writes the latent cache of `config` with random values, a few more clips than a batch."""
    data, out, classes = config.data, Path(str(config.data.latents)), max(1, config.model.num_classes)
    count, frames = batch + max(2, data.num_images), data.num_frames
    shape = (1, 2, config.codec.latent_channels, config.latent_size, config.latent_size)
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn((frames, *shape), generator=generator).abs() for _ in range(count))
    runs = (FrameRun(frames, data.image_size, data.image_size),)
    names = [f"class{k % classes:03d}/{k:03d}" for k in range(count)]
    clips = [StoredClip(name, 0, frames, frames, first=frames * k, runs=runs) for k, name in enumerate(names)]
    settings = {"image_size": data.image_size, "max_pixels": data.max_pixels, "mirrored": False}
    index = {
        "format": FORMAT,
        "codec": codec_identity(config.codec),
        "dtype": "fp32",
        "shape": shape,
        "settings": {**settings, "transform": RECIPES[data.name].transform},
        "shards": [count * frames],
        "clips": [clip.to_json() for clip in clips],
    }
    out.mkdir(parents=True)
    write_shard(shard_file(out, 0), "fp32", (count * frames, *shape), rows, TENSOR, FORMAT)
    (out / INDEX).write_text(json.dumps(index))


# ---- calls -------------------------------------------------------------------------------------


def step_of(workload: Workload, device: torch.device) -> Call:
    """Returns a training step; the reference keeps latents in memory."""
    if not workload.reference:
        return Ours(workload, device).step
    plain = workload.networks(device)[1].train()
    training = ReferenceTraining(plain, autocast_dtype=PRECISIONS[workload.precision].autocast)
    latents, labels = workload.random_batch(device)
    return partial(training.step, latents, labels, num_images=workload.images)


def forward_of(workload: Workload, device: torch.device) -> Call:
    """Returns a forward pass without gradients."""
    model = workload.networks(device)[workload.reference]
    latents, labels = workload.random_batch(device)
    timesteps = torch.linspace(0, 999, workload.batch, device=device).long()

    @torch.no_grad()
    def call() -> Tensor:
        with workload.autocast(device):
            return cast(Tensor, model(latents, timesteps, labels, num_images=workload.images))

    return call


def make_case(workload: Workload, device: torch.device, repeats: int = 1) -> Case:
    """Returns a case to time: the workload, run `repeats` times per call."""
    call = (step_of if workload.part == "step" else forward_of)(workload, device)
    tokens = workload.batch * (workload.frames + workload.images) * (workload.latent // 2) ** 2  # of 2 x 2 patches
    flop = workload.flop() * (3 if workload.part == "step" else 1)
    return Case(lambda: [call() for _ in range(repeats)][-1], workload.batch, flop, tokens, repeats)


def read_problem(arguments: argparse.Namespace) -> tuple[Workload, Timer]:
    """Returns the workload and timer chosen by the flags.

    Raises: ValueError for flags that are out of range or contradictory.
    """
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    if given.get("device") == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device; use cpu.")
    for name, value in given.items():
        if type(value) is int and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    device = torch.device(given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    if "threads" in given:
        torch.set_num_threads(arguments.threads)
    timer = Timer(device, given.get("rounds", 3), given.get("clock", "wall"))
    sizes = {name: given[name] for name in ("size", "batch", "frames", "latent") if name in given}
    if given.get("quick"):
        if sizes:
            raise ValueError(f"--quick sets its own tiny sizes: omit --{next(iter(sizes))}.")
        return Workload("tiny", batch=1, frames=2, latent=8), timer
    return Workload(**{"size": "Latte-XL/2" if timer.on_cuda else "Latte-S/2", **sizes}), timer
