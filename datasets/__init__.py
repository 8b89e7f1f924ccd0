"""Video data: folders of files -> clips. Not the Hugging Face package of the same name: see docs/datasets.md.

Imports only `common` from this repository. Video libraries are imported when the first file is opened.
"""

from .build import build_catalog, build_dataset, build_held_out
from .catalog import Catalog, Clip
from .clips import ClipDataset
from .config import DataConfig
from .readers import VideoError, open_video
from .recipes import RECIPES
