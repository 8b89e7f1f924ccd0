"""Copy one set of weights of a training checkpoint, with its config: what sampling needs, and no more.

python -m tools.export_weights results/demo/train assets/demo/latte
python -m tools.export_weights results/ffs/checkpoints/step-0150000 pretrained/my-ffs --weights raw
python -m tools.export_weights results/ffs_lora my-lora --adapter

Adapters are merged into the weights they were trained beside, or with --adapter written as a folder that peft loads.
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
    parser.add_argument("checkpoint", type=Path, help="a step-... folder, or a run folder: its newest checkpoint")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--weights", choices=["ema", "raw"], default="ema", help="which weights (default: ema)")
    parser.add_argument("--adapter", action="store_true", help="only the adapters of a run with lora.rank, as peft's")
    arguments = parser.parse_args(argv)

    from engine.weights import export_adapter, export_weights

    export = export_adapter if arguments.adapter else export_weights
    print(export(arguments.checkpoint, arguments.target, arguments.weights))
    return 0


if __name__ == "__main__":
    cli.run(main)
