"""Quality beside speed on the demo network: methods, steps and guidance, as a table and a plot.

    python -m benchmarks quality [--videos 64] [--threads 1] [--out docs/benchmarks/sampling.json]

Every cell samples the same videos: the same noise, the same labels. Its cost is the network's forward passes for a
video, which no machine changes. Measured are the distance of the frames from the reference (the same noise, 250 steps
of DPM-Solver++: the solution of the probability flow; a stochastic method has none), how often the tracker of
demo/drawn.py names colour and motion as the label asks, and the Frechet distance to drawn clips on 24 plain
features of a clip. Beside --out lands the page, and the plot in docs/images. What --out holds already is not sampled
again: a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from engine import cli

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from sample.generate import Generator

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "assets" / "demo" / "latte"
PLOT = ROOT / "docs" / "images" / "sampling_quality.png"
STEPS = (5, 10, 15, 25, 50, 100, 250)
METHODS = ("ddim", "dpm_solver++", "unipc", "ddpm")
TITLES = {"ddim": "DDIM", "dpm_solver++": "DPM-Solver++", "unipc": "UniPC", "ddpm": "DDPM"}
STOCHASTIC = ("ddpm", "sde_dpm_solver++")
GUIDED = ("ddim", 25, 2.0)
INTERVALS = (None, (0.2, 0.8), (0.0, 0.6), (0.4, 1.0))
REAL = 1024  # drawn clips that stand for the data


class Cell(NamedTuple):
    """One way of sampling."""

    method: str
    steps: int
    scale: float = 1.0
    interval: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        """Its key in the file, and how it is called."""
        parts = [f"{TITLES[self.method]} {self.steps}"]
        parts += [f"guidance {self.scale:g}"] if self.scale != 1 else []
        parts += [f"at {self.interval[0]:g} to {self.interval[1]:g}"] if self.interval else []
        return ", ".join(parts)


REFERENCE = Cell("dpm_solver++", 250)


def cells() -> list[Cell]:
    """All of them, the reference first and dear ones last."""
    plain = [Cell(method, steps) for steps in STEPS for method in METHODS]
    method, steps, scale = GUIDED
    guided = [Cell(method, steps, scale, interval) for interval in INTERVALS]
    rest = sorted([*plain, *guided], key=lambda cell: cell.steps)
    return list(dict.fromkeys([REFERENCE, *rest]))


def main(argv: list[str]) -> int:
    """Measure what is missing, then write the page and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "docs/benchmarks/sampling.json", metavar="FILE", help="the figures")
    add(
        "--videos", type=int, default=64, metavar="N", help="of each cell, a multiple of 8: as many of every class (64)"
    )
    add("--threads", type=int, default=1, metavar="N", help="of the CPU (1)")
    add("--device", default="cpu", metavar="NAME")
    arguments = parser.parse_args(argv)
    if arguments.videos < 32 or arguments.videos % 8:
        raise ValueError(
            f"--videos {arguments.videos}: give a multiple of 8, at least 32, for distances of 24 features."
        )

    import torch

    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments.out, arguments.videos, arguments.device)
    bench.measure(cells())
    bench.facts["command"] = "python -m benchmarks quality " + shlex.join(argv)
    bench.save()
    arguments.out.with_suffix(".md").write_text(page(bench.facts, bench.rows))
    plot(
        bench.rows,
        PLOT if arguments.out.parent == PLOT.parents[1] / "benchmarks" else arguments.out.with_suffix(".png"),
    )
    print(f"{arguments.out.with_suffix('.md')} has the tables")
    return 0


class Bench:
    """The figures in a file, and what makes those that are missing."""

    def __init__(self, file: Path, videos: int, device: str) -> None:
        from sample.generate import Generator

        self.file = file
        self.videos = videos
        self.facts: dict[str, Any] = {"videos": videos, **machine()}
        self.rows: dict[str, dict[str, Any]] = {}
        if file.is_file():
            content = json.loads(file.read_text())
            if content.get("facts", {}).get("videos") != videos:
                raise ValueError(f"--out {file} holds figures of another number of videos: name another file.")
            self.facts, self.rows = content["facts"], content["rows"]  # of the run that is continued
        self.generator: Generator = Generator.from_checkpoint(CHECKPOINT, device=device)

    def measure(self, wanted: Iterable[Cell]) -> None:
        """Sample and measure every cell that is not in the file yet, and write the file after each."""
        from demo.drawn import CLASSES

        labels = [index % len(CLASSES) for index in range(self.videos)]
        real = features(drawn_clips(REAL))
        if not self.rows:
            self.rows["Drawn clips"] = quality(drawn_clips(self.videos, seed=1), labels, real)
        reference = None
        for cell in wanted:
            if cell.name in self.rows:
                continue
            exact = cell.method not in STOCHASTIC
            if exact and reference is None:
                reference = self.sample(REFERENCE)
            videos = reference if reference is not None and cell == REFERENCE else self.sample(cell)
            row = {**cell._asdict(), "forwards": forwards(cell), **quality(videos, labels, real)}
            away = difference(videos, reference) if exact and reference is not None else None
            row["grey_levels_from_reference"] = away
            self.rows[cell.name] = row
            self.save()
            print(f"{time.strftime('%H:%M:%S')} {cell.name}: {row}", flush=True)

    def sample(self, cell: Cell) -> np.ndarray:
        """The videos of a cell: uint8 (n, F, H, W, 3)."""
        settings: dict[str, Any] = {"method": cell.method, "steps": cell.steps, "guidance_scale": cell.scale}
        if cell.interval:
            settings["guidance_interval"] = cell.interval
        return self.generator.sample(num=self.videos, batch_size=32, seed=0, **settings)

    def save(self) -> None:
        """Write the file."""
        self.file.write_text(json.dumps({"facts": self.facts, "rows": self.rows}, indent=1) + "\n")


# --------------------------------------------------------------------------------------------- measures


def forwards(cell: Cell) -> float:
    """Forward passes of all layers for one video; guided evaluations have two."""
    from diffusion import DiffusionConfig, build_diffusion, list_evaluations

    process = build_diffusion(DiffusionConfig(), learn_sigma=False, respacing=str(cell.steps))
    times = [each.time / 1000 for each in list_evaluations(process, cell.method)]
    low, high = cell.interval or (0.0, 1.0)
    guided = sum(low <= each <= high for each in times) if cell.scale != 1 else 0
    return len(times) + guided


def quality(videos: np.ndarray, labels: list[int], real: Tensor) -> dict[str, float]:
    """What tracker and distance say of uint8 (n, F, H, W, 3)."""
    from demo.drawn import accuracy
    from evaluation.distances import frechet_distance

    named = accuracy(list(videos.transpose(0, 1, 4, 2, 3)), labels)
    distance = frechet_distance(real, features(videos))
    return {"colour": named["appearance_accuracy"], "motion": named["motion_accuracy"], "frechet": round(distance, 2)}


def features(videos: np.ndarray) -> Tensor:
    """(n, 24) of uint8 (n, F, H, W, 3): the mean colour of each quarter of the frame, and its mean change in time."""
    import torch
    import torch.nn.functional as F

    pixels = torch.from_numpy(videos).double().permute(0, 1, 4, 2, 3)  # (n, F, 3, H, W)
    quarters = F.adaptive_avg_pool2d(pixels.flatten(0, 1), 2).unflatten(0, pixels.shape[:2]).flatten(2)  # (n, F, 12)
    return torch.cat([quarters.mean(1), quarters.diff(dim=1).abs().mean(1)], 1)


def difference(videos: np.ndarray, reference: np.ndarray) -> float:
    """Root mean square difference in grey levels."""
    import numpy as np

    return round(float(np.sqrt(np.mean((videos.astype(np.float32) - reference) ** 2))), 3)


def drawn_clips(number: int, seed: int = 0) -> np.ndarray:
    """Clips of the data, the classes in turn: uint8 (n, 16, 32, 32, 3); a random window of each, as in training."""
    import numpy as np

    from demo.drawn import CLASSES, draw_clip

    rng = np.random.default_rng(seed)
    windows = []
    for index in range(number):
        clip = draw_clip(index % len(CLASSES), rng)
        start = rng.integers(len(clip) - 15)
        windows.append(clip[start : start + 16].transpose(0, 2, 3, 1))
    return np.stack(windows)


def machine() -> dict[str, str]:
    """Versions and commit."""
    import diffusers
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    hardware = f"{platform.machine()}, {os.cpu_count()} cores"
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    return {"hardware": hardware, "versions": versions, "commit": commit.stdout.strip()}


# ------------------------------------------------------------------------------------- table and plot


HEAD = """| way | forwards for a video | grey levels from the reference | colour right | motion right | Fréchet |
|---|---|---|---|---|---|"""


def line(name: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    away = row.get("grey_levels_from_reference")
    cells = [
        "" if away is None else f"{away:.2f}",
        f"{row['colour']:.1%}",
        f"{row['motion']:.1%}",
        f"{row['frechet']:.1f}",
    ]
    return f"| {name} | {row.get('forwards', '')} | " + " | ".join(cells) + " |"


def kind(row: dict[str, Any]) -> str:
    """To which table a row belongs."""
    if "method" not in row:
        return "data"
    return "guidance" if row["scale"] != 1 else "plain"


def table(rows: dict[str, dict[str, Any]], kinds: Iterable[str]) -> str:
    """The rows of those kinds, cheap ones first."""
    found = [(name, row) for name, row in rows.items() if kind(row) in kinds]
    found.sort(key=lambda item: item[1].get("forwards", 0))
    return "\n".join([HEAD, *(line(*each) for each in found)])


def page(facts: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    """docs/benchmarks/sampling.md but for what people write about it."""
    guided_beside = {
        name: row for name, row in rows.items() if name == Cell(*GUIDED[:2]).name or kind(row) == "guidance"
    }
    return f"""# Quality beside speed in sampling

{facts["hardware"]}, {facts["versions"]}; commit {facts["commit"]}; `{facts["command"]}`.
The demo network (`assets/demo/latte`, x-start prediction, 32 pixels), {facts["videos"]} videos of each way from the
same noise, so that one video is {100 / facts["videos"]:.1f} %. Cost is counted in forward passes of all layers, which
no machine changes. The reference is DPM-Solver++ in 250 steps, which solves the probability flow; a stochastic method
has none. The Fréchet distance is to {REAL} drawn clips, on 24 plain features (mean colour of each quarter of the frame,
and its mean change): it compares with nothing outside of this page. "Drawn clips" are as many others: the floor.

![Error, motion and distance over cost](../images/{PLOT.name})

## Methods and steps

{table(rows, ("plain", "data"))}

## Guidance in an interval of the noise levels ({TITLES[GUIDED[0]]}, {GUIDED[1]} steps)

{table(guided_beside, ("plain", "guidance"))}
"""


PANELS = {
    "grey_levels_from_reference": "grey levels from the reference",
    "motion": "motion right",
    "frechet": "Fréchet distance",
}
COLOURS = {"ddim": "#4c78a8", "dpm_solver++": "#e45756", "unipc": "#54a24b", "ddpm": "#b279a2"}


def plot(rows: dict[str, dict[str, Any]], file: Path) -> None:
    """Each measure over the forward passes of a video."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(PANELS), figsize=(12, 3.9), layout="constrained")
    for axes, (key, title) in zip(panels, PANELS.items(), strict=True):
        for method, colour in COLOURS.items():
            drawn = [row for row in rows.values() if kind(row) == "plain" and row["method"] == method]
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


if __name__ == "__main__":
    cli.run(main)
