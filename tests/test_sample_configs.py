"""The shipped configs and shell scripts: official file names, official recipes, nothing superfluous."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from engine.config import Config, load_config
from engine.start import compare_with_recipe
from sample.labels import UCF101_CLASSES
from tests.conftest import ROOT
from tests.fault_support import run

SETS = ("ffs", "sky", "taichi", "ucf101")
# what the official files say: clip start of training and of joint training, log interval
RECIPES = {
    "ffs": (20_000, 500_000, 100),
    "sky": (20_000, 20_000, 50),
    "taichi": (500_000, 500_000, 50),
    "ucf101": (100_000, 100_000, 50),
}
PLACES = ("sample/*.sh", "train_scripts/*.sh", "tools/*.sh", "slurm_scripts/*")
SCRIPTS = sorted(script for place in PLACES for script in ROOT.glob(place))


def config_of(name: str, kind: str) -> Config:
    return load_config(ROOT / "configs" / name / f"{name}_{kind}.yaml")


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("joint", [False, True])
def test_training_recipe(name: str, joint: bool) -> None:
    config = config_of(name, "img_train" if joint else "train")
    clip_start, joint_clip_start, log_every = RECIPES[name]
    data, optim, train = config.data, config.optim, config.train
    assert (config.model.name, config.model.num_classes) == ("Latte-XL/2", 101 if name == "ucf101" else 0)
    assert (config.model.variant, config.model.learn_sigma) == ("interleaved", True)
    assert (data.name, data.num_frames, data.frame_interval, data.image_size) == (name, 16, 3, 256)
    assert data.num_images == (8 if joint else 0)
    assert (optim.learning_rate, optim.schedule, optim.weight_decay) == (1e-4, "constant", 0.0)
    assert (optim.max_grad_norm, optim.clip_start_step) == (0.1, joint_clip_start if joint else clip_start)
    assert (train.max_steps, train.checkpoint_every, train.log_every) == (1_000_000, 10_000, log_every)
    assert (train.batch_size, train.grad_accum_steps, train.ema_decay) == (4 if joint else 5, 1, 0.9999)
    assert (train.seed, train.precision, train.ema_warmup) == (3407, "tf32", False)
    assert (config.codec.path, config.codec.scale) == ("stabilityai/sd-vae-ft-ema", 0.18215)
    assert (config.diffusion.num_steps, config.diffusion.schedule) == (1000, "linear")


@pytest.mark.parametrize(
    ("kind", "settings", "ranks", "warnings", "says"),
    [
        ("train", [], 8, 0, "of those every 10000 steps (10.8 GB each) the 2 newest are kept"),
        ("train", [], 2, 1, "10, the official recipe's is 40: keep that with train.grad_accum_steps=4, or lower"),
        ("train", ["train.batch_size=1", "train.grad_accum_steps=3"], 5, 1, "train.grad_accum_steps=8, or"),
        ("img_train", [], 4, 1, "global batch 16, the official recipe's is 32"),
        ("img_train", [], 4, 1, "optim.learning_rate=5e-05"),
        ("train", ["train.keep_last=0"], 9, 0, None),
        ("train", ["train.keep_every=10000"], 9, 0, None),
        ("train", ["data.name=folder"], 1, 0, None),
        ("img_train", ["data.num_images=1"], 1, 0, None),
    ],
)
def test_a_start_names_what_differs_from_the_recipe(
    kind: str, settings: list[str], ranks: int, warnings: int, says: str | None
) -> None:
    config = load_config(ROOT / f"configs/ffs/ffs_{kind}.yaml", settings)
    batch = config.train.batch_size * config.train.grad_accum_steps * ranks
    lines = compare_with_recipe(config, batch, 10_800_000_000)
    assert [line.partition(":")[0] for line in lines] == ["warning"] * warnings + ["checkpoints"] * bool(says)
    assert says is None or says in lines[0]


def test_a_run_says_it_once(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run([*tiny, "data.name=ucf101", "train.max_steps=1"])
    assert capsys.readouterr().err.count("warning: global batch 2, the official recipe's is 40: ") == 1


@pytest.mark.parametrize("name", SETS)
def test_sampling_recipe(name: str) -> None:
    config = config_of(name, "sample")
    assert (config.sample.method, config.sample.steps) == ("ddpm", 250)
    assert config.sample.guidance_scale == (7.0 if name == "ucf101" else 1.0)
    trained = config_of(name, "train")
    assert (config.model, config.diffusion, config.codec) == (trained.model, trained.diffusion, trained.codec)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kind", ["train", "img_train", "sample"])
def test_a_config_says_its_command_and_only_what_differs_from_the_defaults(name: str, kind: str) -> None:
    text = (ROOT / "configs" / name / f"{name}_{kind}.yaml").read_text()
    is_sample = kind == "sample"
    command = f"python sample/sample.py --config configs/{name}/{name}" if is_sample else f"bash train_scripts/{name}"
    assert f"\n#   {command}_{kind}.{'yaml' if is_sample else 'sh'} " in text
    defaults = Config().to_dict()
    for section, values in yaml.safe_load(text).items():
        same = [f"{section}.{key}" for key, value in values.items() if defaults[section][key] == value]
        assert set(same) <= {"model.name"}, same  # the name of the network always stands


def test_ucf101_classes_are_numbered_as_folders_are_sorted() -> None:
    assert len(set(UCF101_CLASSES)) == 101 == config_of("ucf101", "train").model.num_classes
    assert sorted(UCF101_CLASSES) == UCF101_CLASSES
    assert UCF101_CLASSES.index("HammerThrow") == 34  # by code point: before Hammering


def test_G6_every_script_parses_and_names_what_exists() -> None:
    names = {script.relative_to(ROOT).as_posix() for script in SCRIPTS}
    assert {f"sample/{name}{kind}.sh" for name in (*SETS, "demo") for kind in ("", "_ddp")} <= names
    assert {f"train_scripts/{name}{kind}.sh" for name in SETS for kind in ("_train", "_img_train")} <= names
    for script in SCRIPTS:
        checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
        assert checked.returncode == 0 and script.stat().st_mode & 0o111, checked.stderr
        assert script.read_text().startswith("#!/bin/bash\n")
        for path in re.findall(r"(?:configs/[\w/]+\.yaml|[\w/]+\.py)\b", script.read_text()):
            # sample.py in a comment is the script in the same folder
            assert (ROOT / path).exists() or (script.parent / path).exists(), path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the scripts without .venv, so that `python` is one of our own, which says how it was called."""
    (tmp_path / "python").write_text('#!/bin/bash\nprintf "%s|" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    for script in SCRIPTS:
        copy = tmp_path / "project" / script.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(script.read_bytes())
    return tmp_path / "project"


def called(project: Path, script: str, argument: str, **environment: str) -> str:
    search = {"PATH": f"{project.parent}:/usr/bin:/bin"}
    command = ["bash", str(project / script), argument]
    done = subprocess.run(command, env=search | environment, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else f"{done.returncode} {done.stderr}"


LAUNCHER = r"-m\|engine\.elastic\|--standalone\|--nproc_per_node=%s\|--max-restarts=3\|--shutdown-timeout=240\|"
LAUNCHER += r"--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1\|"


def test_A5_the_launcher_passes_on_its_arguments(project: Path) -> None:
    """It becomes torchrun, so that a signal reaches that, and no shell that waits."""
    assert "\nexec python -m engine.elastic " in (ROOT / "train_scripts" / "launch.sh").read_text()
    for environment, processes in (({"GPUS": "3"}, "3"), ({}, r"[1-9]\d*")):
        said = called(project, "train_scripts/sky_img_train.sh", "data.path=/a b", **environment)
        assert re.fullmatch(rf"{LAUNCHER % processes}train_with_img.py\|--config\|\S+\|data.path=/a b\|", said), said


@pytest.mark.parametrize("name", [*SETS, "demo"])
def test_sampling_on_many_processes_is_launched_like_a_training(project: Path, name: str) -> None:
    """The last flag counts, so those of the user stand above the script's."""
    said = called(project, f"sample/{name}_ddp.sh", "--num_videos=9", GPUS="2", CKPT="a b.pt", OUT="my out")
    checkpoint = "" if name == "demo" else r"--ckpt\|a b\.pt\|"
    command = rf"sample/sample_ddp\.py\|--config\|configs/{name}/{name}_sample\.yaml\|{checkpoint}"
    flags = r"--save_video_path\|my out\|--num_videos\|(2048|64)\|(--\w+\|\w+\|)?--num_videos=9\|"
    assert re.fullmatch(LAUNCHER % 2 + command + flags, said), said
    assert ("--labels|all|" in said) == (name == "ucf101")  # whose config names ten for a first look


def test_metrics_are_launched_with_the_flags_of_the_environment(project: Path) -> None:
    """From any folder: the modules are found by PYTHONPATH, and paths stay as they are given."""
    (project.parent / "python").write_text('#!/bin/bash\nprintf "%s|" "$PYTHONPATH" "$@"\n')
    given = {"REAL": "a b", "FAKE": "f", "METRICS": "m", "PROTOCOL": "p", "DATASET": "ffs", "DETECTORS": "d"}
    said = called(project, "tools/eval_metrics.sh", "--seeds=1", **given, GPUS="2")
    launcher = f"{project}|-m|engine.elastic|--standalone|--nproc_per_node=2|-m|tools.calc_metrics_for_dataset|"
    flags = "--real_data_path|a b|--fake_data_path|f|--metrics|m|--protocol|p|--detector_dir|d|--dataset|ffs|--seeds=1|"
    assert said == launcher + flags
    assert called(project, "tools/eval_metrics.sh", "", REAL="a").startswith("2 error: set REAL and FAKE")
