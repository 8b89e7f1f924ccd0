"""Runs the paper's comparisons (section 4.2): trains every arm from the same seeds, then writes tables and curves.

    python -m tools.ablate configs/ablations/variants.yaml --base configs/demo/demo_train.yaml --steps 600 --seeds 0 1

Each file lists arms, and each arm the keys in which it differs from --base; trailing section.key=value apply to all
arms that do not set the key. `train.init_from: ARM` starts from the run of an arm of the same file and seed. An arm is
an ordinary training run (train.py, or train_with_img.py if it has images) in OUT/runs/<arm>-seed<N>, so the same
command resumes an interrupted comparison, and identical arms are trained once. For the same seed, all arms see the same
clips, timesteps and noise. Writes OUT/ablations.md, OUT/ablations.json and one plot per file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from common.checks import at_least, check_limits, require
from demo.drawn import accuracy
from demo.stages import plot_losses
from engine import cli
from engine.build import build_model, count_parameters, macs_per_clip
from engine.config import Config, load_config, read_yaml
from engine.errors import PREEMPTED_EXIT
from sample.generate import Generator
from sample.labels import choose_labels
from sample.video_io import slug

ROOT = Path(__file__).resolve().parent.parent
BASELINE = "base"  # run name of an arm without changes
RUN = "run:"  # before the name of an arm's run in train.init_from: the one of the same seed
JOINT_DEPTH = 9 / 11  # two-attention blocks (22 width^2 parameters) per one-attention block (18 width^2)
VALIDATIONS = 6  # per run
VAL_SHARE = 0.1
LOSS = "loss on held-out clips (EMA)"
ACCURACIES = {"appearance_accuracy": "colour right", "motion_accuracy": "motion right"}
Run = dict[str, Any]  # what `read_run` returns


class Comparison(NamedTuple):
    """One file: its title, and the `section.key=value` overrides of each arm."""

    name: str
    title: str
    arms: dict[str, tuple[str, ...]]


class Budget(NamedTuple):
    """Settings shared by all arms."""

    base: Path
    out: Path
    steps: int
    seeds: tuple[int, ...]
    processes: int
    videos: int
    overrides: tuple[str, ...]


def read_comparison(path: Path) -> Comparison:
    """Returns the comparison in a YAML file. Raises FileNotFoundError or ValueError, naming the file."""
    found = read_yaml(path)
    good = isinstance(found, dict) and set(found) == {"title", "arms"} and isinstance(found["arms"], dict)
    good = good and all(isinstance(keys, dict) for keys in found["arms"].values())
    require(good, f"{path}: a comparison needs a `title` and `arms`, and each arm its keys (or {{}}).")
    require(len(found["arms"]) >= 2, f"{path}: `arms` must list at least two.")
    arms: dict[str, tuple[str, ...]] = {}
    for name, keys in found["arms"].items():
        start = keys.get("train.init_from")
        if start in found["arms"]:
            require(start in arms, f"{path}: arm {start} must be listed above {name}, which starts from it.")
            keys = keys | {"train.init_from": RUN + name_run(arms[start])}
        pairs = ((key, value if isinstance(value, str) else json.dumps(value)) for key, value in keys.items())
        arms[name] = tuple(f"{key}={value}" for key, value in pairs)
    return Comparison(path.stem, str(found["title"]), arms)


def name_run(arm: Sequence[str]) -> str:
    """Returns the name of an arm's run folder, the same for identical arms."""
    return slug("-".join(each.rpartition(".")[2] for each in sorted(arm))) if arm else BASELINE


def run_folder(name: str, seed: int, budget: Budget) -> Path:
    """Returns the folder of a run, given its name and seed."""
    return budget.out / "runs" / f"{name}-seed{seed}"


def list_overrides(arm: Sequence[str], seed: int, budget: Budget) -> list[str]:
    """Returns the overrides of the base's YAML for `arm` and `seed`. Raises ValueError for invalid settings."""
    base = load_config(budget.base)
    parts = (each.partition(f"train.init_from={RUN}") for each in arm)
    keys = [f"train.init_from={run_folder(run, seed, budget)}" if start else key for key, start, run in parts]
    ours = [
        f"train.seed={seed}",
        f"train.max_steps={budget.steps}",
        f"train.output_dir={run_folder(name_run(arm), seed, budget)}",
        f"train.log_every={max(1, budget.steps // 60)}",
        f"train.checkpoint_every={max(1, budget.steps // 3)}",
        "train.keep_last=1",
        f"monitor.val_every={max(1, budget.steps // VALIDATIONS)}",
        *([] if base.data.val_path or base.data.val_share else [f"data.val_share={VAL_SHARE}"]),
        *budget.overrides,
        *keys,
    ]
    config = load_config(budget.base, ours)
    model, batch = config.model, config.train.batch_size
    if model.has_joint_layers and model.name == "custom" and model.depth == base.model.depth:
        ours.append(f"model.depth={round(model.size.depth * JOINT_DEPTH)}")  # the same parameter count, as in presets
    even = batch % budget.processes == 0
    require(even, f"train.batch_size={batch} of {budget.base} must be a multiple of --processes.")
    return [*ours, f"train.batch_size={batch // budget.processes}"]


def train(arm: Sequence[str], seed: int, budget: Budget) -> Path:
    """Trains or resumes one run; returns its folder. Raises ValueError if it fails."""
    overrides = list_overrides(arm, seed, budget)
    config = load_config(budget.base, overrides)
    script = "train_with_img.py" if config.data.num_images else "train.py"
    ranks = ["-m", "engine.elastic", "--standalone", f"--nproc_per_node={budget.processes}"]
    launcher = [sys.executable, *(ranks if budget.processes > 1 else [])]
    code = subprocess.run([*launcher, str(ROOT / script), "--config", str(budget.base), *overrides]).returncode
    folder = Path(config.train.output_dir)
    if (folder / "PREEMPTED").exists():
        raise SystemExit(PREEMPTED_EXIT)
    if code:
        raise ValueError(f"the run in {folder} failed with exit code {code}; see its output above.")
    return folder


def read_run(folder: Path, budget: Budget) -> Run:
    """Returns a run's EMA loss curve on held-out clips, final losses, cost, and accuracy on the demo set."""
    config = load_config(folder / "config.yaml", saved=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    held_out = [row for row in rows if row["kind"] == "val"]
    steps = [row for row in rows if row["kind"] == "train"]
    loss = "ema/video_loss" if config.data.num_images else "ema/loss"
    return {
        "curve": [(row["step"], row[loss]) for row in held_out if row["step"]],
        "val_loss": held_out[-1][loss],
        "train_loss": statistics.fmean(row["loss"] for row in steps[-len(steps) // 5 :]),
        "parameters": count_parameters(build_model(config, "meta")),
        "macs_per_clip": macs_per_clip(config),
        "seconds_per_step": sorted(row["seconds_per_step"] for row in steps)[len(steps) // 2],
        **measure_accuracy(folder, config, budget.videos),
    }


def measure_accuracy(folder: Path, config: Config, videos: int) -> dict[str, float]:
    """Returns the demo tracker's colour and motion accuracies; {} for other data, single frames or --videos 0."""
    if config.data.name != "demo" or not videos or config.data.num_frames == 1:
        return {}
    cached = folder / "accuracy.json"
    asked = {"step": config.train.max_steps, "videos": videos}
    known = json.loads(cached.read_text()) if cached.is_file() else {}
    if not asked.items() <= known.items():
        generator, settings = Generator.from_checkpoint(folder), config.sample
        options = {key: getattr(settings, key) for key in ("method", "steps", "eta", "batch_size")}
        clips = torch.from_numpy(generator.sample(None, videos, **options)).permute(0, 1, 4, 2, 3)  # (n, F, 3, H, W)
        label_of = choose_labels(generator.conditions)
        known = asked | accuracy(list(clips), [label_of(index) or 0 for index in range(videos)])
        cached.write_text(json.dumps(known))
    return {name: known[name] for name in ACCURACIES}


def format_table(name: str, found: dict[str, list[Run]]) -> str:
    """Returns a Markdown table: a row per arm, with the mean over seeds and, for several seeds, the deviation."""
    accuracies = [key for key in ACCURACIES if any(key in runs[0] for runs in found.values())]
    heads = [name, "held-out loss", *(ACCURACIES[key] for key in accuracies)]
    rows = [[*heads, "parameters", "multiply-adds per clip", "s per step"], ["---"] * (len(heads) + 3)]
    for arm, runs in found.items():
        loss = format_spread([run["val_loss"] for run in runs], "{:.4f}")
        percent = ([100 * run[key] for run in runs if key in run] for key in accuracies)
        shares = [format_spread(each, "{:.1f}") + " %" if each else "-" for each in percent]
        cost = f"{runs[0]['parameters'] / 1e6:.2f} M", f"{runs[0]['macs_per_clip'] / 1e9:.3f} G"
        rows.append([arm, loss, *shares, *cost, f"{min(run['seconds_per_step'] for run in runs):.2f}"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def format_spread(values: Sequence[float], form: str) -> str:
    """Returns `mean ± deviation` of `values`; the value alone if there is only one."""
    mean = form.format(statistics.fmean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean


def describe(budget: Budget) -> str:
    """Returns the page's first paragraph, which states what was run."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    extra = "".join(f" {each}" for each in budget.overrides)
    seeds, several = " ".join(map(str, budget.seeds)), len(budget.seeds) > 1
    return (
        f"`python -m tools.ablate ... --base {budget.base} --steps {budget.steps} --seeds {seeds} --videos "
        f"{budget.videos}{extra}`, commit {commit.strip()}, torch {torch.__version__}. Every arm: {budget.steps} "
        f"steps from {'each of the seeds ' if several else 'seed '}{seeds}; mean{' ± deviation' if several else ''}. "
        "The loss is that of the EMA weights on held-out clips, at fixed noise and timesteps (in joint training, on "
        "video frames only).\n"
    )


def parse(argv: list[str]) -> tuple[list[Comparison], Budget]:
    """Parses the command line and reads its files. Raises ValueError if either is invalid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE|section.key=value", help="comparison files, and overrides for all arms")
    add("--base", type=Path, default=Path("configs/demo/demo_train.yaml"), help="config of all arms (%(default)s)")
    add("--out", type=Path, default=Path("results/ablations"), help="folder to write (%(default)s)")
    add("--steps", type=int, default=600, help="optimiser steps per run (%(default)s)")
    add("--seeds", type=int, nargs="+", default=[0], help="each arm is trained once per seed (0)")
    add("--processes", type=int, default=1, help="processes, which share the base's batch (%(default)s)")
    add("--videos", type=int, default=64, help="samples for the accuracies on the demo set; 0: none (%(default)s)")
    arguments = parser.parse_intermixed_args(argv)
    check_limits(arguments, "--", {"steps processes": at_least(1), "videos": at_least(0)})
    given = vars(arguments)
    named = given.pop("files")
    files = [Path(each) for each in named if "=" not in each]
    require(bool(files), "name at least one comparison, such as configs/ablations/variants.yaml.")
    given |= {"seeds": tuple(given["seeds"]), "overrides": tuple(each for each in named if "=" in each)}
    return [read_comparison(path) for path in files], Budget(**given)


def main(argv: list[str]) -> int:
    """Checks all runs, trains the missing ones, writes the comparison; returns the exit code."""
    comparisons, budget = parse(argv)
    arms = {name_run(arm): (name, arm) for each in comparisons for name, arm in each.arms.items()}
    for _, arm in arms.values():
        list_overrides(arm, budget.seeds[0], budget)  # finds a mistake in any arm before training starts
    runs: dict[str, list[Run]] = {}
    jobs = [(run, seed) for seed in budget.seeds for run in arms]
    for number, (run, seed) in enumerate(jobs, 1):
        name, arm = arms[run]
        print(f"== run {number} of {len(jobs)}: {name}, seed {seed}", flush=True)
        runs.setdefault(run, []).append(read_run(train(arm, seed, budget), budget))
    page = "# Ablations\n\n" + describe(budget)
    for each in comparisons:
        found = {name: runs[name_run(arm)] for name, arm in each.arms.items()}
        table, image = format_table(each.name, found), f"ablation_{each.name}.png"
        plot_losses({arm: [run["curve"] for run in runs] for arm, runs in found.items()}, budget.out / image, LOSS)
        print(f"\n{each.title}\n{table}")
        page += f"\n## {each.title}\n\n{table}\n![{each.title}]({image})\n"
    (budget.out / "ablations.json").write_text(json.dumps(runs, indent=1) + "\n")
    (budget.out / "ablations.md").write_text(page)
    print(f"written: {budget.out / 'ablations.md'}")
    return 0


if __name__ == "__main__":
    cli.run(main)
