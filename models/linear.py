"""The linear maps of a block: `nn.Linear`, with products in fp32 where a CPU would multiply bf16 more slowly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as functional
from torch import Tensor, nn


def quick_in_bf16(capabilities: Mapping[str, Any]) -> bool:
    """Whether a CPU of these `torch.cpu.get_capabilities()` multiplies matrices faster in bf16 than in fp32.

    With AMX it does, and so does an AMD with AVX-512's bf16 (two cores: 564 GFLOP/s against 100), but not an Intel with
    those alone (two cores of a Sapphire Rapids whose AMX is hidden: 145 against 240).
    """
    amd = str(capabilities.get("cpu_name", "")).startswith("AMD")
    return bool(capabilities.get("amx_bf16") or (amd and capabilities.get("avx512_bf16")))


SLOW_IN_BF16 = not quick_in_bf16(torch.cpu.get_capabilities())


class Linear(nn.Linear):
    """`nn.Linear`; where a CPU is slow in bf16, a product in bf16 is one in fp32 that is rounded at its end.

    That is at least as exact. `Linear.widen = False` leaves every product as torch makes it.
    """

    widen: ClassVar[bool] = SLOW_IN_BF16

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` -> `(..., out_features)`."""
        if x.device.type != "cpu":
            return functional.linear(x, self.weight, self.bias)
        dtype = _dtype_on_cpu(x)
        if dtype != torch.bfloat16 or not self.widen:
            return _affine(x, self.weight, self.bias)
        with torch.autocast("cpu", enabled=False):
            # the weights are those that a product in bf16 would see, also where they are held in bf16
            bias = None if self.bias is None else self.bias.to(dtype).float()
            return _affine(x.float(), self.weight.to(dtype).float(), bias).to(dtype)


def _dtype_on_cpu(x: Tensor) -> torch.dtype:
    """What torch would compute a product of `x` in."""
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return x.dtype


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b. On a CPU a product with a bias begins by copying it to every row of the result; left apart, it is
    added by the compiler in the pass over memory that follows.
    """
    if bias is None or not torch.compiler.is_compiling():
        return functional.linear(x, weight, bias)
    product = functional.linear(x, weight)
    return product + bias.to(product.dtype)
