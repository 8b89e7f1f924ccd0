"""Checks whether a step's gradient may be applied, and whether all replicas still hold the same weights.

The device judges each step itself, so it never idles while the host waits for a result: a step's results are copied to
the host as soon as they are computed, and read only after the next step has been queued.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .config import OptimConfig
from .distributed import gather_objects, reduce_over_ranks
from .errors import TrainingAborted
from .objective import StepLoss


class Bounds(NamedTuple):
    """Limits for the gradient norm of one step, set before the gradient is computed."""

    limit: float = math.inf  # norm that the gradient is clipped to
    median: float = math.nan  # of the last applied norms
    spike: float = math.inf  # a norm above it is a spike
    clip_spikes: bool = False  # clip spikes to the median instead of skipping the step

    def judge(self, bad: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Returns device scalars: whether to skip the step, and the norm to clip to.

        `bad`: anything is non-finite, on any rank; `norm`: of the whole gradient, in float64, so that device and host
        judge alike.
        """
        spike, limit = norm > self.spike, torch.full_like(norm, self.limit)
        if self.clip_spikes:
            return bad, limit.masked_fill(spike, min(self.limit, self.median))
        return bad | spike, limit


class StepGuard:
    """Skips non-finite steps, and clips or skips spikes, identically on every rank.

    A spike is a gradient norm above `optim.spike_factor` x the median of the last `WINDOW` applied norms. The device
    decides by `bounds`; `record` counts its decision. The state is part of the checkpoint.
    """

    WINDOW = 100  # number of applied norms in the median
    MINIMUM = 20  # with fewer applied norms nothing counts as a spike
    COUNTERS = ("skipped", "in_a_row", "spikes")

    def __init__(self, config: OptimConfig) -> None:
        self.config = config
        self.norms: deque[float] = deque(maxlen=self.WINDOW)
        self.skipped = 0  # steps in the whole run
        self.in_a_row = 0
        self.spikes = 0

    def bounds(self, step: int) -> Bounds:
        """Returns the limits of the update from `step`."""
        limit = self.config.max_grad_norm if step >= self.config.clip_start_step else math.inf
        if not self.config.spike_factor or len(self.norms) < self.MINIMUM:
            return Bounds(limit)
        median = statistics.median(self.norms)
        return Bounds(limit, median, self.config.spike_factor * median, self.config.spike_policy == "clip")

    def record(self, bounds: Bounds, skipped: bool, finite: bool, norm: float) -> str | None:
        """Counts a step that was judged by `bounds`; returns why it was skipped, or None."""
        spike = finite and norm > bounds.spike
        self.spikes += spike
        if not skipped:
            self.in_a_row = 0
            self.norms.append(norm)
            return None
        self.skipped += 1
        self.in_a_row += 1
        if not finite:
            return "loss or gradient is not finite"
        return f"gradient norm {norm:.3g} is a spike over the median {bounds.median:.3g}"

    def check_streak(self) -> None:
        """Raises TrainingAborted after `optim.max_skips` skipped steps in a row."""
        if self.in_a_row >= self.config.max_skips:
            raise TrainingAborted(
                f"{self.in_a_row} steps in a row were skipped (optim.max_skips): the run has diverged or its data are "
                "broken. events.jsonl names the files; resume the last checkpoint with a lower optim.learning_rate."
            )

    def state_dict(self) -> dict[str, object]:
        """Returns the state as JSON values."""
        return {"norms": list(self.norms), **{name: getattr(self, name) for name in self.COUNTERS}}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restores a `state_dict()`."""
        self.norms = deque(state["norms"], maxlen=self.WINDOW)  # type: ignore[call-overload]
        for name in self.COUNTERS:
            setattr(self, name, state[name])


# ---- a step in flight ------------------------------------------------------------------------------


def gather_findings(loss: Tensor, norm: Tensor, signal: int, failed: bool) -> Tensor:
    """Combines the findings of all ranks on one step in one collective; returns them without waiting for the device.

    They are a float64 tensor (4,) on the device: whether any loss or gradient is non-finite; the gradient norm (0 if
    NaN); the stop signal (0 if none); whether a checkpoint write failed.
    """
    bad = ~(loss.isfinite() & norm.isfinite())
    own = [bad.double(), norm.double().nan_to_num(0.0)]
    own += [torch.full_like(own[0], float(value)) for value in (signal, failed)]  # no copy from the host
    return reduce_over_ranks(torch.stack(own))


@dataclass(eq=False)
class InFlight:
    """A step queued on the device, whose results the host has not read yet."""

    skip: Tensor  # device scalar: the update is skipped
    findings: Tensor  # of `gather_findings`
    bounds: Bounds  # by which the gradient is judged
    losses: list[StepLoss]  # of the micro-batches
    parts: dict[str, Tensor]  # scalars on the device, for the log
    files: list[str]  # the clips of this rank

    def __post_init__(self) -> None:
        numbers = torch.stack([self.skip.double(), *self.findings.unbind()])
        self._numbers = numbers.to("cpu", non_blocking=True)  # into pinned memory
        self._arrived = torch.cuda.Event() if numbers.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def outcome(self) -> tuple[bool, bool, float, int, bool]:
        """Returns whether the step was skipped, then the findings; does not wait for later work on the device."""
        if self._arrived is not None:
            self._arrived.synchronize()
        skipped, bad, norm, signal, failed = self._numbers.tolist()
        return bool(skipped), bool(bad), norm, int(signal), bool(failed)


# ---- drift -----------------------------------------------------------------------------------------


@torch.no_grad()
def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Returns a checksum of each tensor; flipping any one bit of the tensor changes it."""
    sums = [value.contiguous().view(torch.uint8).view(-1) for value in tensors.values()]
    words = [bits.view(torch.int32) if bits.numel() % 4 == 0 else bits for bits in sums]
    return dict(zip(tensors, torch.stack([word.sum(dtype=torch.int64) for word in words]).tolist(), strict=True))


def check_replicas(tensors: Mapping[str, Tensor], step: int) -> None:
    """Raises TrainingAborted, on every rank, if the ranks' copies of a tensor differ."""
    prints = gather_objects(fingerprint(tensors))
    for rank, other in enumerate(prints):
        changed = [name for name, value in other.items() if value != prints[0][name]]
        if changed:
            raise TrainingAborted(
                f"the replicas have drifted apart at step {step}: rank {rank} differs from rank 0 in {changed[0]}"
                f"{f' and {len(changed) - 1} more' if len(changed) > 1 else ''}. A device or its memory may be faulty; "
                "resume the last checkpoint on other hardware."
            )
