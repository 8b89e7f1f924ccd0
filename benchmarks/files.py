"""Times reading and evaluating video files: the cost of a clip by file format, and how long training waits for data.

`data` reads 16 frames at a time from drawn clips of 240 frames of 256 x 256; the reference decodes the whole file, as
the official loaders do. `metrics` evaluates long real and short generated videos, which the official tool needs as JPEG
frames; a tiny network replaces I3D, so that mainly reading is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from datasets import ClipDataset, build_dataset
from datasets.clips import Pixels
from engine.config import load_config
from tools.calc_metrics_for_dataset import main as evaluate

from .report import Table
from .timing import Case, Timer
from .workload import Ours, Workload

SIZE = 256  # side of the clips in pixels
KEY_FRAMES = (12, 60, 240)  # distances between key frames
STEPS = 10  # of training
SETTINGS = [
    *("data.name=folder", "data.labels=none", f"data.image_size={SIZE}", "data.num_frames=16"),
    *("data.frame_interval=1", "codec.latent_channels=4", "codec.downsample_factor=8"),
]


def draw_video(seed: int, frames: int, noise: int = 0) -> np.ndarray:
    """Draws (frames, SIZE, SIZE, 3) uint8: squares moving over a grainy picture, with `noise` grey levels of noise."""
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
    """Writes (T, H, W, 3) uint8 with x264's defaults, but one key frame every `key_distance` frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"g": str(key_distance), "sc_threshold": "0"})
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_frames(folder: Path, video: np.ndarray) -> None:
    """Writes every frame of (T, H, W, 3) uint8 as JPEG."""
    folder.mkdir(parents=True)
    for number, frame in enumerate(video):
        Image.fromarray(frame).save(folder / f"{number:06d}.jpg", quality=90)


def decode_file(path: str | Path) -> np.ndarray:
    """Decodes every frame of a file to (T, H, W, 3) uint8: the reference."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# ---- reading -----------------------------------------------------------------------------------


class WholeFile(Pixels):
    """Reads clips as training does, but decodes the whole file for each."""

    def read(self, opened: Any, clip: Any, indices: list[int]) -> Any:
        """Returns the frames as `Pixels.read` does."""
        return torch.from_numpy(decode_file(clip.path)[indices]).permute(0, 3, 1, 2).contiguous()


def data(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[Table]:
    """Yields the tables of reading a clip and of the training's wait for data."""
    torch.set_num_threads(1)  # as in a loader's worker
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for clip in range(2):
            video = draw_video(clip, 240, noise=8)
            write_frames(root / "frames" / str(clip), video)
            for distance in KEY_FRAMES:
                write_h264(root / f"files{distance}" / f"{clip}.mp4", video, distance)

        def build(form: str) -> ClipDataset:
            return build_dataset(load_config(None, [*SETTINGS, f"data.path={root / form}"]).data, seed=0)

        whole = build(f"files{KEY_FRAMES[0]}")
        whole.source = WholeFile(whole.config)
        sets = {"whole file": whole, **{f"a key frame every {each}": build(f"files{each}") for each in KEY_FRAMES}}
        keys = {"data.num_workers": 1, "train.log_every": 1, "train.max_steps": STEPS + 1}
        ours = Ours(Workload(batch=2).but({**keys, "train.checkpoint_every": 10**6}), torch.device("cpu"))
        sets |= {"frames (JPEG)": build("frames"), "latents (fp32)": ours.trainer.run.clips}

        def make(dataset: ClipDataset) -> Case:
            epochs = itertools.count()
            return Case(lambda: [dataset[next(epochs), 0]["index"] for _ in range(4)], repeats=4)

        text = (
            f"16 frames from a random position in clips of 240 frames, {SIZE} x {SIZE}, H.264 unless named otherwise: "
            "decoded, cropped and scaled to [-1, 1]; CPU time, one thread. Decoding must start at a key frame, so rare "
            "key frames cost time."
        )
        heads = ("ms", "spread", "ratio", "videos/s")
        makers = {name: partial(make, dataset) for name, dataset in sets.items()}
        yield Table("Reading a clip", text, heads, replace(timer, clock="cpu").compare(makers, heads))
        yield measure_waiting(ours)


def measure_waiting(ours: Ours) -> Table:
    """Trains; returns a table of the log without the first step, in which the worker starts."""
    ours.trainer.run.save = lambda state: None  # type: ignore[method-assign]
    ours.trainer.fit()
    log = Path(ours.trainer.config.train.output_dir, "metrics.jsonl")
    shown = [json.loads(line) for line in log.read_text().splitlines()][1:]
    heads = {"seconds_per_step": "s/step", "data_wait_share": "share"}
    row = {head: statistics.median(row[key] for row in shown) for key, head in heads.items()}
    text = (
        "Latte-S/2, batch 2, one thread, one loader worker; `share`: part of the time spent waiting for data; medians."
    )
    return Table("Training from latents", text, ("s/step", "share"), [{"": f"{len(shown)} steps", **row}])


# ---- evaluating --------------------------------------------------------------------------------

CLIPS = 64  # per side
FRAMES = {"real": 128, "fake": 16}  # per video
WAYS = {  # name -> real side, fake side, whether the real side is cached
    "frames, extracted beforehand": ("frames", "frames", 0),
    "videos": ("videos", "videos", 0),
    "videos, fakes as arrays": ("videos", "arrays", 0),
    "real side cached, fakes as arrays": ("videos", "arrays", 1),
}


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
    """Yields the table of evaluation rates."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for side, frames in FRAMES.items():
            for number in range(CLIPS):
                video = draw_video(number, frames)
                write_h264(root / side / "videos" / f"{number:03d}.mp4", video)
                (root / side / "arrays").mkdir(exist_ok=True)
                np.save(root / side / "arrays" / f"{number:03d}.npy", video)
        started = time.perf_counter()
        for file in root.glob("*/videos/*.mp4"):
            write_frames(file.parents[1] / "frames" / file.stem, decode_file(file))
        seconds = time.perf_counter() - started
        torch.manual_seed(0)
        torch.jit.script(Tiny().eval()).save(str(root / "tiny.pt"))

        def make(real: str, fake: str, cached: int) -> Case:
            argv = [
                *("--real_data_path", f"{root}/real/{real}", "--fake_data_path", f"{root}/fake/{fake}"),
                *("--metrics", f"fvd{CLIPS}_16f", "--protocol", "stylegan-v", "--detector", f"{root}/tiny.pt"),
                *("--out", f"{root}/result.json", "--cache_dir", f"{root}/cache", "--use_cache", str(cached)),
                *("--checks", "floor", "--device", "cpu", "--verbose", "0"),
            ]

            def call() -> None:
                with contextlib.redirect_stdout(io.StringIO()):
                    evaluate(argv)

            return Case(call, 2 * CLIPS)

        heads = ("videos/s", "ratio")
        rows = replace(timer, rounds=1).compare({name: partial(make, *way) for name, way in WAYS.items()}, heads)
        whole = 2 * CLIPS / (rows[0]["seconds"][0] + seconds)
        cells = {"videos/s": whole, "ratio": whole / rows[0]["videos/s"]}
        rows.append({"": "frames, with the time of extracting them", **cells})
    text = (
        f"{CLIPS} clips of 16 frames per side, {SIZE} x {SIZE}, from real videos of {FRAMES['real']} frames and fakes "
        f"of {FRAMES['fake']}; two loader processes; time of the whole command, up to the written result. "
        "The videos have a constant grain, and the real ones exceed the 64 frames up to which a clip is decoded whole "
        "once to verify its index. Shorter videos, which are decoded twice, and noisy ones are slower."
    )
    yield Table("Clips/s by what is read", text, heads, rows)
