"""Make a folder of a trained Latte that `LatteVideoPipeline.from_pretrained` loads, and push it to a hub.

    python -m tools.make_pipeline results/ffs_train my-latte [--push OWNER/NAME]
    python -m tools.make_pipeline ffs.pt my-latte --config configs/ffs/ffs_sample.yaml

The folder holds config.json, model.safetensors, the autoencoder and a model card (docs/sampling.md). The hub is that
of HF_ENDPOINT, the token that of HF_TOKEN or of `hf auth login`.
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
    parser.add_argument("checkpoint", type=Path, help="a run or checkpoint folder of ours, or an official .pt")
    parser.add_argument("folder", type=Path, help="where to write; must be new or empty")
    parser.add_argument("--config", type=Path, metavar="FILE", help="of an official .pt, which says nothing of itself")
    parser.add_argument("--weights", choices=["ema", "raw"], default="ema", help="which weights (default: ema)")
    parser.add_argument("--push", metavar="OWNER/NAME", help="write it to this hub name too")
    parser.add_argument("--private", action="store_true", help="make that name a private one where it is new")
    arguments = parser.parse_args(argv)

    from engine.config import load_config
    from models.convert_t2v import require_new
    from sample.pipeline_latte import LatteVideoPipeline

    require_new(arguments.folder)
    config = load_config(arguments.config) if arguments.config else None
    pipeline = LatteVideoPipeline.from_checkpoint(
        arguments.checkpoint, config=config, weights=arguments.weights, device="cpu"
    )
    print(pipeline.save_pretrained(arguments.folder, (arguments.push or "").rpartition("/")[2] or None))
    if arguments.push:
        print(pipeline.push_to_hub(arguments.push, private=arguments.private or None))
    return 0


if __name__ == "__main__":
    cli.run(main)
