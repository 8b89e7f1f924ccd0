"""Sources to sample from: a checkpoint of ours, which contains its config, or an official file, which does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.checkpoint import find_checkpoint, read_state, weights_file
from engine.config import Config, load_config
from engine.weights import load_checkpoint_weights, load_model_weights


@dataclass(frozen=True)
class Source:
    """A checkpoint to sample from: a folder of ours with its config, or an official file without."""

    path: Path
    config: Config | None
    class_names: list[str] | None

    @classmethod
    def open(cls, path: str | Path) -> Source:
        """Opens and verifies a checkpoint or run folder of ours, or a .pt/.safetensors file.

        Raises:
            ValueError: there is no sound checkpoint; the message names the file.
        """
        path = Path(path)
        if path.is_file():
            return cls(path, None, None)
        folder = find_checkpoint(path)
        return cls(folder, load_config(folder / "config.yaml", saved=True), read_state(folder).get("class_names"))

    def weights(self, kind: str) -> dict[str, Tensor]:
        """Loads the `ema` or the `raw` weights."""
        if self.config is None:
            return load_model_weights(self.path, kind)
        return load_checkpoint_weights(self.path, kind)

    def weights_file(self, kind: str) -> Path:
        """Returns the file of those weights."""
        return self.path if self.config is None else weights_file(self.path, kind)


def sampling_config(
    source: Source, yaml: str | Path | None, settings: Mapping[str, Any], overrides: list[str]
) -> Config:
    """Merges the configuration of a checkpoint, a YAML file and the command line.

    A checkpoint of ours determines `model`, `diffusion`, `data` and `codec`; of the YAML file only the `sample`
    section and `codec.path` are read. For an official file the YAML file determines everything.

    Args:
        settings: keys of the `sample` section that override the YAML file.
        overrides: `section.key=value`, which override everything.
    """
    given = load_config(yaml) if yaml else None
    base = source.config or given
    if base is None:
        raise ValueError(f"{source.path} holds weights only: name the config of its network with --config.")
    tree = base.to_dict()
    if source.config and given:
        tree["sample"] = given.to_dict()["sample"]
        if given.codec.path:
            tree["codec"] |= {key: getattr(given.codec, key) for key in ("path", "subfolder", "revision")}
    tree["sample"] |= settings
    return load_config(None, overrides, base=tree)
