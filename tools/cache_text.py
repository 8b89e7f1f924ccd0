"""Encode every caption of a data set once.

    python -m tools.cache_text --config configs/t2x/t2v_train.yaml data.path=/data/webvid --out /data/webvid_text
    torchrun --nproc_per_node=8 -m tools.cache_text --config ... --out ...
    torchrun --nproc_per_node=8 train.py --config ... text.features=/data/webvid_text

Captions of the clips, of the image-text pairs, of those that are held out, and of `sample.labels`; and the empty one.
Run the same command again after any interruption: whole shards stay. The format is in docs/text_to_video.md.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine import cli

if TYPE_CHECKING:
    from torch import Tensor

    from engine.captions import Features
    from engine.config import Config
    from engine.distributed import World

SHARD_CAPTIONS = 1000  # captions of a shard; so many are encoded again after a kill
PATIENCE_S = 30 * 86400.0  # ranks wait for the slowest


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    parser = cli.config_parser(__doc__ or "", "%(prog)s --config FILE --out DIR [flags] [section.key=value ...]")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--device", metavar="NAME", choices=("cpu", "cuda"), help="by default CUDA where there is one")
    arguments = parser.parse_intermixed_args(argv)

    from engine.config import load_config  # torch is imported here, so that --help is quick
    from engine.distributed import close_world, init_world

    config = load_config(arguments.config, arguments.overrides)
    world = init_world(arguments.device, timeout_s=PATIENCE_S)
    cache_text(config, arguments.out, world)
    close_world()
    return cli.leave(0)


def cache_text(config: Config, out: Path, world: World) -> None:
    """Encode all captions of `config` into the folder `out`; collective.

    Raises: ValueError, OSError where `out` is something else, or the captions or their encoder are unusable.
    """
    from common.checks import require
    from engine.captions import EncodedFeatures
    from engine.distributed import gather_objects, on_main
    from models.identity import text_identity
    from tools.caching import locked, tell

    require(
        config.model.is_text, f"model.name={config.model.name} reads no captions: give the config of a text network"
    )
    require(config.text.features is None, "text.features is what this makes: leave it out")
    captions = captions_to_encode(config)
    identity = on_main(lambda: text_identity(config.text))
    with locked(out, world):
        if on_main(lambda: begun(out, identity, captions)):
            tell(world, f"{out} is complete already")
            return
        encode_shards(out, captions, EncodedFeatures(config.text, world.device), config, world)
        gather_objects(None)  # all shards are there
        words = on_main(lambda: finish(out, identity, captions))
    tell(world, f"{len(captions)} captions, {words} words in {out}: train with text.features={out}")


def captions_to_encode(config: Config) -> list[str]:
    """Every caption that a run of `config`, or one with other held-out clips, may ask for; each once."""
    from dataclasses import replace

    from datasets import build_dataset, build_held_out
    from engine.captions import EMPTY, all_captions

    every = replace(config.data, num_frames=1, frame_interval=1, val_share=0.0, max_clips=None, latents=None)
    clips = build_dataset(every, seed=0)
    held_out = build_held_out(every, clips, seed=0) if every.val_path is not None else None
    return list(dict.fromkeys([EMPTY, *all_captions(config, clips, held_out)]))


def begun(out: Path, identity: dict[str, Any], captions: list[str]) -> bool:
    """Whether the cache is complete; if not, its plan is written, or is the one that is there."""
    import json

    from datasets.text_features import INDEX, TextCache, caption_key, read_index
    from tools.caching import PLAN, check_same, clear_workings, write_json

    plan = {**identity, "captions": caption_key("\0".join(captions)).hex()}
    if (out / INDEX).exists():
        index = read_index(out)
        check_same(out, {**index["identity"], "captions": index["captions"]}, plan)
        TextCache(out)  # its shards are as it says
        clear_workings(out)
        return True
    if (out / PLAN).exists():
        check_same(out, json.loads((out / PLAN).read_text(encoding="utf-8")), plan)
    write_json(out / PLAN, plan)
    return False


def encode_shards(out: Path, captions: list[str], features: Features, config: Config, world: World) -> None:
    """Write this rank's share of the shards that are not done."""
    from functools import partial

    from common.storage import write_atomically
    from datasets.shards import shard_file, write_shard
    from datasets.text_features import FORMAT, TENSOR
    from engine.distributed import broadcast_object
    from tools.caching import progress, record_file, write_json

    shards = range(0, len(captions), SHARD_CAPTIONS)
    left = [number for number in range(len(shards)) if not record_file(out, number).exists()]
    share = broadcast_object(left)[world.rank :: world.size]
    parts = {number: captions[shards[number] : shards[number] + SHARD_CAPTIONS] for number in share}
    with progress("encoding", "caption", sum(map(len, parts.values())), world) as bar:
        for number, part in parts.items():
            rows: list[Tensor] = []
            for caption in part:
                rows.append(features(caption).cpu())
                bar.update()
            words = [len(row) for row in rows]
            shape = (sum(words), config.text.caption_channels)
            write = partial(write_shard, dtype=config.text.dtype, shape=shape, rows=rows, name=TENSOR, format=FORMAT)
            write_atomically(shard_file(out, number), write)
            write_json(record_file(out, number), words)


def finish(out: Path, identity: dict[str, Any], captions: list[str]) -> int:
    """Write table and index of a cache whose shards are all done; returns the number of words."""
    import json
    from itertools import accumulate

    from common.storage import write_atomically
    from datasets.text_features import FORMAT, INDEX, TABLE, Place, caption_key, write_table
    from tools.caching import clear_workings, record_file, write_json

    count = -(-len(captions) // SHARD_CAPTIONS)
    counts = [json.loads(record_file(out, number).read_text(encoding="utf-8")) for number in range(count)]
    places = [
        Place(number, first, words)
        for number, shard in enumerate(counts)
        for first, words in zip(accumulate(shard, initial=0), shard)
    ]
    write_atomically(out / TABLE, lambda temporary: write_table(temporary, captions, places))
    shards = [sum(shard) for shard in counts]
    digest = caption_key("\0".join(captions)).hex()
    write_json(out / INDEX, {"format": FORMAT, "identity": identity, "captions": digest, "shards": shards})
    clear_workings(out)
    return sum(shards)


if __name__ == "__main__":
    cli.run(main)
