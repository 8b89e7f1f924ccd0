"""Finds models in local folders or on the Hugging Face hub, downloads them, and reads their JSON files."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.checks import require

log = logging.getLogger(__name__)


def local_folder(path: str) -> Path | None:
    """Returns the folder that `path` names, `~` expanded; None if there is no such folder."""
    with suppress(RuntimeError):  # no such home folder
        folder = Path(path).expanduser()
        return folder if folder.is_dir() else None
    return None


def is_hub_name(path: str) -> bool:
    """Returns whether `path` has the form `owner/name` rather than that of a folder."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))


def find_folder(path: str, revision: str | None, key: str, patterns: Sequence[str]) -> Path:
    """Returns the folder that `path` names; a hub name is downloaded, and its commit is logged.

    Args:
        path: a folder, `owner/name`, or `owner/name@revision`.
        revision: for a hub name without `@revision`.
        key: the configuration key of `path`, for errors.
        patterns: files to download from the hub.

    Raises: FileNotFoundError if there is no folder and no download; ValueError for a folder with a revision.
    """
    folder = local_folder(path)
    if folder is not None:
        local = f"{key}={path} is a local folder, which has no revision {revision}: omit the revision"
        require(not revision, local)
        return folder
    if Path(path).exists() or not is_hub_name(path):
        raise FileNotFoundError(f"{key}: there is no folder {path}")
    from huggingface_hub import snapshot_download  # slow to import

    name, _, stated = path.partition("@")
    try:
        found = snapshot_download(name, revision=stated or revision, allow_patterns=list(patterns))
    except (OSError, ValueError) as error:
        reason = f"could not be downloaded from the hub ({type(error).__name__})"
        raise FileNotFoundError(f"{key}={path} is not a local folder and {reason}") from error
    log.warning("%s: revision %s, commit %s", name, stated or revision or "main", Path(found).name)
    return Path(found)


def find_cached(path: str, revision: str | None, file: str) -> Path | None:
    """Returns `path` if it is a local folder, else its folder in the hub's cache if that has `file`, else None."""
    folder = local_folder(path)
    if folder is not None or not is_hub_name(path):
        return folder
    from huggingface_hub import try_to_load_from_cache  # slow to import

    found = try_to_load_from_cache(path, file, revision=revision)
    return Path(found).parents[file.count("/")] if isinstance(found, str) else None


def require_part(folder: Path, name: str) -> None:
    """Raises FileNotFoundError unless the folder has the sub-folder `name`."""
    if not (folder / name).is_dir():
        raise FileNotFoundError(f"{folder} has no sub-folder {name}, which every Latte folder has")


def read_json(file: Path) -> dict[str, Any]:
    """Returns the JSON object in `file`. Raises: OSError, ValueError if it is missing, broken or not an object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing; copy the model's folder again") from None
    except (ValueError, RecursionError):
        content = None
    require(isinstance(content, dict), f"{file} is not valid JSON, or not an object; copy it again")
    return content
