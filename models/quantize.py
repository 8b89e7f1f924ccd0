"""Linear maps in 8 or 4 bits, for sampling on a smaller GPU: T5's and the text-conditioned network's.

Only the blocks are quantised, which hold nearly all weights; embeddings, norms and the ends stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

# int8: torchao, a scale for each output, products in the dtype of the network; on any device.
# bnb8: bitsandbytes' LLM.int8 (arXiv 2208.07339). bnb4: its NF4 (arXiv 2305.14314). On CUDA.
KINDS = ("int8", "bnb8", "bnb4")
FULL = (".wo",)  # of T5: its outputs outgrow fp16, so transformers keeps it in fp32, and bitsandbytes must not have it


def check_device(kind: str | None, device: torch.device, key: str) -> None:
    """Raises: ValueError for bitsandbytes without CUDA, in a sentence that names the key."""
    if kind in ("bnb8", "bnb4") and device.type != "cuda":
        raise ValueError(f"{key}={kind} is bitsandbytes', which needs CUDA; on {device.type} use int8")


def quantize(network: nn.Module, kind: str | None, device: torch.device) -> nn.Module:
    """`network` on `device`, with the linear maps of its blocks quantised one by one; None: as they are.

    Only what is quantised reaches the device, so nothing there is ever larger than the result.
    """
    if kind is not None:
        for name, module in list(network.named_modules()):
            if isinstance(module, nn.Linear) and "block" in name and not (kind != "int8" and name.endswith(FULL)):
                network.set_submodule(name, MAKERS[kind](module, device))
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
    return made.to(device)  # which is when they are quantised


MAKERS: dict[str, Callable[[nn.Linear, torch.device], nn.Module]] = {
    "int8": _torchao,
    "bnb8": partial(_bitsandbytes, four=False),
    "bnb4": partial(_bitsandbytes, four=True),
}
