"""What looks at a training now and then without changing it: when it is called, on which rank, and what if it fails.

A callback works on all ranks together and in small pieces, between which the ranks agree to go on: a signal stops it
in time, and what fails on one rank stops it on all, with a warning, and the training goes on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch

from .distributed import gather_objects, max_over_ranks, on_main, reshard

if TYPE_CHECKING:
    from .trainer import Trainer

T = TypeVar("T")


class Look(NamedTuple):
    """What a callback found: the numbers of its row in the log, and the line for people."""

    values: dict[str, Any]
    line: str


class Callback(Protocol):
    """Called after the steps that are multiples of `every`, at step 0 and at the last; rows of the log are its `kind`.

    Neither method may change the network or draw from a global generator.
    """

    kind: str
    every: int

    def prepare(self, run: Trainer) -> list[str]:
        """Before the first step of every start: raise what is a user's mistake; returns what to tell."""

    def look(self, run: Trainer) -> Look:
        """What there is to see at `run.step`; called on all ranks, rank 0's answer counts."""


class Interrupted(Exception):
    """A signal asks the run to stop; raised on all ranks."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"signal {signal}")
        self.signal = signal


class Failed(Exception):
    """Something went wrong on a rank; raised on all of them, in the words of the first that failed."""


class Callbacks:
    """The callbacks of a run, those that are switched on (`every` is not 0)."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.all = [callback for callback in callbacks if callback.every]

    def at_start(self, run: Trainer) -> int:
        """Prepare all, and do what is due at this step and not in the log; the signal to stop, or 0.

        So a run that was stopped within a callback makes up for it, and step 0 is looked at too.
        """
        try:
            for callback in self.all:
                with undisturbed(run):
                    notes = callback.prepare(run)
                for note in notes:
                    run.log.say(note)
        except Interrupted as stop:
            return stop.signal
        except Failed as failure:
            raise ValueError(str(failure)) from None
        held = on_main(lambda: [each.kind for each in self.all if run.log.holds(run.step, each.kind)])
        return self._call(run, [each for each in self.all if each.kind not in held])

    def at_step(self, run: Trainer) -> int:
        """Call those that are due; the signal to stop, or 0."""
        return self._call(run, self.all)

    def _call(self, run: Trainer, callbacks: Sequence[Callback]) -> int:
        for callback in callbacks:
            if run.step % callback.every and run.step < run.config.train.max_steps:
                continue
            started = time.perf_counter()
            try:
                with undisturbed(run):
                    found = callback.look(run)
            except Interrupted as stop:
                return stop.signal
            except Failed as failure:
                _report(run, callback.kind, str(failure))
                continue
            seconds = time.perf_counter() - started
            run.log.metrics(run.step, {**found.values, "seconds": seconds}, callback.kind)
            run.log.say(
                f"step {run.step}/{run.config.train.max_steps}  {callback.kind}: {found.line} ({seconds:.1f} s)"
            )
        return 0


def _report(run: Trainer, kind: str, failure: str) -> None:
    run.log.say(f"warning: step {run.step}, {kind}: {failure}; the training goes on")
    if run.world.is_main:
        run.folder.event("callback_failed", run.step, callback=kind, error=failure)
    if run.world.device.type == "cuda":  # what it had of the memory may be what it ran out of
        torch.cuda.empty_cache()


@contextlib.contextmanager
def undisturbed(run: Trainer) -> Iterator[None]:
    """Leaves the training as it was: mode, generators, clock, compiled blocks, what a rank holds of the weights."""
    training = run.model.training
    devices = [run.world.device] if run.world.device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        if run.config.train.compile:  # other shapes would be compiled too, and could move the training to these
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(run.meter.paused())
        run.model.eval()
        try:
            yield
        finally:
            run.model.train(training)
            if run.sharded:
                reshard(run.model)
                reshard(run.ema.model)


# ---- working in pieces -----------------------------------------------------------------------------


def agree(run: Trainer, failure: str | None = None) -> None:
    """Between two pieces of a callback's work, on every rank equally often: a sign of life, and whether to go on.

    Args:
        failure: what went wrong on this rank, if something has.

    Raises: Interrupted or Failed, on all ranks.
    """
    run.watch.tick()
    flags = torch.tensor([run.signals.received, failure is not None], dtype=torch.float32, device=run.world.device)
    signal, failed = max_over_ranks(flags).tolist()
    if signal:
        raise Interrupted(int(signal))
    if failed:
        raise Failed(next(text for text in gather_objects(failure) if text is not None))


def attempt(run: Trainer, action: Callable[[], T], *, fatal: bool = False) -> T:
    """`action()`, and then `agree`; so all ranks must call it.

    Args:
        fatal: an error ends the run, for want of a way on: other ranks wait within `action` for this one.
    """
    failure = None
    try:
        result = action()
    except (Interrupted, Failed):
        raise
    except Exception as error:  # whatever it is, it is no reason to lose the run
        if fatal:
            raise
        failure = str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
    agree(run, failure)
    return result


def share_out(run: Trainer, count: int, work: Callable[[int], T]) -> dict[int, T]:
    """`work` of each of the numbers below `count`, in turn by rank; this rank's results.

    Where numbers are left over, the ranks that have none do the last one too: a network in shards needs all ranks,
    and so does an `agree` within `work`.
    """
    results: dict[int, T] = {}
    for first in range(0, count, run.world.size):
        number = min(first + run.world.rank, count - 1)
        results[number] = attempt(run, lambda number=number: work(number), fatal=run.sharded)  # type: ignore[misc]
    return results


def put_together(results: dict[int, T]) -> list[T]:
    """What `share_out` gave the ranks, in order, on every rank."""
    merged = {number: value for part in gather_objects(results) for number, value in part.items()}
    return [merged[number] for number in sorted(merged)]
