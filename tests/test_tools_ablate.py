"""tools.ablate: comparisons are read and checked before anything is trained; its figures are those of the runs."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import train
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
    batch = configs[0].train.batch_size
    assert {(each.train.seed, each.train.max_steps, each.train.batch_size) for each in configs} == {(3, 6, batch)}
    models = [(each.model, each.data.num_images) for each in configs]
    assert len(set(models)) == len(models)


@BASES
def test_variants_have_as_many_parameters(config: str, tmp_path: Path) -> None:
    configs = configs_of(ROOT / "configs/ablations/variants.yaml", config, tmp_path)
    counts = [count_parameters(build_model(config, "meta")) for config in configs]
    assert max(counts) / min(counts) < 1.03


def test_equal_arms_are_one_run() -> None:
    assert len(SHIPPED) == 6
    runs = [ablate.name_run(arm) for path in SHIPPED for arm in ablate.read_comparison(path).arms.values()]
    assert runs.count(ablate.BASELINE) == 5  # all but the sizes
    assert len(set(runs)) == len(runs) - 4


def test_depth_and_batch_of_an_arm(base: Path, tmp_path: Path) -> None:
    """An arm keeps the depth that it names; the batch is spread over the processes."""
    named = ablate.list_overrides(["model.variant=sequential", "model.depth=7"], 0, budget(base, tmp_path))
    assert load_config(base, named).model.depth == 7
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


def test_two_arms_are_trained_and_compared(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs are trained in this process instead of one of their own."""
    started: list[str] = []

    def run_here(command: list[str], **options: Any) -> Any:
        if command[0] != sys.executable:  # git
            return honest(command, **options)
        started.append(command[1])
        return SimpleNamespace(returncode=train.main(command[2:]))

    honest = subprocess.run
    monkeypatch.setattr(subprocess, "run", run_here)
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
