"""Rectified flow (Liu et al. 2022; Esser et al. 2024): velocity on the straight path from data to noise.

Letters: B clips, F frames, C channels, H W. Time 0 is data, time 1 is noise: x_t = (1 - t) x_0 + t noise.
The network takes t * config.num_steps, so that its timestep embedding has the usual range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import DiffusionConfig
from .guidance import Denoiser
from .losses import LossTerms, frame_mean
from .schedule import respace_timesteps
from .timestep_sampler import shift_times, times_from_uniform


class RectifiedFlow:
    """Rectified flow, sampled on a grid of `num_timesteps` intervals.

    The grid is uniform in time, then shifted by `config.timestep_shift` as the training times are.

    Args:
        config: the `diffusion` section; its prediction is "flow".
        respacing: number of intervals for sampling as text ("25"); "" is `config.num_steps`.

    Raises:
        ValueError: `respacing` is not a single number of at most `config.num_steps`.
    """

    learn_sigma = False

    def __init__(self, config: DiffusionConfig, *, respacing: str = "") -> None:
        if "," in respacing or respacing.startswith("ddim"):
            raise ValueError(f"Respacing {respacing!r} has no meaning for a flow: give a number ('25').")
        self.config = config
        self.num_timesteps = len(respace_timesteps(config.num_steps, respacing))
        even = torch.linspace(0, 1, self.num_timesteps + 1, dtype=torch.float64)
        self.times = shift_times(even, config.timestep_shift)  # (T + 1,), ascending from data to noise
        # on the host, for planning: the network's timestep at step i, which goes from noise level i + 1 to i
        self.step_times: list[float] = (self.times[1:].float() * config.num_steps).tolist()
        self.noise_levels: list[float] = self.times.tolist()
        self.clean_gains: list[float] = self.noise_levels[1:]  # |d x_0 / d velocity| at step i

    def to(self, device: torch.device | str) -> RectifiedFlow:
        """Moves the grid to `device`; returns self."""
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64  # mps has no float64
        self.times = self.times.to(device, dtype)
        return self

    def time(self, index: Tensor, x: Tensor) -> Tensor:
        """Returns grid times at `index` (B,), shaped (B, 1, ...) to broadcast over `x`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return self.times[index].to(dtype).view(-1, *[1] * (x.ndim - 1))

    def network_timesteps(self, time: Tensor) -> Tensor:
        """Converts B times in [0, 1] of any shape to timesteps (B,), float in [0, config.num_steps]."""
        return time.flatten() * self.config.num_steps

    def timesteps_from_uniform(self, uniform: Tensor) -> Tensor:
        """Maps (B,) in [0, 1) to timesteps (B,), float in [0, config.num_steps], of the configured density."""
        return times_from_uniform(uniform, self.config) * self.config.num_steps

    def q_sample(self, x_start: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Returns the point of the path at `timesteps` (B,) in [0, config.num_steps]."""
        dtype = torch.promote_types(x_start.dtype, torch.float32)
        time = (timesteps.to(dtype) / self.config.num_steps).view(-1, *[1] * (x_start.ndim - 1))
        return (1 - time) * x_start + time * noise

    def training_losses(self, denoiser: Denoiser, x_start: Tensor, timesteps: Tensor, noise: Tensor) -> LossTerms:
        """Computes the squared error of the velocity `noise` - `x_start` at `timesteps` (B,)."""
        output = denoiser(self.q_sample(x_start, timesteps, noise), timesteps)
        return LossTerms.from_frames(frame_mean((noise - x_start - velocity(output, x_start)) ** 2))


def velocity(model_output: Tensor, x: Tensor) -> Tensor:
    """Returns `model_output` in the dtype of x, at least fp32. Raises ValueError unless it is shaped like x."""
    if model_output.shape != x.shape:
        raise ValueError(
            f"The network's output is {tuple(model_output.shape)}, but a flow needs {tuple(x.shape)}: "
            "set model.learn_sigma=false."
        )
    return model_output.to(torch.promote_types(x.dtype, torch.float32))
