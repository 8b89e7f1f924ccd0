"""LatteT2V: the text-conditioned network of Latte (arXiv 2401.03048), with the weights and names of diffusers.

It is PixArt-alpha's image network (arXiv 2310.00426) with a temporal block after each of its blocks. All blocks share
one modulation (adaLN-single); the spatial ones attend to the features of a caption.

Letters: B batch, F frames, I images of joint image-video training, C channels, H W latent height and width,
N tokens per frame, D width, L words of a caption.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from common.checks import require

from .blocks import modulate, on_clip, require_blocks, run_block
from .blocks_t2v import AdaLayerNormSingle, Caption, T2VBlock, TwoLayers
from .config_t2v import LatteT2VConfig
from .embeddings import UniformPatchEmbed, axis_positions, sincos_grid, sincos_table, unpatchify

TextMask = Literal["official", "diffusers"]
TEXT_MASKS: tuple[TextMask, ...] = ("official", "diffusers")
CONDITIONERS = ("adaln_single.", "caption_projection.")
DISCARD = -10_000.0  # added to the scores of masked words; finite, so that fully masked rows do not become NaN


class T2VOutput(NamedTuple):
    """Output of `LatteT2V`."""

    sample: Tensor  # (B, C, F+I, H, W)
    hidden_states: dict[int, Tensor] | None = None  # by block, (B, F+I, N, D)


class LatteT2V(nn.Module):
    """Text-conditioned network, a drop-in replacement for diffusers' `LatteTransformer3DModel`.

    Positions are computed, so `forward` takes frame counts and sizes that differ from those of training.

    Args:
        config: the content of diffusers' `config.json`.
        text_mask: meaning of `encoder_attention_mask`. `official`: 1 for words and 0 for padding, one row per
            caption, as in training and in diffusers' documentation. `diffusers`: as its class (0.42) computes it, one
            row per frame; bool masks select words, numbers are added to the scores, so 1 and 0 mask nothing.
        gradient_checkpointing: recompute each block in the backward pass.
        temporal_position_scale: factor of the temporal positions, 1 in Latte. At 0, and with temporal blocks still the
            identity, the output is the image network's.
        temporal: False omits the temporal blocks, which gives PixArt-alpha's network: every frame is an image.
    """

    def __init__(
        self,
        config: LatteT2VConfig,
        *,
        text_mask: TextMask = "official",
        gradient_checkpointing: bool = False,
        temporal_position_scale: float = 1.0,
        temporal: bool = True,
    ) -> None:
        super().__init__()
        require(text_mask in TEXT_MASKS, f"text_mask must be one of {', '.join(TEXT_MASKS)}, got {text_mask!r}")
        self.config = config
        self.text_mask = text_mask
        self.gradient_checkpointing = gradient_checkpointing
        self.temporal_position_scale = temporal_position_scale
        width, patch, layers = config.width, config.patch, config.num_layers
        channels, out_channels = config.channels
        self.pos_embed = UniformPatchEmbed(channels, width, patch)
        self.adaln_single = AdaLayerNormSingle(width)
        self.caption_projection = TwoLayers(config.caption_channels or 0, width, nn.GELU(approximate="tanh"))
        self.transformer_blocks = nn.ModuleList(T2VBlock(config, "spatial") for _ in range(layers))
        self.temporal_transformer_blocks = nn.ModuleList(T2VBlock(config, "temporal") for _ in range(layers * temporal))
        self.norm_out = nn.LayerNorm(width, 1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.empty(2, width))
        self.proj_out = nn.Linear(width, patch * patch * out_channels)
        # on the CPU even inside torch.device("meta"), because no checkpoint fills these buffers
        self.space_table: Tensor
        self.time_table: Tensor
        self.register_buffer("space_table", self._space_table(self.grid, "cpu"), persistent=False)
        self.register_buffer("time_table", self._time_table(config.video_length, "cpu"), persistent=False)
        self.initialize_weights()

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | LatteT2VConfig, **changes: Any) -> LatteT2V:
        """Builds the network from the content of a `config.json`, with random weights. Raises: ValueError naming a key.

        Args:
            config: diffusers' keys, or those of the official LatteT2V or of PixArt if they have the same meaning.
            changes: values that override keys of `config`, or options of this class.
        """
        options = {key: changes.pop(key) for key in list(changes) if key not in LatteT2VConfig.__dataclass_fields__}
        given = config if isinstance(config, LatteT2VConfig) else LatteT2VConfig.from_dict({**config, **changes})
        return cls(replace(given, **changes), **options)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens per frame at the trained size."""
        side = self.config.sample_size // self.config.patch
        return side, side

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in the order in which they run: spatial, temporal, spatial, ..."""
        columns = [each for each in (self.transformer_blocks, self.temporal_transformer_blocks) if len(each)]
        return [block for layer in zip(*columns) for block in layer]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first floating-point parameter (quantised weights are integers)."""
        return next(each.dtype for each in self.parameters() if each.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        enable_temporal_attentions: bool = True,
        return_dict: bool = True,
        *,
        num_images: int = 0,
        return_hidden_states: Collection[int] = (),
    ) -> T2VOutput | tuple[Tensor] | tuple[Tensor, dict[int, Tensor]]:
        """Predicts the noise and, if the network has twice the channels, its variance.

        Args:
            hidden_states: noisy latents `(B, C, F+I, H, W)`: a clip, then `num_images` independent images.
            timestep: `(B,)`, integer or fractional; or `(B, F+I)`, one for each frame.
            encoder_hidden_states: features of the captions `(B, L, C)`; with images `(B, 1+I, L, C)`, the clip's first.
            encoder_attention_mask: `(B, L)`, with images `(B, 1+I, L)`; see `text_mask` for its meaning.
            enable_temporal_attentions: False skips the temporal blocks: every frame is an independent image.
            return_dict: False returns a plain tuple.
            num_images: I, the number of frames at the end that temporal blocks pass through unchanged.
            return_hidden_states: indices into the blocks as they run (`blocks`, or with
                `enable_temporal_attentions=False` the spatial ones) whose output tokens are returned as well.

        Returns:
            `sample (B, out_channels, F+I, H, W)` and, with `return_hidden_states`, tokens `(B, F+I, N, D)` by block.
        """
        if timestep is None or encoder_hidden_states is None:  # optional in diffusers' signature
            raise ValueError("timestep and encoder_hidden_states (the features of the captions) must be given")
        self._check_input(hidden_states, timestep, encoder_hidden_states, num_images)
        patch, num_frames = self.config.patch, hidden_states.shape[2] - num_images
        grid = hidden_states.shape[3] // patch, hidden_states.shape[4] // patch
        x = self.pos_embed(hidden_states.transpose(1, 2), num_images) + self._space_positions(grid)  # (B, F+I, N, D)
        embedded, modulation = self.adaln_single(timestep, x.dtype)
        if timestep.ndim == 1:  # one row for all frames
            embedded, modulation = embedded[:, None], modulation[:, None]  # (B, 1, D), (B, 1, 6, D)
        caption = self._caption(encoder_hidden_states, encoder_attention_mask, x.shape, num_images)
        over_time = enable_temporal_attentions and len(self.temporal_transformer_blocks) > 0
        blocks = self.blocks if over_time else list(self.transformer_blocks)
        require_blocks(return_hidden_states, len(blocks))
        recompute = {"recompute": self.gradient_checkpointing, "keep_random_state": self.config.dropout > 0}
        by_block: dict[int, Tensor] = {}
        for index, block in enumerate(blocks):
            if index == 1 and over_time:
                x = self._add_time_positions(x, num_frames)
            x = run_block(block, x, modulation, num_frames, caption, **recompute)
            if index in return_hidden_states:
                by_block[index] = x
        shift, scale = (self.scale_shift_table + embedded[:, :, None])[:, :, None].unbind(-2)  # (B, 1 or F+I, 1, D)
        x = self.proj_out(modulate(self.norm_out(x), shift, scale))  # (B, F+I, N, p*p*C)
        sample = unpatchify(x, grid, patch).transpose(1, 2)  # (B, C, F+I, H, W)
        outputs = (sample, by_block) if return_hidden_states else (sample,)
        return T2VOutput(*outputs) if return_dict else outputs

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialises as PixArt-alpha does: cross-attention and the network's output are zero."""
        for name, module in self.named_modules():
            if name.startswith(CONDITIONERS) and isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # of a convolution: a linear map of the patch
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("scale_shift_table"):
                nn.init.normal_(parameter, std=self.config.width**-0.5)
        _zero(self, ("attn2.to_out.0", "proj_out"))

    @torch.no_grad()
    def start_as_image_network(self) -> None:
        """Makes temporal blocks the identity and removes temporal positions, so every frame is computed as an image.

        To train from here, raise `temporal_position_scale` from 0 to 1, its value in Latte.
        """
        _zero(self.temporal_transformer_blocks, ("attn1.to_out.0", "ff.net.2"))
        self.temporal_position_scale = 0.0

    def _caption(self, features: Tensor, mask: Tensor | None, tokens: torch.Size, num_images: int) -> Caption:
        """Projects captions and prepares their masks for tokens of the shape `tokens (B, F+I, N, D)`."""
        features = self.caption_projection(features if features.ndim == 4 else features[:, None])  # (B, 1+I, L, D)
        if mask is None:
            return Caption(features)
        batch, captions, length, _ = features.shape
        if self.text_mask == "diffusers":
            return Caption(features, _score_mask_per_frame(mask, tokens, length, num_images))
        rows = (batch, length) if num_images == 0 and mask.ndim == 2 else (batch, captions, length)
        given = tuple(mask.shape)
        require(given == rows, f"encoder_attention_mask must be of shape {rows}, one row per caption, got {given}")
        scores = ((1 - mask.to(features.dtype)) * DISCARD).view(batch, captions, 1, length)
        return Caption(features, scores[:, :1], scores[:, 1:].reshape(-1, 1, 1, length) if num_images else None)

    def _space_positions(self, grid: tuple[int, int]) -> Tensor:
        """Returns spatial positions `(1, 1, N, D)` for any grid; those of the trained grid are stored."""
        if grid == self.grid:
            return self.space_table
        return self._space_table(grid, self.space_table.device).to(self.space_table.dtype)

    def _add_time_positions(self, x: Tensor, num_frames: int) -> Tensor:
        """Adds temporal positions to the frames of the clip; images and clips of one frame have none."""
        if num_frames == 1 or self.temporal_position_scale == 0:
            return x
        table = self.time_table
        if num_frames != self.config.video_length:
            table = self._time_table(num_frames, table.device).to(table.dtype)
        return on_clip(lambda clip: clip + table * self.temporal_position_scale, x, num_frames)

    def _space_table(self, grid: tuple[int, int], device: torch.device | str) -> Tensor:
        """Computes spatial positions `(1, 1, N, D)`; all grids span the range of the trained one."""
        scale = max(self.config.sample_size // 64, 1)
        rows, columns = (
            (torch.arange(count, dtype=torch.float32, device=device) / (count / trained) / scale).double()
            for count, trained in zip(grid, self.grid)
        )
        return sincos_grid(rows, columns, self.config.width)[None, None].float()

    def _time_table(self, count: int, device: torch.device | str) -> Tensor:
        """Computes temporal positions `(1, F, 1, D)`: 0, 1, 2, ..., also beyond the trained length."""
        positions = axis_positions(count, count, stretch=False, device=torch.device(device))
        return sincos_table(positions, self.config.width)[None, :, None].float()

    def _check_input(self, latents: Tensor, timesteps: Tensor, features: Tensor, num_images: int) -> None:
        channels, patch, width = self.config.channels[0], self.config.patch, self.config.caption_channels
        batch, shape = len(latents), tuple(latents.shape)
        fits = latents.ndim == 5 and shape[1] == channels
        require(fits, f"latents must be of shape (B, {channels}, F+I, H, W), got {shape}")
        frames, height, side = shape[2:]
        inside = f"num_images must be in [0, {frames}) for {frames} frames, got {num_images}"
        require(0 <= num_images < frames, inside)
        whole = min(height, side) >= patch and height % patch == side % patch == 0
        require(whole, f"latents of {height} x {side} are not divisible into patches of {patch} x {patch}")
        require(
            tuple(timesteps.shape) in ((batch,), (batch, frames)),
            f"timestep must be of shape ({batch},), one per clip, or ({batch}, {frames}), one per frame, got "
            f"{tuple(timesteps.shape)}",
        )
        captions = (features.shape[0], features.shape[1] if features.ndim == 4 else 1, features.shape[-1])
        require(
            features.ndim in (3, 4) and captions == (batch, 1 + num_images, width),
            f"encoder_hidden_states must be (B, {f'{1 + num_images}, ' if num_images else ''}L, {width}) with "
            f"B={batch}, got {tuple(features.shape)}",
        )


def _zero(network: nn.Module, names: tuple[str, ...]) -> None:
    """Zeroes the modules whose names end with one of `names`."""
    for name, module in network.named_modules():
        if name.endswith(names):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)


def _score_mask_per_frame(mask: Tensor, tokens: torch.Size, length: int, num_images: int) -> Tensor:
    """Reshapes diffusers' mask, one row per frame: `(B*F, L)` or `(B*F, 1, L)` -> `(B, 1, F*N, L)`."""
    batch, frames, count, _ = tokens
    rows = batch * frames
    require(
        num_images == 0 and tuple(mask.shape) in ((rows, length), (rows, 1, length)),
        f"with text_mask=diffusers, encoder_attention_mask must be of shape ({rows}, 1, {length}), one row per "
        f"frame and no images, got {tuple(mask.shape)}",
    )
    return mask.view(batch, 1, frames, length).repeat_interleave(count, dim=2)
