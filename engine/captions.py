"""Captions as the condition of a text network: their numbers, which come as labels, become features of words.

The features of a caption are a function of it alone: it is encoded by itself, and cut or padded to `text.max_length`.
Dropping a caption is PixArt-alpha's: the features become those of the empty prompt, padding included, and the mask
stays that of the caption, so that the network sees as many words. Samplers guide away from just that.
Letters: B clips, F frames, I images, L words, D width of the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from datasets import ClipDataset
from datasets.text_features import TextCache
from models.autoencoder import DTYPES
from models.latte_t2v import LatteT2V
from models.text_encoder import TextConfig, TextEncoder
from models.text_identity import comparable, text_identity

from .config import Config, require
from .distributed import on_main

EMPTY = ""  # the caption of classifier-free guidance: what a sampler encodes where there is no negative prompt
REMEMBERED = 256  # captions whose features are not computed again


class Features(Protocol):
    """Where the features of captions come from."""

    def __call__(self, caption: str) -> Tensor:
        """The features of a caption (n, D), always on one device: of its n words; of the empty one, of all L."""
        ...


class EncodedFeatures:
    """The encoder, here and now."""

    def __init__(self, config: TextConfig, device: torch.device) -> None:
        self.config = config
        self.encoder = TextEncoder.from_folder(
            config.folder(), DTYPES[config.dtype], device, max_length=config.max_length
        )
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


class CaptionTable:
    """The captions of one micro-batch on the device, to be looked up there: row 0 is the empty one.

    Attributes:
        labels: (B, 1+I), each caption's row, on the device.
    """

    null_label = 0

    def __init__(self, features: Tensor, mask: Tensor, labels: Tensor) -> None:
        self.features = features  # (n, L, D)
        self.mask = mask  # (n, L)
        self.labels = labels

    def __call__(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Rows `(B, 1+I)` -> features `(B, 1+I, L, D)` and mask `(B, 1+I, L)`: 1 for words, 0 for padding.

        A row is that of its place in the table's own `labels`, or 0, the empty one.
        """
        return self.features[labels], self.mask[self.labels]


class Captions:
    """All captions that a run may need, by number, and their features.

    Args:
        texts: `texts[label]`; the null label, of the empty caption, comes after the last.
    """

    def __init__(self, config: TextConfig, texts: Sequence[str], features: Features, device: torch.device) -> None:
        self.config = config
        self.texts = texts
        self.features = features
        self.device = device

    @property
    def null_label(self) -> int | None:
        """The label of no caption, or None where the network was trained without."""
        return len(self.texts) if self.config.caption_dropout > 0 else None

    def __call__(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As `CaptionTable`, of numbers among all captions; waits for the device where `labels` is on it.

        An empty caption in the second half of a batch stands in for the one in the first: so guidance calls it.
        """
        numbers = labels.flatten().tolist()
        features, mask = self._padded(numbers)
        half = len(numbers) // 2
        for row, number in enumerate(numbers):
            if row >= half and number == len(self.texts):
                mask[row] = mask[row - half]
        return features.unflatten(0, labels.shape), mask.unflatten(0, labels.shape)

    def table(self, labels: Tensor) -> CaptionTable:
        """The captions of a micro-batch; `labels (B, 1+I)` on the CPU, so that nothing waits for the device."""
        numbers = labels.flatten().tolist()
        rows = torch.arange(1, 1 + len(numbers)).view(labels.shape)
        return CaptionTable(*self._padded([len(self.texts), *numbers]), self._moved(rows))

    def _padded(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Features (n, L, D) and mask (n, L) of those captions, on the device."""
        words = [self.features(self.texts[each] if each < len(self.texts) else EMPTY) for each in numbers]
        length = self.config.max_length
        features = words[0].new_zeros(len(words), length, self.config.caption_channels)
        mask = torch.zeros(len(words), length)
        for row, found in enumerate(words):
            features[row, : len(found)] = found
            mask[row, : len(found)] = 1
        return self._moved(features), self._moved(mask)

    def _moved(self, value: Tensor) -> Tensor:
        """On the device, without a wait."""
        if self.device.type == "cuda" and value.device.type == "cpu":
            value = value.pin_memory()
        return value.to(self.device, non_blocking=True)

    def network(self, model: nn.Module) -> CaptionedNetwork:
        """`model`, called with numbers among all captions."""
        return CaptionedNetwork(model, self, self.null_label)


class CaptionedNetwork(nn.Module):
    """A text network that is called as `Latte` is, with the numbers of captions for labels."""

    def __init__(self, model: nn.Module, captions: Captions | CaptionTable, null_label: int | None) -> None:
        super().__init__()
        self.model = model
        self.captions = captions
        self.null_label = null_label

    @property
    def in_channels(self) -> int:
        """As of `Latte`."""
        return cast(LatteT2V, self.model).config.channels[0]

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """`(B, F+I, C, H, W)` -> the same, or 2C channels; labels `(B,)` or `(B, 1+I)`; options of `LatteT2V`."""
        features, mask = self.captions(labels.reshape(len(labels), -1))
        output = self.model(
            x.transpose(1, 2), timesteps, features.to(x.dtype), mask.to(x.dtype), return_dict=False, **options
        )
        return output[0].transpose(1, 2)  # (B, F+I, C, H, W)


def all_captions(config: Config, clips: ClipDataset, held_out: ClipDataset | None = None) -> list[str]:
    """Every caption that a run may ask for, by number: of its clips, then of the held-out ones, then to be sampled."""
    texts = held_out.captions if held_out is not None else clips.captions  # which begin with those of `clips`
    known = set(texts)
    return [*texts, *dict.fromkeys(label for label in config.sample.labels or [] if label not in known)]


def build_captions(
    config: Config, clips: ClipDataset, held_out: ClipDataset | None, device: torch.device
) -> Captions | None:
    """The captions of a text network; None for any other.

    Raises: ValueError, FileNotFoundError where the encoder, or the cache of its features, is not what it should be.
    """
    if not config.model.is_text:
        return None
    texts = all_captions(config, clips, held_out)
    if config.text.features is None:
        return Captions(config.text, texts, EncodedFeatures(config.text, device), device)
    cache = TextCache(Path(config.text.features))
    cache.check(comparable(on_main(lambda: text_identity(config.text))), [EMPTY, *texts])
    return Captions(config.text, texts, cache, device)


def condition_of(config: Config, captions: Captions | None) -> dict[str, Any]:
    """What an `Objective` is told of the condition: of captions, or of classes, or that there is none."""
    model = config.model
    if captions is not None:
        null, dropout = CaptionTable.null_label, config.text.caption_dropout
        return {"conditional": True, "null_label": null, "label_dropout": dropout, "captions": captions}
    null_label = model.num_classes if model.has_null_label else None
    return {"conditional": model.num_classes > 0, "null_label": null_label, "label_dropout": model.label_dropout}


def temporal_position_scale(config: Config, step: int) -> float:
    """How far positions in time are let in at `step`: 1, but of a network begun from images it grows from 0."""
    ramp = config.train.temporal_ramp_steps
    return min(1.0, step / ramp) if ramp else 1.0


def set_temporal_position_scale(config: Config, step: int, *models: nn.Module) -> None:
    """Make it so in text networks; in others there is no such thing."""
    for model in models if config.model.is_text else ():
        model.temporal_position_scale = temporal_position_scale(config, step)  # type: ignore[assignment]
