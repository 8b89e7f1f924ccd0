"""Cost of an evaluation: clips/s from videos and arrays against extracted frames; memory by the number of clips.

Draws long real and short generated videos, and extracts their frames as JPEG, which the official tool needs first. A
tiny network replaces I3D, so that reading is what is measured. All ways are measured in turn, twice, in one run, and
the faster of each is taken; the figures are ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from datasets.readers import open_video
from sample.video_io import write_mp4
from tools.calc_metrics_for_dataset import main as evaluate

from . import report

FRAMES, SIZE = {"real": 128, "fake": 16}, 256  # of each drawn video
DISTINCT = 64  # drawn videos of each side; further clips are links to them
# name -> real side, fake side, whether the real side is cached
WAYS = {
    "frames, extracted beforehand": ("frames", "frames", False),
    "videos": ("videos", "videos", False),
    "videos, fakes as arrays": ("videos", "arrays", False),
    "real side cached, fakes as arrays": ("videos", "arrays", True),
}
MEMORY_CLIPS = (256, 2048)


def draw_sets(root: Path, clips: int) -> float:
    """Draws the clips of both sides in every form; returns the seconds to extract all frames."""
    seconds = 0.0
    for side, frames in FRAMES.items():
        drawn = root / side / "drawn"
        for number in range(DISTINCT):
            video = draw_video(number, frames)
            write_mp4(drawn / f"{number:06d}.mp4", video)
            np.save(drawn / f"{number:06d}.npy", video)
        seconds += extract_frames(drawn)
        for form, suffix in (("frames", ""), ("videos", ".mp4"), ("arrays", ".npy")):
            link_clips(drawn, root / side / form, suffix, clips)
    return seconds * clips / DISTINCT


def extract_frames(folder: Path) -> float:
    """Extracts every frame of every mp4 as JPEG, a folder for each; returns the seconds it took."""
    started = time.perf_counter()
    for file in sorted(folder.glob("*.mp4")):
        target = folder / file.stem
        target.mkdir()
        reader = open_video(file)
        for index, frame in enumerate(reader.read(range(len(reader))).permute(0, 2, 3, 1).numpy()):
            Image.fromarray(frame).save(target / f"{index:06d}.jpg")
    return time.perf_counter() - started


def link_clips(drawn: Path, folder: Path, suffix: str, clips: int) -> Path:
    """Fills a folder with `clips` clips, each a link or a folder of links to a drawn one."""
    folder.mkdir()
    for number in range(clips):
        source, target = drawn / f"{number % DISTINCT:06d}{suffix}", folder / f"{number:06d}{suffix}"
        if source.is_dir():
            shutil.copytree(source, target, copy_function=os.link)
        else:
            os.link(source, target)
    return folder


def draw_video(seed: int, frames: int) -> np.ndarray:
    """Draws (frames, SIZE, SIZE, 3) uint8: squares that move over a grainy picture of smooth colours."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    ground = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(np.int16)
    video = np.clip(ground + rng.integers(-6, 7, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
    video = np.repeat(video[None], frames, axis=0)
    for place, step, side, colour in zip(
        rng.integers(0, SIZE, (6, 2)),
        rng.integers(-5, 6, (6, 2)),
        rng.integers(20, 60, 6),
        rng.integers(0, 256, (6, 3)),
    ):
        for frame in range(frames):
            y, x = (place + step * frame) % (SIZE - side)
            video[frame, y : y + side, x : x + side] = colour
    return video


def write_detector(file: Path) -> Path:
    """Writes a TorchScript network with I3D's signature: a convolution on frames of 56 x 56."""

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(3, 400, (3, 8, 8), stride=(2, 8, 8))

        def forward(
            self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
        ) -> Tensor:
            x = nn.functional.interpolate(x.float() / 255, [x.shape[2], 56, 56])
            return torch.tanh(self.conv(x)).mean([2, 3, 4])

    torch.manual_seed(0)
    torch.jit.script(Tiny().eval()).save(str(file))
    return file


def build_command(root: Path, real: Path, fake: Path, clips: int, *more: str) -> list[str]:
    """Returns the arguments that compare two folders."""
    return [
        *("--real_data_path", str(real), "--fake_data_path", str(fake), "--metrics", f"fvd{clips}_16f"),
        *("--protocol", "stylegan-v", "--detector", str(root / "tiny.pt"), "--out", str(root / "result.json")),
        *("--cache_dir", str(root / "cache"), "--verbose", "0", "--device", "cpu", "--checks", "floor", *more),
    ]


def clips_per_second(root: Path, way: str, clips: int, workers: int) -> float:
    """Runs the whole command in this process; returns its rate over both sides."""
    real, fake, cached = WAYS[way]
    more = ("--use_cache", str(int(cached)), "--workers", str(workers))
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        evaluate(build_command(root, root / "real" / real, root / "fake" / fake, clips, *more))
    return 2 * clips / (time.perf_counter() - started)


def measure_rates(root: Path, clips: int, workers: int) -> dict[str, float]:
    """Returns clips/s of every way; the first evaluation with the cache fills it."""
    found = dict.fromkeys(WAYS, 0.0)
    for _ in range(2):
        for way in WAYS:
            found[way] = max(found[way], clips_per_second(root, way, clips, workers))
    return found


def peak_mib(root: Path, clips: int, workers: int) -> float:
    """Returns the largest resident set of any process of a command that compares videos with arrays."""
    real = link_clips(root / "real" / "drawn", root / f"real{clips}", ".mp4", clips)
    fake = link_clips(root / "fake" / "drawn", root / f"fake{clips}", ".npy", clips)
    argv = build_command(root, real, fake, clips, "--use_cache", "0", "--workers", str(workers))
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.calc_metrics_for_dataset", *argv], cwd=report.ROOT, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise OSError(f"evaluating {clips} clips failed with exit code {process.returncode}.")
    return usage.ru_maxrss / 1024


def build_sections(
    rates: dict[str, float], seconds: float, memory: dict[int, float], clips: int
) -> list[report.Section]:
    """Returns the tables: rates against frames, and memory by the number of clips."""
    frames = rates["frames, extracted beforehand"]
    whole = 2 * clips / (2 * clips / frames + seconds)
    found = {**rates, "frames, with the time of extracting them": whole}
    rows: list[dict[str, Any]] = [
        {"": name, "clips/s": rate, "over frames": rate / frames} for name, rate in found.items()
    ]
    peaks: list[dict[str, Any]] = [{"": f"{count} clips a side", "peak MiB": peak} for count, peak in memory.items()]
    text = (
        "The whole command, from its start to the written result. Videos are drawn with a grain that does not change, "
        "and are longer than the 64 frames up to which a clip is decoded whole once to prove its index. Shorter videos "
        "are decoded twice and noisy ones take longer, so they are slower than here."
    )
    largest = "Largest resident set of any process, videos against arrays."
    return [
        report.Section("Clips/s by what is read", text, {"": "", "clips/s": ".1f", "over frames": ".2f"}, rows),
        report.Section("Memory", largest, {"": "", "peak MiB": ".0f"}, peaks),
    ]


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints and writes the tables."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        seconds = draw_sets(root, arguments.clips)
        write_detector(root / "tiny.pt")
        rates = measure_rates(root, arguments.clips, arguments.workers)
        memory = {count: peak_mib(root, count, arguments.workers) for count in MEMORY_CLIPS}
    text = (
        f"{arguments.clips} clips of 16 frames a side, {SIZE} x {SIZE}, from real videos of {FRAMES['real']} frames "
        f"and generated ones of {FRAMES['fake']}; a tiny network instead of I3D, so that reading is what is measured; "
        f"{arguments.workers} loader processes."
    )
    sections = build_sections(rates, seconds, memory, arguments.clips)
    report.write("metrics", "What an evaluation costs", text, sections, arguments.out)
