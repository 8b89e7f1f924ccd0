"""The `data` section of a configuration."""

from __future__ import annotations

from dataclasses import dataclass

from common.checks import (
    Limit,
    at_least,
    check_limits,
    check_read_only_with,
    from_to,
    one_of,
    optional,
    require,
    within,
)

from .readers import MAX_PIXELS, READERS
from .recipes import CAPTIONED, LABEL_CHOICES, RECIPES

MAX_TIMEOUT_S = 366 * 24 * 3600.0  # a year; longer timeouts overflow in the waiting system call
LIMITS: dict[str, Limit] = {
    "name": one_of(RECIPES),
    "labels": one_of(LABEL_CHOICES),
    "reader": one_of(READERS),
    "short_clips": one_of(("skip", "loop")),
    "num_frames": from_to(1, 2**16),
    "image_size": from_to(1, 2**14),
    "num_images": from_to(0, 2**16),
    "num_workers": from_to(0, 256),
    "frame_interval max_pixels": at_least(1),
    "max_clips": optional(at_least(1)),
    "worker_timeout_s": Limit(
        f"above 0 and at most {MAX_TIMEOUT_S:.0f} (a year)", lambda value: 0 < value <= MAX_TIMEOUT_S
    ),
    "max_unusable": within(0, 1),
    "val_share": within(0, 1, "[)"),
}
OWNERS = {
    "frame_list": "num_images",
    **dict.fromkeys(("captions", "file_column", "caption_column"), f"name={CAPTIONED}"),
}


@dataclass(frozen=True)
class DataConfig:
    """The `data` section of a configuration."""

    name: str = "folder"  # ffs | sky | taichi | ucf101 | folder | demo | captions: a key of recipes.RECIPES
    path: str = ""  # the folder of the data set
    val_path: str | None = None  # a folder of the same layout with clips for validation only
    val_share: float = 0.0  # or hold out this share of the clips of data.path, by hash of their names
    latents: str | None = None  # read frames from this cache of tools.cache_latents instead of decoding and encoding
    labels: str = "auto"  # auto (the data set's rule; for `folder`, from its layout) | class_folders | file_name | none
    captions: str | None = None  # list of files and captions; null: captions.csv, .jsonl or .parquet in data.path
    file_column: str | None = None  # column of the files in that list; null: file, path, video, ..., or WebVid's
    caption_column: str | None = None  # column of the captions; null: caption, text, prompt or name
    frame_list: str | None = None  # joint training: images from this list instead of frames of the clips
    num_frames: int = 16  # F
    frame_interval: int = 3  # every n-th frame of the video
    image_size: int = 256  # side of the square, pixels
    num_images: int = 0  # I, extra images per clip (joint image-video training)
    num_workers: int = 4  # loader processes per rank
    worker_timeout_s: float = 600.0  # the run ends if a loader process is silent for this long
    reader: str = "auto"  # auto | pyav | decord
    horizontal_flip: bool | None = None  # mirror half of the clips; null: as in the data set's recipe
    max_pixels: int = MAX_PIXELS  # clips with larger frames are unusable, and refused before decoding
    short_clips: str = "skip"  # skip: a clip shorter than a window is unusable; loop: repeat it
    max_unusable: float = 0.5  # largest share of unusable clips before the run ends
    strict: bool = False  # stop at the first clip that cannot be used, instead of replacing it
    max_clips: int | None = None  # use only the first n clips

    @property
    def mirrors(self) -> bool:
        """Whether half of the clips are mirrored."""
        return RECIPES[self.name].horizontal_flip if self.horizontal_flip is None else self.horizontal_flip

    def __post_init__(self) -> None:
        check_limits(self, "data.", LIMITS)
        check_read_only_with(self, "data.", OWNERS)
        require(
            self.name != CAPTIONED or self.labels == "auto",
            f"data.labels={self.labels}: with data.name={self.name} captions replace labels",
        )
        if self.val_share:
            require(
                self.val_path is None,
                "data.val_share and data.val_path both select held-out clips: set only one of them",
            )
            require(
                self.frame_list is None,
                "data.val_share cannot tell which images of data.frame_list show held-out clips: "
                "set data.val_path instead",
            )
