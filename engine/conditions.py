"""Conditions of a network: class labels, captions or none, behind one protocol.

A run's `Conditions` turn a batch's labels into a `Condition` on the device, for training, guidance and sampling. With
captions, a clip's label is the number of its caption. Each caption is encoded on its own and cut or padded to
`text.max_length`, so its features depend on it alone. A dropped caption, as in PixArt-alpha, gets the features of the
empty prompt, padding included, and keeps its mask.

Letters: B clips, F frames, I images, L words, D width of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from common.checks import require
from datasets import ClipDataset
from datasets.text_features import TextCache
from models.autoencoder import DTYPES
from models.config import LatteConfig
from models.identity import select_comparable, text_identity
from models.text_encoder import TextConfig, TextEncoder

from .config import Config
from .distributed import on_main

EMPTY = ""  # the null caption
REMEMBERED = 256  # number of captions whose features are cached
Features = Callable[[str], Tensor]  # caption -> (n, D) for its n words; for the empty one, all L rows


class Condition(Protocol):
    """The conditions of one batch: of its clips and images."""

    def drop(self, uniform: Tensor, rate: float) -> Condition:
        """Replaces conditions by the null where `uniform` (B, 1+I), in [0, 1), is below `rate`."""

    def null(self) -> Condition:
        """Returns the batch with all conditions null. Raises: ValueError if the network was trained without a null."""

    def join(self, other: Any) -> Condition:
        """Returns this batch followed by another one of its kind."""

    def call(self, network: nn.Module, x: Tensor, timesteps: Tensor, num_images: int = 0, **options: Any) -> Any:
        """Runs the network on `x` (B, F+I, C, H, W) with further `options` of its own.

        Returns the same shape, or 2C channels; with `return_hidden_states` a pair of that and tokens by block.
        """


class Conditions(Protocol):
    """The conditions of a run.

    Attributes:
        count: number of different conditions; 0 for an unconditional network.
        names: their names in order; None if unknown.
        dropout: probability that training replaces a condition by the null.
    """

    names: Any
    dropout: float

    @property
    def count(self) -> int: ...

    def batch(self, labels: Tensor) -> Condition:
        """Returns the conditions of CPU `labels` (B, 1+I), without waiting for the device."""


# ---- classes, and none ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassLabels:
    """Class labels `values` (B,) or (B, 1+I); None for an unconditional network.

    Attributes:
        null_label: stands for "no class"; None if the network was trained without.
    """

    values: Tensor | None
    null_label: int | None = None

    def drop(self, uniform: Tensor, rate: float) -> ClassLabels:
        if self.values is None or self.null_label is None or rate == 0:
            return self
        return replace(self, values=torch.where(uniform < rate, self.null_label, self.values))

    def null(self) -> ClassLabels:
        if self.values is None:
            raise ValueError("guidance needs a network with labels: use guidance_scale=1.")
        if self.null_label is None:
            raise ValueError(
                "guidance needs a network with a null label, but this one was trained with model.label_dropout=0: "
                "use guidance_scale=1."
            )
        return replace(self, values=torch.full_like(self.values, self.null_label))

    def join(self, other: ClassLabels) -> ClassLabels:
        if self.values is None or other.values is None:
            return self
        return replace(self, values=torch.cat([self.values, other.values]))

    def call(self, network: nn.Module, x: Tensor, timesteps: Tensor, num_images: int = 0, **options: Any) -> Any:
        images = {"num_images": num_images} if num_images else {}  # networks without joint training need not accept it
        return network(x, timesteps, self.values, **images, **options)


@dataclass
class ClassConditions:
    """The classes of a network; none if it is unconditional."""

    count: int
    null_label: int | None
    dropout: float
    device: torch.device
    names: Sequence[str] | None = None

    def batch(self, labels: Tensor) -> ClassLabels:
        values = labels.to(self.device, non_blocking=True) if self.count else None
        return ClassLabels(values, self.null_label)


def class_conditions(model: LatteConfig, device: torch.device, names: Sequence[str] | None = None) -> ClassConditions:
    """Returns the conditions of a class-conditional or unconditional network."""
    null_label = model.num_classes if model.has_null_label else None
    return ClassConditions(
        model.num_classes, null_label, model.label_dropout, device, names if model.num_classes else None
    )


# ---- captions --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextFeatures:
    """Features of captions for a text network.

    Attributes:
        features: (B, 1+I, L, D) of the captions.
        mask: (B, 1+I, L), 1 for words and 0 for padding; None: all are words.
        null_features: the empty caption's, broadcastable to `features`; None if the network was trained without.
    """

    features: Tensor
    mask: Tensor | None
    null_features: Tensor | None

    def drop(self, uniform: Tensor, rate: float) -> TextFeatures:
        if self.null_features is None or rate == 0:
            return self
        dropped = (uniform < rate)[..., None, None]  # (B, 1+I, 1, 1)
        return replace(self, features=torch.where(dropped, self.null_features, self.features))

    def null(self) -> TextFeatures:
        if self.null_features is None:
            raise ValueError(
                "guidance needs a network that knows the empty caption, but this one was trained with "
                "text.caption_dropout=0: use guidance_scale=1."
            )
        return replace(self, features=self.null_features.expand_as(self.features))

    def join(self, other: TextFeatures) -> TextFeatures:
        mask = None if self.mask is None or other.mask is None else torch.cat([self.mask, other.mask])
        return replace(self, features=torch.cat([self.features, other.features]), mask=mask)

    def call(self, network: nn.Module, x: Tensor, timesteps: Tensor, num_images: int = 0, **options: Any) -> Any:
        features, mask = self.features.to(x.dtype), None if self.mask is None else self.mask.to(x.dtype)
        options |= {"return_dict": False, "num_images": num_images}
        output, *hidden_states = network(x.transpose(1, 2), timesteps, features, mask, **options)
        output = output.transpose(1, 2)  # (B, F+I, C or 2C, H, W)
        return (output, *hidden_states) if hidden_states else output


class EncodedFeatures:
    """Caption features, computed by the text encoder on demand."""

    def __init__(self, config: TextConfig, device: torch.device) -> None:
        self.config = config
        dtype = DTYPES[config.dtype]
        self.encoder = TextEncoder.from_folder(config.folder(), dtype, device, max_length=config.max_length)
        width = self.encoder.network.config.d_model
        require(
            width == config.caption_channels,
            f"text.caption_channels is {config.caption_channels}, but the features of text.path={config.path} are "
            f"{width} wide: set text.caption_channels={width}.",
        )

        self._remembered = lru_cache(REMEMBERED)(self._encode)

    def __call__(self, caption: str) -> Tensor:
        return self._remembered(caption)

    def _encode(self, caption: str) -> Tensor:
        features, words = self.encoder.features(self.config.prepare(caption))
        return features[0] if caption == EMPTY else features[0, :words]


class Captions:
    """All captions of a run, by number, and the function that returns their features."""

    def __init__(self, config: TextConfig, texts: Sequence[str], features: Features, device: torch.device) -> None:
        self.config = config
        self.names = texts
        self.count = len(texts)
        self.dropout = config.caption_dropout
        self.features = features
        self.device = device

    def batch(self, labels: Tensor) -> TextFeatures:
        features, mask = self._padded([self.names[label] for label in labels.flatten().tolist()])
        null = self._null if self.dropout > 0 else None
        return TextFeatures(features.unflatten(0, labels.shape), mask.unflatten(0, labels.shape), null)

    @cached_property
    def _null(self) -> Tensor:
        return self._padded([EMPTY])[0][0]

    def _padded(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Returns features (n, L, D) and mask (n, L) of the captions, on the device."""
        words = [self.features(each) for each in captions]
        features = words[0].new_zeros(len(words), self.config.max_length, self.config.caption_channels)
        mask = torch.zeros(len(words), self.config.max_length)
        for row, found in enumerate(words):
            features[row, : len(found)] = found
            mask[row, : len(found)] = 1
        parts = [features, mask]
        if self.device.type == "cuda":  # so that no copy waits for the device
            parts = [part.pin_memory() if part.device.type == "cpu" else part for part in parts]
        features, mask = (part.to(self.device, non_blocking=True) for part in parts)
        return features, mask


def all_captions(config: Config, clips: ClipDataset, held_out: ClipDataset | None = None) -> list[str]:
    """Returns every caption of a run, by number: its clips', the held-out clips' and its samples'."""
    texts = held_out.captions if held_out is not None else clips.captions  # begins with those of `clips`
    known = set(texts)
    return [*texts, *dict.fromkeys(label for label in config.sample.labels or [] if label not in known)]


def build_conditions(
    config: Config, clips: ClipDataset, held_out: ClipDataset | None, device: torch.device
) -> Conditions:
    """Returns a run's conditions; ValueError if its text encoder or cache does not match. Collective for text."""
    if not config.model.is_text:
        return class_conditions(config.model, device, clips.class_names)
    texts = all_captions(config, clips, held_out)
    if config.text.features is None:
        return Captions(config.text, texts, EncodedFeatures(config.text, device), device)
    cache = TextCache(Path(config.text.features))
    cache.check(select_comparable(on_main(lambda: text_identity(config.text))), [EMPTY, *texts])
    return Captions(config.text, texts, cache, device)
