"""The timing engine: calls are timed in turn, round after round, and compared with the first row of their table."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

Call = Callable[[], Any]
PEAK, PRACTICAL = 989.0, 790.0  # TFLOP/s of an H100 or H200 in bf16: dense peak, and what a large product reaches


@dataclass
class Timing:
    """Seconds of one call in each round: `wall` clock, and `cpu` time of all threads of this process."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    clock: str = "wall"

    @property
    def seconds(self) -> list[float]:
        """Samples of the chosen clock."""
        return self.wall if self.clock == "wall" else self.cpu

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def least(self) -> float:
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """Range of the samples as a share of their median."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    def times_as_fast_as(self, other: Timing) -> float:
        """Median over rounds of the other's seconds over these; above 1, this one is faster."""
        return statistics.median(theirs / ours for theirs, ours in zip(other.seconds, self.seconds))

    def to_json(self) -> dict[str, object]:
        """Returns all samples."""
        return {"wall_s": self.wall, "cpu_s": self.cpu, "clock": self.clock}


@dataclass(frozen=True)
class Timer:
    """Times calls in turn, so that other load on the machine affects all of them alike.

    Args:
        device: synchronised before and after each call if it is CUDA.
        rounds: measurements of each call.
        clock: "wall", or "cpu" (process time) for a machine that is shared with others.
        warmup: unmeasured rounds before the first.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rounds: int = 3
    clock: str = "wall"
    warmup: int = 1

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def time(self, calls: Mapping[str, Call]) -> dict[str, Timing]:
        """Returns the timing of each call."""
        found = {name: Timing(clock=self.clock) for name in calls}
        for _ in range(self.warmup):
            for call in calls.values():
                call()
        gc.collect()
        for _ in range(self.rounds):
            for name, call in calls.items():
                self.wait()
                wall, cpu = time.perf_counter(), time.process_time()
                call()
                self.wait()
                found[name].wall.append(time.perf_counter() - wall)
                found[name].cpu.append(time.process_time() - cpu)
        return found

    def wait(self) -> None:
        """Synchronises the device."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Releases unused memory and compiled graphs, so that the next batch size is compiled for itself."""
        gc.collect()
        torch.compiler.reset()
        if self.on_cuda:
            torch.cuda.empty_cache()

    def allocated(self) -> int:
        """Returns the bytes that tensors hold on a CUDA device; 0 elsewhere."""
        return torch.cuda.memory_allocated(self.device) if self.on_cuda else 0

    def peak(self, call: Call, held: int) -> int | None:
        """Returns the peak bytes of `call` above `held` on a CUDA device; None elsewhere."""
        if not self.on_cuda:
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        return torch.cuda.max_memory_allocated(self.device) - held


@dataclass
class Case:
    """One row of a table.

    Attributes:
        call: timed; it does its work `repeats` times, on `videos` clips, with `flop` operations each time.
        cells: further cells of the row.
        timing: set by the engine.
        peak: bytes on a CUDA device, where it was measured.
    """

    name: str
    call: Call
    videos: float = 1.0
    flop: float = 0.0
    repeats: int = 1
    cells: dict[str, Any] = field(default_factory=dict)
    timing: Timing = field(default_factory=Timing)
    peak: int | None = None

    @property
    def seconds(self) -> float:
        """Median of one repetition."""
        return self.timing.median / self.repeats

    @property
    def rate(self) -> float:
        """TFLOP/s."""
        return self.flop / self.seconds / 1e12


# head -> value of a case, given the first case of its table
CELLS: dict[str, Callable[[Case, Case], Any]] = {
    "median s": lambda case, first: case.seconds,
    "step s": lambda case, first: case.seconds,
    "least s": lambda case, first: case.timing.least / case.repeats,
    "ms": lambda case, first: 1e3 * case.seconds,
    "spread": lambda case, first: case.timing.spread,
    "ratio": lambda case, first: case.timing.times_as_fast_as(first.timing) * case.videos / first.videos,
    "videos/s": lambda case, first: case.videos / case.seconds,
    "s/video, 250 steps": lambda case, first: 250 * case.seconds / case.videos,
    "TFLOP/s": lambda case, first: case.rate,
    "MFU": lambda case, first: case.rate / PEAK,
    "of 790": lambda case, first: case.rate / PRACTICAL,
    "cost": lambda case, first: first.timing.times_as_fast_as(case.timing),
    "FLOP": lambda case, first: case.flop / first.flop,
    "cost / FLOP": lambda case, first: first.timing.times_as_fast_as(case.timing) * first.flop / case.flop,
    "peak GB": lambda case, first: case.peak and case.peak / 1e9,
    "peak GiB": lambda case, first: case.peak and case.peak / 2**30,
}
CELLS["ms/step"] = CELLS["ms"]


def row_of(case: Case, first: Case, columns: Iterable[str]) -> dict[str, Any]:
    """Returns the cells of a timed case, with all samples for JSON."""
    computed = {head: CELLS[head](case, first) for head in columns if head in CELLS}
    return {"": case.name, **computed, **case.cells, **case.timing.to_json()}


def compare(cases: Sequence[Case], columns: Iterable[str], timer: Timer) -> list[dict[str, Any]]:
    """Times all cases in turn; returns their rows."""
    found = timer.time({str(place): case.call for place, case in enumerate(cases)})
    for case, timing in zip(cases, found.values()):
        case.timing = timing
    return [row_of(case, cases[0], columns) for case in cases]


def compare_one_by_one(
    makers: Mapping[str, Callable[[], Case]],
    columns: Iterable[str],
    timer: Timer,
    apart: Callable[[Any, Any], float] | None = None,
) -> list[dict[str, Any]]:
    """Times each case in turn with the first, which alone stays in memory; returns their rows.

    Args:
        makers: constructor of each case by name.
        apart: distance of a result from the first case's, for the cell `apart`.
    """
    columns, timer = list(columns), replace(timer, warmup=0)
    first: Case | None = None
    expected: Any = None
    rows: list[dict[str, Any]] = []
    for name, make in makers.items():
        found = _measure_next(make, first, timer)
        if found is None:
            rows.append({"": f"{name}: no room"})
        else:
            case, result = found
            if first is None:
                first, expected = case, result
            elif apart is not None:
                case.cells["apart"] = apart(result, expected)
            rows.append(row_of(case, first, columns))
            del case, result
        del found
        timer.free()
    return rows


def _measure_next(make: Callable[[], Case], first: Case | None, timer: Timer) -> tuple[Case, Any] | None:
    """Returns the case, timed, and the result of its first call; None if it does not fit in memory."""
    held = timer.allocated() if first else 0
    try:
        case = make()
        result = case.call()  # compiles, too
        case.peak = timer.peak(case.call, held)
        timings = timer.time({**({"first": first.call} if first else {}), "case": case.call})
    except torch.OutOfMemoryError:
        return None
    case.timing = timings["case"]
    if first is not None:
        first.timing = timings["first"]
    return case, result
