"""Keeps Python's cyclic garbage collector out of the training steps.

An automatic full collection visits every object of every imported module, a third of a million, in the middle of some
step. Meanwhile no kernel is queued, and all ranks wait for the one that collects.
"""

from __future__ import annotations

import gc
from types import TracebackType


class CollectOnRequest:
    """While entered, only `collect` collects garbage, and only objects made since entering."""

    def __enter__(self) -> CollectOnRequest:
        self._enabled = gc.isenabled()
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def collect(self) -> None:
        """Collects garbage; a step leaves hardly any, so this takes microseconds."""
        gc.collect()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        gc.unfreeze()
        if self._enabled:
            gc.enable()
