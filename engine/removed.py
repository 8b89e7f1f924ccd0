"""Keys, values and flags that were removed, each with what to use instead.

Imports nothing slow, so that `--help` stays quick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# `section.key`, `section.key=value` or `--flag` -> what to do instead
REMOVED: dict[str, str] = {
    "sample.cache": "the step cache was removed: sample.method=unipc with sample.steps=25 is as fast, more accurate.",
    "sample.modulation_mb": "modulations are now computed in every step: leave the key out.",
    "train.attention=triton": "that kernel is in benchmarks/candidates until it is timed on a GPU: use auto.",
    "--cache": "the step cache was removed: --method unipc --steps 25 is as fast and more accurate.",
}


def drop_removed(values: Mapping[str, Any], source: str, *, saved: bool = False) -> dict[str, Any]:
    """Returns nested configuration values without the keys and values of `REMOVED`.

    Args:
        saved: `values` were written by a run, which may be older than this code: what it set is left out. In any case
            a removed key that is off (null, 0 or false) is left out.

    Raises:
        ValueError: a removed key or value is used.
    """
    kept: dict[str, Any] = {}
    for section, keys in values.items():
        if not isinstance(keys, Mapping):
            kept[section] = keys
            continue
        kept[section] = {}
        for key, value in keys.items():
            name = f"{section}.{key}"
            sentence = REMOVED.get(name) or REMOVED.get(f"{name}={value}")
            if sentence is None:
                kept[section][key] = value
            elif value and not saved:
                raise ValueError(f"{source}: {name}={value}: {sentence}")
    return kept


def refuse_removed_flags(argv: Sequence[str]) -> None:
    """Raises ValueError, one sentence, for a flag of `REMOVED`."""
    for word in argv:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag in REMOVED:
            raise ValueError(f"{flag}: {REMOVED[flag]}")
