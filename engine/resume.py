"""Starts a run from its newest checkpoint, or from initial weights.

Only the same experiment may continue a checkpoint, unless the command line says otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.checks import require
from common.storage import find_changes

from . import checkpoint as ckpt
from .config import Config
from .distributed import on_main
from .run import Run
from .state import TrainState
from .weights import initialise

# what may change between a checkpoint and its continuation; everything else is the experiment itself
FREE_ON_RESUME = (
    "sample.",
    "monitor.",
    "codec.path",
    "codec.chunk_size",
    "text.path",
    "text.features",
    "data.path",
    "data.val_path",
    "data.latents",
    "data.captions",
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
    "train.run_ahead",
    "optim.fused",
    "train.attention",
    "optim.max_skips",
)
# what a checkpoint's state.json must hold in addition to step and samples_seen
STATE_KEYS = ("ema_updates", "guard", "global_batch_size", "world_size", "data_digest", "num_clips", "class_names")


class Rules(NamedTuple):
    """Differences that a continuation accepts.

    Attributes:
        override: keys whose change since the checkpoint is accepted.
        allow_inexact: whether generator states may be missing.
    """

    override: frozenset[str] = frozenset()
    allow_inexact: bool = False


def restore(run: Run, state: TrainState, rules: Rules = Rules()) -> list[str]:  # noqa: B008
    """Continues a checkpoint or loads initial weights, as the config says; returns lines for the log. Collective."""
    config, root = run.config, run.folder.checkpoints
    source = config.train.resume
    if source == "never":
        held = ckpt.list_checkpoints(root)
        require(
            not held,
            f"train.resume=never, but {root} holds {len(held)} checkpoint(s) of an earlier run: name another "
            "train.output_dir, or move them away.",
        )
        return initialise(state.model, state.ema, config, state.lora_base)
    folder, complaints = on_main(lambda: find_newest(root))
    if folder is None and source != "auto":  # where the run has nothing of its own yet
        folder = on_main(lambda: ckpt.find_checkpoint(Path(source)))
    if folder is None:
        require(not complaints, f"{' '.join(complaints)} No other checkpoint is left under {root}.")
        return initialise(state.model, state.ema, config, state.lora_base)
    return [f"warning: {text}" for text in complaints] + resume(run, state, folder, rules)


def find_newest(root: Path) -> tuple[Path | None, list[str]]:
    """Returns the newest checkpoint that verifies, and a sentence for each newer one, which is set aside."""
    ckpt.remove_unfinished(root)
    folder, complaints = ckpt.newest_verified(root)
    if folder is not None:
        ckpt.set_damaged_aside(folder)
        complaints = [f"{text} It is set aside." for text in complaints]
    return folder, complaints


def resume(run: Run, state: TrainState, folder: Path, rules: Rules) -> list[str]:
    """Continues the checkpoint in `folder`; returns lines for the log."""
    saved = ckpt.load_checkpoint(folder)
    facts = {"global_batch_size": run.global_batch_size, "data_digest": run.clips.digest}
    facts |= {} if state.lora_base is None else {"lora_base": state.lora_base}
    changes = find_differences(folder, saved, run.config, facts, run.clips.class_names)
    notes = check_differences(folder, changes, rules.override)
    notes += check_generators(folder, saved, run.world.size, rules.allow_inexact)
    try:
        state.load_state_dict(saved, run.world.rank)
    except KeyError as error:
        raise ckpt.CheckpointError(f"checkpoint {folder} lacks {error}; it cannot be continued.") from None
    if run.world.is_main:
        run.folder.event("resume", state.step, checkpoint=folder.name, world_size=run.world.size)
    return [*notes, f"continuing {folder} at step {state.step}"]


def find_differences(
    folder: Path, saved: ckpt.Checkpoint, config: Config, facts: Mapping[str, Any], class_names: Sequence[str]
) -> list[str]:
    """Returns lines `key: old -> new` for every difference between checkpoint `folder` and this experiment.

    Args:
        facts: what the run now has of the state's `global_batch_size`, `data_digest` and, with adapters, `lora_base`.
        class_names: of the data now, in the order of their labels.
    """
    lacking = [key for key in STATE_KEYS if key not in saved.state]
    require(not lacking, f"{folder / 'state.json'} lacks {', '.join(lacking)}; it cannot be continued.")
    before = ckpt.load_checkpoint_config(folder)
    changes = config_changes(before, config, FREE_ON_RESUME) if before else []
    changes += [f"{key}: {saved.state.get(key)} -> {now}" for key, now in facts.items() if saved.state.get(key) != now]
    gone, new = set(saved.state["class_names"]) - set(class_names), set(class_names) - set(saved.state["class_names"])
    if gone or new:  # another folder would move the labels of those after it
        changes.append(f"class_names: {sorted(gone)} -> {sorted(new)}")
    return changes


def config_changes(old: Config, new: Config, free: Iterable[str]) -> list[str]:
    """Returns lines `key: old -> new` for every key that differs, except those with a prefix in `free`."""
    before, after = _flat(old.to_dict()), _flat(new.to_dict())
    allowed = tuple(free)
    return find_changes(before, after, [key for key in after if not key.startswith(allowed)])


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of a nested dict by their dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def check_differences(folder: Path, differences: Sequence[str], override: Collection[str]) -> list[str]:
    """Returns lines for the log. Raises: ValueError for differences whose key `override` does not name."""
    refused = [change for change in differences if change.partition(":")[0] not in override]
    require(
        not refused,
        f"cannot continue {folder}, this is another experiment: {'; '.join(refused)}. Restore these, name them "
        "with --override, or start a new run with another train.output_dir (train.init_from takes weights only).",
    )
    return [f"warning: accepted by --override: {change}" for change in differences]


def check_generators(folder: Path, saved: ckpt.Checkpoint, world_size: int, allow_inexact: bool) -> list[str]:
    """Returns lines for the log. Raises: ValueError where generator states are missing, unless `allow_inexact`."""
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
