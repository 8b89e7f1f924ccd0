"""Samplers of training timesteps, as functions of uniform random numbers that the caller draws.

T is the number of steps, B the batch. A sampler turns u (B,) in [0, 1) into timesteps and loss weights (B,); the
stateless one also u of any other shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from .config import DiffusionConfig

# density name -> its inverse CDF on [0, 1]
INVERSE_CDFS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform": lambda u: u,
    "linear": torch.sqrt,  # density 2t
    "logit_normal": lambda u: torch.sigmoid(torch.special.ndtri(u)),  # logit(t) is standard normal
}


def shift_times(time: Tensor, shift: float) -> Tensor:
    """Shifts times in [0, 1] towards noise (shift above 1) or data (below 1); 0 and 1 stay (Esser 2024, eq. 23)."""
    return shift * time / (1 + (shift - 1) * time)


class TimestepSampler:
    """Draws timesteps from the configured density, with equal loss weights. Stateless; subclasses may have state."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.num_steps = config.num_steps

    def timesteps_from_uniform(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B,) in [0, 1) to timesteps (B,) and loss weights (B,).

        Timesteps are int64 in [0, T); for a flow, floats in [0, T].
        """
        times = INVERSE_CDFS[self.config.timestep_density](uniform)
        timesteps = shift_times(times, self.config.timestep_shift) * self.num_steps
        if self.config.prediction != "flow":
            timesteps = timesteps.long().clamp(max=self.num_steps - 1)
        return timesteps, torch.ones_like(uniform)

    def update(self, timesteps: Tensor, losses: Tensor, skip: Tensor | bool = False) -> None:
        """Records the losses (B,) of timesteps (B,), unless `skip` (a bool, or a scalar on their device)."""

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the state that a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores a `state_dict()`."""


class LossAwareTimestepSampler(TimestepSampler):
    """Draws timesteps in proportion to the RMS of their latest losses (Nichol & Dhariwal 2021, 3.3).

    Uniform until every timestep has `history` losses. Weights compensate for the density, so the expected loss is
    that of uniform timesteps. In a process group every rank stores the losses of all ranks.
    """

    def __init__(self, config: DiffusionConfig, history: int = 10, uniform_share: float = 1e-3) -> None:
        super().__init__(config)
        self.history = history
        self.uniform_share = uniform_share
        # the extra last row takes losses that are skipped, or replaced by later ones of the same batch
        self.losses = torch.zeros(self.num_steps + 1, history, dtype=torch.float64)
        self.counts = torch.zeros(self.num_steps, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """Returns the probability of each timestep, (T,) float64 with sum 1."""
        root_mean_square = self.losses[:-1].square().mean(1).sqrt()
        learned = root_mean_square / root_mean_square.sum()
        learned = learned * (1 - self.uniform_share) + self.uniform_share / self.num_steps
        uniform = torch.full_like(learned, 1 / self.num_steps)
        return torch.where((self.counts >= self.history).all(), learned, uniform)

    def timesteps_from_uniform(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (B,) in [0, 1) to int64 timesteps (B,) and loss weights (B,), 1 / (T p(t))."""
        self._to(uniform.device)
        probabilities = self.probabilities()
        steps = torch.searchsorted(probabilities.cumsum(0), uniform.double(), right=True)
        steps = steps.clamp(max=self.num_steps - 1)
        return steps, (1 / (self.num_steps * probabilities[steps])).to(uniform.dtype)

    @torch.no_grad()
    def update(self, timesteps: Tensor, losses: Tensor, skip: Tensor | bool = False) -> None:
        """Records all ranks' losses (B,) of timesteps (B,) in rank order, unless `skip`; all ranks have the same B."""
        self._to(timesteps.device)
        timesteps, losses = _gather_from_ranks(timesteps), _gather_from_ranks(losses.double())
        same = timesteps[:, None] == timesteps
        earlier, later = same.tril(-1).sum(1), same.triu(1).sum(1)
        slots = (self.counts[timesteps] + earlier) % self.history  # oldest first
        dropped = torch.zeros_like(same[0]) | skip
        rows = timesteps.masked_fill(dropped | (later >= self.history), self.num_steps)
        self.losses[rows, slots] = torch.where(losses.isfinite(), losses, self.losses[rows, slots])
        self.counts.index_add_(0, timesteps, (~dropped).long())

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the recorded losses and their counts."""
        return {"losses": self.losses[:-1].clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores the `state_dict()` of a sampler of the same size; raises ValueError for another size."""
        if state["losses"].shape != self.losses[:-1].shape:
            raise ValueError(
                f"The loss-aware timestep sampler stores {tuple(self.losses[:-1].shape)} losses, the "
                f"checkpoint has {tuple(state['losses'].shape)}: keep diffusion.num_steps as it was."
            )
        self.losses[:-1] = state["losses"].to(self.losses)
        self.counts.copy_(state["counts"])

    def _to(self, device: torch.device) -> None:
        self.losses, self.counts = self.losses.to(device), self.counts.to(device)


def _gather_from_ranks(values: Tensor) -> Tensor:
    """Gathers (B,) of each rank to (ranks * B,) in rank order."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, values.contiguous())
    return torch.cat(gathered)


def build_timestep_sampler(config: DiffusionConfig) -> TimestepSampler:
    """Returns the sampler that `diffusion.timestep_sampler` names."""
    return LossAwareTimestepSampler(config) if config.timestep_sampler == "loss_aware" else TimestepSampler(config)
