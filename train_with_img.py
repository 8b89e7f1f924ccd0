"""Train Latte on video clips and single images together (paper section 3.4).

    bash train_scripts/ffs_img_train.sh data.path=data/ffs/train

Repeat the command to resume an interrupted run.
"""

from __future__ import annotations

from engine import cli, launch
from train import callbacks


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    return launch.train(argv, __doc__ or "", callbacks, images=True)


if __name__ == "__main__":
    cli.run(main)
