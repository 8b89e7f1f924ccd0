"""Samples of a network in training: the same noise and labels every time, so that the pictures of two steps compare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import nn

from engine.callbacks import Look, agree, attempt, put_together, share_out
from engine.config import Config
from models.autoencoder import CodecConfig, LatentCodec
from models.latte import Latte

from .generate import Generator, sampler_settings
from .video_io import contact_sheet, grid, write_contact_sheet, write_mp4

if TYPE_CHECKING:
    from engine.trainer import Trainer

SHOWN_FRAMES = 8  # columns of a sheet


class Preview:
    """The callback `preview`: `monitor.sample_videos` of average and raw weights, as the `sample` section says.

    Writes previews/step-0000100/ema.mp4 (all of them side by side), ema.png (a row per video), raw.mp4 and raw.png
    into `train.output_dir`; the sheets are in TensorBoard too. Where the training is in bf16, so are these.
    """

    kind = "preview"

    def __init__(self, config: Config) -> None:
        self.every = config.monitor.sample_every
        self.config = config

    def prepare(self, run: Trainer) -> list[str]:
        """ValueError for labels that the network has not."""
        self.captions(self.generators(run)["ema"])
        return []

    def look(self, run: Trainer) -> Look:
        """Sample, and write what rank 0 has then."""
        generators = self.generators(run)
        videos = sampled(run, generators, self.config.monitor.sample_videos)
        place = f"previews/step-{run.step:07d}"
        folder = Path(self.config.train.output_dir) / place

        def write() -> None:
            captions = self.captions(generators["ema"])
            for name, of_network in videos.items() if run.world.is_main else ():
                write_mp4(folder / f"{name}.mp4", grid(of_network), self.config.sample.fps)
                write_contact_sheet(folder / f"{name}.png", of_network, captions, max_frames=SHOWN_FRAMES)
                sheet = contact_sheet(of_network, captions, max_frames=SHOWN_FRAMES)
                run.log.picture(run.step, f"preview/{name}", sheet)

        attempt(run, write)
        return Look({"videos": len(videos["ema"])}, f"{len(videos['ema'])} videos of ema and of raw in {place}")

    def captions(self, generator: Generator) -> list[str]:
        """Class or number of each video."""
        wanted = self.config.sample
        label_of = generator.labels_for(wanted.labels, wanted.label_rule, wanted.seed)
        names = [generator.class_name(label_of(index)) for index in range(self.config.monitor.sample_videos)]
        return [name or f"{index:04d}" for index, name in enumerate(names)]

    def generators(self, run: Trainer) -> dict[str, Generator]:
        """One for the average and one for the raw weights, around the very networks of `run`."""
        return {name: generator_of(run, network) for name, network in (("ema", run.ema.model), ("raw", run.model))}


def generator_of(run: Trainer, network: nn.Module) -> Generator:
    """`network` of a training, ready to sample from as it is."""
    precision = "bf16" if run.config.train.precision == "bf16" else run.config.sample.precision
    names = run.clips.class_names if run.config.model.num_classes else None
    if run.objective.captions is not None:
        names = list(run.objective.captions.texts)
    codec = run.objective.codec
    return Generator(
        cast(Latte, run.objective.called_with_labels(network)),
        codec if isinstance(codec, LatentCodec) else decoder(run.config.codec, run.world.device),
        run.config,
        class_names=names,
        device=run.world.device,
        precision=precision,
    )


@lru_cache(maxsize=1)
def decoder(config: CodecConfig, device: torch.device) -> LatentCodec:
    """The codec, of a training that has none because its latents come from a cache."""
    return LatentCodec.from_config(config, device)


def sampled(run: Trainer, generators: Mapping[str, Generator], number: int) -> dict[str, np.ndarray]:
    """Videos 0 to `number` - 1 of each generator, shared out over the ranks: uint8 (n, F, H, W, 3), on all of them."""
    chunks = chunks_of(run, range(number))

    def work(place: int) -> dict[str, np.ndarray]:
        return {name: videos_of(run, generator, chunks[place]) for name, generator in generators.items()}

    parts = put_together(share_out(run, len(chunks), work))
    return {name: np.concatenate([part[name] for part in parts]) for name in generators}


def chunks_of(run: Trainer, indices: Sequence[int]) -> list[Sequence[int]]:
    """`indices` in parts of at most `sample.batch_size`, smaller where that occupies more ranks."""
    size = min(run.config.sample.batch_size, math.ceil(len(indices) / run.world.size))
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def videos_of(run: Trainer, generator: Generator, indices: Sequence[int]) -> np.ndarray:
    """The videos of those indices, as one batch; the ranks agree to go on after every step of the sampler."""
    settings = sampler_settings(run.config) | {"batch_size": len(indices)}
    batches = generator.batches(indices=indices, callback=lambda done, total: agree(run), **settings)
    return np.concatenate([videos for _, videos in batches])
