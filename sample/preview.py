"""Samples during training, always with the same noise and labels, so that steps can be compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from engine.callbacks import Observation, agree, attempt, distribute
from engine.config import Config
from engine.objective import Objective
from engine.run import Run
from engine.state import TrainState
from models.autoencoder import CodecConfig, LatentCodec
from models.latte import Latte
from models.latte_t2v import LatteT2V

from .generate import Generator, sampler_settings
from .labels import choose_labels, label_name
from .video_io import contact_sheet, grid, write_contact_sheet, write_mp4

SHOWN_FRAMES = 8  # columns of a contact sheet
T = TypeVar("T")


class Preview:
    """The callback `preview`: samples `monitor.sample_videos` videos of EMA and raw weights with the `sample` settings.

    Writes previews/step-0000100/ema.mp4 (all videos side by side), ema.png (a row per video), raw.mp4 and raw.png
    into `train.output_dir`, and the contact sheets to TensorBoard. Runs in bf16 if training does.
    """

    kind = "preview"

    def __init__(self, config: Config) -> None:
        self.every = config.monitor.sample_every
        self.config = config

    def prepare(self, run: Run, state: TrainState, objective: Objective) -> list[str]:
        """Raises ValueError for labels unknown to the network."""
        self.captions(self.generators(state, objective)["ema"])
        return []

    def observe(self, run: Run, state: TrainState, objective: Objective) -> Observation:
        """Samples on all ranks; rank 0 writes the videos and sheets."""
        generators = self.generators(state, objective)

        def sample(indices: Sequence[int], size: int) -> dict[str, np.ndarray]:
            return {name: sample_chunk(run, generator, indices) for name, generator in generators.items()}

        parts = map_chunks(run, range(self.config.monitor.sample_videos), sample)
        videos = {name: np.concatenate([part[name] for part in parts]) for name in generators}
        place = f"previews/step-{state.step:07d}"
        folder = Path(self.config.train.output_dir) / place

        def write() -> None:
            captions = self.captions(generators["ema"])
            for name, of_network in videos.items() if run.world.is_main else ():
                write_mp4(folder / f"{name}.mp4", grid(of_network), self.config.sample.fps)
                write_contact_sheet(folder / f"{name}.png", of_network, captions, max_frames=SHOWN_FRAMES)
                sheet = contact_sheet(of_network, captions, max_frames=SHOWN_FRAMES)
                run.log.picture(state.step, f"preview/{name}", sheet)

        attempt(run, write)
        return Observation({"videos": len(videos["ema"])}, f"{len(videos['ema'])} videos of ema and of raw in {place}")

    def captions(self, generator: Generator) -> list[str]:
        """Returns the class name of each video, or its index if unconditional."""
        wanted, known = self.config.sample, generator.conditions
        label_of = choose_labels(known, wanted.labels, wanted.label_rule, wanted.seed)
        names = [label_name(known, label_of(index)) for index in range(self.config.monitor.sample_videos)]
        return [name or f"{index:04d}" for index, name in enumerate(names)]

    def generators(self, state: TrainState, objective: Objective) -> dict[str, Generator]:
        """Returns generators for the EMA and raw weights, which share the networks of the run."""
        networks = {"ema": state.ema.model, "raw": state.model}
        return {name: build_generator(self.config, network, objective) for name, network in networks.items()}


def build_generator(config: Config, network: Latte | LatteT2V, objective: Objective) -> Generator:
    """Returns a generator for a network in training, with the codec and conditions of its objective."""
    precision = "bf16" if config.train.precision == "bf16" else config.sample.precision
    codec, device = objective.codec, objective.device
    codec = codec if isinstance(codec, LatentCodec) else decoder(config.codec, device)
    return Generator(
        network, codec, config, objective.conditions, device=device, check_videos=False, precision=precision
    )


@lru_cache(maxsize=1)
def decoder(config: CodecConfig, device: torch.device) -> LatentCodec:
    """Returns a codec for training runs that have none because their latents come from a cache."""
    return LatentCodec.from_config(config, device)


def map_chunks(run: Run, indices: Sequence[int], work: Callable[[Sequence[int], int], T]) -> list[T]:
    """Runs `work(part, size)` on chunks of `indices`, distributed over ranks; returns all results on every rank.

    `size`, the length of all but the last part, is at most `sample.batch_size`; less if that keeps more ranks busy.
    """
    size = min(run.config.sample.batch_size, math.ceil(len(indices) / run.world.size))
    chunks = [indices[start : start + size] for start in range(0, len(indices), size)]
    return distribute(run, len(chunks), lambda place: work(chunks[place], size))


def sample_chunk(run: Run, generator: Generator, indices: Sequence[int]) -> np.ndarray:
    """Samples the videos `indices` as one batch; the ranks agree to continue after every sampler step."""
    settings = sampler_settings(run.config) | {"batch_size": len(indices)}
    batches = generator.batches(indices=indices, callback=lambda done, total: agree(run), **settings)
    return np.concatenate([videos for _, videos in batches])
