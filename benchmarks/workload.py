"""Workloads: the project's own training step, forward pass and sampling, and the reference's, on one problem.

Nothing is downloaded: latents are random, in a latent cache of the project's own format, so that the timed step is the
trainer's whole step with its data loading. Only torch, numpy, einops, timm and safetensors are needed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from datasets.config import DataConfig
from datasets.latents import FORMAT, TENSOR, StoredClip
from datasets.latents import FrameRun as Run
from datasets.recipes import RECIPES
from datasets.shards import INDEX, shard_file, write_shard
from datasets.shards import NUMBER_FORMATS as DTYPES
from engine.build import PRECISIONS, build_model
from engine.config import Config, TrainConfig
from engine.distributed import World
from engine.trainer import Trainer
from models import attention
from models.autoencoder import CodecConfig
from models.identity import codec_identity
from models.latte import Latte, LatteConfig

from .reference import ReferenceLatte, ReferenceTraining
from .timing import Call, Timer

PIXELS = 8  # a side of a latent pixel
TINY = {"model.name": "custom", "model.hidden_size": 32, "model.depth": 2, "model.num_heads": 2, "model.patch_size": 2}
Keys = Mapping[str, Any]  # section.key -> value


@dataclass(frozen=True)
class Workload:
    """A network and a batch of clips: `batch` x `frames` (+ `images`) x 4 x `latent` x `latent`.

    size: a `model.name`, or `tiny` for a smoke test.
    keys: further configuration keys, such as {"train.precision": "bf16"}.
    """

    size: str = "Latte-S/2"
    batch: int = 2
    frames: int = 16
    latent: int = 32
    images: int = 0
    classes: int = 0
    keys: Keys = field(default_factory=dict, hash=False)

    def config(self, folder: Path) -> Config:
        """Returns the configuration of a run that trains it from the latent cache in `folder`."""
        model = LatteConfig(num_classes=self.classes)
        data = DataConfig(
            num_frames=self.frames, frame_interval=1, image_size=PIXELS * self.latent, num_images=self.images,
            num_workers=0, horizontal_flip=False, latents=str(folder / "latents"),
        )  # fmt: skip
        codec = CodecConfig(downsample_factor=PIXELS)
        train = TrainConfig(batch_size=self.batch, output_dir=str(folder / "run"))
        names = TINY if self.size == "tiny" else {"model.name": self.size}
        return with_keys(Config(model=model, data=data, codec=codec, train=train), {**names, **self.keys})

    def and_keys(self, **keys: Any) -> Workload:
        """Returns a copy with further keys; a double underscore stands for the dot."""
        return self.with_keys({name.replace("__", "."): value for name, value in keys.items()})

    def with_keys(self, keys: Keys) -> Workload:
        """Returns a copy with further keys."""
        return replace(self, keys={**self.keys, **keys})

    def with_mode(self, mode: str) -> Workload:
        """Returns a copy in one of MODES."""
        return self.with_keys(MODES[mode])

    def flop(self) -> float:
        """Returns the FLOP of one forward pass of the batch, attention included, counted on the meta device."""
        return _flop(replace(self, batch=1, keys={}), tuple(self.keys.items())) * self.batch

    def __str__(self) -> str:
        images = f" + {self.images} images" if self.images else ""
        return f"{self.size}, batch {self.batch} x {self.frames} frames{images} x 4 x {self.latent} x {self.latent}"


@lru_cache
def _flop(workload: Workload, keys: tuple[tuple[str, Any], ...]) -> int:
    """Counts the FLOP of one clip; images pass through spatial layers only."""
    workload = replace(workload, keys=dict(keys))
    meta = torch.device("meta")
    model = build_model(workload.config(Path()), meta).eval()
    latents, labels = random_batch(workload, meta)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(latents, torch.zeros(1, device=meta), labels, num_images=workload.images)
    return counter.get_total_flops()


def with_keys(config: Config, keys: Keys) -> Config:
    """Returns `config` with some values replaced. Raises ValueError for an unknown key."""
    changes: dict[str, dict[str, Any]] = {}
    for name, value in keys.items():
        section, _, key = name.partition(".")
        if not hasattr(getattr(config, section, None), key):
            raise ValueError(f"`{name}` is not a configuration key.")
        changes.setdefault(section, {})[key] = value
    sections: dict[str, Any] = {name: replace(getattr(config, name), **values) for name, values in changes.items()}
    return replace(config, **sections)


def write_latents(workload: Workload, folder: Path, ranks: int = 1) -> None:
    """Writes a latent cache of random values, a few clips more than the ranks' batches, to `folder`/latents."""
    config = workload.config(folder)
    out, count = folder / "latents", workload.batch * ranks + max(2, workload.images)
    shape = (1, 2, config.codec.latent_channels, config.latent_size, config.latent_size)
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn((workload.frames, *shape), generator=generator).abs() for _ in range(count))
    side = config.data.image_size
    clips = [
        StoredClip(
            f"class{number % max(1, workload.classes):03d}/{number:03d}", 0, workload.frames, workload.frames,
            first=number * workload.frames, runs=(Run(workload.frames, side, side),),
        )
        for number in range(count)
    ]  # fmt: skip
    recipe = RECIPES[config.data.name]
    settings = {
        "image_size": side, "transform": recipe.transform, "max_pixels": config.data.max_pixels, "mirrored": False,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    write_shard(shard_file(out, 0), "fp32", (count * workload.frames, *shape), rows, TENSOR, FORMAT)
    index = {
        "format": FORMAT, "codec": codec_identity(config.codec), "settings": settings, "dtype": "fp32",
        "shape": shape, "shards": [count * workload.frames], "clips": [clip.to_json() for clip in clips],
    }  # fmt: skip
    assert index["dtype"] in DTYPES
    (out / INDEX).write_text(json.dumps(index))


# ---- ours --------------------------------------------------------------------------------------


def randomise(model: torch.nn.Module) -> None:
    """Replaces weights that are initialised to zero: arithmetic on zeros is faster than on other numbers."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


class Ours:
    """Runs training steps of a workload with the project's trainer."""

    def __init__(self, workload: Workload, folder: Path, device: torch.device, world: World | None = None) -> None:
        world = world or World(device=device)
        if not (folder / "latents" / INDEX).exists():
            write_latents(workload, folder, world.size)
        self.trainer = Trainer(workload.config(folder), world)
        state = self.trainer.state
        randomise(state.model)
        state.ema.load_state_dict(state.model.state_dict())
        self.trainer.prepare()
        self.batches = self.trainer.run.batches(0)

    def step(self) -> None:
        """Runs the trainer's step: loading, forward, backward, gradient norm, AdamW, EMA."""
        attention.choose(self.trainer.config.train.attention)  # set for the whole process
        self.trainer.launch_step(next(self.batches))

    @property
    def model(self) -> Latte:
        return cast(Latte, self.trainer.state.model)

    def loss(self, latents: Tensor, labels: Tensor | None, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Returns the mean loss for given timesteps and noise."""
        objective = self.trainer.objective
        labels = torch.zeros(len(latents), 1 + objective.num_images) if labels is None else labels
        condition = objective.conditions.batch(labels)
        return objective.terms(self.model, latents, condition, timesteps, noise).loss.mean()


# ---- the reference -----------------------------------------------------------------------------


class Theirs:
    """Runs training steps of a workload with the reference, from the weights of `model`."""

    def __init__(self, workload: Workload, model: Latte, device: torch.device) -> None:
        self.workload = workload
        precision = cast(str, workload.keys.get("train.precision", "fp32"))
        self.training = ReferenceTraining(
            ReferenceLatte.like(model).train(), autocast_dtype=PRECISIONS[precision].autocast
        )
        self.latents, self.labels = random_batch(workload, device)

    def step(self) -> None:
        """Runs the body of the official loop on latents in memory."""
        self.training.step(self.latents, self.labels, num_images=self.workload.images)


def random_batch(workload: Workload, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Returns latents (B, F+I, 4, h, w), and labels (B, 1+I) for a class-conditional network."""
    generator = torch.Generator().manual_seed(2)
    shape = (workload.batch, workload.frames + workload.images, 4, workload.latent, workload.latent)
    latents = torch.randn(shape, generator=generator).to(device)
    if not workload.classes:
        return latents, None
    labels = torch.randint(workload.classes, (workload.batch, 1 + workload.images), generator=generator)
    return latents, labels.to(device)


def difference(ours: Ours, theirs: Theirs) -> float:
    """Returns the difference of the two losses for the same weights, timesteps and noise, relative to the reference."""
    timesteps, noise = theirs.training.draw(theirs.latents)
    with torch.no_grad():
        first = ours.loss(theirs.latents, theirs.labels, timesteps, noise)
        second = theirs.training.loss(theirs.latents, theirs.labels, timesteps, noise, theirs.workload.images)
    return float((first - second).abs() / second.abs())


# ---- forward passes ----------------------------------------------------------------------------


def forward_of(model: torch.nn.Module, workload: Workload, device: torch.device) -> Call:
    """Returns a forward pass without gradients, in the workload's precision."""
    latents, labels = random_batch(workload, device)
    timesteps = torch.linspace(0, 999, workload.batch, device=device).long()
    dtype = PRECISIONS[cast(str, workload.keys.get("train.precision", "fp32"))].autocast

    @torch.no_grad()
    def call() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return cast(Callable[..., Tensor], model)(latents, timesteps, labels, num_images=workload.images)

    return call


def pair_of(workload: Workload, device: torch.device, folder: Path = Path()) -> tuple[Latte, ReferenceLatte]:
    """Returns our network and the reference with the same weights, for forward passes."""
    config = workload.config(folder)
    torch.manual_seed(0)
    model = cast(Latte, build_model(config)).to(device).eval()
    randomise(model)
    if config.train.compile:
        for block in model.blocks:
            block.compile()
    return model, ReferenceLatte.like(model)


# ---- the command line --------------------------------------------------------------------------

# name -> configuration keys; `recomputing` runs each block again in the backward pass, so it concerns the step only
MODES: dict[str, Keys] = {
    "eager": {},
    "compiled": {"train.compile": True},
    "recomputing": {"train.compile": True, "model.gradient_checkpointing": True},
}


def read_problem(arguments: argparse.Namespace, **on_cpu: Any) -> tuple[Workload, Timer]:
    """Returns the workload and the timer of a command line; on a CPU, `on_cpu` replaces the defaults.

    Raises: ValueError for flags out of range, or that contradict each other.
    """
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device; use cpu.")
    given = {name: getattr(arguments, name, None) for name in ("size", "batch", "frames", "latent")}
    threads, rounds = getattr(arguments, "threads", None), getattr(arguments, "rounds", 3)
    for name, value in {**given, "rounds": rounds, "threads": threads}.items():
        if isinstance(value, int) and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if threads:
        torch.set_num_threads(threads)
    timer = Timer(device, rounds, getattr(arguments, "clock", "wall"))
    sizes = {name: value for name, value in given.items() if value is not None}
    if arguments.quick:
        if sizes:
            raise ValueError(f"--quick has tiny sizes of its own: omit --{next(iter(sizes))}.")
        return Workload("tiny", batch=1, frames=2, latent=8), timer
    defaults = {"size": "Latte-XL/2"} if timer.on_cuda else {"size": "Latte-S/2", **on_cpu}
    return Workload(**{**defaults, **sizes}), timer
