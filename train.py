"""Train Latte on the latents of video clips.

    bash train_scripts/ffs_train.sh data.path=data/ffs/train                   # one process per GPU
    python train.py --config configs/demo/demo_train.yaml train.max_steps=100    # one process
    python train.py --config configs/ffs/ffs_train.yaml --dry-run                # config, parameters, cost

Repeat the command to resume an interrupted run.
"""

from __future__ import annotations

from engine import cli, launch
from engine.callbacks import Callback
from engine.config import Config
from evaluation.during import Metric
from sample.preview import Preview


def callbacks(config: Config) -> list[Callback]:
    """Returns a run's callbacks, other than validation."""
    return [Preview(config), Metric(config)]


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    return launch.train(argv, __doc__ or "", callbacks)


if __name__ == "__main__":
    cli.run(main)
