"""Checks of values that a user has set."""

from __future__ import annotations


def require(condition: bool, sentence: str) -> None:
    """Raises ValueError(sentence) unless `condition` holds."""
    if not condition:
        raise ValueError(sentence)
