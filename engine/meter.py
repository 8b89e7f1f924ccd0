"""Means, time and memory of the steps between two rows of the log."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator

import torch
from torch import Tensor


class Meter:
    """Averages device scalars and measures time over steps, without waiting for the device until `means`."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Starts a new row."""
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._waited = 0.0
        self._started = time.perf_counter()

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds the values of one step."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time spent inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time spent inside out of the time per step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - start

    def means(self) -> tuple[dict[str, Tensor], float, float]:
        """Returns the mean of each value, seconds per step, and the share of them spent waiting for data."""
        means = {name: total / self._steps for name, total in self._sums.items()}
        passed = time.perf_counter() - self._started
        return means, passed / self._steps, self._waited / passed


def peak_memory_gib(device: torch.device) -> float:
    """Returns the peak memory so far: allocated by torch on a GPU; resident set of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
