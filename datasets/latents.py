"""A cache of latents: every frame of every clip as an encoder's mean and deviation, to be drawn from at random.

    index.json              what it is of, and where each clip's frames lie; written last
    shard-00000.safetensors one tensor `latents (N, V, P, C, h, w)`: the frames of some clips, one after another

It holds frames, not clips, so every window, stride and extra image can be drawn from it, and distributions, not
samples, so every epoch draws anew. Values are the encoder's own: neither shifted nor scaled. docs/latents.md.

Letters: N frames of a shard, T frames read, V views (as it is; mirrored), P parts (mean; deviation), C channels,
h w latent pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .catalog import Clip
from .readers import VideoError
from .shards import DTYPES, CacheError, map_shard, shard_file

FORMAT = "latte-latents-1"
TENSOR = "latents"  # what a shard's tensor is called
INDEX = "index.json"


class Run(NamedTuple):
    """Consecutive frames that are alike: how many, their height and width, and why they cannot be used, if so."""

    frames: int
    height: int
    width: int
    reason: str | None = None


@dataclass(frozen=True)
class StoredClip:
    """One clip of a cache: `name`, `size` and `num_frames` are the catalog's.

    frames: how many it has; they are rows `first` to `first + frames` of shard `shard`.
    reason: why it cannot be opened; then it has no frames.
    cut_off: what is missing at its end, in words.
    runs: what its frames are like; together they are all `frames`.
    listed: it is an image of `data.frame_list`, no clip of the set.
    """

    name: str
    size: int
    num_frames: int | None
    frames: int = 0
    shard: int = 0
    first: int = 0
    reason: str | None = None
    cut_off: str | None = None
    runs: tuple[Run, ...] = ()
    listed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Without what is as always."""
        return {key: value for key, value in asdict(self).items() if value or key in ("name", "size")}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> StoredClip:
        """The clip of `to_json`; TypeError or ValueError where it is none."""
        runs = tuple(Run(int(n), int(h), int(w), reason) for n, h, w, reason in facts.get("runs", ()))
        numbers = {key: int(facts[key]) for key in ("size", "frames", "shard", "first") if key in facts}
        return cls(**{"num_frames": None, **facts, **numbers, "runs": runs})

    def obstacle(self, indices: Iterable[int]) -> str | None:
        """Why these frames cannot be shown together, or None."""
        ends = np.cumsum([run.frames for run in self.runs])
        touched = [self.runs[place] for place in np.unique(np.searchsorted(ends, list(indices), side="right"))]
        reason = next((run.reason for run in touched if run.reason), None)
        sizes = sorted({(run.height, run.width) for run in touched})
        if reason or len(sizes) == 1:
            return reason
        return f"its frames differ in size ({', '.join(f'{width}x{height}' for height, width in sizes)})"


class OpenedClip(NamedTuple):
    """A stored clip, as a reader of it."""

    stored: StoredClip

    def __len__(self) -> int:
        return self.stored.frames

    @property
    def cut_off(self) -> str | None:
        """As a reader's."""
        return self.stored.cut_off


class LatentCache:
    """A finished cache in `path`, opened for reading; a frame source of `ClipDataset`.

    Attributes:
        codec: what is known of the codec that made it: `models.identity`.
        stochastic: whether it holds deviations (P is 2).
        settings: what else the latents depend on: image_size, transform, max_pixels, mirrored (V is 2).

    Raises: FileNotFoundError, ValueError in one sentence where it is absent, unfinished, damaged or another format.
    """

    key = "latents"

    def __init__(self, path: Path) -> None:
        self.path = path
        index = read_index(path)
        try:
            self.dtype = DTYPES[index["dtype"]]
            self.codec: dict[str, Any] = dict(index["codec"])
            self.settings: dict[str, Any] = dict(index["settings"])
            self.shape = tuple(int(side) for side in index["shape"])  # (V, P, C, h, w)
            self.shard_frames = [int(count) for count in index["shards"]]
            clips = [StoredClip.from_json(facts) for facts in index["clips"]]
        except (LookupError, TypeError, ValueError):
            raise ValueError(f"data.latents: {path / INDEX} is damaged; make the cache anew") from None
        self.clips = {clip.name: clip for clip in clips}
        self._check_places()
        for number in range(len(self.shard_frames)):
            self._map(number)

    @property
    def stochastic(self) -> bool:
        """Whether it holds deviations beside the means."""
        return self.shape[1] == 2

    def catalogued(self) -> list[Clip]:
        """Its clips, listed images apart, as a catalog finds them."""
        kept = [clip for clip in self.clips.values() if not clip.listed]
        return [Clip(clip.name, clip.name, clip.size, clip.num_frames) for clip in kept]

    def check(self, settings: Mapping[str, Any], clips: Sequence[Clip]) -> None:
        """ValueError unless it holds `clips`, made with `settings`."""
        for key, value in settings.items():
            made = self.settings.get(key)
            if made != value and not (key == "mirrored" and made):
                raise ValueError(
                    f"data.latents: {self.path} was made with {key} {made}, but this run needs {value}; make a cache "
                    "with this configuration"
                )
        absent = [clip for clip in clips if self._lacks(clip)]
        if absent:
            raise ValueError(
                f"data.latents: {self.path} is of other data: {len(absent)} of {len(clips)} clips are not in it, or "
                f"were of another size ({absent[0].name!r} the first); make a cache of this data"
            )

    def open(self, clip: Clip) -> OpenedClip:
        """The clip; VideoError where it could not be opened when the cache was made."""
        stored = self.clips[clip.name]
        if stored.reason:
            raise VideoError(clip.path, stored.reason)
        return OpenedClip(stored)

    def show(self, opened: OpenedClip, clip: Clip, indices: list[int], mirrored: bool) -> Tensor:
        """(T, P, C, h, w) in the cache's own number format. VideoError as when the frames were decoded."""
        stored = opened.stored
        obstacle = stored.obstacle(indices)
        if obstacle:
            raise VideoError(clip.path, obstacle)
        rows = self._map(stored.shard)[stored.first + np.asarray(indices), int(mirrored)]  # (T, P, C, h, w), a copy
        latents = torch.from_numpy(rows).view(self.dtype.torch)
        if not latents.isfinite().all():
            file = shard_file(self.path, stored.shard)
            raise CacheError(file, f"holds latents of {clip.name!r} that are not finite; make the cache anew")
        return latents

    def _map(self, number: int) -> np.ndarray:
        """The shard (N, V, P, C, h, w), from disk when it is touched."""
        return map_shard(shard_file(self.path, number), self.dtype, (self.shard_frames[number], *self.shape), TENSOR)

    def _lacks(self, clip: Clip) -> bool:
        stored = self.clips.get(clip.name)
        return stored is None or (stored.size, stored.num_frames) != (clip.size, clip.num_frames)

    def _check_places(self) -> None:
        """ValueError where a clip lies outside its shard, or its runs are not its frames."""
        for clip in self.clips.values():
            held = self.shard_frames[clip.shard] if 0 <= clip.shard < len(self.shard_frames) else 0
            if clip.frames != sum(run.frames for run in clip.runs) or not 0 <= clip.first <= held - clip.frames:
                raise ValueError(f"data.latents: {self.path / INDEX} is damaged at {clip.name!r}; make the cache anew")


def read_index(path: Path) -> dict[str, Any]:
    """The index of a finished cache. FileNotFoundError, ValueError where there is none that this version reads."""
    if not path.is_dir():
        raise FileNotFoundError(f"data.latents: there is no folder '{path}'; tools.cache_latents makes one")
    try:
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        kind = index["format"]
    except FileNotFoundError:
        raise FileNotFoundError(
            f"data.latents: '{path}' is no finished cache, it has no {INDEX}; run tools.cache_latents, again if it "
            "was interrupted"
        ) from None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(f"data.latents: {path / INDEX} cannot be read; make the cache anew") from None
    if kind != FORMAT:
        raise ValueError(f"data.latents: {path} is of format {kind!r}; this version reads {FORMAT!r}")
    return dict(index)
