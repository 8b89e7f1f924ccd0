"""Video data: folders of files -> clips. Not the Hugging Face package of the same name: see docs/datasets.md.

Nothing here imports another folder of ours, and video libraries are imported only when a file is opened.
"""

from .catalog import RECIPES, Catalog, Clip, build_catalog
from .clips import ClipDataset, DataConfig, build_dataset, build_held_out
from .readers import VideoError, open_video

__all__ = [
    "RECIPES",
    "Catalog",
    "Clip",
    "ClipDataset",
    "DataConfig",
    "VideoError",
    "build_catalog",
    "build_dataset",
    "build_held_out",
    "open_video",
]
