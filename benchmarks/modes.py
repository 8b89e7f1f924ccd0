"""Modes of the training step that the benchmarks compare."""

from __future__ import annotations

from typing import Any

# name -> configuration keys; `recomputing` runs each block again in the backward pass, so it concerns the step only
MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"train.compile": True},
    "recomputing": {"train.compile": True, "model.gradient_checkpointing": True},
}
