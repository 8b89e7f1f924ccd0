"""Configuration of the text-conditioned network: the keys of diffusers' `config.json`, each used or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any

from common.checks import Limit, at_least, check_limits, one_of, optional, require, within

CLASS_NAME = "LatteTransformer3DModel"  # diffusers' name of this network
WHOLE = Limit("an integer of at least 1", lambda value: type(value) is int and value >= 1)
LIMITS = {
    "num_attention_heads attention_head_dim in_channels num_layers sample_size patch_size": WHOLE,
    "caption_channels video_length": WHOLE,
    "out_channels": optional(at_least(1)),
    "norm_type": one_of(("ada_norm_single",)),
    "activation_fn": one_of(("gelu", "gelu-approximate", "geglu")),
    "dropout": within(0, 1, "[)"),
}

# Keys in files of related classes (the official LatteT2V, PixArt) -> values with which they have no effect.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_type": ("default", None),
    "double_self_attention": (False, None),
    "only_cross_attention": (False, None),
    "upcast_attention": (False, None),
    "use_linear_projection": (False, None),
    "num_vector_embeds": (None, False),
    "use_additional_conditions": (False, None),
}
UNREAD = ("norm_num_groups",)  # written by those classes, but used only for other kinds of input


@dataclass(frozen=True)
class LatteT2VConfig:
    """Keys and defaults of diffusers' class; sizes that default to None must be given.

    `sample_size` is the height and width of the latents in training, `video_length` their number of frames; the
    network takes others too. `num_embeds_ada_norm` is stored for diffusers and not used.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 88
    in_channels: int | None = None
    out_channels: int | None = None  # None: the same as in_channels; twice as many: noise and variance
    num_layers: int = 1  # of each kind: spatial, temporal
    dropout: float = 0.0
    cross_attention_dim: int | None = None  # must be the network's width, to which captions are projected
    attention_bias: bool = False
    sample_size: int = 64
    patch_size: int | None = None
    activation_fn: str = "geglu"
    num_embeds_ada_norm: int | None = None
    norm_type: str = "layer_norm"  # must be ada_norm_single
    norm_elementwise_affine: bool = True
    norm_eps: float = 1e-5
    caption_channels: int | None = None  # width of the text encoder's features
    video_length: int = 16

    def __post_init__(self) -> None:
        check_limits(self, "", LIMITS)
        width, size, given = self.width, self.sample_size, self.cross_attention_dim
        product = f"{width}, the network's width (num_attention_heads x attention_head_dim)"
        require(given == width, f"cross_attention_dim must be {product}, got {given!r}")
        require(width % 4 == 0, f"the width must be divisible by 4 (sin-cos positions), got {width}")
        require(size % self.patch == 0, f"sample_size ({size}) is not divisible by patch_size ({self.patch})")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> LatteT2VConfig:
        """Builds the config from the content of a `config.json` of diffusers or the official code.

        Raises: ValueError for a key that is unknown or whose value the network does not support.
        """
        known = [field.name for field in fields(cls)]
        given = {key: value for key, value in config.items() if not key.startswith("_") and key not in UNREAD}
        allowed = {**NEUTRAL, "interpolation_scale": (None, max(int(given.get("sample_size", 64)) // 64, 1))}
        for key in sorted(set(given) - set(known)):
            close = get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            require(key in allowed, f"{key} is not a key of this network's config{hint}")
            value, neutral = given.pop(key), allowed[key]
            require(value in neutral, f"{key} must be one of {', '.join(map(repr, neutral))}, got {value!r}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of a `config.json` that diffusers loads."""
        return {"_class_name": CLASS_NAME, **asdict(self)}

    @property
    def width(self) -> int:
        """D, the width of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def channels(self) -> tuple[int, int]:
        """Numbers of input and output channels."""
        assert self.in_channels is not None  # checked above
        return self.in_channels, self.out_channels or self.in_channels

    @property
    def patch(self) -> int:
        """p, the height and width of a patch in latent pixels."""
        assert self.patch_size is not None  # checked above
        return self.patch_size


LATTE_1 = LatteT2VConfig(
    attention_head_dim=72,
    in_channels=4,
    out_channels=8,
    num_layers=28,
    cross_attention_dim=1152,
    attention_bias=True,
    patch_size=2,
    activation_fn="gelu-approximate",
    num_embeds_ada_norm=1000,
    norm_type="ada_norm_single",
    norm_elementwise_affine=False,
    norm_eps=1e-6,
    caption_channels=4096,
)
