"""Rectified flow (Liu et al. 2022; Esser et al. 2024): velocity on the straight path from data to noise.

Letters: B clips, F frames, C channels, H W. Time 0 is data, time 1 is noise: x_t = (1 - t) x_0 + t noise.
The network takes t * config.num_steps, so that its timestep embedding has the usual range. Timesteps are (B,), or
(B, F) for one noise level per frame.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import DiffusionConfig
from .guidance import Denoiser
from .losses import LossTerms, append_dims, frame_mean
from .schedule import respace_timesteps
from .timestep_sampler import shift_times


class RectifiedFlow:
    """Rectified flow, sampled on a grid of `num_timesteps` intervals.

    Grid times are uniform, then shifted by `config.timestep_shift` like the training times.

    Args:
        config: the `diffusion` section; its prediction is "flow".
        respacing: number of sampling intervals, as a string ("25"); "" means `config.num_steps`.

    Raises ValueError unless `respacing` is a single number of at most `config.num_steps`.
    """

    learn_sigma = False

    def __init__(self, config: DiffusionConfig, *, respacing: str = "") -> None:
        if "," in respacing or respacing.startswith("ddim"):
            raise ValueError(f"Respacing {respacing!r} has no meaning for a flow: give a number ('25').")
        self.config = config
        self.num_timesteps = len(respace_timesteps(config.num_steps, respacing))
        even = torch.linspace(0, 1, self.num_timesteps + 1, dtype=torch.float64)
        self.times = shift_times(even, config.timestep_shift)  # (T + 1,), ascending from data to noise
        # plain floats, for planning: the network's timestep in step i, from noise level i + 1 to i
        self.step_times: list[float] = (self.times[1:].float() * config.num_steps).tolist()
        self.noise_levels: list[float] = self.times.tolist()

    def to(self, device: torch.device | str) -> RectifiedFlow:
        """Moves the grid to `device`; returns self."""
        self.times = self.times.to(device)
        return self

    def time(self, index: Tensor, x: Tensor) -> Tensor:
        """Returns the grid times at `index`, same shape, in the dtype of `x` but at least float32."""
        return self.times[index].to(torch.promote_types(x.dtype, torch.float32))

    def q_sample(self, x_start: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Returns x_t on the path, at `timesteps` in [0, config.num_steps]."""
        dtype = torch.promote_types(x_start.dtype, torch.float32)
        time = append_dims(timesteps.to(dtype) / self.config.num_steps, x_start)
        return (1 - time) * x_start + time * noise

    def training_losses(self, denoiser: Denoiser, x_start: Tensor, timesteps: Tensor, noise: Tensor) -> LossTerms:
        """Returns the squared error of the velocity at `timesteps`; its target is `noise` - `x_start`."""
        output = denoiser(self.q_sample(x_start, timesteps, noise), timesteps)
        return LossTerms.from_frames(frame_mean((noise - x_start - velocity(output, x_start)) ** 2))


def velocity(model_output: Tensor, x: Tensor) -> Tensor:
    """Returns `model_output` in the dtype of x, but at least fp32. Raises ValueError unless it is shaped like x."""
    if model_output.shape != x.shape:
        raise ValueError(
            f"The network's output is {tuple(model_output.shape)}, but a flow needs {tuple(x.shape)}: "
            "set model.learn_sigma=false."
        )
    return model_output.to(torch.promote_types(x.dtype, torch.float32))
