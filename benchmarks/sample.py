"""Sampling: the project's loop with each of its options against the reference's loop, and the difference of results."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from engine.conditions import class_conditions
from engine.config import Config
from models.autoencoder import CodecConfig, LatentCodec
from models.latte import Latte
from sample.generate import Generator

from . import report
from .reference import ReferenceDiffusion, ReferenceLatte, guided_network
from .timing import Case, Timer, compare
from .workload import PRECISIONS, Workload, pair_of, read_problem

CLASSES, LABEL, SCALE = 101, 3, 4.0
PLAIN = "ours, plain loop"
COLUMNS = {"": "", "ms/step": ".1f", "ratio": ".2f", "s/video, 250 steps": ".2f", "apart": ".0e"}
ABOUT = """
Random weights and no autoencoder: decoding is not part of it. Where the steps are fewer than 250, the time of 250 is
that of as many evaluations; in bf16 the network runs under autocast in both.
"""


@dataclass(frozen=True)
class Way:
    """A way to sample: options of `Generator` (`network`) and of its `sample` (`settings`)."""

    name: str
    guided: bool = False
    network: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def fits(self, guided: bool, precision: str, on_cuda: bool) -> bool:
        """Returns whether it is timed: fp32 weights need no cast, and compiling takes minutes on a CPU."""
        casts, compiles = self.network.get("cast_weights"), self.network.get("compiled")
        return self.guided == guided and not (casts and precision == "fp32") and not (compiles and not on_cuda)


# Add a way as a line.
WAYS = [
    Way(PLAIN),
    Way("weights cast", network={"cast_weights": True}),
    Way("compiled", network={"compiled": True}),
    Way(PLAIN, True),
    Way("guidance one by one", True, settings={"batched_guidance": False}),
    Way("guidance at 0.2 to 0.8", True, settings={"guidance_interval": (0.2, 0.8)}),
    Way("weights cast", True, network={"cast_weights": True}),
    Way("compiled", True, network={"compiled": True}),
]


class LatentsOnly:
    """Replaces the codec: latents are compared, not pixels."""

    config = CodecConfig()

    def decode(self, latents: Tensor) -> Tensor:
        """Returns the latents."""
        return latents


class LatentGenerator(Generator):
    """Generates latents instead of frames."""

    def decode(self, indices: Sequence[int], latents: Tensor) -> np.ndarray:
        return latents.float().cpu().numpy()


def measure(workload: Workload, timer: Timer, steps: int, precision: str) -> Iterator[report.Section]:
    """Yields the tables of a precision, without and with guidance: the reference, then every way."""
    workload = replace(workload, classes=CLASSES)
    timer = replace(timer, warmup=0 if timer.rounds < 3 else 1)
    for guided in (False, True):
        model, plain = pair_of(workload, timer.device)
        torch.manual_seed(0)
        reference = reference_loop(plain, workload, timer.device, steps, precision, guided)
        cases = [Case("reference", reference, workload.batch, repeats=steps)]
        expected: np.ndarray | None = None
        for way in WAYS:
            if not way.fits(guided, precision, timer.on_cuda):
                continue
            call = loop(way, model, workload.config(report.ROOT), workload, timer.device, steps, precision)
            made = call()
            expected = made if expected is None else expected
            apart = float(np.abs(made - expected).max() / np.abs(expected).max())
            cells = {} if way.name == PLAIN else {"apart": apart}
            cases.append(Case(way.name, call, workload.batch, repeats=steps, cells=cells))
        text = (
            f"DDPM, {steps} steps measured; {workload}, {CLASSES} classes. `apart`: largest difference from the plain "
            "loop of ours for the same draws, relative to its largest value."
        )
        title = f"{precision}, {'guided' if guided else 'not guided'}"
        yield report.Section(title, text, COLUMNS, compare(cases, COLUMNS, timer))
        timer.free()


def loop(
    way: Way, model: Latte, config: Config, workload: Workload, device: torch.device, steps: int, precision: str
) -> Callable[[], np.ndarray]:
    """Returns a call that samples one batch of latents with the project's generator."""
    codec = cast(LatentCodec, LatentsOnly())
    if way.network.get("cast_weights"):
        model = copy.deepcopy(model)  # casts in place
    conditions = class_conditions(config.model, device)
    generator = LatentGenerator(model, codec, config, conditions, device=device, precision=precision, **way.network)
    scale = {"guidance_scale": SCALE} if way.guided else {}
    settings = {"steps": steps, "batch_size": workload.batch, **scale, **way.settings}
    return lambda: generator.sample([LABEL], workload.batch, **settings)


def reference_loop(
    plain: ReferenceLatte, workload: Workload, device: torch.device, steps: int, precision: str, guided: bool
) -> Callable[[], Tensor]:
    """Returns a call that samples one batch with the reference; with guidance, a batch of two halves."""
    diffusion, dtype = ReferenceDiffusion(1000, str(steps)), PRECISIONS[precision][1]
    labels = torch.full((workload.batch,), LABEL, device=device)
    labels = torch.cat([labels, torch.full_like(labels, CLASSES)]) if guided else labels
    predict = guided_network(plain, SCALE) if guided else plain
    shape = (workload.batch, workload.frames, plain.in_channels, workload.latent, workload.latent)

    def network(x: Tensor, timesteps: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return predict(x, timesteps, labels)

    def call() -> Tensor:
        noise = torch.randn(shape, device=device)
        return diffusion.sample(network, torch.cat([noise, noise]) if guided else noise)

    return call


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints and writes the tables."""
    workload, timer = read_problem(arguments, latent=16)
    workload = replace(workload, batch=arguments.batch or 1)
    steps = arguments.steps or (2 if arguments.quick else 250 if timer.on_cuda else 4)
    precisions = arguments.precision or ["fp32", "bf16"]
    sections = [each for precision in precisions for each in measure(workload, timer, steps, precision)]
    report.write("sample", "Sampling", ABOUT, sections, arguments.out, timer.device)
