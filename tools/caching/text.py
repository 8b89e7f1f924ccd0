"""Makes a cache of text features: encodes each caption once."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from common.checks import require
from common.storage import write_atomically
from datasets import build_dataset, build_held_out
from datasets.text_features import FORMAT, TABLE, TENSOR, Place, TextCache, caption_key, read_index, write_table
from engine import conditions
from engine.config import Config
from engine.distributed import World, on_main
from models.identity import text_identity

from .writer import CacheWriter, write_cache

SHARD_CAPTIONS = 1000  # captions of a shard, which are encoded again after a kill


def cache_text(config: Config, out: Path, world: World) -> None:
    """Encodes all captions of `config` into the folder `out`; collective.

    Raises: ValueError, OSError where `out` holds something else, or the captions or their encoder are unusable.
    """
    require(
        config.model.is_text, f"model.name={config.model.name} reads no captions: give the config of a text network"
    )
    require(config.text.features is None, "text.features: leave it out, this command makes the cache")
    captions = list_captions(config)
    write_cache(out, TextFeatures(config, captions, on_main(lambda: text_identity(config.text))), world)


def list_captions(config: Config) -> list[str]:
    """Returns every caption that a run of `config`, or one with other held-out clips, may ask for; each once."""
    every = replace(config.data, num_frames=1, frame_interval=1, val_share=0.0, max_clips=None, latents=None)
    clips = build_dataset(every, seed=0)
    held_out = build_held_out(every, clips, seed=0) if every.val_path is not None else None
    return list(dict.fromkeys([conditions.EMPTY, *conditions.all_captions(config, clips, held_out)]))


class TextFeatures:
    """The features of `captions`, as `Contents` of a cache.

    Args:
        encoder: the identity of the text encoder and its settings.
    """

    def __init__(self, config: Config, captions: list[str], encoder: dict[str, Any]) -> None:
        self.config, self.captions, self.encoder = config, captions, encoder
        self.identity = {**encoder, "captions": caption_key("\0".join(captions)).hex()}
        self.firsts = range(0, len(captions), SHARD_CAPTIONS)  # first caption of each shard

    def read_finished(self, out: Path) -> dict[str, Any]:
        """Returns the identity of the finished cache in `out`."""
        index = read_index(out)
        TextCache(out)  # checks the shards
        return {**index["identity"], "captions": index["captions"]}

    def encode(self, writer: CacheWriter) -> None:
        """Writes the plan and this rank's missing shards; collective."""
        on_main(lambda: self._write_plan(writer))
        features, text = conditions.EncodedFeatures(self.config.text, writer.world.device), self.config.text
        share = writer.assign_shards(len(self.firsts))
        parts = {
            number: self.captions[self.firsts[number] : self.firsts[number] + self.firsts.step] for number in share
        }
        with writer.progress("encoding", "caption", sum(map(len, parts.values()))) as bar:
            for number, part in parts.items():
                rows: list[Tensor] = []
                for caption in part:
                    rows.append(features(caption).cpu())
                    bar.update()
                words = [len(row) for row in rows]
                writer.write_shard(number, text.dtype, (sum(words), text.caption_channels), rows, TENSOR, FORMAT)
                writer.write_record(number, words)

    def _write_plan(self, writer: CacheWriter) -> None:
        before = writer.read_plan(dict)
        if before is not None:
            writer.check_identity(before)
        writer.write_plan(self.identity)

    def finish(self, writer: CacheWriter) -> str:
        """Writes the table of captions and the index; returns a summary."""
        records = writer.read_records(len(self.firsts))
        places = [
            Place(number, first, words)
            for number, shard in enumerate(records)
            for first, words in zip(accumulate(shard, initial=0), shard)
        ]
        write_atomically(writer.out / TABLE, lambda file: write_table(file, self.captions, places))
        shards = [sum(shard) for shard in records]
        index = {"format": FORMAT, "identity": self.encoder, "captions": self.identity["captions"], "shards": shards}
        writer.write_index(index)
        out = writer.out
        return f"{len(self.captions)} captions, {sum(shards)} words in {out}: train with text.features={out}"
