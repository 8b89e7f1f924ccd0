"""The clips and settings of a latent cache, and the loader of their frames."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from datasets import Clip, build_dataset
from datasets.catalog import compute_digest
from datasets.clips import Pixels
from datasets.latents import FORMAT
from datasets.readers import Reader
from datasets.shards import NUMBER_FORMATS
from engine.config import Config
from engine.errors import TrainingAborted
from engine.stream import Breadcrumbs, loaded_items, worker_loader
from models.autoencoder import LatentCodec
from models.identity import codec_identity


@dataclass(frozen=True)
class Job:
    """The clips to cache and their settings, the same on every rank.

    identity: settings that the latents depend on; a cache is only continued with the same ones.
    """

    clips: list[Clip]
    listed: int  # number of images of data.frame_list, at the end of `clips`
    source: Pixels
    identity: dict[str, Any]
    workers: int
    strict: bool
    crumbs: Breadcrumbs

    def open(self, clip: Clip) -> Reader:
        """Returns the reader of a clip; notes the path first, in case the file kills the loader process."""
        if self.workers:
            self.crumbs(clip.path)
        return self.source.open(clip)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (V, P, C, h, w) of one frame."""
        return tuple(self.identity["shape"])

    @property
    def row_bytes(self) -> int:
        """Bytes of one frame."""
        return math.prod(self.shape) * NUMBER_FORMATS[self.identity["dtype"]].torch.itemsize


def make_job(config: Config, codec: LatentCodec, dtype: str, crumbs: Breadcrumbs) -> Job:
    """Returns the clips that a window of any length may be drawn from, with the settings of their latents."""
    if config.data.latents is not None:
        raise ValueError("data.latents: leave it out, this command makes the cache")
    # all clips, held-out ones too, for windows of any length; with max_clips only the clips that the run uses
    every = replace(config.data, num_frames=1, frame_interval=1, val_path=None, val_share=0.0, max_clips=None)
    few = config.data.max_clips is not None and not config.data.val_share
    dataset = build_dataset(config.data if few else every, seed=0)
    source = cast(Pixels, dataset.source)
    side = config.data.image_size // config.codec.downsample_factor
    images = dataset.images or []
    unique = list({clip.name: clip for clip in images}.values())
    clips = [*{clip.name: clip for clip in dataset.catalog.clips}.values(), *unique]  # a clip may have many captions
    identity = {
        "format": FORMAT,
        "codec": codec_identity(config.codec),
        "settings": dataset.latent_settings,
        "data": compute_digest(clips, []),
        "dtype": dtype,
        "shape": [1 + dataset.flips, 1 + codec.stochastic, config.codec.latent_channels, side, side],
    }
    return Job(clips, len(unique), source, identity, config.data.num_workers, config.data.strict, crumbs)


def load_items(items: Any, job: Job) -> Iterator[Any]:
    """Yields the items in order, loaded by worker processes.

    Raises: TrainingAborted, naming the file, where a worker died.
    """
    job.crumbs.clear()
    loader = worker_loader(items, job.workers, prefetch_factor=2, batch_size=None, collate_fn=keep_item)
    try:
        yield from loaded_items(loader, timeout_s=math.inf)
    except RuntimeError as error:
        explained = job.crumbs.explain(error)
        if explained is None:
            raise
        raise TrainingAborted(explained) from error
    finally:
        job.crumbs.clear()


def keep_item(item: Any) -> Any:
    """Returns the item as it is: replaces the conversion of torch's loader."""
    return item
