"""A training's run or checkpoint as what `sample_t2x.py` samples: a Latte folder of links, and its config's sampler."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.checks import require
from engine.checkpoint import find_checkpoint, load_checkpoint_config
from engine.config import Config

from .t2v_export import describe_scheduler, export_run

METHODS = {"auto": "DDPM", "ddpm": "DDPM", "ddim": "DDIM"}  # sample.method -> sample_method


@dataclass(frozen=True)
class TrainedRun:
    """A checkpoint of a text network, and its config."""

    checkpoint: Path
    config: Config

    @classmethod
    def open(cls, path: str) -> TrainedRun:
        """The newest checkpoint of a run, or one.

        Raises: ValueError, one sentence, where there is none, or it is of another network.
        """
        checkpoint = find_checkpoint(Path(path))
        config = load_checkpoint_config(checkpoint)
        assert config is not None  # of a folder
        require(config.model.is_text, f"ckpt={path} is no text network: sample it with sample/sample.py.")
        require(
            config.model.name != "custom-t2i",
            f"ckpt={path} is an image network, a start for training: give it to train.init_from.",
        )
        describe_scheduler(config)  # or there is no sampler for it
        return cls(checkpoint, config)

    def settings(self) -> dict[str, Any]:
        """What its config says, by the keys of `T2XConfig`."""
        sample, data = self.config.sample, self.config.data
        return {
            "video_length": data.num_frames,
            "image_size": [data.image_size, data.image_size],
            "clean_caption": self.config.text.clean_captions,
            "sample_method": METHODS[sample.method],
            "num_sampling_steps": sample.steps,
            "eta": sample.eta,
            "guidance_scale": sample.guidance_scale,
            "precision": sample.precision,
            "decode_chunk_size": self.config.codec.chunk_size,
            "fps": sample.fps,
        }

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A Latte folder of links to its files, for a while."""
        with tempfile.TemporaryDirectory(prefix="latte-") as scratch:
            folder = Path(scratch) / "latte"
            export_run(self.checkpoint, folder, weights=self.config.sample.weights, link=True)
            yield folder
