"""Resolves file names from untrusted lists, so that none leads out of the data folder."""

from __future__ import annotations

from pathlib import Path


def resolve_below(root: Path, name: str, where: str) -> Path | None:
    """Returns the path of `name` below `root`, with links followed, or None where it does not exist.

    Args:
        root: a resolved path.
        where: file and line of the name, for the error.

    Raises: ValueError for a name that is not a plain relative path, or that leads out of the root.
    """
    if any(ord(character) < 32 for character in name) or "://" in name or ":" in name.split("/")[0]:
        raise ValueError(f"{where}: {name!r} is not a plain path")
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{where}: {name!r} must be a path below data.path")
    try:
        target = (root / name).resolve(strict=True)
    except (OSError, RuntimeError):
        return None
    if not target.is_relative_to(root):
        raise ValueError(f"{where}: {name!r} leads out of data.path")
    return target
