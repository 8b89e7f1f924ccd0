"""`torch.compile` of a network, block by block."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch._functorch import config as autograd_of_graphs


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile each block in place: one graph for each kind of layer, and a checkpoint does not show it.

    For the backward pass a block keeps its inputs, its matrix products and its attention; norms, modulations, gates
    and GELU are computed again, fused with what reads them. The setting is this process's, for all that it compiles.
    """
    autograd_of_graphs.aggressive_recomputation = True
    for block in blocks:
        block.compile(dynamic=False)
