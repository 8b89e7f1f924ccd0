"""Clock, means and memory of the steps between two rows of the log."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator

import torch
from torch import Tensor


class Meter:
    """Means of device scalars over steps, without a synchronisation until they are asked for; and the clock."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._waited = 0.0
        self._started = time.perf_counter()

    def add(self, values: dict[str, Tensor]) -> None:
        """Take one step's values."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent in here is spent waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here is no step's."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - start

    def means(self) -> tuple[dict[str, Tensor], float, float]:
        """Mean of each value, seconds per step, and the share of them that was spent waiting for data."""
        means = {name: total / self._steps for name, total in self._sums.items()}
        passed = time.perf_counter() - self._started
        return means, passed / self._steps, self._waited / passed


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: on the GPU what torch allocated, on the CPU this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
