"""Loading a configuration: YAML files, `key=value` overrides, unknown keys and hints."""

from __future__ import annotations

import difflib
import io
import re
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from common.checks import require

from ..keys import DROPPED, RENAMED, drop_removed
from .rules import Config

MAX_YAML_CHARACTERS = 65_536  # a config with every key takes 4,000
MAX_YAML_EVENTS = 10_000  # parser events: two per section or list, one per key or value
MAX_YAML_DEPTH = 8  # ours need 3: file, section, list
# Numbers that YAML 1.1 reads in base 8 or 60: 010 is 8, 1:30 is 90, 1:30.5 is 90.5.
ODD_NUMBER = re.compile(r"[-+]?(0[0-7_]+|[1-9][0-9_]*(:[0-5]?[0-9])+|[0-9][0-9_]*(:[0-5]?[0-9])+\.[0-9_]*)")


def load_config(
    path: str | Path | None = None,
    overrides: list[str] | None = None,
    base: dict[str, Any] | None = None,
    *,
    saved: bool = False,
) -> Config:
    """Merges defaults, the nested values `base`, the YAML file at `path` and `key=value` overrides, and checks them.

    Args:
        saved: the YAML or `base` was written by a run, perhaps of an older version: removed keys are ignored.
    """
    from omegaconf import OmegaConf  # not at the top: GPU benchmarks run on machines without it
    from omegaconf.errors import OmegaConfBaseException

    layers: list[tuple[str, Any]] = [("the base configuration", base or {})]
    if path is not None:
        layers.append((str(path), read_yaml(Path(path))))
    layers += [("the command line", _read_override(each)) for each in overrides or []]
    merged = OmegaConf.structured(Config)
    for source, values in layers:
        require(isinstance(values, dict), f"{source} must hold sections like `model:` and `data:`.")
        values = drop_removed(values, source, saved=saved)
        _check_keys(values, Config, source)
        try:
            merged = OmegaConf.merge(merged, values)
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None) or "a key"
            raise ValueError(f"{source}: {key}: {one_line(error)}") from None
        except TypeError:  # raised by OmegaConf for a mapping in place of a list
            raise ValueError(f"{source}: a value has the wrong type (a mapping in place of a list?).") from None
    try:
        return typing.cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ValueError(one_line(error)) from None


def _read_override(override: str) -> Any:
    """Returns the nested values of `section.key=value`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, equals, value = override.partition("=")
    require(bool(equals and key.strip()), f"{override!r} is not an override: write section.key=value.")
    empty = value.replace(" ", "") == "{}"
    require(not empty, f"{override!r} sets nothing: an empty section changes no key; name the keys to reset.")
    try:
        _check_yaml(value, f"the value of {key}")
        return OmegaConf.to_container(OmegaConf.from_dotlist([override]))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"{override!r} cannot be read as section.key=value: {one_line(error)}") from None


def read_yaml(path: Path) -> Any:
    """Returns the plain values of a YAML file, interpolations unresolved."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is a device or a pipe" if path.exists() else "does not exist"
        raise FileNotFoundError(f"config file {path} {what}: name a YAML file; the shipped ones are under configs/.")
    try:
        with path.open(encoding="utf-8") as stream:
            text = stream.read(MAX_YAML_CHARACTERS + 1)
        _check_yaml(text, f"config file {path}")
        return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"config file {path} is not valid YAML: {one_line(error)}") from None


def _check_yaml(text: str, source: str) -> None:
    """Refuses YAML that no honest config contains: deep nesting, aliases that expand without bound.

    Checks the parser's events, before anything is built from them.
    """
    require(len(text) <= MAX_YAML_CHARACTERS, f"{source} is too long for a config ({MAX_YAML_CHARACTERS} characters).")
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))):
        require(number < MAX_YAML_EVENTS, f"{source} holds too many values for a config.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        require(depth <= MAX_YAML_DEPTH, f"{source} nests more than {MAX_YAML_DEPTH} levels deep; use section.key.")
        require(not isinstance(event, yaml.AliasEvent), f"{source} uses a YAML alias (*name): write the value itself.")
        tag = getattr(event, "tag", None)
        require(tag is None, f"{source} uses a YAML tag ({tag}): write the plain value.")
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and ODD_NUMBER.fullmatch(event.value):
            line = f", line {event.start_mark.line + 1}" if "\n" in text else ""
            raise ValueError(
                f"{source}{line}: YAML reads {event.value} in base 8 or 60: write a decimal number without a leading "
                "0, or a word in quotes."
            )


def one_line(error: Exception) -> str:
    """Returns the message of an error of OmegaConf or YAML on one line."""
    return " ".join(str(error).split("\n    full_key")[0].split())


def _check_keys(values: Mapping[str, Any], owner: type, source: str, prefix: str = "") -> None:
    """Refuses keys unknown to `owner`, with a hint, and values that YAML or OmegaConf would alter."""
    known = {item.name: item for item in fields(owner)}
    hints = typing.get_type_hints(owner)
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in known:
            raise ValueError(f"{source}: unknown key {name!r}.{_hint(str(key), name)}")
        if is_dataclass(hints[key]):
            require(isinstance(value, Mapping), f"{source}: {name} is a section and needs keys, got {value!r}.")
            _check_keys(value, typing.cast(type, hints[key]), source, f"{name}.")
        require(
            not (isinstance(value, bool) and hints[key] in (str, str | None)),
            f"{source}: {name} takes a word, got {str(value).lower()!r}: YAML reads yes, no, on and off as true "
            "and false; put it in quotes.",
        )
        require("${" not in str(value), f"{source}: {name}={value!r}: interpolation is not supported; write the value.")
        require(
            not (type(value) is int and value not in (0, 1) and hints[key] in (bool, bool | None)),
            f"{source}: {name} must be true or false, got {value}.",
        )
        require(value != "???", f"{source}: {name}=??? is a placeholder: write the value.")


def _hint(key: str, name: str) -> str:
    """Returns an official key's new name, why it has none, or our nearest key."""
    if key in RENAMED:
        return f" It is called {RENAMED[key]} here (`python -m tools.convert config` translates whole files)."
    if key in DROPPED:
        return f" It has no counterpart: {DROPPED[key]}"
    known = all_keys()
    leaves = {full.rpartition(".")[2]: full for full in known}
    near = difflib.get_close_matches(name, known, 1, 0.7) or [
        leaves[leaf] for leaf in difflib.get_close_matches(key, list(leaves), 1, 0.75)
    ]
    return f" Did you mean {near[0]!r}?" if near else " `python train.py --dry-run` prints all keys."


def all_keys() -> list[str]:
    """Returns every dotted key of the configuration."""
    return list(Config().to_flat_dict())
