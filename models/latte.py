"""Latte: a diffusion transformer for video (arXiv 2401.03048), all four variants in one class.

Letters: B batch, F frames, I images of joint image-video training, C channels, H W latent height and width,
N tokens per frame, D width. Between patch embedding and final layer F counts tubelets if they are used.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.checks import require

from .blocks import LAYER_PLANS, Block, FinalLayer, on_clip, per_frame, require_blocks, run_block
from .config import LatteConfig
from .embeddings import (
    FrameUpsampler,
    LabelEmbedder,
    Rotation,
    TimestepEmbedder,
    TubeletPatchEmbed,
    UniformPatchEmbed,
    axis_positions,
    rotary_table,
    sincos_grid,
    sincos_table,
    unpatchify,
)


class Route(NamedTuple):
    """A range of blocks that computes only some of the tokens; the others skip it unchanged (TREAD, arXiv 2501.04765).

    The same positions are kept in all frames of a clip. Positional embeddings are added to all tokens; the tokens that
    `model.injection=tokens` appends are always kept.

    Attributes:
        start, stop: blocks from `start` to `stop` - 1.
        keep: positions in [0, N) as int64, each once: `(K,)` for all clips, or `(B, K)` for each clip.
    """

    start: int
    stop: int
    keep: Tensor

    def positions(self, x: Tensor, num_appended: int) -> Tensor:
        """Returns positions `(B, 1, K + num_appended, 1)` of the kept tokens of `x (B, F+I, N + num_appended, D)`."""
        keep = self.keep.expand(len(x), -1)
        appended = torch.arange(x.shape[2] - num_appended, x.shape[2], device=keep.device).expand(len(x), -1)
        return torch.cat([keep, appended], dim=1)[:, None, :, None]


class Latte(nn.Module):
    """Patch embedding, blocks of spatial and temporal attention, and a final layer back to patches.

    `num_frames` and `latent_size` are those of training; for other sizes `forward` computes new positions. The network
    draws no random numbers: the caller drops labels by replacing them with `null_label`.

    Args:
        config: the `model` section.
        in_channels: channels C of the latents.
        latent_size: height and width of the latents, in latent pixels; one number for a square.
        num_frames: frames F of a clip.
    """

    def __init__(
        self,
        config: LatteConfig,
        *,
        in_channels: int = 4,
        latent_size: int | tuple[int, int] = 32,
        num_frames: int = 16,
    ) -> None:
        super().__init__()
        self.config = config
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if config.learn_sigma else in_channels
        self.num_frames = num_frames
        self.latent_size = (latent_size, latent_size) if isinstance(latent_size, int) else tuple(latent_size)
        width, depth, num_heads, self.patch_size = config.size
        self._check_clip(num_frames, *self.latent_size)

        adaln, span = config.injection == "adaln", config.frames_per_token
        layers = LAYER_PLANS[config.variant](depth)
        # before it, frames get their temporal positions
        self.first_temporal_layer = next((i for i, layer in enumerate(layers) if {*chain(*layer)} - {"spatial"}), None)
        sizes = in_channels, width, self.patch_size
        self.x_embedder = UniformPatchEmbed(*sizes) if span == 1 else TubeletPatchEmbed(*sizes, span)
        self.t_embedder = TimestepEmbedder(width)
        if config.num_classes:
            self.y_embedder = LabelEmbedder(config.num_classes, width, null_row=config.has_null_label)
        self.blocks = nn.ModuleList(Block(layer, width, num_heads, config.mlp_ratio, adaln=adaln) for layer in layers)
        self.final_layer = FinalLayer(width, self.patch_size**2 * self.out_channels, adaln=adaln)
        if span > 1:
            self.frame_upsampler = FrameUpsampler(self.out_channels, span)
        self.pos_embed: Tensor
        self.temp_embed: Tensor | None
        self.register_buffer("pos_embed", self._space_table(self.grid).float())
        absolute = config.temporal_position == "absolute" and self.first_temporal_layer is not None
        self.register_buffer("temp_embed", self._time_table(self.temporal_length).float() if absolute else None)
        self.initialize_weights()

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens per frame at the trained size."""
        height, width = self.latent_size
        return height // self.patch_size, width // self.patch_size

    @property
    def temporal_length(self) -> int:
        """Tokens of a trained clip along time: its frames, or its tubelets."""
        return self.num_frames // self.config.frames_per_token

    @property
    def null_label(self) -> int | None:
        """Label that means "no label", or None if the table has no such row."""
        return self.config.num_classes if self.config.has_null_label else None

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        labels: Tensor | None = None,
        *,
        num_images: int = 0,
        return_hidden_states: Collection[int] = (),
        route: Route | None = None,
    ) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """Predicts the noise (or the diffusion's other target) and, with `learn_sigma`, its variance.

        Args:
            x: noisy latents `(B, F+I, C, H, W)`: a clip, then `num_images` independent images.
            timesteps: `(B,)`, integer or fractional; or `(B, F+I)`, one for each frame (a tubelet takes that of its
                first frame).
            labels: `(B,)` or `(B, 1+I)` in [0, num_classes], the clip's label first; None if unconditional.
                The range is not checked, because that would wait for the device.
            num_images: I, the number of frames at the end that are images.
            return_hidden_states: indices of blocks whose output tokens are returned as well.
            route: restricts a range of blocks to some tokens; None: no restriction.

        Returns:
            `(B, F+I, C, H, W)`, or 2C channels with `learn_sigma`. With `return_hidden_states` a pair of that and
            the tokens `(B, F+I, N, D)` by block, in which F counts tubelets; inside `route` only its K kept tokens.
        """
        self._check_input(x, timesteps, labels, num_images)
        require_blocks(return_hidden_states, len(self.blocks))
        grid = x.shape[3] // self.patch_size, x.shape[4] // self.patch_size  # rows and columns of tokens
        x = self.x_embedder(x, num_images) + self._space_positions(grid)  # (B, F+I, N, D)
        num_frames = x.shape[1] - num_images  # F; from here on it counts tubelets where there are any
        x, condition = self._inject(x, timesteps, labels, num_frames)  # with `tokens`, N+1 or N+2 tokens per frame
        x, hidden_states = self.run_blocks(x, condition, num_frames, grid[0] * grid[1], return_hidden_states, route)
        x = x[:, :, : grid[0] * grid[1]]  # without the tokens of timestep and label
        x = self.final_layer(x, condition, num_frames)  # (B, F+I, N, p*p*C)
        x = unpatchify(x, grid, self.patch_size)  # (B, F+I, C, H, W)
        if self.config.frames_per_token > 1:
            x = self.frame_upsampler(x, num_images)
        return (x, hidden_states) if return_hidden_states else x

    def run_blocks(
        self,
        x: Tensor,
        condition: Tensor | None,
        num_frames: int,
        num_tokens: int,
        return_hidden_states: Collection[int],
        route: Route | None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Applies all blocks; override this to change how blocks are connected.

        Args:
            x: tokens `(B, F+I, N + appended, D)`, those of timestep and label last with `model.injection=tokens`.
            condition: see `Block.forward`.
            num_tokens: N.

        Returns: the tokens after the last block, and the hidden states by block.
        """
        depth = len(self.blocks)
        inside = route is None or 0 <= route.start < route.stop <= depth
        require(inside, f"route must have 0 <= start < stop <= {depth}, got {route and route[:2]}")
        rotation = self._rotation(num_frames, x)
        num_appended = x.shape[2] - num_tokens
        hidden_states: dict[int, Tensor] = {}
        skipped: Tensor | None = None  # inside the route: all tokens as they entered it
        for index, block in enumerate(self.blocks):
            if index == self.first_temporal_layer:
                x = self._add_time_positions(x, num_frames)
                skipped = None if skipped is None else self._add_time_positions(skipped, num_frames)
            if route is not None and index == route.start:
                kept = route.positions(x, num_appended)
                skipped, x = x, x.take_along_dim(kept, dim=2)
            x = run_block(block, x, condition, num_frames, rotation, recompute=self.config.gradient_checkpointing)
            if index in return_hidden_states:
                hidden_states[index] = x[:, :, : x.shape[2] - num_appended]
            if route is not None and skipped is not None and index == route.stop - 1:
                x, skipped = skipped.scatter(2, kept.expand_as(x), x), None
        return x, hidden_states

    def initialize_weights(self) -> None:
        """Initialises as DiT does: layers start as the identity (`adaln`), and the network's output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, FrameUpsampler):
                module.reset_parameters()
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # a linear map of the patch
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]
        for linear in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(linear.get_parameter("weight"), std=0.02)
        if self.config.num_classes:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=self.config.label_init_std)
        layers = [*self.blocks, self.final_layer]
        heads = [layer.adaLN_modulation[1] for layer in layers if layer.adaLN_modulation is not None]
        for linear in [self.final_layer.linear, *heads]:
            nn.init.zeros_(linear.get_parameter("weight"))
            nn.init.zeros_(linear.get_parameter("bias"))

    def _inject(
        self, x: Tensor, timesteps: Tensor, labels: Tensor | None, num_frames: int
    ) -> tuple[Tensor, Tensor | None]:
        """Embeds timestep and label: as condition `(B, 1 or 1+I or F+I, 1, D)`, or as tokens appended to each frame."""
        parts = [self._embed_timesteps(timesteps, num_frames)]  # (B, 1 or F+I, 1, D)
        if labels is not None:
            label_rows = self.y_embedder(labels.reshape(len(labels), -1))[:, :, None]  # (B, 1 or 1+I, 1, D)
            parts.append(label_rows if timesteps.ndim == 1 else per_frame(label_rows, num_frames, x.shape[1]))
        if self.config.injection == "adaln":
            return x, sum(parts[1:], start=parts[0])
        tokens = [per_frame(part, num_frames, x.shape[1]).expand(-1, x.shape[1], -1, -1) for part in parts]
        return torch.cat([x, *tokens], dim=2), None

    def _embed_timesteps(self, timesteps: Tensor, num_frames: int) -> Tensor:
        """`(B,)` -> `(B, 1, 1, D)`; one per frame `(B, F+I)` -> `(B, F+I, 1, D)`, where F then counts tubelets."""
        if timesteps.ndim == 1:
            return self.t_embedder(timesteps)[:, None, None]
        span = self.config.frames_per_token
        clip, images = timesteps[:, : num_frames * span : span], timesteps[:, num_frames * span :]
        return self.t_embedder(torch.cat([clip, images], dim=1))[:, :, None]

    def _space_positions(self, grid: tuple[int, int]) -> Tensor:
        """Returns spatial positions `(1, N, D)` for any grid; those of the trained grid are stored."""
        if grid == self.grid:
            return self.pos_embed
        return self._space_table(grid, self.pos_embed.device).to(self.pos_embed.dtype)

    def _add_time_positions(self, x: Tensor, num_frames: int) -> Tensor:
        """Adds temporal positions to the frames of the clip; images have none."""
        if self.temp_embed is None:
            return x
        table = self.temp_embed
        if num_frames != self.temporal_length:
            table = self._time_table(num_frames, table.device).to(table.dtype)
        return on_clip(lambda clip: clip + table[:, :, None], x, num_frames)  # (1, F, 1, D)

    def _rotation(self, num_frames: int, x: Tensor) -> Rotation | None:
        if self.config.temporal_position != "rope":
            return None
        positions = self._positions(num_frames, self.temporal_length, x.device)
        return rotary_table(positions, self.config.head_width, torch.promote_types(x.dtype, torch.float32))

    def _space_table(self, grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
        rows, columns = (self._positions(*counts, device) for counts in zip(grid, self.grid))
        return sincos_grid(rows, columns, self.config.size.hidden_size)[None]  # (1, N, D)

    def _time_table(self, count: int, device: torch.device | None = None) -> Tensor:
        positions = self._positions(count, self.temporal_length, device)
        return sincos_table(positions, self.config.size.hidden_size)[None]  # (1, F, D)

    def _positions(self, count: int, trained: int, device: torch.device | None) -> Tensor:
        return axis_positions(count, trained, stretch=self.config.position_interpolation, device=device)

    def _check_clip(self, num_frames: int, height: int, width: int) -> None:
        span, patch = self.config.frames_per_token, self.patch_size
        require(num_frames >= 1, f"a clip must have at least one frame, got {num_frames}")
        uneven = f"{num_frames} frames are not divisible by model.tubelet_size={span}; change one of the two"
        require(num_frames % span == 0, uneven)
        require(
            min(height, width) >= patch and height % patch == width % patch == 0,
            f"latents of {height} x {width} are not divisible into patches of {patch} x {patch}; "
            "change data.image_size or the patch size in model.name",
        )

    def _check_input(self, x: Tensor, timesteps: Tensor, labels: Tensor | None, num_images: int) -> None:
        shape, channels = tuple(x.shape), self.in_channels
        fits = x.ndim == 5 and shape[2] == channels
        require(fits, f"latents must be of shape (B, F+I, {channels}, H, W), got {shape}")
        batch = len(x)
        require(
            timesteps.shape in (shape[:1], shape[:2]),
            f"timesteps must be of shape ({batch},), one per clip, or {shape[:2]}, one per frame, got "
            f"{tuple(timesteps.shape)}",
        )
        require(num_images >= 0, f"num_images must be at least 0, got {num_images}")
        self._check_clip(shape[1] - num_images, *shape[3:])
        classes, shapes = self.config.num_classes, [(batch,)] * (num_images == 0) + [(batch, 1 + num_images)]
        if labels is None:
            needed = f"a network with model.num_classes={classes} needs labels; the null label is {self.null_label}"
            require(classes == 0, needed)
            return
        require(classes > 0, "an unconditional network (model.num_classes=0) takes no labels: pass None")
        require(
            tuple(labels.shape) in shapes,
            f"labels must be of shape {' or '.join(map(str, shapes))} for {batch} clips with {num_images} images "
            f"each, got {tuple(labels.shape)}",
        )
