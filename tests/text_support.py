"""Shared by tests of text-to-video training: a small set with captions, a text encoder, a tiny run on them."""

from pathlib import Path

from tests.conftest import TINY, draw_frame_folders
from tests.t2v_support import tiny_text_encoder, tiny_tokenizer

# the tiny run of conftest, with a text network of two layers in place of the class-conditional one
TINY_TEXT = [each for each in TINY if "num_classes" not in each]
TINY_TEXT += ["model.name=custom-t2v", "data.name=captions", "text.caption_channels=12", "text.max_length=24"]
TINY_TEXT += ["text.clean_captions=false", "text.caption_dropout=0.3"]
THINGS = {"falls": ("a stone", "a leaf", "a stone"), "rises": ("a kite", "smoke", "a bird")}  # of the three clips
CAPTIONS = {f"{verb}/clip{n}": f"{thing} {verb}" for verb, things in THINGS.items() for n, thing in enumerate(things)}


def write_captions(root: Path, captions: dict[str, str]) -> Path:
    lines = ["file,caption", *(f'{file},"{caption}"' for file, caption in captions.items())]
    (root / "captions.csv").write_text("\n".join(lines) + "\n")
    return root


def draw_captioned(root: Path) -> Path:
    return write_captions(draw_frame_folders(root, clips=3), CAPTIONS)


def save_text_encoder(folder: Path, seed: int = 0) -> Path:
    """`tokenizer` and `text_encoder`, 12 wide."""
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    tiny_text_encoder(seed).save_pretrained(folder / "text_encoder")
    return folder
