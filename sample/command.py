"""Flags, checks, progress and video writing shared by the sampling commands."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .decoding import Batch
from .generate import Progress
from .sample_folder import write_video

SHOWN = 16  # videos in the GIF and on the contact sheet
MAX_VIDEOS = 1_000_000  # per command; six-digit names sort numerically
LOG_INTERVAL_S = 10.0  # between progress lines in a log file
KINDS: dict[Any, dict[str, Any]] = {  # type of a key -> argparse options of its flag
    int: {"type": int},
    int | None: {"type": int},
    float: {"type": float},
    bool: {"action": argparse.BooleanOptionalAction},
    list[int]: {"type": int, "nargs": 2},
    list[float] | None: {"type": lambda text: [float(part) for part in text.split(",")]},
    list[str]: {"action": "append"},
    list[str] | None: {"action": "append"},
}
# config key -> metavar and help of its flag
SHARED_FLAGS = {
    "seed": "N",
    "eta": "X noise of DDIM: 0 deterministic, 1 as much as DDPM",
    "guidance_scale": "X 1: no guidance",
    "lora": "DIR peft-format adapters to merge into the network",
    "lora_scale": "X scale of the adapters (default 1)",
    "precision": "KIND fp32, bf16 or fp16",
    "fps": "N frames per second of the written videos",
    "first_frame": "IMAGE first frame of the video; repeat to use several in turn",
    "last_frame": "IMAGE last frame of the video; repeat to use several in turn",
    "given": "VIDEO video to continue; repeat to use several in turn",
    "given_frames": "N number of last frames of --given to use (default 1)",
    "window": "N sample longer videos in windows of N frames",
    "overlap": "N frames that consecutive windows share (default: a quarter of a window)",
    "window_method": "NAME autoregressive (networks trained with given frames), rolling (with a timestep per frame; "
    "not for text) or fused",
}


def build_parser(
    description: str | None, usage: str, section: type, flags: Mapping[str, str], config_help: str
) -> argparse.ArgumentParser:
    """Returns a parser with `--config`, `--device` and a flag for each `section` key in `flags` and `SHARED_FLAGS`.

    Flags not given are absent from its result.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        usage=f"%(prog)s [--config FILE] {usage}",
    )
    parser.add_argument("--config", default=None, metavar="FILE", help=config_help)
    hints = typing.get_type_hints(section)
    for key, text in {**flags, **SHARED_FLAGS}.items():
        metavar, _, help_text = text.partition(" ")
        options = KINDS.get(hints[key], {})
        if hints[key] is not bool:
            options = {**options, "metavar": tuple(metavar.split(",")) if "nargs" in options else metavar}
        parser.add_argument(f"--{key}", **options, help=help_text or None)
    parser.add_argument(
        "--device", default=None, metavar="NAME", help="cpu, cuda, cuda:1, ...; default: CUDA if available"
    )
    return parser


def make_writable(folder: Path, flag: str = "--save_video_path") -> None:
    """Creates `folder` and checks that it is writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{flag} {folder} cannot be written: {error.strerror or error}.") from None


def is_main() -> bool:
    """Returns whether this is rank 0."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Prints a status line to stderr, on rank 0 only."""
    if is_main():
        print(text, file=sys.stderr, flush=True)


@contextmanager
def show_steps(
    num_batches: int, count: Callable[[], str] = lambda: "", check: Callable[[], None] = lambda: None
) -> Iterator[Progress]:
    """Yields a `Generator.batches` callback that shows sampler steps: a progress bar, or lines in a log file.

    `count` returns text to show after each batch; `check` is called after each step.
    """
    interval = 0.1 if sys.stderr.isatty() else LOG_INTERVAL_S
    options: dict[str, Any] = {"unit": "step", "dynamic_ncols": True, "mininterval": interval}
    with tqdm(desc="sampling", disable=not (num_batches and is_main()), **options) as bar:

        def show(done: int, total: int) -> None:
            check()
            ends_batch = done % (total // num_batches) == 0
            bar.total = total
            bar.update(done - bar.n)
            bar.set_description("decoding" if ends_batch else "sampling", refresh=False)
            if ends_batch:
                bar.set_postfix_str(count())

        yield show


def write_videos(
    batches: Iterable[Batch], name: Callable[[int], str], facts: Callable[[int], dict[str, Any]], folder: Path, fps: int
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Writes each video as it is sampled; returns `videos` for samples.json and the first `SHOWN` (n, F, H, W, 3).

    `name` maps an index to a file name (.mp4, or .png for one frame), `facts` to further samples.json entries.
    """
    shown: list[np.ndarray] = []
    files: list[dict[str, Any]] = []
    for indices, videos in batches:
        for index, video in zip(indices, videos, strict=True):
            file = folder / name(index)
            write_video(file, video, fps)
            files.append({"file": file.name, "index": index, **facts(index)})
            shown += [video] if len(shown) < SHOWN else []
    return files, np.stack(shown)
