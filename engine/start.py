"""Checks before the first step, and the first lines of the log."""

from __future__ import annotations

from common.checks import require
from datasets import ClipDataset

from . import checkpoint as ckpt
from .build import count_parameters
from .config import Config
from .distributed import gather_objects
from .run import Run
from .state import TrainState


def check_labels(config: Config, clips: ClipDataset) -> None:
    """Raises ValueError unless the clips of a class-conditional network have classes, and none beyond its last."""
    classes = config.model.num_classes
    if not classes:
        return
    require(
        clips.num_classes > 0,
        f"model.num_classes={classes}, but the clips of {config.data.path} have no classes: set "
        "model.num_classes=0, or data.labels to where the classes are written.",
    )
    worst = max(clips.catalog.clips, key=lambda clip: clip.label)
    require(
        worst.label < classes,
        f"{worst.path} is of class {clips.class_names[worst.label]!r}, "
        f"label {worst.label}, but model.num_classes={classes} allows 0 to {classes - 1}; "
        f"the data has {clips.num_classes} classes.",
    )


def check_number(config: Config, clips: ClipDataset, world_size: int) -> None:
    """Raises ValueError if there are fewer clips than one global batch, which must not hold a clip twice."""
    train = config.train
    global_batch_size = train.batch_size * train.grad_accum_steps * world_size
    require(
        len(clips) >= global_batch_size,
        f"{config.data.path} has {len(clips)} clips, fewer than the global batch of "
        f"{global_batch_size} (train.batch_size={train.batch_size} x train.grad_accum_steps="
        f"{train.grad_accum_steps} x {world_size} processes): lower these, or add clips.",
    )


def check_ranks_agree_on_config(config: Config, **flags: object) -> None:
    """Raises ValueError, on every rank, where ranks were started with different configurations. Collective.

    Args:
        flags: command-line flags that must be equal too.
    """
    sections = config.to_dict().items()
    everyone = gather_objects(
        {f"{name}.{key}": value for name, keys in sections for key, value in keys.items()} | flags
    )
    for rank, own in enumerate(everyone):
        changed = [f"{key} {own[key]!r}, not {value!r}" for key, value in everyone[0].items() if own[key] != value]
        require(
            not changed,
            f"rank {rank} was started with another configuration than rank 0 ({'; '.join(changed)}): start every "
            "rank with the same command and the same config file.",
        )


def check_ranks_agree(config: Config, clips: ClipDataset) -> None:
    """Raises ValueError, on every rank, unless all ranks see the same data. Collective."""
    seen = gather_objects((len(clips), clips.digest))
    for rank, (length, digest) in enumerate(seen):
        require(
            (length, digest) == seen[0],
            f"rank {rank} finds {length} clips (list {digest[:12]}) under {config.data.path}, rank 0 "
            f"{seen[0][0]} (list {seen[0][1][:12]}): every machine must hold the same files.",
        )


def describe(run: Run, state: TrainState) -> list[str]:
    """Returns the first lines of the log: a warning if disk space is short, the run, its data."""
    config, rank = run.config, run.config.lora.rank
    adapters = f" in adapters of rank {rank}" if rank else ""
    lines = [
        f"{config.model.name} {config.model.variant}, {count_parameters(state.model) / 1e6:.2f} M parameters"
        f"{adapters}, global batch {run.global_batch_size} on {run.world.size} process(es), {run.world.device.type} "
        f"{config.train.precision}, steps {state.step} to {config.train.max_steps}, into {run.folder.path}"
    ]
    facts = {key: value for key, value in run.clips.describe().items() if value}
    facts["digest"] = str(facts["digest"])[:12]
    lines.append("data: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
    return [*_warn_of_space(run, state), *lines] if run.world.is_main else lines


def _warn_of_space(run: Run, state: TrainState) -> list[str]:
    """Returns a warning if the next checkpoint will hardly fit: weights, average and two moments."""
    weights = state.trained_weights(state.model).values()
    needed = 4 * sum(value.numel() * value.element_size() for value in weights)
    warning = ckpt.space_warning(run.folder.checkpoints, needed)
    return [f"warning: {warning}"] if warning else []
