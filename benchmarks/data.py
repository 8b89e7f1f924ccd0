"""Cost of reading clips: from files, frames and latents, as ratios of one run.

Draws clips of 240 frames of 256 x 256, caches them by an autoencoder of the usual shape (4 channels, 8-fold, mean and
deviation), reads 16 frames at a time from each in turn, round after round, and trains a few steps of Latte-S/2 from the
latents. The reference decodes the whole file, as the official loaders do. `--videos` adds files of your own.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image

from datasets import build_dataset, open_video
from datasets.clips import Pixels
from engine.config import load_config
from engine.distributed import World
from engine.stream import ClipStream, PositionBatches, load_micro_batches
from engine.trainer import Trainer
from tools.caching.latents import cache_latents

from . import report
from .timing import Timer, Timing

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
    """Draws moving textures with noise: `files12` and so on by the distance of key frames, `frames` as JPEG."""
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
    """Writes a uint8 (T, H, W, 3) array with the defaults of x264, but with key frames at that distance only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": str(key_distance), "sc_threshold": "0"})
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def save_codec(folder: Path) -> list[str]:
    """Saves a small random AutoencoderKL with Stable Diffusion's latent shape; returns the overrides that name it."""
    import diffusers

    torch.manual_seed(0)
    sides = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    sizes = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    codec = diffusers.AutoencoderKL(down_block_types=sides[0], up_block_types=sides[1], **sizes)
    codec.save_pretrained(folder)
    return [f"codec.path={folder}"]


def decode_file(path: str | Path) -> Any:
    """Decodes every frame of a file to (T, H, W, 3) uint8: the reference."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# ----------------------------------------------------------------------------------------------- reading


def measure_reading(videos: dict[str, Path], rounds: int) -> dict[str, dict[str, Timing]]:
    """Times decoding the whole file and 16 frames from random places, for each video, on one thread."""
    timer = Timer(rounds=4 * rounds, clock="cpu")

    def read_sixteen(path: Path, draw: random.Random) -> None:
        reader = open_video(path)
        start = draw.randrange(len(reader) - 15)
        reader.read(range(start, start + 16))

    found = {}
    for name, path in videos.items():
        draw = random.Random(0)
        calls = {"whole": partial(decode_file, path), "ours": partial(read_sixteen, path, draw)}
        found[name] = timer.time(calls)
    return found


# ----------------------------------------------------------------------------------------------- loading


class WholeFile(Pixels):
    """Reads clips as training does, but decodes the whole file for each."""

    def read(self, opened: Any, clip: Any, indices: list[int]) -> Any:
        return torch.from_numpy(decode_file(clip.path)[indices]).permute(0, 3, 1, 2).contiguous()


def clips_per_second(dataset: Any, workers: int, seconds: float) -> float:
    """Returns the rate of the training's loader in batches of two, after its first ones."""
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
    """Returns clips/s of every data set and number of workers, measured in turn, round after round."""
    found: dict[tuple[str, int], list[float]] = {(name, workers): [] for name in data for workers in WORKERS}
    for _ in range(rounds):
        for name, workers in found:
            if name == "whole files" and workers:
                continue  # only the reference value is needed
            found[name, workers].append(clips_per_second(data[name], workers, seconds))
    return {key: rates for key, rates in found.items() if rates}


def data_sets(root: Path, cache: Path) -> dict[str, Any]:
    """Returns the data sets that read the same 16 frames of 256 x 256."""

    def build(folder: str, *extra: str) -> Any:
        return build_dataset(load_config(None, [*SETTINGS, f"data.path={root / folder}", *extra]).data, seed=0)

    files = {f"files, a key frame every {distance}": build(f"files{distance}") for distance in KEY_FRAMES}
    whole = build(f"files{KEY_FRAMES[0]}")
    whole.source = WholeFile(whole.config)
    latents = build("frames", f"data.latents={cache}")
    return {"whole files": whole, **files, "frames (JPEG)": build("frames"), "latents (fp32)": latents}


# ---------------------------------------------------------------------------------------------- training


def measure_waiting(root: Path, overrides: Sequence[str], steps: int) -> list[dict[str, Any]]:
    """Trains a few steps; returns the rows of metrics.jsonl but the first, which starts the worker."""
    out = Path(tempfile.mkdtemp(dir=root))
    keys = [f"train.output_dir={out}", f"train.max_steps={steps + 1}", "train.checkpoint_every=1000000"]
    trainer = Trainer(load_config(None, [*SETTINGS, *STEP, *overrides, *keys]), World())
    trainer.run.save = lambda state: None  # type: ignore[method-assign]
    trainer.fit()
    shown = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return shown[1:]


# ------------------------------------------------------------------------------------------------ report


def format_spread(values: Sequence[float], digits: int = 1) -> str:
    """Formats the median, and the least and the most in brackets."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def reading_section(found: dict[str, dict[str, Timing]]) -> report.Section:
    """Returns the table of `measure_reading`."""
    rows = []
    for name, timings in found.items():
        whole, ours = ([1e3 * value for value in timings[key].seconds] for key in ("whole", "ours"))
        ratio = statistics.median(whole) / statistics.median(ours)
        rows.append(
            {"": name, "whole file, ms": format_spread(whole), "16 frames, ms": format_spread(ours), "ratio": ratio}
        )
    text = (
        f"From a random place of clips of {LENGTH} frames, {SIZE} x {SIZE}, H.264 (or the file named), against "
        "decoding every frame to RGB; CPU time, one thread; median (least to most). Frames between two key frames can "
        "only be decoded from the first of these on, so rare key frames cost."
    )
    columns = {"": "", "whole file, ms": "", "16 frames, ms": "", "ratio": ".1f"}
    return report.Section("Reading 16 frames of a file", text, columns, rows)


def loading_section(found: dict[tuple[str, int], list[float]]) -> report.Section:
    """Returns the table of `measure_loading`, with ratios to whole files without workers."""
    reference = statistics.median(found["whole files", 0])
    rows: dict[str, dict[str, Any]] = {}
    for (name, workers), rates in found.items():
        rate = statistics.median(rates)
        row = rows.setdefault(name, {"": name})
        row |= {f"{workers} workers": f"{rate:.1f}, x {rate / reference:.1f}", f"{workers} workers, all": rates}
    text = (
        "Clips/s, decoded, cropped and brought to [-1, 1] (latents: read), in batches of two; wall time, median. `x` "
        "is the ratio to whole files without workers."
    )
    columns = {"": "", **{f"{workers} workers": "" for workers in WORKERS}}
    return report.Section("Clips/s of the training's loader", text, columns, list(rows.values()))


def waiting_section(waiting: list[dict[str, Any]]) -> report.Section:
    """Returns the table of the trainer's log."""
    row = {
        "": f"{len(waiting)} steps",
        "s/step": format_spread([row["seconds_per_step"] for row in waiting], 2),
        "waiting for data, %": format_spread([100 * row["data_wait_share"] for row in waiting], 3),
    }
    text = "Latte-S/2, batch 2, one thread, one loader worker; from `metrics.jsonl`: median (least to most)."
    return report.Section("Training from latents", text, dict.fromkeys(row, ""), [row])


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints and writes the tables. Raises FileNotFoundError for a missing file of --videos."""
    for path in arguments.videos:
        if not path.is_file():
            raise FileNotFoundError(f"--videos: there is no file {path}.")

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw_clips(root)
        overrides = [*SETTINGS, *save_codec(root / "codec"), f"data.path={root / 'frames'}"]
        cache_latents(load_config(None, overrides), root / "cache", "fp32", 64 * 10**6, World())
        torch.set_num_threads(1)  # as in a loader's worker
        drawn = {f"a key frame every {each}": root / f"files{each}" / "0.mp4" for each in KEY_FRAMES}
        reading = measure_reading({**drawn, **{path.name: path for path in arguments.videos}}, arguments.rounds)
        loading = measure_loading(data_sets(root, root / "cache"), arguments.rounds)
        waiting = measure_waiting(root, [*overrides, f"data.latents={root / 'cache'}"], arguments.steps)
    sections = [reading_section(reading), loading_section(loading), waiting_section(waiting)]
    text = "The reference is the whole file decoded for every clip, as the official loaders do."
    report.write("data", "What it costs to read clips", text, sections, arguments.out)
