"""A step in flight: queued on the device, its numbers not yet read by the host.

A step is a queue of kernels: if the host asks the device for a number, it waits until all of them have run, and the
device then idles until new ones are queued. So the numbers of a step are sent to the host as soon as they are computed,
and read only when the next step has been queued behind it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .distributed import max_over_ranks
from .guard import Bounds
from .objective import StepLoss


class Sent:
    """Numbers on their way from the device to the host."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)  # into pinned memory
        self._arrived = torch.cuda.Event() if values.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> list[float]:
        """Returns the numbers; waits for them, and for nothing that was queued after them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


class Findings(NamedTuple):
    """Facts of one step over all ranks: float64 scalars on the device."""

    bad: Tensor  # whether a loss or a gradient is not finite
    norm: Tensor  # of the gradient; 0 where it is NaN
    signal: Tensor  # that asks to stop, or 0
    failed: Tensor  # whether a checkpoint could not be written

    @classmethod
    def gather(cls, loss: Tensor, norm: Tensor, signal: int, failed: bool) -> Findings:
        """Returns the maxima over all ranks: one collective, without waiting for the device."""
        bad = ~(loss.isfinite() & norm.isfinite())
        own = [bad.double(), norm.double().nan_to_num(0.0)]
        own += [torch.full_like(own[0], float(value)) for value in (signal, failed)]  # no copy from the host
        return cls(*max_over_ranks(torch.stack(own)).unbind())


class Outcome(NamedTuple):
    """The same facts on the host, and whether the step was skipped."""

    skipped: bool
    finite: bool
    norm: float
    signal: int
    failed: bool


class InFlight:
    """One step in flight.

    Args:
        findings: of all ranks.
        skip: scalar on the device: whether the update was skipped.
        bounds: that the gradient was judged by.
        losses: of the micro-batches.
        parts: scalars on the device, for the log.
        files: the clips of this rank.
    """

    def __init__(
        self,
        findings: Findings,
        skip: Tensor,
        bounds: Bounds,
        losses: list[StepLoss],
        parts: dict[str, Tensor],
        files: list[str],
    ) -> None:
        self.bounds = bounds
        self.losses = losses
        self.parts = parts
        self.files = files
        self._sent = Sent(torch.stack([skip.double(), *findings]))

    def outcome(self) -> Outcome:
        """Returns the outcome of the step; waits until the device has decided."""
        skipped, bad, norm, signal, failed = self._sent.read()
        return Outcome(bool(skipped), not bad, norm, int(signal), bool(failed))
