"""Seconds of several things done in turn, round after round, so that whatever else the machine does hits all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass
class Timing:
    """What one thing took in each round, in seconds: `wall` by the clock, `cpu` of all threads of this process."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    clock: str = "wall"

    @property
    def seconds(self) -> list[float]:
        """By the clock that counts."""
        return self.wall if self.clock == "wall" else self.cpu

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def least(self) -> float:
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """From the least to the most, as a share of the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    def times_as_fast_as(self, other: Timing) -> float:
        """Median over rounds of the other's seconds over these: above 1, this is the faster."""
        return statistics.median(theirs / ours for theirs, ours in zip(other.seconds, self.seconds))

    def to_json(self) -> dict[str, object]:
        """All samples."""
        return {"wall_s": self.wall, "cpu_s": self.cpu, "clock": self.clock}


def interleaved(
    calls: Mapping[str, Call],
    *,
    rounds: int = 3,
    warmup: int = 1,
    clock: str = "wall",
    device: torch.device | None = None,
) -> dict[str, Timing]:
    """Call all in turn, `warmup` times unmeasured and `rounds` times measured.

    Args:
        clock: "wall", or "cpu": seconds of this process's threads, which tell more on a machine shared with others.
        device: waited for before and after each call where it is CUDA.
    """
    found = {name: Timing(clock=clock) for name in calls}
    for _ in range(warmup):
        for call in calls.values():
            call()
    gc.collect()
    for _ in range(rounds):
        for name, call in calls.items():
            wait_for(device)
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            wait_for(device)
            found[name].wall.append(time.perf_counter() - wall)
            found[name].cpu.append(time.process_time() - cpu)
    return found


def wait_for(device: torch.device | None) -> None:
    """Until all that was asked of the device is done."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
