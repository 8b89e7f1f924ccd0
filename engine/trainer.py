"""The training loop: resume, step, log, checkpoint. Progress is optimiser steps and samples seen."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets import build_dataset
from diffusion import build_timestep_sampler
from models.autoencoder import LatentCodec
from models.convert import init_from_dit, is_image_checkpoint, load_weights

from . import checkpoint as ckpt
from .build import build_model, build_process, count_parameters
from .config import Config, require
from .distributed import World, broadcast_object, data_parallel, gather_objects, mean_over_ranks
from .ema import EMA
from .logging import Logger, NullLogger, RunLogger
from .objective import Objective
from .optim import build_optimizer, clip_gradients, learning_rate_at
from .stream import ClipStream, PositionBatches, build_loader

# what may change between a checkpoint and its continuation; everything else is the experiment itself
FREE_ON_RESUME = (
    "sample.",
    "codec.path",
    "codec.chunk_size",
    "data.path",
    "data.num_workers",
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
    "train.resume",
    "train.init_from",
    "train.compile",
)
# train.precision -> (dtype of weights, latents and loss; dtype the network computes in under autocast)
DTYPES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "fp32": (torch.float32, None),
    "tf32": (torch.float32, None),
    "bf16": (torch.float32, torch.bfloat16),
    "fp64": (torch.float64, None),
}


class Trainer:
    """One process's part of a training run.

    Args:
        config: the whole configuration.
        world: this process's rank, world size and device.
    """

    def __init__(self, config: Config, world: World) -> None:
        train = config.train
        self.config = config
        self.world = world
        self.folder = Path(train.output_dir)
        self.global_batch_size = train.batch_size * train.grad_accum_steps * world.size
        self.step = 0
        self.samples_seen = 0
        self.log: Logger = NullLogger()
        if train.precision == "tf32":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

        dtype, autocast_dtype = DTYPES[train.precision]
        self.clips = build_dataset(config.data, seed=train.seed)
        self._check_labels()
        torch.manual_seed(train.seed)  # initial weights: the same on every rank
        self.model = build_model(config).to(world.device, dtype)
        self.ema = EMA(self.model, train.ema_decay, train.ema_warmup)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.timestep_sampler = build_timestep_sampler(config.diffusion)
        self.objective = Objective(
            LatentCodec.from_config(config.codec, device=world.device),
            build_process(config).to(world.device),
            self.timestep_sampler,
            conditional=config.model.num_classes > 0,
            null_label=self.model.null_label,
            label_dropout=config.model.label_dropout,
            num_images=config.data.num_images,
            seed=train.seed,
            device=world.device,
            dtype=dtype,
            autocast_dtype=autocast_dtype,
        )

    # ---- the run -------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train from the newest checkpoint, or from the start, to `train.max_steps`."""
        notes = self.restore()
        if self.world.is_main:
            self.log = RunLogger(self.folder, start=self.step, total=self.config.train.max_steps)
            (self.folder / "config.yaml").write_text(self.config.to_yaml())
        for note in [*notes, self.headline(), self.data_line()]:
            self.log.say(note)
        if self.config.train.compile:
            for block in self.model.blocks:
                block.compile()
        self.parallel_model = data_parallel(self.model, self.world)
        meter = Meter()
        for micro_batches in self.batches():
            meter.add(self.train_step(micro_batches))
            self.log.advance(self.step)
            if self.step % self.config.train.log_every == 0 or self.step == self.config.train.max_steps:
                self.log_metrics(meter)
                meter = Meter()
            if self.step % self.config.train.checkpoint_every == 0 or self.step == self.config.train.max_steps:
                self.save()
        self.log.close()

    def train_step(self, micro_batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """One optimiser step over `grad_accum_steps` micro-batches; returns device scalars to log."""
        train, optim = self.config.train, self.config.optim
        learning_rate = learning_rate_at(self.step, optim, train.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        parts: dict[str, Tensor] = {}
        for index, batch in enumerate(micro_batches):
            with self.gradient_sync(index + 1 == len(micro_batches)):
                result = self.objective(self.parallel_model, batch)
                (result.loss / len(micro_batches)).backward()
            for name, value in result.parts.items():
                parts[name] = parts.get(name, 0.0) + value / len(micro_batches)
        parts["grad_norm"] = clip_gradients(self.model.parameters(), self.step, optim).detach()
        self.optimizer.step()
        self.ema.update(self.model)
        self.step += 1
        self.samples_seen += self.global_batch_size
        return parts

    def batches(self) -> Iterator[list[dict[str, Tensor]]]:
        """The micro-batches of each remaining optimiser step."""
        train = self.config.train
        positions = PositionBatches(
            self.samples_seen,
            train.max_steps - self.step,
            batch_size=train.batch_size,
            grad_accum_steps=train.grad_accum_steps,
            rank=self.world.rank,
            world_size=self.world.size,
        )
        loader = build_loader(
            ClipStream(self.clips, train.seed),
            positions,
            self.config.data.num_workers,
            pin_memory=self.world.device.type == "cuda",
        )
        micro_batches = []
        for batch in loader:
            micro_batches.append(batch)
            if len(micro_batches) == train.grad_accum_steps:
                yield micro_batches
                micro_batches = []

    def gradient_sync(self, last: bool) -> contextlib.AbstractContextManager:
        """Ranks exchange gradients in the last micro-step only."""
        if last or self.world.size == 1:
            return contextlib.nullcontext()
        return self.parallel_model.no_sync()  # type: ignore[operator]

    # ---- state ---------------------------------------------------------------------------------

    def state_dict(self) -> ckpt.Checkpoint:
        """Everything that a continuation needs, on the CPU."""
        names = [name for name, _ in self.model.named_parameters()]
        moments = self.optimizer.state_dict()["state"]
        optim = {f"{key}/{names[i]}": value for i, state in moments.items() for key, value in state.items()}
        return ckpt.Checkpoint(
            step=self.step,
            samples_seen=self.samples_seen,
            model=_to_cpu(self.model.state_dict()),
            ema=_to_cpu(self.ema.state_dict()),
            optim=_to_cpu(optim),
            rng=self._rng_state(),
            state={
                "ema_updates": self.ema.updates,
                "global_batch_size": self.global_batch_size,
                "world_size": self.world.size,
                "data_digest": self.clips.catalog.digest,
                "num_clips": len(self.clips),
                "class_names": self.clips.catalog.class_names,
            },
        )

    def load_state_dict(self, saved: ckpt.Checkpoint) -> None:
        """Continue exactly where `saved` stood."""
        load_weights(self.model, saved.model, "the checkpoint's model")
        self.ema.load_state_dict(saved.ema, saved.state["ema_updates"])
        state: dict[int, dict[str, Tensor]] = {}
        for index, (name, _) in enumerate(self.model.named_parameters()):
            keys = ("step", "exp_avg", "exp_avg_sq")
            state[index] = {key: saved.optim[f"{key}/{name}"] for key in keys}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        history = {key: value for key, value in saved.rng.items() if key.startswith("timestep_sampler/")}
        self.timestep_sampler.load_state_dict({key.partition("/")[2]: value for key, value in history.items()})
        if f"cpu/{self.world.rank}" in saved.rng:
            torch.set_rng_state(saved.rng[f"cpu/{self.world.rank}"])
        self.step, self.samples_seen = saved.step, saved.samples_seen

    def save(self) -> None:
        """Rank 0 writes the checkpoint; all ranks learn of its outcome and take the same branch."""
        saved = self.state_dict()  # collective: gathers the ranks' generators
        failure = None
        if self.world.is_main:
            try:
                ckpt.save_checkpoint(saved, self.config, self.folder / "checkpoints", self.config.train.keep_last)
            except Exception as error:  # safetensors and torch raise their own kinds on a full disk
                failure = f"checkpoint of step {self.step} in {self.folder} could not be written: {error}"
        failure = broadcast_object(failure)
        if failure:
            raise OSError(failure)

    def restore(self) -> list[str]:
        """Continue a checkpoint or take initial weights, as the config says; returns what to tell."""
        resume = self.config.train.resume
        if resume == "never":
            return self.initialise()
        if resume != "auto":
            return self._resume(ckpt.find_checkpoint(Path(resume)))
        root = self.folder / "checkpoints"
        found = ckpt.newest_verified(root) if self.world.is_main else (None, [])
        folder, complaints = broadcast_object(found)
        if folder is None:
            require(not complaints, f"{' '.join(complaints)} No other checkpoint is left under {root}.")
            return self.initialise()
        return [f"warning: {text}" for text in complaints] + self._resume(folder)

    def _resume(self, folder: Path) -> list[str]:
        saved = ckpt.load_checkpoint(folder)
        before = ckpt.load_checkpoint_config(folder)
        changes = ckpt.config_changes(before, self.config, FREE_ON_RESUME) if before else []
        for key, now in (("global_batch_size", self.global_batch_size), ("data_digest", self.clips.catalog.digest)):
            if saved.state[key] != now:
                changes.append(f"{key}: {saved.state[key]} -> {now}")
        require(
            not changes,
            f"cannot continue {folder}, this is another experiment: {'; '.join(changes)}. Restore these, or start "
            "anew with another train.output_dir (train.init_from takes weights only).",
        )
        self.load_state_dict(saved)
        return [f"continuing {folder} at step {self.step}"]

    def initialise(self) -> list[str]:
        """Take `train.init_from`'s weights into the network and its average."""
        source = self.config.train.init_from
        if source is None:
            return []
        weights = ckpt.load_model_weights(source)
        if Path(source).is_file() and is_image_checkpoint(weights):  # folders are ours; with rope they lack a table
            note = str(init_from_dit(self.model, weights))
        else:
            load_weights(self.model, weights, source)
            note = f"initial weights: {source}"
        self.ema = EMA(self.model, self.config.train.ema_decay, self.config.train.ema_warmup)
        return [note]

    # ---- words and numbers ---------------------------------------------------------------------

    def headline(self) -> str:
        """What this run is, in one line."""
        millions = count_parameters(self.model) / 1e6
        return (
            f"{self.config.model.name} {self.config.model.variant}, {millions:.2f} M parameters, "
            f"global batch {self.global_batch_size} on {self.world.size} process(es), "
            f"{self.world.device.type} {self.config.train.precision}, steps {self.step} to "
            f"{self.config.train.max_steps}, into {self.folder}"
        )

    def data_line(self) -> str:
        """What it is trained on, in one line."""
        facts = {key: value for key, value in self.clips.describe().items() if value}
        return "data: " + ", ".join(f"{key} {value}" for key, value in facts.items())

    def log_metrics(self, meter: Meter) -> None:
        """One row: means over the steps since the last row and over ranks."""
        values, seconds = meter.means()
        means = mean_over_ranks(torch.stack(list(values.values()))).tolist()
        row: dict[str, Any] = {"samples_seen": self.samples_seen, **dict(zip(values, means, strict=True))}
        row |= {
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "videos_per_second": self.global_batch_size / seconds,
            "seconds_per_step": seconds,
        }
        self.log.metrics(self.step, row)

    def _rng_state(self) -> dict[str, Tensor]:
        states = {f"cpu/{rank}": state for rank, state in enumerate(gather_objects(torch.get_rng_state()))}
        history = self.timestep_sampler.state_dict()
        return states | {f"timestep_sampler/{key}": value.cpu() for key, value in history.items()}

    def _check_labels(self) -> None:
        classes = self.config.model.num_classes
        if not classes:
            return
        worst = max(self.clips.catalog.clips, key=lambda clip: clip.label)
        require(
            worst.label < classes,
            f"{worst.path} has label {worst.label}, but model.num_classes={classes} allows 0 to {classes - 1}; "
            f"the data has {self.clips.num_classes} classes.",
        )


class Meter:
    """Means of device scalars over steps, without a synchronisation until they are asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._started = time.perf_counter()

    def add(self, values: dict[str, Tensor]) -> None:
        """Take one step's values."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1

    def means(self) -> tuple[dict[str, Tensor], float]:
        """Mean of each value, and seconds per step."""
        means = {name: total / self._steps for name, total in self._sums.items()}
        return means, (time.perf_counter() - self._started) / self._steps


def _to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in tensors.items()}
