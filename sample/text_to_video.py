"""Opens text models, from diffusers-format folders or our training runs, and builds Generators for them.

Matches diffusers' LattePipeline for one prompt and the same initial latents.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from common.checks import require
from datasets.config import DataConfig
from diffusion import ConditionConfig, ScheduledDiffusion
from diffusion.scheduled import LATTE_NOISE
from engine.build import build_model
from engine.checkpoint import read_state
from engine.conditions import TextFeatures
from engine.config import Config
from engine.weights import ramp_temporal_positions
from models import hub
from models.autoencoder import DTYPES, CodecConfig, LatentCodec
from models.config import LatteConfig
from models.config_t2v import LatteT2VConfig
from models.convert import load_weights, require_finite
from models.convert_t2v import find_network, load_t2v
from models.latte_t2v import LatteT2V
from models.lora import merge_lora
from models.quantize import quantize
from models.text_encoder import MAX_WORDS, Prompt

from .generate import Generator
from .source import Source
from .t2v_export import describe_scheduler
from .t2x_config import T2XConfig

log = logging.getLogger(__name__)

PARTS = ("tokenizer", "text_encoder", "transformer", "scheduler", "vae*")
SPOOL_BYTES = 2**28  # of features in memory; a prompt of Latte-1 has up to 2 MB
METHODS = {"auto": "DDPM", "ddpm": "DDPM", "ddim": "DDIM"}  # sample.method -> sample_method


@dataclass(frozen=True)
class TextModel:
    """The parts of a text model; networks are loaded on demand."""

    text_folder: Path  # has `tokenizer` and `text_encoder`
    max_length: int  # tokens; longer prompts are truncated
    scheduler: dict[str, Any]  # content of a `scheduler_config.json`
    codec: CodecConfig
    load_network: Callable[[torch.dtype], LatteT2V]  # on the CPU
    weights: Path  # what it reads: a folder or file
    config: Config | None = None  # of training; None: unknown

    def condition(self, frames: int) -> ConditionConfig:
        """Returns which given frames the network supports: any, if its training config is unknown."""
        if self.config is not None:
            return self.config.condition
        return ConditionConfig("random", max_frames=frames - 1) if frames > 1 else ConditionConfig()


def open_folder(config: T2XConfig) -> TextModel:
    """Opens `pretrained_model_path`, a folder or hub name. Raises: OSError or ValueError, naming the bad part."""
    patterns = ["model_index.json", *(f"{part}/*" for part in PARTS)]
    folder = hub.find_folder(config.pretrained_model_path, config.revision, "pretrained_model_path", patterns)
    vae = "vae_temporal_decoder" if config.enable_vae_temporal_decoder else "vae"
    network = () if config.transformer else ("transformer",)
    for part in ("tokenizer", "text_encoder", *network, "scheduler", vae):
        hub.require_part(folder, part)
    described = hub.read_json(folder / vae / "config.json")
    widths = described.get("block_out_channels") or described["encoder_block_out_channels"]  # AutoencoderTiny's
    codec = CodecConfig(
        path=str(folder),
        subfolder=vae,
        latent_channels=described["latent_channels"],
        downsample_factor=2 ** (len(widths) - 1),
        scale=described.get("scaling_factor", 0.18215),
        dtype=config.precision,
        chunk_size=config.decode_chunk_size,
    )
    scheduler = hub.read_json(folder / "scheduler" / "scheduler_config.json")
    weights = folder / "transformer"
    return TextModel(folder, MAX_WORDS, scheduler, codec, lambda dtype: load_t2v(weights, dtype=dtype), weights)


def open_run(path: str) -> tuple[TextModel, dict[str, Any]]:
    """Opens a text network's checkpoint, or the newest of a run; returns it and its settings by official key."""
    source = Source.open(path)
    config = source.config
    if config is None:
        raise ValueError(f"ckpt={path} holds only weights: name a run or checkpoint folder, or use --transformer.")
    require(config.model.is_text, f"ckpt={path} is not a text network: sample it with sample/sample.py.")
    require(
        config.model.name != "custom-t2i",
        f"ckpt={path} is an image network, which only initialises training: give it to train.init_from.",
    )
    sample, data = config.sample, config.data
    settings = {
        "video_length": data.num_frames,
        "image_size": [data.image_size, data.image_size],
        "clean_caption": config.text.clean_captions,
        "sample_method": METHODS.get(sample.method, sample.method),  # other methods must be set by flag
        "num_sampling_steps": sample.steps,
        "eta": sample.eta,
        "guidance_scale": sample.guidance_scale,
        "precision": sample.precision,
        "decode_chunk_size": config.codec.chunk_size,
        "fps": sample.fps,
    }

    def load_network(dtype: torch.dtype) -> LatteT2V:
        model = cast(LatteT2V, build_model(config))
        weights, file = source.weights(sample.weights), source.weights_file(sample.weights)
        require_finite(weights, file)
        load_weights(model, weights, str(file))
        ramp_temporal_positions(config, read_state(source.path)["step"], model)
        return model.to(dtype).eval()

    text, scheduler = config.text, describe_scheduler(config)
    file = source.weights_file(sample.weights)
    return TextModel(text.folder(), text.max_length, scheduler, config.codec, load_network, file, config), settings


def describe_network(network: LatteT2VConfig, model: TextModel, frames: int) -> Config:
    """Returns a configuration for a network whose training config is unknown, for clips of `frames` frames."""
    heads, layers, patch = network.num_attention_heads, 2 * network.num_layers, network.patch
    learns_sigma = network.channels[1] == 2 * network.channels[0]
    return Config(
        LatteConfig("custom-t2v", network.width, layers, heads, patch, learn_sigma=learns_sigma),
        condition=model.condition(frames),
        data=DataConfig("captions", num_frames=frames, image_size=network.sample_size * model.codec.downsample_factor),
        codec=model.codec,
    )


class FeatureFile(Sequence[Prompt]):
    """Features of `count` prompts by number; above SPOOL_BYTES in an unnamed temporary file of `folder`."""

    def __init__(self, count: int, folder: Path | None = None) -> None:
        place = str(folder) if folder else None
        self.file = tempfile.SpooledTemporaryFile(SPOOL_BYTES, dir=place)  # noqa: SIM115 it lives as long as this
        self.places = [(0, 0)] * count  # start and bytes

    def __len__(self) -> int:
        return len(self.places)

    def put(self, number: int, prompt: Prompt) -> None:
        """Stores the features of prompt `number`."""
        tensors = {name: value.cpu().clone() for name, value in prompt._asdict().items() if value is not None}
        self.places[number] = self.file.seek(0, os.SEEK_END), self.file.write(save(tensors))

    def __getitem__(self, number: Any) -> Any:
        start, size = self.places[number]
        self.file.seek(start)
        found = load(self.file.read(size))
        return Prompt(found["positive"], found.get("negative"))


@dataclass
class Prompts:
    """Encoded prompts as conditions of a Generator; the label of a video is the index of its prompt.

    Batches have one video, because prompts are not padded.
    """

    prompts: Sequence[Prompt]
    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None  # None: as they are
    names: None = None
    dropout: float = 0.0

    @property
    def count(self) -> int:
        return len(self.prompts)

    def batch(self, labels: Tensor) -> TextFeatures:
        prompt, target = self.prompts[int(labels)], (self.device, self.dtype)
        negative = None if prompt.negative is None else prompt.negative.to(*target)
        return TextFeatures(prompt.positive.to(*target), None, negative)


def build_generator(
    config: T2XConfig,
    model: TextModel,
    prompts: Sequence[Prompt],
    device: torch.device,
    say: Callable[[str], object] = lambda text: None,
) -> Generator:
    """Loads network and decoder. Raises: ValueError if they do not match each other or `image_size`."""
    if config.cpu_offload and device.type == "cpu":
        log.warning("cpu_offload has no effect without a GPU")
    resting = torch.device("cpu") if config.cpu_offload else device
    say("loading the network")
    network = load_network(config, model, resting)
    say("loading the decoder")
    codec = load_codec(config, model, resting)
    channels, theirs = network.config.channels[0], model.codec.latent_channels
    require(theirs == channels, f"the decoder takes {theirs} latent channels, but the network predicts {channels}")
    learns_variance = network.config.channels[1] == 2 * channels
    grid = model.codec.downsample_factor * network.config.patch
    require(
        all(side % grid == 0 for side in config.image_size),
        f"image_size {config.image_size} must be divisible by {grid} for this model",
    )
    if config.compile:
        say("compiling network and decoder in the first step; this takes minutes")

    return Generator(
        network,
        codec,
        model.config or describe_network(network.config, model, config.video_length),
        Prompts(prompts, device, network.dtype),
        schedule=lambda steps: build_schedule(replace(config, num_sampling_steps=steps), model, learns_variance),
        device=device,
        offload=config.cpu_offload,
    )


def build_schedule(config: T2XConfig, model: TextModel, learned_variance: bool = True) -> ScheduledDiffusion:
    """Returns the model's noise schedule, with any betas set in `config`.

    `learned_variance`: whether the network also predicts a variance.
    """
    betas = {key: getattr(config, key) for key in LATTE_NOISE if getattr(config, key) is not None}
    variance_type = config.variance_type if learned_variance else None
    return ScheduledDiffusion({**model.scheduler, **betas}, config.num_sampling_steps, variance_type)


def load_network(config: T2XConfig, source: TextModel, device: torch.device) -> LatteT2V:
    """Returns the network of `source` or, if set, of `config.transformer`, ready to sample."""
    dtype = DTYPES[config.precision]
    other = config.transformer and find_network(config.transformer, None, "transformer")
    model = load_t2v(other, dtype=dtype) if other else source.load_network(dtype)
    if config.lora:
        merge_lora(model, config.lora, config.lora_scale)
    if not config.enable_temporal_attentions:
        model.temporal_transformer_blocks = nn.ModuleList()  # frames become independent images
    quantize(model.requires_grad_(False), config.quantize_transformer, device)
    for block in model.blocks if config.compile else ():
        block.compile()
    return model


def load_codec(config: T2XConfig, model: TextModel, device: torch.device) -> LatentCodec:
    """Returns the model's codec, with slicing, tiling and compilation as configured."""
    codec = LatentCodec.from_config(model.codec, device)
    network: Any = codec.network
    for wanted, method in ((config.vae_slicing, "enable_slicing"), (config.vae_tiling, "enable_tiling")):
        if wanted:
            require(hasattr(network, method), f"{type(network).__name__} has no {method}: leave vae_{method[7:]} out")
            getattr(network, method)()
    if config.compile:
        network.decoder.compile()
    return codec
