"""Encodes every caption of a data set once.

    python -m tools.cache_text --config configs/t2x/t2v_train.yaml data.path=/data/webvid --out /data/webvid_text
    torchrun --nproc_per_node=8 -m tools.cache_text --config ... --out ...
    torchrun --nproc_per_node=8 train.py --config ... text.features=/data/webvid_text

It encodes the captions of clips, image-text pairs, held-out clips and `sample.labels`, and the empty caption.
Run the same command again after any interruption: finished shards are kept. docs/text_to_video.md has the format.
"""

from __future__ import annotations

from pathlib import Path

from engine import cli
from engine.config import load_config
from engine.distributed import close_world, init_world
from tools.caching.text import cache_text

PATIENCE_S = 30 * 86400.0  # ranks wait for the slowest


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = cli.config_parser(__doc__ or "", "%(prog)s --config FILE --out DIR [flags] [section.key=value ...]")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--device", metavar="NAME", choices=("cpu", "cuda"), help="by default CUDA where there is one")
    arguments = parser.parse_intermixed_args(argv)

    config = load_config(arguments.config, arguments.overrides)
    world = init_world(arguments.device, timeout_s=PATIENCE_S)
    cache_text(config, arguments.out, world)
    close_world()
    return cli.leave(0)


if __name__ == "__main__":
    cli.run(main)
