"""Weights from files: all or nothing, with a report; an image DiT as a start."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models import Latte
from models.convert import init_from_dit, load_weights, read_state_dict
from tests.conftest import refuses
from tests.latte_support import tiny_latte


def network(seed: int = 0, size: int = 8, frames: int = 4, **changes: Any) -> Latte:
    return tiny_latte(size, seed, frames, channels=4, **changes)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_official_files_ema_first_then_model_then_bare(tmp_path: Path, legacy: bool) -> None:
    ema, raw = network(1).state_dict(), network(2).state_dict()
    wrapped = {f"module.{key}": value for key, value in raw.items()}
    compiled = {key.replace("blocks.0.", "blocks.0._orig_mod."): value for key, value in raw.items()}
    both = {f"_orig_mod.module.{key}": value for key, value in raw.items()}
    path = tmp_path / "0000100.pt"
    cases = [({"model": raw, "ema": ema}, ema), ({"model": raw, "ema": None}, raw), ({"model": wrapped}, raw)]
    for content, expected in [*cases, (raw, raw), (compiled, raw), (both, raw)]:
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        assert same(read_state_dict(path), expected)


def test_safetensors_and_the_other_weights_of_an_official_file(tmp_path: Path) -> None:
    ema, raw = network(1).state_dict(), network(2).state_dict()
    torch.save({"model": raw, "ema": ema}, tmp_path / "both.pt")
    assert same(read_state_dict(tmp_path / "both.pt", prefer="model"), raw)
    save_file({f"module.{key}": value for key, value in raw.items()}, tmp_path / "model.safetensors")
    assert same(read_state_dict(str(tmp_path / "model.safetensors")), raw)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_broken_files(tmp_path: Path, name: str) -> None:
    path, weights = tmp_path / name, network().state_dict()
    refuses(name, read_state_dict, path)
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    whole = path.read_bytes()
    for broken in (b"", b"hello world " * 20, whole[: len(whole) // 2], whole[:-40]):
        path.write_bytes(broken)
        refuses(f"{name} is not a complete", read_state_dict, path)
    with pytest.raises(FileNotFoundError):
        read_state_dict(tmp_path)


def test_files_without_weights_or_with_the_same_weights_twice(tmp_path: Path) -> None:
    for content in ([1, 2], {"step": 3}, {}, {"ema": {"step": 3}}, {"ema": {}}):
        torch.save(content, tmp_path / "other.pt")
        refuses(r"other.pt holds no network weights", read_state_dict, tmp_path / "other.pt")
    torch.save({"a.weight": torch.ones(1), "module.a.weight": torch.zeros(1)}, tmp_path / "twice.pt")
    refuses("twice", read_state_dict, tmp_path / "twice.pt")


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"size": 16}, ["pos_embed: (1, 64, 16)", "another latent size", "data.image_size"]),
        ({"frames": 8}, ["temp_embed: (1, 8, 16)", "another frame count", "data.num_frames"]),
        ({"num_classes": 5}, ["embedding_table.weight: (6, 16)", "(4, 16) in the network"]),
        ({"variant": "sequential"}, ["unexpected blocks.{0-3}.temporal_attn.qkv.weight"]),
    ],
)
def test_weights_of_another_network(sizes: dict, words: list[str]) -> None:
    refuses(".*".join(map(re.escape, words)), load_weights, network(), network(**sizes).state_dict(), "other.pt")


def dit(**changes: Any) -> dict[str, Tensor]:
    """Weights under DiT's official key names: ours, but for time."""
    return {key: value for key, value in network(7, **changes).state_dict().items() if key != "temp_embed"}


def test_everything_but_time_is_taken_and_labels_of_other_classes_are_left() -> None:
    model, theirs = network(1), dit()
    assert list(network(variant="image").state_dict()) == list(theirs)
    time = model.temp_embed.clone()
    report = init_from_dit(model, theirs)
    assert set(report.taken) == set(theirs) and not report.left_theirs
    assert list(report.left_ours) == ["temp_embed"] and "no frames" in report.left_ours["temp_embed"]
    assert same(dict(model.state_dict()), {**theirs, "temp_embed": time})

    key, model = "y_embedder.embedding_table.weight", network(1)
    own = model.y_embedder.embedding_table.weight.clone()
    report = init_from_dit(model, dit(num_classes=1000))
    assert report.left_theirs[key] == "(1001, 16) in the checkpoint, (4, 16) in the network"
    assert key in report.left_ours and torch.equal(model.y_embedder.embedding_table.weight, own)
    assert "no labels" in init_from_dit(network(num_classes=0), dit(num_classes=1000)).left_theirs[key]


def test_second_attentions_fewer_layers_and_tubelets_keep_ours() -> None:
    model, theirs = network(1, variant="parallel", depth=3, patch_embedding="tubelet"), dit(size=16)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    report = init_from_dit(model, theirs)
    after = model.state_dict()
    assert torch.equal(after["blocks.2.attn.qkv.weight"], theirs["blocks.2.attn.qkv.weight"])
    assert all(torch.equal(after[key], own[key]) for key in report.left_ours)
    assert report.left_ours["blocks.0.temporal_attn.qkv.weight"].startswith("an image model has no second")
    assert report.left_theirs["blocks.3.attn.qkv.weight"] == "the network has no such weights"
    assert "ours is computed" in report.left_theirs["pos_embed"]
    assert "(16, 4, 2, 2, 2) in the network" in report.left_theirs["x_embedder.proj.weight"]
    assert set(report.taken) | set(report.left_theirs) == set(theirs)
    assert set(report.taken) | set(report.left_ours) == set(own)


def test_the_report_folds_layers_and_another_width_is_refused() -> None:
    text = str(init_from_dit(network(variant="sequential", depth=2), dit()))
    assert text.splitlines()[0] == "taken from the checkpoint: 32"  # 2 + 4 + 1 + 1, 2 x 10, 4
    assert "  blocks.{0-1}.attn.qkv.weight" in text
    assert "  blocks.{2-3}.attn.qkv.weight: the network has no such weights" in text
    assert "  blocks.{0-1}.temporal_attn.proj.bias: an image model has no second attention" in text
    model = network(1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    refuses(r"width 16 .*custom", init_from_dit, model, dit(hidden_size=32))
    assert same(model.state_dict(), before)
