"""A model that is a folder here or a name on the hub: found, and its parts asked for by name."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def find_folder(path: str, revision: str | None, key: str, patterns: Sequence[str]) -> Path:
    """The folder that `path` names, downloaded where it is a hub name; says which state of it.

    Args:
        path: a folder, `owner/name`, or `owner/name@revision`.
        revision: of a hub name that states none.
        key: what `path` is called in a configuration.
        patterns: the files that are needed of a hub name.

    Raises: FileNotFoundError, one sentence, where it is neither; ValueError for the revision of a folder.
    """
    folder = Path(path)
    with suppress(RuntimeError):  # the home of a user that there is not
        folder = folder.expanduser()
    if folder.is_dir():
        refuse_revision(path, revision, key)
        return folder
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{key}: there is no folder {folder}")
    from huggingface_hub import snapshot_download

    name, _, stated = path.partition("@")
    try:
        found = snapshot_download(name, revision=stated or revision, allow_patterns=list(patterns))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{key}={path} is not a folder here, and could not be had from the hub ({type(error).__name__})"
        ) from error
    log.warning("%s: revision %s, commit %s", name, stated or revision or "main", Path(found).name)
    return Path(found)


def refuse_revision(path: str, revision: str | None, key: str) -> None:
    """Raises: ValueError where a revision is stated; `path` is a folder here, which has none."""
    if revision:
        raise ValueError(f"{key}={path} is a folder here, which has no revision {revision}: leave that out")


def require_part(folder: Path, name: str) -> None:
    """Raises: FileNotFoundError unless the folder has that sub-folder."""
    if not (folder / name).is_dir():
        raise FileNotFoundError(f"{folder} has no sub-folder {name}, which is a part of a Latte folder")


def read_json(file: Path) -> dict[str, Any]:
    """The names and values of a JSON file.

    Raises: OSError where it cannot be read; ValueError where it is broken or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing, which is a part of a folder in diffusers' format") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not whole JSON; copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no names and values; copy it again")
    return content
