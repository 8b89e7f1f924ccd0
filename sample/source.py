"""Sources to sample from: a checkpoint of ours, which contains its config, or an official file, which does not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from common.checks import require
from engine.checkpoint import find_checkpoint, read_state, weights_file
from engine.config import Config, load_config
from engine.weights import load_checkpoint_weights, load_model_weights

from .labels import UCF101_CLASSES


@dataclass(frozen=True)
class Source:
    """Weights to sample from: the folder of a checkpoint of ours with its config, or a file with or without one."""

    path: Path
    config: Config | None
    names: list[str] | None  # of the classes, where the checkpoint has them

    @classmethod
    def open(cls, path: str | Path) -> Source:
        """Opens and verifies a checkpoint or run folder of ours, or a .pt/.safetensors file. Raises: ValueError."""
        path = Path(path)
        if path.is_file():
            return cls(path, None, None)
        folder = find_checkpoint(path)
        return cls(folder, load_config(folder / "config.yaml", saved=True), read_state(folder).get("class_names"))

    def require_classes(self, config: Config | None) -> Config:
        """Returns `config`. Raises: ValueError if there is none, or it is that of a text network."""
        if config is None:
            raise ValueError(f"{self.path} holds weights only: name the config of its network with --config.")
        require(
            not config.model.is_text,
            f"{self.path} is a text network: sample/sample_t2x.py --ckpt {self.path} --prompt TEXT samples it.",
        )
        return config

    def class_names(self, config: Config) -> list[str] | None:
        """Returns the class names of the network: the checkpoint's, or of a data set whose classes are fixed."""
        is_ucf101 = config.data.name == "ucf101" and config.model.num_classes == len(UCF101_CLASSES)
        return self.names or (UCF101_CLASSES if is_ucf101 else None)

    def weights(self, kind: str) -> dict[str, Tensor]:
        """Loads the `ema` or the `raw` weights."""
        return (load_model_weights if self.path.is_file() else load_checkpoint_weights)(self.path, kind)

    def trained_config(self, config: Config, weights: Mapping[str, Tensor]) -> Config:
        """Returns `config` with the trained clip size: the checkpoint's, or that of the position tables in `weights`.

        Sizes without a table stay as they are.
        """
        if self.config is not None:
            trained = self.config.data
            sizes: dict[str, Any] = {"num_frames": trained.num_frames, "image_size": trained.image_size}
        else:  # tables (1, N, D) and (1, F, D)
            tables = {name: weights[f"{name}_embed"] for name in ("pos", "temp") if f"{name}_embed" in weights}
            counts = {name: table.shape[1] for name, table in tables.items() if table.ndim == 3}
            sizes = {"image_size": math.isqrt(counts["pos"]) * config.pixels_per_token} if "pos" in counts else {}
            sizes |= {"num_frames": counts["temp"] * config.model.frames_per_token} if "temp" in counts else {}
        return replace(config, data=replace(config.data, **sizes))

    def weights_file(self, kind: str) -> Path:
        """Returns the file of those weights."""
        return self.path if self.path.is_file() else weights_file(self.path, kind)


def sampling_config(source: Source, given: Config | None, settings: Mapping[str, Any], overrides: list[str]) -> Config:
    """Merges the configuration of a checkpoint, `given` (a YAML file) and the command line.

    A checkpoint of ours determines `model`, `diffusion`, `data` and `codec`; of the YAML file only the `sample`
    section and `codec.path` are read. For an official file the YAML file determines everything.

    Args:
        settings: keys of the `sample` section that override the YAML file.
        overrides: `section.key=value`, which override everything.
    """
    tree = source.require_classes(source.config or given).to_dict()
    if source.config and given:
        tree["sample"] = given.to_dict()["sample"]
        if given.codec.path:
            tree["codec"] |= {key: getattr(given.codec, key) for key in ("path", "subfolder", "revision")}
    tree["sample"] |= settings
    return load_config(None, overrides, base=tree)
