"""The configuration: layers, hints, ranges, and that every shipped YAML loads."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.config import Config, all_keys, load_config
from sample.generate import sampler_settings

ROOT = Path(__file__).resolve().parents[1]


def test_layers_apply_in_order(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("optim:\n  learning_rate: 2e-4\ntrain:\n  batch_size: 3\n")
    config = load_config(file, ["train.batch_size=7"])
    assert (config.optim.learning_rate, config.train.batch_size, config.train.max_steps) == (2e-4, 7, 1_000_000)


def test_yaml_round_trip(tmp_path: Path) -> None:
    model = ["model.name=Latte-S/2", "model.num_classes=3"]
    config = load_config(None, [*model, "sample.labels=[1,2]", "train.init_from=a b.pt"])
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert load_config(file) == config


OTHER_KINDS = ("ablations", "t2x")  # of YAML files, which have tests of their own


@pytest.mark.parametrize(
    "file",
    [
        file
        for file in sorted((ROOT / "configs").rglob("*.yaml"))
        if file.parent.name not in OTHER_KINDS or file.name.endswith("_train.yaml")
    ],
    ids=lambda f: f.name,
)
def test_every_shipped_config_loads(file: Path) -> None:
    load_config(file)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim.learnig_rate=1", "Did you mean 'optim.learning_rate'"),
        ("learning_rate=1", "optim.learning_rate"),
        ("optim.learning_rate=abc", "optim.learning_rate"),
        ("optim.learning_rate=-5", "positive"),
        ("optim.learning_rate=nan", "positive"),
        ("optim.learning_rate=.inf", "positive"),
        ("optim.learning_rate=0", "positive"),
        ("train.batch_size=1.5", "train.batch_size"),
        ("train.batch_size=0", "at least 1"),
        ("train.precision=half", "fp32, tf32, bf16"),
        ("train=3", "section"),
        ("train.output_dir=${oc.env:HOME}", "interpolation"),
        ("model.name=Latte-M/2", "model.name"),
        ("model.variant=zigzag", "interleaved"),
        ("data.image_size=100", "multiple of 16"),
        ("diffusion.prediction=flow", "model.learn_sigma=false"),
        ("sample.guidance_scale=4", "null label"),
        ("no-equals-sign", "section.key=value"),
    ],
)
def test_wrong_values_are_refused_with_a_sentence(override: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        load_config(None, [override])
    assert "\n" not in str(error.value)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    for text in ("a: [1", "optim:\n  eps: 1\n  eps: 2\n", "- 1\n- 2\n", "x: !!python/object:os.system {}\n"):
        broken.write_text(text)
        with pytest.raises(ValueError, match=r"broken\.yaml"):
            load_config(broken)


def test_no_key_goes_unread() -> None:
    """Every key's name is an attribute outside the declaration of its dataclass, or among those that are passed on."""
    folders = ("models", "diffusion", "datasets", "engine", "sample", "evaluation", "tools")
    code = "\n".join(file.read_text() for folder in folders for file in sorted((ROOT / folder).rglob("*.py")))
    for key in all_keys():
        leaf = key.rpartition(".")[2]
        reads = re.findall(rf"(?<!self)\.{leaf}\b", code) + re.findall(rf"\bself\.{leaf}\b(?!\s*[:=])", code)
        reads += re.findall(rf'"{leaf}"', inspect.getsource(sampler_settings))
        assert reads, f"{key} is never read"


def test_dry_run_prints_one_json_object_and_opens_nothing() -> None:
    command = [sys.executable, "train.py", "--config", "configs/ffs/ffs_train.yaml", "--dry-run", "data.path=/nowhere"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed["trainable_parameters"] == 673_681_568
    # 3.7257 TFLOP by hand: 24 T d^2 per block, attention 4TNd and 4TFd, adaLN once per sample, and the ends
    assert 2 * printed["macs_per_clip"] == pytest.approx(3.7257e12, rel=1e-3)
    assert set(printed["config"]) == set(Config.__dataclass_fields__)
