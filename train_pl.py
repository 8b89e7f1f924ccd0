"""Train Latte under Lightning's loop: the twin of train.py, with the same configs, numbers and checkpoints.

    torchrun --nproc_per_node=8 train_pl.py --config configs/ffs/ffs_train.yaml data.path=data/ffs

Either script continues the runs of the other. Needs the extra `lightning` (`make setup` installs it).
"""

from __future__ import annotations

from engine import cli, launch
from engine.trainer import Trainer
from train import callbacks


def loop(trainer: Trainer) -> int:
    """Trains under Lightning, which is slow to import; returns the stop signal, or 0."""
    from engine import lightning

    return lightning.loop(trainer)


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    return launch.train(argv, __doc__ or "", callbacks, loop)


if __name__ == "__main__":
    cli.run(main)
