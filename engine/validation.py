"""The loss on held-out clips, at fixed noise and timesteps, per range of timesteps.

Every clip is noised once in each of K equal parts (buckets) of the process, from data (0) to noise (1), whatever
the density of training timesteps. EMA and raw weights see the same noise and timesteps.

Letters: B is one clip's K noised copies; F frames, I images, C latent channels, h w latent pixels.
"""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from datasets import ClipDataset, build_held_out

from .callbacks import Observation, distribute
from .config import Config
from .distributed import CPU, require_same
from .objective import Objective, sample_generator
from .run import Run
from .state import TrainState

FIRST_POSITION = 2**48  # beyond every training position, so that no generator is used twice


class Validation:
    """The callback `val`: its losses depend only on the weights, the clips and the seed.

    Each clip is its own batch, so neither `train.batch_size` nor the number of ranks changes their bits (on the same
    machine, with the same number of threads). Each rank encodes its clips once, at the start. The held-out clips must
    have the classes of the training clips, `clips`.
    """

    kind = "val"

    def __init__(self, config: Config, clips: ClipDataset) -> None:
        monitor = config.monitor
        self.every = monitor.val_every
        self.config = config
        self.buckets = monitor.val_buckets
        self.clips = build_held_out(config.data, clips, seed=config.train.seed)
        self.indices = spread(len(self.clips), monitor.val_clips)
        self.latents: dict[int, tuple[Tensor, Tensor]] = {}

    def prepare(self, run: Run, state: TrainState, objective: Objective) -> list[str]:
        """Reads and encodes the clips. Raises: ValueError if one cannot be read."""
        found = {"list": self.clips.digest[:12]}
        require_same(found, "has different held-out clips", "every machine needs the same files")

        def encode(number: int) -> None:
            self.latents[number] = self._encode(objective, number)

        distribute(run, len(self.indices), encode)
        return [
            f"validation: {len(self.indices)} of {len(self.clips)} held-out clips of {self.clips.catalog.root}, digest "
            f"{self.clips.digest[:12]}, every {self.every} steps"
        ]

    def observe(self, run: Run, state: TrainState, objective: Objective) -> Observation:
        """Returns mean losses over the clips and over each bucket, as `ema/loss`, `raw/loss_t0.00-0.10`, ..."""
        networks = {"ema": state.ema.model, "raw": state.model}

        def losses(number: int) -> dict[str, float]:
            found = {name: self._losses(objective, network, number) for name, network in networks.items()}
            return {f"{name}/{key}": value for name, parts in found.items() for key, value in parts.items()}

        rows = distribute(run, len(self.indices), losses)
        means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        values = {**means, "clips": len(rows)}
        return Observation(values, ", ".join(f"{name} loss {means[f'{name}/loss']:.4f}" for name in networks))

    def _encode(self, objective: Objective, number: int) -> tuple[Tensor, Tensor]:
        """Returns latents (F+I, C, h, w) and labels (1+I,) of clip `indices[number]`, on the CPU."""
        item = self.clips[0, self.indices[number]]
        codec, frames = objective.codec, cast(Tensor, item[self.clips.source.key])  # type: ignore[literal-required]
        posterior = objective.posterior({self.clips.source.key: frames[None]})
        noise = None
        if codec.stochastic:
            noise = torch.randn(posterior.mean.shape, generator=self._generator(number, 0)).to(posterior.mean.device)
        return posterior.latents(codec.config, noise)[0].to(CPU), item["labels"]

    def _losses(self, objective: Objective, network: nn.Module, number: int) -> dict[str, float]:
        """Returns the means of one clip, and its loss in each bucket."""
        latents, labels = self.latents[number]
        latents = latents.to(objective.device)
        generator = self._generator(number, 1)
        shape = (self.buckets, *latents.shape)
        noise = torch.randn(shape, generator=generator).to(latents.device)
        uniform = torch.rand(self.buckets, generator=generator, dtype=torch.float64)
        num_uniforms = objective.num_given_uniforms(self.config.data.num_frames)
        given = objective.given_frames(torch.rand(self.buckets, num_uniforms, generator=generator))
        terms = objective.terms(
            network,
            latents.to(objective.precision.dtype).expand(shape),
            objective.conditions.batch(labels.expand(self.buckets, -1)),
            self.timesteps(uniform).to(latents.device),
            noise,
            None if given is None else given.to(latents.device),
        )
        means = {name: float(value) for name, value in objective.parts(terms).items()}
        edges = [f"{edge / self.buckets:.2f}" for edge in range(self.buckets + 1)]
        names = [f"loss_t{first}-{last}" for first, last in pairwise(edges)]
        return means | dict(zip(names, terms.loss.tolist(), strict=True))

    def timesteps(self, uniform: Tensor) -> Tensor:
        """Returns timesteps (K,) in the form the network is trained on, from `uniform` (K,), one per bucket."""
        share = (torch.arange(self.buckets) + uniform) / self.buckets
        times = share * self.config.diffusion.num_steps
        return times.float() if self.config.diffusion.prediction == "flow" else times.long()

    def _generator(self, number: int, purpose: int) -> torch.Generator:
        """Returns the generator for a clip's encoding (0) or noising (1); on the CPU: the same noise on any device."""
        return sample_generator(self.config.train.seed, FIRST_POSITION + 2 * self.indices[number] + purpose, CPU)


def spread(total: int, count: int) -> list[int]:
    """Returns `count` indices below `total`, evenly spaced; all, if `total` is smaller."""
    return [place * total // count for place in range(count)] if count < total else list(range(total))
