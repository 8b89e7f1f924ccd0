"""Write a trained text network as a folder for `sample_t2x.py` and for diffusers' LattePipeline.

    python -m tools.export_t2v results/t2v models/my_latte
    python sample/sample_t2x.py --pretrained_model_path models/my_latte --prompt "a cat" --video_length 16

SOURCE is a run or a checkpoint. The folder has transformer, scheduler, text_encoder and tokenizer, and the vae where
diffusers has its class. An image network (custom-t2i) becomes a PixArt-alpha folder, for train.init_from.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine import cli


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a run or checkpoint folder")
    parser.add_argument("folder", type=Path, help="where to write; must be new or empty")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="(%(default)s)")
    arguments = parser.parse_args(argv)

    from sample.t2v_export import export_run

    left = export_run(arguments.source, arguments.folder, weights=arguments.weights)
    print("\n".join([f"{arguments.folder} is written", *(f"without {reason}" for reason in left)]))
    return 0


if __name__ == "__main__":
    cli.run(main)
