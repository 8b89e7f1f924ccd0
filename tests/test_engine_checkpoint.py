"""The checkpoint format and exports of it; its faults are in test_faults_checkpoints.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine import checkpoint as ckpt
from engine.checkpoint import Checkpoint, CheckpointError
from engine.config import Config, load_config
from engine.weights import export_weights, load_model_weights


@pytest.fixture
def config() -> Config:
    return load_config(None, ["model.name=Latte-S/2"])


def make(step: int) -> Checkpoint:
    tensors = {"w": torch.full((3,), float(step)), "b": torch.arange(4)}
    optim, rng = {"exp_avg/w": torch.ones(3)}, {"cpu/0": torch.zeros(5)}
    return Checkpoint(step, step * 10, tensors, tensors, optim, rng, {"note": 1})


def test_round_trip(tmp_path: Path, config: Config) -> None:
    folder = ckpt.save_checkpoint(make(12), config, tmp_path)
    assert folder.name == "step-0000012"
    assert {file.name for file in folder.iterdir()} == {
        *(f"{name}.safetensors" for name in ("model", "ema", "optim", "rng")),
        *("state.json", "config.yaml", "manifest.json"),
    }
    loaded = ckpt.load_checkpoint(folder)
    assert (loaded.step, loaded.samples_seen, loaded.state) == (12, 120, {"note": 1})
    assert torch.equal(loaded.model["w"], make(12).model["w"]) and torch.equal(loaded.model["b"], torch.arange(4))
    assert ckpt.read_config(folder) == config
    assert (tmp_path / "latest").read_text() == "step-0000012"


def test_other_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        ckpt.find_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        ckpt.find_checkpoint(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(CheckpointError, match="format 'other'"):
        ckpt.find_checkpoint(tmp_path)


def test_an_export_holds_one_set_of_weights(tmp_path: Path, config: Config) -> None:
    ckpt.save_checkpoint(make(5), config, tmp_path / "checkpoints")
    target = export_weights(tmp_path, tmp_path / "export")
    assert torch.equal(load_model_weights(target, "ema")["w"], torch.full((3,), 5.0))
    with pytest.raises(CheckpointError, match="'raw' weights"):
        load_model_weights(target, "raw")
    assert ckpt.read_config(target) == config
