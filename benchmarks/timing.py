"""The timing engine: cases are called in turn, round after round, and compared with the first row of their table."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
Row = dict[str, Any]
PEAK, PRACTICAL = 989.0, 790.0  # TFLOP/s of an H100 or H200 in bf16: dense peak, and what a large product reaches


@dataclass
class Case:
    """One row of a table. A tensor returned by `call` is compared with that of the table's first row."""

    call: Call  # timed
    videos: float = 1.0  # clips per repetition
    flop: float = 0.0  # per repetition
    tokens: float = 1.0  # per repetition
    repeats: int = 1  # repetitions per call
    prepare: Call = lambda: None  # called before each `call`, untimed
    cells: Row = field(default_factory=dict)  # further cells of the row
    seconds: list[float] = field(default_factory=list)  # per repetition, one value for each round; set by the engine
    peak: int | None = None  # peak bytes on a CUDA device; set by the engine

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """TFLOP/s."""
        return self.flop / self.median / 1e12

    def times_as_fast_as(self, other: Case) -> float:
        """Returns the median over rounds of the other's seconds divided by ours; above 1, this case is faster."""
        return statistics.median(theirs / ours for theirs, ours in zip(other.seconds, self.seconds))


# head -> value of a case, given the first case of its table
VALUES: dict[str, Callable[[Case, Case], Any]] = {
    "median s": lambda case, first: case.median,
    "least s": lambda case, first: min(case.seconds),
    "ms": lambda case, first: 1e3 * case.median,
    "spread": lambda case, first: (max(case.seconds) - min(case.seconds)) / case.median,
    "ratio": lambda case, first: case.times_as_fast_as(first) * case.videos / first.videos,
    "videos/s": lambda case, first: case.videos / case.median,
    "s/video, 250 steps": lambda case, first: 250 * case.median / case.videos,
    "TFLOP/s": lambda case, first: case.rate,
    "MFU": lambda case, first: case.rate / PEAK,
    "of 790": lambda case, first: case.rate / PRACTICAL,
    "cost": lambda case, first: first.times_as_fast_as(case),
    "tokens": lambda case, first: case.tokens / first.tokens,
    "FLOP": lambda case, first: case.flop / first.flop,
    "cost / FLOP": lambda case, first: first.times_as_fast_as(case) * first.flop / case.flop,
    "peak GB": lambda case, first: case.peak and case.peak / 1e9,
}


@dataclass(frozen=True)
class Timer:
    """Times cases in turn, so that other load on the machine affects all of them alike."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rounds: int = 3  # measurements of each case
    clock: str = "wall"  # or "cpu" (of all threads of this process) for a shared machine

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def compare(
        self, makers: Mapping[str, Callable[[], Case]], heads: Iterable[str] = (), *, at_once: bool = True
    ) -> list[Row]:
        """Times the cases of `makers` and returns their rows with the cells `heads`; the first is the reference.

        Each case is called once first, which compiles it and gives the result for the cell `apart`. Then all are timed
        in turn. Without `at_once`, each is timed in turn with the first, and only these two are in memory.
        """
        heads, rows = list(heads), []
        first: Case | None = None
        expected: Tensor | None = None
        for names in [list(makers)] if at_once else [[name] for name in makers]:
            held = torch.cuda.memory_allocated(self.device) if self.on_cuda and first else 0
            cases: dict[str, Case] = {}
            for name in names:
                try:
                    case = makers[name]()
                    result = self._warm_up(case, held)
                except (torch.OutOfMemoryError, NotImplementedError) as error:
                    reason = "no room" if isinstance(error, torch.OutOfMemoryError) else "not supported"
                    rows.append({"": f"{name}: {reason}"})
                    continue
                cases[name], first = case, first or case
                if "apart" in heads and isinstance(result, Tensor):
                    expected = result if expected is None else expected
                    distance = float((result.float() - expected.float()).norm() / expected.float().norm())
                    case.cells["apart"] = distance if result is not expected else None
                del case, result
            if first is None or not cases:
                continue
            self._time([*([] if first in cases.values() else [first]), *cases.values()])
            for name, case in cases.items():
                row: Row = {"": name, **{head: VALUES[head](case, first) for head in heads if head in VALUES}}
                rows.append(row | case.cells | {"seconds": case.seconds})
            del cases, case
            torch.compiler.reset()  # so that the next batch size is compiled on its own
            if self.on_cuda:
                gc.collect()
                torch.cuda.empty_cache()
        return rows

    def _warm_up(self, case: Case, held: int) -> Any:
        """Returns the result of the first call; on CUDA, records the peak bytes of a second one, above `held`."""
        case.prepare()
        result = case.call()
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            case.prepare()
            case.call()
            case.peak = torch.cuda.max_memory_allocated(self.device) - held
        return result

    def _time(self, cases: Sequence[Case]) -> None:
        clock = time.perf_counter if self.clock == "wall" else time.process_time
        for case in cases:
            case.seconds = []
        gc.collect()
        for _ in range(self.rounds):
            for case in cases:
                case.prepare()
                self.wait()
                start = clock()
                case.call()
                self.wait()
                case.seconds.append((clock() - start) / case.repeats)

    def wait(self) -> None:
        """Synchronises the device."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)


def run_apart(function: Callable[[Any], Any], inputs: Iterable[Any]) -> list[Any]:
    """Runs `function` on all inputs at the same time, each in a new process; returns the results."""
    inputs = list(inputs)
    with ProcessPoolExecutor(len(inputs), get_context("spawn")) as pool:
        return list(pool.map(function, inputs))
