"""The training loop. Progress is counted in optimizer steps and samples seen.

One collective per step tells all ranks whether the gradient is finite, a signal asks to stop, or a checkpoint write
failed, so they always take the same branch. The device acts on the first fact itself. The host reads all three while it
queues the next step (`train.run_ahead`), so that no step waits for the device.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from datasets import build_dataset
from models import attention
from models.blocks import compile_blocks

from . import start
from .alignment import open_features
from .callbacks import Callback, Callbacks
from .checkpoint import Checkpoint
from .conditions import build_conditions
from .config import Config
from .distributed import World, average_gradients, local_shard, reduce_shards, require_same, set_timeout, sync_gradients
from .guard import InFlight, check_replicas, gather_findings
from .memory import check_training_fits
from .objective import Objective, StepLoss
from .optim import clip_gradients, gradient_norm, learning_rate_at, step_unless
from .run import MicroBatches, Run, collect_on_request
from .state import build_state
from .validation import Validation
from .weights import ramp_temporal_positions


class Trainer:
    """One process's part of training.

    Args:
        override: keys that may differ from the checkpoint (`optim.learning_rate`, `data_digest`, ...).
        allow_inexact_resume: resume even if the checkpoint lacks RNG states.
        callbacks: read-only; run after the config's validation, if there is any.
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
        if config.train.precision == "tf32":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        attention.choose(config.train.attention)
        check_training_fits(config, world.device, world.size)
        clips = build_dataset(config.data, seed=config.train.seed)
        start.check_clips(config, clips, world.size)
        clips.features = features = open_features(config, clips)
        validation = [Validation(config, clips)] if config.monitor.val_every else []
        held_out = validation[0].clips if validation else None
        conditions = build_conditions(config, clips, held_out, world.device)
        self.config = config
        self.world = world
        self.override = frozenset(override)
        self.allow_inexact_resume = allow_inexact_resume
        self.callbacks = Callbacks([*validation, *callbacks])
        self.run = Run(config, world, clips)
        self.state = state = build_state(config, world, features.shape[-1] if features else 0)
        projector: Any = getattr(state.extra, "projector", None)
        self.objective = Objective(config, clips, conditions, state.timestep_sampler, world.device, projector)
        self.parallel_model: nn.Module = state.model
        self.in_flight: InFlight | None = None
        self._is_under_way = False

    def fit(self, loop: Callable[[Trainer], int] | None = None) -> bool:
        """Trains from the newest checkpoint, or from the start; returns whether `train.max_steps` was reached.

        False: a signal stopped the run; everything is saved.

        Args:
            loop: replaces `Trainer.loop`; calls `train_step`, returns the stop signal or 0.
        """
        run, state = self.run, self.state
        with run.open(state):
            found = {"clips": len(run.clips), "list": run.clips.digest[:12]}
            remedy = f"every machine needs the same files under {self.config.data.path}"
            require_same(found, "has different clips", remedy)
            notes = start.restore(run, state, self.override, self.allow_inexact_resume)
            ramp_temporal_positions(self.config, state.step, state.model, state.ema.model)
            run.start_log(state.step, [*notes, *start.describe(run, state)])
            self.prepare()
            run.meter.clear()
            run.watch.tick()
            stop = self.callbacks.at_start(run, state, self.objective)
            if not stop:
                with collect_on_request():
                    stop = (loop or Trainer.loop)(self)
            run.finish(state, stop)
        return not stop

    def prepare(self) -> None:
        """Compiles the network if configured; wraps replicas in DDP."""
        if self.config.train.compile:
            compile_blocks(self.state.model.blocks)
        if self.run.has_replicas:
            device_ids = [self.world.device] if self.world.device.type == "cuda" else None
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.15 renames an argument
                self.parallel_model = nn.parallel.DistributedDataParallel(
                    self.state.model, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
                )

    def batches(self) -> Iterator[MicroBatches]:
        """Yields the micro-batches of each optimizer step until `train.max_steps`."""
        batches = self.run.batches(self.state.samples_seen)
        while self.state.step < self.config.train.max_steps:
            with self.run.meter.waiting():
                micro_batches = next(batches)
            yield micro_batches

    def loop(self) -> int:
        """Trains until `train.max_steps`; returns the signal that stopped it earlier, or 0."""
        for micro_batches in self.batches():
            if stop := self.train_step(micro_batches):
                return stop
        return 0

    # ---- one step ------------------------------------------------------------------------------

    def train_step(self, micro_batches: MicroBatches) -> int:
        """Runs one step, then any logging, drift check, checkpoint or callback that is due; returns the stop signal.

        The step is only queued on the device; with `train.run_ahead` the next call counts it.
        """
        run, state, train = self.run, self.state, self.config.train
        before = state.step
        _, stop = self.launch_step(micro_batches)
        if not self._is_under_way:  # start-up (compile, connect) is over
            stop = self.settle() or stop
            set_timeout(train.timeout_s)
            self._is_under_way = True
        if state.step > before:
            run.log.advance(state.step)
            if state.step % train.log_every == 0 or state.step == train.max_steps:
                run.log_metrics(state)
            if run.has_replicas and train.drift_check_every and state.step % train.drift_check_every == 0:
                check_replicas(state.model.state_dict() | state.extra.state_dict(), state.step)
            if state.step % train.checkpoint_every == 0 or state.step == train.max_steps:
                run.save(state)
            # callbacks skipped by a stop signal run at the next start
            stop = stop or self.callbacks.at_step(run, state, self.objective)
        run.watch.tick()
        return stop

    def launch_step(self, micro_batches: MicroBatches) -> tuple[dict[str, Tensor], int]:
        """Queues one optimizer step; counts the previous one.

        Returns device scalars of the step (loss, grad_norm, ...), and the stop signal, or 0.
        """
        self.run.batch_files = self.run.files_of(micro_batches)
        parts, losses = self._backward(micro_batches)
        stop = self.settle()  # meanwhile the device works on this step
        self.in_flight = self._update(parts, losses)
        if stop or not self.config.train.run_ahead or self._is_due(self.state.step + 1):
            stop = self.settle() or stop
        return parts, stop

    def settle(self) -> int:
        """Reads the results of any step in flight and counts it; returns the stop signal, or 0. Collective."""
        if self.in_flight is None:
            return 0
        step, self.in_flight = self.in_flight, None
        run, state = self.run, self.state
        skipped, bad, norm, signal, write_failed = step.outcome()
        if write_failed:
            run.raise_failed_write()
        refused = state.guard.record(step.bounds, skipped, not bad, norm)
        state.samples_seen += run.global_batch_size
        if refused:
            run.report_skip(state, refused, step)
            state.guard.check_streak()
        else:
            state.ema.update(state.model)  # not yet changed by a later step
            run.meter.add(step.parts)
            state.step += 1
            ramp_temporal_positions(self.config, state.step, state.model, state.ema.model)
        return signal

    def _backward(self, micro_batches: MicroBatches) -> tuple[dict[str, Tensor], list[StepLoss]]:
        """Queues the mean loss's backward pass; returns scalars to log and each micro-batch's detached loss."""
        self.state.optimizer.zero_grad(set_to_none=True)
        count = len(micro_batches)
        parts: dict[str, Tensor] = {}
        losses = []
        for index, batch in enumerate(micro_batches):
            with sync_gradients(self.parallel_model, last=index + 1 == count):
                result = self.objective(self.parallel_model, batch, self.state.step)
                (result.loss / count).backward()
            losses.append(replace(result, loss=result.loss.detach()))
            for name, value in result.parts.items():
                parts[name] = parts.get(name, 0.0) + value / count
        average_gradients(self.state.extra.parameters())
        parameters = [parameter for _, parameter in self.state.named_parameters()]
        parts["grad_norm"] = reduce_shards(gradient_norm(parameters)).detach()
        replaced = torch.cat([batch["replaced"] for batch in micro_batches]).float().mean()
        parts["replaced_share"] = torch.full_like(parts["loss"], float(replaced))
        return parts, losses

    def _update(self, parts: dict[str, Tensor], losses: list[StepLoss]) -> InFlight:
        """Queues the optimizer step, which the device skips if the guard rejects the gradient."""
        run, state, norm = self.run, self.state, parts["grad_norm"]
        findings = gather_findings(parts["loss"], norm, run.signals.received, run.writer.failure is not None)
        bounds = state.guard.bounds(state.step)
        bad, total, _, _ = findings.unbind()
        skip, limit = bounds.judge(bad > 0, total)
        if bounds.limit < math.inf or (bounds.clip_spikes and bounds.spike < math.inf):
            gradients = [local_shard(p.grad) for _, p in state.named_parameters() if p.grad is not None]
            clip_gradients(gradients, norm, limit)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate_at(state.step, self.config.optim, self.config.train.max_steps)
        step_unless(skip, state.optimizer)
        for loss in losses:
            state.timestep_sampler.update(loss.timesteps, loss.per_clip, skip)
        return InFlight(skip, findings, bounds, losses, parts, run.batch_files)

    def _is_due(self, step: int) -> bool:
        """Returns whether something is due at `step` that needs it counted first."""
        train = self.config.train
        if self.config.model.is_text and step <= train.temporal_ramp_steps:  # the next forward depends on `step`
            return True
        if step == self.config.objective.features_until:  # likewise
            return True
        every = [train.log_every, train.checkpoint_every, *(callback.every for callback in self.callbacks.all)]
        every += [train.drift_check_every] if self.run.has_replicas else []
        return step == train.max_steps or any(number and step % number == 0 for number in every)

    def state_dict(self) -> Checkpoint:
        """Returns the current checkpoint, including any step in flight. Collective."""
        self.settle()
        return self.state.state_dict(self.run.facts, copy=self.config.train.async_checkpoint)
