"""The network as a sampler calls it: its precision, its compilation, and what a walk lets it leave out.

A walk is one batch from noise to data. Which timesteps it visits is known before it begins, so what depends on them
alone is planned on the host and nothing waits for the device: `Walk` counts the evaluations, `Calls` looks the
modulations up instead of computing them.

Letters: B videos of a batch, F frames, C latent channels, h w latent pixels, M numbers of a modulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion import Denoiser
from models.latte import Latte

from .modulation import ModulationTable

DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Network:
    """A model ready to be called by samplers, which get its output in fp32.

    Args:
        precision: fp32, or bf16 or fp16: autocast (norms, softmax and sums stay in fp32).
        cast_weights: hold the weights themselves in bf16 or fp16, in half the memory, and compute all in it. The model
            is changed in place.
        compiled: torch.compile without graph breaks, on CUDA into CUDA graphs, for small batches that wait for the
            host. The first batch of each size takes minutes.

    Raises:
        ValueError: an unknown precision, or fp32 weights to be cast.
    """

    def __init__(
        self,
        model: Latte,
        device: torch.device,
        *,
        precision: str = "fp32",
        cast_weights: bool = False,
        compiled: bool = False,
    ) -> None:
        if precision not in DTYPES:
            raise ValueError(f"sample.precision must be one of {', '.join(DTYPES)}, not {precision!r}.")
        self.dtype = DTYPES[precision]
        if cast_weights and self.dtype is None:
            raise ValueError("sample.cast_weights needs sample.precision=bf16 or fp16.")
        self.device = device
        self.cast_weights = cast_weights
        self.model = model.to(device, self.dtype if cast_weights else None).eval()
        self._graphs = compiled and device.type == "cuda"
        self._plain: Callable[..., Tensor] = _compile(self._forward, device) if compiled else self._forward

    def __call__(self, x: Tensor, timesteps: Tensor, labels: Tensor | None, modulations: Tensor | None) -> Tensor:
        """The model's output (B, F, C or 2C, h, w); `modulations` (B, 1, 1, M) as `Latte.forward` takes them."""
        self._begin()
        return self._own(self._plain(x, timesteps, labels, modulations))

    @torch.no_grad()
    def modulations(self, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        """(B,) and (B,) -> (B, 1, 1, M), computed in the precision of the weights and held in that of the products."""
        return self.model.modulations(timesteps, labels).to(self.dtype or torch.float32)

    def _forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None, modulations: Tensor | None) -> Tensor:
        with self._precision():
            ahead = {} if modulations is None else {"modulations": modulations}
            return self.model(self._cast(x), timesteps, labels, **ahead).float()

    def _precision(self) -> torch.autocast:
        enabled = self.dtype is not None and not self.cast_weights
        return torch.autocast(self.device.type, self.dtype, enabled=enabled)

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) if self.cast_weights else x

    def _begin(self) -> None:
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def _own(self, output: Tensor) -> Tensor:
        """A copy where the next replay of a CUDA graph would write into it."""
        return output.clone() if self._graphs else output


def _compile(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    mode = "reduce-overhead" if device.type == "cuda" else None
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


class Walk:
    """Where a sampler is on its way, counted on the host.

    Args:
        times: the network's timestep at every evaluation, as `diffusion.evaluations` gives them.
        num_steps: of the whole process (`diffusion.num_steps`).
    """

    def __init__(self, times: Sequence[float], num_steps: int) -> None:
        self.times = times
        self.num_steps = num_steps
        self.number = -1  # of the evaluation that goes on; -1 before the first

    @property
    def fraction(self) -> float:
        """How noisy the evaluation's clips are: 0 for data, 1 for noise."""
        return self.times[self.number] / self.num_steps

    def counted(self, denoiser: Denoiser) -> Denoiser:
        """`denoiser`, whose calls are counted."""

        def call(x: Tensor, timesteps: Tensor) -> Tensor:
            self.number += 1
            return denoiser(x, timesteps)

        return call


class Calls:
    """The network in one walk, as `diffusion.guided` calls it: once or twice in an evaluation.

    Args:
        table: modulations made ahead; None computes them in every call.
    """

    def __init__(self, network: Network, walk: Walk, table: ModulationTable | None = None) -> None:
        self.network = network
        self.walk = walk
        self.table = table

    def __call__(self, x: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        modulations = self.table.rows(self.walk.number, labels) if self.table else None
        return self.network(x, timesteps, labels, modulations)
