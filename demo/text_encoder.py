"""Makes a small T5 encoder for the demo set's captions: a tokenizer of their words, and random weights.

    python -m demo.text_encoder            # fills data/demo_text, the folder that the demo configs read

Features from random weights still depend on the words and their positions; the video network learns their meaning.
The folder has the layout of a released Latte folder: `tokenizer/` and `text_encoder/`. The same seed gives the same
files; an existing folder is kept.
"""

from __future__ import annotations

import argparse
import math
import re
import string
from collections import Counter
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common.storage import make_once
from engine import cli

from .drawn import COLOURS, MOTIONS, SHAPES, DemoClass, captions_of

if TYPE_CHECKING:
    from transformers import T5Tokenizer

FORMAT = 1  # raised when the output changes
WIDTH = 64  # of the features: text.caption_channels
SPECIAL = ("<pad>", "</s>", "<unk>")  # T5's first three
LETTER = -20.0  # log-probability of a letter: below that of any word


def train_tokenizer() -> T5Tokenizer:
    """Returns a T5 unigram tokenizer: the words of all possible captions by frequency, and letters for others."""
    from transformers import T5Tokenizer

    kinds = (DemoClass(*each) for each in product(COLOURS, SHAPES, sorted(MOTIONS)))
    captions = (caption for kind in kinds for caption in captions_of(kind))
    words = Counter(piece for caption in captions for piece in re.findall(r"\w+|[^\w\s]", caption))
    total = words.total()
    pieces = [(f"▁{word}" if word.isalnum() else word, math.log(count / total)) for word, count in words.most_common()]
    letters = [(letter, LETTER) for letter in ("▁", *string.ascii_lowercase) if letter not in words]
    return T5Tokenizer(vocab=[*((piece, 0.0) for piece in SPECIAL), *pieces, *letters], extra_ids=0)


def make(folder: Path, seed: int) -> None:
    """Writes the tokenizer and the encoder."""
    from transformers import T5Config, T5EncoderModel

    tokenizer = train_tokenizer()
    torch.manual_seed(seed)
    sizes = {"d_model": WIDTH, "d_kv": 16, "d_ff": 4 * WIDTH, "num_layers": 2, "num_heads": 4}
    encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), dropout_rate=0.0, **sizes))
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder.save_pretrained(folder / "text_encoder")


def main(argv: list[str]) -> None:
    """Makes the encoder of the command line, unless it exists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/demo_text"), help="folder to write (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (%(default)s)")
    arguments = parser.parse_args(argv)

    parameters = {"format": FORMAT, "seed": arguments.seed, "width": WIDTH}
    made = make_once(arguments.out, parameters, lambda root: make(root, arguments.seed), replace=True)
    print(f"{arguments.out}: tokenizer and text_encoder, {'made' if made else 'already there'}")


if __name__ == "__main__":
    cli.run(main)
