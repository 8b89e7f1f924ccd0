"""Loss terms that align the hidden states of a block with other features."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from common.checks import require
from datasets import ClipDataset
from datasets.latents import FeatureCache

from .config import Config

MLP_WIDTH = 2048  # of REPA's projector


def layer_sync(early: Tensor, late: Tensor) -> Tensor:
    """Returns LayerSync's term (B,): minus the mean cosine similarity of tokens (B, F+I, N, D) of two blocks.

    No gradient flows into the later block, which is the target (arXiv 2510.12581).
    """
    return -cosine_similarity(early.float(), late.detach().float(), dim=-1).flatten(1).mean(1)


class Projector(nn.Module):
    """REPA's term, with the layers that map a network's tokens to an image encoder's features; for training only.

    `repa`: an MLP of three layers (arXiv 2410.06940). `irepa`: a 3x3 convolution over the tokens of a frame, and
    features that are standardized over the tokens of a frame (arXiv 2512.10794, with gamma 1).
    """

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        hidden, self.grid = config.model.size.hidden_size, config.token_grid
        self.span, self.is_irepa = config.model.frames_per_token, config.objective.features_method == "irepa"
        mlp = nn.Linear(hidden, MLP_WIDTH), nn.SiLU(), nn.Linear(MLP_WIDTH, MLP_WIDTH), nn.SiLU()
        last = nn.Conv2d(hidden, width, 3, padding=1) if self.is_irepa else nn.Linear(MLP_WIDTH, width)
        self.layers = nn.Sequential(*(() if self.is_irepa else mlp), last)

    def forward(self, tokens: Tensor, features: Tensor, num_images: int) -> Tensor:
        """Returns minus the mean cosine similarity (B,) of projected tokens and features: eq. 8 of arXiv 2410.06940.

        Args:
            tokens: (B, F+I, N, D), where F counts tubelets; the features of a tubelet's frames are averaged.
            features: (B, F+I, N, width) of the frames.
        """
        clip, images = features.split([features.shape[1] - num_images, num_images], dim=1)
        target = torch.cat([clip.unflatten(1, (-1, self.span)).mean(2), images], dim=1)
        if self.is_irepa:
            target = (target - target.mean(2, keepdim=True)) / (target.std(2, keepdim=True) + 1e-6)
            maps = tokens.flatten(0, 1).transpose(1, 2).unflatten(2, (self.grid, self.grid))
            projected = self.layers(maps).flatten(2).transpose(1, 2).unflatten(0, tokens.shape[:2])
        else:
            projected = self.layers(tokens)
        return -cosine_similarity(projected.to(target.dtype), target, dim=-1).flatten(1).mean(1)


def open_features(config: Config, clips: ClipDataset) -> FeatureCache | None:
    """Returns the cache of objective.features; None without. Raises ValueError unless it fits `clips` and network."""
    if config.objective.features is None:
        return None
    cache = FeatureCache(Path(config.objective.features))
    cache.check(clips.latent_settings, [*clips.catalog.clips, *(clips.images or [])])
    wrong = f"has {cache.shape[1]} features per frame, but the network {config.token_grid**2} tokens"
    require(cache.shape[1] == config.token_grid**2, f"objective.features: {cache.path} {wrong}; make another cache")
    return cache
