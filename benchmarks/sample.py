"""Sampling: the project's loop with each of its options against the reference's; and how far apart the results are.

Random weights and no autoencoder: decoding is not part of it. Where the steps are fewer than 250, the time of 250 is
that of as many evaluations; in bf16 the network runs under autocast in both.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from engine.config import Config
from models.autoencoder import CodecConfig, LatentCodec
from models.latte import Latte
from sample.generate import Generator

from . import report
from .reference import ReferenceDiffusion, ReferenceLatte, guided_network
from .timing import Timing, interleaved
from .train import asked
from .workload import PRECISIONS, Workload, pair_of

CLASSES, LABEL, SCALE = 101, 3, 4.0
MINE = "ours, plain loop"


@dataclass(frozen=True)
class Way:
    """One way to sample. `network` and `settings` are what `Generator` and its `batches` take."""

    name: str
    guided: bool = False
    network: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def fits(self, guided: bool, precision: str, device: torch.device) -> bool:
        """fp32 weights cannot be cast, and compiling takes minutes on a CPU."""
        casts, compiles = self.network.get("cast_weights"), self.network.get("compiled")
        return self.guided == guided and not (casts and precision == "fp32") and not (compiles and device.type == "cpu")


# To add one is to add a line.
WAYS = [
    Way(MINE),
    Way("weights cast", network={"cast_weights": True}),
    Way("compiled", network={"compiled": True}),
    Way(MINE, True),
    Way("guidance one by one", True, settings={"batched_guidance": False}),
    Way("guidance at 0.2 to 0.8", True, settings={"guidance_interval": (0.2, 0.8)}),
    Way("weights cast", True, network={"cast_weights": True}),
    Way("compiled", True, network={"compiled": True}),
]


class Undecoded:
    """Stands in a codec's place: latents are what is looked at."""

    config = CodecConfig()

    def decode(self, latents: Tensor) -> Tensor:
        """As they are."""
        return latents


class Latents(Generator):
    """A generator that hands out latents."""

    def decode(self, indices: Sequence[int], latents: Tensor) -> np.ndarray:
        return latents.float().cpu().numpy()


def measure(
    workload: Workload, device: torch.device, steps: int, rounds: int, clock: str, precisions: list[str]
) -> list[report.Section]:
    """A table for each precision, without and with guidance."""
    return [
        table(replace(workload, classes=CLASSES), device, steps, rounds, clock, precision, guidance)
        for precision in precisions
        for guidance in (False, True)
    ]


def table(
    workload: Workload, device: torch.device, steps: int, rounds: int, clock: str, precision: str, guidance: bool
) -> report.Section:
    """The reference and every way of `WAYS` that is guided or not."""
    model, plain = pair_of(workload, device)
    config = workload.config(report.ROOT)
    torch.manual_seed(0)
    calls: dict[str, Callable[[], Any]] = {
        "reference": reference_loop(plain, workload, device, steps, precision, guidance)
    }
    ways = [way for way in WAYS if way.fits(guidance, precision, device)]
    calls |= {way.name: loop(way, model, config, workload, device, steps, precision) for way in ways}
    made = {name: call() for name, call in calls.items() if name != "reference"}
    found = interleaved(calls, rounds=rounds, warmup=0 if rounds < 3 else 1, clock=clock, device=device)
    rows = [row(name, found, workload.batch, steps, made) for name in found]
    columns = {"": "", "ms/step": ".1f", "ratio": ".2f", "s/video, 250 steps": ".2f", "apart": ".0e"}
    text = (
        f"DDPM, {steps} steps measured; {workload}, {CLASSES} classes. `apart`: largest difference from the plain loop "
        "of ours for the same draws, relative to its largest value."
    )
    return report.Section(f"{precision}, {'guided' if guidance else 'not guided'}", text, columns, rows)


def loop(
    way: Way, model: Latte, config: Config, workload: Workload, device: torch.device, steps: int, precision: str
) -> Callable[[], np.ndarray]:
    """One batch by the project's generator; its latents."""
    codec = cast(LatentCodec, Undecoded())
    if way.network.get("cast_weights"):
        model = copy.deepcopy(model)  # the others keep theirs
    generator = Latents(model, codec, config, device=device, precision=precision, **way.network)
    scale = {"guidance_scale": SCALE} if way.guided else {}
    settings = {"steps": steps, "batch_size": workload.batch, **scale, **way.settings}
    return lambda: generator.sample([LABEL], workload.batch, **settings)


def reference_loop(
    plain: ReferenceLatte, workload: Workload, device: torch.device, steps: int, precision: str, guidance: bool
) -> Callable[[], Tensor]:
    """One batch by the reference's loop; of two halves if it is guided."""
    diffusion, dtype = ReferenceDiffusion(1000, str(steps)), PRECISIONS[precision][1]
    labels = torch.full((workload.batch,), LABEL, device=device)
    labels = torch.cat([labels, torch.full_like(labels, CLASSES)]) if guidance else labels
    call = guided_network(plain, SCALE) if guidance else plain
    shape = (workload.batch, workload.frames, plain.in_channels, workload.latent, workload.latent)

    def network(x: Tensor, timesteps: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return call(x, timesteps, labels)

    def walk() -> Tensor:
        noise = torch.randn(shape, device=device)
        return diffusion.sample(network, torch.cat([noise, noise]) if guidance else noise)

    return walk


def row(name: str, found: dict[str, Timing], batch: int, steps: int, made: dict[str, np.ndarray]) -> dict[str, Any]:
    """One line of the table."""
    timing = found[name]
    cells = {
        "": name,
        "ms/step": 1e3 * timing.median / steps,
        "ratio": timing.times_as_fast_as(found["reference"]),
        "s/video, 250 steps": timing.median / batch / steps * 250,
    }
    if name in made and name != MINE:
        cells["apart"] = float(np.abs(made[name] - made[MINE]).max() / np.abs(made[MINE]).max())
    return {**cells, **timing.to_json()}


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, write."""
    workload, device = asked(arguments, latent=16)
    workload = replace(workload, batch=arguments.batch or 1)
    steps = arguments.steps or (2 if arguments.quick else 250 if device.type == "cuda" else 4)
    precisions = arguments.precision or ["fp32", "bf16"]
    sections = measure(workload, device, steps, arguments.rounds, arguments.clock, precisions)
    text = " ".join((__doc__ or "").split("\n\n")[1].split())
    report.write("sample", "Sampling", text, sections, arguments.out, device.type)
