"""A run: processes, data, folder, log, signals and checkpoints of a training. Callbacks and resume receive it."""

from __future__ import annotations

import contextlib
import gc
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from datasets import ClipDataset

from . import checkpoint as ckpt
from .config import Config
from .distributed import World, broadcast_object, gather_objects, mean_over_ranks, on_main
from .errors import CheckpointNotWritten, TrainingAborted
from .guard import InFlight
from .logging import Meter, NullLogger, RunLogger, peak_memory_gib
from .run_folder import COMPLETED, PREEMPTED, HangWatch, RunFolder
from .signals import StopSignals
from .state import TrainState
from .stream import Breadcrumbs, ClipStream, PositionBatches, load_micro_batches

MicroBatches = list[dict[str, Tensor]]


class Run:
    """One process's part of a run.

    Args:
        config: the whole configuration.
        world: this process's rank, world size and device.
        clips: the training data.
    """

    def __init__(self, config: Config, world: World, clips: ClipDataset) -> None:
        train = config.train
        self.config = config
        self.world = world
        self.clips = clips
        self.folder = RunFolder(Path(train.output_dir))
        self.writer = ckpt.CheckpointWriter(self.folder.checkpoints, config)
        self.signals = StopSignals()
        self.log = cast(RunLogger, NullLogger())  # until `start_log` on rank 0
        self.meter = Meter()
        self.crumbs = Breadcrumbs(self.folder.path, world.rank)
        self.watch = HangWatch(self.folder.path / "errors" / f"rank{world.rank}.stacks.txt", train.hang_timeout_s)
        self.global_batch_size = train.batch_size * train.grad_accum_steps * world.size
        self.batch_files: list[str] = []  # clips of the step that was launched last, for failure reports

    @property
    def is_sharded(self) -> bool:
        """Whether weights, moments and average are spread over the ranks (FSDP2)."""
        return self.config.train.parallel == "fsdp" and self.world.size > 1

    @property
    def has_replicas(self) -> bool:
        """Whether several ranks hold a copy of the network each (DDP)."""
        return self.world.size > 1 and not self.is_sharded

    @property
    def facts(self) -> dict[str, Any]:
        """Facts of the run and its data that a checkpoint records."""
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
        """Holds the run folder and the stop signals; reports an error of this rank in the folder. Collective."""
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
            self.folder.close()

    def start_log(self, step: int) -> None:
        """Opens the log on rank 0 and records the start."""
        if not self.world.is_main:
            return
        self.log = RunLogger(self.folder.path, start=step, total=self.config.train.max_steps)
        (self.folder.path / "config.yaml").write_text(self.config.to_yaml())
        self.folder.event("start", step, world_size=self.world.size)

    def finish(self, state: TrainState, stop: int) -> None:
        """Saves what a stop signal interrupted, and leaves the marker PREEMPTED or COMPLETED. Collective."""
        train = self.config.train
        self.watch.stop()
        if stop and state.step and state.step % train.checkpoint_every and state.step < train.max_steps:
            self.save(state)
        self.writer.wait()
        try:
            self.raise_failed_write(broadcast_object(self.writer.failure))
            if stop:
                name = signal.Signals(stop).name
                self.log.say(f"stopped by {name} at step {state.step}, saved; run the same command to continue")
            if stop and self.world.is_main:
                self.folder.event("preempted", state.step, signal=stop)
                self.folder.mark(PREEMPTED, state.step, signal=stop)
            elif self.world.is_main:
                self.folder.mark(COMPLETED, state.step, **ckpt.newest_hashes(self.folder.checkpoints))
        finally:
            self.log.close()

    # ---- data ----------------------------------------------------------------------------------

    def batches(self, samples_seen: int) -> Iterator[MicroBatches]:
        """Yields the micro-batches of each optimizer step after `samples_seen` clips, without end."""
        data, train = self.config.data, self.config.train
        if data.num_workers:
            self.crumbs.clear()
            self.clips.on_open = self.crumbs
        stream = load_micro_batches(
            ClipStream(self.clips, train.seed),
            PositionBatches(
                samples_seen, batch_size=train.batch_size, rank=self.world.rank, world_size=self.world.size
            ),
            data.num_workers,
            pin_memory=self.world.device.type == "cuda",
            timeout_s=data.worker_timeout_s,
        )
        while True:
            try:
                yield [next(stream) for _ in range(train.grad_accum_steps)]
            except RuntimeError as error:
                explained = self.crumbs.explain(error)
                if explained is None:
                    raise
                raise TrainingAborted(explained) from error

    def files_of(self, micro_batches: MicroBatches) -> list[str]:
        """Returns the paths of the clips of a step."""
        clips = self.clips.catalog.clips
        return [str(clips[index].path) for batch in micro_batches for index in batch["index"].tolist()]

    # ---- reports -------------------------------------------------------------------------------

    def save(self, state: TrainState) -> None:
        """Has rank 0 write a checkpoint; every rank learns of the outcome and takes the same branch. Collective."""
        asynchronous = self.config.train.async_checkpoint
        saved = state.state_dict(self.facts, copy=asynchronous)  # training goes on in these very tensors
        if self.world.is_main:
            self.writer.save(saved)
        if not asynchronous:  # else a later step learns of it
            self.raise_failed_write(broadcast_object(self.writer.failure))

    def raise_failed_write(self, failure: str | None) -> None:
        """Raises CheckpointNotWritten with rank 0's `failure`, if there is one."""
        if failure:
            self.writer.failure = None
            raise CheckpointNotWritten(failure)

    def log_metrics(self, state: TrainState) -> None:
        """Writes one row: means over ranks and over the steps since the last row. Collective."""
        values, seconds, waiting = self.meter.means()
        means = mean_over_ranks(torch.stack(list(values.values()))).tolist()
        row: dict[str, Any] = {"samples_seen": state.samples_seen, **dict(zip(values, means, strict=True))}
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
        losses = [float(loss.loss) for loss in step.losses]
        facts = gather_objects({"files": step.files, "timesteps": timesteps, "losses": losses})
        self.log.say(f"step {state.step} skipped ({state.guard.skipped} so far): {reason}")
        if self.world.is_main:
            text = [str(loss) for rank in facts for loss in rank["losses"]]  # JSON has no NaN
            merged = {key: [value for rank in facts for value in rank[key]] for key in ("files", "timesteps")}
            seen = state.samples_seen
            self.folder.event("skip", state.step, reason=reason, samples_seen=seen, losses=text, **merged)


@contextlib.contextmanager
def collect_on_request() -> Iterator[None]:
    """While entered, garbage is collected by calls of `gc.collect` only, and of objects made since entering only.

    An automatic full collection visits every object of every imported module, a third of a million, in the middle of
    some step. Meanwhile no kernel is queued, and all ranks wait for the one that collects.
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
