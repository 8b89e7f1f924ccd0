"""Sample videos from a checkpoint.

    python sample/sample.py --ckpt results/run                                   our run or checkpoint folder
    python sample/sample.py --config configs/ucf101/ucf101_sample.yaml --ckpt ucf101.pt --labels HorseRiding,3

Flags override the `sample` section of --config, which overrides the defaults; trailing `section.key=value` override
everything. A checkpoint of ours contains its network, diffusion and codec; an official .pt file needs --config.

Writes into --save_video_path: 0000_<class>.mp4, ..., samples.gif, samples.png (one row per video) and
samples.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)

import argparse
import json
import tempfile
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from common.storage import write_atomically
from engine.cli import run
from engine.config import Config, load_config
from engine.removed import refuse_removed_flags
from sample.generate import Generator, sampler_settings, windows_of
from sample.source import Source, sampling_config
from sample.video_io import slug, write_contact_sheet, write_gif, write_mp4

SHOWN = 16  # videos in the GIF and on the contact sheet
MAX_VIDEOS = 1_000_000  # of one command; names of six digits sort as numbers do
SIZE_KEYS = ("data.num_frames=", "data.image_size=")


class Request(NamedTuple):
    """A command line, resolved: source, configuration and device."""

    source: Source
    config: Config  # what to sample
    trained: Config  # the same with the sizes that the network was trained on, for which it is built
    device: str | None


def build_parser(description: str | None = __doc__) -> argparse.ArgumentParser:
    """Returns the parser; flags that are absent stay out of its result."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        usage="%(prog)s [--config FILE] [--ckpt PATH] [flags] [section.key=value ...]",
    )
    add = parser.add_argument
    add("--config", default=None, metavar="FILE", help="YAML file; our checkpoints need none")
    add("--ckpt", metavar="PATH", help="our run or checkpoint folder, or an official .pt")
    add("--save_video_path", metavar="DIR", help="folder to write into")
    add(
        "--labels",
        type=lambda text: None if text == "all" else text.split(","),
        metavar="L,L,...",
        help="classes by number or name; all",
    )
    add("--label_rule", metavar="RULE", help="balanced: labels in turn by index; random: drawn by (seed, index)")
    add("--num_videos", type=int, metavar="N")
    add("--seed", type=int, metavar="N")
    add("--steps", type=int, metavar="N", help="sampler steps")
    add("--method", metavar="NAME", help="ddpm, ddim; of flow networks euler, heun; of both dpm_solver++, unipc; auto")
    add("--eta", type=float, metavar="X", help="of ddim: 0 deterministic, 1 as noisy as ddpm")
    add("--guidance_scale", type=float, metavar="X", help="1 is no guidance")
    add(
        "--guidance_interval",
        type=lambda text: [float(part) for part in text.split(",")],
        metavar="LOW,HIGH",
        help="guide only these noise levels, from 0 (data) to 1 (noise)",
    )
    add("--weights", metavar="KIND", help="ema or raw")
    add("--lora", metavar="DIR", help="adapters to merge into the network, in peft's format")
    add("--lora_scale", type=float, metavar="X", help="their weight (1)")
    add("--precision", metavar="KIND", help="fp32, bf16 or fp16")
    add("--batch_size", type=int, metavar="N", help="videos at a time; changes the memory, not the videos")
    add("--fps", type=int, metavar="N", help="frames per second of the files")
    add_frame_flags(parser)
    add(
        "--device",
        default=None,
        metavar="NAME",
        help="cpu, cuda, cuda:1, ...; by default CUDA where there is one",
    )
    add("overrides", nargs="*", default=[], metavar="section.key=value", help="e.g. data.num_frames=32")
    return parser


def add_frame_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for given frames and windows, which sample_t2x.py has too."""
    add = parser.add_argument
    add("--first_frame", action="append", metavar="IMAGE", help="begin with it; several are taken in turn by index")
    add("--last_frame", action="append", metavar="IMAGE", help="end with it; several in turn")
    add("--given", action="append", metavar="VIDEO", help="continue it from its end; several in turn")
    add("--given_frames", type=int, metavar="N", help="number of its last frames to use (1)")
    add("--window", type=int, metavar="N", help="sample longer videos in windows of N frames")
    add("--overlap", type=int, metavar="N", help="frames that a window shares with the next (a quarter of it)")
    add("--window_method", metavar="NAME", help="autoregressive (networks trained with given frames) or fused")


def main(argv: list[str]) -> int:
    """Samples as the command line says; returns the exit code."""
    refuse_removed_flags(argv)
    request = resolve(vars(build_parser().parse_intermixed_args(argv)))
    generator = load_generator(request, request.device)
    folder = Path(request.config.sample.save_video_path)
    make_writable(folder)
    files = write_samples(generator, request.config, folder, checkpoint=str(request.source.path))
    print(f"{len(files)} videos in {folder}: samples.png and samples.gif show {min(SHOWN, len(files))} of them")
    return 0


def resolve(arguments: dict[str, Any]) -> Request:
    """Merges the parsed `arguments`, the YAML file and the checkpoint, which is verified."""
    settings = dict(arguments)
    yaml, device, overrides = (settings.pop(key) for key in ("config", "device", "overrides"))
    source = Source.open(checkpoint_path(yaml, settings, overrides))
    config = sampling_config(source, yaml, settings, overrides)
    if config.sample.num_videos > MAX_VIDEOS:
        raise ValueError(
            f"--num_videos {config.sample.num_videos} is more than {MAX_VIDEOS}, all that file names have room "
            "for; sample more with another --seed into another folder."
        )
    trained = sampling_config(source, yaml, settings, [each for each in overrides if not each.startswith(SIZE_KEYS)])
    return Request(source, config, trained, device)


def load_generator(request: Request, device: Any) -> Generator:
    """Loads network and codec of `request` on `device`."""
    wanted = request.config.sample
    return Generator.from_source(
        request.source,
        config=request.trained,
        weights=wanted.weights,
        device=device,
        precision=wanted.precision,
        cast_weights=wanted.cast_weights,
        compiled=wanted.compile,
    )


def make_writable(folder: Path, flag: str = "--save_video_path") -> None:
    """Makes `folder` and checks that files can be made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{flag} {folder} cannot be written: {error.strerror or error}.") from None


def checkpoint_path(yaml: str | None, settings: dict[str, Any], overrides: list[str]) -> str:
    """Returns --ckpt, or `sample.ckpt` of the overrides or of the YAML file."""
    named = [each.partition("=")[2] for each in overrides if each.startswith("sample.ckpt=")]
    path = settings.get("ckpt") or (named[-1] if named else None) or (load_config(yaml).sample.ckpt if yaml else None)
    if not path:
        raise ValueError("no checkpoint: name one with --ckpt PATH (a run folder of ours, or an official .pt).")
    return path


def write_samples(generator: Generator, config: Config, folder: Path, checkpoint: str) -> list[dict[str, Any]]:
    """Samples as `config.sample` says and writes each batch as it comes, then the overview.

    Returns:
        for each video its file name, index, label and class name: the `videos` of samples.json.
    """
    wanted = config.sample
    label_of = generator.labels_for(wanted.labels, wanted.label_rule, wanted.seed)
    shown: list[np.ndarray] = []
    files: list[dict[str, Any]] = []
    for indices, videos in batches_with_progress(generator, config):
        for index, video in zip(indices, videos, strict=True):
            label = label_of(index)
            name = generator.class_name(label)
            file = f"{index:04d}_{slug(name)}.mp4" if name else f"{index:04d}.mp4"
            write_mp4(folder / file, video, wanted.fps)
            files.append({"file": file, "index": index, "label": label, "class_name": name})
        shown += list(videos[: SHOWN - len(shown)]) if len(shown) < SHOWN else []
    write_overview(folder, shown, files, config, checkpoint)
    return files


def batches_with_progress(generator: Generator, config: Config) -> Any:
    """Yields `generator.batches` for `config`, with a progress bar of sampler steps."""
    interval = 0.1 if sys.stderr.isatty() else 30.0  # seconds; a log file gets a line now and then
    with tqdm(unit="step", dynamic_ncols=True, mininterval=interval) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield from generator.batches(num=config.sample.num_videos, callback=show, **sampler_settings(config))


def write_overview(
    folder: Path, shown: list[np.ndarray], files: list[dict[str, Any]], config: Config, checkpoint: str, **facts: Any
) -> None:
    """Writes GIF and contact sheet of the videos `shown`, and samples.json with the settings of all and `facts`."""
    videos = np.stack(shown)  # (n, F, H, W, 3)
    captions = [each["class_name"] or f"{each['index']:04d}" for each in files[: len(shown)]]
    write_gif(folder / "samples.gif", videos, config.sample.fps, scale=None)
    write_contact_sheet(folder / "samples.png", videos, captions)
    settings = config.to_dict()["sample"] | {"ckpt": checkpoint}
    size = {"num_frames": videos.shape[1], "height": videos.shape[2], "width": videos.shape[3]}
    windows = windows_of(config)
    made = {"windows": asdict(windows)} if windows else {}
    content = {"checkpoint": checkpoint, **facts, **size, "sample": settings, **made, "videos": files}
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(folder / "samples.json", lambda temporary: temporary.write_text(text))


if __name__ == "__main__":
    run(main)
