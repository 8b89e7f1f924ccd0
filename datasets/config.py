"""The `data` section of a configuration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from .readers import MAX_PIXELS, READERS
from .recipes import CAPTIONED, LABEL_CHOICES, RECIPES

LIMITS = {"num_frames": 2**16, "num_images": 2**16, "image_size": 2**14, "num_workers": 256}  # largest values
MAX_TIMEOUT_S = 366 * 24 * 3600.0  # longer timeouts overflow in the system call that waits
SHORT_CLIPS = ("skip", "loop")


@dataclass(frozen=True)
class DataConfig:
    """The `data` section of a configuration."""

    name: str = "folder"  # ffs | sky | taichi | ucf101 | folder | demo | captions: a line of recipes.RECIPES
    path: str = ""  # the folder of the data set
    val_path: str | None = None  # a folder of the same layout with clips for validation only
    val_share: float = 0.0  # or this share of the clips of data.path, by the hash of their names
    latents: str | None = None  # read frames from this cache of tools.cache_latents instead of decoding and encoding
    labels: str = "auto"  # auto (as the data set says; `folder`: by its layout) | class_folders | file_name | none
    captions: str | None = None  # list of files and captions; null: captions.csv, .jsonl or .parquet in data.path
    file_column: str | None = None  # column of the files in that list; null: file, path, video, ..., or WebVid's
    caption_column: str | None = None  # column of the captions; null: caption, text, prompt or name
    frame_list: str | None = None  # joint training: images from this list instead of frames of the clips
    num_frames: int = 16  # F
    frame_interval: int = 3  # every n-th frame of the video
    image_size: int = 256  # side of the square, pixels
    num_images: int = 0  # I, extra images per clip (joint image-video training)
    num_workers: int = 4  # loader processes per rank
    worker_timeout_s: float = 600.0  # a loader process that is silent for this long ends the run
    reader: str = "auto"  # auto | pyav | decord
    horizontal_flip: bool | None = None  # mirror half of the clips; null: as in the data set's recipe
    max_pixels: int = MAX_PIXELS  # a clip with larger frames is unusable; refused before decoding
    short_clips: str = "skip"  # skip: a clip shorter than a window is unusable; loop: repeat it
    max_unusable: float = 0.5  # share of clips that may be unusable; more end the run
    strict: bool = False  # stop at the first clip that cannot be used, instead of replacing it
    max_clips: int | None = None  # use only the first n clips

    @property
    def mirrors(self) -> bool:
        """Whether half of the clips are mirrored."""
        return RECIPES[self.name].horizontal_flip if self.horizontal_flip is None else self.horizontal_flip

    def __post_init__(self) -> None:
        _one_of("name", self.name, RECIPES)
        _one_of("labels", self.labels, LABEL_CHOICES)
        _one_of("reader", self.reader, READERS)
        _one_of("short_clips", self.short_clips, SHORT_CLIPS)
        for key in ("num_frames", "frame_interval", "image_size", "max_clips", "max_pixels"):
            _at_least(key, getattr(self, key), 1)
        for key in ("num_images", "num_workers"):
            _at_least(key, getattr(self, key), 0)
        for key, most in LIMITS.items():
            if getattr(self, key) > most:
                raise ValueError(f"data.{key}: {getattr(self, key)} is too many; at most {most:,}")
        if not 0 < self.worker_timeout_s <= MAX_TIMEOUT_S:
            raise ValueError(
                f"data.worker_timeout_s: {self.worker_timeout_s} must be above 0, at most {MAX_TIMEOUT_S:.0f} (a year)"
            )
        if not 0 <= self.max_unusable <= 1:
            raise ValueError(f"data.max_unusable: {self.max_unusable} must be a share, from 0 to 1")
        if self.frame_list is not None and not self.num_images:
            raise ValueError("data.frame_list is read only in joint training: set data.num_images, or leave it out")
        for key in ("captions", "file_column", "caption_column"):
            if getattr(self, key) is not None and self.name not in CAPTIONED:
                raise ValueError(f"data.{key} is read only with data.name={CAPTIONED[0]}: set that, or leave it out")
        if self.name in CAPTIONED and self.labels != "auto":
            raise ValueError(f"data.labels={self.labels}: with data.name={self.name} captions take the place of labels")
        if not 0 <= self.val_share < 1:
            raise ValueError(f"data.val_share: {self.val_share} must be a share, from 0 to below 1")
        if self.val_share and self.val_path is not None:
            raise ValueError("data.val_share and data.val_path both select held-out clips: set only one of them")
        if self.val_share and self.frame_list is not None:
            raise ValueError(
                "data.val_share cannot tell which images of data.frame_list show a clip that it holds out: "
                "set data.val_path instead"
            )


def _one_of(key: str, value: str, choices: Iterable[str]) -> None:
    names = list(choices)
    if value not in names:
        near = get_close_matches(str(value), names, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"data.{key}: '{value}' is unknown, use one of {', '.join(names)}{hint}")


def _at_least(key: str, value: int | None, least: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ValueError(f"data.{key}: {value!r} must be a whole number of at least {least}")
