"""The timing engine: cases are called in turn, round after round, and compared with the first row of their table."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
Row = dict[str, Any]
PEAK, PRACTICAL = 989.0, 790.0  # TFLOP/s of an H100 or H200 in bf16: dense peak, and what a large product reaches


@dataclass
class Case:
    """One row of a table.

    Attributes:
        call: timed; it does its work `repeats` times, on `videos` clips of `tokens` in all, with `flop` operations
            each time. A tensor that it returns is compared with the first one of the table.
        prepare: called before each `call`, untimed.
        cells: further cells of the row.
        seconds: of one repetition in each round; set by the engine.
        peak: bytes on a CUDA device; set by the engine.
    """

    call: Call
    videos: float = 1.0
    flop: float = 0.0
    tokens: float = 1.0
    repeats: int = 1
    prepare: Call = lambda: None
    cells: Row = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    peak: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        """TFLOP/s."""
        return self.flop / self.median / 1e12

    def times_as_fast_as(self, other: Case) -> float:
        """Median over rounds of the other's seconds over these; above 1, this one is faster."""
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
    """Times cases in turn, so that other load on the machine affects all of them alike.

    Args:
        device: synchronised before and after each call if it is CUDA.
        rounds: measurements of each case.
        clock: "wall", or "cpu" (of all threads of this process) for a machine that is shared with others.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rounds: int = 3
    clock: str = "wall"

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def compare(
        self, makers: Mapping[str, Callable[[], Case]], heads: Iterable[str] = (), *, at_once: bool = True
    ) -> list[Row]:
        """Times the cases and returns their rows, with all samples; the first is the reference.

        Each case is called once before: that compiles it, and yields the result for the cell `apart`.

        Args:
            makers: constructor of each case by name.
            heads: cells to compute.
            at_once: time all in turn; False: each in turn with the first, which alone stays in memory.
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
                except torch.OutOfMemoryError:
                    rows.append({"": f"{name}: no room"})
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
            rows += [_row_of(name, case, first, heads) for name, case in cases.items()]
            del cases
            self.free()
        return rows

    def compare_pair(self, name: str, makers: Mapping[str, Callable[[], Case]]) -> Row:
        """Returns one row of two cases: the milliseconds of each, and how many times as fast the second one is."""
        rows = self.compare(makers, ("ms", "ratio"))
        return {"": name, **{f"{row['']}, ms": row["ms"] for row in rows}, "ratio": rows[1]["ratio"], "samples": rows}

    def _warm_up(self, case: Case, held: int) -> Any:
        """Returns the result of the first call; on CUDA, sets the peak above `held` bytes of another one."""
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

    def free(self) -> None:
        """Releases unused memory and compiled graphs, so that the next batch size is compiled for itself."""
        torch.compiler.reset()
        if self.on_cuda:
            gc.collect()
            torch.cuda.empty_cache()


def _row_of(name: str, case: Case, first: Case, heads: Iterable[str]) -> Row:
    computed = {head: VALUES[head](case, first) for head in heads if head in VALUES}
    return {"": name, **computed, **case.cells, "seconds": case.seconds}
