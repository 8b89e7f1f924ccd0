"""The command line of the training scripts: reads the config, checks it, trains."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from common.checks import require

from .build import describe
from .callbacks import Callback
from .cli import config_parser, leave
from .config import Config, load_config
from .distributed import close_world, init_world, require_same
from .launchers import read_place
from .trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # forwarded by the launcher to the ranks


def train(
    argv: list[str],
    description: str,
    callbacks: Callable[[Config], Sequence[Callback]],
    loop: Callable[[Trainer], int] | None = None,
    *,
    images: bool = False,
) -> int:
    """Runs a training command line; returns the exit code.

    Args:
        callbacks: returns a run's callbacks.
        loop: replaces `Trainer.loop`; calls `Trainer.train_step`.
        images: whether the script is one of those for joint image-video training, separate as in the official code.
    """
    parser = config_parser(description, "%(prog)s --config FILE [--dry-run] [key=value ...]")
    parser.add_argument("--dry-run", action="store_true", help="print config, parameters and cost as JSON, and exit")
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="KEY",
        help="resume although KEY (optim.learning_rate, data_digest, ...) has changed; repeatable",
    )
    parser.add_argument(
        "--allow-inexact-resume", action="store_true", help="resume although the checkpoint lacks RNG states"
    )
    if loop:
        parser.add_argument("--devices", type=int, metavar="N", help="processes to start; default: one per GPU")
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
        sys.stderr.write("--dry-run: the configuration is valid; data and codec were not opened\n")
        return 0

    if loop:
        start_devices(arguments.devices)
    world = init_world(timeout_s=config.train.timeout_s)
    flags: dict[str, Any] = {
        "override": sorted(arguments.override),
        "allow_inexact_resume": arguments.allow_inexact_resume,
    }
    remedy = "start every rank with the same command and the same config file"
    require_same(config.to_flat_dict() | flags, "was started with a different configuration", remedy)
    trainer = Trainer(config, world, callbacks=callbacks(config), **flags)
    reached = trainer.fit(loop)
    close_world()
    return leave(0 if reached else trainer.run.signals.exit_code)


def start_devices(count: int | None) -> None:
    """Restarts this command with `count` processes, by default one per GPU; returns if one is enough.

    Also returns in a process that a launcher started.

    Raises: ValueError unless `count` is at least 1 and agrees with the launcher.
    """
    _, size, _ = read_place(os.environ)
    is_launched = "RANK" in os.environ
    require(count is None or count >= 1, f"--devices must be at least 1, got {count}.")
    require(
        not is_launched or count in (None, size),
        f"--devices {count}, but the launcher started {size} process(es): leave it out.",
    )
    count = count or torch.cuda.device_count()
    if is_launched or count <= 1:
        return
    elastic = ["-m", "engine.elastic", "--standalone", f"--nproc_per_node={count}", f"--signals-to-handle={SIGNALS}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *elastic, *sys.argv], environment)
