"""Deciding whether a step's gradient may be applied, and whether the replicas are still one network."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .distributed import gather_objects
from .errors import TrainingAborted
from .optim import OptimConfig, clip_limit


@dataclass(frozen=True)
class Verdict:
    """What to do with one step's gradient: `skip` names the reason not to apply it; else clip it to `limit`."""

    skip: str | None = None
    limit: float = math.inf
    spike: bool = False


class StepGuard:
    """Skips what is not finite, and clips or skips spikes, the same on every rank.

    A spike is a gradient norm above `optim.spike_factor` x the median of the last `WINDOW` applied norms.
    `optim.max_skips` skips in a row abort the run. Its state is part of the checkpoint.
    """

    WINDOW = 100  # applied norms that are remembered
    MINIMUM = 20  # applied norms below which nothing counts as a spike

    def __init__(self, config: OptimConfig) -> None:
        self.config = config
        self.norms: deque[float] = deque(maxlen=self.WINDOW)
        self.skipped = 0  # steps in the whole run
        self.in_a_row = 0
        self.spikes = 0

    def judge(self, finite: bool, norm: float, step: int) -> Verdict:
        """The verdict on a gradient of that total `norm`; `finite`: loss and gradient of all ranks are."""
        verdict = self._verdict(finite, norm, step)
        self.spikes += verdict.spike
        if verdict.skip:
            self.skipped += 1
            self.in_a_row += 1
        else:
            self.in_a_row = 0
            self.norms.append(norm)
        return verdict

    def _verdict(self, finite: bool, norm: float, step: int) -> Verdict:
        if not finite:
            return Verdict(skip="loss or gradient is not finite")
        limit = clip_limit(step, self.config)
        if not self.config.spike_factor or len(self.norms) < self.MINIMUM:
            return Verdict(limit=limit)
        median = statistics.median(self.norms)
        if norm <= self.config.spike_factor * median:
            return Verdict(limit=limit)
        if self.config.spike_policy == "clip":
            return Verdict(limit=min(limit, median), spike=True)
        return Verdict(skip=f"gradient norm {norm:.3g} is a spike over the median {median:.3g}", spike=True)

    def check_streak(self) -> None:
        """TrainingAborted after `optim.max_skips` steps in a row that could not be applied."""
        if self.in_a_row >= self.config.max_skips:
            raise TrainingAborted(
                f"{self.in_a_row} steps in a row were skipped (optim.max_skips): the run has diverged or its data are "
                "broken. events.jsonl names the files; continue the last checkpoint with a lower optim.learning_rate."
            )

    def state_dict(self) -> dict[str, object]:
        """JSON-able."""
        names = ("skipped", "in_a_row", "spikes")
        return {"norms": list(self.norms), **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from `state_dict()`."""
        self.norms = deque(state["norms"], maxlen=self.WINDOW)  # type: ignore[call-overload]
        for name in ("skipped", "in_a_row", "spikes"):
            setattr(self, name, state[name])


@torch.no_grad()
def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """A sum over the bits of each tensor: one ulp anywhere changes it."""
    sums = [value.contiguous().view(torch.uint8).view(-1) for value in tensors.values()]
    words = [bits.view(torch.int32) if bits.numel() % 4 == 0 else bits for bits in sums]
    return dict(zip(tensors, torch.stack([word.sum(dtype=torch.int64) for word in words]).tolist(), strict=True))


def check_replicas(tensors: Mapping[str, Tensor], step: int) -> None:
    """TrainingAborted, on every rank, where the ranks' copies of a tensor differ."""
    prints = gather_objects(fingerprint(tensors))
    for rank, other in enumerate(prints):
        changed = [name for name, value in other.items() if value != prints[0][name]]
        if changed:
            raise TrainingAborted(
                f"the replicas have drifted apart at step {step}: rank {rank} differs from rank 0 in {changed[0]}"
                f"{f' and {len(changed) - 1} more' if len(changed) > 1 else ''}. A device or its memory may be faulty; "
                "continue the last checkpoint elsewhere."
            )
