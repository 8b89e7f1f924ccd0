"""The paper's comparisons (section 4.3) under one budget: train every arm from the same seeds, then table and curves.

    python -m tools.ablate configs/ablations/*.yaml --base configs/demo/demo_train.yaml --steps 600 --seeds 0 1

Each file names arms, and each arm the keys in which it differs from --base; trailing section.key=value count for all
arms. An arm is an ordinary training run (train.py, or train_with_img.py where it has images) in
OUT/runs/<arm>-seed<N>, so the same command continues an interrupted comparison, and arms that are equal are trained
once. With one seed, all arms see the same clips, timesteps and noise. Writes OUT/ablations.md, .json and a plot each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

import statistics

import numpy as np
import torch

from demo.drawn import accuracy
from engine import cli
from engine.build import build_model, count_parameters, macs_per_clip
from engine.config import Config, load_config, read_yaml
from engine.errors import PREEMPTED_EXIT
from sample.generate import Generator
from sample.labels import choose_labels
from sample.video_io import slug

BASELINE = "base"  # the run of an arm that changes nothing
JOINT_DEPTH = 9 / 11  # two-attention blocks (22 width^2 parameters) per one-attention block (18 width^2)
LOOKS = 6  # validations of a run
VAL_SHARE = 0.1
ACCURACIES = {"appearance_accuracy": "colour right", "motion_accuracy": "motion right"}


@dataclass(frozen=True)
class Arm:
    """One line of a comparison: its name, and the `section.key=value` in which it differs from the base."""

    name: str
    overrides: tuple[str, ...]

    @property
    def run(self) -> str:
        """Name of its run folder: equal arms have one."""
        return (
            slug("-".join(each.rpartition(".")[2] for each in sorted(self.overrides))) if self.overrides else BASELINE
        )


@dataclass(frozen=True)
class Comparison:
    """One file: a title and its arms."""

    name: str
    title: str
    arms: tuple[Arm, ...]


@dataclass(frozen=True)
class Budget:
    """The settings that all arms share."""

    base: Path
    out: Path
    steps: int
    seeds: tuple[int, ...]
    processes: int
    videos: int
    overrides: tuple[str, ...]


def read_comparison(path: Path) -> Comparison:
    """The comparison in a YAML file: `title`, and `arms`, each with the dotted keys in which it differs.

    Raises:
        FileNotFoundError, ValueError: one sentence that names the file.
    """
    found = read_yaml(path)
    good = isinstance(found, dict) and set(found) == {"title", "arms"} and isinstance(found["arms"], dict)
    if not good or not all(isinstance(keys, dict) for keys in found["arms"].values()):
        raise ValueError(f"{path}: a comparison has a `title` and `arms`, and each arm has keys (or {{}}).")
    if len(found["arms"]) < 2:
        raise ValueError(f"{path}: there must be two arms or more to compare.")
    arms = tuple(Arm(name, tuple(_override(key, keys[key]) for key in keys)) for name, keys in found["arms"].items())
    return Comparison(path.stem, str(found["title"]), arms)


def _override(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value) if not isinstance(value, str) else value}"


def overrides_of(arm: Arm, seed: int, budget: Budget) -> list[str]:
    """Returns the overrides of the base's YAML for `arm` and `seed`. Raises: ValueError for settings not allowed."""
    ours = [
        f"train.seed={seed}",
        f"train.max_steps={budget.steps}",
        f"train.output_dir={budget.out / 'runs' / f'{arm.run}-seed{seed}'}",
        f"train.log_every={max(1, budget.steps // 60)}",
        f"train.checkpoint_every={max(1, budget.steps // 3)}",
        "train.keep_last=1",
        f"monitor.val_every={max(1, budget.steps // LOOKS)}",
    ]
    base = load_config(budget.base)
    if base.data.val_path is None and not base.data.val_share:
        ours.append(f"data.val_share={VAL_SHARE}")
    ours += [*arm.overrides, *budget.overrides]
    config = load_config(budget.base, ours)
    variant_has_two = config.model.variant in ("sequential", "parallel")
    if variant_has_two and config.model.name == "custom" and config.model.depth == base.model.depth:
        ours.append(f"model.depth={round(config.model.size.depth * JOINT_DEPTH)}")  # as many parameters, as the presets
    batch = config.train.batch_size
    if batch % budget.processes:
        raise ValueError(f"train.batch_size={batch} of {budget.base} cannot be spread over --processes.")
    return [*ours, f"train.batch_size={batch // budget.processes}"]


def train(arm: Arm, seed: int, budget: Budget) -> Path:
    """Train, or continue, one run; its folder. ValueError where it fails; its own lines say why."""
    overrides = overrides_of(arm, seed, budget)
    config = load_config(budget.base, overrides)
    script = "train_with_img.py" if config.data.num_images else "train.py"
    launcher = [sys.executable]
    if budget.processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={budget.processes}"]
    command = [*launcher, str(ROOT / script), "--config", str(budget.base), *overrides]
    code = subprocess.run(command).returncode
    folder = Path(config.train.output_dir)
    if (folder / "PREEMPTED").exists():
        raise SystemExit(PREEMPTED_EXIT)
    if code:
        raise ValueError(f"the run of arm {arm.name} (seed {seed}) failed with exit code {code}; see its lines above.")
    return folder


# ---- what a run amounts to -------------------------------------------------------------------------


def read_run(folder: Path, budget: Budget) -> dict[str, Any]:
    """Measures a run: loss curve of the average on held-out clips, its last value, cost, accuracy on the demo."""
    config = load_config(folder / "config.yaml", saved=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held_out = [row for row in rows if row["kind"] == "val"]
    steps = [row for row in rows if row["kind"] == "train"]
    loss = "ema/video_loss" if config.data.num_images else "ema/loss"
    return {
        "curve": [(row["step"], row[loss]) for row in held_out],
        "val_loss": held_out[-1][loss],
        "train_loss": sum(row["loss"] for row in steps[-len(steps) // 5 :]) / len(steps[-len(steps) // 5 :]),
        "parameters": count_parameters(build_model(config, "meta")),
        "macs_per_clip": macs_per_clip(config),
        "seconds_per_step": sorted(row["seconds_per_step"] for row in steps)[len(steps) // 2],
        **demo_accuracy(folder, config, budget.videos),
    }


def demo_accuracy(folder: Path, config: Config, videos: int) -> dict[str, float]:
    """Returns the accuracies of colour and motion by the demo's tracker; {} for other data or --videos 0."""
    if config.data.name != "demo" or not videos:
        return {}
    cached = folder / "accuracy.json"
    asked = {"step": config.train.max_steps, "videos": videos}
    known = json.loads(cached.read_text()) if cached.is_file() else {}
    if asked.items() <= known.items():
        return {name: known[name] for name in ACCURACIES}
    generator = Generator.from_checkpoint(folder)
    wanted = config.sample
    samples = generator.sample(
        None, videos, method=wanted.method, steps=wanted.steps, eta=wanted.eta, batch_size=wanted.batch_size
    )
    label_of = choose_labels(generator.conditions)
    clips = torch.from_numpy(samples).permute(0, 1, 4, 2, 3)  # (n, F, 3, H, W)
    found = accuracy(list(clips), [label_of(index) or 0 for index in range(videos)])
    cached.write_text(json.dumps(asked | found))
    return found


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Over seeds; the deviation is that of a sample, 0 for one seed."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


# ---- the report ------------------------------------------------------------------------------------


def table(comparison: Comparison, found: dict[str, list[dict[str, Any]]], seeds: int) -> str:
    """Markdown: a line per arm, the mean over seeds, and its deviation where there are several."""
    first = next(iter(found.values()))[0]
    accuracies = [name for name in ACCURACIES if name in first]
    heads = ["held-out loss", *(ACCURACIES[name] for name in accuracies)]
    heads += ["parameters", "multiply-adds per clip", "s per step"]
    lines = [f"| {comparison.name} | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for arm in comparison.arms:
        runs = found[arm.name]
        cells = [spread([run["val_loss"] for run in runs], "{:.4f}", seeds)]
        cells += [spread([100 * run[name] for run in runs], "{:.1f}", seeds) + " %" for name in accuracies]
        cells += [f"{runs[0]['parameters'] / 1e6:.2f} M", f"{runs[0]['macs_per_clip'] / 1e9:.3f} G"]
        cells += [f"{min(run['seconds_per_step'] for run in runs):.2f}"]
        lines.append(f"| {arm.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float], form: str, seeds: int) -> str:
    """`mean ± deviation`, or the one value."""
    mean, deviation = mean_and_deviation(values)
    return form.format(mean) + (" ± " + form.format(deviation) if seeds > 1 else "")


def plot(comparison: Comparison, found: dict[str, list[dict[str, Any]]], target: Path) -> None:
    """Held-out loss over steps: a line per arm, the mean over seeds, with the range of the seeds as a band."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for arm in comparison.arms:
        steps = [step for step, _ in found[arm.name][0]["curve"] if step]
        losses = np.array([[loss for step, loss in run["curve"] if step] for run in found[arm.name]])
        (line,) = axes.plot(steps, losses.mean(0), marker="o", markersize=3, linewidth=1.4, label=arm.name)
        axes.fill_between(steps, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="optimiser step", ylabel="loss on held-out clips (average)", yscale="log", title=comparison.title)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="both", labelsize=8)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(target, dpi=120)
    plt.close(figure)


def page(comparisons: Iterable[Comparison], tables: dict[str, str], budget: Budget) -> str:
    """The Markdown page: what was run, and for each comparison table and curves."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    extra = f" {' '.join(budget.overrides)}" if budget.overrides else ""
    seeds = " ".join(map(str, budget.seeds))
    head = (
        f"`python -m tools.ablate ... --base {budget.base} --steps {budget.steps} --seeds {seeds} --videos "
        f"{budget.videos}{extra}`, commit {commit.strip()}, torch {torch.__version__}. Every arm: {budget.steps} "
        f"steps from {'each of the seeds ' if len(budget.seeds) > 1 else 'seed '}{seeds}; mean"
        f"{' ± deviation' if len(budget.seeds) > 1 else ''}. The loss is that of the averaged weights on clips that "
        "are not trained on, at fixed noise and timesteps (of joint training, of its video frames).\n"
    )
    parts = [
        f"\n## {each.title}\n\n{tables[each.name]}\n![{each.title}](ablation_{each.name}.png)\n" for each in comparisons
    ]
    return head + "".join(parts)


def parse(argv: list[str]) -> tuple[list[Comparison], Budget]:
    """The command line; ValueError for what cannot be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE|section.key=value", help="comparisons, and keys that count for all arms")
    add("--base", type=Path, default=Path("configs/demo/demo_train.yaml"), help="config of all arms (%(default)s)")
    add("--out", type=Path, default=Path("results/ablations"), help="folder to write (%(default)s)")
    add("--steps", type=int, default=600, help="optimiser steps of every run (%(default)s)")
    add("--seeds", type=int, nargs="+", default=[0], help="each arm is trained once from each (0)")
    add("--processes", type=int, default=1, help="of torchrun; the base's batch is spread over them (%(default)s)")
    add("--videos", type=int, default=64, help="samples for accuracies on the demo set; 0: none (%(default)s)")
    given = parser.parse_intermixed_args(argv)
    for key, least in {"steps": 1, "processes": 1, "videos": 0}.items():
        if getattr(given, key) < least:
            raise ValueError(f"--{key} must be at least {least}, not {getattr(given, key)}.")
    overrides = tuple(each for each in given.files if "=" in each)
    files = [Path(each) for each in given.files if "=" not in each]
    if not files:
        raise ValueError("name one comparison or more, such as configs/ablations/variants.yaml.")
    budget = Budget(
        given.base, given.out, given.steps, tuple(given.seeds), given.processes, given.videos, overrides
    )  # fmt: skip
    return [read_comparison(path) for path in files], budget


def main(argv: list[str]) -> int:
    """Check all runs, train those that are not there, compare."""
    comparisons, budget = parse(argv)
    arms = {arm.run: arm for comparison in comparisons for arm in comparison.arms}
    for arm in arms.values():
        overrides_of(arm, budget.seeds[0], budget)  # finds a mistake in the last arm before the first is trained
    found: dict[str, list[dict[str, Any]]] = {}
    jobs = [(arm, seed) for seed in budget.seeds for arm in arms.values()]
    for number, (arm, seed) in enumerate(jobs, 1):
        print(f"== run {number} of {len(jobs)}: {arm.name}, seed {seed}", flush=True)
        found.setdefault(arm.run, []).append(read_run(train(arm, seed, budget), budget))
    tables = {}
    for each in comparisons:
        rows = {arm.name: found[arm.run] for arm in each.arms}
        tables[each.name] = table(each, rows, len(budget.seeds))
        plot(each, rows, budget.out / f"ablation_{each.name}.png")
        print(f"\n{each.title}\n{tables[each.name]}")
    (budget.out / "ablations.json").write_text(json.dumps(found, indent=1) + "\n")
    (budget.out / "ablations.md").write_text("# Ablations\n\n" + page(comparisons, tables, budget))
    print(f"{budget.out / 'ablations.md'} has tables and curves")
    return 0


if __name__ == "__main__":
    cli.run(main)
