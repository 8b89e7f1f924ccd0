"""Loss terms that align the hidden states of a block with other features."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cosine_similarity


def layer_sync(early: Tensor, late: Tensor) -> Tensor:
    """Returns LayerSync's term (B,): minus the mean cosine similarity of tokens (B, F+I, N, D) of two blocks.

    No gradient flows into the later block, which is the target (arXiv 2510.12581).
    """
    return -cosine_similarity(early.float(), late.detach().float(), dim=-1).flatten(1).mean(1)
