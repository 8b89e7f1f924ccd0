"""`make demo`: the main job on the demo set, end to end, and a page that shows it.

    python -m demo [--out results/demo] [--videos 96] [--processes 2]

Draws the data, trains a small class-conditional Latte from scratch through torchrun, samples it and the shipped
weights, measures the samples with the tracker of demo/drawn.py, and writes mp4s, contact sheets, loss curve,
metrics.json and index.html. A second run continues or reuses existing results.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from engine import cli
from engine.config import load_config

from .page import TRAIN_CONFIG, format_summary, measure, plot_losses, write_page, write_real_clips
from .stages import ROOT, Stages

SAMPLE_CONFIG = "configs/demo/demo_sample.yaml"


def main(argv: list[str]) -> int:
    """Runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/demo"), help="folder to write (%(default)s)")
    parser.add_argument("--videos", type=int, default=96, help="videos per kind, at least 64 (%(default)s)")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="of torchrun (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.videos < 64:
        raise ValueError(f"--videos {arguments.videos} is too few to distinguish 95 % from 90 %; give at least 64.")
    out, number = arguments.out, str(arguments.videos)

    stages = Stages()
    stages.run("data", [sys.executable, "-m", "demo.data"])
    stages.run("training", train_command(out, arguments.processes))
    sampler = [sys.executable, "sample/sample.py", "--num_videos", number, "--save_video_path"]
    stages.run("sampling the trained", [*sampler, str(out / "trained"), "--ckpt", str(out / "train")])
    stages.run("sampling the pretrained", [*sampler, str(out / "pretrained"), "--config", SAMPLE_CONFIG])
    with stages.stage("report"):
        write_real_clips(out / "real", arguments.videos)
        metrics = measure(out)
        plot_losses(out / "train" / "metrics.jsonl", out / "loss.png")
    metrics["seconds"] = stages.seconds
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    write_page(out, metrics)
    print(format_summary(metrics, out))
    return 0


def train_command(out: Path, processes: int) -> list[str]:
    """Returns the command of the training: the shipped recipe, its global batch split over the processes."""
    batch = load_config(ROOT / TRAIN_CONFIG).train.batch_size // processes
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [
        *(*launcher, "train.py", "--config", TRAIN_CONFIG),
        *(f"train.output_dir={out / 'train'}", f"train.batch_size={batch}"),
    ]


if __name__ == "__main__":
    cli.run(main)
