"""Text formatting: strings safe to print, byte counts. Imports nothing slow."""

from __future__ import annotations


def printable(text: str) -> str:
    """Returns `text` on one line, with control characters (line breaks, escape sequences) escaped as in Python."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def gigabytes(count: float) -> str:
    """Formats a byte count in GB."""
    return f"{count / 1e9:.3f} GB"
