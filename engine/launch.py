"""What train.py and train_with_img.py do: read the config, check it, train."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from .cli import config_parser, leave

if TYPE_CHECKING:
    from .callbacks import Callback
    from .config import Config
    from .trainer import Trainer


def train(
    argv: list[str],
    description: str,
    check: Callable[[int], str | None],
    fit: Callable[[Trainer], bool] | None = None,
    callbacks: Callable[[Config], list[Callback]] | None = None,
) -> int:
    """Train as the command line says.

    Args:
        check: given `data.num_images`, the sentence that refuses it for this script, or None.
        fit: what trains, in place of `Trainer.fit`.
        callbacks: makes those of a run.
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

    from .config import load_config, require  # torch is imported here, so that --help is quick

    config = load_config(arguments.config, arguments.overrides)
    refusal = check(config.data.num_images)
    require(refusal is None, refusal or "")
    if arguments.dry_run:
        from .build import describe

        sys.stdout.write(json.dumps(describe(config), indent=2) + "\n")
        return 0

    from .distributed import close_world, init_world
    from .start import check_ranks_agree_on_config
    from .trainer import Trainer

    world = init_world(timeout_s=config.train.timeout_s)
    check_ranks_agree_on_config(config, override=sorted(arguments.override))
    trainer = Trainer(
        config,
        world,
        override=arguments.override,
        allow_inexact_resume=arguments.allow_inexact_resume,
        callbacks=callbacks(config) if callbacks else (),
    )
    reached = fit(trainer) if fit else trainer.fit()
    close_world()  # after a clean end only
    return leave(0 if reached else trainer.signals.exit_code)
