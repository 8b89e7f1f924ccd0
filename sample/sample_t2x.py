"""Sample videos or images from text with a Latte text-to-video model, a folder in diffusers' format or a hub name.

    python sample/sample_t2x.py --config configs/t2x/t2v_sample.yaml --prompt "a dog in astronaut suit"
    python sample/sample_t2x.py --config configs/t2x/t2i_sample.yaml --prompt_file prompts.txt --seed 3
    python sample/sample_t2x.py --ckpt results/t2v --prompt "a cat"     # a run or checkpoint of train.py

Flags override the file; prompts on the command line replace the file's. First all prompts are encoded and the
text encoder is freed; then each prompt is sampled, decoded and written.

Writes into --save_img_path: 0000_<prompt>.mp4 (one frame: .png), samples.png (one row per video) and samples.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)

import argparse
import gc
import json
import resource
from dataclasses import asdict
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common.storage import write_atomically
from engine.cli import run
from models.autoencoder import DTYPES
from models.quantize import check_device
from models.text_encoder import Prompt, TextEncoder
from sample.generate import usable_device
from sample.sample import add_frame_flags, make_writable
from sample.t2x_config import T2XConfig, load_t2x_config
from sample.text_model import FolderModel, RunModel, TextModel
from sample.text_to_video import Sampler
from sample.video_io import slug, write_contact_sheet, write_mp4

SHOWN = 16  # videos on the contact sheet
PROMPTS: dict[str, Any] = {"text_prompt": [], "prompt_file": None}  # where one is given, both are
SWITCHES = (
    "clean_caption",
    "enable_temporal_attentions",
    "enable_vae_temporal_decoder",
    "vae_slicing",
    "vae_tiling",
    "compile",
    "cpu_offload",
)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser; flags that are absent stay out of its result."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        usage="%(prog)s [--config FILE] [--prompt TEXT ...] [flags]",
    )
    add = parser.add_argument
    add("--config", default=None, metavar="FILE", help="YAML file")
    add("--prompt", dest="text_prompt", action="append", metavar="TEXT", help="instead of text_prompt; may be repeated")
    add("--prompt_file", metavar="FILE", help="one prompt a line")
    add("--negative_prompt", metavar="TEXT", help="what to guide away from")
    add("--pretrained_model_path", metavar="PATH", help="folder or hub name")
    add("--revision", metavar="NAME", help="of a hub name")
    add("--ckpt", metavar="PATH", help="a run or checkpoint of a training, with sizes and sampler of its config")
    add("--transformer", metavar="PATH", help="other weights of the network: a folder or file")
    add("--save_img_path", metavar="DIR", help="folder to write into")
    add("--video_length", type=int, metavar="N", help="frames; 1 makes images")
    add("--image_size", type=int, nargs=2, metavar=("H", "W"), help="height and width in pixels")
    add("--num_videos_per_prompt", type=int, metavar="N")
    add("--seed", type=int, metavar="N")
    add("--sample_method", metavar="NAME", help="DDIM, DDPM, EulerDiscrete, ...; a wrong name lists all ten")
    add("--num_sampling_steps", type=int, metavar="N")
    add("--eta", type=float, metavar="X", help="of DDIM: 0 deterministic, 1 as noisy as DDPM")
    add("--guidance_scale", type=float, metavar="X", help="1 is no guidance")
    add("--decode_chunk_size", type=int, metavar="N", help="frames decoded at a time")
    add("--lora", metavar="DIR", help="adapters to merge into the network, in peft's format")
    add("--lora_scale", type=float, metavar="X", help="their weight (1)")
    add("--precision", metavar="KIND", help="fp16, bf16 or fp32")
    add("--quantize_text_encoder", metavar="KIND", help="int8; on CUDA also bnb8, bnb4 (bitsandbytes)")
    add("--quantize_transformer", metavar="KIND", help="the same for the network")
    add("--fps", type=int, metavar="N", help="frames per second of the files")
    add_frame_flags(parser)
    for switch in SWITCHES:
        add(f"--{switch}", action=argparse.BooleanOptionalAction)
    add("--device", default=None, metavar="NAME", help="cpu, cuda, cuda:1, ...; by default CUDA where there is one")
    return parser


def main(argv: list[str]) -> int:
    """Samples as the command line says; returns the exit code."""
    settings = vars(build_parser().parse_args(argv))
    yaml, device_name = settings.pop("config"), settings.pop("device")
    if PROMPTS.keys() & settings.keys():
        settings = PROMPTS | settings

    trained = RunModel.open(settings["ckpt"]) if settings.get("ckpt") else None
    config = load_t2x_config(yaml, settings, trained.settings() if trained else None)
    prompts = config.prompts()
    device = usable_device(device_name)
    for key in ("quantize_text_encoder", "quantize_transformer"):
        check_device(getattr(config, key), device, key)
    target = Path(config.save_img_path)
    make_writable(target, "save_img_path")
    model = trained or FolderModel.find(config)
    encoded = encode_all(config, model, prompts, device)
    files = write_videos(config, model, prompts, encoded, device)
    print(f"{len(files)} videos in {target}: samples.png shows {min(SHOWN, len(files))} of them")
    print(f"peak memory: {peak_memory(device)}")
    return 0


def encode_all(config: T2XConfig, model: TextModel, prompts: list[str], device: torch.device) -> list[Prompt]:
    """Returns the features of all prompts; the text encoder, by far the largest network, lives no longer than this."""
    encoder = TextEncoder.from_folder(
        model.text_folder(),
        DTYPES[config.precision],
        device,
        config.quantize_text_encoder,
        max_length=model.max_length,
    )
    negative = config.negative_prompt if config.guidance_scale > 1 else None
    encoded = [encoder.encode(prompt, negative, clean=config.clean_caption) for prompt in prompts]
    del encoder
    gc.collect()  # transformers' networks refer to themselves
    return encoded


def write_videos(
    config: T2XConfig,
    model: TextModel,
    prompts: list[str],
    encoded: list[Prompt],
    device: torch.device,
) -> list[dict[str, Any]]:
    """Samples, decodes and writes each video as it comes, then the overview.

    Returns:
        for each video its file name, index and prompt: the `videos` of samples.json.
    """
    sampler = Sampler(config, model, device)
    target = Path(config.save_img_path)
    jobs = [
        (prompt, features) for prompt, features in zip(prompts, encoded) for _ in range(config.num_videos_per_prompt)
    ]
    shown: list[np.ndarray] = []
    files: list[dict[str, Any]] = []
    interval = 0.1 if sys.stderr.isatty() else 30.0  # seconds; a log file gets a line now and then
    with tqdm(total=len(jobs) * sampler.num_steps, unit="step", dynamic_ncols=True, mininterval=interval) as bar:
        for index, (prompt, features) in enumerate(jobs):
            video = sampler.sample(features, index, lambda *_: bar.update())  # (F, H, W, 3)
            stem = f"{index:04d}_{slug(prompt, 60)}"
            files.append({"file": write_video(target, stem, video, config.fps), "index": index, "prompt": prompt})
            shown += [video] if len(shown) < SHOWN else []
    write_overview(target, shown, files, config)
    return files


def write_video(folder: Path, stem: str, video: np.ndarray, fps: int) -> str:
    """Writes (F, H, W, 3) as an mp4, or one frame as a PNG; returns the name of the file."""
    if len(video) > 1:
        return write_mp4(folder / f"{stem}.mp4", video, fps).name
    return write_atomically(folder / f"{stem}.png", Image.fromarray(video[0]).save).name


def write_overview(folder: Path, shown: list[np.ndarray], files: list[dict[str, Any]], config: T2XConfig) -> None:
    """Writes the contact sheet of the videos `shown`, and samples.json with the settings of all of them."""
    captions = [shorten(each["prompt"], 40, placeholder=" ...") for each in files[: len(shown)]]
    write_contact_sheet(folder / "samples.png", np.stack(shown), captions)
    text = json.dumps({"sample": asdict(config), "videos": files}, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / "samples.json", lambda temporary: temporary.write_text(text, encoding="utf-8"))


def peak_memory(device: torch.device) -> str:
    """Returns the peak memory in words: of the GPU's allocator, or of the process."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on {device}"
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB of the process"


if __name__ == "__main__":
    run(main)
