"""Captions as T5's features are made of them: cleaned the way the text-to-video weights were trained with.

The rules are those that DeepFloyd IF made for captions found on the web, and that PixArt-alpha, Latte and diffusers
took over: addresses, file names, mark-up, codes and shop talk go.
"""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote_plus

DASHES = (
    "-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)
SUFFIXES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
DOMAINS = "com|co|ru|net|org|edu|gov|it"
MAX_CAPTION = 100_000  # characters


class Rule(NamedTuple):
    """What goes, and what comes instead."""

    pattern: str
    replacement: str = ""


def _address(scheme: str) -> Rule:
    return Rule(rf"\b(?:{scheme}:(?:/{{1,3}}|[a-z0-9%])|[a-z0-9.\-]+\.(?:{DOMAINS})[\w/-]*\b/?(?!@))")


ADDRESSES = [Rule("<person>", "person"), _address("https?"), _address("www")]
SIGNS = [
    Rule(r"@\w+\b"),
    Rule("[\u31c0-\u4dbf\u4e00-\u9fff]+"),  # Chinese and Japanese signs
    Rule(f"[{DASHES}]+", "-"),
    Rule("[`´«»“”¨]", '"'),
    Rule("[‘’]", "'"),
    Rule("&quot;?"),
    Rule("&amp"),
    Rule(r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # addresses of the internet
    Rule(r"\d:\d\d\s+$"),
    Rule(r"\\n", " "),
    Rule(r"#\d{1,3}\b"),
    Rule(r"#\d{5,}\b"),
    Rule(r"\b\d{6,}\b"),
    Rule(rf"\S+\.(?:{SUFFIXES})"),
    Rule("[\"']{2,}", '"'),
    Rule(r"\.{2,}", " "),
    Rule(r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    Rule(r"\s+\.\s+", " "),
]
CODES = [
    Rule(r"\b[a-zA-Z]{1,3}\d{3,15}\b"),
    Rule(r"\b[a-zA-Z]+\d+[a-zA-Z]+\b"),
    Rule(r"\b\d+[a-zA-Z]+\d+\b"),
    Rule(r"(?:worldwide\s+)?(?:free\s+)?shipping"),
    Rule(r"(?:free\s)?download(?:\sfree)?"),
    Rule(r"\bclick\b\s(?:for|on)\s\w+"),
    Rule(rf"\b(?:{SUFFIXES})(?:\simages?)?"),
    Rule(r"\bpage\s+\d+\b"),
    Rule(r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    Rule(r"\b\d+\.?\d*[xх×]\d+\.?\d*\b"),  # 640x480
    Rule(r"\b\s+:\s+", ": "),
    Rule(r"(\D[,./])\b", r"\1 "),
    Rule(r"\s+", " "),
]
EDGES = [
    Rule(r"^[\"']([\w\W]+)[\"']$", r"\1"),
    Rule(r"^['_,\-:;]"),
    Rule(r"['_,\-:+]$"),
    Rule(r"^\.\S+$"),
]


def clean_caption(caption: str) -> str:
    """A caption as the text encoder is to see it; cleaned twice, as what one pass uncovers may need the next.

    Text that was decoded wrongly (`Ã©` for `é`) is mended where the package ftfy is installed.
    """
    return _clean_once(_clean_once(caption))


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


def _clean_once(caption: str) -> str:
    text = _apply(ADDRESSES, unquote_plus(caption[:MAX_CAPTION]).strip().lower())
    text = _apply(SIGNS, _text_of(text))
    if len(re.findall("[-_]", text)) > 3:  # this-is-my-cute-cat
        text = re.sub("[-_]", " ", text)
    text = html.unescape(html.unescape(_mend(text)))
    return _apply(EDGES, _apply(CODES, text)).strip()


def _apply(rules: list[Rule], text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


class _Text(HTMLParser):
    """Keeps the text between tags, but no scripts and styles."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is None:
            self.parts.append(data)


def _text_of(markup: str) -> str:
    parser = _Text()
    parser.feed(markup)
    parser.close()
    return "".join(parser.parts)


def _mend(text: str) -> str:
    try:
        import ftfy
    except ModuleNotFoundError:
        return text
    return str(ftfy.fix_text(text))
