"""The linear maps of a block: `nn.Linear`, with products in fp32 where a CPU would multiply bf16 more slowly."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

# A CPU without AMX multiplies matrices in bf16 more slowly than in fp32: on two cores of a Sapphire Rapids whose AMX
# is hidden, 145 GFLOP/s (AVX-512 bf16) against 240.
SLOW_IN_BF16 = not torch.cpu._is_amx_tile_supported()


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
