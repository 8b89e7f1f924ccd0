"""Converts configs, weights and whole models, of the official repository or of our runs.

    python -m tools.convert config OFFICIAL.yaml [-o OURS.yaml]
    python -m tools.convert checkpoint OFFICIAL.pt --sha256 HASH [-o WEIGHTS.safetensors]
    python -m tools.convert t2v SOURCE FOLDER [--dtype fp16] [--lora ADAPTERS]
    python -m tools.convert weights RUN FOLDER [--weights raw] [--adapter]
    python -m tools.convert diffusers RUN FOLDER
    python -m tools.convert pipeline RUN FOLDER [--push OWNER/NAME]

RUN is a checkpoint folder, or a run folder, whose newest checkpoint is used. `python -m tools.convert SUBCOMMAND
--help` lists the flags of a subcommand.
"""

from __future__ import annotations

from engine import cli  # first, so that a missing package below is reported in one sentence

# isort: split
import argparse
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors.torch import save_file

from common.checks import require
from common.storage import write_atomically
from engine.config import load_config, read_yaml
from engine.keys import is_text_config, translate_config
from engine.weights import export_adapter, export_weights
from models.autoencoder import DTYPES
from models.convert import extract_weights
from models.convert_t2v import compare_with_diffusers, convert_t2v, find_network, read_json, require_new, save_t2v
from models.lora import merge_lora
from sample.pipeline_latte import LatteVideoPipeline
from sample.t2v_export import export_run
from sample.t2x_config import load_t2x_config

MAX_DIFFERENCE = 1e-4  # between outputs of a converted text network and diffusers'; relative, in fp32


def main(argv: list[str]) -> int:
    """Runs one subcommand and returns its exit code."""
    arguments = vars(build_parser().parse_args(argv))
    return arguments.pop("run")(**arguments) or 0


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all subcommands; each parsed flag is a keyword argument of the function in `run`."""
    style: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m tools.convert", description=__doc__, **style)
    commands = parser.add_subparsers(metavar="SUBCOMMAND", required=True)

    def add_command(name: str, run: Callable[..., int | None]) -> Callable[..., Any]:
        """Adds a subcommand whose help is the docstring of `run`; returns its `add_argument`."""
        text = inspect.cleandoc(run.__doc__ or "")
        command = commands.add_parser(name, help=text.partition("\n")[0], description=text, **style)
        command.set_defaults(run=run)
        return command.add_argument

    add = add_command("config", write_config)
    add("official", type=Path, metavar="OFFICIAL.yaml")
    add("-o", "--output", type=Path, metavar="OURS.yaml", help="default: standard output")

    add = add_command("checkpoint", write_checkpoint_weights)
    add("checkpoint", type=Path, help="an official .pt file")
    add("--sha256", required=True, action="append", metavar="HASH", help="of a trusted file")
    add("-o", "--output", type=Path, metavar="FILE", help="default: the name of the checkpoint, ending in .safetensors")
    add("--weights", choices=["ema", "model"], default="ema", help="which weights (default: ema)")

    add = add_command("t2v", write_text_network)
    add("source", help="a folder in diffusers' format, a hub name, or a .safetensors, .pt or .pth file")
    add("folder", type=Path, help="where to write; must be new or empty")
    add("--config", type=Path, metavar="FILE", help="a config.json; default: the one in the folder of the weights")
    add("--revision", metavar="NAME", help="revision of a hub name")
    add("--lora", metavar="DIR", help="adapters to merge, in peft's format")
    add("--lora_scale", type=float, default=1.0, metavar="X", help="factor of the adapters (1)")
    add("--variant", help="variant in the names of the weight files, e.g. fp16")
    add("--weights", choices=["ema", "model"], default="ema", help="which weights of a .pt file (default: ema)")
    add("--dtype", choices=["fp32", "bf16", "fp16"], help="dtype to write (default: the source's)")

    for name, run in (("weights", write_weights), ("diffusers", write_diffusers_folder), ("pipeline", write_pipeline)):
        add = add_command(name, run)
        add("source", type=Path, help="a run or checkpoint folder" + ", or an official .pt" * (name == "pipeline"))
        add("folder", type=Path, help="where to write" + "; must be new or empty" * (name != "weights"))
        add("--weights", choices=["ema", "raw"], default="ema", help="which weights (default: ema)")
        if name == "weights":
            add("--adapter", action="store_true", help="only the adapters of a run with lora.rank, in peft's format")
        if name == "pipeline":
            add("--config", type=Path, metavar="FILE", help="config of an official .pt, which holds none")
            add("--push", metavar="OWNER/NAME", help="also write it to this hub name")
            add("--private", action="store_true", help="create that hub name as private")
    return parser


def write_config(official: Path, output: Path | None) -> None:
    """Translates a config of the official repository and reports how each key was handled.

    Accepts the training and sampling configs of the four data sets, and the sampling configs for text (configs/t2x).
    The report goes to standard error.
    """
    keys = read_official(official)
    ours, report = translate_config(keys)
    sys.stderr.write("\n".join(report) + "\n")
    try:
        if is_text_config(keys):
            load_t2x_config(None, {}, ours)
        else:
            load_config(base=ours)
    except ValueError as error:
        raise ValueError(f"{official}: its translation is refused: {error}") from None
    yaml = OmegaConf.to_yaml(OmegaConf.create(ours))
    text = f"# Converted from {official.name} by tools.convert config.\n{yaml}"
    if output is None:
        sys.stdout.write(text)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")


def read_official(path: Path) -> dict[str, Any]:
    """Returns the flat mapping in an official config file. Raises FileNotFoundError or ValueError."""
    values = read_yaml(path)
    flat = isinstance(values, dict) and bool(values)
    require(flat, f"config file {path} holds no keys; an official config is a list of `key: value` lines.")
    ours = isinstance(values.get("model"), dict)
    require(not ours, f"config file {path} has sections, so it is already a config of this project.")
    return {str(key): value for key, value in values.items()}


def write_checkpoint_weights(checkpoint: Path, sha256: list[str], output: Path | None, weights: str) -> None:
    """Extracts the weights of an official .pt file, which may hold other Python objects, to safetensors.

    HASH is published by the author of the file (Hugging Face shows it on the file's page); a file with any other
    hash is not opened. Only tensors are read: saved settings (argparse, OmegaConf) are skipped without running any
    of their code, and a file that holds anything else is refused.
    """
    tensors = extract_weights(checkpoint, sha256, weights)
    target = output or checkpoint.with_suffix(".safetensors")
    write_atomically(target, lambda temporary: save_file(tensors, temporary))
    print(f"{target}: {len(tensors)} tensors")


def write_text_network(
    source: str,
    folder: Path,
    config: Path | None,
    revision: str | None,
    lora: str | None,
    lora_scale: float,
    variant: str | None,
    weights: str,
    dtype: str | None,
) -> int:
    """Converts a text-to-video or PixArt-alpha network to a folder that diffusers and this project load.

    SOURCE is a folder in diffusers' format (of a pipeline or of its transformer) or a file of weights: the official
    LatteT2V's, or PixArt-alpha's, whose image network becomes a video network with temporal blocks that start as the
    identity. Prints which tensors were used and which were not, then loads FOLDER with diffusers' class and compares
    the outputs of both; the exit code is 1 if they differ.
    """
    require_new(folder)
    content, wanted = read_json(config) if config else None, DTYPES[dtype] if dtype else None
    network = find_network(source, revision, "source")
    model, report = convert_t2v(network, config=content, variant=variant, prefer=weights, dtype=wanted)
    if lora:
        merge_lora(model, lora, lora_scale)
    save_t2v(model, folder)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{report}\n{folder}: {count / 1e6:.2f} M parameters, {model.dtype}")
    difference = compare_with_diffusers(model, folder)
    is_close = difference <= MAX_DIFFERENCE
    print(f"largest difference to diffusers' output: {difference:.1e}" + ("" if is_close else ", too much"))
    return 0 if is_close else 1


def write_weights(source: Path, folder: Path, weights: str, adapter: bool) -> None:
    """Copies one set of weights of a checkpoint with its config, which is all that sampling needs.

    Adapters are merged into their base weights, or with --adapter written alone as a folder that peft loads.
    """
    print((export_adapter if adapter else export_weights)(source, folder, weights))


def write_diffusers_folder(source: Path, folder: Path, weights: str) -> None:
    """Exports a trained text network as a folder for sample_t2x.py and for diffusers' LattePipeline.

    The folder holds transformer, scheduler, text_encoder and tokenizer, and the vae if diffusers has its class. An
    image network (custom-t2i) becomes a PixArt-alpha folder, for train.init_from.
    """
    omitted = export_run(source, folder, weights=weights)
    print("\n".join([f"{folder} is written", *(f"without {reason}" for reason in omitted)]))


def write_pipeline(
    source: Path, folder: Path, config: Path | None, weights: str, push: str | None, private: bool
) -> None:
    """Exports a trained Latte as a folder that LatteVideoPipeline.from_pretrained loads, optionally pushed to a hub.

    The folder holds config.json, model.safetensors, the autoencoder and a model card (docs/sampling.md). HF_ENDPOINT
    selects the hub; the token comes from HF_TOKEN or `hf auth login`.
    """
    require_new(folder)
    own = load_config(config) if config else None
    pipeline = LatteVideoPipeline.from_checkpoint(source, config=own, weights=weights, device="cpu")
    print(pipeline.save_pretrained(folder, push.rpartition("/")[2] if push else None))
    if push:
        print(pipeline.push_to_hub(push, private=private or None))


if __name__ == "__main__":
    cli.run(main)
