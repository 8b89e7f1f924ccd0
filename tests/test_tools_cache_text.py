"""The cache of text features: what it holds, that training from it is training online, and what is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import train
from datasets.shards import INDEX
from datasets.text_features import TextCache
from engine.checkpoint import load_checkpoint, step_folder
from engine.conditions import EMPTY, EncodedFeatures
from engine.config import Config, load_config
from engine.distributed import World
from engine.trainer import Trainer
from tests.conftest import refuses, tree
from tests.fault_support import same_tensors
from tests.text_support import CAPTIONS, TINY_TEXT, draw_captioned, save_text_encoder, write_captions
from tools import cache_text
from tools.cache_text import TextWriter

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("text")
    folders = draw_captioned(root / "clips"), save_text_encoder(root / "encoder")
    return [*TINY_TEXT, f"data.path={folders[0]}", f"text.path={folders[1]}"]


@pytest.fixture(scope="module")
def cache(run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("caches") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_text, "SHARD_CAPTIONS", 2)
        TextWriter(load_config(None, run), out, World()).write()
    return out


def with_cache(run: list[str], cache: Path, *overrides: str) -> Config:
    return load_config(None, [*run, f"text.features={cache}", *overrides])


def test_cached_features_are_those_of_the_encoder(run: list[str], cache: Path) -> None:
    online = EncodedFeatures(load_config(None, run).text, CPU)
    stored = TextCache(cache)
    assert sorted(file.name for file in cache.glob("shard*")) == [f"shard-{n:05d}.safetensors" for n in range(3)]
    for caption in (EMPTY, *CAPTIONS.values()):
        assert torch.equal(stored(caption), online(caption))
    assert len(stored(EMPTY)) == 24  # padding too
    assert not (cache / "plan.json").exists()


def test_training_from_it_is_training_online(run: list[str], cache: Path, tmp_path: Path) -> None:
    """In every bit, also where one continues the other."""
    online = [*run, f"train.output_dir={tmp_path / 'online'}"]
    stored = [*run, f"train.output_dir={tmp_path / 'stored'}", f"text.features={cache}"]
    assert train.main([*online, "train.max_steps=3"]) == 0
    assert train.main([*stored, "train.max_steps=2"]) == 0
    assert train.main([*stored, "train.max_steps=3", "text.path=null"]) == 0
    first, second = (load_checkpoint(step_folder(tmp_path / name / "checkpoints", 3)) for name in ("online", "stored"))
    assert same_tensors(first.model, second.model)


def test_a_killed_run_continues(run: list[str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_text, "SHARD_CAPTIONS", 2)
    encoded: list[str] = []

    class Dying(EncodedFeatures):
        def __call__(self, caption: str) -> torch.Tensor:
            encoded.append(caption)
            if len(encoded) == 4:
                raise KeyboardInterrupt
            return super().__call__(caption)

    config, out = load_config(None, run), tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr("engine.conditions.EncodedFeatures", Dying)
        with pytest.raises(KeyboardInterrupt):
            TextWriter(config, out, World()).write()
        refuses("is not a finished cache", TextCache, out)
        TextWriter(config, out, World()).write()
    assert encoded.count(EMPTY) == 1  # of the first shard, which was whole
    assert tree(out) == tree(cache)


def test_a_foreign_cache_is_refused(run: list[str], cache: Path, tmp_path: Path) -> None:
    other = save_text_encoder(tmp_path / "encoder", seed=1)
    for overrides, sentence in [
        ([f"text.path={other}"], r"was made with other settings \(sha256"),
        (["text.max_length=20"], r"max_length: 24 -> 20"),
        (["text.clean_captions=true"], "clean_captions: False -> True"),
        (["text.dtype=bf16"], "dtype: fp32 -> bf16"),
        (["sample.labels=[a comet]"], r"1 of 7 captions are missing \(first: 'a comet'\)"),
    ]:
        refuses(sentence, Trainer, with_cache(run, cache, *overrides), World())
    copy = shutil.copytree(next(Path(each[10:]) for each in run if each.startswith("text.path=")), tmp_path / "copy")
    Trainer(with_cache(run, cache, f"text.path={copy}"), World())  # the same files elsewhere
    clips = draw_captioned(tmp_path / "clips")
    write_captions(clips, {**CAPTIONS, "falls/clip0": "a plum falls"})
    sentence = "was made with other captions: 1 of 7 .*'a plum falls'"
    refuses(sentence, Trainer, with_cache(run, cache, f"data.path={clips}"), World())
    refuses("holds another cache", TextWriter(load_config(None, [*run, f"data.path={clips}"]), cache, World()).write)
    refuses("there is no folder", Trainer, with_cache(run, tmp_path / "nothing"), World())


@pytest.mark.parametrize("damage", ["index", "table", "shard"])
def test_a_damaged_cache_is_refused(run: list[str], cache: Path, tmp_path: Path, damage: str) -> None:
    broken = shutil.copytree(cache, tmp_path / "cache")
    file = {"index": INDEX, "table": "captions.safetensors", "shard": "shard-00001.safetensors"}[damage]
    os.truncate(broken / file, (broken / file).stat().st_size // 2)
    refuses(r"again", TextCache, broken)


def test_networks_without_captions_are_refused(tiny: list[str], run: list[str], cache: Path, tmp_path: Path) -> None:
    refuses("reads no captions", TextWriter, load_config(None, tiny), tmp_path / "out", World())
    refuses(r"text\.features must not be set", TextWriter, with_cache(run, cache), tmp_path / "out", World())
    assert json.loads((cache / INDEX).read_text())["format"] == "latte-text-1"
