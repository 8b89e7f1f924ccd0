"""File names from a list that somebody else wrote: none may lead out of the folder that it is a list of."""

from __future__ import annotations

from pathlib import Path


def below(root: Path, name: str, where: str) -> Path | None:
    """What `name` means below `root`, links followed; None where there is no such thing.

    Args:
        root: resolved.
        where: in which line of which list, for the error.

    Raises: ValueError for a name that is no plain relative path or leads out of the root.
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
