"""What it costs to read clips: from files, from frames and from latents, as ratios of one run.

    python -m tools.bench_data [--rounds 5] [--videos FILE ...] [--out docs/benchmarks/data.md]

Draws clips of 240 frames of 256 x 256, caches them by an autoencoder of the usual shape (4 channels, 8-fold, mean and
deviation), reads 16 frames at a time by every way in turn, round after round, and trains a few steps of Latte-S/2 from
the latents. The reference is the whole file decoded, as the official loaders do. `--videos` adds files of your own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from engine import cli

ROOT = Path(__file__).resolve().parent.parent
LENGTH, SIZE, CLIPS = 240, 256, 2  # frames of a clip, its side in pixels, clips of each kind
KEY_FRAMES = (12, 60, 240)  # frames from one to the next
WORKERS = (0, 1, 2)
SETTINGS = [
    *("data.name=folder", "data.labels=none", f"data.image_size={SIZE}", "data.num_frames=16"),
    *("data.frame_interval=1", "codec.latent_channels=4", "codec.downsample_factor=8"),
]
STEP = ["model.name=Latte-S/2", "train.batch_size=2", "train.log_every=1", "data.num_workers=1"]


# ------------------------------------------------------------------------------------------------- clips


def draw_clips(root: Path) -> None:
    """Moving textures with noise: `files12` and so on by the distance of key frames, `frames` as JPEG."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(0, 256, (40, 40, 3)), np.ones((16, 16, 1), int)).astype(np.int16)
    for clip in range(CLIPS):
        noise = rng.integers(-8, 9, (LENGTH, SIZE, SIZE, 3), dtype=np.int16)
        places = [((4 * clip + number) % 300, 2 * number % 300) for number in range(LENGTH)]
        still = np.stack([texture[top:, left:][:SIZE, :SIZE] for top, left in places])
        video = np.clip(still + noise, 0, 255).astype(np.uint8)
        for distance in KEY_FRAMES:
            write_h264(root / f"files{distance}" / f"{clip}.mp4", video, distance)
        folder = root / "frames" / str(clip)
        folder.mkdir(parents=True)
        for number, frame in enumerate(video):
            Image.fromarray(frame).save(folder / f"{number:03d}.jpg", quality=90)


def write_h264(path: Path, video: Any, key_distance: int) -> None:
    """Write a uint8 (T, H, W, 3) array as x264 does by default, but with key frames at that distance alone."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": str(key_distance), "sc_threshold": "0"})
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def save_codec(folder: Path) -> list[str]:
    """A random AutoencoderKL of Stable Diffusion's latent shape and few weights; overrides that name it."""
    import diffusers
    import torch

    torch.manual_seed(0)
    sides = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    sizes = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    codec = diffusers.AutoencoderKL(down_block_types=sides[0], up_block_types=sides[1], **sizes)
    codec.save_pretrained(folder)
    return [f"codec.path={folder}"]


def whole_file(path: str | Path) -> Any:
    """Every frame of a file as (T, H, W, 3) uint8: the reference."""
    import av
    import numpy as np

    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# ----------------------------------------------------------------------------------------------- reading


def seconds_of(calls: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, list]:
    """Seconds of each call in each round, all in turn; one call before them is not counted."""
    found: dict[str, list] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            found[name].append(clock() - start)
    return found


def measure_reading(videos: dict[str, Path], rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """CPU seconds of (the whole file, 16 frames of it from random places), for each video, on one thread."""
    import random

    from datasets import open_video

    def sixteen(path: Path, draw: random.Random) -> None:
        reader = open_video(path)
        start = draw.randrange(len(reader) - 15)
        reader.read(range(start, start + 16))

    found = {}
    for name, path in videos.items():
        draw = random.Random(0)
        calls = {"whole": partial(whole_file, path), "ours": partial(sixteen, path, draw)}
        seconds = seconds_of(calls, 4 * rounds, time.process_time)
        found[name] = (seconds["whole"], seconds["ours"])
    return found


# ----------------------------------------------------------------------------------------------- loading


def whole_file_source(config: Any) -> Any:
    """Clips as training gets them, but with the whole file decoded for each."""
    import torch

    from datasets.clips import Pixels

    class WholeFile(Pixels):
        def read(self, opened: Any, clip: Any, indices: list[int]) -> Any:
            return torch.from_numpy(whole_file(clip.path)[indices]).permute(0, 3, 1, 2).contiguous()

    return WholeFile(config)


def clips_per_second(dataset: Any, workers: int, seconds: float) -> float:
    """Of the training's own loader, batches of two, after its first ones."""
    from engine.stream import ClipStream, PositionBatches, load_micro_batches

    batches = load_micro_batches(
        ClipStream(dataset, 0), PositionBatches(0, batch_size=2, rank=0, world_size=1), workers, False, 60.0
    )
    for _ in range(2 + 4 * workers):
        next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        next(batches)
        count += 2
    return count / (time.perf_counter() - start)


def measure_loading(data: dict[str, Any], rounds: int, seconds: float = 2.0) -> dict[tuple[str, int], list[float]]:
    """Clips/s of every data set with every number of workers, in turn, round after round."""
    found: dict[tuple[str, int], list[float]] = {(name, workers): [] for name in data for workers in WORKERS}
    for _ in range(rounds):
        for name, workers in found:
            if name == "whole files" and workers:
                continue  # its class is local to this process
            found[name, workers].append(clips_per_second(data[name], workers, seconds))
    return {key: rates for key, rates in found.items() if rates}


def data_sets(root: Path, cache: Path) -> dict[str, Any]:
    """Every way to the same 16 frames of 256 x 256."""
    from datasets import build_dataset
    from engine.config import load_config

    def made(folder: str, *extra: str) -> Any:
        return build_dataset(load_config(None, [*SETTINGS, f"data.path={root / folder}", *extra]).data, seed=0)

    files = {f"files, a key frame every {distance}": made(f"files{distance}") for distance in KEY_FRAMES}
    whole = made(f"files{KEY_FRAMES[0]}")
    whole.source = whole_file_source(whole.config)
    latents = made("frames", f"data.latents={cache}")
    return {"whole files": whole, **files, "frames (JPEG)": made("frames"), "latents (fp32)": latents}


# ---------------------------------------------------------------------------------------------- training


def measure_waiting(root: Path, overrides: Sequence[str], steps: int) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of a few training steps; the first, which starts the worker, left out."""
    import json

    from engine.config import load_config
    from engine.distributed import World
    from engine.trainer import Trainer

    out = Path(tempfile.mkdtemp(dir=root))
    keys = [f"train.output_dir={out}", f"train.max_steps={steps + 1}", "train.checkpoint_every=1000000"]
    trainer = Trainer(load_config(None, [*SETTINGS, *STEP, *overrides, *keys]), World())
    trainer.save = lambda: None  # type: ignore[method-assign]
    trainer.fit()
    shown = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return shown[1:]


# ------------------------------------------------------------------------------------------------ report


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median and, in brackets, the least and the most."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def reading_table(found: dict[str, tuple[list[float], list[float]]]) -> str:
    """Milliseconds and ratios of `measure_reading`."""
    rows = ""
    for name, (whole, ours) in found.items():
        pairs = [[1e3 * value for value in column] for column in (whole, ours)]
        ratio = statistics.median(whole) / statistics.median(ours)
        rows += f"| {name} | {spread(pairs[0])} | {spread(pairs[1])} | {ratio:.1f} |\n"
    return "| file | whole file, ms | 16 frames, ms | times as fast |\n|---|---|---|---|\n" + rows


def loading_table(found: dict[tuple[str, int], list[float]]) -> str:
    """Clips/s of `measure_loading`, and their ratio to whole files."""
    reference = statistics.median(found["whole files", 0])
    rows = ""
    for name in dict.fromkeys(name for name, _ in found):
        cells = [
            f"{spread(rates)}, x {statistics.median(rates) / reference:.1f}" if rates else "-"
            for rates in (found.get((name, workers)) for workers in WORKERS)
        ]
        rows += f"| {name} | {' | '.join(cells)} |\n"
    head = " | ".join(f"{workers} workers" for workers in WORKERS)
    return f"| from | {head} |\n|---|{'---|' * len(WORKERS)}\n" + rows


def report(
    reading: dict[str, tuple[list[float], list[float]]],
    loading: dict[tuple[str, int], list[float]],
    waiting: list[dict[str, Any]],
    command: str,
) -> str:
    """The Markdown page."""
    import av
    import torch

    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    shares = [100 * row["data_wait_share"] for row in waiting]
    steps = [row["seconds_per_step"] for row in waiting]
    return (
        "# What it costs to read clips\n\n"
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end (the machine was "
        f"shared: compare ratios), Python {platform.python_version()}, torch {torch.__version__}, PyAV "
        f"{av.__version__}; commit {commit}; `{command}`. Median (least to most).\n\n"
        f"## Reading 16 frames of a file\n\nFrom a random place of clips of {LENGTH} frames, {SIZE} x {SIZE}, H.264 "
        "(or the file named), against decoding every frame to RGB; CPU time, one thread. Frames between two key frames "
        "can only be had by decoding from the first of these on, so rare key frames cost.\n\n"
        f"{reading_table(reading)}\n"
        "## Clips/s of the training's loader\n\nDecoded, cropped and brought to [-1, 1] (latents: read), in batches of "
        "two; wall time. `x` is the ratio to whole files without workers.\n\n"
        f"{loading_table(loading)}\n"
        "## Training from latents\n\n"
        f"Latte-S/2, batch 2, one thread, one loader worker, {len(waiting)} steps of {spread(steps, 2)} s: waiting "
        f"for data took {spread(shares, 3)} % of a step.\n"
    )


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of each measurement (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of the training (%(default)s)")
    parser.add_argument("--videos", type=Path, nargs="*", default=[], metavar="FILE", help="read these too")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/data.md"), help="page (%(default)s)")
    arguments = parser.parse_args(argv)
    for path in arguments.videos:
        if not path.is_file():
            raise FileNotFoundError(f"--videos: there is no file {path}.")

    import torch

    from engine.config import load_config
    from engine.distributed import World
    from tools.caching import cache_latents

    root = Path(tempfile.mkdtemp())
    try:
        draw_clips(root)
        overrides = [*SETTINGS, *save_codec(root / "codec"), f"data.path={root / 'frames'}"]
        cache_latents(load_config(None, overrides), root / "cache", "fp32", 64 * 10**6, World())
        torch.set_num_threads(1)  # as in a loader's worker; and the machine may have other users
        drawn = {f"a key frame every {each}": root / f"files{each}" / "0.mp4" for each in KEY_FRAMES}
        reading = measure_reading({**drawn, **{path.name: path for path in arguments.videos}}, arguments.rounds)
        loading = measure_loading(data_sets(root, root / "cache"), arguments.rounds)
        waiting = measure_waiting(root, [*overrides, f"data.latents={root / 'cache'}"], arguments.steps)
    finally:
        shutil.rmtree(root)
    names = [path.name for path in arguments.videos]
    command = " ".join(["python -m tools.bench_data", f"--rounds {arguments.rounds} --steps {arguments.steps}"])
    page = report(reading, loading, waiting, " ".join([command, *(["--videos", *names] if names else [])]))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(page)
    print(page)
    return 0


if __name__ == "__main__":
    cli.run(main)
