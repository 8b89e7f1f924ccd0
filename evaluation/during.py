"""A metric during training: the Frechet distance between samples and held-out clips.

Use it only to compare steps of one run, which share noise, labels and clips: the value depends on the number of
samples, and is too large for few. For numbers to publish, evaluate a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from common.checks import require
from datasets import build_held_out
from engine.callbacks import Observation, agree, attempt
from engine.config import Config
from engine.objective import Objective
from engine.run import Run
from engine.state import TrainState
from engine.validation import spread
from sample.generate import to_uint8
from sample.preview import build_generator, map_chunks, sample_chunk

from .detectors import DETECTORS, Detector, load_detector
from .distances import frechet_distance

METRICS = {"fvd", "fid"}  # a detector must support one of these


class Metric:
    """The callback `metric`: samples `monitor.metric_videos` videos of the EMA with the settings of `sample`.

    Raises: ValueError for an unknown detector, or one without features for a Frechet distance.
    """

    kind = "metric"

    def __init__(self, config: Config) -> None:
        self.every = config.monitor.metric_every
        self.config = config
        self.detector: Detector | None = None
        self.real: Tensor | None = None
        if self.every:
            name = config.monitor.metric_detector
            fitting = [spec.name for spec in DETECTORS.values() if METRICS & set(spec.metrics)]
            require(name in fitting, f"monitor.metric_detector={name} is not one of {', '.join(fitting)}.")

    def prepare(self, run: Run, state: TrainState, objective: Objective) -> list[str]:
        """Loads the detector, tests it on a black clip and selects held-out clips; the first observation reads them."""
        monitor, data = self.config.monitor, self.config.data
        self.detector = load_detector(
            str(monitor.metric_detector),
            str(monitor.metric_detector_path),
            sha256=monitor.metric_detector_sha256,
            device=run.world.device,
        )
        self.features(np.zeros((1, data.num_frames, data.image_size, data.image_size, 3), np.uint8))
        self.clips = build_held_out(replace(data, latents=None), run.clips, seed=self.config.train.seed)
        self.indices = spread(len(self.clips), monitor.metric_videos)
        require(len(self.indices) > 1, f"monitor.metric_every needs at least two held-out clips in {data.path}.")
        return [
            f"metric: {monitor.metric_videos} samples against {len(self.indices)} held-out clips of "
            f"{self.clips.catalog.root}, detector {self.detector.name}, sha256 {self.detector.sha256}"
        ]

    def observe(self, run: Run, state: TrainState, objective: Objective) -> Observation:
        """Returns the distance as `ema/frechet_<detector>`, and the numbers of videos and clips."""
        if self.real is None:
            self.real = self._shared(run, self.indices, self._read_clips)
        generator, count = build_generator(self.config, state.ema.model, objective), self.config.monitor.metric_videos
        fake, real = self._shared(run, range(count), lambda some: sample_chunk(run, generator, some)), self.real
        distance = attempt(run, lambda: frechet_distance(real, fake) if run.world.is_main else 0.0)
        name = f"ema/frechet_{self.config.monitor.metric_detector}"
        return Observation({name: distance, "videos": count, "clips": len(self.indices)}, f"{name} {distance:.4g}")

    def _read_clips(self, indices: Sequence[int]) -> np.ndarray:
        """Reads the fixed window of each clip in `indices`: uint8 (n, F, H, W, 3)."""
        frames = self.config.data.num_frames
        return to_uint8(torch.stack([self.clips[0, index]["video"][:frames] for index in indices]))

    def features(self, videos: np.ndarray) -> Tensor:
        """Maps uint8 (n, F, H, W, 3) to features: (n, D) for clip detectors, (n F, D) for frame detectors."""
        assert self.detector is not None
        pixels = torch.from_numpy(videos).permute(0, 1, 4, 2, 3)
        return self.detector(pixels if self.detector.input == "clip" else pixels.flatten(0, 1))

    def _shared(self, run: Run, indices: Sequence[int], videos: Callable[[Sequence[int]], np.ndarray]) -> Tensor:
        """Returns the features of `videos(indices)` on every rank; each rank computes a part."""

        def work(part: Sequence[int], size: int) -> Tensor:
            pixels, rows = videos(part), []
            for number in range(size):  # one at a time, to save memory; the same count on every rank
                rows += [self.features(pixels[number : number + 1])] if number < len(pixels) else []
                agree(run)
            return torch.cat(rows)

        return torch.cat(map_chunks(run, indices, work))
