"""Identities of frozen encoders, by which caches are compared; computed from files, without building a network."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from common.storage import file_sha256

from .autoencoder import CONFIG_FILE, WEIGHTS, CodecConfig
from .convert import load_pickled, read_safetensors, weights_digest
from .hub import find_cached, read_json
from .taef2 import DECODER_FILE, ENCODER_FILE
from .text_encoder import PARTS, TextConfig


def codec_identity(config: CodecConfig) -> dict[str, Any]:
    """Returns everything that latents depend on except scale and shift, as JSON values.

    `sha256` covers all weights and the autoencoder's own config, in any file format; None if they are not on this
    machine (hub names are looked up in the local cache only). Raises: ValueError if a weight file cannot be read.
    """
    keys = ("path", "subfolder", "revision", "latent_channels", "downsample_factor", "dtype")
    return {**{key: getattr(config, key) for key in keys}, "sha256": _codec_sha256(config)}


def is_same_codec(made: dict[str, Any], now: dict[str, Any]) -> bool:
    """Returns whether two identities are of the same codec: by weights, or by names if `now` lacks a weights hash."""
    names = ("sha256",) if now["sha256"] else ("path", "subfolder", "revision")
    keys = ("latent_channels", "downsample_factor", "dtype", *names)
    return all(made.get(key) == now[key] for key in keys)


def _codec_sha256(config: CodecConfig) -> str | None:
    if config.path is None:
        return hashlib.sha256(b"pixels").hexdigest()
    inside = config.subfolder or ""
    root = find_cached(config.path, config.revision, "/".join(filter(None, [inside, CONFIG_FILE])))
    if root is None:
        return None
    folder = root / inside
    taef2 = [folder / name for name in (ENCODER_FILE, DECODER_FILE)]
    if all(file.is_file() for file in taef2):
        return weights_digest(*(load_pickled(file) for file in taef2), facts=b"{}")
    weights: dict[str, Tensor] = {}
    for suffix, read in (("safetensors", read_safetensors), ("bin", load_pickled)):  # as `from_pretrained` prefers
        name = re.compile(rf"{WEIGHTS}(-\d+-of-\d+)?\.{suffix}")  # one file or its shards
        for file in sorted(folder.glob("*")) if not weights else ():
            weights |= read(file) if name.fullmatch(file.name) else {}
    if not weights:
        return None
    facts = read_json(folder / CONFIG_FILE)
    facts = {key: value for key, value in facts.items() if key == "_class_name" or not key.startswith("_")}
    return weights_digest(weights, facts=json.dumps(facts, sort_keys=True).encode())


def text_identity(config: TextConfig) -> dict[str, Any]:
    """Returns everything that the features of a caption depend on, as JSON values; `sha256` covers all files."""
    folder = None if config.path is None else find_cached(config.path, config.revision, f"{PARTS[1]}/{CONFIG_FILE}")
    digest = hashlib.sha256()
    files = [file for part in PARTS if folder for file in sorted((folder / part).rglob("*")) if file.is_file()]
    for file in files:
        digest.update(f"{file.relative_to(folder or '').as_posix()}\0{file_sha256(file)}\0".encode())
    return {
        "path": config.path,
        "revision": config.revision,
        "sha256": digest.hexdigest() if files else None,  # None: the files are not on this machine
        "dtype": config.dtype,
        "width": config.caption_channels,
        "max_length": config.max_length,
        "clean_captions": config.clean_captions,
    }


def select_comparable(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a text identity that a cache must match: with the files' hash, or else with their name."""
    ignored = ("path", "revision") if identity["sha256"] or identity["path"] is None else ()
    return {key: value for key, value in identity.items() if key not in ignored and not (key == "sha256" and not value)}
