"""The same training under Lightning's loop: its hooks, callbacks and profilers around our step.

Model, objective, average, optimiser, log and checkpoints are the Trainer's own, so that both loops give the same
numbers and continue each other's runs. Lightning runs in each process by itself; torchrun starts the processes, and
the Trainer joins them as ever.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from lightning import Callback, LightningModule
from lightning import Trainer as LightningTrainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from .trainer import Trainer

MicroBatches = list[dict[str, Tensor]]


class LatteModule(LightningModule):
    """The Trainer's step as a LightningModule; `stop` is the signal that ended it, or 0."""

    def __init__(self, run: Trainer) -> None:
        super().__init__()
        self.automatic_optimization = False  # accumulation, clipping after it, and skipping are the step's own
        self.run = run
        self.network = run.model
        self.stop = 0

    def configure_optimizers(self) -> Any:
        """The Trainer's optimiser."""
        return self.run.optimizer

    def transfer_batch_to_device(self, batch: MicroBatches, device: Any, dataloader_idx: int) -> MicroBatches:
        """The objective moves what it needs."""
        return batch

    def training_step(self, batch: MicroBatches, batch_idx: int) -> None:
        """One optimiser step with all that it is due."""
        self.stop = self.run.advance(batch)
        if self.stop or self.run.step >= self.run.config.train.max_steps:
            self.trainer.should_stop = True


class Loop(LightningTrainer):
    """Lightning's loop, which leaves the stop signals to the run: its own answer to SIGTERM saves nothing."""

    @property
    def received_sigterm(self) -> bool:
        return False


class Steps(IterableDataset):
    """The Trainer's batches, until it needs no more."""

    def __init__(self, run: Trainer) -> None:
        self.run = run

    def __iter__(self) -> Iterator[MicroBatches]:
        batches = self.run.batches()
        while self.run.step < self.run.config.train.max_steps:
            with self.run.meter.waiting():
                micro_batches = next(batches)
            yield micro_batches


def loop(run: Trainer, callbacks: Sequence[Callback] = ()) -> int:
    """`Trainer.loop` by Lightning; returns the signal that stopped it early, or 0."""
    os.environ.setdefault("PYTORCH_LIGHTNING_DISABLE_TIPS", "1")
    device = run.world.device
    lightning = Loop(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index or 0] if device.type == "cuda" else 1,
        plugins=[LightningEnvironment()],
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = LatteModule(run)
    if run.step < run.config.train.max_steps:
        lightning.fit(module, DataLoader(Steps(run), batch_size=None))
    return module.stop


def fit(run: Trainer) -> bool:
    """`Trainer.fit` under Lightning's loop."""
    return run.fit(loop)
