"""Train Latte with Lightning's loop; configs, results and checkpoints are those of train.py.

    python train_pl.py --config configs/ffs/ffs_train.yaml data.path=data/ffs/train    # one process per GPU

Each script can resume the other's runs. Needs the extra `lightning` (`make setup` installs it).
"""

from __future__ import annotations

from engine import cli, launch
from engine.trainer import Trainer
from train import callbacks


def loop(trainer: Trainer) -> int:
    """Trains with Lightning (slow to import); returns the stop signal, or 0."""
    from engine import lightning

    return lightning.loop(trainer)


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    return launch.train(argv, __doc__ or "", callbacks, loop)


if __name__ == "__main__":
    cli.run(main)
