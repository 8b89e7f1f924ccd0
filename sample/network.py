"""Wraps a network for samplers (precision, compilation), and counts its evaluations to select the guided ones.

Letters: B videos per batch, F frames, C latent channels, h w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.checks import require
from diffusion import Denoiser
from engine.conditions import Condition
from models.latte import Latte
from models.latte_t2v import LatteT2V

DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Network:
    """A model as samplers call it; its output has the dtype of the input latents.

    Args:
        precision: fp32 (the dtype of the weights), or autocast to bf16 or fp16 (norms, softmax and sums stay in fp32).
        cast_weights: convert the model in place to bf16 or fp16, which halves its memory, and compute everything in
            that dtype.
        compiled: use torch.compile without graph breaks, with CUDA graphs on CUDA; helps small batches, which are
            limited by the host. The first batch of each size takes minutes.

    Raises: ValueError for an unknown precision, or `cast_weights` with fp32.
    """

    def __init__(
        self,
        model: Latte | LatteT2V,
        device: torch.device,
        *,
        precision: str = "fp32",
        cast_weights: bool = False,
        compiled: bool = False,
    ) -> None:
        require(precision in DTYPES, f"sample.precision must be one of {', '.join(DTYPES)}, not {precision!r}.")
        self.device, self.dtype, self.cast_weights = device, DTYPES[precision], cast_weights
        require(not (cast_weights and self.dtype is None), "sample.cast_weights needs sample.precision=bf16 or fp16.")
        self.model = model.to(device, self.dtype if cast_weights else None).eval()
        self._graphs = compiled and device.type == "cuda"
        self._call: Callable[..., Tensor] = self._forward
        if compiled:
            mode = "reduce-overhead" if self._graphs else None
            self._call = torch.compile(self._forward, fullgraph=True, dynamic=False, mode=mode)

    def __call__(self, x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Returns the model's output (B, F, C or 2C, h, w), which later calls do not overwrite."""
        if not self._graphs:
            return self._call(x, timesteps, condition)
        torch.compiler.cudagraph_mark_step_begin()
        return self._call(x, timesteps, condition).clone()  # the next CUDA graph replay overwrites it

    def _forward(self, x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        autocast = self.dtype is not None and not self.cast_weights
        with torch.autocast(self.device.type, self.dtype, enabled=autocast):
            inputs = x.to(self.dtype) if self.cast_weights else x
            return condition.call(self.model, inputs, timesteps).to(x.dtype)


class GuidedEvaluations:
    """Counts a pass's evaluations on the host, without a device sync, to tell whether the current one is guided."""

    def __init__(self, guided: Sequence[bool] | None) -> None:
        self.guided, self.number = guided, -1  # per evaluation (None: all); index of the current one

    def is_active(self) -> bool:
        """Returns whether the current evaluation is guided."""
        return self.guided is None or self.guided[self.number]

    def count(self, denoiser: Denoiser) -> Denoiser:
        """Returns `denoiser` with its calls counted."""

        def call(x: Tensor, timesteps: Tensor) -> Tensor:
            self.number += 1
            return denoiser(x, timesteps)

        return call
