"""Maps class names to numbers, and video indices to labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from common.checks import require
from engine.conditions import Conditions
from engine.config import LABEL_RULES

# In label order: folder names sorted by code point, as in the official data set.
UCF101_CLASSES = Path(__file__).with_name("ucf101_classes.txt").read_text().split()


def choose_labels(
    conditions: Conditions, labels: Sequence[int | str] | None = None, rule: str = "balanced", seed: int = 0
) -> Callable[[int], int | None]:
    """Returns a function from video index to one of `labels` (None: all classes), or to None if unconditional.

    Args:
        labels: numbers, numbers as text, or class names.
        rule: "balanced" takes them in turn, so their counts differ by at most one; "random" draws one for each index,
            uniformly, as a function of (seed, index).

    Raises: ValueError for an unknown rule or name, a number out of range, or labels for a network without classes.
    """
    require(rule in LABEL_RULES, f"sample.label_rule must be one of {', '.join(LABEL_RULES)}, not {rule!r}.")
    count, names = conditions.count, conditions.names or []
    require(
        count > 0 or not labels,
        "sample.labels: this network is unconditional (model.num_classes is 0); leave them out.",
    )
    chosen = [resolve_label(str(label).strip(), count, names) for label in labels or []] or range(count)
    if not chosen:
        return lambda index: None
    if rule == "random":
        return lambda index: chosen[draw_number(seed, index) % len(chosen)]
    return lambda index: chosen[index % len(chosen)]


def resolve_label(label: str, num_classes: int, class_names: Sequence[str]) -> int:
    """Returns the number of a class given by name or number. Raises: ValueError if there is no such class."""
    if label in class_names:
        return list(class_names).index(label)
    known = f"its classes are {', '.join(class_names)}" if class_names else "its class names are not known"
    require(
        label.removeprefix("-").isdecimal(),
        f"sample.labels: {label!r} is not a class of this network; {known}; numbers are accepted too.",
    )
    require(
        0 <= int(label) < num_classes,
        f"sample.labels: label {label} is out of range; the network has {num_classes} classes, 0 to {num_classes - 1}.",
    )
    return int(label)


def label_name(conditions: Conditions, label: int | None) -> str | None:
    """Returns the name of a class, `class-012` if names are unknown, or None for no label."""
    if label is None:
        return None
    names = conditions.names or []
    return names[label] if label < len(names) else f"class-{label:03d}"


def draw_number(seed: int, index: int) -> int:
    """Returns a random 64-bit number for video `index`, independent of its noise."""
    return int(np.random.SeedSequence([seed, index], spawn_key=(1,)).generate_state(1, np.uint64)[0])
