"""The `model` section of a configuration and the table of official sizes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from difflib import get_close_matches
from itertools import chain
from typing import NamedTuple

from common.checks import NOT_NEGATIVE, at_least, check_limits, from_to, one_of, require, within

from .blocks import LAYER_PLANS


class ModelSize(NamedTuple):
    """The four numbers that `model.name` fixes."""

    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int


# fmt: off
PRESETS = {  # paper table 1; depth with one attention per layer (interleaved, late_fusion), or two (the others)
    #      width heads  one  two
    "S":  ( 384,    6,  12,  10),
    "B":  ( 768,   12,  12,  10),
    "L":  (1024,   16,  24,  20),
    "XL": (1152,   16,  28,  23),
}
# fmt: on
NAMES = [f"Latte-{size}/{patch}" for size in PRESETS for patch in (2, 4, 8)]
TEXT_SIZES = {"Latte-1": ModelSize(1152, 56, 16, 2)}  # of text-conditioned networks
TEXT_NAMES = (*TEXT_SIZES, "custom-t2v", "custom-t2i")
CUSTOM = ("custom", "custom-t2v", "custom-t2i")
SIZE_KEYS = ModelSize._fields
# Keys that text-conditioned networks read; all others belong to class-conditional ones.
TEXT_KEYS = ("name", *SIZE_KEYS, "learn_sigma", "gradient_checkpointing")
# Upper limits far above any network, since beyond them even counting the parameters would take too long.
SIZE_LIMITS = {"hidden_size": from_to(1, 2**16), "depth": from_to(1, 256), "num_heads patch_size": at_least(1)}
LIMITS = {
    "variant": one_of(LAYER_PLANS),
    "patch_embedding": one_of(("uniform", "tubelet")),
    "injection": one_of(("adaln", "tokens")),
    "temporal_position": one_of(("absolute", "rope")),
    "mlp_ratio": within(0, 64, "(]"),
    "num_classes": from_to(0, 2**24),
    "label_dropout": within(0, 1, "[)"),
    "label_init_std": NOT_NEGATIVE,
}


@dataclass(frozen=True)
class LatteConfig:
    """The `model` section of a configuration. Raises: ValueError for an invalid value; the message names its key."""

    # Latte-{S,B,L,XL}/{2,4,8}, LatteIMG-* for the same network, or custom; conditioned on text: Latte-1, custom-t2v,
    # and custom-t2i, which has no temporal layers
    name: str = "Latte-XL/2"
    hidden_size: int | None = None  # this and the next three: only with `name: custom...`
    depth: int | None = None
    num_heads: int | None = None
    patch_size: int | None = None
    mlp_ratio: float = 4.0
    # paper variants 1 to 4: interleaved | late_fusion | sequential | parallel; or image, a DiT for single frames
    variant: str = "interleaved"
    patch_embedding: str = "uniform"  # uniform | tubelet
    tubelet_size: int = 2  # frames in a tubelet
    injection: str = "adaln"  # how timestep and label enter: adaln | tokens
    temporal_position: str = "absolute"  # absolute | rope
    position_interpolation: bool = False  # True: at other sizes, rescale positions to the trained range
    num_classes: int = 0  # 0: unconditional
    label_dropout: float = 0.1  # 0: no null label, so no classifier-free guidance
    label_init_std: float = 0.02
    learn_sigma: bool = True  # the output has twice the channels: noise and variance
    gradient_checkpointing: bool = False  # recompute each block in the backward pass

    def __post_init__(self) -> None:
        check_limits(self, "model.", LIMITS)
        self._check_name()
        check_limits(self.size, "model.", SIZE_LIMITS)
        self._check_size()
        for item in fields(self) if self.is_text else ():
            value, default = getattr(self, item.name), item.default
            unused = f"model.{item.name}={value} has no meaning with model.name={self.name}: leave it at {default}"
            require(item.name in TEXT_KEYS or value == default, unused)
        size, tubelet = self.tubelet_size, self.patch_embedding == "tubelet"
        single = (
            f"model.tubelet_size must be at least 2, got {size}; use model.patch_embedding uniform for single frames"
        )
        require(size >= 2 or not tubelet, single)
        require(size == 2 or tubelet, f"model.tubelet_size={size} is read only with model.patch_embedding=tubelet")

    @property
    def size(self) -> ModelSize:
        """Width, depth, heads and patch size: those of the name, or as set for a custom network."""
        if self.name in CUSTOM:
            return ModelSize(*(getattr(self, key) for key in SIZE_KEYS))
        if self.name in TEXT_SIZES:
            return TEXT_SIZES[self.name]
        letters, patch_size = _plain_name(self.name).removeprefix("Latte-").split("/")
        width, heads, depth, joint_depth = PRESETS[letters]
        return ModelSize(width, joint_depth if self.has_joint_layers else depth, heads, int(patch_size))

    @property
    def is_text(self) -> bool:
        """Whether the network is conditioned on captions, which the `text` section configures."""
        return self.name in TEXT_NAMES

    @property
    def frames_per_token(self) -> int:
        """Number of frames that one token spans: 1, or the tubelet size."""
        return self.tubelet_size if self.patch_embedding == "tubelet" else 1

    @property
    def has_null_label(self) -> bool:
        """Whether the label table ends with a row for "no label"."""
        return self.num_classes > 0 and self.label_dropout > 0

    @property
    def has_joint_layers(self) -> bool:
        """Whether every layer has several attentions, so that fewer layers give the same size."""
        return len([*chain(*LAYER_PLANS[self.variant](2)[0])]) > 1

    @property
    def _attentions_per_branch(self) -> int:
        """Number of attentions that share the heads of a layer, and its input."""
        return max(len(branch) for layer in LAYER_PLANS[self.variant](2) for branch in layer)

    @property
    def head_width(self) -> int:
        """Width of an attention head in temporal layers."""
        width, _, heads, _ = self.size
        return width // heads * self._attentions_per_branch

    def _check_name(self) -> None:
        given = [key for key in SIZE_KEYS if getattr(self, key) is not None]
        if self.name in CUSTOM:
            missing = [f"model.{key}" for key in SIZE_KEYS if key not in given]
            require(not missing, f"model.name {self.name} needs {', '.join(missing)}: set them")
            return
        known = [*NAMES, *TEXT_SIZES, *CUSTOM]
        close = get_close_matches(str(self.name), known, n=1)
        hint = f"; did you mean {close[0]}?" if close else f": one of {', '.join(known)}"
        require(_plain_name(self.name) in known, f"model.name {self.name!r} is unknown{hint}")
        fixed = ", ".join(f"model.{key}" for key in given)
        require(not given, f"model.name {self.name} fixes {fixed}: leave them null, or set model.name to custom")

    def _check_size(self) -> None:
        width, depth, heads, _ = self.size
        for holds, sentence in (
            (width % 4 == 0, f"model.hidden_size must be divisible by 4 (sin-cos positions), got {width}"),
            (width % heads == 0, f"model.hidden_size ({width}) is not divisible by model.num_heads ({heads})"),
            (
                len(LAYER_PLANS[self.variant](depth)) == depth or self.name == "custom-t2i",
                f"model.depth must be even with model.variant {self.variant}, which has as many spatial as temporal "
                f"layers, got {depth}",
            ),
            (
                heads % self._attentions_per_branch == 0,
                f"model.num_heads must be even with model.variant {self.variant}, which gives half to each attention, "
                f"got {heads}",
            ),
            (
                self.temporal_position != "rope" or self.head_width % 2 == 0,
                "model.temporal_position rope rotates pairs of values, so the width of a head must be even, got "
                f"{self.head_width} (model.hidden_size {width}, model.num_heads {heads})",
            ),
        ):
            require(holds, sentence)


def _plain_name(name: str) -> str:
    """Returns `name` with `LatteIMG-`, the official name for joint training of the same network, as `Latte-`."""
    return name.replace("LatteIMG-", "Latte-", 1)
