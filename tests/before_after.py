"""Shows that the redesign moved no bit: runs two checkouts on the same inputs and compares what they compute.

    python tests/before_after.py prepare OLD_CHECKOUT WORK     makes data, caches and unfinished runs
    python tests/before_after.py record CHECKOUT WORK NAME          writes WORK/NAME.json
    python tests/before_after.py compare WORK NAME OTHER            exit code 1 where anything differs

Records: losses and weights of 20 steps of the demo recipe, of the same continued from the old checkout's step 10, and
from the old checkout's latent cache; 8 demo videos (DDIM, 25 steps); the first 5 losses of the text demo.
Stays until the redesign is finished.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

STEPS = ["train.log_every=1", "train.checkpoint_every=10", "train.precision=fp32", "data.num_workers=2"]


def run(checkout: Path, *arguments: object) -> None:
    """Runs Python in a checkout, with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def train(checkout: Path, work: Path, out: Path, steps: int, *overrides: str, config: str = "demo_train") -> None:
    where = [f"train.output_dir={out}", f"train.max_steps={steps}", *STEPS]
    data = [f"data.path={work / 'data'}", *overrides]
    run(checkout, "train.py", "--config", f"configs/demo/{config}.yaml", *where, *data)


def text(work: Path) -> list[str]:
    """The overrides of the text demo."""
    return [f"data.latents={work / 'latents'}", f"text.features={work / 'features'}", f"text.path={work / 't5'}"]


def prepare(checkout: Path, work: Path) -> None:
    """Makes what later versions have to read: data, caches, and runs of 10 steps."""
    work.mkdir(parents=True)
    run(checkout, "-m", "tools.make_demo_data", "--out", work / "data")
    run(checkout, "-m", "tools.make_demo_text_encoder", "--out", work / "t5")
    config = ["--config", "configs/demo/demo_t2v_train.yaml", f"data.path={work / 'data'}", f"text.path={work / 't5'}"]
    run(checkout, "-m", "tools.cache_latents", *config, "--out", work / "latents")
    run(checkout, "-m", "tools.cache_text", *config, "--out", work / "features")
    train(checkout, work, work / "ten", 10)


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def facts(out: Path) -> dict[str, Any]:
    """Returns the losses of a run and the hashes of its last weights."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = sorted((out / "checkpoints").glob("step-*"))[-1]
    weights = {file.name: digest(file) for file in sorted(last.glob("*.safetensors"))}
    return {"losses": [row["loss"] for row in rows if "loss" in row], "weights": weights}


def record(checkout: Path, work: Path, name: str) -> None:
    """Computes everything in `checkout` and writes it down."""
    out = work / f"runs-{name}"
    shutil.rmtree(out, ignore_errors=True)
    train(checkout, work, out / "whole", 20)
    shutil.copytree(work / "ten", out / "continued")
    train(checkout, work, out / "continued", 20)
    train(checkout, work, out / "cached", 20, f"data.latents={work / 'latents'}")
    train(checkout, work, out / "text", 5, *text(work), config="demo_t2v_train")
    sampler = ["--config", "configs/demo/demo_sample.yaml", "--method", "ddim", "--steps", 25, "--num_videos", 8]
    run(checkout, "sample/sample.py", *sampler, "--save_video_path", out / "samples")
    found = {kind: facts(out / kind) for kind in ("whole", "continued", "cached", "text")}
    videos = {file.name: digest(file) for file in sorted((out / "samples").glob("*.mp4"))}
    (work / f"{name}.json").write_text(json.dumps({**found, "samples": videos}, indent=2) + "\n")


def compare(work: Path, name: str, other: str) -> int:
    """Prints what differs; returns the exit code."""
    one, two = (json.loads((work / f"{each}.json").read_text()) for each in (name, other))
    wrong = [kind for kind in one if one[kind] != two[kind]]
    print(f"{', '.join(wrong)} differ" if wrong else f"equal: {', '.join(one)}")
    return bool(wrong)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "compare":
        sys.exit(compare(Path(arguments[0]), *arguments[1:]))
    {"prepare": prepare, "record": record}[command](*(Path(each).resolve() for each in arguments[:2]), *arguments[2:])
