"""Checks of user settings: `require`, and tables of limits for single keys.

A table of limits maps a key, or several separated by spaces, to a `Limit`:

    LIMITS = {"num_videos steps": at_least(1), "eta": within(0, 1), "method": one_of(METHODS)}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple


def require(condition: bool, sentence: str) -> None:
    """Raises ValueError(sentence) unless `condition` holds."""
    if not condition:
        raise ValueError(sentence)


class Limit(NamedTuple):
    """The values that a key may take; `must` completes the sentence "KEY must be ..."."""

    must: str
    holds: Callable[[Any], bool]


POSITIVE = Limit("positive and finite", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Limit("zero or more and finite", lambda value: 0 <= value < math.inf)
FINITE = Limit("finite", math.isfinite)
FOLDER = Limit("the path of a folder", bool)


def at_least(least: int) -> Limit:
    """Returns a lower limit for a whole number."""
    return Limit(f"at least {least}", lambda value: value >= least)


def from_to(least: int, most: int) -> Limit:
    """Returns limits for a whole number, both included."""
    return Limit(f"at least {least} and at most {most:,}", lambda value: least <= value <= most)


def within(low: float, high: float, brackets: str = "[]") -> Limit:
    """Returns limits for a number; brackets "[)" exclude the upper end."""
    excluded = [end for end, bracket in zip((low, high), brackets) if bracket in "()"]
    must = f"in {brackets[0]}{low}, {high}{brackets[1]}"
    return Limit(must, lambda value: low <= value <= high and value not in excluded)


def one_of(choices: Iterable[str]) -> Limit:
    """Returns a limit to a set of words."""
    known = tuple(choices)
    return Limit(f"one of {', '.join(known)}", lambda value: value in known)


def optional(limit: Limit) -> Limit:
    """Returns `limit` extended by null."""
    return Limit(f"{limit.must}, or null", lambda value: value is None or limit.holds(value))


def check_limits(section: Any, prefix: str, limits: Mapping[str, Limit]) -> None:
    """Raises ValueError for the first key of `section` outside its limit; `prefix`: e.g. "train."."""
    for keys, limit in limits.items():
        for key in keys.split():
            value = getattr(section, key)
            require(limit.holds(value), f"{prefix}{key} must be {limit.must}, got {value!r}.")


def check_read_only_with(section: Any, prefix: str, owners: Mapping[str, str]) -> None:
    """Raises ValueError for a key that is set but not read.

    Args:
        owners: key(s), separated by spaces -> the key they depend on, which must differ from its default; or
            `key=value`, the value it must have.
    """
    defaults = {item.name: item.default for item in fields(section)}
    for keys, owner in owners.items():
        name, equals, needed = owner.partition("=")
        value = getattr(section, name)
        is_read = value == needed if equals else value not in (defaults[name], [], "")
        for key in keys.split():
            require(
                is_read or getattr(section, key) == defaults[key],
                f"{prefix}{key} is read only with {prefix}{owner}: set that too, or leave it out.",
            )
