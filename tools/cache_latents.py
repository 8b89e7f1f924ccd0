"""Encodes a data set once: mean and deviation of every frame, also mirrored where the recipe mirrors.

    python -m tools.cache_latents --config configs/ffs/ffs_train.yaml data.path=/data/ffs --out /data/ffs_latents
    torchrun --nproc_per_node=8 -m tools.cache_latents --config ... --out ...
    torchrun --nproc_per_node=8 train.py --config ... data.latents=/data/ffs_latents

Run the same command again after any interruption: finished shards are kept. docs/latents.md describes the format and
the settings that may change between caching and training.
"""

from __future__ import annotations

from pathlib import Path

from engine import cli
from engine.config import load_config
from engine.distributed import close_world, init_world
from tools.caching.latents import cache_latents

SHARD_MB = 64
FORMATS = ("fp32", "fp16", "bf16")
PATIENCE_S = 30 * 86400.0  # ranks wait for the slowest


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = cli.config_parser(__doc__ or "", "%(prog)s --config FILE --out DIR [flags] [section.key=value ...]")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--dtype",
        choices=FORMATS,
        default=FORMATS[0],
        help="number format; fp16 and bf16 take half the space; their rounding error is printed (%(default)s)",
    )
    parser.add_argument(
        "--shard_mb",
        type=int,
        default=SHARD_MB,
        metavar="N",
        help="size of a file, which is encoded again after a kill (%(default)s)",
    )
    parser.add_argument("--device", metavar="NAME", choices=("cpu", "cuda"), help="by default CUDA where there is one")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.shard_mb < 1:
        raise ValueError(f"--shard_mb {arguments.shard_mb} must be at least 1.")

    config = load_config(arguments.config, arguments.overrides)
    world = init_world(arguments.device, timeout_s=PATIENCE_S)
    cache_latents(config, arguments.out, arguments.dtype, arguments.shard_mb * 10**6, world)
    close_world()
    return cli.leave(0)


if __name__ == "__main__":
    cli.run(main)
