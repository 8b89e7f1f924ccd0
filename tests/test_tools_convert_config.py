"""Official-like configs, written here, turned into ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine.config import Config, all_keys, load_config
from engine.official_keys import DROPPED, RENAMED
from tools.convert_config import OMITTED, REMARKS, VALUES, convert, main, read_official

ROOT = Path(__file__).resolve().parents[1]

TRAIN = """
dataset: "ffs_img"
data_path: "/data/ffs/train/videos/"
frame_data_path: "/data/ffs/train/images/"
frame_data_txt: "/data/ffs/train_list.txt"
pretrained_model_path: "/models/Latte/"
results_dir: "./results_img"
pretrained:
model: LatteIMG-S/2
num_frames: 16
image_size: 256 # choices
num_sampling_steps: 250
frame_interval: 4
fixed_spatial: False
attention_bias: True
learn_sigma: True
extras: 1
save_ceph: True
use_image_num: 8
learning_rate: 2e-4
ckpt_every: 5000
clip_max_norm: 0.2
start_clip_iter: 500000
local_batch_size: 4
max_train_steps: 900000
global_seed: 3407
num_workers: 8
log_every: 100
lr_warmup_steps: 10
resume_from_checkpoint:
gradient_accumulation_steps: 2
num_classes:
use_compile: True
mixed_precision: False
enable_xformers_memory_efficient_attention: False
gradient_checkpointing: True
"""

SAMPLE = """
ckpt:
save_img_path: "./sample_videos/"
pretrained_model_path: "/models/Latte/"
model: Latte-XL/2
num_frames: 16
image_size: 256
frame_interval: 3
extras: 2
num_classes: 101
use_compile: False
use_fp16: True
seed:
sample_method: 'DDIM'
num_sampling_steps: 50
cfg_scale: 7.0
run_time: 12
num_sample: 1
sample_names: [0, 1, 2]
negative_name: 101
per_proc_batch_size: 2
num_fvd_samples: 64
"""


def converted(tmp_path: Path, text: str) -> Config:
    (tmp_path / "official.yaml").write_text(text)
    assert main([str(tmp_path / "official.yaml"), "-o", str(tmp_path / "out" / "ours.yaml")]) == 0
    return load_config(tmp_path / "out" / "ours.yaml")


def test_a_training_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = converted(tmp_path, TRAIN)
    assert (config.data.name, config.data.path) == ("ffs", "/data/ffs/train/videos/")
    assert (config.data.num_images, config.data.num_frames, config.data.frame_interval) == (8, 16, 4)
    assert (config.data.image_size, config.data.num_workers, config.data.frame_list) == (256, 8, None)
    assert (config.model.name, config.model.num_classes) == ("LatteIMG-S/2", 0)
    assert config.model.learn_sigma and config.model.gradient_checkpointing
    assert (config.codec.path, config.codec.subfolder, config.codec.scale) == (
        "/models/Latte/",
        "vae",
        0.18215,
    )
    optim, train = config.optim, config.train
    assert (optim.learning_rate, optim.max_grad_norm, optim.clip_start_step) == (2e-4, 0.2, 500_000)
    assert optim.warmup_steps == 10
    assert (train.output_dir, train.max_steps, train.batch_size) == ("./results_img", 900_000, 4)
    assert (train.grad_accum_steps, train.checkpoint_every, train.log_every) == (2, 5000, 100)
    assert (train.seed, train.precision, train.compile) == (3407, "tf32", True)

    account = capsys.readouterr().err.splitlines()
    keys = [line.split(":")[0] for line in TRAIN.strip().splitlines()]
    for key in keys:  # every key is accounted for, once
        assert sum(line.split()[1].rstrip(":") == key for line in account) == 1, key
    assert "renamed   clip_max_norm -> optim.max_grad_norm: 0.2" in account
    assert any(line.startswith("dropped   frame_data_path: joint training draws") for line in account)
    assert any(line.startswith("empty     pretrained: train.init_from keeps") for line in account)


def test_a_sampling_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = converted(tmp_path, SAMPLE)
    assert "unknown" not in capsys.readouterr().err
    sample = config.sample
    assert (sample.method, sample.steps, sample.guidance_scale) == ("ddim", 50, 7.0)
    assert (sample.precision, sample.batch_size, sample.num_videos) == ("fp16", 2, 64)
    assert sample.labels == ["0", "1", "2"]
    assert (sample.ckpt, sample.seed, sample.save_video_path) == (None, 0, "./sample_videos/")
    assert (config.model.name, config.model.num_classes) == ("Latte-XL/2", 101)


def test_extras_decide_over_the_class_count() -> None:
    sections, account = convert({"model": "Latte-S/2", "extras": 1, "num_classes": 101})
    assert sections == {"model": {"name": "Latte-S/2"}}
    assert account[-1].startswith("note      num_classes")


def test_unknown_keys_are_reported_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = converted(tmp_path, "model: Latte-B/4\nmy_own_key: 3\n")
    assert config.model.name == "Latte-B/4"
    assert "unknown   my_own_key: not a key of the official configs; left out." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: LatteT2V\nvideo_length: 16\n", "text-to-video config"),
        ("model: Latte-XL/2\nextras: 78\n", "text-to-video config"),
        ("model:\n  name: Latte-XL/2\n", "one of ours already"),
        ("", "holds no keys"),
        ("a: [", "not valid YAML"),
        ("model: Latte-M/2\n", "refused: .*Latte-M/2"),
    ],
)
def test_what_cannot_be_converted_is_said_in_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "official.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=sentence) as caught:
        main([str(file), "-o", str(tmp_path / "ours.yaml")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ours.yaml").exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml does not exist"):
        read_official(tmp_path / "nowhere.yaml")


def test_the_tables_are_sound() -> None:
    ours = set(all_keys())
    assert set(RENAMED.values()) <= ours  # every target exists
    assert not set(RENAMED) & set(DROPPED)
    assert set(VALUES) | set(REMARKS) | set(OMITTED) <= set(RENAMED)


def test_the_script_writes_yaml_to_standard_output_only(tmp_path: Path) -> None:
    (tmp_path / "official.yaml").write_text(SAMPLE)
    command = [sys.executable, "tools/convert_config.py", str(tmp_path / "official.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (tmp_path / "ours.yaml").write_text(done.stdout)
    assert load_config(tmp_path / "ours.yaml").sample.guidance_scale == 7.0
