"""Quality and cost of sampling with the demo network: methods, steps and guidance, as a table and a plot.

Every cell samples the same videos: the same noise, the same labels. Its cost is the network's forward passes for a
video, independent of the machine. Measured are the distance of the frames from the reference (the same noise, 250 steps
of DPM-Solver++: the solution of the probability flow; a stochastic method has none), how often the tracker of
demo/drawn.py names colour and motion of the label, and the Fréchet distance to drawn clips on 24 plain features of a
clip. Cells in `sampling.json` of --out are not sampled again, so a stopped run continues.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
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

CHECKPOINT = report.ROOT / "assets" / "demo" / "latte"
PLOT = report.ROOT / "docs" / "images" / "sampling_quality.png"
STEPS = (5, 10, 15, 25, 50, 100, 250)
METHODS = ("ddim", "dpm_solver++", "unipc", "ddpm")
TITLES = {"ddim": "DDIM", "dpm_solver++": "DPM-Solver++", "unipc": "UniPC", "ddpm": "DDPM"}
STOCHASTIC = ("ddpm", "sde_dpm_solver++")
GUIDED = ("ddim", 25, 2.0)
INTERVALS = (None, (0.2, 0.8), (0.0, 0.6), (0.4, 1.0))
REAL = 1024  # drawn clips that represent the data


class Cell(NamedTuple):
    """A method with its steps and guidance."""

    method: str
    steps: int
    scale: float = 1.0
    interval: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        """Its key in the file and its label."""
        parts = [f"{TITLES[self.method]} {self.steps}"]
        parts += [f"guidance {self.scale:g}"] if self.scale != 1 else []
        parts += [f"at {self.interval[0]:g} to {self.interval[1]:g}"] if self.interval else []
        return ", ".join(parts)


REFERENCE = Cell("dpm_solver++", 250)


def list_cells() -> list[Cell]:
    """Returns all cells, the reference first, then by cost."""
    plain = [Cell(method, steps) for steps in STEPS for method in METHODS]
    method, steps, scale = GUIDED
    guided = [Cell(method, steps, scale, interval) for interval in INTERVALS]
    rest = sorted([*plain, *guided], key=lambda cell: cell.steps)
    return list(dict.fromkeys([REFERENCE, *rest]))


def run(arguments: argparse.Namespace) -> None:
    """Measures the missing cells, then writes the page and the plot."""
    if arguments.videos < 32 or arguments.videos % 8:
        raise ValueError(f"--videos must be a multiple of 8 and at least 32, got {arguments.videos}.")
    torch.set_num_threads(arguments.threads or 1)
    file = arguments.out / "sampling.json"
    facts: dict[str, Any] = {"videos": arguments.videos, **report.facts()}
    rows: dict[str, dict[str, Any]] = {}
    if file.is_file():
        content = json.loads(file.read_text())
        if content.get("facts", {}).get("videos") != arguments.videos:
            raise ValueError(f"{file} holds figures of another number of videos: use another --out.")
        facts, rows = content["facts"], content["rows"]  # of the run that is continued
    arguments.out.mkdir(parents=True, exist_ok=True)
    for row in measure(rows, arguments.videos, arguments.device or "cpu"):
        file.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
        sys.stdout.write(f"{time.strftime('%H:%M:%S')} {row}\n")
        sys.stdout.flush()
    picture = PLOT if arguments.out.resolve() == PLOT.parents[1] / "benchmarks" else file.with_suffix(".png")
    file.with_suffix(".md").write_text(build_page(facts, rows))
    plot(rows, picture)
    sys.stdout.write(f"written: {file.with_suffix('.md')}, {file}, {picture}\n")


def measure(rows: dict[str, dict[str, Any]], count: int, device: str) -> Iterable[dict[str, Any]]:
    """Adds the missing rows; yields each once it is there."""
    generator = Generator.from_checkpoint(CHECKPOINT, device=device)
    labels = [index % len(CLASSES) for index in range(count)]
    real = compute_features(draw_clips(REAL))

    def sample(cell: Cell) -> np.ndarray:
        settings: dict[str, Any] = {"method": cell.method, "steps": cell.steps, "guidance_scale": cell.scale}
        if cell.interval:
            settings["guidance_interval"] = cell.interval
        return generator.sample(num=count, batch_size=32, seed=0, **settings)

    if not rows:
        rows["Drawn clips"] = measure_quality(draw_clips(count, seed=1), labels, real)
    reference = None
    for cell in list_cells():
        if cell.name in rows:
            continue
        exact = cell.method not in STOCHASTIC
        if exact and reference is None:
            reference = sample(REFERENCE)
        videos = reference if reference is not None and cell == REFERENCE else sample(cell)
        row = {**cell._asdict(), "forwards": count_forwards(cell), **measure_quality(videos, labels, real)}
        away = rms_difference(videos, reference) if exact and reference is not None else None
        row["grey_levels_from_reference"] = away
        rows[cell.name] = row
        yield {"": cell.name, **row}


def count_forwards(cell: Cell) -> float:
    """Counts the forward passes for one video; guided evaluations have two."""
    process = build_diffusion(DiffusionConfig(), learn_sigma=False, respacing=str(cell.steps))
    times = [time / 1000 for time in list_evaluations(process, cell.method)]
    low, high = cell.interval or (0.0, 1.0)
    guided = sum(low <= each <= high for each in times) if cell.scale != 1 else 0
    return len(times) + guided


def measure_quality(videos: np.ndarray, labels: list[int], real: Tensor) -> dict[str, float]:
    """Returns accuracy and Fréchet distance of uint8 (n, F, H, W, 3)."""
    named = accuracy(list(videos.transpose(0, 1, 4, 2, 3)), labels)
    distance = frechet_distance(real, compute_features(videos))
    return {"colour": named["appearance_accuracy"], "motion": named["motion_accuracy"], "frechet": round(distance, 2)}


def compute_features(videos: np.ndarray) -> Tensor:
    """Returns (n, 24) of uint8 (n, F, H, W, 3): the mean colour of each quarter of the frame, and its mean change."""
    pixels = torch.from_numpy(videos).double().permute(0, 1, 4, 2, 3)  # (n, F, 3, H, W)
    quarters = F.adaptive_avg_pool2d(pixels.flatten(0, 1), 2).unflatten(0, pixels.shape[:2]).flatten(2)  # (n, F, 12)
    return torch.cat([quarters.mean(1), quarters.diff(dim=1).abs().mean(1)], 1)


def rms_difference(videos: np.ndarray, reference: np.ndarray) -> float:
    """Returns the root mean square difference in grey levels."""
    return round(float(np.sqrt(np.mean((videos.astype(np.float32) - reference) ** 2))), 3)


def draw_clips(number: int, seed: int = 0) -> np.ndarray:
    """Draws random windows of clips of the classes in turn, as in training: uint8 (n, 16, 32, 32, 3)."""
    rng = np.random.default_rng(seed)
    windows = []
    for index in range(number):
        clip = draw_clip(index % len(CLASSES), rng)
        start = rng.integers(len(clip) - 15)
        windows.append(clip[start : start + 16].transpose(0, 2, 3, 1))
    return np.stack(windows)


HEADS = {
    "": "",
    "forwards for a video": "",
    "grey levels from the reference": ".2f",
    "colour right": ".1%",
    "motion right": ".1%",
    "Fréchet": ".1f",
}
KEYS = ("forwards", "grey_levels_from_reference", "colour", "motion", "frechet")


def kind_of(row: dict[str, Any]) -> str:
    """Returns the table that a row belongs to."""
    if "method" not in row:
        return "data"
    return "guidance" if row["scale"] != 1 else "plain"


def build_table(title: str, rows: dict[str, dict[str, Any]], names: Iterable[str]) -> str:
    """Formats the rows of those names, cheap ones first."""
    chosen = sorted(names, key=lambda name: rows[name].get("forwards", 0))
    cells = [{"": name, **dict(zip(list(HEADS)[1:], map(rows[name].get, KEYS)))} for name in chosen]
    return report.Section(title, "", HEADS, cells).markdown()


def build_page(facts: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    """Formats docs/benchmarks/sampling.md."""
    guided = [name for name, row in rows.items() if name == Cell(*GUIDED[:2]).name or kind_of(row) == "guidance"]
    plain = [name for name, row in rows.items() if kind_of(row) in ("plain", "data")]
    title = f"Guidance in an interval of the noise levels ({TITLES[GUIDED[0]]}, {GUIDED[1]} steps)"
    return f"""# Sampling quality and cost

{report.describe(facts)}

The demo network (`assets/demo/latte`, x-start prediction, 32 pixels), {facts["videos"]} videos of each way from the
same noise, so that one video is {100 / facts["videos"]:.1f} %. Cost is counted in forward passes of all layers,
independent of the machine. The reference is DPM-Solver++ in 250 steps, which solves the probability flow; a stochastic
method has none. The Fréchet distance is to {REAL} drawn clips, on 24 plain features (mean colour of each quarter of the
frame, and its mean change): it is comparable within this page only. "Drawn clips" are as many others: the floor.

![Error, motion and distance over cost](../images/{PLOT.name})

{build_table("Methods and steps", rows, plain)}
{build_table(title, rows, guided)}"""


PANELS = {
    "grey_levels_from_reference": "grey levels from the reference",
    "motion": "motion right",
    "frechet": "Fréchet distance",
}
COLOURS = {"ddim": "#4c78a8", "dpm_solver++": "#e45756", "unipc": "#54a24b", "ddpm": "#b279a2"}


def plot(rows: dict[str, dict[str, Any]], file: Path) -> None:
    """Plots each measure over the forward passes of a video."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(PANELS), figsize=(12, 3.9), layout="constrained")
    for axes, (key, title) in zip(panels, PANELS.items(), strict=True):
        for method, colour in COLOURS.items():
            drawn = [row for row in rows.values() if kind_of(row) == "plain" and row["method"] == method]
            points = sorted((row["forwards"], row[key]) for row in drawn if row[key] not in (None, 0))
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=TITLES[method], markersize=5, linewidth=1.4)
        if key != "grey_levels_from_reference":
            axes.axhline(rows["Drawn clips"][key], color="#888", linewidth=1, linestyle="--", label="drawn clips")
        axes.set(xlabel="forward passes for a video", title=title, xscale="log")
        axes.set_xticks(STEPS, [str(each) for each in STEPS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    for axes, ticks in ((panels[0], (0.2, 0.5, 1, 2, 5, 10, 20)), (panels[2], (100, 200, 500, 1000, 2000, 5000))):
        axes.set_yscale("log")
        axes.set_yticks(ticks, [str(each) for each in ticks])
        axes.minorticks_off()
    panels[1].set_yticks((0.90, 0.95, 1.0), ("90 %", "95 %", "100 %"))
    panels[1].set_ylim(min(0.9, *(row["motion"] for row in rows.values())) - 0.005, 1.005)
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)
