"""Benchmarks, each against a reference timed in the same run: `python -m tools.bench --help`."""

from __future__ import annotations

from typing import Any

# name -> keys of ours; the last computes each block again in the backward pass, so it has a meaning in the step only
MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"train.compile": True},
    "recomputing": {"train.compile": True, "model.gradient_checkpointing": True},
}
