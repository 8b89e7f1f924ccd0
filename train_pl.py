"""Train Latte under Lightning's loop: the twin of train.py, with the same configs, numbers and checkpoints.

    torchrun --nproc_per_node=8 train_pl.py --config configs/ffs/ffs_train.yaml data.path=data/ffs

Either script continues what the other has begun. Needs the extra `lightning` (`make setup` installs it).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine import cli, launch
from train import callbacks, refuse_images

if TYPE_CHECKING:
    from engine.trainer import Trainer


def fit(trainer: Trainer) -> bool:
    """Lightning is imported here, so that --help is quick."""
    from engine import lightning

    return lightning.fit(trainer)


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    return launch.train(argv, __doc__ or "", refuse_images, fit, callbacks)


if __name__ == "__main__":
    cli.run(main)
