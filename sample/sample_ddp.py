"""Sample many videos on any number of processes; after a kill or a stop, the same command continues.

    torchrun --nproc_per_node=8 sample/sample_ddp.py --ckpt results/run --num_videos 2048 --save_video_path OUT
    python sample/sample_ddp.py --config configs/ffs/ffs_sample.yaml --ckpt ffs.pt --num_videos 2048

Writes exactly --num_videos videos, OUT/videos/000000.mp4, ..., each a function of (seed, index), and
OUT/lossless/000000.npy, ..., their frames as uint8 (F, H, W, 3) for metrics. Batches are fixed blocks of indices,
so the files have the same bytes on any number of processes and after any restart. OUT/samples.json is written
last. docs/sampling.md has more.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)

from engine.cli import leave, run  # before torch, so that torchrun's death is noticed during the slow imports

# isort: split
import argparse
import hashlib
import time
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from common.storage import file_sha256
from datasets.readers import open_video
from engine.checkpoint import content_sha256
from engine.config import Config, all_keys
from engine.distributed import World, close_world, init_world, on_all, on_main
from engine.errors import PREEMPTED_EXIT, SamplesNotWritten
from engine.logging import duration
from engine.removed import refuse_removed_flags
from engine.signals import StopSignals
from models.lora import WEIGHTS_FILE
from sample.generate import Generator, sampler_settings, usable_device
from sample.given import read_given
from sample.sample import SHOWN, Request, build_parser, load_generator, make_writable, resolve, write_overview
from sample.sample_folder import SampleFolder

# keys of the configuration on which the videos depend; of codec and given frames the content counts
SECTIONS = ("model.", "diffusion.", "condition.", "codec.", "data.num_frames", "data.image_size", "sample.")
FREE = {
    *("sample.ckpt", "sample.save_video_path", "sample.num_videos", "sample.overlap_decode"),
    *("codec.path", "codec.subfolder", "codec.revision", "sample.first_frame", "sample.last_frame", "sample.given"),
}
TERMINAL_INTERVAL_S, LOG_INTERVAL_S = 1.0, 30.0  # between two counts of the videos of all processes
START_TIMEOUT_S = 1800.0  # for the slowest process to load the checkpoint
POLL_S = 0.5  # between two checks for the last videos of the others
# rank 0 gives up when no video of the others comes for PATIENCE_S seconds and the time of PATIENCE_BATCHES batches
PATIENCE_S = 1800.0
PATIENCE_BATCHES = 10


class Stopped(Exception):
    """A signal asked this process to stop."""


def parse(argv: list[str]) -> dict[str, Any]:
    """Parses the flags of sample.py and of this script."""
    refuse_removed_flags(argv)
    parser = build_parser(__doc__)
    parser.add_argument(
        "--lossless",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write the arrays for metrics, too",
    )
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="CPU threads of each process; they change the rounding"
    )
    arguments = parser.parse_intermixed_args(argv)
    if arguments.threads < 1:
        raise ValueError(f"--threads must be at least 1, not {arguments.threads}.")
    return vars(arguments)


def main(argv: list[str]) -> int:
    """Samples this process's share of the videos; returns the exit code."""
    arguments = parse(argv)
    lossless, threads = arguments.pop("lossless"), arguments.pop("threads")

    torch.set_num_threads(threads)
    with StopSignals((signal.SIGTERM, signal.SIGUSR1)) as signals:  # Ctrl-C need not wait for a batch
        request = resolve(arguments)
        job = Job(request, join(request.device), signals, {"lossless": lossless, "threads": threads})
        try:
            job.sample()
        except Stopped:
            there = f"{len(job.folder.done())} of {job.folder.num_videos} videos are there"
            job.say(f"stopped by a signal; {there}, and the same command continues")
            return leave(PREEMPTED_EXIT)
    close_world()  # after a clean end only
    return leave(0)


def join(device: str | None) -> World:
    """Joins the other processes; each has its own GPU.

    Uses gloo on GPUs too: messages are small, and gloo notices a dead process at once.
    """
    kind = usable_device(device)
    if kind.index is not None:
        raise ValueError(f"--device {device}: say cpu or cuda, each process takes a GPU of its own.")
    if kind.type == "cuda":
        usable_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    return init_world(kind.type, START_TIMEOUT_S, backend="gloo")


class Job:
    """One process's share of the videos of a request.

    Args:
        extra: further settings that change the files.
    """

    def __init__(self, request: Request, world: World, signals: StopSignals, extra: dict[str, Any]) -> None:
        wanted = request.config.sample
        self.request = request
        self.world = world
        self.signals = signals
        self.folder = SampleFolder(Path(wanted.save_video_path), wanted.num_videos, lossless=extra["lossless"])

        def load() -> tuple[dict[str, Any], str]:
            self.generator = load_generator(request, world.device)
            return settings_of(request, self.generator) | extra, machine(world.device)

        everyone = on_all(load)
        self.settings = everyone[world.rank][0]
        starts = on_main(lambda: self._open(everyone))
        self.starts = starts[world.rank :: world.size]

    def say(self, text: str) -> None:
        """Prints a line, on rank 0 only."""
        if self.world.is_main:
            print(text, file=sys.stderr)

    def sample(self) -> None:
        """Writes this process's videos; rank 0 then waits for those of the others and writes the overview.

        Raises:
            Stopped: by a signal, within a step of the sampler.
            SamplesNotWritten: the disk is full, or the others write nothing any more.
        """
        progress = Progress(self.folder, enabled=self.world.is_main)
        slowest = self._write_batches(progress)
        if self.world.is_main:
            self._wait_for_others(progress, max(PATIENCE_S, PATIENCE_BATCHES * slowest))
            progress.close()
            self._finish()

    def _open(self, everyone: list[tuple[dict[str, Any], str]]) -> list[int]:
        """Takes the folder on rank 0; returns the first indices of the batches with missing videos."""
        for rank, (settings, _) in enumerate(everyone):
            differing = [key for key, value in settings.items() if value != self.settings[key]]
            if differing:
                raise ValueError(f"{differing[0]} of rank {rank} is not that of rank 0: give all the same files.")
        make_writable(self.folder.path)
        data, size = self.request.config.data, self.request.config.sample.batch_size
        shape = (data.num_frames, data.image_size, data.image_size, 3)
        for note in self.folder.open(self.settings, {each for _, each in everyone}, shape):
            self.say(f"warning: {note}")
        starts = self.folder.missing_batches(size)
        there = f"{len(self.folder.done())} of {self.folder.num_videos} videos are there"
        self.say(f"{there}; {len(starts)} batches of {size} to sample, on {self.world.size} process(es)")
        if 0 < len(starts) < self.world.size:
            self.say("warning: some of them have nothing to do; with a smaller --batch_size all would.")
        return starts

    def _write_batches(self, progress: Progress) -> float:
        """Samples and writes the missing videos of this process's batches; returns the seconds of the slowest.

        A batch is sampled whole, also where some of it is there or it goes beyond the last video: the bytes of a
        video depend on the others of its batch.
        """
        wanted = self.request.config.sample
        indices = [index for start in self.starts for index in range(start, start + wanted.batch_size)]
        slowest, begun = 0.0, time.monotonic()

        def step(done: int, total: int) -> None:
            self._check_signals()
            steps = total // len(self.starts)
            progress.look(f"step {(done - 1) % steps + 1}/{steps}")

        batches = self.generator.batches(indices=indices, callback=step, **sampler_settings(self.request.config))
        for batch, videos in batches:
            for index, video in zip(batch, videos, strict=True):
                if index < self.folder.num_videos:
                    self.folder.write(index, video, wanted.fps)
            slowest, begun = max(slowest, time.monotonic() - begun), time.monotonic()
        return slowest

    def _check_signals(self) -> None:
        if self.signals.received:
            raise Stopped

    def _wait_for_others(self, progress: Progress, patience: float) -> None:
        """Waits for all videos. Raises: SamplesNotWritten if none comes for `patience` seconds."""
        missing, since = self.folder.num_videos - progress.count(), time.monotonic()
        while missing > 0:
            self._check_signals()
            if time.monotonic() - since > patience:
                raise SamplesNotWritten(
                    f"{missing} videos of other processes are missing, and none has come for {patience:.0f} s: the "
                    "same command goes on."
                )
            time.sleep(POLL_S)
            progress.look("waiting for the others")
            before, missing = missing, self.folder.num_videos - progress.count()
            since = time.monotonic() if missing < before else since

    def _finish(self) -> None:
        """Writes the overview, samples.json last, and releases the folder."""
        folder, wanted = self.folder, self.request.config.sample
        label_of = self.generator.labels_for(wanted.labels, wanted.label_rule, wanted.seed)
        files = [self._facts(index, label_of(index)) for index in range(folder.num_videos)]
        shown = [read_back(folder, index) for index in range(min(SHOWN, folder.num_videos))]
        facts = {key: self.settings[key] for key in ("checkpoint_sha256", "codec_sha256", "lossless", "threads")}
        checkpoint = str(self.request.source.path)
        write_overview(folder.unfinished, shown, files, self.request.config, checkpoint, **facts)
        folder.publish_overview()
        folder.close()
        print(f"{folder.num_videos} videos in {folder.path}: samples.png and samples.gif show {len(shown)} of them")

    def _facts(self, index: int, label: int | None) -> dict[str, Any]:
        """Returns the entry of a video in samples.json."""
        paths = [self.folder.file(kind, index) for kind in self.folder.kinds]
        hashes = {path.relative_to(self.folder.path).as_posix(): file_sha256(path) for path in paths}
        name = self.generator.class_name(label)
        return {"file": next(iter(hashes)), "index": index, "label": label, "class_name": name, "sha256": hashes}


class Progress:
    """Progress over the videos of all processes: a bar in a terminal, else a line every half minute."""

    def __init__(self, folder: SampleFolder, enabled: bool) -> None:
        terminal = sys.stderr.isatty()
        self.folder = folder
        self.lines = enabled and not terminal
        self.interval = (TERMINAL_INTERVAL_S if terminal else LOG_INTERVAL_S) if enabled else float("inf")
        self.first = self.count()
        self.started = self.shown = time.monotonic()
        self.bar = tqdm(
            total=folder.num_videos,
            initial=self.first,
            unit="video",
            dynamic_ncols=True,
            disable=not (enabled and terminal),
        )

    def count(self) -> int:
        """Counts the videos that exist now."""
        return len(self.folder.done())

    def look(self, doing: str) -> None:
        """Updates the display if it is time to; `doing` is the current task of this process."""
        if time.monotonic() - self.shown < self.interval:
            return
        self.shown = time.monotonic()
        done = self.count()
        self.bar.n = done  # not `update`: the rate is to be the mean one, a batch comes at once
        self.bar.set_postfix_str(doing)
        if self.lines:
            print(self.line(done, doing), file=sys.stderr)

    def line(self, done: int, doing: str) -> str:
        """`12/64 videos  0.42 videos/s  ETA 0:02:04  step 3/25`; no rate before the first new video."""
        rate = (done - self.first) / max(1e-9, self.shown - self.started)
        ahead = f"{rate:.3g} videos/s  ETA {duration((self.folder.num_videos - done) / rate)}  " if rate else ""
        return f"{done}/{self.folder.num_videos} videos  {ahead}{doing}"

    def close(self) -> None:
        """Closes the display."""
        self.interval = 0.0
        self.look("done")
        self.bar.close()


def settings_of(request: Request, generator: Generator) -> dict[str, Any]:
    """Returns everything that determines the videos: values by dotted key, and hashes of checkpoint and codec."""
    config = request.config
    lora = config.sample.lora
    keys = [key.split(".") for key in all_keys() if key.startswith(SECTIONS) and key not in FREE]
    return {
        "checkpoint_sha256": file_sha256(request.source.weights_file(config.sample.weights)),
        "codec_sha256": content_sha256(generator.codec),
        **({"given_sha256": given} if (given := given_sha256(config)) else {}),
        **({"lora_sha256": file_sha256(Path(lora) / WEIGHTS_FILE)} if lora else {}),
        **{f"{section}.{name}": getattr(getattr(config, section), name) for section, name in keys},
    }


def given_sha256(config: Config) -> str | None:
    """Returns the SHA-256 over given frames and their places; None without such."""
    given = read_given(config.sample, config.data)
    if given is None:
        return None
    return hashlib.sha256(repr(given.places).encode() + given.pixels.numpy().tobytes()).hexdigest()


def machine(device: torch.device) -> str:
    """Returns the kind of device and the versions that the last bit of a video may depend on."""
    kind = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else torch.cuda.get_device_name(device)
    return f"torch {torch.__version__} on {device.type} {kind}"


def read_back(folder: SampleFolder, index: int) -> np.ndarray:
    """Reads video `index` from its array, or from its mp4: uint8 (F, H, W, 3)."""
    if "lossless" in folder.kinds:
        return np.load(folder.file("lossless", index))
    reader = open_video(folder.file("videos", index))
    return reader.read(range(len(reader))).permute(0, 2, 3, 1).numpy()


if __name__ == "__main__":
    run(main)
