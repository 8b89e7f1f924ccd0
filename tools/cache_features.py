"""Encodes every frame of a data set once with an image encoder, for objective.features (REPA).

    python -m tools.cache_features --config configs/ffs/ffs_train.yaml data.path=/data/ffs \
        --encoder facebook/dinov2-base --dtype fp16 --out /data/ffs_features
    bash train_scripts/launch.sh train.py ... objective.features=/data/ffs_features objective.features_block=8

Stores one feature for each token of the network, also of mirrored frames if the recipe flips clips. Run the same
command again after any interruption: finished shards are kept. docs/levers.md describes the term of the loss.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from datasets.latents import FeatureCache
from engine import cli
from engine.config import Config
from engine.distributed import World
from models.vision_encoder import VisionEncoder
from tools.cache_latents import FrameWriter, run
from tools.cache_writer import build_parser

BATCH = 32  # frames, plain and mirrored, per call of the encoder


class FeatureWriter(FrameWriter):
    """Encodes frames with the image encoder in the folder, or of the hub name, `encoder`."""

    cache = FeatureCache
    layout = cache.key, cache.format

    def __init__(self, encoder: str, config: Config, out: Path, dtype: str, shard_bytes: int, world: World) -> None:
        self.network = VisionEncoder(encoder, config.token_grid, world.device)
        shape = (config.token_grid**2, self.network.network.config.hidden_size)
        super().__init__(self.network.identity, shape, config, out, dtype, shard_bytes, world)

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Encodes (T, V, 3, H, W) in [-1, 1] to (T, V, L, D) in fp32."""
        chunks = frames.flatten(0, 1).split(BATCH)
        features = torch.cat([self.network(chunk.to(self.world.device)).cpu() for chunk in chunks])
        return features.unflatten(0, frames.shape[:2])


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = build_parser(__doc__ or "")
    parser.add_argument("--encoder", required=True, metavar="PATH", help="folder or hub name of the image encoder")
    return run(argv, parser, lambda arguments, *settings: FeatureWriter(arguments.encoder, *settings))


if __name__ == "__main__":
    cli.run(main)
