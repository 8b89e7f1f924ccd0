"""T5 and its tokenizer: turn captions into features for a text-conditioned network.

transformers is imported only when an encoder is loaded.
Letters: L tokens of a caption (T5's pieces), D width of the features.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from common.checks import check_limits, check_read_only_with, from_to, one_of, require, within

from .autoencoder import DTYPES
from .hub import find_folder, read_json, require_part
from .quantize import quantize

log = logging.getLogger(__name__)

MAX_CAPTION = 100_000  # characters
MAX_WORDS = 120  # tokens of a prompt, as in the training of the released weights
PARTS = ("tokenizer", "text_encoder")
LIMITS = {
    "caption_channels": from_to(1, 2**16),
    "max_length": from_to(1, 4096),  # memory grows with its square
    "caption_dropout": within(0, 1, "[)"),
    "dtype": one_of(DTYPES),
}
PROBES = ("a red disc moving", "two blue squares resting")  # equally long; a working tokenizer tells them apart


class Prompt(NamedTuple):
    """Features of a prompt and of its negative prompt, each (1, L, D)."""

    positive: Tensor
    negative: Tensor | None


@dataclass(frozen=True)
class TextConfig:
    """The `text` section: the text encoder, and how captions are prepared for it."""

    path: str | None = None  # folder with tokenizer/ and text_encoder/, or a hub name
    revision: str | None = None  # of a hub name
    caption_channels: int = 4096  # D, the width of the encoder's features; T5-XXL has 4096
    max_length: int = MAX_WORDS  # L, tokens that a caption is cut or padded to; padding is masked
    caption_dropout: float = 0.1  # share of captions replaced by the empty one; 0: no classifier-free guidance
    clean_captions: bool = True  # remove URLs, mark-up and file names, as in the training of Latte-1
    dtype: str = "fp32"  # fp32 | bf16 | fp16: precision of the encoder and its features
    features: str | None = None  # read features from this cache of tools.cache_text instead of encoding

    def __post_init__(self) -> None:
        check_limits(self, "text.", LIMITS)
        check_read_only_with(self, "text.", {"revision": "path"})

    def folder(self) -> Path:
        """Returns the folder of the encoder, downloaded if `path` is a hub name. Raises: ValueError, OSError."""
        require(self.path is not None, "text.path is not set: set it to the folder or hub name of the text encoder.")
        return find_folder(str(self.path), self.revision, "text.path", [f"{part}/*" for part in PARTS])

    def prepare(self, caption: str) -> str:
        """Returns a caption ready for the encoder: cleaned, or only in lower case."""
        return prepare_caption(caption, clean=self.clean_captions)


@dataclass
class TextEncoder:
    """T5 and its tokenizer; prompts are cut to `max_length` tokens."""

    tokenizer: Any
    network: Any
    max_length: int = MAX_WORDS

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        quantization: str | None = None,
        *,
        max_length: int = MAX_WORDS,
    ) -> TextEncoder:
        """Loads the sub-folders `tokenizer` and `text_encoder`; for `quantization` see `models.quantize`.

        Raises: FileNotFoundError, ValueError if one is missing or broken, or they do not belong together.
        """
        from transformers import T5EncoderModel, T5Tokenizer
        from transformers.utils import logging as transformers_logging

        for name in PARTS:
            require_part(folder, name)
        read_json(folder / "text_encoder" / "config.json")
        transformers_logging.disable_progress_bar()
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity(logging.CRITICAL)  # hides a table of all mismatched weights
        try:
            tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer")
            network, report = T5EncoderModel.from_pretrained(
                folder / "text_encoder", dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"{folder}: tokenizer or text_encoder could not be loaded: {reason}") from error
        finally:
            transformers_logging.set_verbosity(verbosity)
        lost = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in report[kind])
        wrong = f"{len(lost)} weights are missing or have another shape than in its config.json"
        require(not lost, f"{folder / 'text_encoder'}: {wrong}, the first is {''.join(lost[:1])}")
        check_tokenizer(tokenizer, network.config.vocab_size, folder)
        return cls(tokenizer, quantize(network.eval().requires_grad_(False), quantization, device), max_length)

    @torch.no_grad()
    def features(self, text: str) -> tuple[Tensor, int]:
        """Returns features (1, L, D) of a text, padding included, and the number of tokens without padding."""
        length = self.max_length
        tokens = self.tokenizer([text], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        words = int(tokens.attention_mask.sum())  # before the move to the device, for which int() would wait
        tokens = tokens.to(self.network.device)
        return self.network(tokens.input_ids, attention_mask=tokens.attention_mask)[0], words

    def encode(self, prompt: str, negative_prompt: str | None, *, clean: bool = True) -> Prompt:
        """Returns features of a prompt without padding, and equally many of the negative prompt (None: no guidance)."""
        text = prepare_caption(prompt, clean=clean)
        if not text:
            log.warning("the prompt %r is empty after cleaning: its video is sampled without a caption", prompt)
        count = len(self.tokenizer(text).input_ids)
        if count > self.max_length:
            log.warning("a prompt of %d tokens is cut to %d, the network's maximum", count, self.max_length)
        positive, words = self.features(text)
        if negative_prompt is None:
            return Prompt(positive[:, :words], None)
        negative, _ = self.features(prepare_caption(negative_prompt, clean=clean))
        return Prompt(positive[:, :words], negative[:, :words])


def check_tokenizer(tokenizer: Any, vocab_size: int, folder: Path) -> None:
    """Raises ValueError for a tokenizer without its vocabulary, which would silently make all prompts the same."""
    count = len(tokenizer)
    sizes = f"{folder}: the tokenizer has {count} tokens, the text encoder {vocab_size}"
    apart = "they do not belong together, or the tokenizer's files are incomplete"
    require(vocab_size / 2 <= count <= vocab_size, f"{sizes}: {apart}")
    first, second = (tokenizer(probe).input_ids for probe in PROBES)
    require(first != second, f"{sizes}, but it encodes different prompts alike; copy the tokenizer again")


def prepare_caption(caption: str, *, clean: bool) -> str:
    """Returns a caption ready for the encoder: cleaned, or only in lower case."""
    return clean_caption(caption) if clean else caption.lower().strip()


def clean_caption(caption: str) -> str:
    """Removes URLs, mark-up, file names, codes and advertising from a caption.

    The rules are those of DeepFloyd IF, as diffusers implements them for its pipelines; applied twice, as there.
    """
    from diffusers.pipelines.latte.pipeline_latte import LattePipeline

    clean = LattePipeline._clean_caption  # a method that reads only class attributes, so no pipeline is needed
    return clean(LattePipeline, clean(LattePipeline, caption[:MAX_CAPTION]))
