"""Encodes every caption of a data set once.

    python -m tools.cache_text --config configs/t2x/t2v_train.yaml data.path=/data/webvid --out /data/webvid_text
    python -m engine.elastic --nproc_per_node=8 -m tools.cache_text --config ... --out ...
    bash train_scripts/launch.sh train.py ... text.features=/data/webvid_text

Encodes the captions of clips, image-text pairs, held-out clips and `sample.labels`, and the empty caption.
Run the same command again after any interruption: finished shards are kept. docs/text_to_video.md describes the format.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor

from common.checks import require
from common.storage import write_atomically, write_json
from datasets import build_dataset, build_held_out
from datasets.text_features import FORMAT, TABLE, TENSOR, Place, TextCache, caption_key, read_index, write_table
from engine import cli, conditions
from engine.config import Config, load_config
from engine.distributed import World, close_world, init_world, on_main
from models.identity import text_identity
from tools.cache_writer import PATIENCE_S, PLAN, CacheWriter, build_parser

SHARD_CAPTIONS = 1000  # per shard; after a kill, an unfinished shard is encoded again


class TextWriter(CacheWriter):
    """Encodes all captions of `config` into the folder `out`."""

    layout = TENSOR, FORMAT

    def __init__(self, config: Config, out: Path, world: World) -> None:
        name = config.model.name
        require(config.model.is_text, f"model.name={name} reads no captions: use the config of a text network")
        require(config.text.features is None, "text.features must not be set: this command writes that cache")
        self.text, self.captions = config.text, list_captions(config)
        self.encoder = on_main(lambda: text_identity(config.text))
        super().__init__(out, {**self.encoder, "captions": caption_key("\0".join(self.captions)).hex()}, world)
        starts = range(0, len(self.captions), SHARD_CAPTIONS)
        self.shards = [self.captions[start : start + SHARD_CAPTIONS] for start in starts]

    def read_finished(self) -> dict[str, Any]:
        index = read_index(self.out)
        TextCache(self.out)  # checks the shards
        return {**index["identity"], "captions": index["captions"]}

    def encode(self) -> int:
        on_main(self._check_plan)
        features = conditions.EncodedFeatures(self.text, self.world.device)
        share = self.assign_shards(len(self.shards))
        with self.progress("encoding", "caption", sum(len(self.shards[number]) for number in share)) as bar:
            for number in share:
                rows: list[Tensor] = []
                for caption in self.shards[number]:
                    rows.append(features(caption).cpu())
                    bar.update()
                words = [len(row) for row in rows]
                self.write_shard(number, self.text.dtype, (sum(words), self.text.caption_channels), rows, words)
        return len(self.shards)

    def _check_plan(self) -> None:
        before = self.read_plan(dict)
        if before is None:
            write_json(self.out / PLAN, self.identity)
        else:
            self.check_identity(before)

    def finish(self, records: list[Any]) -> str:
        places = [
            Place(number, first, words)
            for number, shard in enumerate(records)
            for first, words in zip(accumulate(shard, initial=0), shard)
        ]
        write_atomically(self.out / TABLE, lambda file: write_table(file, self.captions, places))
        shards, captions = [sum(shard) for shard in records], self.identity["captions"]
        self.write_index({"format": FORMAT, "identity": self.encoder, "captions": captions, "shards": shards})
        return f"{len(self.captions)} captions, {sum(shards)} tokens in {self.out}: train with text.features={self.out}"


def list_captions(config: Config) -> list[str]:
    """Returns the distinct captions that a run of `config` may need, whatever clips it holds out."""
    every = replace(config.data, num_frames=1, frame_interval=1, val_share=0.0, max_clips=None, latents=None)
    clips = build_dataset(every, seed=0)
    held_out = build_held_out(every, clips, seed=0) if every.val_path is not None else None
    return list(dict.fromkeys([conditions.EMPTY, *conditions.all_captions(config, clips, held_out)]))


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    arguments = build_parser(__doc__ or "").parse_intermixed_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    TextWriter(config, arguments.out, init_world(arguments.device, timeout_s=PATIENCE_S)).write()
    close_world()
    return 0


if __name__ == "__main__":
    cli.run(main)
