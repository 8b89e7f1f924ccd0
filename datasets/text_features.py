"""A cache of text features: those of every caption's words, without padding (of the empty caption, with padding).

    index.json              settings; written last
    captions.safetensors    for each caption: the SHA-256 of its text, its shard, its first row, its number of words
    shard-00000.safetensors one tensor `features (N, D)`: the words of some captions, one after another

Captions are looked up by text, so a cache serves every list whose captions it holds. See docs/text_to_video.md.
Letters: N words of a shard, n of a caption, D width of the features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.checks import require
from common.storage import find_changes

from . import shards
from .shards import NUMBER_FORMATS, ShardReader

FORMAT = "latte-text-1"
TABLE = "captions.safetensors"
TENSOR = "features"  # name of the tensor in a shard


class Place(NamedTuple):
    """Position of one caption's features: shard, first row and number of tokens."""

    shard: int
    first: int
    words: int


def caption_key(caption: str) -> bytes:
    """Returns the key of a caption: the SHA-256 of its text."""
    return hashlib.sha256(caption.encode(errors="surrogatepass")).digest()


def write_table(file: Path, captions: Sequence[str], places: Sequence[Place]) -> None:
    """Writes the table of all captions."""
    keys = np.frombuffer(b"".join(caption_key(each) for each in captions), np.uint8).reshape(len(captions), 32)
    save_file({"sha256": torch.from_numpy(keys.copy()), "places": torch.tensor(places, dtype=torch.int64)}, file)


class TextCache:
    """A finished cache in `path`, opened for reading: `cache(caption)` returns the features (n, D) of its words.

    `identity` holds the settings that the features depend on, except the captions.

    Raises: FileNotFoundError, ValueError if it is absent, unfinished or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        index = read_index(path)
        try:
            self.identity: dict[str, Any] = dict(index["identity"])
            self.width = int(self.identity["width"])
            dtype, counts = NUMBER_FORMATS[self.identity["dtype"]], [int(count) for count in index["shards"]]
            table = load_file(path / TABLE)
            keys, places = table["sha256"].numpy(), table["places"].tolist()
            self.places = {key.tobytes(): Place(*place) for key, place in zip(keys, places, strict=True)}
            for place in self.places.values():
                if not 0 <= place.first < place.first + place.words <= counts[place.shard]:
                    raise ValueError(place)
        except (OSError, LookupError, TypeError, ValueError, SafetensorError):
            raise ValueError(f"text.features: {path} is damaged; make the cache again") from None
        self.shards = ShardReader(path, dtype, counts, (self.width,), TENSOR)

    def __call__(self, caption: str) -> Tensor:
        """Returns the features (n, D) of a caption's words, in the number format of the cache."""
        shard, first, words = self.places[caption_key(caption)]
        return self.shards.copy(shard, slice(first, first + words), repr(caption[:60]))

    def check(self, identity: Mapping[str, Any], captions: Sequence[str]) -> None:
        """Raises ValueError unless it holds all of `captions`, made with the settings `identity`."""
        changes = ", ".join(find_changes(self.identity, identity, list(identity)))
        made = f"text.features: {self.path} was made with other"
        require(not changes, f"{made} settings ({changes}); make a cache with this configuration")
        absent = [caption[:60] for caption in captions if caption_key(caption) not in self.places]
        missing = f"{len(absent)} of {len(captions)} captions are missing (first: {''.join(absent[:1])!r})"
        require(not absent, f"{made} captions: {missing}; make a cache of these")


def read_index(path: Path) -> dict[str, Any]:
    """Returns the index of a finished cache. Raises: FileNotFoundError, ValueError if it cannot be read."""
    return shards.read_index(path, FORMAT, "text.features", "tools.cache_text")
