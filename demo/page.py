"""The page of the demo: real clips, measurements, loss curve and index.html."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from datasets import build_dataset
from datasets.readers import open_video
from engine.config import load_config
from engine.logging import read_rows
from sample.video_io import slug, write_contact_sheet, write_mp4

from .drawn import accuracy
from .stages import ROOT

TRAIN_CONFIG = "configs/demo/demo_train.yaml"
TITLES = {
    "pretrained": "Shipped weights",
    "trained": "Trained from scratch in this run",
    "real": "Real clips",
}


def write_real_clips(folder: Path, number: int) -> None:
    """Writes the first 16 frames of clips of all classes in turn, in the layout of sample.py."""
    config = load_config(ROOT / TRAIN_CONFIG)
    clips = build_dataset(config.data, seed=0)
    by_class: dict[int, list[int]] = {}
    for index, clip in enumerate(clips.catalog.clips):
        by_class.setdefault(clip.label, []).append(index)
    shown: list[np.ndarray] = []
    files: list[dict[str, Any]] = []
    for place in range(number):
        label = place % len(by_class)
        item = clips[0, by_class[label][place // len(by_class)]]
        frames = ((item["video"] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        name = clips.class_names[label]
        file = f"{place:04d}_{slug(name)}.mp4"
        write_mp4(folder / file, frames)
        files.append({"file": file, "index": place, "label": label, "class_name": name})
        shown.append(frames)
    count = len(by_class)
    write_contact_sheet(folder / "samples.png", np.stack(shown[:count]), [f["class_name"] for f in files[:count]])
    (folder / "samples.json").write_text(json.dumps({"videos": files}, indent=2) + "\n")


def measure(out: Path) -> dict[str, Any]:
    """Returns the tracker's accuracy on the mp4s in each folder, and the first and last training loss."""
    metrics: dict[str, Any] = {}
    for kind in TITLES:
        listed = json.loads((out / kind / "samples.json").read_text())["videos"]
        readers = [open_video(out / kind / video["file"]) for video in listed]
        found = accuracy([reader.read(range(len(reader))) for reader in readers], [v["label"] for v in listed])
        metrics |= {f"{name}_{kind}": round(value, 4) for name, value in found.items()}
        metrics[f"num_videos_{kind}"] = len(listed)
    rows = read_rows(out / "train" / "metrics.jsonl")
    metrics |= {"training_loss_start": rows[0]["loss"], "training_loss_end": rows[-1]["loss"]}
    metrics["training_steps"] = rows[-1]["step"]
    return metrics


def plot_losses(source: Path, target: Path) -> None:
    """Plots the training loss over steps, on a logarithmic axis."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_rows(source)
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], color="#4c78a8", linewidth=1.4)
    axes.set(xlabel="optimiser step", ylabel="training loss", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(target, dpi=120)
    plt.close(figure)


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
<p>Eight classes, each a colour, a shape and a motion, drawn by the repository; 16 frames of 32 &times; 32 pixels.
A tracker that sees pixels only names colour and motion of every video; the table counts how often it names what
the label asked for.</p>
<table><tr><th></th><th>videos</th><th>colour right</th><th>motion right</th></tr>
{rows}</table>
{sections}
<h2>Training loss</h2>
<p>From {training_loss_start:.4f} to {training_loss_end:.4f} in {training_steps} steps.</p>
<img src="loss.png" alt="training loss over steps">
</html>
"""


def write_page(out: Path, metrics: dict[str, Any], shown: int = 24) -> None:
    """Writes index.html, which plays the videos of the same folder."""
    rows, sections = "", ""
    for kind, title in TITLES.items():
        cells = [f"{metrics[f'{name}_accuracy_{kind}']:.1%}" for name in ("appearance", "motion")]
        rows += f"<tr><td>{title}</td><td>{metrics[f'num_videos_{kind}']}</td>"
        rows += "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"
        listed = json.loads((out / kind / "samples.json").read_text())["videos"][:shown]
        videos = "\n".join(
            f'<figure><video src="{kind}/{video["file"]}" autoplay loop muted playsinline></video>'
            f"<figcaption>{escape(video['class_name'])}</figcaption></figure>"
            for video in listed
        )
        sections += f'<h2>{title}</h2>\n<div class="videos">\n{videos}\n</div>\n'
        sections += f'<p><img class="sheet" src="{kind}/samples.png" alt="contact sheet: {title}"></p>\n'
    (out / "index.html").write_text(PAGE.format(rows=rows, sections=sections, **metrics))


def format_summary(metrics: dict[str, Any], out: Path) -> str:
    """Formats the accuracies and the total time."""
    lines = ["", f"{'':34s}{'colour':>8s}{'motion':>8s}"]
    for kind, title in TITLES.items():
        values = [metrics[f"{name}_accuracy_{kind}"] for name in ("appearance", "motion")]
        lines.append(f"{title:34s}{values[0]:8.1%}{values[1]:8.1%}")
    minutes = sum(metrics["seconds"].values()) / 60
    lines.append(f"{minutes:.1f} minutes. Open {out / 'index.html'}")
    return "\n".join(lines)
