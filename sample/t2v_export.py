"""Exports a trained text network as a Latte folder that `sample_t2x.py` and diffusers' LattePipeline load.

    transformer/ scheduler/ vae/ text_encoder/ tokenizer/ model_index.json

The scheduler has the noise schedule and prediction of training; the VAE is included if diffusers has its class. An
image network becomes a PixArt-alpha folder with only the transformer.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.checks import require
from common.storage import write_folder_atomically, write_json
from engine.checkpoint import find_checkpoint, read_state, weights_file
from engine.config import Config, load_config
from engine.weights import temporal_position_scale
from models.autoencoder import AUTOENCODERS
from models.convert_t2v import CONFIG_FILE, SCALE, WEIGHTS, require_new
from models.hub import local_folder
from models.text_encoder import PARTS

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}  # ours -> diffusers'
PREDICTIONS = {"epsilon": "epsilon", "x_start": "sample", "velocity": "v_prediction"}
IMAGE_CLASS = "PixArtTransformer2DModel"
PIPELINE = {
    "_class_name": "LattePipeline",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "LatteTransformer3DModel"],
}


def export_run(source: str | Path, folder: Path, *, weights: str = "ema") -> list[str]:
    """Writes the network of a run or checkpoint, and the other parts of its pipeline, to a new folder.

    A network that predicts no variance gets one of zeros, because LattePipeline expects one in half the channels.

    Args:
        weights: `ema` or `raw`.

    Returns: the omitted parts with reasons, one line each.

    Raises: ValueError or OSError if the source is not a text network, or LattePipeline cannot sample its diffusion.
    """
    checkpoint = find_checkpoint(Path(source))
    config = load_config(checkpoint / "config.yaml", saved=True)
    require(
        config.model.is_text,
        f"{source} is not a text network (model.name={config.model.name}): sample it with sample/sample.py.",
    )
    require(
        not config.lora.rank,
        f"{source} holds only adapters: merge them into their base weights first (python -m tools.convert weights).",
    )
    require_new(folder)
    omitted: list[str] = []

    def write(new: Path) -> None:
        _write_network(checkpoint, config, new / "transformer", weights)
        if config.model.name == "custom-t2i":
            omitted.append("scheduler, vae and text: an image network only initialises training (train.init_from)")
        elif reason := _write_pipeline(config, new):
            omitted.append(f"vae: {reason}")

    write_folder_atomically(folder, write)
    return omitted


def _write_pipeline(config: Config, out: Path) -> str:
    """Writes everything but the network; returns the reason if the VAE is omitted, else ""."""
    write_json(out / "scheduler" / "scheduler_config.json", describe_scheduler(config), indent=2)
    text = config.text.folder()
    for part in PARTS:
        shutil.copytree(text / part, out / part)
    folder = local_folder(config.codec.path) if config.codec.path else None
    if folder is None:
        return "codec.path is not a folder on this machine"
    folder = folder / (config.codec.subfolder or "")
    file = folder / CONFIG_FILE
    facts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if facts.get("_class_name") not in AUTOENCODERS:
        return f"{folder} is not a diffusers autoencoder"
    if config.codec.shift:
        return f"codec.shift is {config.codec.shift}, which LattePipeline does not support"
    shutil.copytree(folder, out / "vae", ignore=shutil.ignore_patterns(CONFIG_FILE, ".*"))
    write_json(out / "vae" / CONFIG_FILE, {**facts, "scaling_factor": config.codec.scale}, indent=2)
    write_json(out / "model_index.json", {**PIPELINE, "vae": ["diffusers", facts["_class_name"]]}, indent=2)
    return ""


def _write_network(checkpoint: Path, config: Config, out: Path, weights: str) -> None:
    file, target = weights_file(checkpoint, weights), out / f"{WEIGHTS}.safetensors"
    require(file.is_file(), f"{checkpoint} holds no {weights!r} weights ({file.name} is absent); use the other kind.")
    described = config.text_network().to_dict()
    out.mkdir(parents=True)
    if config.model.name == "custom-t2i":
        del described["video_length"]
        described |= {"_class_name": IMAGE_CLASS, "use_additional_conditions": False}
    elif (scale := temporal_position_scale(config, read_state(checkpoint)["step"])) != 1:
        described[SCALE] = scale
    if config.model.learn_sigma or config.model.name == "custom-t2i":
        shutil.copy(file, target)
    else:
        described["out_channels"] *= 2
        save_file(add_zero_variance(load_file(file), described["patch_size"] ** 2), target, metadata={"format": "pt"})
    write_json(out / CONFIG_FILE, described, indent=2)


def add_zero_variance(weights: dict[str, Tensor], pixels: int) -> dict[str, Tensor]:
    """Returns weights that predict C zeros after the C channels of each of the `pixels` in a patch."""
    padded = dict(weights)
    for key in ("proj_out.weight", "proj_out.bias"):
        parts = weights[key].unflatten(0, (pixels, -1))  # (p*p, C, ...)
        padded[key] = torch.cat([parts, torch.zeros_like(parts)], dim=1).flatten(0, 1)
    return padded


def describe_scheduler(config: Config) -> dict[str, Any]:
    """Returns the content of `scheduler_config.json` for the diffusion of `config`.

    Raises: ValueError for flows, which LattePipeline cannot sample.
    """
    diffusion = config.diffusion
    require(
        diffusion.prediction in PREDICTIONS,
        f"diffusion.prediction={diffusion.prediction} is not supported by LattePipeline; use {', '.join(PREDICTIONS)}.",
    )
    ratio = 1000 / diffusion.num_steps
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": diffusion.num_steps,
        "beta_schedule": SCHEDULES[diffusion.schedule],
        "beta_start": 1e-4 * ratio,
        "beta_end": 0.02 * ratio,
        "prediction_type": PREDICTIONS[diffusion.prediction],
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
    }
