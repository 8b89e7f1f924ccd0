"""Read-only training callbacks: schedule, ranks, failure handling.

All ranks run a callback together, in small pieces between which they agree to continue: a stop signal ends it
promptly; a failure on one rank ends it on all with a warning, and training continues.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from .distributed import gather_objects, on_main, reduce_over_ranks, reshard
from .objective import Objective
from .run import Run
from .state import TrainState

T = TypeVar("T")


class Observation(NamedTuple):
    """The numbers of a callback's row in metrics.jsonl, and a line to print."""

    values: dict[str, Any]
    line: str


class Callback(Protocol):
    """Called at step 0, at multiples of `every` and at the last step; its log rows have its `kind`.

    Neither method may change the network or draw from a global generator.
    """

    kind: str
    every: int

    def prepare(self, run: Run, state: TrainState, objective: Objective) -> list[str]:
        """Runs before the first step of every start; returns lines to log. Raises on user errors."""

    def observe(self, run: Run, state: TrainState, objective: Objective) -> Observation:
        """Returns the observation at `state.step`; called on all ranks; rank 0's result is logged."""


class Interrupted(Exception):
    """A signal asks the run to stop; raised on all ranks, with the signal's number."""


class Failed(Exception):
    """A rank failed; raised on all ranks, with the message of the first that failed."""


class Callbacks:
    """The callbacks of a run that are switched on (`every` is not 0)."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.all = [callback for callback in callbacks if callback.every]

    def at_start(self, run: Run, state: TrainState, objective: Objective) -> int:
        """Prepares all, then calls those due at this step and not yet logged; returns the stop signal, or 0.

        So step 0 is observed, and a callback that a stop signal cut short runs again.
        """
        try:
            for callback in self.all:
                with preserve_training(run, state):
                    notes = callback.prepare(run, state, objective)
                for note in notes:
                    run.log.say(note)
        except Interrupted as stop:
            return int(stop.args[0])
        except Failed as failure:
            raise ValueError(str(failure)) from None
        held = on_main(lambda: [each.kind for each in self.all if run.log.holds(state.step, each.kind)])
        return self.at_step(run, state, objective, skipped=held)

    def at_step(self, run: Run, state: TrainState, objective: Objective, skipped: Collection[str] = ()) -> int:
        """Calls those due, except the `skipped` kinds; returns the stop signal, or 0."""
        last = run.config.train.max_steps
        for callback in self.all:
            if callback.kind in skipped or (state.step % callback.every and state.step < last):
                continue
            started = time.perf_counter()
            try:
                with preserve_training(run, state):
                    found = callback.observe(run, state, objective)
            except Interrupted as stop:
                return int(stop.args[0])
            except Failed as failure:
                run.log.say(f"warning: step {state.step}, {callback.kind}: {failure}; training continues")
                run.folder.event("callback_failed", state.step, callback=callback.kind, error=str(failure))
                if run.world.device.type == "cuda":  # the failure may have been out of memory
                    torch.cuda.empty_cache()
                continue
            seconds = time.perf_counter() - started
            run.log.metrics(state.step, {**found.values, "seconds": seconds}, callback.kind)
            run.log.say(f"step {state.step}/{last}  {callback.kind}: {found.line} ({seconds:.1f} s)")
        return 0


@contextlib.contextmanager
def preserve_training(run: Run, state: TrainState) -> Iterator[None]:
    """On exit, restores train mode, RNG states, step clock, compilation and sharded weights."""
    training = state.model.training
    # other shapes would be compiled too, and training could switch to that code
    eager = torch.compiler.set_stance("force_eager") if run.config.train.compile else contextlib.nullcontext()
    devices = [run.world.device] if run.world.device.type == "cuda" else []
    with eager, torch.no_grad(), torch.random.fork_rng(devices), run.meter.paused():
        state.model.eval()
        try:
            yield
        finally:
            state.model.train(training)
            for network in (state.model, state.ema.model) if run.is_sharded else ():
                reshard(network)


# ---- working in pieces -----------------------------------------------------------------------------


def agree(run: Run, failure: str | None = None) -> None:
    """Resets the hang watch's countdown, and lets the ranks agree to continue.

    Called between pieces of a callback's work, equally often on every rank, with this rank's failure, if any.
    Raises Interrupted or Failed, on all ranks.
    """
    run.watch.tick()
    flags = torch.tensor([run.signals.received, failure is not None], dtype=torch.float32, device=run.world.device)
    signal, failed = reduce_over_ranks(flags).tolist()
    if signal:
        raise Interrupted(int(signal))
    if failed:
        raise Failed(next(text for text in gather_objects(failure) if text is not None))


def attempt(run: Run, action: Callable[[], T], *, fatal: bool = False) -> T:
    """Returns `action()` after all ranks, which must all call this, agree to continue.

    `fatal`: raise its errors at once, because other ranks wait inside `action` for this one.
    """
    failure = None
    try:
        result = action()
    except (Interrupted, Failed):
        raise
    except Exception as error:  # no failure of a callback may end the run
        if fatal:
            raise
        failure = str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
    agree(run, failure)
    return result


def distribute(run: Run, count: int, work: Callable[[int], T]) -> list[T]:
    """Calls `work` for 0 .. count-1, dealt to the ranks in turn; returns all results in order, on every rank.

    In the last round, ranks without a number repeat the last one: a sharded network needs all ranks, and so does
    `agree` inside `work`.
    """
    results: dict[int, T] = {}
    for first in range(0, count, run.world.size):
        number = min(first + run.world.rank, count - 1)
        results[number] = attempt(run, lambda number=number: work(number), fatal=run.is_sharded)  # type: ignore[misc]
    merged = {number: value for part in gather_objects(results) for number, value in part.items()}
    return [merged[number] for number in sorted(merged)]
