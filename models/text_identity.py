"""Which text encoder a `text` section names, by its files alone: nothing is loaded, and transformers stays out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .text_encoder import PARTS, TextConfig

NAMES = ("path", "revision")


def text_identity(config: TextConfig) -> dict[str, Any]:
    """What features of a caption depend on, as JSON-able facts.

    `sha256` is over all files of the tokenizer and of the encoder; None where these are not on this machine (hub names
    are looked up in the local cache only).
    """
    return {
        "path": config.path,
        "revision": config.revision,
        "sha256": _sha256(config),
        "dtype": config.dtype,
        "width": config.caption_channels,
        "max_length": config.max_length,
        "clean_captions": config.clean_captions,
    }


def comparable(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What of an identity must be the same in a cache: the files, or the name where these are not at hand."""
    ignored = NAMES if identity["sha256"] or identity["path"] is None else ()
    return {key: value for key, value in identity.items() if key not in ignored and not (key == "sha256" and not value)}


def _sha256(config: TextConfig) -> str | None:
    folder = _folder(config)
    if folder is None:
        return None
    digest = hashlib.sha256()
    files = [file for part in PARTS for file in sorted((folder / part).rglob("*")) if file.is_file()]
    for file in files:
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.relative_to(folder).as_posix()}\0{content}\0".encode())
    return digest.hexdigest() if files else None


def _folder(config: TextConfig) -> Path | None:
    """Where the encoder is on this machine, or None."""
    if config.path is None:
        return None
    folder = Path(config.path)
    with suppress(RuntimeError):  # the home of a user that there is not
        folder = folder.expanduser()
    if folder.is_dir():
        return folder
    if config.path.count("/") != 1 or config.path.startswith((".", "/", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(config.path, f"{PARTS[1]}/config.json", revision=config.revision)
    return Path(found).parent.parent if isinstance(found, str) else None
