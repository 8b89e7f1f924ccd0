"""Clips for training: the choice of frames is a pure function of (seed, epoch, index).

Nothing depends on the worker, the process or earlier reads, so a run can stop, resume and change its number of workers
and still see the same clips.

Letters: F frames, I images, C channels, H height, W width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .captions import read_captioned_images
from .catalog import Catalog, Clip, compute_digest
from .config import DataConfig
from .labels import read_frame_list
from .latents import FeatureCache, LatentCache
from .readers import Reader, VideoError, identify_file, open_video
from .recipes import CAPTIONED, RECIPES
from .transforms import TRANSFORMS, horizontal_flip, to_signed_range

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 20  # after this many unusable clips in a row, the data set is at fault
PURPOSES = {"window": 1, "flip": 2, "replacement": 3, "image": 4, "frame": 5, "image_flip": 6}


def window_span(num_frames: int, frame_interval: int) -> int:
    """Returns the number of video frames spanned by `num_frames` frames taken every `frame_interval`."""
    return (num_frames - 1) * frame_interval + 1


class Sample(TypedDict, total=False):
    """`video (F+I, 3, H, W)` float32 in [-1, 1]; `labels (1+I,)` int64; `index` of the clip that was used.

    A cache gives `latents (F+I, P, C, h, w)` instead of `video`: mean and, if P is 2, standard deviation.
    `features (F+I, L, D)` of the same frames are those of `ClipDataset.features`.
    """

    video: Tensor
    latents: Tensor
    features: Tensor
    labels: Tensor
    index: int


class Pixels:
    """Frames as (T, 3, H, W) in [-1, 1], decoded from the files of the data set."""

    key = "video"

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.transform = TRANSFORMS[RECIPES[config.name].transform]

    def open(self, clip: Clip) -> Reader:
        """Returns the reader of a clip. Raises: VideoError if the clip changed since the catalog was made."""
        reader = open_video(clip.path, self.config.reader, self.config.max_pixels)
        found, before, unit = len(reader), clip.num_frames, "frames"
        if before is None:
            found, before, unit = identify_file(clip.path)[0], clip.size, "bytes"
        if found != before:
            raise VideoError(clip.path, f"changed after the run started: {before} {unit} then, {found} now")
        return reader

    def show(self, opened: Reader, clip: Clip, indices: list[int], mirrored: bool) -> Tensor:
        """Returns transformed frames, float (T, 3, H, W)."""
        return self.finish(self.read(opened, clip, indices), mirrored)

    def read(self, opened: Reader, clip: Clip, indices: list[int]) -> Tensor:
        """Returns uint8 (T, C, H, W). Raises: VideoError for a damaged clip, whose frames or spacing may be wrong."""
        frames = opened.read(indices) if not opened.damage else None  # found on opening or reading
        if frames is None or opened.damage:
            raise VideoError(clip.path, str(opened.damage))
        return frames

    def finish(self, frames: Tensor, mirrored: bool) -> Tensor:
        """Transforms uint8 (T, C, H, W) to float (T, C, size, size) in [-1, 1]."""
        frames = horizontal_flip(frames) if mirrored else frames
        return to_signed_range(self.transform(frames, self.config.image_size))


FrameSource = Pixels | LatentCache  # `key` is the name of the frames in a `Sample`
Shown = dict[str, Tensor]  # frames (T, ...) by their key in a `Sample`


class ClipDataset(Dataset[Sample]):
    """`dataset[epoch, index]`: one clip of video `index`, drawn anew in every epoch, and I extra images.

    An unusable clip (broken, too large, too short) is recorded in `skipped` (path -> reason; per loader worker) and
    replaced by another, drawn from (seed, epoch, index). `cut_off` records truncated files that still hold a window,
    `looped` the short clips that `data.short_clips=loop` repeats. With `strict`, the first clip in `skipped` or
    `cut_off` raises VideoError; otherwise MAX_ATTEMPTS unusable clips in a row do, or more than `data.max_unusable` of
    all clips in `skipped`. `digest` identifies the content of catalog and frame list.
    """

    def __init__(self, config: DataConfig, catalog: Catalog, seed: int, source: FrameSource | None = None) -> None:
        self.config, self.catalog, self.seed = config, catalog, seed
        self.source: FrameSource = source or Pixels(config)
        self.transform_name, self.flips = RECIPES[config.name].transform, config.mirrors
        self.span = window_span(config.num_frames, config.frame_interval)
        self.images: list[Clip] | None = None
        if config.frame_list and config.name == CAPTIONED:
            self.catalog, self.images = read_captioned_images(config, catalog)
        elif config.frame_list:
            self.images = read_frame_list(config, catalog)
        self.class_names, self.captions = self.catalog.class_names, self.catalog.captions  # labels index one of them
        self.num_classes = len(self.class_names)
        self.skipped: dict[str, str] = {}
        self.cut_off: dict[str, str] = {}
        self.looped: dict[str, str] = {}
        self.digest = compute_digest([*catalog.clips, *(self.images or [])], self.class_names or self.captions)
        self.on_open: Callable[[str], None] | None = None  # called with the path of each video before it is read
        self.features: FeatureCache | None = None  # adds its features to every sample

    def __len__(self) -> int:
        return len(self.catalog.clips)

    @property
    def latent_settings(self) -> dict[str, object]:
        """Settings, except the codec's, that latents of these frames depend on."""
        sizes = {"image_size": self.config.image_size, "transform": self.transform_name}
        return {**sizes, "max_pixels": self.config.max_pixels, "mirrored": self.flips}

    def describe(self) -> dict[str, object]:
        """Returns a summary of the data for the run's log."""
        return {
            "name": self.config.name,
            "path": self.catalog.root,
            "latents": self.config.latents,
            "clips": len(self),
            "classes": self.num_classes,
            "captions": len(self.captions),
            "skipped": self.catalog.skipped,
            "listed_images": len(self.images) if self.images is not None else None,
            "frames_per_window": self.span,
            "transform": self.transform_name,
            "horizontal_flip": self.flips,
            "digest": self.digest,
        }

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        candidates = chain([index], self._draw_forever(len(self), "replacement", epoch, index))
        clips = self.catalog.clips
        used, window = self._first_usable(clips, candidates, lambda clip: self._window(clip, epoch, index))
        images = [self._image(epoch, index, place) for place in range(self.config.num_images)]
        frames: Any = {key: torch.cat([window[key], *(image[key] for image, _ in images)]) for key in window}
        labels = torch.tensor([clips[used].label, *(label for _, label in images)])
        return {**frames, "labels": labels, "index": used}

    def _random(self, purpose: str, *place: int) -> np.random.Generator:
        """Returns a separate generator for each purpose and place, so call order never matters."""
        entropy = [self.seed % 2**64, PURPOSES[purpose], *place]
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))

    def _draw_forever(self, count: int, purpose: str, *place: int) -> Iterator[int]:
        """Yields random numbers below `count` forever."""
        draw = self._random(purpose, *place)
        while True:
            yield int(draw.integers(count))

    def _first_usable(
        self, clips: Sequence[Clip], candidates: Iterator[int], load: Callable[[Clip], Shown]
    ) -> tuple[int, Shown]:
        """Returns the index of the first usable candidate among `clips`, and its frames."""
        failures: dict[str, str] = {}
        root, limit, total = self.catalog.root, self.config.max_unusable, len(self) + len(self.images or [])
        for index in islice(candidates, MAX_ATTEMPTS):
            try:
                return index, load(clips[index])
            except VideoError as error:
                if self.config.strict or error.ends_run:
                    raise
                failures[clips[index].path] = self._record(self.skipped, clips[index], error, "is skipped")
            if len(self.skipped) > limit * total:
                allowed = f"more than data.max_unusable={limit} allows: {_summarize(self.skipped)}"
                raise VideoError(root, f"{len(self.skipped)} of {total} clips cannot be used, {allowed}")
        raise VideoError(root, f"{MAX_ATTEMPTS} clips in a row cannot be used: {_summarize(failures)}")

    def _record(self, notes: dict[str, str], clip: Clip, error: VideoError, fate: str) -> str:
        """Records and returns the reason; warns once per clip."""
        reason = describe_failure(error, clip)
        if clip.path not in notes:
            notes[clip.path] = reason
            log.warning("%r %s: %s", clip.path, fate, reason)
        return reason

    def _open(self, clip: Clip) -> Any:
        if self.on_open is not None:
            self.on_open(clip.path)
        reader = self.source.open(clip)
        if reader.cut_off:
            error = VideoError(clip.path, reader.cut_off)
            if self.config.strict:
                raise error
            self._record(self.cut_off, clip, error, "is used up to its last frame")
        return reader

    def _show(self, opened: Any, clip: Clip, indices: list[int], mirrored: bool) -> Shown:
        """Returns frames of a clip, from the source and, if there are any, their features."""
        shown = {self.source.key: self.source.show(opened, clip, indices, mirrored)}
        if self.features is not None:
            shown[self.features.key] = self.features.show(self.features.open(clip), clip, indices, mirrored)
        return shown

    def _window(self, clip: Clip, epoch: int, index: int) -> Shown:
        """Returns F frames at the exact stride, from a random start: (F, ...).

        A looped clip may start at any of its frames. A clip whose end is missing is never looped.
        """
        reader = self._open(clip)
        length, starts = len(reader), len(reader) - self.span + 1
        if length < self.span:
            error = VideoError(clip.path, f"has {length} frames, a window needs {self.span}")
            if self.config.short_clips == "skip" or reader.cut_off:
                raise error
            self._record(self.looped, clip, error, "is looped")
            starts = length
        start = int(self._random("window", epoch, index).integers(starts))
        window = range(start, start + self.span, self.config.frame_interval)
        mirrored = self._is_mirrored("flip", epoch, index)
        return self._show(reader, clip, [place % length for place in window], mirrored)

    def _image(self, epoch: int, index: int, place: int) -> tuple[Shown, int]:
        """Returns a random frame of another video or a random image of the list, (1, ...), and its label."""
        source = self.catalog.clips if self.images is None else self.images
        others = max(1, len(self) - 1) if self.images is None else len(source)  # a single video uses its own
        candidates = self._draw_forever(others, "image", epoch, index, place)
        if self.images is None:
            candidates = ((index + 1 + draw) % len(self) for draw in candidates)

        def load(clip: Clip) -> Shown:
            reader = self._open(clip)
            number = int(self._random("frame", epoch, index, place).integers(len(reader)))
            return self._show(reader, clip, [number], self._is_mirrored("image_flip", epoch, index, place))

        used, image = self._first_usable(source, candidates, load)
        return image, source[used].label

    def _is_mirrored(self, purpose: str, *place: int) -> bool:
        return self.flips and bool(self._random(purpose, *place).random() < 0.5)


def _summarize(failures: dict[str, str]) -> str:
    """Formats the first MAX_ATTEMPTS failures (path -> reason)."""
    rest = len(failures) - MAX_ATTEMPTS
    named = "; ".join(f"{path}: {reason}" for path, reason in islice(failures.items(), MAX_ATTEMPTS))
    return f"{named}; and {rest} more" if rest > 0 else named


def describe_failure(error: VideoError, clip: Clip) -> str:
    """Returns why `clip` is unusable, naming the file if one frame of a folder is at fault."""
    return error.reason if error.path == clip.path else f"{error.path!r}: {error.reason}"
