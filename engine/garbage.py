"""Python's cyclic garbage collector, kept out of the steps.

A full collection walks every object of every imported module, a third of a million, at a moment of its own choosing.
Meanwhile no kernel is queued, and all ranks wait for the one that collects.
"""

from __future__ import annotations

import gc
from types import TracebackType


class CollectOnRequest:
    """While entered, garbage is collected by `collect` alone, and what was there before is left out of it."""

    def __enter__(self) -> CollectOnRequest:
        self._enabled = gc.isenabled()
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def collect(self) -> None:
        """Collect what has been made since: a step leaves hardly anything, so this takes microseconds."""
        gc.collect()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        gc.unfreeze()
        if self._enabled:
            gc.enable()
