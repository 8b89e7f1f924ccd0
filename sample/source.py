"""Checkpoints to sample from: ours, which contain their config, or official files, which do not."""

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
    """Weights to sample from: one of our checkpoint folders with its config, or a file with or without a config."""

    path: Path
    config: Config | None
    names: list[str] | None  # of the classes, if the checkpoint has them

    @classmethod
    def open(cls, path: str | Path) -> Source:
        """Opens and verifies one of our checkpoint or run folders, or a .pt/.safetensors file. Raises: ValueError."""
        path = Path(path)
        if path.is_file():
            return cls(path, None, None)
        folder = find_checkpoint(path)
        return cls(folder, load_config(folder / "config.yaml", saved=True), read_state(folder).get("class_names"))

    def require_classes(self, config: Config | None) -> Config:
        """Returns `config`. Raises: ValueError if it is None, or describes a text network."""
        if config is None:
            raise ValueError(f"{self.path} holds weights only: name the config of its network with --config.")
        require(
            not config.model.is_text,
            f"{self.path} is a text network: sample it with sample/sample_t2x.py --ckpt {self.path} --prompt TEXT.",
        )
        return config

    def class_names(self, config: Config) -> list[str] | None:
        """Returns the class names: the checkpoint's, else UCF101's if `config` is for UCF101, else None."""
        is_ucf101 = config.data.name == "ucf101" and config.model.num_classes == len(UCF101_CLASSES)
        return self.names or (UCF101_CLASSES if is_ucf101 else None)

    def weights(self, kind: str) -> dict[str, Tensor]:
        """Loads the `ema` or `raw` weights."""
        return (load_model_weights if self.path.is_file() else load_checkpoint_weights)(self.path, kind)

    def trained_config(self, config: Config, weights: Mapping[str, Tensor]) -> Config:
        """Returns `config` with the trained clip size: the checkpoint's, or that of the position tables in `weights`.

        Sizes without a table are unchanged.
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
        """Returns the file of the `ema` or `raw` weights."""
        return self.path if self.path.is_file() else weights_file(self.path, kind)


def sampling_config(source: Source, given: Config | None, settings: Mapping[str, Any], overrides: list[str]) -> Config:
    """Merges the configuration of a checkpoint, `given` (a YAML file) and the command line.

    Our checkpoints determine `model`, `diffusion`, `data` and `codec`; only `sample` and the codec's path are read from
    the YAML file. For an official file, the YAML file determines everything.

    Args:
        settings: keys of the `sample` section that override the YAML file.
        overrides: `section.key=value` pairs, which override everything.
    """
    tree = source.require_classes(source.config or given).to_dict()
    if source.config and given:
        tree["sample"] = given.to_dict()["sample"]
        if given.codec.path:
            tree["codec"] |= {key: getattr(given.codec, key) for key in ("path", "subfolder", "revision")}
    tree["sample"] |= settings
    return load_config(None, overrides, base=tree)
