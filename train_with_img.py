"""Train Latte on video clips and single images together (paper section 3.4).

    torchrun --nproc_per_node=8 train_with_img.py --config configs/ffs/ffs_img_train.yaml data.path=data/ffs

Run the same command again to continue an interrupted run.
"""

from __future__ import annotations

from engine import cli, launch
from train import callbacks


def require_images(num_images: int) -> str | None:
    """Refuses configs without images."""
    if not num_images:
        return "data.num_images=0 has no images to train with: set it to 1 or more, or run train.py."
    return None


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    return launch.train(argv, __doc__ or "", require_images, callbacks)


if __name__ == "__main__":
    cli.run(main)
