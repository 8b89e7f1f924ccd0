"""Where a run begins: at its newest checkpoint, or from initial weights.

Only the same experiment may continue a checkpoint, unless the command line says otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from models.convert import init_from_dit, is_image_checkpoint, load_weights
from models.latte import Latte
from models.latte_t2v import LatteT2V
from models.lora import lora_weights

from . import checkpoint as ckpt
from .config import Config, require
from .distributed import on_main, shard_like
from .text_start import start_text_network

if TYPE_CHECKING:
    from .trainer import Trainer

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
# what a checkpoint's state.json must hold, beside step and samples_seen
STATE_KEYS = ("ema_updates", "guard", "global_batch_size", "world_size", "data_digest", "num_clips", "class_names")


def restore(run: Trainer) -> list[str]:
    """Continue a checkpoint or take initial weights, as the config says; returns what to tell. Collective."""
    source = run.config.train.resume
    if source == "never":
        held = ckpt.list_checkpoints(run.checkpoints)
        require(
            not held,
            f"train.resume=never, but {run.checkpoints} holds {len(held)} checkpoint(s) of an earlier run: name "
            "another train.output_dir, or move them away.",
        )
        return initialise(run)
    folder, complaints = on_main(lambda: find_newest(run.checkpoints))
    if folder is None and source != "auto":  # where the run has nothing of its own yet
        folder = on_main(lambda: ckpt.find_checkpoint(Path(source)))
    if folder is None:
        require(not complaints, f"{' '.join(complaints)} No other checkpoint is left under {run.checkpoints}.")
        return initialise(run)
    return [f"warning: {text}" for text in complaints] + resume(run, folder)


def find_newest(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint under `root` that verifies, newer ones set aside; and what to tell of these."""
    ckpt.remove_unfinished(root)
    folder, complaints = ckpt.newest_verified(root)
    if folder is not None:
        ckpt.set_damaged_aside(folder)
        complaints = [f"{text} It is set aside." for text in complaints]
    return folder, complaints


def resume(run: Trainer, folder: Path) -> list[str]:
    """Continue the checkpoint in `folder`; returns what to tell."""
    saved = ckpt.load_checkpoint(folder)
    facts = {"global_batch_size": run.global_batch_size, "data_digest": run.clips.digest, **run.lora_base}
    changes = differences(folder, saved, run.config, facts, run.clips.class_names)
    notes = accepted(folder, changes, run.override)
    notes += generator_notes(folder, saved, run.world.size, run.allow_inexact_resume)
    try:
        run.load_state_dict(saved)
    except KeyError as error:
        raise ckpt.CheckpointError(f"checkpoint {folder} lacks {error}; it cannot be continued.") from None
    if run.world.is_main:
        run.folder.event("resume", run.step, checkpoint=folder.name, world_size=run.world.size)
    return [*notes, f"continuing {folder} at step {run.step}"]


def initialise(run: Trainer) -> list[str]:
    """Take `train.init_from`'s weights into the network and its average; returns what to tell."""
    source = run.config.train.init_from
    if source is None:
        return []
    if run.lora_base:
        return [f"adapters beside {source}, weights {run.lora_base['lora_base'][:12]}, which stay as they are"]
    if isinstance(run.model, LatteT2V):
        notes = start_text_network(run.model, source, run.config)
        run.ema.load_state_dict(run.model.state_dict())
        return notes
    weights = ckpt.load_model_weights(source)
    if Path(source).is_file() and is_image_checkpoint(weights):  # folders are ours; with rope they lack a table
        notes = str(init_from_dit(run.model, _sharded_as(run.model, weights))).splitlines()
    else:
        load_weights(run.model, _sharded_as(run.model, weights), source)
        notes = [f"initial weights: {source}"]
    run.ema.load_state_dict(run.model.state_dict())
    return notes


def load_trained(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """The whole weights of a checkpoint, or its adapters, into a network that may be in shards; strict."""
    own = model.state_dict()
    adapters = lora_weights(own)
    if adapters:  # what they are beside is there already
        weights = {key: own[key] for key in own.keys() - adapters.keys()} | weights
    load_weights(cast(Latte, model), _sharded_as(model, weights), source)


def _sharded_as(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` cut as the network's own are; what has another name or shape stays for the loader to refuse."""
    own = model.state_dict()
    return {
        name: shard_like(value, own[name]) if name in own and own[name].shape == value.shape else value
        for name, value in weights.items()
    }


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
