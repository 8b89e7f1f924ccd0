"""Train Latte on clips and single images together with Lightning's loop, like train_with_img.py.

    python train_with_img_pl.py --config configs/ffs/ffs_img_train.yaml data.path=data/ffs/train

Each script can resume the other's runs. Needs the extra `lightning` (`make setup` installs it).
"""

from __future__ import annotations

from engine import cli, launch
from train import callbacks
from train_pl import loop


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    return launch.train(argv, __doc__ or "", callbacks, loop, images=True)


if __name__ == "__main__":
    cli.run(main)
