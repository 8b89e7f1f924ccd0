"""T5 and its tokenizer: captions to the features that a text-conditioned network is conditioned on.

transformers is imported only where an encoder is loaded.
Letters: L words of a caption (T5's pieces), D width of the features.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from .autoencoder import DTYPES
from .hub import find_folder, read_json, require_part
from .quantize import quantize

log = logging.getLogger(__name__)

MAX_CAPTION = 100_000  # characters
LONGEST = 4096  # pieces that the encoder is given at most: its memory grows with their square
MAX_WORDS = 120  # of a prompt, in T5's pieces; what the weights were trained with
PARTS = ("tokenizer", "text_encoder")
PROBES = ("a red disc moving", "two blue squares resting")  # as many words; no tokenizer may take them for the same


class Prompt(NamedTuple):
    """Features of one prompt and of what it is guided away from, each (1, L, D)."""

    positive: Tensor
    negative: Tensor | None


@dataclass(frozen=True)
class TextConfig:
    """The `text` section: the captions' encoder, and what the network is told of its captions."""

    path: str | None = None  # folder with tokenizer/ and text_encoder/, or a hub name
    revision: str | None = None  # of a hub name
    caption_channels: int = 4096  # D, the width of the encoder's features; T5-XXL has 4096
    max_length: int = MAX_WORDS  # L, pieces that a caption is cut or padded to; padding is masked
    caption_dropout: float = 0.1  # share of captions replaced by the empty one; 0: no classifier-free guidance
    clean_captions: bool = True  # without addresses, mark-up and file names, as Latte-1's were
    dtype: str = "fp32"  # fp32 | bf16 | fp16: of the encoder and its features
    features: str | None = None  # read features from this cache of tools.cache_text instead of encoding

    def __post_init__(self) -> None:
        for key, most in (("caption_channels", 2**16), ("max_length", LONGEST)):
            if not 1 <= getattr(self, key) <= most:
                raise ValueError(f"text.{key} must be from 1 to {most}, not {getattr(self, key)}.")
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"text.caption_dropout must be in [0, 1), not {self.caption_dropout}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"text.dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}.")
        if self.revision and self.path is None:
            raise ValueError("text.revision is of a hub name: name that too, text.path.")

    def folder(self) -> Path:
        """Where the encoder is, downloaded where `path` is a hub name.

        Raises: ValueError, FileNotFoundError where there is none.
        """
        if self.path is None:
            raise ValueError("text.path is not set: name the folder or hub name of the captions' encoder.")
        return find_folder(self.path, self.revision, "text.path", [f"{part}/*" for part in PARTS])

    def prepare(self, caption: str) -> str:
        """A caption as the encoder is to see it."""
        return clean_caption(caption) if self.clean_captions else caption.lower().strip()


@dataclass
class TextEncoder:
    """T5 and its tokenizer; `max_length`: pieces that a prompt is cut to."""

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
        """From the sub-folders `tokenizer` and `text_encoder`, quantised as `models.quantize` says.

        Raises: FileNotFoundError, ValueError: one is missing or broken, or the tokenizer is not the encoder's.
        """
        from transformers import T5EncoderModel, T5Tokenizer
        from transformers.utils import logging as remarks

        for name in PARTS:
            require_part(folder, name)
        read_json(folder / "text_encoder" / "config.json")
        remarks.disable_progress_bar()  # of reading one file
        told = remarks.get_verbosity()
        remarks.set_verbosity(logging.CRITICAL)  # a table of all weights that do not fit
        try:
            tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer")
            network, report = T5EncoderModel.from_pretrained(
                folder / "text_encoder", dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"{folder}: tokenizer or text_encoder could not be loaded: {reason}") from error
        finally:
            remarks.set_verbosity(told)
        lost = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in report[kind])
        if lost:
            raise ValueError(
                f"{folder / 'text_encoder'}: {len(lost)} weights are missing or of another shape than its config.json "
                f"says, {lost[0]} the first"
            )
        check_tokenizer(tokenizer, network.config.vocab_size, folder)
        return cls(tokenizer, quantize(network.eval().requires_grad_(False), quantization, device), max_length)

    @torch.no_grad()
    def features(self, text: str) -> tuple[Tensor, int]:
        """Features (1, L, D) of a text, padding included, and how many of them are words."""
        length = self.max_length
        tokens = self.tokenizer([text], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        words = int(tokens.attention_mask.sum())  # before it is on the device, which it would wait for
        tokens = tokens.to(self.network.device)
        return self.network(tokens.input_ids, attention_mask=tokens.attention_mask)[0], words

    def encode(self, prompt: str, negative_prompt: str | None, *, clean: bool = True) -> Prompt:
        """Features of the words of a prompt, and as many of the negative one; None: no guidance."""
        prepare = clean_caption if clean else lambda text: text.lower().strip()
        text = prepare(prompt)
        if not text:
            log.warning("the prompt %r says nothing: its video is of what the network draws without a caption", prompt)
        count = len(self.tokenizer(text).input_ids)
        if count > self.max_length:
            log.warning("a prompt of %d pieces is cut to the %d that the network knows", count, self.max_length)
        positive, words = self.features(text)
        negative = None if negative_prompt is None else self.features(prepare(negative_prompt))[0][:, :words]
        return Prompt(positive[:, :words], negative)


def check_tokenizer(tokenizer: Any, vocab_size: int, folder: Path) -> None:
    """Refuse a tokenizer that lost its vocabulary: it would make every prompt the same, without a word.

    Raises: ValueError.
    """
    sizes = f"{folder}: the tokenizer knows {len(tokenizer)} pieces, the text encoder {vocab_size}"
    if len(tokenizer) < vocab_size / 2 or len(tokenizer) > vocab_size:
        raise ValueError(f"{sizes}: they do not belong together, or the tokenizer's files are not whole")
    first, second = (tokenizer(probe).input_ids for probe in PROBES)
    if first == second:
        raise ValueError(f"{sizes}, but it takes different prompts for the same; copy the tokenizer again")


def clean_caption(caption: str) -> str:
    """A caption as the text encoder is to see it: without addresses, mark-up, file names, codes and shop talk.

    The rules are those of DeepFloyd IF, which PixArt-alpha and Latte were trained with, as diffusers keeps them for its
    own pipelines. Cleaned twice, as there: what one pass uncovers may need the next.
    """
    from diffusers.pipelines.latte.pipeline_latte import LattePipeline

    clean = LattePipeline._clean_caption  # uses a pattern of the class, and no pipeline
    return clean(LattePipeline, clean(LattePipeline, caption[:MAX_CAPTION]))
