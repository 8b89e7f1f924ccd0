"""Recipes: layout on disk, labels and transform of each data set."""

from __future__ import annotations

from dataclasses import dataclass

CAPTIONED = "captions"  # the data set whose clips have captions instead of classes
VIDEOS, FRAMES, ARRAYS = "video files", "folders of frames", "sample arrays (000000.npy)"


@dataclass(frozen=True)
class Recipe:
    """How to read one data set: kinds of clips, rule for labels, transform.

    If a folder holds no clips of these kinds, video files and folders of frames are both accepted, so a prepared copy
    of a data set can be read with the same recipe.
    """

    clips: tuple[str, ...]
    labels: str
    transform: str
    horizontal_flip: bool


RECIPES: dict[str, Recipe] = {
    "ffs": Recipe((VIDEOS,), "none", "resize_then_center_crop", True),
    "sky": Recipe((FRAMES,), "none", "center_crop_then_resize", False),
    "taichi": Recipe((FRAMES,), "none", "resize_then_center_crop", True),
    "ucf101": Recipe((VIDEOS,), "class_folders", "resize_then_center_crop", True),
    "folder": Recipe((VIDEOS, FRAMES), "auto", "resize_then_center_crop", False),
    # No flip: a mirrored "moves left" would keep its label but move right.
    "demo": Recipe((VIDEOS,), "class_folders", "resize_then_center_crop", False),
    # Clips named in a list of captions; a clip's label is the number of its caption. No flip: captions may say left
    # and right.
    CAPTIONED: Recipe((VIDEOS, FRAMES), CAPTIONED, "resize_then_center_crop", False),
}
LABEL_CHOICES = ("auto", "class_folders", "file_name", "none")  # of `data.labels`; see labels.LABEL_RULES
# folder name -> split, in any data set
SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training", "sky_train"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "sky_val"), "val"),
    **dict.fromkeys(("test", "testing", "sky_test"), "test"),
}
