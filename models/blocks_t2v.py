"""Parts of the text-conditioned network: adaLN-single, attention with separate projections, the block.

Parameter names are those of diffusers, so weights are interchangeable.
Letters: B batch, F frames, I images, N tokens per frame, D width, L words of a caption.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from .attention import attend
from .blocks import Modulation, modulate, on_clip
from .config_t2v import LatteT2VConfig
from .embeddings import TimestepEmbedder, timestep_features


class Caption(NamedTuple):
    """Projected captions, the clip's first, then one per image; masks are added to the attention scores."""

    features: Tensor  # (B, 1+I, L, D)
    clip_mask: Tensor | None = None  # (B, 1, 1 or F*N, L)
    image_mask: Tensor | None = None  # (B*I, 1, 1, L)


class TwoLayers(nn.Module):
    """Linear, activation, linear; parameter names as in diffusers."""

    def __init__(self, in_features: int, hidden_size: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, hidden_size)
        self.activation = activation
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` -> `(..., hidden_size)`."""
        return self.linear_2(self.activation(self.linear_1(x)))


class AdaLayerNormSingle(nn.Module):
    """Computes the condition that all blocks share (adaLN-single, PixArt-alpha section 2.3)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        embedder = TwoLayers(TimestepEmbedder.num_features, hidden_size, nn.SiLU())
        self.emb = nn.ModuleDict({"timestep_embedder": embedder})
        self.linear = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, timesteps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`(B, ...)`, integer or fractional -> embedded timesteps `(B, ..., D)` and modulations `(B, ..., 6, D)`."""
        # in fp32 for weights of any precision, as in training
        features = timestep_features(timesteps, TimestepEmbedder.num_features, torch.float32)
        embedded = self.emb["timestep_embedder"](features.to(dtype))
        return embedded, self.linear(functional.silu(embedded)).unflatten(-1, (6, -1))


class Projections(nn.Module):
    """Base class of both attentions: separate projections; parameter names as in diffusers."""

    def __init__(self, config: LatteT2VConfig) -> None:
        super().__init__()
        width, bias = config.width, config.attention_bias
        self.num_heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(config.dropout))


class SelfAttention(Projections):
    """Self-attention along one axis of the tokens."""

    def forward(self, x: Tensor, view: str) -> Tensor:
        """`(B, F, N, D)` -> the same."""
        return self.to_out(attend(self.to_q(x), self.to_k(x), self.to_v(x), view, self.num_heads))


class TextAttention(Projections):
    """Cross-attention of tokens to the words of their caption; keys and values are shared by all frames."""

    def forward(self, x: Tensor, caption: Caption, num_frames: int) -> Tensor:
        """`(B, F+I, N, D)` -> the same."""
        q, k, v = self.to_q(x), self.to_k(caption.features), self.to_v(caption.features)
        clip = q[:, :num_frames], k[:, :1], v[:, :1]
        out = attend(*clip, "clip", self.num_heads, mask=caption.clip_mask)
        if x.shape[1] > num_frames:
            images = q[:, num_frames:], k[:, 1:], v[:, 1:]
            out = torch.cat([out, attend(*images, "spatial", self.num_heads, mask=caption.image_mask)], dim=1)
        return self.to_out(out)


class Projection(nn.Module):
    """First half of the feed-forward: a linear map and the activation, optionally gated."""

    def __init__(self, hidden_size: int, inner_size: int, activation: str) -> None:
        super().__init__()
        self.gated = activation == "geglu"
        self.approximate = "tanh" if activation == "gelu-approximate" else "none"
        self.proj = nn.Linear(hidden_size, inner_size * (2 if self.gated else 1))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D)` -> `(..., inner_size)`."""
        if not self.gated:
            return functional.gelu(self.proj(x), approximate=self.approximate)
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * functional.gelu(gate)


class FeedForward(nn.Module):
    """MLP of a block; parameter names as in diffusers."""

    def __init__(self, config: LatteT2VConfig) -> None:
        super().__init__()
        width, inner = config.width, 4 * config.width
        first = Projection(width, inner, config.activation_fn)
        self.net = nn.Sequential(first, nn.Dropout(config.dropout), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D)` -> the same."""
        return self.net(x)


class T2VBlock(nn.Module):
    """Spatial block: self-attention, cross-attention to the caption, MLP. Temporal block: self-attention, MLP."""

    def __init__(self, config: LatteT2VConfig, axis: Literal["spatial", "temporal"]) -> None:
        super().__init__()
        self.axis = axis
        norm = partial(nn.LayerNorm, config.width, config.norm_eps, config.norm_elementwise_affine)
        self.norm1 = norm()
        self.attn1 = SelfAttention(config)
        self.attn2 = TextAttention(config) if axis == "spatial" else None
        self.norm2 = norm()
        self.ff = FeedForward(config)
        self.scale_shift_table = nn.Parameter(torch.empty(6, config.width))

    def forward(self, x: Tensor, modulation: Tensor, num_frames: int, caption: Caption | None = None) -> Tensor:
        """`(B, F+I, N, D)` -> the same; `modulation (B, 1 or F+I, 6, D)`. Temporal blocks leave images unchanged."""
        if self.axis == "spatial" or x.shape[1] == num_frames:
            return self._transform(x, modulation, num_frames, caption)
        modulation = modulation[:, :num_frames]
        return on_clip(lambda clip: self._transform(clip, modulation, num_frames, caption), x, num_frames)

    def _transform(self, x: Tensor, modulation: Tensor, num_frames: int, caption: Caption | None) -> Tensor:
        parts = (self.scale_shift_table + modulation)[:, :, None].unbind(-2)  # six of (B, 1 or F+I, 1, D)
        attention, mlp = Modulation(*parts[:3]), Modulation(*parts[3:])
        h = modulate(self.norm1(x), attention.shift, attention.scale)
        x = x + attention.gate * self.attn1(h, self.axis)
        if self.attn2 is not None:
            x = x + self.attn2(x, caption, num_frames)  # without norm and modulation, as in PixArt-alpha
        return x + mlp.gate * self.ff(modulate(self.norm2(x), mlp.shift, mlp.scale))
