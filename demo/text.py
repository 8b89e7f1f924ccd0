"""Runs text to video on the demo set: trains on captions, from scratch or from an image network, samples, measures.

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

from engine import cli

from .drawn import CLASSES, captions_of
from .stages import measure_samples, run_stage

VIDEO_CONFIG = "configs/demo/demo_t2v_train.yaml"
IMAGE_CONFIG = "configs/demo/demo_t2i_train.yaml"
LATENTS, FEATURES = "data/demo_latents", "data/demo_text_features"
# An inflated network needs fewer steps; temporal positions are ramped up over the first of them.
INFLATED = ["train.temporal_ramp_steps=100", "train.max_steps=800"]


def main(argv: list[str]) -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/demo_text"), help="folder to write (%(default)s)")
    parser.add_argument("--inflate", action="store_true", help="start from an image network, which is trained first")
    arguments = parser.parse_args(argv)
    out, inflated = arguments.out, arguments.out / "pixart"

    python = sys.executable
    caches = [f"data.latents={LATENTS}", f"text.features={FEATURES}", "data.num_workers=0"]

    def train(name: str, config: str, *overrides: str) -> list[str]:
        return [python, "train.py", "--config", config, f"train.output_dir={out / name}", *caches, *overrides]

    stages = {"data": [python, "-m", "demo.data"], "text encoder": [python, "-m", "demo.text_encoder"]}
    for name, tool, folder in (("latents", "latents", LATENTS), ("text features", "text", FEATURES)):
        stages[name] = [python, "-m", f"tools.cache_{tool}", "--config", VIDEO_CONFIG, "--out", folder]
    if arguments.inflate:
        stages["training images"] = train("images", IMAGE_CONFIG)
        if not inflated.exists():
            stages["export"] = [python, "-m", "tools.convert", "diffusers", str(out / "images"), str(inflated)]
    start = [f"train.init_from={inflated}", *INFLATED] if arguments.inflate else []
    prompts = out / "prompts.txt"
    sampler = [python, "sample/sample_t2x.py", "--ckpt", str(out / "videos"), "--prompt_file", str(prompts)]
    stages |= {
        "training videos": train("videos", VIDEO_CONFIG, *start),
        "sampling": [*sampler, "--save_img_path", str(out / "samples")],
    }
    labels = {caption: label for label, kind in enumerate(CLASSES) for caption in captions_of(kind)}
    wordings = zip(*(captions_of(kind) for kind in CLASSES), strict=True)  # the plainest of each class first
    out.mkdir(parents=True, exist_ok=True)
    prompts.write_text("".join(f"{caption}\n" for row in wordings for caption in row), encoding="utf-8")
    seconds = {name: run_stage(name, command) for name, command in stages.items()}
    found = measure_samples(out / "samples", lambda video: labels[video["prompt"]])
    (out / "metrics.json").write_text(json.dumps({**found, "seconds": seconds}, indent=2) + "\n")
    print(
        f"\n{found['videos']} videos, one per caption: colour right {found['appearance_accuracy']:.1%}, motion "
        f"right {found['motion_accuracy']:.1%}\n{sum(seconds.values()) / 60:.1f} minutes. "
        f"See {out / 'samples' / 'samples.png'}"
    )


if __name__ == "__main__":
    cli.run(main)
