"""Modulation tables: what timesteps and labels do to the layers of a network, computed before a walk needs it.

SiLU stands before the adaLN heads' product, so timestep and label do not separate: a table has a row for each
evaluation and label of the batch, of M = (6 x layers + 2) x width numbers. For Latte-XL/2 that is 0.78 MB in fp32 and
0.39 MB in bf16, 196 MB for 250 steps with one class and the null label.

Letters: B videos of a batch, K different labels of a batch, M numbers of a modulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ROWS_AT_ONCE = 256  # as many are computed in one product, beside the table itself


class ModulationTable:
    """Rows for as many evaluations ahead as the budget holds, and always for one.

    Args:
        compute: (timesteps (B,), labels (B,) or None) -> modulations (B, 1, 1, M).
        times: the network's timestep at every evaluation.
        labels: those that will be asked for, the null label included; None for an unconditional network.
        budget: bytes for the table.
    """

    def __init__(
        self,
        compute: Callable[[Tensor, Tensor | None], Tensor],
        times: Sequence[float],
        labels: Sequence[int] | None,
        budget: int,
        device: torch.device,
    ) -> None:
        self.compute = compute
        self.times = torch.tensor(times, dtype=torch.float32, device=device)  # (E,)
        self.labels = None if labels is None else torch.tensor(sorted(set(labels)), device=device)  # (K,)
        self.columns = None if labels is None else _places(sorted(set(labels))).to(device)
        self.budget = budget
        self.window = range(0)  # evaluations in the table
        self.table: Tensor | None = None  # (window, K, 1, 1, M)

    def rows(self, number: int, labels: Tensor | None) -> Tensor:
        """(B, 1, 1, M) of evaluation `number` for `labels` (B,); (1, 1, 1, M) for an unconditional network."""
        if number not in self.window:
            self._fill(number)
        assert self.table is not None
        rows = self.table[number - self.window.start]
        return rows if labels is None or self.columns is None else rows[self.columns[labels]]

    @property
    def nbytes(self) -> int:
        """Bytes of the table as it is."""
        return 0 if self.table is None else self.table.nbytes

    def _fill(self, number: int) -> None:
        """Compute the window of evaluations that begins with `number`."""
        if self.table is None:
            first = self._computed(range(number, number + 1))
            length = max(1, min(len(self.times), self.budget // first.nbytes))
            self.table = first.new_empty(length, *first.shape[1:])
        self.window = range(number, min(number + len(self.table), len(self.times)))
        per_part = max(1, ROWS_AT_ONCE // self.table.shape[1])
        for start in range(self.window.start, self.window.stop, per_part):
            part = range(start, min(start + per_part, self.window.stop))
            place = slice(part.start - self.window.start, part.stop - self.window.start)
            self.table[place] = self._computed(part)

    def _computed(self, numbers: range) -> Tensor:
        """(evaluations, K, 1, 1, M)."""
        times = self.times[numbers.start : numbers.stop]  # (E,)
        if self.labels is None:
            return self.compute(times, None)[:, None]
        pairs = times.repeat_interleave(len(self.labels)), self.labels.repeat(len(times))
        return self.compute(*pairs).unflatten(0, (len(times), len(self.labels)))


def _places(labels: Sequence[int]) -> Tensor:
    """From a label to its place in ascending `labels`."""
    places = torch.zeros(labels[-1] + 1, dtype=torch.long)
    places[torch.tensor(labels)] = torch.arange(len(labels))
    return places
