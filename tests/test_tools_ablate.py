"""tools.ablate: comparisons are read and checked before anything is trained; its figures are those of the runs."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import train
from demo.drawn import CLASSES, accuracy, draw_clip
from engine import weights
from engine.build import build_model, count_parameters
from engine.config import Config, load_config
from tests.conftest import ROOT, refuses
from tools import ablate

SHIPPED = sorted((ROOT / "configs/ablations").glob("*.yaml"))


def budget(base: Path, out: Path, **changes: object) -> ablate.Budget:
    values = {"steps": 6, "seeds": (0,), "processes": 1, "videos": 0, "overrides": ()} | changes
    return ablate.Budget(base=base, out=out, **values)  # type: ignore[arg-type]


@pytest.fixture
def base(tiny: list[str], tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(load_config(None, [*tiny, "monitor.val_every=2", "data.val_share=0.4"]).to_yaml())
    return path


BASES = pytest.mark.parametrize("config", ["demo/demo_train.yaml", "ucf101/ucf101_train.yaml"])


def configs_of(file: Path, config: str, out: Path) -> list[Config]:
    """Returns the configuration of each arm of a comparison, for seed 3."""
    settings = budget(ROOT / "configs" / config, out, overrides=("data.path=data",))
    arms = ablate.read_comparison(file).arms.values()
    return [load_config(settings.base, ablate.list_overrides(arm, 3, settings)) for arm in arms]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.stem)
@BASES
def test_every_arm_is_a_sound_config(file: Path, config: str, tmp_path: Path) -> None:
    configs = configs_of(file, config, tmp_path)
    kept = [{key: each.to_dict()[key] for key in ("diffusion", "optim", "codec")} for each in configs]
    assert all(each == kept[0] for each in kept)
    assert {(each.train.seed, each.train.max_steps) for each in configs} == {(3, 6)}
    compared = [(each.model, each.data, each.train.init_from) for each in configs]
    assert len({*map(str, compared)}) == len(compared)
    # the same batch and clip, except for the image network that another arm starts from
    assert len({each.train.batch_size * each.data.num_frames for each in configs if each.model.variant != "image"}) == 1


@BASES
def test_variants_have_as_many_parameters(config: str, tmp_path: Path) -> None:
    configs = configs_of(ROOT / "configs/ablations/variants.yaml", config, tmp_path)
    counts = [count_parameters(build_model(config, "meta")) for config in configs]
    assert max(counts) / min(counts) < 1.03


def test_equal_arms_are_one_run() -> None:
    assert len(SHIPPED) == 9
    runs = [ablate.name_run(arm) for path in SHIPPED for arm in ablate.read_comparison(path).arms.values()]
    assert runs.count(ablate.BASELINE) == 6  # all but the sizes and the sampling interval
    assert len(set(runs)) == len(runs) - 5 - 2  # S and B are in two files


def test_depth_and_batch_of_an_arm(base: Path, tmp_path: Path) -> None:
    """An arm keeps the depth that it names, whatever all arms are given; the batch is spread over the processes."""
    named = ablate.list_overrides(["model.variant=sequential", "model.depth=7"], 0, budget(base, tmp_path))
    assert load_config(base, named).model.depth == 7
    deeper = ablate.list_overrides(["model.depth=6"], 0, budget(base, tmp_path, overrides=("model.depth=4",)))
    assert load_config(base, deeper).model.depth == 6
    assert ablate.list_overrides((), 0, budget(base, tmp_path, processes=2))[-1] == "train.batch_size=1"
    sentence = "train.batch_size=2 of .* must be a multiple of --processes"
    refuses(sentence, ablate.list_overrides, (), 0, budget(base, tmp_path, processes=3))


def test_wrong_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    for text, sentence in (
        ("title: one\narms: {a: {}}\n", "`arms` must list at least two"),
        ("arms: {a: {}, b: {}}\n", "a comparison needs a `title` and `arms`"),
        ("title: t\narms: {a: {}, b: 3}\n", "each arm its keys"),
        ("- 1\n", "a comparison needs a `title` and `arms`"),
        ("title: [\n", "is not valid YAML"),
        ("title: t\narms: {a: {train.init_from: b}, b: {}}\n", "arm b must be listed above a"),
    ):
        path.write_text(text)
        refuses(rf"{path}:? .*{sentence}", ablate.read_comparison, path)


def test_a_wrong_key_in_the_last_arm_is_refused_before_the_first_is_trained(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("title: t\narms:\n  a: {}\n  b: {model.varant: parallel}\n")
    command = [str(path), "--base", str(base), "--out", str(tmp_path / "out")]
    refuses("unknown key 'model.varant'.*model.variant", ablate.main, command)
    assert not (tmp_path / "out").exists()


def test_impossible_words_are_refused() -> None:
    for flag, number in (("--steps", "0"), ("--processes", "0"), ("--videos", "-1")):
        refuses(f"{flag} must be at least", ablate.parse, [str(SHIPPED[0]), flag, number])
    refuses("name at least one comparison", ablate.parse, ["train.precision=bf16"])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trains in this process instead of one for each run; lists the scripts."""
    started: list[str] = []

    def run_here(command: list[str], **options: Any) -> Any:
        if command[0] != sys.executable:  # git
            return honest(command, **options)
        started.append(command[1])
        return SimpleNamespace(returncode=train.main(command[2:]))

    honest = subprocess.run
    monkeypatch.setattr(subprocess, "run", run_here)
    return started


def test_two_arms_are_trained_and_compared(base: Path, tmp_path: Path, started: list[str]) -> None:
    comparison, out = tmp_path / "pair.yaml", tmp_path / "out"
    comparison.write_text("title: A pair\narms:\n  plain: {}\n  rope: {model.temporal_position: rope}\n")
    command = [str(comparison), "--base", str(base), "--out", str(out), "--steps", "4", "--seeds", "1"]
    assert ablate.main(command) == 0
    assert started == [str(ROOT / "train.py")] * 2
    found, page = json.loads((out / "ablations.json").read_text()), (out / "ablations.md").read_text()
    assert list(found) == ["base", "temporal_position_rope"]
    for run, name in (("base", "plain"), ("temporal_position_rope", "rope")):
        rows = [json.loads(line) for line in (out / "runs" / f"{run}-seed1/metrics.jsonl").read_text().splitlines()]
        last = [row["ema/loss"] for row in rows if row["kind"] == "val" and row["step"] == 4]
        assert found[run][0]["val_loss"] == last[0]
        assert f"| {name} | {last[0]:.4f} |" in page
    assert found["base"][0]["val_loss"] != found["temporal_position_rope"][0]["val_loss"]
    assert (out / "ablation_pair.png").stat().st_size > 5000
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/checkpoints/*/model.safetensors")}
    assert len(before) == 2
    assert ablate.main(command) == 0  # nothing is trained again
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (out / "ablations.md").read_text() == page


def test_an_arm_starts_from_the_run_of_another_of_the_same_seed(
    base: Path, tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison, out = tmp_path / "start.yaml", tmp_path / "out"
    image = "{model.variant: image, data.num_frames: 1}"
    comparison.write_text(f"title: t\narms:\n  image: {image}\n  video: {{train.init_from: image}}\n")
    seen: list[tuple[set[str], Any]] = []
    honest = weights.init_from_dit
    monkeypatch.setattr(
        weights, "init_from_dit", lambda model, state: seen.append(({*state}, honest(model, state))) or seen[-1][1]
    )
    command = [str(comparison), "--base", str(base), "--out", str(out), "--steps", "2", "--seeds", "0", "1"]
    assert ablate.main(command) == 0
    assert len(started) == 4
    for (keys, report), seed in zip(seen, (0, 1), strict=True):
        assert {*report.taken} == keys and list(report.left_ours) == ["temp_embed"]
        config = load_config(next(out.glob(f"runs/init_from*-seed{seed}/config.yaml")), saved=True)
        assert load_config(Path(str(config.train.init_from)) / "config.yaml", saved=True).train.seed == seed
        assert config.model.variant == "interleaved"
    assert " ± " in (out / "ablations.md").read_text()  # mean and deviation over two seeds


def test_an_arm_without_accuracies_has_a_dash() -> None:
    run = {"val_loss": 0.5, "parameters": 1e6, "macs_per_clip": 1e9, "seconds_per_step": 0.1}
    accurate = run | {"appearance_accuracy": 0.75, "motion_accuracy": 0.25}
    first, second = ablate.format_table("t", {"image": [run], "video": [accurate]}).splitlines()[2:]
    assert first.startswith("| image | 0.5000 | - | - | 1.00 M")
    assert second.startswith("| video | 0.5000 | 75.0 % | 25.0 % | 1.00 M")


@pytest.mark.parametrize("interval", [1, 2])
def test_the_tracker_knows_every_motion_at_both_sampling_intervals(interval: int) -> None:
    """So that the accuracies of configs/ablations/sampling_interval.yaml have the same upper bound."""
    rng = np.random.default_rng(0)
    labels = [*range(len(CLASSES))] * 8
    clips = [draw_clip(label, rng) for label in labels]
    starts = [int(rng.integers(20 - 9 * interval)) for _ in clips]
    windows = [clip[start : start + 9 * interval + 1 : interval] for clip, start in zip(clips, starts, strict=True)]
    assert accuracy(windows, labels) == {"appearance_accuracy": 1, "motion_accuracy": 1}
