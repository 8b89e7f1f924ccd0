"""Text from outside (class names, file names, captions), made safe to show."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` on one line: what a terminal would obey (line breaks, escape sequences) is written out as Python does."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
