"""Saves and loads a class-conditional or unconditional Latte as a folder or hub repository, like diffusers' pipelines.

    pipeline = LatteVideoPipeline.from_checkpoint("results/ffs_train")
    pipeline.save_pretrained("my-latte")
    pipeline.push_to_hub("me/my-latte")
    videos = LatteVideoPipeline.from_pretrained("me/my-latte")(num_videos=4, seed=0)  # uint8 (4, F, H, W, 3)

The folder holds `config.json` (network, diffusion, codec, default sampling settings), `model.safetensors`, the
autoencoder in `codec/`, and a model card. For text to video, use diffusers' own pipeline.

Letters: n videos, F frames, H W pixels.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from common.checks import require
from common.storage import write_folder_atomically
from engine.build import build_model, count_parameters
from engine.config import Config, load_config
from models.autoencoder import LatentCodec
from models.convert_t2v import require_new
from models.hub import find_folder, local_folder, read_json
from models.taef2 import DECODER_FILE, ENCODER_FILE
from sample.generate import Generator, sampler_settings
from sample.source import Source

CLASS_NAME = "LatteVideoPipeline"
CONFIG_FILE, WEIGHTS_FILE, CODEC_FOLDER, CARD_FILE = "config.json", "model.safetensors", "codec", "README.md"
FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, f"{CODEC_FOLDER}/*")
DATA_KEYS = ("num_frames", "image_size", "frame_interval")  # keys of the `data` section that define a clip
SAMPLE_KEYS = ("seed", "steps", "method", "eta", "guidance_scale", "batch_size", "precision", "fps")
CARD = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")  # template


class LatteVideoPipeline:
    """Network, diffusion and codec behind one call; its defaults come from the generator's `config`."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    @classmethod
    def from_checkpoint(cls, path: str | Path, **options: Any) -> LatteVideoPipeline:
        """Loads a checkpoint or run folder, or an official file; see `Generator.from_checkpoint`."""
        return cls(Generator.from_checkpoint(path, **options))

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
        precision: str | None = None,
    ) -> LatteVideoPipeline:
        """Loads a folder written by `save_pretrained`, or a hub name; prints `revision` and commit of the latter.

        `device` None is CUDA if available; `precision` None is that of the folder's config.

        Raises: FileNotFoundError if the folder, name or one of its files is missing; ValueError if the folder is
            not such a pipeline, or is damaged.
        """
        folder = find_folder(str(name), revision, "pretrained model", FILES)
        config, names = _read_config(folder)
        precision = precision or config.sample.precision
        source = Source(folder / WEIGHTS_FILE, config, names)
        return cls(Generator.from_checkpoint(source, device=device, precision=precision))

    def __call__(self, labels: Sequence[int | str] | None = None, num_videos: int = 4, **settings: Any) -> np.ndarray:
        """Returns `num_videos` videos as uint8 (n, F, H, W, 3); each depends only on the seed and its index.

        `labels`: class numbers or names, used in turn (None: all); `settings`: as for `Generator.batches`.
        """
        defaults = sampler_settings(self.generator.config)
        return self.generator.sample(**{**defaults, "labels": labels, **settings}, num=num_videos)

    def save_pretrained(self, folder: str | Path, name: str | None = None) -> Path:
        """Writes the pipeline atomically; returns the folder. `name`: title of the model card (None: folder name).

        Raises: FileExistsError if the folder is not empty.
        """
        folder = require_new(Path(folder))
        return write_folder_atomically(folder, lambda new: self._write(new, name or folder.name))

    def push_to_hub(self, name: str, *, private: bool | None = None, message: str = "Upload a Latte") -> str:
        """Uploads the pipeline to a hub repository, created if new; returns the URL of the commit.

        Uses the hub at HF_ENDPOINT, and the token from HF_TOKEN or `hf auth login`.

        Raises: OSError if the upload fails.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        hub = HfApi()
        with tempfile.TemporaryDirectory() as folder:
            written = self.save_pretrained(Path(folder) / "pipeline", name.rpartition("/")[2])
            try:
                hub.create_repo(name, private=private, exist_ok=True)
                return str(hub.upload_folder(repo_id=name, folder_path=written, commit_message=message))
            except (HfHubHTTPError, HFValidationError, OSError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise OSError(f"{name} could not be uploaded to the hub: {reason}") from error

    def _write(self, folder: Path, name: str) -> None:
        config, names, codec = self.generator.config, self.generator.conditions.names, self.generator.codec
        _save_weights(self.generator.model, folder / WEIGHTS_FILE)
        _save_codec(codec, folder / CODEC_FOLDER)
        inside = {"path": codec.config.path and CODEC_FOLDER, "subfolder": None, "revision": None}
        described = {
            "_class_name": CLASS_NAME,
            "model": asdict(config.model),
            "diffusion": asdict(config.diffusion),
            "data": {key: getattr(config.data, key) for key in DATA_KEYS},
            "codec": asdict(config.codec) | inside,
            "sample": {key: getattr(config.sample, key) for key in SAMPLE_KEYS},
            "class_names": names,
        }
        count = config.model.num_classes
        listed = "\n".join(f"{number}. {each}" for number, each in enumerate(names or []))
        card = CARD.format(
            c=config,
            name=name,
            kind=f"of {count} classes" if count else "unconditional",
            millions=count_parameters(build_model(config, "meta")) / 1e6,
            classes=f"\n## Classes\n\n{listed}\n" if listed else "",
        )
        (folder / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        (folder / CARD_FILE).write_text(card, encoding="utf-8")


def _save_weights(network: nn.Module, file: Path) -> None:
    weights = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    save_file(weights, file, metadata={"format": "pt"})


def _save_codec(codec: LatentCodec, folder: Path) -> None:
    """Writes the autoencoder in a format that `codec.path` accepts; nothing for pixel space."""
    network: Any = codec.network
    if codec.config.path is None:
        return
    folder.mkdir()
    if hasattr(network, "save_config"):
        network.save_config(folder)
        _save_weights(network, folder / "diffusion_pytorch_model.safetensors")
        return
    source = (local_folder(codec.config.path) or Path()) / (codec.config.subfolder or "")
    for name in (ENCODER_FILE, DECODER_FILE):
        shutil.copyfile(source / name, folder / name)


def _read_config(folder: Path) -> tuple[Config, list[str] | None]:
    """Returns the configuration and the class names in the folder's `config.json`."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a pipeline of this project: it has no {name}")
    described = read_json(folder / CONFIG_FILE)
    kind = described.pop("_class_name", None)
    require(kind == CLASS_NAME, f"{folder / CONFIG_FILE} describes a {kind}, not a {CLASS_NAME}")
    names = described.pop("class_names", None)
    codec = described.get("codec")
    if isinstance(codec, dict) and codec.get("path"):
        codec["path"] = str(folder / CODEC_FOLDER)
    return load_config(None, base=described, saved=True), names
