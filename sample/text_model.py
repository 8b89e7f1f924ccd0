"""The parts of a text-to-video model: of a folder in diffusers' format, or of a training of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from common.checks import require
from engine.build import build_model
from engine.checkpoint import find_checkpoint, load_checkpoint_config, read_state, weights_file
from engine.config import Config
from engine.weights import load_checkpoint_weights, ramp_temporal_positions
from models import hub
from models.autoencoder import CodecConfig
from models.convert import load_weights, require_finite
from models.convert_t2v import load_t2v
from models.hub import require_part
from models.latte_t2v import LatteT2V
from models.text_encoder import MAX_WORDS

from .t2v_export import describe_scheduler
from .t2x_config import T2XConfig

PARTS = ("tokenizer", "text_encoder", "transformer", "scheduler", "vae*")
METHODS = {"auto": "DDPM", "ddpm": "DDPM", "ddim": "DDIM"}  # sample.method -> sample_method


class TextModel(Protocol):
    """Reads each part when it is asked for. Raises: FileNotFoundError, ValueError where a part is missing or broken."""

    @property
    def max_length(self) -> int:
        """Pieces that a prompt is cut to."""

    def text_folder(self) -> Path:
        """Returns the folder with the text encoder and its tokenizer."""

    def scheduler_settings(self) -> dict[str, Any]:
        """Returns the noise schedule, as in a `scheduler_config.json`."""

    def load_network(self, dtype: torch.dtype) -> LatteT2V:
        """Returns the network on the CPU."""

    def codec_config(self, config: T2XConfig) -> CodecConfig:
        """Returns the decoder that `config` asks for."""


@dataclass(frozen=True)
class FolderModel:
    """A Latte folder: tokenizer, text_encoder, transformer, scheduler, vae, vae_temporal_decoder."""

    folder: Path
    max_length: int = MAX_WORDS

    @classmethod
    def find(cls, config: T2XConfig) -> FolderModel:
        """Finds `pretrained_model_path`. Raises: FileNotFoundError where it is neither a folder nor a hub name."""
        patterns = ["model_index.json", *(f"{part}/*" for part in PARTS)]
        return cls(hub.find_folder(config.pretrained_model_path, config.revision, "pretrained_model_path", patterns))

    def text_folder(self) -> Path:
        return self.folder

    def scheduler_settings(self) -> dict[str, Any]:
        require_part(self.folder, "scheduler")
        return hub.read_json(self.folder / "scheduler" / "scheduler_config.json")

    def load_network(self, dtype: torch.dtype) -> LatteT2V:
        require_part(self.folder, "transformer")
        return load_t2v(self.folder / "transformer", dtype=dtype)

    def codec_config(self, config: T2XConfig) -> CodecConfig:
        name = "vae_temporal_decoder" if config.enable_vae_temporal_decoder else "vae"
        require_part(self.folder, name)
        described = hub.read_json(self.folder / name / "config.json")
        widths = described.get("block_out_channels") or described["encoder_block_out_channels"]  # AutoencoderTiny's
        return CodecConfig(
            path=str(self.folder),
            subfolder=name,
            latent_channels=described["latent_channels"],
            downsample_factor=2 ** (len(widths) - 1),
            scale=described.get("scaling_factor", 0.18215),
            dtype=config.precision,
            chunk_size=config.decode_chunk_size,
        )


@dataclass(frozen=True)
class RunModel:
    """A checkpoint of a training of ours, which names its text encoder and its codec."""

    checkpoint: Path
    config: Config

    @classmethod
    def open(cls, path: str) -> RunModel:
        """Opens a checkpoint, or the newest one of a run.

        Raises: ValueError, one sentence, where there is none, or it is of another network.
        """
        checkpoint = find_checkpoint(Path(path))
        config = load_checkpoint_config(checkpoint)
        assert config is not None  # of a folder
        require(config.model.is_text, f"ckpt={path} is no text network: sample it with sample/sample.py.")
        require(
            config.model.name != "custom-t2i",
            f"ckpt={path} is an image network, a start for training: give it to train.init_from.",
        )
        describe_scheduler(config)  # or there is no sampler for it
        return cls(checkpoint, config)

    @property
    def max_length(self) -> int:
        return self.config.text.max_length

    def settings(self) -> dict[str, Any]:
        """Returns what its config says, by the keys of `T2XConfig`."""
        sample, data = self.config.sample, self.config.data
        return {
            "video_length": data.num_frames,
            "image_size": [data.image_size, data.image_size],
            "clean_caption": self.config.text.clean_captions,
            "sample_method": METHODS[sample.method],
            "num_sampling_steps": sample.steps,
            "eta": sample.eta,
            "guidance_scale": sample.guidance_scale,
            "precision": sample.precision,
            "decode_chunk_size": self.config.codec.chunk_size,
            "fps": sample.fps,
        }

    def text_folder(self) -> Path:
        return self.config.text.folder()

    def scheduler_settings(self) -> dict[str, Any]:
        return describe_scheduler(self.config)

    def load_network(self, dtype: torch.dtype) -> LatteT2V:
        kind = self.config.sample.weights
        model = cast(LatteT2V, build_model(self.config))
        weights, file = load_checkpoint_weights(self.checkpoint, kind), weights_file(self.checkpoint, kind)
        require_finite(weights, file)
        load_weights(model, weights, str(file))
        ramp_temporal_positions(self.config, read_state(self.checkpoint)["step"], model)
        return model.to(dtype).eval()

    def codec_config(self, config: T2XConfig) -> CodecConfig:
        return self.config.codec
