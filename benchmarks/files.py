"""Reading and evaluating video files: clips/s of every way, the training's wait for data, an evaluation's memory.

`data` reads 16 frames at a time of drawn clips of 240 frames of 256 x 256; the reference decodes the whole file, as the
official loaders do. `metrics` evaluates long real and short generated videos, whose frames the official tool needs as
JPEG first; a tiny network replaces I3D, so that reading is what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from datasets import build_dataset, open_video
from datasets.clips import Pixels
from engine.config import load_config
from engine.stream import ClipStream, load_micro_batches, position_batches
from tools.calc_metrics_for_dataset import main as evaluate

from . import report
from .report import Table
from .timing import Case, Timer
from .workload import Ours, Workload

SIZE = 256  # side of the clips in pixels
KEY_FRAMES = (12, 60, 240)  # frames from one to the next
SETTINGS = [
    *("data.name=folder", "data.labels=none", f"data.image_size={SIZE}", "data.num_frames=16"),
    *("data.frame_interval=1", "codec.latent_channels=4", "codec.downsample_factor=8"),
]


# ---- clips -------------------------------------------------------------------------------------


def draw_video(seed: int, frames: int, noise: int = 0) -> np.ndarray:
    """Draws (frames, SIZE, SIZE, 3) uint8: squares that move over a grainy picture, with `noise` grey levels."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    ground = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(np.int16)
    video = np.repeat((ground + rng.integers(-6, 7, ground.shape))[None], frames, axis=0)
    places, steps, sides = rng.integers(0, SIZE, (6, 2)), rng.integers(-5, 6, (6, 2)), rng.integers(20, 60, 6)
    for place, step, side, colour in zip(places, steps, sides, rng.integers(0, 256, (6, 3))):
        for frame in range(frames):
            y, x = (place + step * frame) % (SIZE - side)
            video[frame, y : y + side, x : x + side] = colour
    return np.clip(video + rng.integers(-noise, noise + 1, video.shape), 0, 255).astype(np.uint8)


def write_h264(path: Path, video: np.ndarray, key_distance: int = 250) -> None:
    """Writes (T, H, W, 3) uint8 with the defaults of x264, but with key frames at that distance only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": str(key_distance), "sc_threshold": "0"})
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_frames(folder: Path, video: np.ndarray) -> None:
    """Writes every frame of (T, H, W, 3) uint8 as JPEG."""
    folder.mkdir(parents=True)
    for number, frame in enumerate(video):
        Image.fromarray(frame).save(folder / f"{number:06d}.jpg", quality=90)


# ---- reading -----------------------------------------------------------------------------------


def decode_file(path: str | Path) -> Any:
    """Decodes every frame of a file to (T, H, W, 3) uint8: the reference."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


class WholeFile(Pixels):
    """Reads clips as training does, but decodes the whole file for each."""

    def read(self, opened: Any, clip: Any, indices: list[int]) -> Any:
        """Returns the frames as `Pixels.read` does."""
        return torch.from_numpy(decode_file(clip.path)[indices]).permute(0, 3, 1, 2).contiguous()


def reading_case(path: Path) -> Case:
    """Returns the reading of 16 frames from a random place of a file."""
    rng = random.Random(0)

    def read() -> None:
        reader = open_video(path)
        start = rng.randrange(len(reader) - 15)
        reader.read(range(start, start + 16))

    return Case(read)


def loading_case(streams: list[Iterator[Any]], dataset: Any, workers: int, batches: int) -> Case:
    """Returns the loading of some batches of two clips as in training, after the first ones of the loader.

    `streams` holds the one loader that is open: no other has idle workers meanwhile.
    """

    def prepare() -> None:
        streams.clear()
        positions = position_batches(0, batch_size=2, rank=0, world_size=1)
        streams.append(load_micro_batches(ClipStream(dataset, 0), positions, workers, False, 60.0))
        load(2 + 4 * workers)

    def load(count: int) -> None:
        for _ in range(count):
            next(streams[0])

    return Case(lambda: load(batches), 2 * batches, prepare=prepare)


def data(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[Table]:
    """Yields the tables of reading, loading and training. Raises FileNotFoundError for a missing file of --videos."""
    for path in arguments.videos:
        if not path.is_file():
            raise FileNotFoundError(f"--videos: there is no file {path}.")
    torch.set_num_threads(1)  # as in a loader's worker
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for clip in range(2):
            video = draw_video(clip, 240, noise=8)
            write_frames(root / "frames" / str(clip), video)
            for distance in KEY_FRAMES:
                write_h264(root / f"files{distance}" / f"{clip}.mp4", video, distance)
        text = (
            f"From a random place of clips of 240 frames, {SIZE} x {SIZE}, H.264 (or the file named), against decoding "
            "every frame to RGB; CPU time, one thread, median. Frames between two key frames can only be decoded from "
            "the first of these on, so rare key frames cost."
        )
        reading = Table("Reading 16 frames of a file", text, ("whole file, ms", "16 frames, ms", "ratio"))
        files = {f"a key frame every {each}": root / f"files{each}" / "0.mp4" for each in KEY_FRAMES}
        often = Timer(rounds=4 * arguments.rounds, clock="cpu")
        for name, file in {**files, **{path.name: path for path in arguments.videos}}.items():
            whole = partial(Case, partial(decode_file, file))
            reading.rows.append(
                often.compare_pair(name, {"whole file": whole, "16 frames": partial(reading_case, file)})
            )
            yield reading
        keys = {"data.num_workers": 1, "train.log_every": 1, "train.max_steps": arguments.steps + 1}
        ours = Ours(Workload(batch=2).but({**keys, "train.checkpoint_every": 10**6}), torch.device("cpu"))
        yield measure_loading(root, ours.trainer.run.clips, timer)
        yield measure_waiting(ours)


def measure_loading(root: Path, latents: Any, timer: Timer) -> Table:
    """Returns the rates of the training's loader for each kind of file and number of workers."""

    def build(folder: str) -> Any:
        return build_dataset(load_config(None, [*SETTINGS, f"data.path={root / folder}"]).data, seed=0)

    whole = build(f"files{KEY_FRAMES[0]}")
    whole.source = WholeFile(whole.config)
    sets = {f"files, a key frame every {each}": (build(f"files{each}"), 30) for each in KEY_FRAMES}
    sets |= {"frames (JPEG)": (build("frames"), 30), "latents (fp32)": (latents, 500)}  # batches to load
    streams: list[Iterator[Any]] = []
    makers = {"whole files, 0 workers": partial(loading_case, streams, whole, 0, 5)}
    for name, (dataset, batches) in sets.items():
        for workers in (0, 1, 2):
            makers[f"{name}, {workers} workers"] = partial(loading_case, streams, dataset, workers, batches)
    text = "Decoded, cropped and brought to [-1, 1] (latents: read), in batches of two; `ratio` to the first row."
    heads = ("videos/s", "spread", "ratio")
    return Table("Clips/s of the training's loader", text, heads, timer.compare(makers, heads))


def measure_waiting(ours: Ours) -> Table:
    """Trains; returns a table of the log, without its first step, which starts the worker."""
    ours.trainer.run.save = lambda state: None  # type: ignore[method-assign]
    ours.trainer.fit()
    log = Path(ours.trainer.config.train.output_dir, "metrics.jsonl")
    shown = [json.loads(line) for line in log.read_text().splitlines()][1:]
    heads = {"seconds_per_step": "s/step", "data_wait_share": "share"}
    row = {head: statistics.median(row[key] for row in shown) for key, head in heads.items()}
    text = "Latte-S/2, batch 2, one thread, one loader worker; `share` of the time is waiting for data, median."
    return Table("Training from latents", text, ("s/step", "share"), [{"": f"{len(shown)} steps", **row}])


# ---- evaluating --------------------------------------------------------------------------------

FRAMES = {"real": 128, "fake": 16}  # of each drawn video
DISTINCT = 64  # drawn videos of each side; further clips are links to them
SUFFIXES = {"frames": "", "videos": ".mp4", "arrays": ".npy"}
# name -> real side, fake side, whether the real side is cached
WAYS = {
    "frames, extracted beforehand": ("frames", "frames", 0),
    "videos": ("videos", "videos", 0),
    "videos, fakes as arrays": ("videos", "arrays", 0),
    "real side cached, fakes as arrays": ("videos", "arrays", 1),
}
MEMORY_CLIPS = (256, 2048)


class Tiny(nn.Module):
    """A network with I3D's signature: a convolution on frames of 56 x 56."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 400, (3, 8, 8), stride=(2, 8, 8))

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        """Returns features (B, 400) of clips (B, 3, F, H, W)."""
        x = nn.functional.interpolate(x.float() / 255, [x.shape[2], 56, 56])
        return torch.tanh(self.conv(x)).mean([2, 3, 4])


def metrics(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[Table]:
    """Yields the tables of rates and of memory."""
    clips = arguments.clips
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        seconds = sum(draw_side(root / side, frames) for side, frames in FRAMES.items()) * clips / DISTINCT
        torch.manual_seed(0)
        torch.jit.script(Tiny().eval()).save(str(root / "tiny.pt"))

        def case(real: str, fake: str, cached: int) -> Case:
            argv = build_command(root, real, fake, clips, arguments.workers, cached)

            def call() -> None:
                with contextlib.redirect_stdout(io.StringIO()):
                    evaluate(argv)

            return Case(call, 2 * clips)

        heads = ("videos/s", "ratio")
        rows = replace(timer, rounds=1).compare({name: partial(case, *way) for name, way in WAYS.items()}, heads)
        whole = 2 * clips / (rows[0]["seconds"][0] + seconds)
        rows.append(
            {
                "": "frames, with the time of extracting them",
                "videos/s": whole,
                "ratio": whole / rows[0]["videos/s"],
            }
        )
        text = (
            f"{clips} clips of 16 frames a side, {SIZE} x {SIZE}, from real videos of {FRAMES['real']} frames and "
            f"generated ones of {FRAMES['fake']}; {arguments.workers} loader processes; the whole command, from its "
            "start to the written result. Videos are drawn with a grain that does not change, and are longer than the "
            "64 frames up to which a clip is decoded whole once to prove its index. Shorter videos are decoded twice "
            "and noisy ones take longer, so they are slower than here."
        )
        yield Table("Clips/s by what is read", text, heads, rows)
        memory = Table("Memory", "Largest resident set of any process, videos against arrays.", ("peak MiB",))
        for count in MEMORY_CLIPS:
            argv = build_command(root, "videos", "arrays", count, arguments.workers, 0)
            memory.rows.append({"": f"{count} clips a side", "peak MiB": find_peak(argv)})
            yield memory


def draw_side(side: Path, frames: int) -> float:
    """Draws the distinct clips of a side as videos, arrays and frames; returns the seconds to extract the frames."""
    for number in range(DISTINCT):
        video = draw_video(number, frames)
        write_h264(side / "drawn" / f"{number:06d}.mp4", video)
        np.save(side / "drawn" / f"{number:06d}.npy", video)
    started = time.perf_counter()
    for file in sorted((side / "drawn").glob("*.mp4")):
        reader = open_video(file)
        write_frames(file.with_suffix(""), reader.read(range(len(reader))).permute(0, 2, 3, 1).numpy())
    return time.perf_counter() - started


def link_clips(side: Path, form: str, clips: int) -> Path:
    """Returns a folder of `clips` clips, each a link or a folder of links to a drawn one."""
    folder = side / f"{form}{clips}"
    if not folder.exists():
        folder.mkdir()
        for number in range(clips):
            source = side / "drawn" / f"{number % DISTINCT:06d}{SUFFIXES[form]}"
            link = partial(shutil.copytree, copy_function=os.link) if source.is_dir() else os.link
            link(source, folder / f"{number:06d}{SUFFIXES[form]}")
    return folder


def build_command(root: Path, real: str, fake: str, clips: int, workers: int, cached: int) -> list[str]:
    """Returns the arguments that compare clips of two forms."""
    folders = link_clips(root / "real", real, clips), link_clips(root / "fake", fake, clips)
    return [
        *("--real_data_path", str(folders[0]), "--fake_data_path", str(folders[1]), "--metrics", f"fvd{clips}_16f"),
        *("--protocol", "stylegan-v", "--detector", str(root / "tiny.pt"), "--out", str(root / "result.json")),
        *("--cache_dir", str(root / "cache"), "--verbose", "0", "--device", "cpu", "--checks", "floor"),
        *("--use_cache", str(cached), "--workers", str(workers)),
    ]


def find_peak(argv: Sequence[str]) -> float:
    """Returns the largest resident set in MiB of any process of an evaluation."""
    command = [sys.executable, "-m", "tools.calc_metrics_for_dataset", *argv]
    process = subprocess.Popen(command, cwd=report.ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise OSError(f"an evaluation failed with exit code {process.returncode}: {' '.join(command)}")
    return usage.ru_maxrss / 1024
