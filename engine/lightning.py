"""The same training with Lightning's loop: its hooks, callbacks and profilers around our step.

Model, objective, EMA, optimizer, log and checkpoints are the Trainer's own, so both loops give the same results and
resume each other's runs. Each process runs its own single-device Lightning; torchrun starts the processes, and the
Trainer connects them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning import Callback, LightningModule
from lightning import Trainer as LightningTrainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.utils.data import DataLoader, IterableDataset

from .run import MicroBatches
from .trainer import Trainer


class LatteModule(LightningModule):
    """The Trainer's step as a LightningModule; `stop` is the signal that ended it, or 0."""

    def __init__(self, latte: Trainer) -> None:
        super().__init__()
        self.automatic_optimization = False  # the step accumulates, clips and skips by itself
        self.latte = latte
        self.network = latte.state.model
        self.stop = 0

    def configure_optimizers(self) -> Any:
        return self.latte.state.optimizer

    def transfer_batch_to_device(self, batch: MicroBatches, device: Any, dataloader_idx: int) -> MicroBatches:
        """Returns the batch unchanged: the objective moves what it needs."""
        return batch

    def training_step(self, batch: MicroBatches, batch_idx: int) -> None:
        """Runs one optimizer step, then any logging, checkpoint or callback that is due."""
        self.stop = self.latte.train_step(batch)
        if self.stop or self.latte.state.step >= self.latte.config.train.max_steps:
            self.trainer.should_stop = True


class Loop(LightningTrainer):
    """Lightning's loop, with stop signals left to `Run`: Lightning's own SIGTERM handler saves nothing."""

    @property
    def received_sigterm(self) -> bool:
        return False


class Steps(IterableDataset):
    """The Trainer's batches, until `train.max_steps`."""

    def __init__(self, latte: Trainer) -> None:
        self.latte = latte

    def __iter__(self) -> Iterator[MicroBatches]:
        return self.latte.batches()


def loop(latte: Trainer, callbacks: Sequence[Callback] = ()) -> int:
    """Trains with Lightning in place of `Trainer.loop`; returns the signal that stopped it early, or 0."""
    os.environ.setdefault("PYTORCH_LIGHTNING_DISABLE_TIPS", "1")
    device = latte.world.device
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
    module = LatteModule(latte)
    if latte.state.step < latte.config.train.max_steps:
        steps = DataLoader(Steps(latte), batch_size=None, generator=torch.Generator())  # not the global one
        lightning.fit(module, steps)
    return module.stop
