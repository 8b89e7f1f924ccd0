"""Fixtures shared by the engine's tests: a small set of real frame folders, and a tiny run on it."""

from __future__ import annotations

import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

    from engine.config import Config
    from engine.trainer import Trainer

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
CLIPS = ROOT.parent / "shared" / "media" / "clips"
needs_media = pytest.mark.skipif(not CLIPS.is_dir(), reason="the sample clips of ../shared/media are not here")

# a tiny network in pixel space: depth 2, width 16, 4 frames of 8x8
TINY = [
    *("model.name=custom", "model.hidden_size=16", "model.depth=2", "model.num_heads=2", "model.patch_size=2"),
    *("model.num_classes=2", "codec.latent_channels=3", "codec.downsample_factor=1", "codec.scale=1.0"),
    *("data.name=folder", "data.num_frames=4", "data.frame_interval=1", "data.image_size=8", "data.num_workers=0"),
    *("optim.learning_rate=1e-3", "optim.clip_start_step=0"),
    *("train.batch_size=2", "train.log_every=1", "train.checkpoint_every=100"),
]
FAULT_TEST = re.compile(r"test_[A-H]\d+_")
SEVERAL_PROCESSES = "dist"  # one worker runs all of these, after one another: each needs both cores for itself


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks fault tests; shares tests out over workers by file, so that a file's fixtures are made once."""
    for item in items:
        if FAULT_TEST.match(item.name):
            item.add_marker("fault")
        group = SEVERAL_PROCESSES if item.get_closest_marker("dist") else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


def draw_frame_folders(root: Path, clips: int) -> Path:
    """Two classes of `clips` clips, each a folder of seven 12x10 PNG frames."""
    rng = np.random.default_rng(0)
    for label in ("falls", "rises"):
        for clip in range(clips):
            folder = root / label / f"clip{clip}"
            folder.mkdir(parents=True)
            for frame in range(7):
                pixels = rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{frame:03d}.png")
    return root


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test draws the same numbers whichever tests its worker ran before."""
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


def tree(root: Path) -> dict[str, bytes]:
    """Returns the bytes of every file below `root`, hidden ones too."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def refuses(sentence: str, call: Callable[..., object], *arguments: Any, **options: Any) -> None:
    """Checks that the call ends in an error of the user's, in one line that matches `sentence`."""
    with pytest.raises((ValueError, OSError), match=sentence, check=lambda error: "\n" not in str(error)):
        call(*arguments, **options)


@pytest.fixture(scope="session")
def frame_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of three clips, each a folder of seven 12x10 PNG frames."""
    return draw_frame_folders(tmp_path_factory.mktemp("frames"), clips=3)


def random_weights(config: Config, seed: int) -> dict[str, Tensor]:
    """Weights under which the network's output depends on everything (a fresh network outputs zero)."""
    import torch

    from engine.build import build_model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.state_dict()


def save_weights(
    config: Config, root: Path, step: int = 1, seeds: tuple[int, int] = (0, 0), names: Iterable[str] = ()
) -> Path:
    """Writes a checkpoint of random weights, of which the second seed is the average's; returns its folder."""
    from engine.checkpoint import Checkpoint, save_checkpoint

    weights = [random_weights(config, seed) for seed in seeds]
    return save_checkpoint(Checkpoint(step, 2, *weights, {}, {}, {"class_names": list(names)}), config, root)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny class-conditional network, with weights that show what they are asked."""
    from engine.config import load_config

    root = tmp_path_factory.mktemp("run") / "checkpoints"
    return save_weights(load_config(None, TINY), root, names=["falls", "rises"])


@pytest.fixture
def tiny(frame_folders: Path, tmp_path: Path) -> list[str]:
    """Overrides that make a run of the tiny network on the frame folders, writing into tmp_path/run."""
    return [*TINY, f"data.path={frame_folders}", f"train.output_dir={tmp_path / 'run'}"]


@pytest.fixture(scope="session")
def finished(frame_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run of three steps, with a checkpoint of each. Copy it to change it."""
    from tests.fault_support import run

    folder = tmp_path_factory.mktemp("finished") / "run"
    every = ["train.max_steps=3", "train.checkpoint_every=1", "train.keep_last=0"]
    run([*TINY, *every, f"data.path={frame_folders}", f"train.output_dir={folder}"])
    return folder


@pytest.fixture
def stopped(finished: Path, tiny: list[str], tmp_path: Path) -> Callable[..., Trainer]:
    """Makes trainers that continue a copy of the finished run, in tmp_path/run."""
    from tests.fault_support import make

    shutil.copytree(finished, tmp_path / "run")
    keys = [*tiny, "train.max_steps=5", "train.checkpoint_every=1"]
    return lambda *extra, **options: make([*keys, *extra], **options)
