"""The `diffusion` section of a configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

# key -> allowed values, for every key that is a name
CHOICES: dict[str, tuple[str, ...]] = {
    "schedule": ("linear", "cosine"),
    "prediction": ("epsilon", "x_start", "velocity", "flow"),
    "loss": ("mse", "rescaled_mse", "kl", "rescaled_kl"),
    "fixed_variance": ("large", "small"),
    "timestep_sampler": ("uniform", "loss_aware"),
    "timestep_density": ("uniform", "linear", "logit_normal"),
}
# keys without meaning for rectified flow, which has no betas, no variance and one loss
GAUSSIAN_ONLY = ("schedule", "loss", "fixed_variance", "timestep_sampler")
# keys that the loss-aware sampler would override
DENSITY = ("timestep_density", "timestep_shift")


@dataclass(frozen=True)
class DiffusionConfig:
    """The `diffusion` section: noising of clips, target of the network, and noise levels of training.

    Raises:
        ValueError: an invalid value or combination; the message names `diffusion.<key>`.
    """

    num_steps: int = 1000  # length of the diffusion process; also the unit of the network's timesteps
    schedule: str = "linear"  # linear | cosine
    prediction: str = "epsilon"  # epsilon | x_start | velocity | flow (rectified flow, without learned sigma)
    loss: str = "mse"  # mse (plus the vb term if sigma is learned) | rescaled_mse | kl | rescaled_kl
    fixed_variance: str = "large"  # large | small; variance of the sampler if sigma is not learned
    timestep_sampler: str = "uniform"  # uniform | loss_aware
    timestep_density: str = "uniform"  # uniform | linear (density 2t) | logit_normal
    timestep_shift: float = 1.0  # s: t -> s t / (1 + (s - 1) t), after the density; above 1 is noisier

    def __post_init__(self) -> None:
        for key, allowed in CHOICES.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"diffusion.{key} must be one of {', '.join(allowed)}, got {getattr(self, key)!r}.")
        if self.num_steps < 1:
            raise ValueError(f"diffusion.num_steps must be at least 1, got {self.num_steps}.")
        if not (math.isfinite(self.timestep_shift) and self.timestep_shift > 0):
            raise ValueError(f"diffusion.timestep_shift must be positive and finite, got {self.timestep_shift}.")
        if self.prediction == "flow":
            self._require_default(GAUSSIAN_ONLY, "diffusion.prediction=flow")
        if self.timestep_sampler == "loss_aware":
            self._require_default(DENSITY, "diffusion.timestep_sampler=loss_aware")

    def _require_default(self, keys: tuple[str, ...], owner: str) -> None:
        defaults: dict[str, Any] = {field.name: field.default for field in fields(self)}
        for key in keys:
            if getattr(self, key) != defaults[key]:
                raise ValueError(
                    f"diffusion.{key}={getattr(self, key)} has no meaning with {owner}: leave it at {defaults[key]}."
                )
