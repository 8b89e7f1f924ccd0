"""Turn a config of the official repository into one of ours, and say key by key what became of it.

    python -m tools.convert_config OFFICIAL.yaml [-o OURS.yaml]

Takes the training and sampling configs of the four data sets. The result goes to OURS.yaml or standard
output, the account of it to standard error.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from engine.cli import run
from engine.official_keys import DROPPED, RENAMED

# official key -> its value in our terms; keys that are not here keep their value
VALUES: dict[str, Callable[[Any], Any]] = {
    "dataset": lambda name: str(name).removesuffix("_img"),
    "sample_method": lambda method: str(method).lower(),
    "use_fp16": lambda on: "fp16" if on else "fp32",
    "mixed_precision": lambda on: "bf16" if on else "tf32",
    "sample_names": lambda names: [str(name) for name in (names if isinstance(names, list) else [names])],
}
# official key -> what to say beside the renaming
REMARKS: dict[str, str] = {
    "pretrained_model_path": "the codec is its subfolder vae; text-to-video parts are not read.",
    "mixed_precision": "the official switch had no effect: it trained in tf32.",
    "gradient_accumulation_steps": "all step counts here are optimiser steps, not micro-batches.",
    "learning_rate": "the official programs always used 1e-4, whatever the file said.",
}
# official keys that have a counterpart but are not carried over, and why
OMITTED: dict[str, str] = {
    "frame_data_txt": "images are drawn from the videos; for those of a list, put them below data.path and "
    "set data.frame_list.",
}
UNCONDITIONAL, TEXT = 1, 78  # values of the official key `extras`


def convert(official: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The sections of our config, and a line for each official key on what became of it.

    Raises:
        ValueError: a text-to-video config, which these data sets' programs do not run.
    """
    if official.get("extras") == TEXT or str(official.get("model", "")).startswith("LatteT2V"):
        raise ValueError(
            "this is a text-to-video config (model LatteT2V); only those of ffs, sky, taichi, ucf101 convert: "
            "sample/sample_t2x.py reads its keys as they are, and says what to write for the few that it replaced."
        )
    sections: dict[str, dict[str, Any]] = {}
    account = []
    for key, value in official.items():
        if key in DROPPED:
            account.append(f"dropped   {key}: {DROPPED[key]}")
        elif key not in RENAMED:
            account.append(f"unknown   {key}: not a key of the official configs; left out.")
        elif key in OMITTED:
            account.append(f"omitted   {key}: {OMITTED[key]}")
        elif value is None:
            account.append(f"empty     {key}: {RENAMED[key]} keeps its default.")
        else:
            account.append(_take(sections, key, value))
    if official.get("extras") == UNCONDITIONAL and sections.get("model", {}).pop("num_classes", None) is not None:
        account.append("note      num_classes: left out, since extras is 1 (unconditional).")
    if "path" in sections.get("codec", {}):
        sections["codec"]["subfolder"] = "vae"
    return sections, account


def _take(sections: dict[str, dict[str, Any]], key: str, value: Any) -> str:
    """Put the value of official `key` where it belongs; returns its line of the account."""
    section, _, name = RENAMED[key].partition(".")
    ours = VALUES.get(key, lambda same: same)(value)
    sections.setdefault(section, {})[name] = ours
    remark = f" ({REMARKS[key]})" if key in REMARKS else ""
    return f"renamed   {key} -> {RENAMED[key]}: {ours}{remark}"


def read_official(path: Path) -> dict[str, Any]:
    """The flat mapping that an official config is.

    Raises:
        FileNotFoundError, ValueError: one sentence.
    """
    from engine.config import read_yaml

    values = read_yaml(path)
    if not isinstance(values, dict) or not values:
        raise ValueError(f"config file {path} holds no keys; an official config is a list of `key: value` lines.")
    if isinstance(values.get("model"), dict):
        raise ValueError(f"config file {path} has sections: it is one of ours already.")
    return {str(key): value for key, value in values.items()}


def main(argv: list[str]) -> int:
    """Convert, check that the result loads, write it, and give the account."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("official", type=Path, metavar="OFFICIAL.yaml")
    parser.add_argument("-o", "--output", type=Path, metavar="OURS.yaml", help="default: standard output")
    arguments = parser.parse_args(argv)

    sections, account = convert(read_official(arguments.official))
    sys.stderr.write("\n".join(account) + "\n")
    text = f"# Converted from {arguments.official.name} by tools.convert_config.\n{to_checked_yaml(sections)}"
    if arguments.output is None:
        sys.stdout.write(text)
    else:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text)
    return 0


def to_checked_yaml(sections: Mapping[str, Any]) -> str:
    """The sections as YAML, after `engine.config.load_config` has accepted it."""
    import tempfile

    from omegaconf import OmegaConf

    from engine.config import load_config

    text = OmegaConf.to_yaml(OmegaConf.create(dict(sections)))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "converted.yaml"
        file.write_text(text)
        try:
            load_config(file)
        except ValueError as error:
            raise ValueError(f"the converted config is refused: {str(error).replace(f'{file}: ', '')}") from None
    return text


if __name__ == "__main__":
    run(main)
