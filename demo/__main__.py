"""`make demo`: the main job on the demo set, end to end, and a page that shows it.

    python -m demo [--out results/demo] [--videos 96] [--processes 2]

Draws the data, trains a small class-conditional Latte from scratch through torchrun, samples it and the
shipped weights, names what the samples show with the tracker of demo/drawn.py, and writes mp4s, contact
sheets, loss curve, metrics.json and index.html. A second run continues or reuses what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from html import escape
from pathlib import Path
from typing import Any

from engine import cli

ROOT = Path(__file__).resolve().parent.parent
TRAIN_CONFIG = "configs/demo/demo_train.yaml"
SAMPLE_CONFIG = "configs/demo/demo_sample.yaml"
TITLES = {
    "pretrained": "Shipped weights",
    "trained": "Trained from scratch in this run",
    "real": "Real clips",
}


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/demo"), help="folder to write (%(default)s)")
    parser.add_argument("--videos", type=int, default=96, help="videos per kind, at least 64 (%(default)s)")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="of torchrun (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.videos < 64:
        raise ValueError(f"--videos {arguments.videos} is too few to tell 95 % from 90 %; give at least 64.")
    out, number = arguments.out, str(arguments.videos)

    clock = Clock()
    clock.run("data", [sys.executable, "-m", "demo.data"])
    clock.run("training", [*torchrun(arguments.processes), "train.py", *train_arguments(out, arguments.processes)])
    sampler = [sys.executable, "sample/sample.py", "--num_videos", number, "--save_video_path"]
    clock.run("sampling the trained", [*sampler, str(out / "trained"), "--ckpt", str(out / "train")])
    clock.run("sampling the pretrained", [*sampler, str(out / "pretrained"), "--config", SAMPLE_CONFIG])
    with clock.phase("report"):
        write_real_clips(out / "real", arguments.videos)
        metrics = measure(out)
        plot_losses(out / "train" / "metrics.jsonl", out / "loss.png")
    metrics["seconds"] = clock.seconds
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    write_page(out, metrics)
    print(summary(metrics, out))
    return 0


class Clock:
    """Runs the phases of the demo, says so, and keeps how long each took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def run(self, name: str, command: list[str]) -> None:
        """One command of the repository, from its root; stops the demo if it fails."""
        with self.phase(name):
            print("$ " + " ".join(["python" if part == sys.executable else part for part in command]), flush=True)
            threads = {"OMP_NUM_THREADS": "1"} if "torch.distributed.run" in command else {}
            result = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1", **threads})
        if result.returncode:
            raise ValueError(f"the demo's {name} failed with exit code {result.returncode}; see the lines above.")

    def phase(self, name: str) -> Phase:
        """A context that is timed under `name`."""
        return Phase(name, self.seconds)


class Phase:
    """One timed phase."""

    def __init__(self, name: str, seconds: dict[str, float]) -> None:
        self.name, self.seconds = name, seconds

    def __enter__(self) -> None:
        print(f"\n== {self.name}", flush=True)
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] = round(time.perf_counter() - self.start, 1)
        print(f"   {self.seconds[self.name]} s", flush=True)


def torchrun(processes: int) -> list[str]:
    """The launcher, without relying on PATH."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def train_arguments(out: Path, processes: int) -> list[str]:
    """The shipped recipe, its global batch spread over the processes."""
    from engine.config import load_config

    batch = load_config(ROOT / TRAIN_CONFIG).train.batch_size
    return [
        "--config",
        TRAIN_CONFIG,
        f"train.output_dir={out / 'train'}",
        f"train.batch_size={batch // processes}",
    ]


def write_real_clips(folder: Path, number: int) -> None:
    """The first 16 frames of clips of all classes in turn, as sample.py would have written them."""
    import numpy as np

    from datasets import build_dataset
    from engine.config import load_config
    from sample.video_io import slug, write_contact_sheet, write_mp4

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
    """What the tracker says of the mp4s in each folder, and the training loss at both ends."""
    from datasets.readers import open_video
    from demo.drawn import accuracy
    from engine.logging import read_rows

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
    """Training loss over steps, on a logarithmic axis."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    from engine.logging import read_rows

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
    """index.html beside the videos it plays."""
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


def summary(metrics: dict[str, Any], out: Path) -> str:
    """The end of the demo, in a few lines."""
    lines = ["", f"{'':34s}{'colour':>8s}{'motion':>8s}"]
    for kind, title in TITLES.items():
        values = [metrics[f"{name}_accuracy_{kind}"] for name in ("appearance", "motion")]
        lines.append(f"{title:34s}{values[0]:8.1%}{values[1]:8.1%}")
    minutes = sum(metrics["seconds"].values()) / 60
    lines.append(f"{minutes:.1f} minutes. Open {out / 'index.html'}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
