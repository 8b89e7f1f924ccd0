"""A training run: processes, data, folder, log, signals, checkpoints. Passed to callbacks and resume."""

from __future__ import annotations

import contextlib
import gc
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from datasets import ClipDataset

from . import checkpoint as ckpt
from .config import Config
from .distributed import World, broadcast_object, gather_objects, on_main, reduce_over_ranks
from .errors import CheckpointNotWritten, TrainingAborted
from .guard import InFlight
from .run_folder import COMPLETED, PREEMPTED, HangWatch, Meter, NullLogger, RunFolder, RunLogger, peak_memory_gib
from .signals import StopSignals
from .state import TrainState
from .stream import Breadcrumbs, ClipStream, load_micro_batches, position_batches

MicroBatches = list[dict[str, Tensor]]


class Run:
    """One process's part of a run over the training data `clips`."""

    def __init__(self, config: Config, world: World, clips: ClipDataset) -> None:
        train = config.train
        self.config = config
        self.world = world
        self.clips = clips
        self.folder = RunFolder(Path(train.output_dir), world.is_main)
        self.writer = ckpt.CheckpointWriter(self.folder.checkpoints, config)
        self.signals = StopSignals()
        self.log = cast(RunLogger, NullLogger())  # until `start_log` on rank 0
        self.meter = Meter()
        self.crumbs = Breadcrumbs(self.folder.path, world.rank)
        self.watch = HangWatch(self.folder.path / "errors" / f"rank{world.rank}.stacks.txt", train.hang_timeout_s)
        self.is_sharded = train.parallel == "fsdp" and world.size > 1  # weights, moments and EMA, over the ranks
        self.has_replicas = world.size > 1 and not self.is_sharded  # each rank holds a copy of the network
        self.global_batch_size = train.batch_size * train.grad_accum_steps * world.size
        self.batch_files: list[str] = []  # clips of the last launched step, for failure reports

    @property
    def facts(self) -> dict[str, Any]:
        """Facts about the run and its data that a checkpoint records."""
        return {
            "global_batch_size": self.global_batch_size,
            "world_size": self.world.size,
            "data_digest": self.clips.digest,
            "num_clips": len(self.clips),
            "class_names": self.clips.catalog.class_names,
        }

    # ---- start and end -------------------------------------------------------------------------

    @contextlib.contextmanager
    def open(self, state: TrainState) -> Iterator[None]:
        """Locks the run folder and catches stop signals; writes this rank's error to the folder. Collective."""
        on_main(self.folder.open)
        try:
            with self.signals:
                yield
        except Exception as error:
            self.folder.report_failure(self.world.rank, state.step, error, files=self.batch_files)
            raise
        finally:
            self.writer.wait()
            if self.writer.failure:  # another error came first
                self.log.say(f"warning: {self.writer.failure}")
            self.crumbs.clear()
            self.folder.lock.release()

    def start_log(self, step: int, notes: list[str]) -> None:
        """Opens the log on rank 0, with `notes` as its first lines."""
        if not self.world.is_main:
            return
        self.log = RunLogger(self.folder.path, start=step, total=self.config.train.max_steps)
        (self.folder.path / "config.yaml").write_text(self.config.to_yaml())
        self.folder.event("start", step, world_size=self.world.size)
        for note in notes:
            self.log.say(note)

    def finish(self, state: TrainState, stop: int) -> None:
        """Saves after a stop signal, and writes the marker PREEMPTED or COMPLETED. Collective."""
        train = self.config.train
        self.watch.stop()
        if stop and state.step and state.step % train.checkpoint_every and state.step < train.max_steps:
            self.save(state)
        self.writer.wait()
        try:
            self.raise_failed_write()
            if stop:
                name = signal.Signals(stop).name
                self.log.say(f"stopped by {name} at step {state.step}, saved; run the same command to continue")
                self.folder.event("preempted", state.step, signal=stop)
                self.folder.mark(PREEMPTED, state.step, signal=stop)
            elif self.world.is_main:
                self.folder.mark(COMPLETED, state.step, **ckpt.newest_hashes(self.folder.checkpoints))
        finally:
            self.log.close()

    # ---- data ----------------------------------------------------------------------------------

    def batches(self, samples_seen: int) -> Iterator[MicroBatches]:
        """Yields the micro-batches of each optimizer step after `samples_seen` clips, endlessly."""
        data, train = self.config.data, self.config.train
        if data.num_workers:
            self.crumbs.clear()
            self.clips.on_open = self.crumbs
        positions = position_batches(samples_seen, train.batch_size, self.world.rank, self.world.size)
        stream = load_micro_batches(
            ClipStream(self.clips, train.seed),
            positions,
            data.num_workers,
            pin_memory=self.world.device.type == "cuda",
            timeout_s=data.worker_timeout_s,
        )
        while True:
            try:
                yield [next(stream) for _ in range(train.grad_accum_steps)]
            except RuntimeError as error:
                if explained := self.crumbs.explain(error):
                    raise TrainingAborted(explained) from error
                raise

    def files_of(self, micro_batches: MicroBatches) -> list[str]:
        """Returns the paths of the clips of a step."""
        clips = self.clips.catalog.clips
        return [str(clips[index].path) for batch in micro_batches for index in batch["index"].tolist()]

    # ---- reports -------------------------------------------------------------------------------

    def save(self, state: TrainState) -> None:
        """Writes a checkpoint on rank 0; every rank learns whether that failed. Collective."""
        asynchronous = self.config.train.async_checkpoint
        saved = state.state_dict(self.facts, copy=asynchronous)  # training keeps changing these tensors
        if self.world.is_main:
            self.writer.save(saved)
        if not asynchronous:  # else a later step checks it
            self.raise_failed_write()

    def raise_failed_write(self) -> None:
        """Raises CheckpointNotWritten, on every rank, if rank 0 could not write. Collective."""
        if failure := broadcast_object(self.writer.failure):
            self.writer.failure = None
            raise CheckpointNotWritten(failure)

    def log_metrics(self, state: TrainState) -> None:
        """Writes one row: means over ranks and over the steps since the last row. Collective."""
        values, seconds, waiting = self.meter.means()
        means = reduce_over_ranks(torch.stack(list(values.values())), dist.ReduceOp.SUM) / self.world.size
        row: dict[str, Any] = {"samples_seen": state.samples_seen, **dict(zip(values, means.tolist(), strict=True))}
        row |= {
            "learning_rate": state.optimizer.param_groups[0]["lr"],
            "videos_per_second": self.global_batch_size / seconds,
            "seconds_per_step": seconds,
            "data_wait_share": waiting,
            "memory_gib": peak_memory_gib(self.world.device),
            "skipped_steps": state.guard.skipped,
        }
        self.log.metrics(state.step, row)
        gc.collect()  # a step leaves hardly any garbage, so this takes microseconds
        self.meter.clear()

    def report_skip(self, state: TrainState, reason: str, step: InFlight) -> None:
        """Logs the files and timesteps of a skipped step. Collective."""
        timesteps = torch.cat([loss.timesteps for loss in step.losses]).tolist()
        losses = [str(float(loss.loss)) for loss in step.losses]  # JSON has no NaN
        facts = gather_objects({"losses": losses, "files": step.files, "timesteps": timesteps})
        self.log.say(f"step {state.step} skipped ({state.guard.skipped} so far): {reason}")
        merged = {key: [value for rank in facts for value in rank[key]] for key in facts[0]}
        self.folder.event("skip", state.step, reason=reason, samples_seen=state.samples_seen, **merged)


@contextlib.contextmanager
def collect_on_request() -> Iterator[None]:
    """While entered, only calls of `gc.collect` collect garbage, and only objects made since entering.

    An automatic full collection visits every object of every imported module; until it ends, no kernel is queued.
    """
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
