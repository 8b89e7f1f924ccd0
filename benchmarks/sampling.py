"""Times the project's sampling loop, with each of its options, against the reference's, and compares the results."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

import diffusion
from engine.conditions import class_conditions
from models.latte import Latte
from sample.generate import Generator

from .reference import ReferenceDiffusion, ReferenceLatte, guided_network
from .report import Table
from .timing import Case, Timer
from .workload import Workload

CLASSES, LABEL, SCALE = 101, 3, 4.0
Options = dict[str, Any]
# name -> options of `Generator` and of its `batches`; the latter apply with guidance only. Add ways here; results are
# compared with those of the first.
WAYS: dict[str, tuple[Options, Options]] = {
    "ours, plain loop": ({}, {}),
    "guidance one by one": ({}, {"batched_guidance": False}),
    "guidance at 0.2 to 0.8": ({}, {"guidance_interval": (0.2, 0.8)}),
    "weights cast": ({"cast_weights": True}, {}),
    "compiled": ({"compiled": True}, {}),
}


class LatentGenerator(Generator):
    """Generates latents instead of frames."""

    def decode(self, indices: Sequence[int], latents: Tensor) -> Any:
        """Returns the latents."""
        return latents


def sample(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[Table]:
    """Yields the tables of each precision, without and with guidance: the reference, then every way."""
    latent = arguments.latent or (workload.latent if timer.on_cuda or arguments.quick else 16)
    workload = workload.but({"batch": arguments.batch or 1, "latent": latent, "classes": CLASSES})
    steps = arguments.steps or (2 if arguments.quick else 250 if timer.on_cuda else 4)
    heads = ("ms", "ratio", "s/video, 250 steps", "apart")
    for precision, guided in product(arguments.precision or ("fp32", "bf16"), (False, True)):
        problem = workload.but({"train.precision": precision})
        model, plain = problem.networks(timer.device)
        makers = {"reference": partial(reference_case, plain, problem, timer.device, steps, guided)}
        for name, (network, settings) in WAYS.items():
            casts_nothing = "cast_weights" in network and precision == "fp32"
            is_slow = "compiled" in network and not timer.on_cuda  # compiling takes minutes on a CPU
            if not (casts_nothing or is_slow or (settings and not guided)):
                options = {"precision": precision, **network}
                loop = {"steps": steps, "guidance_scale": SCALE if guided else 1.0, **settings}
                makers[name] = partial(our_case, model, problem, timer.device, options, loop)
        text = (
            f"DDPM, {steps} steps measured; {problem}, {CLASSES} classes. `apart`: relative difference from our "
            "plain loop with the same random draws."
        )
        title = f"{precision}, {'guided' if guided else 'not guided'}"
        yield Table(title, text, heads, timer.compare(makers, heads))


def our_case(model: Latte, workload: Workload, device: torch.device, network: Options, settings: Options) -> Case:
    """Returns the case that samples one batch of latents with the project's generator."""
    config, codec = workload.config(), cast(Any, SimpleNamespace(decode=None))
    if "cast_weights" in network:
        model = copy.deepcopy(model)  # casts in place
    generator = LatentGenerator(model, codec, config, class_conditions(config.model, device), device=device, **network)

    def call() -> Any:
        ((_, latents),) = generator.batches([LABEL], workload.batch, batch_size=workload.batch, **settings)
        return latents

    return Case(call, workload.batch, repeats=settings["steps"])


def reference_case(plain: ReferenceLatte, workload: Workload, device: torch.device, steps: int, guided: bool) -> Case:
    """Returns the case that samples one batch with the reference, guided in two halves, with its own random draws."""
    process = ReferenceDiffusion(1000, str(steps))
    labels = torch.full((workload.batch,), LABEL, device=device)
    labels = torch.cat([labels, torch.full_like(labels, CLASSES)]) if guided else labels
    predict = guided_network(plain, SCALE) if guided else plain

    def network(x: Tensor, timesteps: Tensor) -> Tensor:
        with workload.autocast(device):
            return predict(x, timesteps, labels)

    def call() -> None:
        noise = torch.randn(workload.batch, workload.frames, 4, workload.latent, workload.latent, device=device)
        diffusion.sample(process, network, torch.cat([noise, noise]) if guided else noise)

    return Case(call, workload.batch, repeats=steps)
