"""Sample videos or images from text with a Latte text-to-video model: a diffusers-format folder or a hub name.

    python sample/sample_t2x.py --config configs/t2x/t2v_sample.yaml --prompt "a dog in astronaut suit"
    python sample/sample_t2x.py --config configs/t2x/t2i_sample.yaml --prompt_file prompts.txt --seed 3
    python sample/sample_t2x.py --ckpt results/t2v --prompt "a cat"     # train.py's run or checkpoint

Flags override the YAML file; command-line prompts replace its prompts. All prompts are encoded and the text encoder
is freed before the first video is sampled, decoded and written.

Writes to --save_img_path: 0000_<prompt>.mp4 (1 frame: .png), samples.png (one row per video) and samples.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import gc
import json
import resource
from dataclasses import asdict
from textwrap import shorten
from typing import Any

import torch

from common.storage import write_atomically
from engine.cli import run
from models.autoencoder import DTYPES
from models.lora import Adapter
from models.quantize import check_device
from models.text_encoder import Prompt, TextEncoder
from sample import command
from sample.command import SHOWN, make_writable, say, show_steps, write_videos
from sample.generate import usable_device
from sample.given import Plan
from sample.t2x_config import T2XConfig, load_t2x_config
from sample.text_to_video import TextModel, build_generator, build_schedule, open_folder, open_run
from sample.video_io import slug, write_contact_sheet

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


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    arguments = vars(build_parser().parse_args(argv))
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
    settings = check_settings(config, model)
    folder = Path(config.save_img_path)
    make_writable(folder, "save_img_path")
    encoded = encode_all(config, model, prompts, device)
    number = sample_all(config, model, prompts, encoded, device, settings)
    print(f"{number} videos in {folder}: samples.png shows {min(SHOWN, number)} of them")
    if device.type == "cuda":
        print(f"peak memory: {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on {device}")
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB, on Linux
        print(f"peak memory: {peak:.2f} GiB (process)")
    return 0


def check_settings(config: T2XConfig, model: TextModel) -> dict[str, Any]:
    """Returns the Generator's settings, after every check that needs no weights. Raises: ValueError, OSError."""
    settings, frames = config.settings(), config.video_length
    build_schedule(config, model)
    places = settings["given"].places if settings["given"] else ()
    Plan((frames, 0, 0, 0), places, settings["windows"]).check(model.condition(frames), span=1)
    if config.lora:
        Adapter.from_folder(config.lora)
    return settings


def encode_all(config: T2XConfig, model: TextModel, prompts: list[str], device: torch.device) -> list[Prompt]:
    """Returns all prompts' features; the text encoder, by far the largest network, is freed before returning."""
    say("loading the text encoder")
    dtype, kind = DTYPES[config.precision], config.quantize_text_encoder
    encoder = TextEncoder.from_folder(model.text_folder, dtype, device, kind, max_length=model.max_length)
    say(f"encoding {len(prompts)} prompt(s)")
    negative = config.negative_prompt if config.guidance_scale > 1 else None
    encoded = [encoder.encode(prompt, negative, clean=config.clean_caption) for prompt in prompts]
    del encoder
    gc.collect()  # its network contains reference cycles
    return encoded


def sample_all(
    config: T2XConfig,
    model: TextModel,
    prompts: list[str],
    encoded: list[Prompt],
    device: torch.device,
    settings: dict[str, Any],
) -> int:
    """Samples, decodes and writes each video in turn, then the overview files; returns the count."""
    generator = build_generator(config, model, encoded, device, say)
    folder = Path(config.save_img_path)
    labels = [number for number in range(len(prompts)) for _ in range(config.num_videos_per_prompt)]
    suffix = "mp4" if config.video_length > 1 else "png"

    def name(index: int) -> str:
        return f"{index:04d}_{slug(prompts[labels[index]], 60)}.{suffix}"

    with show_steps(len(labels)) as show:
        batches = generator.batches(labels, len(labels), callback=show, **settings)
        files, shown = write_videos(batches, name, lambda index: {"prompt": prompts[labels[index]]}, folder, config.fps)
    captions = [shorten(each["prompt"], 40, placeholder=" ...") for each in files[: len(shown)]]
    write_contact_sheet(folder / "samples.png", shown, captions)
    text = json.dumps({"sample": asdict(config), "videos": files}, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / "samples.json", lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return len(files)


if __name__ == "__main__":
    run(main)
