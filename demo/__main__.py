"""`make demo`: trains and samples on the demo set, and writes a page of results.

    python -m demo [--out results/demo] [--videos 96] [--processes 2]

Draws the data, encodes it once, trains a small class-conditional Latte from scratch with torchrun, samples it and the
shipped weights, scores the samples with the tracker in demo/drawn.py, and writes mp4s, contact sheets, a loss curve,
metrics.json and index.html. A second run continues or reuses existing results.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from common.checks import require
from datasets import build_dataset
from engine import cli
from engine.config import load_config
from engine.run_folder import read_rows
from sample.video_io import slug, write_contact_sheet, write_mp4

from .stages import ROOT, measure_samples, plot_losses, read_samples, run_stage

SAMPLE_CONFIG = "configs/demo/demo_sample.yaml"
TRAIN_CONFIG = "configs/demo/demo_train.yaml"
FIGURES = ("appearance_accuracy", "motion_accuracy", "num_videos")  # per kind of video in metrics.json
TITLES = {"pretrained": "Shipped weights", "trained": "Trained from scratch in this run", "real": "Real clips"}


def write_real_clips(folder: Path, number: int) -> None:
    """Writes the first 16 frames of clips, cycling through classes, in sample.py's layout."""
    clips = build_dataset(load_config(ROOT / TRAIN_CONFIG).data, seed=0)
    by_class: dict[int, list[int]] = {label: [] for label in range(clips.num_classes)}
    for index, clip in enumerate(clips.catalog.clips):
        by_class[clip.label].append(index)
    shown: list[np.ndarray] = []
    files: list[dict[str, Any]] = []
    for place in range(number):
        label = place % len(by_class)
        item = clips[0, by_class[label][place // len(by_class)]]
        shown.append(((item["video"] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
        name = clips.class_names[label]
        files.append({"file": f"{place:04d}_{slug(name)}.mp4", "index": place, "label": label, "class_name": name})
        write_mp4(folder / files[-1]["file"], shown[-1])
    write_contact_sheet(folder / "samples.png", np.stack(shown[: len(by_class)]), clips.class_names)
    (folder / "samples.json").write_text(json.dumps({"videos": files}, indent=2) + "\n")


def measure(out: Path) -> dict[str, Any]:
    """Returns the tracker's accuracies per folder of mp4s and the first and last training loss; plots the loss."""
    metrics: dict[str, Any] = {}
    for kind in TITLES:
        found = measure_samples(out / kind, lambda video: video["label"])
        metrics |= {f"num_videos_{kind}" if name == "videos" else f"{name}_{kind}": found[name] for name in found}
    rows = read_rows(out / "train" / "metrics.jsonl")
    plot_losses({"": [[(row["step"], row["loss"]) for row in rows]]}, out / "loss.png", "training loss")
    metrics |= {"training_loss_start": rows[0]["loss"], "training_loss_end": rows[-1]["loss"]}
    return {**metrics, "training_steps": rows[-1]["step"]}


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Latte demo</title>
<style>
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 980px; margin: 2rem auto; padding: 0 1rem; color: #222; }}
  h1, h2 {{ line-height: 1.2; }} h2 {{ margin-top: 2.2rem; }}
  table {{ border-collapse: collapse; }}
  th, td {{ padding: .3rem .9rem; border-bottom: 1px solid #ddd; text-align: right; }}
  th:first-child, td:first-child {{ text-align: left; }}
  .videos {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: .6rem; }}
  figure {{ margin: 0; }} figcaption {{ font-size: .72rem; color: #555; overflow-wrap: anywhere; }}
  video {{ width: 100%; image-rendering: pixelated; border-radius: 4px; display: block; }}
  img {{ max-width: 100%; }} img.sheet {{ image-rendering: pixelated; }}
</style>
<h1>Latte demo</h1>
<p>Eight classes, each a colour, a shape and a motion, drawn by this repository; 16 frames of 32 &times; 32 pixels.
A tracker that sees only pixels names the colour and motion of every video; the table shows how often they match
the label.</p>
<table><tr><th></th><th>videos</th><th>colour right</th><th>motion right</th></tr>
{rows}</table>
{sections}
<h2>Training loss</h2>
<p>From {training_loss_start:.4f} to {training_loss_end:.4f} in {training_steps} steps.</p>
<img src="loss.png" alt="training loss over steps">
</html>
"""


def write_page(out: Path, metrics: dict[str, Any], shown: int = 24) -> None:
    """Writes index.html, which plays the videos under `out`."""
    rows, sections = "", ""
    for kind, title in TITLES.items():
        colour, motion, number = (metrics[f"{name}_{kind}"] for name in FIGURES)
        rows += f"<tr><td>{title}</td><td>{number}</td><td>{colour:.1%}</td><td>{motion:.1%}</td></tr>\n"
        videos = "\n".join(
            f'<figure><video src="{kind}/{video["file"]}" autoplay loop muted playsinline></video>'
            f"<figcaption>{escape(video['class_name'])}</figcaption></figure>"
            for video in read_samples(out / kind)[:shown]
        )
        sections += f'<h2>{title}</h2>\n<div class="videos">\n{videos}\n</div>\n'
        sections += f'<p><img class="sheet" src="{kind}/samples.png" alt="contact sheet: {title}"></p>\n'
    (out / "index.html").write_text(PAGE.format(rows=rows, sections=sections, **metrics))


def main(argv: list[str]) -> None:
    """Runs the demo."""
    parser = ArgumentParser("python -m demo", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/demo"), help="output folder (%(default)s)")
    parser.add_argument("--videos", type=int, default=96, help="videos per kind, at least 64 (%(default)s)")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="in torchrun (%(default)s)")
    arguments = parser.parse_args(argv)
    out, videos, processes = arguments.out, arguments.videos, arguments.processes
    require(videos >= 64, f"--videos must be at least 64 to tell 95 % from 90 %, got {videos}.")

    python = sys.executable
    launcher = [python, "-m", "engine.elastic", "--standalone", f"--nproc_per_node={processes}"]
    batch = load_config(ROOT / TRAIN_CONFIG).train.batch_size // processes  # the recipe's global batch, split
    latents = str(out / "latents")
    settings = [f"train.output_dir={out / 'train'}", f"train.batch_size={batch}", f"data.latents={latents}"]
    sampler = [python, "sample/sample.py", "--num_videos", str(videos), "--save_video_path"]
    stages = {
        "data": [python, "-m", "demo.data"],
        "encoding": [*launcher, "-m", "tools.cache_latents", "--config", TRAIN_CONFIG, "--out", latents],
        "training": [*launcher, "train.py", "--config", TRAIN_CONFIG, *settings],
        "sampling (trained)": [*sampler, str(out / "trained"), "--ckpt", str(out / "train")],
        "sampling (pretrained)": [*sampler, str(out / "pretrained"), "--config", SAMPLE_CONFIG],
    }
    seconds = {name: run_stage(name, command) for name, command in stages.items()}
    write_real_clips(out / "real", videos)
    metrics = {**measure(out), "seconds": seconds}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    write_page(out, metrics)
    for kind, title in TITLES.items():
        colour, motion, _ = (metrics[f"{name}_{kind}"] for name in FIGURES)
        print(f"{title:34s}colour right {colour:6.1%}, motion right {motion:6.1%}")
    print(f"{sum(seconds.values()) / 60:.1f} minutes. Open {out / 'index.html'}")


if __name__ == "__main__":
    cli.run(main)
