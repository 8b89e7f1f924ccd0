"""Whether a run may continue a checkpoint: only the same experiment may, unless the command line says otherwise."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import checkpoint as ckpt
from .config import Config, require

# what may change between a checkpoint and its continuation; everything else is the experiment itself
FREE_ON_RESUME = (
    "sample.",
    "monitor.",
    "codec.path",
    "codec.chunk_size",
    "data.path",
    "data.val_path",
    "data.latents",
    "data.num_workers",
    "data.worker_timeout_s",
    "data.reader",
    "data.strict",
    "model.gradient_checkpointing",
    "train.output_dir",
    "train.max_steps",
    "train.batch_size",  # with grad_accum_steps and the world size: their product is checked
    "train.grad_accum_steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_last",
    "train.keep_every",
    "train.async_checkpoint",
    "train.parallel",
    "train.drift_check_every",
    "train.timeout_s",
    "train.hang_timeout_s",
    "train.resume",
    "train.init_from",
    "train.compile",
    "train.attention",
    "optim.max_skips",
)
# what a checkpoint's state.json must hold, beside step and samples_seen
STATE_KEYS = ("ema_updates", "guard", "global_batch_size", "world_size", "data_digest", "num_clips", "class_names")


def differences(
    folder: Path, saved: ckpt.Checkpoint, config: Config, facts: Mapping[str, Any], class_names: Sequence[str]
) -> list[str]:
    """Lines `key: old -> new` for all in which the run of checkpoint `folder` was another experiment.

    Args:
        facts: what the run now has of the state's `global_batch_size`, `data_digest` and, with adapters, `lora_base`.
        class_names: of the data now, in the order of their labels.
    """
    lacking = [key for key in STATE_KEYS if key not in saved.state]
    require(not lacking, f"{folder / 'state.json'} lacks {', '.join(lacking)}; it cannot be continued.")
    before = ckpt.load_checkpoint_config(folder)
    changes = ckpt.config_changes(before, config, FREE_ON_RESUME) if before else []
    changes += [f"{key}: {saved.state.get(key)} -> {now}" for key, now in facts.items() if saved.state.get(key) != now]
    gone, new = set(saved.state["class_names"]) - set(class_names), set(class_names) - set(saved.state["class_names"])
    if gone or new:  # another folder would move the labels of those after it
        changes.append(f"class_names: {sorted(gone)} -> {sorted(new)}")
    return changes


def accepted(folder: Path, differences: Sequence[str], override: Collection[str]) -> list[str]:
    """What to tell of `differences`, if `override` names the key of each; ValueError with the others otherwise."""
    refused = [change for change in differences if change.partition(":")[0] not in override]
    require(
        not refused,
        f"cannot continue {folder}, this is another experiment: {'; '.join(refused)}. Restore these, name them "
        "with --override, or start anew with another train.output_dir (train.init_from takes weights only).",
    )
    return [f"warning: accepted by --override: {change}" for change in differences]


def generator_notes(folder: Path, saved: ckpt.Checkpoint, world_size: int, allow_inexact: bool) -> list[str]:
    """What to tell where the ranks are others, or generator states are missing and that is allowed."""
    before = saved.state["world_size"]
    missing = [f"cpu/{rank}" for rank in range(before) if f"cpu/{rank}" not in saved.rng]
    require(
        not missing or allow_inexact,
        f"{folder / 'rng.safetensors'} lacks {', '.join(missing)}: the run would not continue exactly. Use an "
        "older checkpoint, or accept that with --allow-inexact-resume.",
    )
    notes = []
    if missing:
        notes.append(f"warning: generator states are missing ({', '.join(missing)}): this resume is not exact")
    if before != world_size:
        notes.append(
            f"warning: saved by {before} process(es), continued on {world_size}: the same samples and noise at every "
            "step, added up in another order"
        )
    return notes
