"""Sample many videos on any number of processes; after an interruption, the same command continues.

    python -m engine.elastic --nproc_per_node=8 sample/sample_ddp.py --ckpt results/run --save_video_path OUT
    python sample/sample_ddp.py --config configs/ffs/ffs_sample.yaml --ckpt ffs.pt --num_videos 2048

Writes exactly --num_videos videos, OUT/videos/000000.mp4, ..., each a function of (seed, index), and
OUT/lossless/000000.npy, ..., their frames as uint8 (F, H, W, 3) for metrics. Batches are fixed blocks of indices,
so the files are byte-identical for any number of processes and after any restart. OUT/samples.json is written
last. See docs/sampling.md.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.cli import leave, run  # before torch, to notice torchrun's death during slow imports

# isort: split
import argparse
import hashlib
import time
from typing import Any

import numpy as np
import torch

from common.checks import require
from common.storage import file_sha256
from engine.checkpoint import content_sha256
from engine.config import all_keys
from engine.distributed import World, close_world, init_world, on_all, on_main
from engine.errors import PREEMPTED_EXIT, SamplesNotWritten
from engine.keys import refuse_removed_flags
from engine.signals import StopSignals
from models.lora import WEIGHTS_FILE
from sample.command import SHOWN, make_writable, say, show_steps
from sample.generate import usable_device
from sample.given import GivenFrames
from sample.sample import Request, build_parser, describe_labels, load_generator, resolve, write_overview
from sample.sample_folder import SampleFolder
from sample.video_io import read_video

# config keys that the videos depend on, except FREE ones; codec and given frames are hashed by content
SECTIONS = ("model.", "diffusion.", "condition.", "codec.", "data.num_frames", "data.image_size", "sample.")
FREE = {
    *("sample.ckpt", "sample.save_video_path", "sample.num_videos", "sample.overlap_decode"),
    *("codec.path", "codec.subfolder", "codec.revision", "sample.first_frame", "sample.last_frame", "sample.given"),
}
START_TIMEOUT_S = 1800.0  # until the slowest process has loaded the checkpoint
POLL_S = 1.0  # between checks for the last videos of other processes
# rank 0 gives up once others finish no video for PATIENCE_S seconds and for the time of PATIENCE_BATCHES batches
PATIENCE_S = 1800.0
PATIENCE_BATCHES = 10


class Stopped(Exception):
    """A signal asked this process to stop."""


def parse(argv: list[str]) -> dict[str, Any]:
    """Parses the flags of sample.py and of this script."""
    refuse_removed_flags(argv)
    parser = build_parser(__doc__)
    lossless = {"action": argparse.BooleanOptionalAction, "help": "also write arrays for metrics"}
    parser.add_argument("--lossless", default=True, **lossless)  # type: ignore[arg-type]
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads per process; affects rounding")
    arguments = vars(parser.parse_intermixed_args(argv))
    require(arguments["threads"] >= 1, f"--threads must be at least 1, not {arguments['threads']}.")
    return arguments


def main(argv: list[str]) -> int:
    """Samples this process's share of the videos; returns the exit code."""
    arguments = parse(argv)
    files = {key: arguments.pop(key) for key in ("lossless", "threads")}
    torch.set_num_threads(files["threads"])
    with StopSignals((signal.SIGTERM, signal.SIGUSR1)) as signals:  # not SIGINT: Ctrl-C ends at once
        request = resolve(arguments)
        job = Job(request, join(request.device), signals, files)
        try:
            job.sample()
        except Stopped:
            say(f"stopped by a signal; {job.folder.count_done()}; the same command continues")
            return leave(PREEMPTED_EXIT)
    close_world()  # only after a clean end
    return leave(0)


def join(device: torch.device) -> World:
    """Joins the process group; each process has its own GPU.

    Uses gloo even with GPUs: messages are small, and gloo notices a dead process at once.
    """
    require(device.index is None, f"--device {device}: use cpu or cuda; each process takes its own GPU.")
    if device.type == "cuda":
        usable_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    return init_world(device.type, START_TIMEOUT_S, backend="gloo")


class Job:
    """One process's share of a request's videos; `files` holds the settings `lossless` and `threads`."""

    def __init__(self, request: Request, world: World, signals: StopSignals, files: dict[str, Any]) -> None:
        self.request, self.world, self.signals = request, world, signals
        self.folder = SampleFolder(request.folder, request.config.sample.num_videos, lossless=files["lossless"])
        settings = settings_of(request) | files

        def check() -> None:
            make_writable(request.folder)
            self.folder.check(settings, unknown=("codec_sha256",))

        def load() -> tuple[dict[str, Any], str]:
            self.generator = load_generator(request, world.device)
            return settings | {"codec_sha256": content_sha256(self.generator.codec)}, machine(world.device)

        on_main(check)
        everyone = on_all(load)
        self.settings = everyone[world.rank][0]
        self.starts = on_main(lambda: self._open(everyone))[world.rank :: world.size]

    def sample(self) -> None:
        """Writes this process's videos; rank 0 then waits for the other processes and writes the overview.

        Raises: Stopped, within a sampler step of a signal; SamplesNotWritten if the disk is full or others stopped.
        """
        slowest = self._write_batches()
        if self.world.is_main:
            self._wait_for_others(max(PATIENCE_S, PATIENCE_BATCHES * slowest))
            self._finish()

    def _open(self, everyone: list[tuple[dict[str, Any], str]]) -> list[int]:
        """Locks the folder on rank 0; returns the first index of each batch with missing videos."""
        for rank, (settings, _) in enumerate(everyone):
            for key, value in settings.items():
                same = value == self.settings[key]
                require(same, f"{key} of rank {rank} differs from rank 0: give all ranks the same files.")
        data, size = self.request.config.data, self.request.config.sample.batch_size
        shape = (data.num_frames, data.image_size, data.image_size, 3)
        for note in self.folder.open(self.settings, {each for _, each in everyone}, shape):
            say(f"warning: {note}")
        starts = self.folder.missing_batches(size)
        say(f"{self.folder.count_done()}; {len(starts)} batches of {size} to sample, on {self.world.size} process(es)")
        if 0 < len(starts) < self.world.size:
            say("warning: some processes have nothing to do; use a smaller --batch_size to occupy all.")
        return starts

    def _write_batches(self) -> float:
        """Samples and writes the missing videos of this process's batches; returns seconds of the slowest.

        Batches are sampled whole, even if some videos exist: the bytes of a video depend on its batch.
        """
        wanted = self.request.config.sample
        indices = [index for start in self.starts for index in range(start, start + wanted.batch_size)]
        slowest, start = 0.0, time.monotonic()
        with show_steps(len(self.starts), self.folder.count_done, self._check_signals) as show:
            for batch, videos in self.generator.batches(indices=indices, callback=show, **self.request.settings):
                for index, video in zip(batch, videos, strict=True):
                    if index < self.folder.num_videos:
                        self.folder.write(index, video, wanted.fps)
                slowest, start = max(slowest, time.monotonic() - start), time.monotonic()
        return slowest

    def _check_signals(self) -> None:
        if self.signals.received:
            raise Stopped

    def _wait_for_others(self, patience: float) -> None:
        """Waits for all videos. Raises: SamplesNotWritten if no new one appears for `patience` seconds."""
        before, since = -1, time.monotonic()
        while (done := len(self.folder.done())) < self.folder.num_videos:
            self._check_signals()
            if done > before:
                say(f"waiting for the other processes: {self.folder.count_done()}")
                before, since = done, time.monotonic()
            if time.monotonic() - since > patience:
                raise SamplesNotWritten(
                    f"{self.folder.num_videos - done} videos of other processes are missing, and none has appeared for "
                    f"{patience:.0f} s: run the same command to continue."
                )
            time.sleep(POLL_S)

    def _finish(self) -> None:
        """Writes the overview, with samples.json last, and releases the folder."""
        folder, files = self.folder, []
        facts_of = describe_labels(self.generator.conditions, self.request.config)
        for index in range(folder.num_videos):
            paths = [folder.file(kind, index) for kind in folder.kinds]
            hashes = {path.relative_to(folder.path).as_posix(): file_sha256(path) for path in paths}
            files.append({"index": index, **facts_of(index), "file": next(iter(hashes)), "sha256": hashes})
        first = [folder.file(folder.kinds[-1], index) for index in range(min(SHOWN, folder.num_videos))]
        shown = np.stack([read_video(file) for file in first])
        facts = {key: self.settings[key] for key in ("checkpoint_sha256", "codec_sha256", "lossless", "threads")}
        write_overview(folder.unfinished, shown, files, self.request, **facts)
        folder.publish_overview()
        folder.close()
        print(f"{folder.num_videos} videos in {folder.path}: samples.png and samples.gif show {len(shown)} of them")


def settings_of(request: Request) -> dict[str, Any]:
    """Returns all that determines the videos, except the codec: values by dotted key, and file hashes."""
    config = request.config
    lora = config.sample.lora
    keys = [key.split(".") for key in all_keys() if key.startswith(SECTIONS) and key not in FREE]
    return {
        "checkpoint_sha256": file_sha256(request.source.weights_file(config.sample.weights)),
        **({"given_sha256": hash_given(given)} if (given := request.settings["given"]) else {}),
        **({"lora_sha256": file_sha256(Path(lora) / WEIGHTS_FILE)} if lora else {}),
        **{f"{section}.{name}": getattr(getattr(config, section), name) for section, name in keys},
    }


def hash_given(given: GivenFrames) -> str:
    """Returns the SHA-256 of the given frames and their indices."""
    return hashlib.sha256(repr(given.places).encode() + given.pixels.numpy().tobytes()).hexdigest()


def machine(device: torch.device) -> str:
    """Returns the torch version and device kind, which may affect the last bits of a video."""
    kind = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else torch.cuda.get_device_name(device)
    return f"torch {torch.__version__} on {device.type} {kind}"


if __name__ == "__main__":
    run(main)
