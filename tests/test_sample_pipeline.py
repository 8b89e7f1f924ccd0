"""The pipeline of our own: saved, loaded in a fresh process to the same videos, and through a hub on the loopback."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import load_config
from sample.pipeline_latte import LatteVideoPipeline
from tests.conftest import TINY, refuses, save_weights
from tests.hub_stand_in import local_hub
from tests.t2v_support import tiny_vae
from tools import convert

SETTINGS: dict[str, Any] = {"num_videos": 3, "seed": 4, "steps": 2, "guidance_scale": 2.0}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A run of random weights whose codec has two layers of four latent channels."""
    tiny_vae().save_pretrained(tmp_path / "vae")
    codec = [f"codec.path={tmp_path / 'vae'}", "codec.latent_channels=4", "codec.downsample_factor=2"]
    save_weights(load_config(None, [*TINY, *codec]), tmp_path / "run" / "checkpoints", names=["falls", "rises"])
    return tmp_path / "run"


def test_pushed_and_loaded_by_name_it_makes_the_same_videos(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Bit for bit, and with nothing of this machine left."""
    expected = LatteVideoPipeline.from_checkpoint(checkpoint, device="cpu")(**SETTINGS)
    assert expected.shape == (3, 4, 8, 8, 3) and expected.std() > 1
    with local_hub(tmp_path / "home") as hub:
        assert convert.main(["pipeline", str(checkpoint), str(tmp_path / "mine"), "--push", "me/mine"]) == 0
        made = hub.commits["me/mine", "main"]
        said = capsys.readouterr().out.splitlines()
        assert said[-2:] == [str(tmp_path / "mine"), f"https://hub/me/mine/commit/{made.name}"]
        files = {file.relative_to(made).as_posix(): file for file in made.rglob("*") if file.is_file()}
        assert set(files) == {"README.md", "config.json", "model.safetensors", "codec/config.json",
                              "codec/diffusion_pytorch_model.safetensors"}  # fmt: skip
        card = files["README.md"].read_text()
        assert card.startswith("---\nlibrary_name: latte\n") and "# mine" in card and "of 2 classes" in card
        assert str(tmp_path) not in files["config.json"].read_text(), "paths of this machine"
        for name in ("run", "vae", "mine"):
            (tmp_path / name).rename(tmp_path / f"{name} gone")
        found = LatteVideoPipeline.from_pretrained("me/mine", device="cpu")(**SETTINGS)
    assert np.array_equal(found, expected)
    assert f"me/mine: revision main, commit {made.name}" in caplog.text


def test_a_folder_keeps_classes_and_settings(checkpoint: Path, tmp_path: Path) -> None:
    assert convert.main(["pipeline", str(checkpoint), str(tmp_path / "mine")]) == 0
    pipeline = LatteVideoPipeline.from_pretrained(tmp_path / "mine", device="cpu")
    first = LatteVideoPipeline.from_checkpoint(checkpoint, device="cpu")
    assert pipeline.generator.conditions.names == first.generator.conditions.names
    name = pipeline.generator.conditions.names[1]
    wanted = {**SETTINGS, "labels": [name], "num_frames": 6, "num_videos": 1}
    assert np.array_equal(pipeline(**wanted), first(**wanted))
    again = pipeline.save_pretrained(tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (again / file).read_bytes() == (tmp_path / "mine" / file).read_bytes()
    refuses("not an empty folder", pipeline.save_pretrained, tmp_path / "mine")


def test_folders_that_are_refused(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = LatteVideoPipeline.from_checkpoint(checkpoint, device="cpu").save_pretrained(tmp_path / "mine")
    refuses("there is no folder", LatteVideoPipeline.from_pretrained, tmp_path / "absent")
    refuses(r"not a pipeline of this project: it has no config\.json", LatteVideoPipeline.from_pretrained, tmp_path)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "_class_name": "LattePipeline"}))
    refuses("describes a LattePipeline, not a", LatteVideoPipeline.from_pretrained, folder)
    described["model"]["hidden_size"] = 32
    (folder / "config.json").write_text(json.dumps(described))
    refuses("does not fit the network: misshapen", LatteVideoPipeline.from_pretrained, folder, device="cpu")
