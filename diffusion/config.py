"""The `diffusion` section of a configuration."""

from __future__ import annotations

from dataclasses import dataclass, fields

from common.checks import POSITIVE, at_least, check_limits, one_of, require

from .schedule import BETAS

LIMITS = {
    "num_steps": at_least(1),
    "schedule": one_of(BETAS),
    "prediction": one_of(("epsilon", "x_start", "velocity", "flow")),
    "loss": one_of(("mse", "rescaled_mse", "kl", "rescaled_kl")),
    "fixed_variance": one_of(("large", "small")),
    "loss_weighting": one_of(("uniform", "min_snr")),
    "min_snr_gamma": POSITIVE,
    "timestep_sampler": one_of(("uniform", "loss_aware")),
    "timestep_density": one_of(("uniform", "linear", "logit_normal")),
    "timestep_shift": POSITIVE,
    "frame_timesteps": one_of(("shared", "independent", "monotone")),
}
# setting -> keys that do not apply with it: a flow has no betas, no variance and one loss
MEANINGLESS = {
    "prediction=flow": ("schedule", "loss", "loss_weighting", "fixed_variance", "timestep_sampler"),
    "timestep_sampler=loss_aware": ("timestep_density", "timestep_shift", "loss_weighting", "frame_timesteps"),
    "loss=kl": ("loss_weighting",),
    "loss=rescaled_kl": ("loss_weighting",),
    "loss_weighting=uniform": ("min_snr_gamma",),
}


@dataclass(frozen=True)
class DiffusionConfig:
    """The `diffusion` section: noising process, prediction target and training noise levels."""

    num_steps: int = 1000  # length of the process, and upper end of the network's timesteps
    schedule: str = "linear"  # linear | cosine
    prediction: str = "epsilon"  # epsilon | x_start | velocity | flow (rectified flow, without learned sigma)
    loss: str = "mse"  # mse (plus the vb term if sigma is learned) | rescaled_mse | kl | rescaled_kl
    loss_weighting: str = "uniform"  # uniform | min_snr: weight of the squared error by noise level
    min_snr_gamma: float = 5.0  # the signal-to-noise ratio above which min_snr no longer grows
    fixed_variance: str = "large"  # large | small: the sampler's variance if sigma is not learned
    timestep_sampler: str = "uniform"  # uniform | loss_aware
    timestep_density: str = "uniform"  # uniform | linear (density 2t) | logit_normal
    timestep_shift: float = 1.0  # s: t -> s t / (1 + (s - 1) t), applied after the density; above 1: noisier
    # shared | independent: each frame has its own timestep | monotone: the same, sorted along the clip
    frame_timesteps: str = "shared"

    def __post_init__(self) -> None:
        check_limits(self, "diffusion.", LIMITS)
        for item in fields(self):
            for owner, keys in MEANINGLESS.items():
                key, _, needed = owner.partition("=")
                value = getattr(self, item.name)
                require(
                    item.name not in keys or getattr(self, key) != needed or value == item.default,
                    f"diffusion.{item.name}={value} has no meaning with diffusion.{owner}: leave it at {item.default}.",
                )
