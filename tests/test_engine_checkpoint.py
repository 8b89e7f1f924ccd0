"""The checkpoint format: complete or absent, hashed, pruned, and nothing loaded that is not ours."""

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
    assert ckpt.load_checkpoint_config(tmp_path) == config
    assert (tmp_path / "latest").read_text() == "step-0000012"


def test_old_ones_go_in_numeric_order_and_strangers_stay(tmp_path: Path, config: Config) -> None:
    (tmp_path / "step-12.bak").mkdir(parents=True)
    for step in (3, 9_999_999, 10_000_000):
        ckpt.save_checkpoint(make(step), config, tmp_path, keep_last=2)
    names = [folder.name for folder in ckpt.list_checkpoints(tmp_path)]
    assert names == ["step-9999999", "step-10000000"]
    assert (tmp_path / "step-12.bak").is_dir()


def test_a_failed_write_leaves_the_old_one_and_no_rubbish(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt.save_checkpoint(make(1), config, tmp_path)

    def full_disk(*_: object) -> None:
        raise RuntimeError("no space left")

    monkeypatch.setattr(ckpt, "save_file", full_disk)
    with pytest.raises(RuntimeError, match="no space"):
        ckpt.save_checkpoint(make(2), config, tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step-0000001"]


def test_non_finite_weights_are_not_saved(tmp_path: Path, config: Config) -> None:
    bad = make(2)
    bad.ema = {"w": torch.tensor([1.0, float("nan")])}
    with pytest.raises(CheckpointError, match="ema has non-finite values in w"):
        ckpt.save_checkpoint(bad, config, tmp_path)
    assert not tmp_path.exists() or not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.safetensors", "optim.safetensors", "state.json", "config.yaml"])
def test_one_flipped_bit_is_noticed(tmp_path: Path, config: Config, name: str) -> None:
    folder = ckpt.save_checkpoint(make(1), config, tmp_path)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=name):
        ckpt.load_checkpoint(folder)


def test_what_is_not_a_checkpoint_is_named(tmp_path: Path) -> None:
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
    assert ckpt.load_checkpoint_config(target) == config
