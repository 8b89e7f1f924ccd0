"""Cost of checkpoints: the same steps without, with, and with asynchronous saving, in one run.

Trains Latte-S/2 (a checkpoint of 0.5 GB) on the demo set in this process, all three ways in turn, twice, and takes
the faster of each. The figures are ratios of whole loops, so that the work of the writing thread counts, too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from demo.data import draw_set
from engine.config import load_config
from engine.distributed import World
from engine.state import TrainState
from engine.trainer import Trainer

from . import report

SETTINGS = [
    *("model.name=Latte-S/2", "model.num_classes=8", "codec.latent_channels=3", "codec.downsample_factor=1"),
    *("codec.scale=1", "data.name=demo", "data.num_frames=8", "data.frame_interval=1", "data.image_size=16"),
    *("data.num_workers=0", "train.batch_size=4", "train.log_every=1000"),
]
MODES = {"none": "train.async_checkpoint=false", "in the step": "train.async_checkpoint=false",
         "asynchronous": "train.async_checkpoint=true"}  # fmt: skip


def time_training(mode: str, data: Path, steps: int, every: int) -> tuple[float, float]:
    """Runs the training; returns the seconds of the loop, and those inside `save`, until the last write ends."""
    with tempfile.TemporaryDirectory() as out:
        overrides = [f"data.path={data}", f"train.output_dir={out}/run", f"train.max_steps={steps}", MODES[mode]]
        trainer = Trainer(load_config(None, [*SETTINGS, *overrides, f"train.checkpoint_every={every}"]), World())
        save, saving = trainer.run.save, 0.0

        def timed(state: TrainState) -> None:
            nonlocal saving
            start = time.perf_counter()
            if mode != "none":
                save(state)
            saving += time.perf_counter() - start

        trainer.run.save = timed  # type: ignore[method-assign]
        trainer.run.folder.open()
        start = time.perf_counter()
        trainer.loop()
        trainer.run.writer.wait()
        return time.perf_counter() - start, saving


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints and writes the table."""
    steps, every = arguments.steps, arguments.every
    with tempfile.TemporaryDirectory() as folder:
        draw_set(Path(folder), {"clips_per_class": 1, "size": 16, "frames": 16, "seed": 0}, workers=1)
        found: dict[str, tuple[float, float]] = {}
        for _ in range(2):
            for mode in MODES:
                now = time_training(mode, Path(folder), steps, every)
                found[mode] = min(found.get(mode, now), now)
    plain = found["none"][0]
    rows = [
        {"": mode, "seconds": total, "over none": total / plain, "inside `save`": saving / total}
        for mode, (total, saving) in found.items()
    ]
    columns = {"": "", "seconds": ".1f", "over none": ".3f", "inside `save`": ".1%"}
    text = f"Latte-S/2, {steps} steps, a checkpoint of 0.5 GB every {every}; the faster of two runs of each."
    section = report.Section("Whole loops", text, columns, rows)
    report.write("saving", "What checkpoints cost", "", [section], arguments.out)
