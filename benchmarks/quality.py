"""Measures quality and cost of sampling with the demo network: methods, steps and guidance, as tables and a plot.

All rows sample the same videos: same noise, same labels. Cost is the network's forward passes per video, which do not
depend on the machine. Quality is the distance of the frames from the reference (same noise, 250 steps of DPM-Solver++,
which solves the probability flow; not defined for stochastic methods), how often the tracker of demo/drawn.py finds the
label's colour and motion, and the Fréchet distance to drawn clips over 24 simple features of a clip. Rows already in
--out's `sampling.json` are not sampled again, so a stopped run continues.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from demo.drawn import CLASSES, accuracy, draw_clip
from diffusion import DiffusionConfig, build_diffusion, list_evaluations
from evaluation.distances import frechet_distance
from sample.generate import Generator

from . import report
from .report import Panel, Table
from .timing import Row, Timer
from .workload import Workload

STEPS = (5, 10, 15, 25, 50, 100, 250)
METHODS = {"ddim": "DDIM", "dpm_solver++": "DPM-Solver++", "unipc": "UniPC", "ddpm": "DDPM"}  # DDPM is stochastic
VIDEOS = 64  # per row, a multiple of the number of classes
REAL = 1024  # drawn clips that represent the data
FLOOR = "Drawn clips"
FORWARDS, AWAY, COLOUR, MOTION, FRECHET = HEADS = ("forwards", "grey levels", "colour right", "motion right", "Fréchet")


class Cell(NamedTuple):
    """A method with its steps and guidance."""

    method: str
    steps: int
    scale: float = 1.0
    interval: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        """Name of its row."""
        parts = [f"{METHODS[self.method]} {self.steps}"]
        parts += [f"guidance {self.scale:g}"] if self.scale != 1 else []
        parts += [f"at {self.interval[0]:g} to {self.interval[1]:g}"] if self.interval else []
        return ", ".join(parts)

    def count_forwards(self) -> int:
        """Counts the forward passes for one video; guided evaluations take two."""
        process = build_diffusion(DiffusionConfig(), learn_sigma=False, respacing=str(self.steps))
        times = [time / 1000 for time in list_evaluations(process, self.method)]
        low, high = self.interval or (0.0, 1.0)
        return len(times) + (sum(low <= each <= high for each in times) if self.scale != 1 else 0)


REFERENCE = Cell("dpm_solver++", 250)
PLAIN = [Cell(method, steps) for steps in STEPS for method in METHODS]
INTERVALS = ((0.2, 0.8), (0.0, 0.6), (0.4, 1.0), None)
GUIDED = [Cell("ddim", 25), *(Cell("ddim", 25, 2.0, interval) for interval in INTERVALS)]


class Measurement:
    """Samples the videos of a cell and measures them; network and clips are loaded on first use."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @cached_property
    def generator(self) -> Generator:
        return Generator.from_checkpoint(report.ROOT / "assets" / "demo" / "latte", device=self.device)

    @cached_property
    def real(self) -> Tensor:
        return compute_features(draw_clips(REAL))

    @cached_property
    def reference(self) -> np.ndarray:
        return self.sample(REFERENCE)

    def sample(self, cell: Cell) -> np.ndarray:
        """Returns the videos, uint8 (n, F, H, W, 3)."""
        settings: dict[str, Any] = {"guidance_interval": cell.interval} if cell.interval else {}
        settings |= {"method": cell.method, "steps": cell.steps, "guidance_scale": cell.scale}
        return self.generator.sample(num=VIDEOS, batch_size=32, seed=0, **settings)

    def measure(self, cell: Cell) -> Row:
        """Returns the row of a cell."""
        videos = self.reference if cell == REFERENCE else self.sample(cell)
        row = {FORWARDS: cell.count_forwards(), **self.judge(cell.name, videos)}
        if cell.method != "ddpm":
            row[AWAY] = float(np.sqrt(np.mean((videos.astype(np.float32) - self.reference) ** 2)))
        return row

    def judge(self, name: str, videos: np.ndarray) -> Row:
        """Returns accuracy and Fréchet distance of uint8 (n, F, H, W, 3)."""
        labels = [index % len(CLASSES) for index in range(VIDEOS)]
        named = accuracy(list(videos.transpose(0, 1, 4, 2, 3)), labels)
        right = {COLOUR: named["appearance_accuracy"], MOTION: named["motion_accuracy"]}
        distance = frechet_distance(self.real, compute_features(videos))
        return {"": name, **right, FRECHET: distance, "videos": VIDEOS, "commit": report.find_commit()}


def compute_features(videos: np.ndarray) -> Tensor:
    """Returns (n, 24) of uint8 (n, F, H, W, 3): mean colour of each quarter of the frame, and its mean change."""
    pixels = torch.from_numpy(videos).double().permute(0, 1, 4, 2, 3)  # (n, F, 3, H, W)
    quarters = F.adaptive_avg_pool2d(pixels.flatten(0, 1), 2).unflatten(0, pixels.shape[:2]).flatten(2)  # (n, F, 12)
    return torch.cat([quarters.mean(1), quarters.diff(dim=1).abs().mean(1)], 1)


def draw_clips(number: int, seed: int = 0) -> np.ndarray:
    """Returns random windows of drawn clips, cycling through the classes, uint8 (n, 16, 32, 32, 3)."""
    rng = np.random.default_rng(seed)
    windows = []
    for index in range(number):
        clip = draw_clip(index % len(CLASSES), rng)
        start = rng.integers(len(clip) - 15)
        windows.append(clip[start : start + 16].transpose(0, 2, 3, 1))
    return np.stack(windows)


def quality(workload: Workload, timer: Timer, arguments: argparse.Namespace) -> Iterator[Table]:
    """Yields the tables of methods and of guidance, row by row, and draws the plot."""
    torch.set_num_threads(arguments.threads or 1)
    rows = report.read_rows(arguments.out / "sampling.json")
    measurement = Measurement(timer.device)
    if FLOOR not in rows:
        rows[FLOOR] = measurement.judge(FLOOR, draw_clips(VIDEOS, seed=1))
    text = f"{VIDEOS} videos per row, so one video counts {100 / VIDEOS:.1f} %."
    tables = (
        Table("Methods and steps", text, HEADS, [rows[FLOOR]], "sampling.png"),
        Table("Guidance in an interval of the noise levels (DDIM, 25 steps)", text, HEADS),
    )
    for table, cells in zip(tables, (PLAIN, GUIDED)):
        for cell in cells:
            rows[cell.name] = rows.get(cell.name) or measurement.measure(cell)
            table.rows.append(rows[cell.name])
            yield table
        commits = sorted({row["commit"] for row in table.rows})
        table.text += f" Sampled at commit {', '.join(commits)}."
    panels = []
    for head, logarithmic in ((FRECHET, "xy"), (MOTION, "x"), (AWAY, "xy")):  # against forward passes per video
        lines: dict[str, tuple[Any, Any]] = {}
        for method, title in METHODS.items():
            found = [rows[cell.name] for cell in PLAIN if cell.method == method]
            points = [(row[FORWARDS], row[head]) for row in found if row.get(head)]
            lines[title] = ([x for x, _ in points], [y for _, y in points])
        if head != AWAY:
            lines["drawn clips"] = (STEPS, [rows[FLOOR][head]] * len(STEPS))
        panels.append(Panel(head, lines, "forward passes for a video", logarithmic))
    report.plot(panels, arguments.out / "sampling.png")
