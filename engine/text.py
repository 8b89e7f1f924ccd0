"""Escapes text from outside (class names, file names, captions) for the terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """Returns `text` on one line, with line breaks and escape sequences written out as Python does."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
