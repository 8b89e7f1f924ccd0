"""A model that is a folder here or a name on the hub: found, and its parts asked for by name."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)


def find_folder(path: str, revision: str | None, key: str, patterns: Sequence[str]) -> Path:
    """The folder that `path` names, downloaded where it is a hub name; says which state of it.

    Args:
        path: a folder, `owner/name`, or `owner/name@revision`.
        revision: of a hub name that states none.
        key: what `path` is called in a configuration.
        patterns: the files that are needed of a hub name.

    Raises: FileNotFoundError, one sentence, where it is neither.
    """
    folder = Path(path)
    with suppress(RuntimeError):  # the home of a user that there is not
        folder = folder.expanduser()
    if folder.is_dir():
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


def require_part(folder: Path, name: str) -> None:
    """Raises: FileNotFoundError unless the folder has that sub-folder."""
    if not (folder / name).is_dir():
        raise FileNotFoundError(f"{folder} has no sub-folder {name}, which is a part of a Latte folder")
