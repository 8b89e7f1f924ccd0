"""A cache of latents: an encoder's mean and deviation for every frame of every clip. See docs/latents.md.

`FeatureCache` is the same for the features of an image encoder.

    index.json              settings, and the place of each clip's frames; written last
    shard-00000.safetensors one tensor `latents (N, V, P, C, h, w)`: the frames of some clips, one after another

It holds single frames, so any window can be drawn from it, and distributions, not samples. Values are the encoder's,
neither shifted nor scaled.

Letters: N frames of a shard, T frames read, V views (plain; mirrored), P parts (mean; deviation), C channels, h w size
of latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from common.checks import require

from . import shards
from .catalog import Clip
from .readers import VideoError
from .shards import INDEX, NUMBER_FORMATS, ShardReader

FORMAT = "latte-latents-1"
TENSOR = "latents"  # name of the tensor in a shard


class FrameRun(NamedTuple):
    """Consecutive frames of one size: their number, height and width; `reason` if they are unusable."""

    frames: int
    height: int
    width: int
    reason: str | None = None


@dataclass(frozen=True)
class StoredClip:
    """One clip of a cache: `name`, `size` and `num_frames` are those of the catalog.

    frames: number of its frames, which are rows `first` to `first + frames` of shard `shard`.
    reason: why it cannot be opened; then it has no frames. cut_off: a sentence if its end is missing.
    runs: its frames as runs, in order; their lengths sum to `frames`.
    listed: whether it is an image of `data.frame_list` instead of a clip.
    """

    name: str
    size: int
    num_frames: int | None
    frames: int = 0
    shard: int = 0
    first: int = 0
    reason: str | None = None
    cut_off: str | None = None
    runs: tuple[FrameRun, ...] = ()
    listed: bool = False

    def __len__(self) -> int:
        return self.frames

    def to_json(self) -> dict[str, Any]:
        """Returns its fields, omitting empty ones other than `name` and `size`."""
        return {key: value for key, value in asdict(self).items() if value or key in ("name", "size")}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> StoredClip:
        """Returns the clip that `to_json` wrote. Raises: TypeError, ValueError for other content."""
        runs = tuple(FrameRun(int(n), int(h), int(w), reason) for n, h, w, reason in facts.get("runs", ()))
        numbers = {key: int(facts[key]) for key in ("size", "frames", "shard", "first") if key in facts}
        return cls(**{"num_frames": None, **facts, **numbers, "runs": runs})

    def find_obstacle(self, indices: Iterable[int]) -> str | None:
        """Returns why these frames cannot be used together, or None if they can."""
        ends = np.cumsum([run.frames for run in self.runs])
        touched = [self.runs[place] for place in np.unique(np.searchsorted(ends, list(indices), side="right"))]
        reason = next((run.reason for run in touched if run.reason), None)
        sizes = sorted({(run.height, run.width) for run in touched})
        if reason or len(sizes) == 1:
            return reason
        return f"its frames differ in size ({', '.join(f'{width}x{height}' for height, width in sizes)})"


class LatentCache:
    """A finished cache in `path`, opened for reading; a frame source of `ClipDataset`.

    Attributes:
        encoder: identity of the codec that made it, see `models.identity`; of a FeatureCache, of the image encoder.
        settings: the other settings that the latents depend on: image_size, transform, max_pixels, mirrored (V is 2).

    Raises: FileNotFoundError, ValueError if it is absent, unfinished, damaged or of another format.
    """

    key = TENSOR
    setting: ClassVar = "data.latents"  # the key of the configuration that names the folder
    format: ClassVar = FORMAT
    tool: ClassVar = "tools.cache_latents"
    maker: ClassVar = "codec"  # key of the encoder's identity in the index

    def __init__(self, path: Path) -> None:
        self.path = path
        index = self.read_index(path)
        try:
            self.encoder: dict[str, Any] = dict(index[self.maker])
            self.settings: dict[str, Any] = dict(index["settings"])
            self.shape = tuple(int(side) for side in index["shape"])  # (V, P, C, h, w), or (V, L, D)
            dtype, counts = NUMBER_FORMATS[index["dtype"]], [int(count) for count in index["shards"]]
            clips = [StoredClip.from_json(facts) for facts in index["clips"]]
        except (LookupError, TypeError, ValueError):
            raise ValueError(f"{self.setting}: {path / INDEX} is damaged; make the cache again") from None
        self.stochastic = self.shape[1] == 2  # holds deviations in addition to means
        self.clips = {clip.name: clip for clip in clips}
        for clip in clips:
            held = counts[clip.shard] if 0 <= clip.shard < len(counts) else 0
            if clip.frames != sum(run.frames for run in clip.runs) or not 0 <= clip.first <= held - clip.frames:
                raise ValueError(f"{self.setting}: {path / INDEX} is damaged at {clip.name!r}; make the cache again")
        self.shards = ShardReader(path, dtype, counts, self.shape, self.key)

    def list_clips(self) -> list[Clip]:
        """Returns its clips, without listed images, as catalog entries."""
        kept = [clip for clip in self.clips.values() if not clip.listed]
        return [Clip(clip.name, clip.name, clip.size, clip.num_frames) for clip in kept]

    def check(self, settings: Mapping[str, Any], clips: Sequence[Clip]) -> None:
        """Raises ValueError unless it holds `clips`, made with `settings`."""
        for key, value in settings.items():
            made = self.settings.get(key)
            require(
                made == value or (key == "mirrored" and bool(made)),
                f"{self.setting}: {self.path} was made with {key} {made}, but this run needs {value}; make a cache "
                "with this configuration",
            )
        held = {(clip.name, clip.size, clip.num_frames) for clip in self.clips.values()}
        absent = [clip.name for clip in clips if (clip.name, clip.size, clip.num_frames) not in held]
        require(
            not absent,
            f"{self.setting}: {self.path} was made from other data: {len(absent)} of {len(clips)} clips are missing or "
            f"had another size (first: {''.join(absent[:1])!r}); make a cache of this data",
        )

    def open(self, clip: Clip) -> StoredClip:
        """Returns the clip. Raises: VideoError if it could not be opened when the cache was made."""
        stored = self.clips[clip.name]
        if stored.reason:
            raise VideoError(clip.path, stored.reason)
        return stored

    def show(self, opened: StoredClip, clip: Clip, indices: list[int], mirrored: bool) -> Tensor:
        """Returns (T, P, C, h, w), or (T, L, D), in the cache's number format. Raises: VideoError as decoding would."""
        if obstacle := opened.find_obstacle(indices):
            raise VideoError(clip.path, obstacle)
        return self.shards.copy(opened.shard, (opened.first + np.asarray(indices), int(mirrored)), repr(clip.name))

    @classmethod
    def read_index(cls, path: Path) -> dict[str, Any]:
        """Returns the index of a finished cache. Raises: FileNotFoundError, ValueError if it cannot be read."""
        return shards.read_index(path, cls.format, cls.setting, cls.tool)


class FeatureCache(LatentCache):
    """A cache of `features (N, V, L, D)`: of an image encoder, D wide, for the L tokens of each frame."""

    key = "features"
    setting = "objective.features"
    format = "latte-features-1"
    tool = "tools.cache_features"
    maker = "encoder"
