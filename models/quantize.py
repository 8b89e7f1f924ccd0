"""Quantises linear maps of T5 and the text-conditioned network to 8 or 4 bits, for sampling on a smaller GPU.

Only the blocks, which hold nearly all weights, are quantised; embeddings, norms and the output layer are not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

FULL = (".wo",)  # in T5: overflows fp16, so transformers keeps it in fp32 and bitsandbytes must not quantise it


def check_device(kind: str | None, device: torch.device, key: str) -> None:
    """Raises ValueError, naming `key`, for bitsandbytes on a device other than CUDA."""
    if kind in ("bnb8", "bnb4") and device.type != "cuda":
        raise ValueError(f"{key}={kind} is from bitsandbytes, which needs CUDA; use int8 on {device.type}")


def quantize(network: nn.Module, kind: str | None, device: torch.device) -> nn.Module:
    """Quantises the linear maps of the network's blocks in place, unless `kind` is None, and moves it to `device`.

    Maps are moved one by one, so the device never holds more than the result and one map.
    """
    if kind is not None:
        for name, module in list(network.named_modules()):
            if isinstance(module, nn.Linear) and "block" in name and not (kind != "int8" and name.endswith(FULL)):
                network.set_submodule(name, QUANTIZERS[kind](module, device))
    return network.to(device)


def _torchao(linear: nn.Linear, device: torch.device) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    linear.to(device)
    quantize_(linear, Int8WeightOnlyConfig())
    return linear


def _bitsandbytes(linear: nn.Linear, device: torch.device, *, four: bool) -> nn.Module:
    from bitsandbytes import nn as quantized

    frozen: dict[str, Any] = {"requires_grad": False}
    if four:
        make: Any = partial(quantized.Linear4bit, compute_dtype=linear.weight.dtype, quant_type="nf4")
        weight: Any = quantized.Params4bit(linear.weight.data, quant_type="nf4", **frozen)
    else:
        make = partial(quantized.Linear8bitLt, has_fp16_weights=False)
        weight = quantized.Int8Params(linear.weight.data, has_fp16_weights=False, **frozen)
    with torch.device("meta"):
        made = make(linear.in_features, linear.out_features, bias=linear.bias is not None)
    if four:
        weight.module = made
    made.weight, made.bias = weight, linear.bias
    return made.to(device)  # bitsandbytes quantises here


# int8: torchao, one scale per output, computes in the dtype of the network, on any device.
# bnb8: LLM.int8 of bitsandbytes (arXiv 2208.07339). bnb4: its NF4 (arXiv 2305.14314). CUDA only.
QUANTIZERS: dict[str, Callable[[nn.Linear, torch.device], nn.Module]] = {
    "int8": _torchao,
    "bnb8": partial(_bitsandbytes, four=False),
    "bnb4": partial(_bitsandbytes, four=True),
}
