"""Text for people: file names and captions made safe to print, numbers of bytes. Imports nothing slow."""

from __future__ import annotations


def printable(text: str) -> str:
    """Returns `text` on one line, with control characters (line breaks, escape sequences) as Python writes them."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def gigabytes(count: float) -> str:
    """Returns a number of bytes as text in GB."""
    return f"{count / 1e9:.3f} GB"
