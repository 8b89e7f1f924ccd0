"""Text to video on the demo set, end to end: train on captions from scratch, or from an image network, and measure.

    python -m demo.text                                       # into results/demo_text
    python -m demo.text --inflate --out results/demo_inflated # an image network first, then inflated

Draws the clips with their captions, makes a small text encoder, encodes clips and captions once, trains, samples every
caption of the set, and measures the videos with the tracker of demo/drawn.py. Writes the run folders, samples/ and
metrics.json. A second run continues or reuses existing results.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from datasets.readers import open_video
from engine import cli

from .drawn import CLASSES, accuracy, captions_of
from .stages import Stages

VIDEO_CONFIG = "configs/demo/demo_t2v_train.yaml"
IMAGE_CONFIG = "configs/demo/demo_t2i_train.yaml"
LATENTS, FEATURES = "data/demo_latents", "data/demo_text_features"
# An inflated network needs fewer steps; temporal positions are ramped up over the first of them.
INFLATED = ["train.temporal_ramp_steps=100", "train.max_steps=800"]


def main(argv: list[str]) -> int:
    """Runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/demo_text"), help="folder to write (%(default)s)")
    parser.add_argument("--inflate", action="store_true", help="start from an image network, which is trained first")
    arguments = parser.parse_args(argv)

    out, stages = arguments.out, Stages()
    python = sys.executable
    caches = [f"data.latents={LATENTS}", f"text.features={FEATURES}", "data.num_workers=0"]

    def train(name: str, config: str, *overrides: str) -> None:
        command = [python, "train.py", "--config", config, f"train.output_dir={out / name}", *caches, *overrides]
        stages.run(f"training {name}", command)

    stages.run("data", [python, "-m", "demo.data"])
    stages.run("text encoder", [python, "-m", "demo.text_encoder"])
    stages.run("latents", [python, "-m", "tools.cache_latents", "--config", VIDEO_CONFIG, "--out", LATENTS])
    stages.run("text features", [python, "-m", "tools.cache_text", "--config", VIDEO_CONFIG, "--out", FEATURES])
    start: list[str] = []
    if arguments.inflate:
        train("images", IMAGE_CONFIG)
        folder = out / "pixart"
        if not folder.exists():
            stages.run("export", [python, "-m", "tools.convert", "diffusers", str(out / "images"), str(folder)])
        start = [f"train.init_from={folder}", *INFLATED]
    train("videos", VIDEO_CONFIG, *start)
    prompts = out / "prompts.txt"
    prompts.write_text("\n".join(caption for _, caption in list_captions()) + "\n", encoding="utf-8")
    sampler = [python, "sample/sample_t2x.py", "--ckpt", str(out / "videos"), "--prompt_file", str(prompts)]
    stages.run("sampling", [*sampler, "--save_img_path", str(out / "samples")])
    metrics: dict[str, Any] = {**measure(out / "samples"), "seconds": stages.seconds}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(format_summary(metrics, out))
    return 0


def list_captions() -> list[tuple[int, str]]:
    """Lists every wording of every class with its label: the plainest of each class first, then the next."""
    wordings = zip(*(captions_of(kind) for kind in CLASSES), strict=True)
    return [(label, caption) for row in wordings for label, caption in enumerate(row)]


def measure(folder: Path) -> dict[str, Any]:
    """Returns how often colour and motion of a video match its caption."""
    labels = {caption: label for label, caption in list_captions()}
    listed = json.loads((folder / "samples.json").read_text())["videos"]
    readers = [open_video(folder / video["file"]) for video in listed]
    found = accuracy([each.read(range(len(each))) for each in readers], [labels[video["prompt"]] for video in listed])
    return {**{name: round(value, 4) for name, value in found.items()}, "videos": len(listed)}


def format_summary(metrics: dict[str, Any], out: Path) -> str:
    """Formats the accuracies and the total time."""
    minutes = sum(metrics["seconds"].values()) / 60
    return (
        f"\n{metrics['videos']} videos, one of each caption: colour right {metrics['appearance_accuracy']:.1%}, motion "
        f"right {metrics['motion_accuracy']:.1%}\n{minutes:.1f} minutes. See {out / 'samples' / 'samples.png'}"
    )


if __name__ == "__main__":
    cli.run(main)
