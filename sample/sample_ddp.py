"""Sample many videos on any number of processes; after an interruption, the same command continues.

    python -m engine.elastic --nproc_per_node=8 sample/sample_ddp.py --ckpt results/run --save_video_path OUT
    python sample/sample_ddp.py --config configs/ffs/ffs_sample.yaml --ckpt ffs.pt --num_videos 2048

Writes exactly --num_videos videos, OUT/videos/000000.mp4, ..., each a function of (seed, index), and
OUT/lossless/000000.npy, ..., their frames as uint8 (F, H, W, 3) for metrics. Batches are fixed blocks of indices,
so the files are byte-identical for any number of processes and after any restart. OUT/samples.json is written
last. See docs/sampling.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.cli import run  # before torch, to notice torchrun's death during slow imports

# isort: split
import argparse
from typing import Any

import torch

from common.checks import require
from common.storage import file_sha256
from engine.checkpoint import content_sha256
from engine.config import all_keys
from engine.distributed import World, on_main
from engine.keys import refuse_removed_flags
from engine.signals import StopSignals
from models.lora import WEIGHTS_FILE
from sample.command import make_writable
from sample.given import hash_given
from sample.sample import Request, build_parser, describe_labels, load_generator, resolve, write_overview
from sample.sample_folder import SampleFolder
from sample.sample_job import SampleJob, join, run_job

# config keys that the videos depend on, except FREE ones; codec and given frames are hashed by content
SECTIONS = ("model.", "diffusion.", "condition.", "codec.", "data.num_frames", "data.image_size", "sample.")
FREE = {
    *("sample.ckpt", "sample.save_video_path", "sample.num_videos", "sample.overlap_decode"),
    *("codec.path", "codec.subfolder", "codec.revision", "sample.first_frame", "sample.last_frame", "sample.given"),
}


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

    def run_request(signals: StopSignals) -> None:
        request = resolve(arguments)
        Job(request, join(request.device), signals, files).sample()

    return run_job(run_request)


class Job(SampleJob):
    """The videos of a request; `files` holds the settings `lossless` and `threads`."""

    def __init__(self, request: Request, world: World, signals: StopSignals, files: dict[str, Any]) -> None:
        self.request, wanted, data = request, request.config.sample, request.config.data
        folder = SampleFolder(request.folder, wanted.num_videos, lossless=files["lossless"])
        super().__init__(folder, world, signals, wanted.batch_size)
        settings = settings_of(request) | files

        def check() -> None:
            make_writable(request.folder)
            self.folder.check(settings, unknown=("codec_sha256",))

        def load() -> dict[str, Any]:
            self.generator = load_generator(request, world.device)
            return settings | {"codec_sha256": content_sha256(self.generator.codec)}

        on_main(check)
        self.open(load, (data.num_frames, data.image_size, data.image_size, 3))

    def sample(self) -> None:
        """Writes this process's videos; rank 0 then waits for the other processes and writes the overview."""
        request, folder = self.request, self.folder
        slowest = self.write_batches(self.generator, request.config.sample.fps, **request.settings)
        if not self.world.is_main:
            return
        files, shown = self.collect(slowest, describe_labels(self.generator.conditions, request.config))
        facts = {key: self.settings[key] for key in ("checkpoint_sha256", "codec_sha256", "lossless", "threads")}
        write_overview(folder.unfinished, shown, files, request, **facts)
        folder.close()
        print(f"{len(files)} videos in {folder.path}: samples.png and samples.gif show {len(shown)} of them")


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


if __name__ == "__main__":
    run(main)
