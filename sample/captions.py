"""Prompts from a file."""

from __future__ import annotations

from pathlib import Path


def read_prompts(path: Path) -> list[str]:
    """Reads the prompts of a text file, one per line, without empty lines and lines that start with #.

    Raises:
        FileNotFoundError, ValueError: no such file, or no prompt in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no prompt file {path}")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {path} is not text in UTF-8") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"prompt file {path} holds no prompt: write one a line")
    return prompts
