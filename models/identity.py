"""Which autoencoder a `codec` section names, by its weights alone: no network is built, and diffusers stays out."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from .autoencoder import CodecConfig, local_folder
from .convert import weights_digest
from .pickled import load_pickled
from .taef2 import DECODER_FILE, ENCODER_FILE

# what `from_pretrained` reads, in its order of preference: one file or its parts
WEIGHT_FILES = (
    re.compile(r"diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors"),
    re.compile(r"diffusion_pytorch_model(-\d+-of-\d+)?\.bin"),
)


def codec_identity(config: CodecConfig) -> dict[str, Any]:
    """What latents depend on, scale and shift apart, as JSON-able facts.

    `sha256` is over all weights and the autoencoder's own config; it does not depend on the file format, and is None
    where the weights are not on this machine (hub names are looked up in the local cache only).

    Raises: ValueError where a weight file cannot be read.
    """
    return {
        "path": config.path,
        "subfolder": config.subfolder,
        "revision": config.revision,
        "latent_channels": config.latent_channels,
        "downsample_factor": config.downsample_factor,
        "dtype": config.dtype,
        "sha256": _sha256(config),
    }


def same_codec(made: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two identities are of one codec: by their weights, or by their names where these are not at hand."""
    named = ("path", "subfolder", "revision")
    keys = ["latent_channels", "downsample_factor", "dtype", *(["sha256"] if now["sha256"] else named)]
    return all(made.get(key) == now[key] for key in keys)


def _sha256(config: CodecConfig) -> str | None:
    if config.path is None:
        return hashlib.sha256(b"pixels").hexdigest()
    folder = _folder(config)
    if folder is None:
        return None
    taef2 = [folder / name for name in (ENCODER_FILE, DECODER_FILE)]
    if all(file.is_file() for file in taef2):
        return weights_digest(*(_read(file) for file in taef2), facts=b"{}")
    files = next((found for pattern in WEIGHT_FILES if (found := _matching(folder, pattern))), [])
    if not files:
        return None
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        facts = {key: value for key, value in facts.items() if key == "_class_name" or not key.startswith("_")}
    except (OSError, ValueError, AttributeError, RecursionError):
        raise ValueError(f"codec.path={config.path}: config.json does not describe an autoencoder") from None
    weights = {name: value for file in files for name, value in _read(file).items()}
    return weights_digest(weights, facts=json.dumps(facts, sort_keys=True).encode())


def _folder(config: CodecConfig) -> Path | None:
    """Where the weights are on this machine, or None."""
    try:
        folder = local_folder(config)
    except FileNotFoundError:
        return None
    if folder is not None:
        return folder / (config.subfolder or "")
    from huggingface_hub import try_to_load_from_cache

    name = "/".join(filter(None, [config.subfolder, "config.json"]))
    found = try_to_load_from_cache(str(config.path), name, revision=config.revision)
    return Path(found).parent if isinstance(found, str) else None


def _matching(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    return sorted(file for file in folder.glob("*") if pattern.fullmatch(file.name))


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix != ".safetensors":
        return load_pickled(file)
    try:
        return load_file(file)
    except Exception as error:  # safetensors has errors of its own
        raise ValueError(f"{file} cannot be read: {error}") from None
