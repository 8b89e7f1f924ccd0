"""The training loop: resume, step, log, checkpoint. Progress is optimiser steps and samples seen.

In every step the ranks agree (one collective) on whether the gradient is finite, whether a signal asks to stop, and
whether a checkpoint failed to be written; so they always take the same branch. The device acts on the first by itself.
The host reads all of it when the next step is queued (`train.run_ahead`), so that no step waits for the device.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasets import build_dataset
from diffusion import build_timestep_sampler
from models import attention
from models.compiling import compile_blocks
from models.lora import lora_weights

from . import checkpoint as ckpt
from . import resume, start
from .adapters import load_base
from .build import build_codec, build_model, build_process, put_adapters
from .callbacks import Callback, Callbacks
from .captions import build_captions, condition_of, set_temporal_position_scale
from .config import Config
from .distributed import (
    World,
    broadcast_object,
    data_parallel,
    gather_objects,
    local,
    mean_over_ranks,
    on_main,
    replicated,
    set_timeout,
    shard,
    shard_like,
    whole,
)
from .ema import EMA
from .errors import CheckpointNotWritten, TrainingAborted
from .garbage import CollectOnRequest
from .guard import StepGuard, check_replicas
from .logging import Logger, NullLogger, RunLogger
from .meter import Meter, peak_memory_gib
from .objective import Objective, StepLoss
from .optim import build_optimizer, clip_gradients, gradient_norm, learning_rate_at, step_unless
from .pending import Findings, Pending
from .run_folder import COMPLETED, PREEMPTED, RunFolder
from .signals import StopSignals
from .stream import ClipStream, PositionBatches, load_micro_batches
from .validation import Validation
from .watch import Breadcrumbs, HangWatch

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
        override: keys whose change since the checkpoint is accepted (`optim.learning_rate`, `data_digest`, ...).
        allow_inexact_resume: go on without the generator states that a checkpoint should hold.
        callbacks: look at the training now and then, beside the validation that the config may ask for.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        *,
        override: Iterable[str] = (),
        allow_inexact_resume: bool = False,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        train = config.train
        self.config = config
        self.world = world
        self.override = frozenset(override)
        self.allow_inexact_resume = allow_inexact_resume
        self.folder = RunFolder(Path(train.output_dir))
        self.checkpoints = self.folder.checkpoints
        self.writer = ckpt.CheckpointWriter(self.checkpoints, config)
        self.global_batch_size = train.batch_size * train.grad_accum_steps * world.size
        self.step = 0
        self.samples_seen = 0
        self.pending: Pending | None = None
        self.guard = StepGuard(config.optim)
        self.signals = StopSignals()
        self.log: Logger = NullLogger()
        self.crumbs = Breadcrumbs(self.folder.path, world.rank)
        self.batch_files: list[str] = []
        self.meter = Meter()
        self.garbage = CollectOnRequest()
        self._under_way = False
        self.watch = HangWatch(self.folder.path / "errors" / f"rank{world.rank}.stacks.txt", train.hang_timeout_s)
        if train.precision == "tf32":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

        attention.choose(train.attention)

        dtype, autocast_dtype = DTYPES[train.precision]
        self.clips = build_dataset(config.data, seed=train.seed)
        start.check_labels(config, self.clips)
        start.check_number(config, self.clips, world.size)
        validation = [Validation(config, self.clips)] if config.monitor.val_every else []
        self.callbacks = Callbacks([*validation, *callbacks])
        held_out = validation[0].clips if validation else None
        captions = build_captions(config, self.clips, held_out, world.device)
        torch.manual_seed(train.seed)  # initial weights: the same on every rank
        self.model = build_model(config)
        self.lora_base: dict[str, str] = {}
        if config.lora.rank:
            self.lora_base = {"lora_base": load_base(self.model, config)}
        self.model.to(world.device, dtype)
        if config.lora.rank:
            put_adapters(self.model, config)
        self.ema = EMA(self.model, train.ema_decay, train.ema_warmup)
        if self.sharded:
            shard(self.model, world, autocast_dtype)
            shard(self.ema.model, world)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.timestep_sampler = build_timestep_sampler(config.diffusion)
        self.objective = Objective(
            build_codec(config, self.clips, world.device),
            build_process(config).to(world.device),
            self.timestep_sampler,
            **condition_of(config, captions),
            num_images=config.data.num_images,
            condition=config.condition,
            tubelet_size=config.model.frames_per_token,
            seed=train.seed,
            device=world.device,
            dtype=dtype,
            autocast_dtype=autocast_dtype,
        )
        self.parallel_model: nn.Module = self.model

    @property
    def sharded(self) -> bool:
        """Whether weights, moments and average are spread over the ranks."""
        return self.config.train.parallel == "fsdp" and self.world.size > 1

    @property
    def replicas(self) -> bool:
        """Whether several ranks hold a copy of the network each."""
        return self.world.size > 1 and not self.sharded

    # ---- the run -------------------------------------------------------------------------------

    def fit(self, loop: Callable[[Trainer], int] | None = None) -> bool:
        """Train from the newest checkpoint, or from the start; returns whether `train.max_steps` was reached.

        False: a signal stopped the run, with everything saved.

        Args:
            loop: what calls `advance` with `batches`, in place of `Trainer.loop`.
        """
        on_main(self.folder.open)
        try:
            with self.signals:
                reached = self._fit(loop or Trainer.loop)
        except Exception as error:
            self.folder.report_failure(self.world.rank, self.step, error, files=self.batch_files)
            raise
        finally:
            self.writer.wait()
            if self.writer.failure:  # another error came first
                self.log.say(f"warning: {self.writer.failure}")
            self.crumbs.clear()
            self.folder.close()
        return reached

    def _fit(self, loop: Callable[[Trainer], int]) -> bool:
        train = self.config.train
        start.check_ranks_agree(self.config, self.clips)
        notes = self.restore()
        set_temporal_position_scale(self.config, self.step, self.model, self.ema.model)
        if self.world.is_main:
            self.log = RunLogger(self.folder.path, start=self.step, total=train.max_steps)
            (self.folder.path / "config.yaml").write_text(self.config.to_yaml())
            self.folder.event("start", self.step, world_size=self.world.size)
            notes += filter(None, [start.space_note(self)])
        for note in [*notes, start.headline(self), start.data_line(self.clips)]:
            self.log.say(note)
        self.prepare()
        self.meter.clear()
        self.watch.tick()
        stopped = self.callbacks.at_start(self)
        if not stopped:
            with self.garbage:
                stopped = loop(self)
        self.watch.stop()
        if stopped:
            self._stop_early(stopped)
        self.log.close()
        self.writer.wait()
        self._raise_failed_write(broadcast_object(self.writer.failure))
        if self.world.is_main and not stopped:
            self.folder.mark(COMPLETED, self.step, **self._last_hashes())
        return not stopped

    def prepare(self) -> None:
        """Make the network ready for `train_step`: compiled, and with its gradients exchanged."""
        if self.config.train.compile:
            compile_blocks(self.model.blocks)
        self.parallel_model = self.model if self.sharded else data_parallel(self.model, self.world)

    def loop(self) -> int:
        """Steps until `train.max_steps`; returns the signal that stopped it earlier, or 0."""
        batches = self.batches()
        while self.step < self.config.train.max_steps:
            with self.meter.waiting():
                micro_batches = next(batches)
            stop = self.advance(micro_batches)
            if stop:
                return stop
        return 0

    def advance(self, micro_batches: list[dict[str, Tensor]]) -> int:
        """One step with all that it is due: log, replica check, checkpoint, callbacks; the signal to stop, or 0."""
        before = self.step
        _, stop = self.train_step(micro_batches)
        set_temporal_position_scale(self.config, self.step, self.model, self.ema.model)
        if not self._under_way:  # from here on no rank has to compile or connect
            stop = self.settle() or stop
            set_timeout(self.config.train.timeout_s)
            self._under_way = True
        if self.step > before:
            self.log.advance(self.step)
            self._at_step()
            stop = stop or self.callbacks.at_step(self)  # when stopped, they come first in the next session
        self.watch.tick()
        return stop

    def _due(self, step: int) -> bool:
        """Whether there is something to do at `step`, for which everything of it must be known."""
        train = self.config.train
        if self.config.model.is_text and step <= train.temporal_ramp_steps:  # the next forward depends on `step`
            return True
        every = [train.log_every, train.checkpoint_every, *(callback.every for callback in self.callbacks.all)]
        every += [train.drift_check_every] if self.replicas else []
        return step == train.max_steps or any(number and step % number == 0 for number in every)

    def _at_step(self) -> None:
        """What a new step is due: a row of the log, a comparison of the replicas, a checkpoint."""
        train = self.config.train
        last = self.step == train.max_steps
        if self.step % train.log_every == 0 or last:
            self.log_metrics(self.meter)
            self.garbage.collect()
            self.meter.clear()
        if self.replicas and train.drift_check_every and self.step % train.drift_check_every == 0:
            check_replicas(self.model.state_dict(), self.step)
        if self.step % train.checkpoint_every == 0 or last:
            self.save()

    # ---- one step ------------------------------------------------------------------------------

    def train_step(self, micro_batches: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], int]:
        """One optimiser step over `grad_accum_steps` micro-batches, applied unless the guard refuses it.

        With `train.run_ahead` it may be counted (`settle`) in the next call only.

        Returns:
            device scalars to log, and the signal that asks to stop (0: none).
        """
        self.batch_files = self._files_of(micro_batches)
        parts, losses = self._backward(micro_batches)
        stop = self.settle()  # the step before; the device has this one to work on meanwhile
        self.pending = self._update(parts, losses)
        if stop or not self.config.train.run_ahead or self._due(self.step + 1):
            stop = self.settle() or stop
        return parts, stop

    def _backward(self, micro_batches: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], list[StepLoss]]:
        """The gradient of the mean loss; scalars to log and the losses of each micro-batch, detached."""
        self.optimizer.zero_grad(set_to_none=True)
        count = len(micro_batches)
        parts: dict[str, Tensor] = {}
        losses = []
        for index, batch in enumerate(micro_batches):
            with self.gradient_sync(index + 1 == count):
                result = self.objective(self.parallel_model, batch)
                (result.loss / count).backward()
            losses.append(replace(result, loss=result.loss.detach()))
            for name, value in result.parts.items():
                parts[name] = parts.get(name, 0.0) + value / count
        parts["grad_norm"] = replicated(gradient_norm(self.model.parameters())).detach()
        replaced = torch.cat([batch["replaced"] for batch in micro_batches]).float().mean()
        parts["replaced_share"] = torch.full_like(parts["loss"], float(replaced))
        return parts, losses

    def _update(self, parts: dict[str, Tensor], losses: list[StepLoss]) -> Pending:
        """Apply the gradient unless the device finds that it must not be; the host need not know."""
        norm = parts["grad_norm"]
        findings = Findings.gather(parts["loss"], norm, self.signals.received, self.writer.failure is not None)
        bounds = self.guard.bounds(self.step)
        skip, limit = bounds.judge(findings.bad > 0, findings.norm)
        if bounds.clipping:
            gradients = [local(p.grad) for p in self.model.parameters() if p.grad is not None]
            clip_gradients(gradients, norm, limit)
        learning_rate = learning_rate_at(self.step, self.config.optim, self.config.train.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        step_unless(skip, self.optimizer)
        for loss in losses:
            self.timestep_sampler.update(loss.timesteps, loss.per_clip, skip)
        return Pending(findings, skip, bounds, losses, parts, self.batch_files)

    def settle(self) -> int:
        """Count the step in flight, if there is one; the signal that asks to stop, or 0. Collective where it failed."""
        if self.pending is None:
            return 0
        pending, self.pending = self.pending, None
        outcome = pending.outcome()
        self._raise_failed_write(broadcast_object(self.writer.failure) if outcome.failed else None)
        refused = self.guard.record(pending.bounds, outcome.skipped, outcome.finite, outcome.norm)
        self.samples_seen += self.global_batch_size
        if refused:
            self._report_skip(refused, pending)
            self.guard.check_streak()
        else:
            self.ema.update(self.model)  # no later step has changed it yet
            self.meter.add(pending.parts)
            self.step += 1
        return outcome.signal

    def _report_skip(self, reason: str, pending: Pending) -> None:
        """Say which files and timesteps a step was skipped over; collective."""
        timesteps = torch.cat([loss.timesteps for loss in pending.losses]).tolist()
        losses = [float(loss.loss) for loss in pending.losses]
        facts = gather_objects({"files": pending.files, "timesteps": timesteps, "losses": losses})
        self.log.say(f"step {self.step} skipped ({self.guard.skipped} so far): {reason}")
        if self.world.is_main:
            text = [str(loss) for rank in facts for loss in rank["losses"]]  # JSON has no NaN
            merged = {key: [value for rank in facts for value in rank[key]] for key in ("files", "timesteps")}
            self.folder.event("skip", self.step, reason=reason, samples_seen=self.samples_seen, losses=text, **merged)

    def gradient_sync(self, last: bool) -> contextlib.AbstractContextManager:
        """Ranks exchange gradients in the last micro-step only."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        if last or self.world.size == 1 or self.sharded:
            return contextlib.nullcontext()
        return self.parallel_model.no_sync()  # type: ignore[operator]

    # ---- the end, and the data -----------------------------------------------------------------

    def _stop_early(self, signal_number: int) -> None:
        """Save everything and leave the marker that asks to be started again."""
        if self.step and self.step % self.config.train.checkpoint_every and self.step < self.config.train.max_steps:
            self.save()
        self.writer.wait()
        self._raise_failed_write(broadcast_object(self.writer.failure))
        self.log.say(f"stopped by signal {signal_number} at step {self.step}, saved; run the same command to go on")
        if self.world.is_main:
            self.folder.event("preempted", self.step, signal=signal_number)
            self.folder.mark(PREEMPTED, self.step, signal=signal_number)

    def batches(self) -> Iterator[list[dict[str, Tensor]]]:
        """The micro-batches of each optimiser step to come, without end."""
        train = self.config.train
        positions = PositionBatches(
            self.samples_seen, batch_size=train.batch_size, rank=self.world.rank, world_size=self.world.size
        )
        if self.config.data.num_workers:
            self.crumbs.clear()
            self.clips.on_open = self.crumbs
        stream = load_micro_batches(
            ClipStream(self.clips, train.seed),
            positions,
            self.config.data.num_workers,
            pin_memory=self.world.device.type == "cuda",
            timeout_s=self.config.data.worker_timeout_s,
        )
        while True:
            try:
                yield [next(stream) for _ in range(train.grad_accum_steps)]
            except RuntimeError as error:
                explained = self.crumbs.explain(error)
                if explained is None:
                    raise
                raise TrainingAborted(explained) from error

    # ---- state ---------------------------------------------------------------------------------

    def state_dict(self) -> ckpt.Checkpoint:
        """Everything that a continuation needs, on the CPU, independent of the number of ranks. Collective."""
        self.settle()
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        moments = self.optimizer.state_dict()["state"]
        optim = {f"{key}/{names[i]}": value for i, state in moments.items() for key, value in state.items()}
        copy = self.config.train.async_checkpoint  # the training goes on in these very tensors
        return ckpt.Checkpoint(
            step=self.step,
            samples_seen=self.samples_seen,
            model=whole(self.trained(self.model), copy=copy),
            ema=whole(self.trained(self.ema.model), copy=copy),
            optim=whole(optim, copy=copy),  # with AdamW's step counts
            rng=self._rng_state(),
            state={
                "ema_updates": self.ema.updates,
                "guard": self.guard.state_dict(),
                "global_batch_size": self.global_batch_size,
                "world_size": self.world.size,
                "data_digest": self.clips.digest,
                "num_clips": len(self.clips),
                "class_names": self.clips.catalog.class_names,
                **self.lora_base,
            },
        )

    def trained(self, model: nn.Module) -> dict[str, Tensor]:
        """What a checkpoint holds of a network: all of it, or the adapters."""
        return lora_weights(model.state_dict()) if self.config.lora.rank else model.state_dict()

    def load_state_dict(self, saved: ckpt.Checkpoint) -> None:
        """Continue exactly where `saved` stood."""
        resume.load_trained(self.model, saved.model, "the checkpoint's model")
        resume.load_trained(self.ema.model, saved.ema, "the checkpoint's running average")
        self.ema.updates = saved.state["ema_updates"]
        state: dict[int, dict[str, Tensor]] = {}
        trained = [each for each in self.model.named_parameters() if each[1].requires_grad]
        for index, (name, parameter) in enumerate(trained if saved.step else ()):
            moments = {key: saved.optim[f"{key}/{name}"] for key in ("exp_avg", "exp_avg_sq")}
            state[index] = {key: shard_like(value, parameter) for key, value in moments.items()}
            state[index]["step"] = saved.optim[f"step/{name}"]
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        history = {key: value for key, value in saved.rng.items() if key.startswith("timestep_sampler/")}
        self.timestep_sampler.load_state_dict({key.partition("/")[2]: value for key, value in history.items()})
        if f"cpu/{self.world.rank}" in saved.rng:
            torch.set_rng_state(saved.rng[f"cpu/{self.world.rank}"])
        self.guard.load_state_dict(saved.state["guard"])
        self.step, self.samples_seen = saved.step, saved.samples_seen

    def save(self) -> None:
        """Rank 0 writes the checkpoint; all ranks learn of its outcome and take the same branch."""
        saved = self.state_dict()
        if self.world.is_main:
            self.writer.save(saved)
        if not self.config.train.async_checkpoint:  # else the next step boundary tells
            self._raise_failed_write(broadcast_object(self.writer.failure))

    def _raise_failed_write(self, failure: str | None) -> None:
        if failure:
            self.writer.failure = None
            raise CheckpointNotWritten(failure)

    def restore(self) -> list[str]:
        """Continue a checkpoint or take initial weights, as the config says; returns what to tell."""
        return resume.restore(self)

    # ---- numbers -------------------------------------------------------------------------------

    def log_metrics(self, meter: Meter) -> None:
        """One row: means over the steps since the last row and over ranks."""
        values, seconds, waiting = meter.means()
        means = mean_over_ranks(torch.stack(list(values.values()))).tolist()
        row: dict[str, Any] = {"samples_seen": self.samples_seen, **dict(zip(values, means, strict=True))}
        row |= {
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "videos_per_second": self.global_batch_size / seconds,
            "seconds_per_step": seconds,
            "data_wait_share": waiting,
            "memory_gib": peak_memory_gib(self.world.device),
            "skipped_steps": self.guard.skipped,
        }
        self.log.metrics(self.step, row)

    def _rng_state(self) -> dict[str, Tensor]:
        states = {f"cpu/{rank}": state for rank, state in enumerate(gather_objects(torch.get_rng_state()))}
        history = self.timestep_sampler.state_dict()
        return states | {f"timestep_sampler/{key}": value.cpu() for key, value in history.items()}

    def _files_of(self, micro_batches: list[dict[str, Tensor]]) -> list[str]:
        clips = self.clips.catalog.clips
        return [str(clips[index].path) for batch in micro_batches for index in batch["index"].tolist()]

    def _last_hashes(self) -> dict[str, Any]:
        """Name and file hashes of the newest checkpoint."""
        newest = ckpt.list_checkpoints(self.checkpoints)[-1:]
        if not newest:
            return {}
        files = json.loads((newest[0] / ckpt.MANIFEST).read_text())["files"]
        return {"checkpoint": newest[0].name, "sha256": {name: facts["sha256"] for name, facts in files.items()}}
