"""Video data: folders of files -> clips. Not the Hugging Face package of the same name: see docs/datasets.md.

Nothing here imports another folder of ours, and video libraries are imported only when a file is opened.
"""

from .build import build_catalog, build_dataset, build_held_out
from .catalog import Catalog, Clip
from .clips import ClipDataset
from .config import DataConfig
from .readers import VideoError, open_video
from .recipes import RECIPES

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
