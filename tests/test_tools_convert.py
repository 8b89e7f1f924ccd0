"""The converter command: its flags, config files, weights of runs, text networks."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import LatteTransformer3DModel
from safetensors.torch import load_file

from engine.config import Config, all_keys, load_config
from engine.keys import DROPPED, OMITTED, REMARKS, RENAMED, TEXT_RENAMED, VALUES, translate_config
from sample.t2x_config import KEYS, load_t2x_config
from tests.conftest import random_weights, refuses, save_weights
from tests.fault_support import same_tensors
from tests.t2v_support import CONFIG, pixart, theirs
from tools.convert import main

TRAIN = """
dataset: "ffs_img"
data_path: "/data/ffs/train/videos/"
frame_data_path: "/data/ffs/train/images/"
pretrained_model_path: "/models/Latte/"
results_dir: "./results_img"
pretrained:
model: LatteIMG-S/2
frame_interval: 4
extras: 1
use_image_num: 8
learning_rate: 2e-4
ckpt_every: 5000
clip_max_norm: 0.2
start_clip_iter: 500000
local_batch_size: 4
max_train_steps: 900000
lr_warmup_steps: 10
gradient_accumulation_steps: 2
use_compile: True
mixed_precision: False
gradient_checkpointing: True
"""

SAMPLE = """
ckpt:
save_img_path: "./sample_videos/"
model: Latte-XL/2
extras: 2
num_classes: 101
use_fp16: True
seed:
sample_method: 'DDIM'
num_sampling_steps: 50
cfg_scale: 7.0
sample_names: [0, 1, 2]
per_proc_batch_size: 2
num_fvd_samples: 64
"""


def convert_text(tmp_path: Path, text: str) -> Config:
    (tmp_path / "official.yaml").write_text(text)
    assert main(["config", str(tmp_path / "official.yaml"), "-o", str(tmp_path / "out" / "ours.yaml")]) == 0
    return load_config(tmp_path / "out" / "ours.yaml")


CONVERTED = {
    "training": (
        TRAIN,
        {
            "data": {"name": "ffs", "path": "/data/ffs/train/videos/", "num_images": 8, "frame_interval": 4},
            "model": {"name": "LatteIMG-S/2", "num_classes": 0, "gradient_checkpointing": True},
            "codec": {"path": "/models/Latte/", "subfolder": "vae", "scale": 0.18215},
            "optim": {"learning_rate": 2e-4, "max_grad_norm": 0.2, "clip_start_step": 500_000, "warmup_steps": 10},
            "train": {"output_dir": "./results_img", "max_steps": 900_000, "batch_size": 4, "grad_accum_steps": 2}
            | {"checkpoint_every": 5000, "precision": "tf32", "compile": True},
        },
    ),
    "sampling": (
        SAMPLE,
        {
            "sample": {"method": "ddim", "steps": 50, "guidance_scale": 7.0, "precision": "fp16", "batch_size": 2}
            | {"num_videos": 64, "labels": ["0", "1", "2"], "ckpt": None, "seed": 0}
            | {"save_video_path": "./sample_videos/"},
            "model": {"name": "Latte-XL/2", "num_classes": 101},
        },
    ),
}


@pytest.mark.parametrize("kind", CONVERTED)
def test_G3_official_configs_are_translated(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    text, expected = CONVERTED[kind]
    config = convert_text(tmp_path, text).to_dict()
    for section, values in expected.items():
        assert {key: config[section][key] for key in values} == values
    report = capsys.readouterr().err.splitlines()
    keys = [line.partition(":")[0] for line in text.strip().splitlines()]
    assert [line.split()[1].rstrip(":") for line in report] == keys
    assert not any(line.startswith("unknown") for line in report)
    if kind == "training":
        assert "renamed   clip_max_norm -> optim.max_grad_norm: 0.2" in report
        assert any(line.startswith("dropped   frame_data_path: joint training draws") for line in report)
        assert any(line.startswith("empty     pretrained: train.init_from keeps") for line in report)


TEXT = """
{save_img_path: "./sample_videos/t2v-", pretrained_model_path: "maxin-cn/Latte-1", model: LatteT2V, video_length: 16,
image_size: [512, 512], beta_start: 0.0001, beta_end: 0.02, beta_schedule: "linear", variance_type: "learned_range",
use_compile: False, use_fp16: True, seed: , run_time: 0, guidance_scale: 7.5, sample_method: 'EulerDiscrete',
num_sampling_steps: 50, enable_temporal_attentions: True, enable_vae_temporal_decoder: True,
text_prompt: ['Sunset over the sea.']}
"""


def test_official_text_configs_are_translated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "official.yaml").write_text(TEXT)
    assert main(["config", str(tmp_path / "official.yaml"), "-o", str(tmp_path / "ours.yaml")]) == 0
    config = load_t2x_config(tmp_path / "ours.yaml", {})
    assert (config.sample_method, config.precision, config.compile, config.seed) == ("EulerDiscrete", "fp16", False, 0)
    assert (config.prompts(), config.beta_end) == (["Sunset over the sea."], 0.02)
    report = capsys.readouterr().err.splitlines()
    assert [line.split()[1].rstrip(":") for line in report] == re.findall(r"(\w+): ", TEXT)
    assert [line.split()[1] for line in report if line.startswith("dropped")] == ["model:", "run_time:"]


def test_extras_takes_precedence_over_num_classes() -> None:
    sections, report = translate_config({"model": "Latte-S/2", "extras": 1, "num_classes": 101})
    assert sections == {"model": {"name": "Latte-S/2"}}
    assert report[-1].startswith("note      num_classes")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: Latte-XL/2\nextras: 78\n", "extras: 78 .* configs/t2x/t2v_train.yaml"),
        ("model: Latte-XL/2\nextras: 3\nnum_classes: 101\n", "extras: 3 is unknown"),
        ("model: Latte-XL/2\nextras: 2\nnum_classes:\n", "extras: 2 is class-conditional: set num_classes"),
        ("model: LatteT2V\nsample_method: ddim\n", "refused: .*sample_method must be one of DDIM"),
        ("model:\n  name: Latte-XL/2\n", "already a config of this project"),
        ("", "holds no keys"),
        ("a: [", "not valid YAML"),
        ("model: Latte-M/2\n", "refused: .*Latte-M/2"),
        ("model: Latte-S/2\nckpt_every: often\n", "refused: .*checkpoint_every"),
        (None, r"official\.yaml does not exist"),
    ],
)
def test_G3_refused_configs(tmp_path: Path, text: str | None, sentence: str) -> None:
    file = tmp_path / "official.yaml"
    if text is not None:
        file.write_text(text)
    refuses(sentence, main, ["config", str(file), "-o", str(tmp_path / "ours.yaml")])
    assert not (tmp_path / "ours.yaml").exists()


def test_tables_of_official_keys_are_consistent() -> None:
    ours = set(all_keys())
    assert set(RENAMED.values()) <= ours
    assert not set(RENAMED) & set(DROPPED)
    assert set(TEXT_RENAMED.values()) <= set(KEYS)
    assert set(VALUES) | set(REMARKS) | set(OMITTED) <= set(RENAMED)


def test_standard_output_holds_the_yaml_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "official.yaml").write_text(SAMPLE + "my_own_key: 3\n")
    assert main(["config", str(tmp_path / "official.yaml")]) == 0
    text, report = capsys.readouterr()
    assert text.startswith("# Converted from official.yaml by tools.convert config.\n")
    assert "unknown   my_own_key: not a key of the official configs; left out." in report
    (tmp_path / "ours.yaml").write_text(text)
    assert load_config(tmp_path / "ours.yaml").sample.guidance_scale == 7.0


@pytest.mark.parametrize(("flags", "kept", "seed"), [([], "ema", 1), (["--weights", "raw"], "model", 0)])
def test_weights_of_a_run(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], kept: str, seed: int
) -> None:
    config = load_config(None, tiny)
    save_weights(config, tmp_path / "run" / "checkpoints", seeds=(0, 1))
    target = tmp_path / "export"
    assert main(["weights", str(tmp_path / "run"), str(target), *flags]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    assert [file.name for file in target.glob("*.safetensors")] == [f"{kept}.safetensors"]
    assert same_tensors(load_file(target / f"{kept}.safetensors"), random_weights(config, seed))
    refuses(r"lora\.rank is 0", main, ["weights", str(tmp_path / "run"), str(tmp_path / "adapter"), "--adapter"])


@pytest.mark.parametrize(
    "arguments", [["pixart"], ["latte", "--dtype", "fp16"], ["t2v.pt", "--config", "tiny.json"]], ids=" ".join
)
def test_text_networks_are_converted_reported_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    theirs().save_pretrained("latte")
    pixart().save_pretrained("pixart")
    torch.save(theirs().state_dict(), "t2v.pt")
    Path("tiny.json").write_text(json.dumps(CONFIG))
    source, *options = arguments
    assert main(["t2v", source, "out", *options]) == 0
    out = capsys.readouterr().out
    assert "taken from the checkpoint: " in out
    assert f"0.02 M parameters, torch.float{16 if 'fp16' in arguments else 32}" in out
    difference = re.search(r"largest difference to diffusers' output: (\S+)\n", out)
    assert difference and float(difference[1]) < 1e-5
    assert LatteTransformer3DModel.from_pretrained("out").config.video_length in (4, 16)


def test_wrong_conversions_are_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs().save_pretrained(tmp_path / "latte")
    monkeypatch.setattr("models.latte_t2v.LatteT2V._add_time_positions", lambda self, x, num_frames: x)
    assert main(["t2v", str(tmp_path / "latte"), str(tmp_path / "out")]) == 1
    assert "too much" in capsys.readouterr().out
