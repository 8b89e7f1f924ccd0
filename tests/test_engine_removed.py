"""Keys, values and flags that have left are answered with a sentence; configurations of older runs still load."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import all_keys, load_config
from engine.keys import REMOVED
from sample import sample, sample_ddp

KEYS = [name for name in REMOVED if not name.startswith("--")]
FLAGS = [name for name in REMOVED if name.startswith("--")]


def used(name: str) -> str:
    """`section.key=value` that uses a removed key or value."""
    return name if "=" in name else f"{name}=8"


@pytest.mark.parametrize("name", KEYS)
def test_a_removed_key_is_answered(name: str) -> None:
    assert name not in set(all_keys())
    with pytest.raises(ValueError) as caught:
        load_config(None, [used(name)])
    assert REMOVED[name] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", KEYS)
def test_a_saved_configuration_of_an_older_version_loads(name: str, tmp_path: Path) -> None:
    section, key, value = used(name).replace("=", ".").split(".")
    file = tmp_path / "config.yaml"
    file.write_text(f"{section}:\n  {key}: {value}\n")
    assert load_config(file, saved=True) == load_config()
    if "=" not in name:  # off, as every older file has it
        file.write_text(f"{section}:\n  {key}: null\n")
        assert load_config(file) == load_config()


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("script", [sample.main, sample_ddp.main])
def test_a_removed_flag_is_answered(script: object, flag: str) -> None:
    with pytest.raises(ValueError, match=f"{flag}: ") as caught:
        script(["--ckpt", "nowhere", flag, "x"])  # type: ignore[operator]
    assert REMOVED[flag] in str(caught.value)
