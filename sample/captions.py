"""Captions as T5's features are made of them: cleaned the way the text-to-video weights were trained with."""

from __future__ import annotations

from pathlib import Path

MAX_CAPTION = 100_000  # characters


def clean_caption(caption: str) -> str:
    """A caption as the text encoder is to see it: without addresses, mark-up, file names, codes and shop talk.

    The rules are those of DeepFloyd IF, which PixArt-alpha and Latte were trained with, as diffusers keeps them for its
    own pipelines. Cleaned twice, as there: what one pass uncovers may need the next.
    """
    from diffusers.pipelines.latte.pipeline_latte import LattePipeline

    clean = LattePipeline._clean_caption  # uses a pattern of the class, and no pipeline
    return clean(LattePipeline, clean(LattePipeline, caption[:MAX_CAPTION]))


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines and those that start with # are passed over.

    Raises:
        FileNotFoundError, ValueError: no such file, or no prompt in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no prompt file {path}")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {path} is not text in UTF-8") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"prompt file {path} holds no prompt: write one a line")
    return prompts
