"""The `model` section of a configuration and the table of official sizes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import NamedTuple

from common.checks import require

from .blocks import LAYER_PLANS


def official_name(name: str) -> str:
    """Returns `name` with `LatteIMG-`, the official name for joint training of the same network, as `Latte-`."""
    return name.replace("LatteIMG-", "Latte-", 1)


class Preset(NamedTuple):
    """One row of the size table (paper table 1)."""

    hidden_size: int
    num_heads: int
    depth: int  # of one attention per layer: `interleaved`, `late_fusion`
    joint_depth: int  # of two attentions per layer: `sequential`, `parallel`; nearest in parameters


# fmt: off
PRESETS = {  #         width  heads  depth  joint
    "S":  Preset(       384,     6,    12,    10),
    "B":  Preset(       768,    12,    12,    10),
    "L":  Preset(      1024,    16,    24,    20),
    "XL": Preset(      1152,    16,    28,    23),
}
# fmt: on
PATCH_SIZES = (2, 4, 8)
NAMES = [f"Latte-{size}/{patch}" for size in PRESETS for patch in PATCH_SIZES]
SIZE_KEYS = ("hidden_size", "depth", "num_heads", "patch_size")
TEXT_SIZES = {"Latte-1": (1152, 56, 16, 2)}  # width, layers, heads, patch size of text-conditioned networks
TEXT_NAMES = (*TEXT_SIZES, "custom-t2v", "custom-t2i")
CUSTOM = ("custom", *TEXT_NAMES[len(TEXT_SIZES) :])
# Keys that text-conditioned networks read; all others belong to class-conditional ones.
TEXT_KEYS = ("name", *SIZE_KEYS, "learn_sigma", "gradient_checkpointing")
# Limits far above any network; beyond them even counting the parameters would not finish.
MOST = {"hidden_size": 2**16, "depth": 256}
MAX_CLASSES = 2**24
CHOICES: dict[str, Iterable[str]] = {
    "variant": tuple(LAYER_PLANS),
    "patch_embedding": ("uniform", "tubelet"),
    "injection": ("adaln", "tokens"),
    "temporal_position": ("absolute", "rope"),
}


class ModelSize(NamedTuple):
    """The four numbers that `model.name` fixes."""

    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int


@dataclass(frozen=True)
class LatteConfig:
    """The `model` section of a configuration.

    Raises:
        ValueError: an invalid value; the message names its key.
    """

    # Latte-{S,B,L,XL}/{2,4,8}, LatteIMG-* for the same network, or custom; conditioned on text: Latte-1, custom-t2v,
    # and custom-t2i, which has no temporal layers
    name: str = "Latte-XL/2"
    hidden_size: int | None = None  # this and the next three: only with `name: custom...`
    depth: int | None = None
    num_heads: int | None = None
    patch_size: int | None = None
    mlp_ratio: float = 4.0
    variant: str = "interleaved"  # paper variants 1 to 4: interleaved | late_fusion | sequential | parallel
    patch_embedding: str = "uniform"  # uniform | tubelet
    tubelet_size: int = 2  # frames in a tubelet
    injection: str = "adaln"  # how timestep and label enter: adaln | tokens
    temporal_position: str = "absolute"  # absolute | rope
    position_interpolation: bool = (
        False  # at other sizes: False continues positions, True rescales to the trained range
    )
    num_classes: int = 0  # 0: unconditional
    label_dropout: float = 0.1  # 0: no null label, so no classifier-free guidance
    label_init_std: float = 0.02
    learn_sigma: bool = True  # output has twice the channels: noise and variance
    gradient_checkpointing: bool = False  # recompute each block in the backward pass

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_name()
        self._check_size()
        self._check_text()
        require(0 < self.mlp_ratio <= 64, f"model.mlp_ratio must be above 0 and at most 64, got {self.mlp_ratio}")
        require(
            self.patch_embedding != "tubelet" or self.tubelet_size >= 2,
            f"model.tubelet_size must be at least 2, got {self.tubelet_size}; "
            "use model.patch_embedding uniform for single frames",
        )
        require(
            0 <= self.num_classes <= MAX_CLASSES,
            f"model.num_classes must be 0 or more and at most {MAX_CLASSES:,}, got {self.num_classes}",
        )
        require(0 <= self.label_dropout < 1, f"model.label_dropout must be in [0, 1), got {self.label_dropout}")
        require(
            0 <= self.label_init_std < float("inf"),
            f"model.label_init_std must be 0 or more and finite, got {self.label_init_std}",
        )
        require(
            self.patch_embedding == "tubelet" or self.tubelet_size == 2,
            f"model.tubelet_size={self.tubelet_size} is read only with model.patch_embedding=tubelet",
        )

    @property
    def size(self) -> ModelSize:
        """Width, depth, heads and patch size: from the name, or as given for a custom one."""
        if self.name in CUSTOM:
            return ModelSize(*(getattr(self, key) for key in SIZE_KEYS))
        if self.name in TEXT_SIZES:
            return ModelSize(*TEXT_SIZES[self.name])
        letters, patch_size = official_name(self.name).removeprefix("Latte-").split("/")
        preset = PRESETS[letters]
        depth = preset.joint_depth if self._has_joint_layers else preset.depth
        return ModelSize(preset.hidden_size, depth, preset.num_heads, int(patch_size))

    @property
    def is_text(self) -> bool:
        """Whether this is a text-conditioned network, whose captions the `text` section describes."""
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
    def _has_joint_layers(self) -> bool:
        return self.variant in ("sequential", "parallel")

    def _check_choices(self) -> None:
        for key, choices in CHOICES.items():
            value = getattr(self, key)
            require(value in choices, f"model.{key} must be one of {', '.join(choices)}, got {value!r}")

    def _check_name(self) -> None:
        given = [key for key in SIZE_KEYS if getattr(self, key) is not None]
        if self.name in CUSTOM:
            missing = [f"model.{key}" for key in SIZE_KEYS if key not in given]
            require(not missing, f"model.name {self.name} needs {', '.join(missing)}: set them")
            return
        known = [*NAMES, *TEXT_SIZES, *CUSTOM]
        close = get_close_matches(str(self.name), known, n=1)
        hint = f"; did you mean {close[0]}?" if close else f": one of {', '.join(known)}"
        require(official_name(self.name) in known, f"model.name {self.name!r} is unknown{hint}")
        require(
            not given,
            f"model.name {self.name} fixes {', '.join(f'model.{key}' for key in given)}: "
            "leave them null, or set model.name to custom",
        )

    def _check_size(self) -> None:
        width, depth, heads, _ = self.size
        for key, value in zip(SIZE_KEYS, self.size):
            require(value >= 1, f"model.{key} must be at least 1, got {value}")
        for key, most in MOST.items():
            value = getattr(self.size, key)
            require(value <= most, f"model.{key} must be at most {most:,}, got {value}: lower it")
        require(width % 4 == 0, f"model.hidden_size must be divisible by 4 (sin-cos positions), got {width}")
        require(
            width % heads == 0,
            f"model.hidden_size ({width}) is not divisible by model.num_heads ({heads})",
        )
        require(
            self._has_joint_layers or depth % 2 == 0 or self.name == "custom-t2i",
            f"model.depth must be even with model.variant {self.variant}, which has as many spatial "
            f"as temporal layers, got {depth}",
        )
        require(
            self.variant != "parallel" or heads % 2 == 0,
            f"model.num_heads must be even with model.variant parallel, which gives half to each attention, "
            f"got {heads}",
        )
        require(
            self.temporal_position != "rope" or self.head_width % 2 == 0,
            f"model.temporal_position rope rotates pairs of values, so the width of a head must be even, "
            f"got {self.head_width} (model.hidden_size {width}, model.num_heads {heads})",
        )

    def _check_text(self) -> None:
        """Refuses keys of class-conditional networks for a text-conditioned one."""
        inapplicable = [item for item in fields(self) if item.name not in TEXT_KEYS] if self.is_text else []
        for item in inapplicable:
            value = getattr(self, item.name)
            require(
                value == item.default,
                f"model.{item.name}={value} has no meaning with model.name={self.name}: leave it at {item.default}",
            )

    @property
    def head_width(self) -> int:
        """Width of an attention head in temporal layers."""
        width, _, heads, _ = self.size
        return width // heads * (2 if self.variant == "parallel" else 1)
