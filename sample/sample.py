"""Sample videos from a checkpoint.

    python sample/sample.py --ckpt results/run                                   one of our runs or checkpoints
    python sample/sample.py --config configs/ucf101/ucf101_sample.yaml --ckpt ucf101.pt --labels HorseRiding,3

Flags override the `sample` section of --config, which overrides the defaults; trailing `section.key=value` override
everything. Our checkpoints describe their network, diffusion and codec; an official .pt file needs --config.

Writes to --save_video_path: 0000_<class>.mp4, ..., samples.gif, samples.png (one row per video) and samples.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from common.checks import require
from common.storage import write_json
from engine.cli import run
from engine.conditions import Conditions, class_conditions
from engine.config import Config, SampleConfig, load_config
from engine.keys import refuse_removed_flags
from models.lora import Adapter
from sample import command
from sample.command import MAX_VIDEOS, SHOWN, make_writable, say, show_steps, write_videos
from sample.generate import Generator, Settings, plan_sampling, sampler_settings, usable_device
from sample.labels import choose_labels, label_name
from sample.source import Source, sampling_config
from sample.video_io import slug, write_contact_sheet, write_gif

FLAGS = {  # `sample` key -> metavar and help of its flag
    "ckpt": "PATH one of our run or checkpoint folders, or an official .pt file",
    "save_video_path": "DIR folder to write into",
    "label_rule": "RULE balanced: labels in turn; random: drawn from (seed, index)",
    "num_videos": "N",
    "steps": "N sampler steps",
    "method": "NAME auto, ddpm, ddim, dpm_solver++, unipc; for flow networks euler, heun, dpm_solver++, unipc",
    "guidance_interval": "LOW,HIGH guide only these noise levels, from 0 (data) to 1 (noise)",
    "weights": "KIND ema or raw",
    "batch_size": "N videos at a time; affects memory use, not the noise",
}


@dataclass(frozen=True)
class Request:
    """A command line, resolved and checked as far as possible without weights."""

    source: Source
    config: Config  # its clip size is that of the videos, not of training
    device: torch.device
    settings: dict[str, Any]  # for `Generator.batches`

    @property
    def folder(self) -> Path:
        return Path(self.config.sample.save_video_path)


def build_parser(description: str | None = __doc__) -> argparse.ArgumentParser:
    """Returns the parser; flags not given are absent from its result."""
    usage = "[--ckpt PATH] [flags] [section.key=value ...]"
    parser = command.build_parser(description, usage, SampleConfig, FLAGS, "YAML file; not needed for our checkpoints")
    split: dict[str, Any] = {"type": lambda text: None if text == "all" else text.split(","), "metavar": "L,L,..."}
    parser.add_argument("--labels", **split, help="class numbers or names, or all")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="e.g. data.num_frames=32")
    return parser


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit code."""
    refuse_removed_flags(argv)
    request = resolve(vars(build_parser().parse_intermixed_args(argv)))
    make_writable(request.folder)
    generator = load_generator(request, request.device)
    files = write_samples(generator, request)
    print(f"{len(files)} videos in {request.folder}: samples.png and samples.gif show {min(SHOWN, len(files))} of them")
    return 0


def resolve(arguments: dict[str, Any]) -> Request:
    """Merges parsed `arguments`, YAML file and checkpoint config, and checks the result and the checkpoint."""
    settings = dict(arguments)
    yaml, name, overrides = (settings.pop(key) for key in ("config", "device", "overrides"))
    device, given = usable_device(name), load_config(yaml) if yaml else None
    named = [each.partition("=")[2] for each in overrides if each.startswith("sample.ckpt=")]
    path = settings.get("ckpt") or (named or [None])[-1] or (given and given.sample.ckpt)
    if not path:
        raise ValueError("no checkpoint: name one with --ckpt PATH (one of our run folders, or an official .pt file).")
    say(f"reading {path}")
    source = Source.open(path)
    config = sampling_config(source, given, settings, overrides)
    wanted = config.sample
    require(
        wanted.num_videos <= MAX_VIDEOS,
        f"--num_videos {wanted.num_videos} is more than {MAX_VIDEOS}, the limit of the file names; sample the rest "
        "with another --seed into another folder.",
    )
    made = sampler_settings(config)
    choose_labels(class_conditions(config.model, device, source.class_names(config)), wanted.labels)
    plan_sampling(config, Settings(**made))
    if wanted.lora:
        Adapter.from_folder(wanted.lora)
    return Request(source, config, device, made)


def load_generator(request: Request, device: torch.device) -> Generator:
    """Loads the network and codec of `request` onto `device`."""
    wanted, data = request.config.sample, request.config.data
    generator = Generator.from_checkpoint(
        request.source,
        config=request.config,
        weights=wanted.weights,
        device=device,
        say=say,
        precision=wanted.precision,
        cast_weights=wanted.cast_weights,
        compiled=wanted.compile,
    )
    trained = generator.config.data
    if (data.num_frames, data.image_size) != (trained.num_frames, trained.image_size):
        say(
            f"sampling {data.num_frames} frames of {data.image_size} pixels with a network trained on "
            f"{trained.num_frames} frames of {trained.image_size} pixels"
        )
    if wanted.compile:
        say("compiling the network in the first step; this takes minutes")
    return generator


def write_samples(generator: Generator, request: Request) -> list[dict[str, Any]]:
    """Writes each batch as it is sampled, then the overview; returns what samples.json lists under `videos`."""
    wanted, facts = request.config.sample, describe_labels(generator.conditions, request.config)

    def name(index: int) -> str:
        class_name = facts(index)["class_name"]
        return f"{index:04d}_{slug(class_name)}.mp4" if class_name else f"{index:04d}.mp4"

    with show_steps(-(-wanted.num_videos // wanted.batch_size)) as show:
        batches = generator.batches(num=wanted.num_videos, callback=show, **request.settings)
        files, shown = write_videos(batches, name, facts, request.folder, wanted.fps)
    write_overview(request.folder, shown, files, request)
    return files


def describe_labels(conditions: Conditions, config: Config) -> Callable[[int], dict[str, Any]]:
    """Returns a function from video index to its `label` and `class_name` for samples.json."""
    label_of = choose_labels(conditions, config.sample.labels, config.sample.label_rule, config.sample.seed)
    return lambda index: {"label": label_of(index), "class_name": label_name(conditions, label_of(index))}


def write_overview(
    folder: Path, shown: np.ndarray, files: list[dict[str, Any]], request: Request, **facts: Any
) -> None:
    """Writes a GIF and a contact sheet of the videos `shown`, and samples.json with `files`, settings and `facts`."""
    captions = [each["class_name"] or f"{each['index']:04d}" for each in files[: len(shown)]]
    write_gif(folder / "samples.gif", shown, request.config.sample.fps, scale=None)
    write_contact_sheet(folder / "samples.png", shown, captions)
    size = dict(zip(("num_frames", "height", "width"), shown.shape[1:]))
    windows, checkpoint = request.settings["windows"], str(request.source.path)
    made = {"windows": asdict(windows)} if windows else {}
    keys = request.config.to_dict()["sample"] | {"ckpt": checkpoint}
    content = {"checkpoint": checkpoint, **facts, **size, "sample": keys, **made, "videos": files}
    write_json(folder / "samples.json", content, indent=2)


if __name__ == "__main__":
    run(main)
