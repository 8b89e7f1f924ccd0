"""What checkpoints cost: the same steps without, with, and with asynchronous saving, in one run.

    python -m tools.bench_saving [--steps 40] [--every 10] [--out docs/benchmarks/saving.md]

Trains Latte-S/2 (a checkpoint of 0.5 GB) on the demo set in this process, all three ways in turn, twice, and takes
the faster of each. The figures are ratios of whole loops, so that what a thread takes from the training counts too.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine import cli
from tools.make_demo_data import draw_set

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = [
    *("model.name=Latte-S/2", "model.num_classes=8", "codec.latent_channels=3", "codec.downsample_factor=1"),
    *("codec.scale=1", "data.name=demo", "data.num_frames=8", "data.frame_interval=1", "data.image_size=16"),
    *("data.num_workers=0", "train.batch_size=4", "train.log_every=1000"),
]
MODES = {"none": "train.async_checkpoint=false", "in the step": "train.async_checkpoint=false",
         "asynchronous": "train.async_checkpoint=true"}  # fmt: skip


def seconds_of(mode: str, data: Path, steps: int, every: int) -> tuple[float, float]:
    """(seconds of the loop, of them inside `save`) of one run; the last checkpoint is waited for."""
    from engine.config import load_config
    from engine.distributed import World
    from engine.trainer import Trainer

    class Timed(Trainer):
        saving = 0.0

        def save(self) -> None:
            start = time.perf_counter()
            if mode != "none":
                super().save()
            Timed.saving += time.perf_counter() - start

    with tempfile.TemporaryDirectory() as out:
        overrides = [f"data.path={data}", f"train.output_dir={out}/run", f"train.max_steps={steps}", MODES[mode]]
        trainer = Timed(load_config(None, [*SETTINGS, *overrides, f"train.checkpoint_every={every}"]), World())
        Timed.saving = 0.0
        start = time.perf_counter()
        trainer.loop()
        trainer.writer.wait()
        return time.perf_counter() - start, Timed.saving


def report(found: dict[str, tuple[float, float]], steps: int, every: int) -> str:
    """The Markdown page."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    plain = found["none"][0]
    rows = "".join(
        f"| {mode} | {total:.1f} | {total / plain:.3f} | {saving / total:.1%} |\n"
        for mode, (total, saving) in found.items()
    )
    return (
        "# What checkpoints cost\n\n"
        f"Latte-S/2, {steps} steps, a checkpoint of 0.5 GB every {every}; {platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit.strip()}; "
        f"`python -m tools.bench_saving --steps {steps} --every {every}`.\n\n"
        "| checkpoints | seconds | over none | time inside `save` |\n|---|---|---|---|\n" + rows
    )


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="of each run (%(default)s)")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/saving.md"), help="page (%(default)s)")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        draw_set(Path(folder), {"clips_per_class": 1, "size": 16, "frames": 16, "seed": 0}, workers=1)
        found: dict[str, tuple[float, float]] = {}
        for _ in range(2):
            for mode in MODES:
                now = seconds_of(mode, Path(folder), arguments.steps, arguments.every)
                found[mode] = min(found.get(mode, now), now)
    page = report(found, arguments.steps, arguments.every)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(page)
    print(page)
    return 0


if __name__ == "__main__":
    cli.run(main)
