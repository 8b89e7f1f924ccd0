"""Sample videos or images from text with a Latte text-to-video model: a diffusers-format folder or a hub name.

    python sample/sample_t2x.py --config configs/t2x/t2v_sample.yaml --prompt "a dog in astronaut suit"
    python sample/sample_t2x.py --ckpt results/t2v --prompt "a cat"     # train.py's run or checkpoint
    python -m engine.elastic --nproc_per_node=8 sample/sample_t2x.py --prompt_file prompts.txt    # on eight GPUs

Flags override the YAML file; command-line prompts replace its prompts. All prompts are encoded and the text encoder
is freed before the first video is sampled, decoded and written.

Writes to --save_img_path: 0000_<prompt>.mp4 (1 frame: .png), samples.png (one row per video) and samples.json.
With a prompt file or several processes also settings.json, and after an interruption the same command continues.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.cli import run  # before torch, to notice torchrun's death during slow imports

# isort: split
import argparse
import gc
import hashlib
import json
import os
import resource
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from textwrap import shorten
from typing import Any

import numpy as np
import torch

from common.storage import tree_sha256, write_atomically
from engine.distributed import World, on_main
from engine.launchers import read_place
from engine.signals import StopSignals
from models.autoencoder import DTYPES, codec_folder
from models.convert_t2v import find_network
from models.lora import Adapter
from models.quantize import check_device
from models.text_encoder import TextEncoder
from sample import command
from sample.command import make_writable, say, show_steps, write_videos
from sample.generate import Generator, usable_device
from sample.given import Plan, hash_given
from sample.sample_folder import PromptFolder
from sample.sample_job import SampleJob, join, run_job
from sample.t2x_config import T2XConfig, load_t2x_config
from sample.text_to_video import FeatureFile, TextModel, build_generator, build_schedule, open_folder, open_run
from sample.video_io import slug, write_contact_sheet

# keys that do not affect the videos, or whose files and texts are hashed
FREE = {
    *("save_img_path", "text_prompt", "prompt_file", "pretrained_model_path", "revision", "ckpt", "transformer"),
    *("lora", "cpu_offload", "first_frame", "last_frame", "given"),
}
PROMPTS: dict[str, Any] = {"text_prompt": [], "prompt_file": None}  # setting one resets the other
FLAGS = {  # key of T2XConfig -> metavar and help of its flag
    "prompt_file": "FILE one prompt a line",
    "negative_prompt": "TEXT what to guide away from",
    "pretrained_model_path": "PATH folder or hub name",
    "revision": "NAME hub revision",
    "ckpt": "PATH a training run or checkpoint; its config sets sizes and sampler",
    "transformer": "PATH replacement network weights: folder or file",
    "save_img_path": "DIR folder to write into",
    "video_length": "N frames; 1 for images",
    "image_size": "H,W height and width in pixels",
    "num_videos_per_prompt": "N",
    "sample_method": "NAME DDIM, DDPM, EulerDiscrete, ...; a wrong name lists all ten",
    "num_sampling_steps": "N",
    "decode_chunk_size": "N frames decoded at a time",
    "quantize_text_encoder": "KIND int8; on CUDA also bnb8, bnb4 (bitsandbytes)",
    "quantize_transformer": "KIND the same for the network",
    **dict.fromkeys(("clean_caption", "enable_temporal_attentions", "enable_vae_temporal_decoder"), ""),
    **dict.fromkeys(("vae_slicing", "vae_tiling", "compile", "cpu_offload"), ""),
}


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser; absent flags are left out of its result."""
    parser = command.build_parser(__doc__, "[--prompt TEXT ...] [flags]", T2XConfig, FLAGS, "YAML file")
    repeated = "replaces text_prompt; repeatable"
    parser.add_argument("--prompt", dest="text_prompt", action="append", metavar="TEXT", help=repeated)
    return parser


@dataclass(frozen=True)
class Request:
    """A command line, resolved and checked as far as possible without weights."""

    config: T2XConfig
    model: TextModel
    prompts: list[str]
    settings: dict[str, Any]  # for `Generator.batches`
    device: torch.device

    @property
    def folder(self) -> Path:
        return Path(self.config.save_img_path)

    def names(self) -> list[str]:
        """Returns the file name of every video."""
        suffix = "mp4" if self.config.video_length > 1 else "png"
        prompts = [self.prompts[label] for label in self.settings["labels"]]
        return [f"{index:04d}_{slug(prompt, 60)}.{suffix}" for index, prompt in enumerate(prompts)]

    def facts(self, index: int) -> dict[str, Any]:
        """Returns the entries of a video in samples.json."""
        return {"prompt": self.prompts[self.settings["labels"][index]]}

    def load_generator(self, indices: Iterable[int]) -> Generator:
        """Returns the Generator for the videos `indices`."""
        numbers = {self.settings["labels"][index] for index in indices}
        encoded = encode_all(self.config, self.model, self.prompts, self.device, numbers, self.folder)
        return build_generator(self.config, self.model, encoded, self.device, say)


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    request = resolve(vars(build_parser().parse_args(argv)))
    several = read_place(os.environ)[1] > 1
    if several or request.config.prompt_file or (request.folder / "settings.json").exists():
        return run_job(lambda signals: Job(request, signals, several).sample())
    make_writable(request.folder, "save_img_path")
    names = request.names()
    generator = request.load_generator(range(len(names)))
    with show_steps(len(names)) as show:
        batches = generator.batches(num=len(names), callback=show, **request.settings)
        files, shown = write_videos(batches, names.__getitem__, request.facts, request.folder, request.config.fps)
    write_overview(request, request.folder, files, shown)
    return 0


def resolve(arguments: dict[str, Any]) -> Request:
    """Merges flags, YAML file and the config of a run, and checks the result."""
    yaml, device = arguments.pop("config"), usable_device(arguments.pop("device"))
    if PROMPTS.keys() & arguments.keys():
        arguments = PROMPTS | arguments
    config = load_t2x_config(yaml, arguments)
    say(f"opening {config.ckpt or config.pretrained_model_path}")
    if config.ckpt:
        model, defaults = open_run(config.ckpt)
        config = load_t2x_config(yaml, arguments, defaults)
    prompts = config.prompts()
    for key in ("quantize_text_encoder", "quantize_transformer"):
        check_device(getattr(config, key), device, key)
    if not config.ckpt:
        model = open_folder(config)
    labels = [number for number in range(len(prompts)) for _ in range(config.num_videos_per_prompt)]
    return Request(config, model, prompts, check_settings(config, model) | {"labels": labels}, device)


def check_settings(config: T2XConfig, model: TextModel) -> dict[str, Any]:
    """Returns the Generator's settings, after every check that needs no weights. Raises: ValueError, OSError."""
    settings, frames = config.settings(), config.video_length
    build_schedule(config, model)
    places = settings["given"].places if settings["given"] else ()
    Plan((frames, 0, 0, 0), places, settings["windows"]).check(model.condition(frames), span=1)
    if config.lora:
        Adapter.from_folder(config.lora)
    return settings


def encode_all(
    config: T2XConfig,
    model: TextModel,
    prompts: Sequence[str],
    device: torch.device,
    numbers: Iterable[int] | None = None,
    folder: Path | None = None,
) -> FeatureFile:
    """Returns the features of the prompts `numbers` (None: all), in memory or in an unnamed file of `folder`.

    The text encoder, by far the largest network, is freed before returning.
    """
    say("loading the text encoder")
    dtype, kind = DTYPES[config.precision], config.quantize_text_encoder
    encoder = TextEncoder.from_folder(model.text_folder, dtype, device, kind, max_length=model.max_length)
    chosen = range(len(prompts)) if numbers is None else sorted(numbers)
    say(f"encoding {len(chosen)} prompt(s)")
    negative = config.negative_prompt if config.guidance_scale > 1 else None
    encoded = FeatureFile(len(prompts), folder)
    for number in chosen:
        encoded.put(number, encoder.encode(prompts[number], negative, clean=config.clean_caption))
    del encoder
    gc.collect()  # its network contains reference cycles
    return encoded


class Job(SampleJob):
    """The videos of a request, shared by all processes, in a folder that an interrupted job continues."""

    def __init__(self, request: Request, signals: StopSignals, several: bool) -> None:
        world = join(request.device) if several else World(device=request.device)
        folder = PromptFolder(request.folder, request.names(), "save_img_path")
        super().__init__(folder, world, signals, batch_size=1)
        self.request = replace(request, device=world.device)
        on_main(lambda: make_writable(request.folder, "save_img_path"))
        self.open(lambda: describe_job(request), (request.config.video_length, *request.config.image_size, 3))

    def sample(self) -> None:
        """Writes this process's videos; rank 0 then waits for the other processes and writes the overview."""
        request, slowest = self.request, 0.0
        if self.indices:
            generator = request.load_generator(self.indices)
            slowest = self.write_batches(generator, request.config.fps, **request.settings)
        if self.world.is_main:
            files, shown = self.collect(slowest, request.facts)
            write_overview(request, self.folder.unfinished, files, shown)
            self.folder.close()


def describe_job(request: Request) -> dict[str, Any]:
    """Returns all that determines the videos: settings, and the SHA-256 of prompts, weights and given frames."""
    config, model, given = request.config, request.model, request.settings["given"]
    parts = {
        "tokenizer": model.text_folder / "tokenizer",
        "text_encoder": model.text_folder / "text_encoder",
        "network": find_network(config.transformer, None, "transformer") if config.transformer else model.weights,
        "codec": codec_folder(model.codec) if model.codec.path else None,
        "lora": Path(config.lora) if config.lora else None,
    }
    say("hashing the weights")
    return {
        **{key: value for key, value in asdict(config).items() if key not in FREE},
        **{f"{name}_sha256": path and tree_sha256(path) for name, path in parts.items()},
        "prompts_sha256": hashlib.sha256(json.dumps(request.prompts).encode()).hexdigest(),
        "given_sha256": given and hash_given(given),
        "scheduler": model.scheduler,
        "threads": torch.get_num_threads() if request.device.type == "cpu" else None,  # they affect rounding
    }


def write_overview(request: Request, folder: Path, files: list[dict[str, Any]], shown: np.ndarray) -> None:
    """Writes samples.png and samples.json into `folder`, and prints where the videos are and the peak memory."""
    captions = [shorten(each["prompt"], 40, placeholder=" ...") for each in files[: len(shown)]]
    write_contact_sheet(folder / "samples.png", shown, captions)
    text = json.dumps({"sample": asdict(request.config), "videos": files}, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / "samples.json", lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(f"{len(files)} videos in {request.folder}: samples.png shows {len(shown)} of them")
    if request.device.type == "cuda":
        print(f"peak memory: {torch.cuda.max_memory_allocated(request.device) / 2**30:.2f} GiB on {request.device}")
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB, on Linux
        print(f"peak memory: {peak:.2f} GiB (process)")


if __name__ == "__main__":
    run(main)
