"""The configuration: layers, hints, shipped YAML files, and keys that have left; its faults: test_faults_config.py."""

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import train
from engine.config import Config, all_keys, load_config
from engine.keys import REMOVED
from sample import sample, sample_ddp
from sample.generate import sampler_settings
from tests.conftest import refuses
from tests.fault_support import ROOT


def test_layers_apply_in_order(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("optim:\n  learning_rate: 2e-4\ntrain:\n  batch_size: 3\n")
    config = load_config(file, ["train.batch_size=7"])
    assert (config.optim.learning_rate, config.train.batch_size, config.train.max_steps) == (2e-4, 7, 1_000_000)


OTHER_KINDS = ("ablations", "t2x")  # of YAML files, which have tests of their own
FILES = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize(
    "file",
    [file for file in FILES if file.parent.name not in OTHER_KINDS or file.name.endswith("_train.yaml")],
    ids=lambda file: file.name,
)
def test_every_shipped_config_loads(file: Path) -> None:
    load_config(file)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ("diffusion={}", "sets nothing"),
        ("train.precision=half", "fp32, tf32, bf16"),
        ("train.attention=math", "train.attention must be one of auto, fused, plain, got 'math'"),
        ("train=3", "section"),
        ("model.name=Latte-M/2", "model.name"),
        ("model.variant=zigzag", "interleaved"),
        ("model.variant=image", "data.num_frames=1"),
        ("data.image_size=100", "multiple of 16"),
        ("diffusion.prediction=flow", "model.learn_sigma=false"),
        ("sample.guidance_scale=4", "null label"),
        ("no-equals-sign", "section.key=value"),
        ("text.max_length=7", "text.max_length is read only by a text network"),
        ("data.captions=a.csv", "data.captions is read only with data.name=captions"),
        ("lora.alpha=2", "lora.alpha is read only with lora.rank"),
        ("lora.rank=2", "name these with train.init_from"),
        ("sample.lora_scale=2", "read only with sample.lora"),
        ("lora.rank=2 train.init_from=a.pt lora.targets=all", "lora.targets must be one of attention,"),
        ("lora.rank=2 train.init_from=a.pt train.parallel=fsdp", "leave train.parallel at ddp"),
        ("monitor.val_every=5", "monitor.val_every=5 needs clips that are not trained on: set data.val_path"),
        ("monitor.val_clips=5", "monitor.val_clips is read only with monitor.val_every"),
        ("monitor.val_buckets=5", "monitor.val_buckets is read only with monitor.val_every"),
        ("monitor.sample_videos=5", "monitor.sample_videos is read only with monitor.sample_every"),
        ("data.val_path=a", "data.val_path is read only with monitor.val_every or monitor.metric_every"),
        ("monitor.metric_every=5", "monitor.metric_every=5 needs clips that are not trained on: set data.val_path"),
        ("monitor.metric_every=5 data.val_share=0.1", "needs a detector: set monitor.metric_detector to its name"),
        ("monitor.metric_detector=i3d", "monitor.metric_detector is read only with monitor.metric_every"),
        ("monitor.metric_every=1 data.val_share=0.1 monitor.metric_videos=1", "at least 2"),
        ("monitor.val_every=1 data.val_share=0.1 monitor.val_buckets=101", "val_buckets must be in"),
        (
            "monitor.val_every=1 data.val_share=0.1 monitor.val_buckets=50 diffusion.num_steps=40 sample.steps=40",
            "monitor.val_buckets=50 is more than diffusion.num_steps=40",
        ),
        ("monitor.val_every=1 data.val_path=a data.latents=b", "data.val_path is not in the cache of data.latents"),
        ("monitor.sample_every=1 train.precision=fp64", "monitor.sample_every: train.precision=fp64"),
    ],
)
def test_wrong_values_are_refused_with_a_sentence(overrides: str, sentence: str) -> None:
    refuses(re.escape(sentence), load_config, None, overrides.split())


def test_no_key_goes_unread() -> None:
    """Every key's name is an attribute outside the declaration of its dataclass, or among those that are passed on."""
    folders = ("models", "diffusion", "datasets", "engine", "sample", "evaluation", "tools")
    code = "\n".join(file.read_text() for folder in folders for file in sorted((ROOT / folder).rglob("*.py")))
    read = set(re.findall(r"(?<!self)\.(\w+)\b", code)) | set(re.findall(r"\bself\.(\w+)\b(?!\s*[:=])", code))
    read |= set(re.findall(r'"(\w+)"', inspect.getsource(sampler_settings)))
    assert [key for key in all_keys() if key.rpartition(".")[2] not in read] == []


def test_dry_run_prints_one_json_object_and_opens_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--config", "configs/ffs/ffs_train.yaml", "--dry-run", "data.path=/nowhere"]) == 0
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert err == "--dry-run: the configuration is valid; data and codec were not opened\n"
    assert printed["trainable_parameters"] == 673_681_568
    # 3.7257 TFLOP by hand: 24 T d^2 per block, attention 4TNd and 4TFd, adaLN once per sample, and the ends
    assert 2 * printed["macs_per_clip"] == pytest.approx(3.7257e12, rel=1e-3)
    assert set(printed["config"]) == set(Config.__dataclass_fields__)


# ---- keys, values and flags that have left ------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in REMOVED if not name.startswith("--")])
def test_a_removed_key_is_answered_and_older_configurations_load(name: str, tmp_path: Path) -> None:
    assert name not in set(all_keys())
    used = name if "=" in name else f"{name}=8"
    refuses(re.escape(REMOVED[name]), load_config, None, [used])
    section, key, value = used.replace("=", ".").split(".")
    file = tmp_path / "config.yaml"
    file.write_text(f"{section}:\n  {key}: {value}\n")
    assert load_config(file, saved=True) == load_config()
    if "=" not in name:  # off, as every older file has it
        file.write_text(f"{section}:\n  {key}: null\n")
        assert load_config(file) == load_config()


@pytest.mark.parametrize("flag", [name for name in REMOVED if name.startswith("--")])
@pytest.mark.parametrize("script", [sample.main, sample_ddp.main])
def test_a_removed_flag_is_answered(script: Callable[..., object], flag: str) -> None:
    refuses(f"{flag}: .*{re.escape(REMOVED[flag])}", script, ["--ckpt", "nowhere", flag, "x"])
