"""TREAD (arXiv 2501.04765): in training, a random share of the tokens skips a range of blocks; sampling uses all."""

from __future__ import annotations

from torch import Tensor

from models.latte import Route

from .config import ObjectiveConfig


def draw_route(uniform: Tensor, config: ObjectiveConfig) -> Route:
    """Returns the route of a batch from `uniform` (B, N) in [0, 1), N tokens per frame.

    Each clip keeps round(route_keep * N) positions, at least one, drawn uniformly; the same in all its frames, so that
    temporal attention sees whole sequences.
    """
    count = max(1, round(config.route_keep * uniform.shape[1]))
    return Route(config.routed.start, config.routed.stop, uniform.argsort(dim=1)[:, :count])
