"""The command line of the training scripts: reads the config, checks it, trains."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from common.checks import require

from .build import describe
from .callbacks import Callback
from .cli import config_parser, leave
from .config import Config, load_config
from .distributed import close_world, init_world, require_same
from .trainer import Trainer


def train(
    argv: list[str],
    description: str,
    callbacks: Callable[[Config], Sequence[Callback]],
    loop: Callable[[Trainer], int] | None = None,
    *,
    images: bool = False,
) -> int:
    """Trains as the command line says; returns the exit code.

    Args:
        callbacks: makes the callbacks of a run.
        loop: calls `Trainer.train_step` in place of `Trainer.loop`.
        images: whether the script is for joint image-video training, which has scripts of its own, as officially.
    """
    parser = config_parser(description, "%(prog)s --config FILE [--dry-run] [key=value ...]")
    parser.add_argument("--dry-run", action="store_true", help="print config, parameters and cost as JSON, and exit")
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="KEY",
        help="continue a checkpoint although KEY (optim.learning_rate, data_digest, ...) has changed; repeatable",
    )
    parser.add_argument(
        "--allow-inexact-resume", action="store_true", help="continue a checkpoint that lacks generator states"
    )
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    num_images = config.data.num_images
    require(
        images or not num_images,
        f"data.num_images={num_images} is joint image-video training: run train_with_img.py, or set it to 0.",
    )
    require(
        not images or num_images > 0,
        "data.num_images=0 has no images to train with: set it to 1 or more, or run train.py.",
    )
    if arguments.dry_run:
        sys.stdout.write(json.dumps(describe(config), indent=2) + "\n")
        return 0

    world = init_world(timeout_s=config.train.timeout_s)
    flags: dict[str, Any] = {
        "override": sorted(arguments.override),
        "allow_inexact_resume": arguments.allow_inexact_resume,
    }
    remedy = "start every rank with the same command and the same config file"
    require_same(config.to_flat_dict() | flags, "was started with another configuration", remedy)
    trainer = Trainer(config, world, callbacks=callbacks(config), **flags)
    reached = trainer.fit(loop)
    close_world()  # after a clean end only
    return leave(0 if reached else trainer.run.signals.exit_code)
