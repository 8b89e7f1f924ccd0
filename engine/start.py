"""The start of a run: checks of its data, the newest checkpoint or initial weights, and the first lines of the log.

Only the same experiment may resume a checkpoint, unless --override allows the change.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from common.checks import require
from common.storage import find_changes
from datasets import ClipDataset

from . import checkpoint as ckpt
from .build import count_parameters
from .config import Config, OptimConfig
from .distributed import on_main
from .run import Run
from .state import TrainState
from .weights import initialise

# keys that may change when a run resumes; all others define the experiment
FREE_ON_RESUME = {
    "sample": "*",
    "monitor": "*",
    "codec": "path chunk_size",
    "text": "path features",
    "data": "path val_path latents captions num_workers worker_timeout_s reader strict",
    "model": "gradient_checkpointing",
    # batch_size and grad_accum_steps: their product with the world size is checked
    "train": "output_dir max_steps batch_size grad_accum_steps log_every checkpoint_every keep_last keep_every "
    "async_checkpoint parallel drift_check_every timeout_s hang_timeout_s resume init_from compile run_ahead attention",
    "optim": "fused max_skips",
}
# images per clip -> global batch of the official recipes: 5 clips on each of 8 GPUs, 4 in joint training
OFFICIAL_BATCHES = {0: 40, 8: 32}
OFFICIAL_SETS = ("ffs", "sky", "taichi", "ucf101")
# what a checkpoint's state.json must hold in addition to step and samples_seen
STATE_KEYS = ("ema_updates", "guard", "global_batch_size", "world_size", "data_digest", "num_clips", "class_names")


# ---- checks ----------------------------------------------------------------------------------------


def check_clips(config: Config, clips: ClipDataset, world_size: int) -> None:
    """Raises ValueError unless the clips have the network's classes and number at least a global batch."""
    train, classes = config.train, config.model.num_classes
    if classes:
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
    global_batch_size = train.batch_size * train.grad_accum_steps * world_size
    require(
        len(clips) >= global_batch_size,
        f"{config.data.path} has {len(clips)} clips, fewer than the global batch of "
        f"{global_batch_size} (train.batch_size={train.batch_size} x train.grad_accum_steps="
        f"{train.grad_accum_steps} x {world_size} processes): lower these, or add clips.",
    )


# ---- checkpoint or initial weights -----------------------------------------------------------------


def restore(run: Run, state: TrainState, override: Collection[str] = (), allow_inexact: bool = False) -> list[str]:
    """Resumes a checkpoint or loads initial weights, as configured; returns lines to log. Collective.

    Args:
        override: keys that may differ from the checkpoint.
        allow_inexact: RNG states may be missing.
    """
    root, source = run.folder.checkpoints, run.config.train.resume
    folder, complaints = None, list[str]()
    if source == "never":
        held = len(ckpt.list_checkpoints(root))
        require(
            not held,
            f"train.resume=never, but {root} holds {held} checkpoint(s) of an earlier run: name another "
            "train.output_dir, or move them away.",
        )
    else:
        folder, complaints = on_main(lambda: ckpt.recover_newest(root))
        if folder is None and source != "auto":  # the run has no checkpoint of its own yet
            folder = on_main(lambda: ckpt.find_checkpoint(Path(source)))
    if folder is None:
        require(not complaints, f"{' '.join(complaints)} No other checkpoint is left under {root}.")
        return initialise(state.model, state.ema, run.config, state.lora_base)
    return [f"warning: {text}" for text in complaints] + resume(run, state, folder, override, allow_inexact)


def resume(run: Run, state: TrainState, folder: Path, override: Collection[str], allow_inexact: bool) -> list[str]:
    """Resumes the checkpoint in `folder`; returns lines to log."""
    saved = ckpt.load_checkpoint(folder)
    changes = find_differences(run, state, folder, saved)
    refused = [change for change in changes if change.partition(":")[0] not in override]
    require(
        not refused,
        f"cannot resume {folder}, this is a different experiment: {'; '.join(refused)}. Restore these, name them "
        "with --override, or start a new run with another train.output_dir (train.init_from takes weights only).",
    )
    notes = [f"warning: accepted by --override: {change}" for change in changes]
    notes += check_generators(folder, saved, run.world.size, allow_inexact)
    try:
        state.load_state_dict(saved, run.world.rank)
    except KeyError as error:
        raise ckpt.CheckpointError(f"checkpoint {folder} lacks {error}; it cannot be resumed.") from None
    run.folder.event("resume", state.step, checkpoint=folder.name, world_size=run.world.size)
    return [*notes, f"resuming {folder} at step {state.step}"]


def find_differences(run: Run, state: TrainState, folder: Path, saved: ckpt.Checkpoint) -> list[str]:
    """Returns lines `key: old -> new` for every difference between checkpoint `folder` and this experiment."""
    lacking = [key for key in STATE_KEYS if key not in saved.state]
    require(not lacking, f"{folder / 'state.json'} lacks {', '.join(lacking)}; it cannot be resumed.")
    before, after = ckpt.read_config(folder).to_flat_dict(), run.config.to_flat_dict()
    free = {f"{section}.{key}" for section, keys in FREE_ON_RESUME.items() for key in keys.split()}
    compared = [key for key in after if key not in free and f"{key.partition('.')[0]}.*" not in free]
    facts = {"global_batch_size": run.global_batch_size, "data_digest": run.clips.digest, "lora_base": state.lora_base}
    changes = find_changes(before, after, compared) + find_changes(saved.state, facts, list(facts))
    old, now = set(saved.state["class_names"]), set(run.clips.class_names)
    if old != now:  # a new class folder shifts the labels after it
        changes.append(f"class_names: {sorted(old - now)} -> {sorted(now - old)}")
    return changes


def check_generators(folder: Path, saved: ckpt.Checkpoint, world_size: int, allow_inexact: bool) -> list[str]:
    """Returns lines to log. Raises: ValueError if RNG states are missing, unless `allow_inexact`."""
    before = saved.state["world_size"]
    missing = [f"cpu/{rank}" for rank in range(before) if f"cpu/{rank}" not in saved.rng]
    require(
        not missing or allow_inexact,
        f"{folder / 'rng.safetensors'} lacks {', '.join(missing)}: the resume would not be exact. Use an "
        "older checkpoint, or accept that with --allow-inexact-resume.",
    )
    notes = []
    if missing:
        notes.append(f"warning: RNG states are missing ({', '.join(missing)}): this resume is not exact")
    if before != world_size:
        notes.append(
            f"warning: saved by {before} process(es), resumed on {world_size}: the same samples and noise at every "
            "step, summed in another order"
        )
    return notes


# ---- the log ---------------------------------------------------------------------------------------


def describe(run: Run, state: TrainState) -> list[str]:
    """Returns the first lines of the log: a warning if disk space is short, the run, its data, its recipe."""
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
    weights = state.trained_weights(state.model).values()
    needed = 4 * sum(value.nbytes for value in weights)  # weights, EMA and two moments
    warning = ckpt.space_warning(run.folder.checkpoints, needed)
    lines += compare_with_recipe(config, run.global_batch_size, needed)
    return [*([f"warning: {warning}"] if warning else []), *lines]


def compare_with_recipe(config: Config, global_batch_size: int, checkpoint_bytes: int) -> list[str]:
    """Returns a line for each difference to the official recipe that is easily overlooked: global batch, checkpoints.

    No lines for other data sets, which have no official recipe.
    """
    train, lines = config.train, list[str]()
    recipe = OFFICIAL_BATCHES.get(config.data.num_images)
    if config.data.name not in OFFICIAL_SETS or recipe is None:
        return lines
    if global_batch_size < recipe:
        steps = -(-recipe * train.grad_accum_steps // global_batch_size)
        rate = OptimConfig.learning_rate * global_batch_size / recipe  # its default is the recipe's
        lines.append(
            f"warning: global batch {global_batch_size}, the official recipe's is {recipe}: keep that with "
            f"train.grad_accum_steps={steps}, or lower the learning rate in proportion, optim.learning_rate={rate:.3g}"
        )
    if train.keep_last and train.keep_every != train.checkpoint_every:
        lines.append(
            f"checkpoints: of those every {train.checkpoint_every} steps ({checkpoint_bytes / 1e9:.1f} GB each) the "
            f"{train.keep_last} newest are kept; the official code kept all: train.keep_last=0"
        )
    return lines
