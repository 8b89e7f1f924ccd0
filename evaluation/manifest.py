"""Manifest of the windows that were read, for reuse: JSON, one line [file, offset, stride, frames] per window."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .extract import FeatureSet
from .protocols import SideRules
from .sources import Source, Window

KIND = "latte clip manifest"


def window_to_json(window: Window, source: Source) -> list[Any]:
    """Returns the manifest line [file, offset, stride, frames] of a window."""
    return [source.clips[window.clip].name, *window[1:]]


def windows_from_json(lines: Sequence[Any], source: Source, where: str) -> list[Window]:
    """Inverts `window_to_json`. Raises: ValueError, starting with `where`, for malformed lines or missing clips."""
    places = {clip.name: place for place, clip in enumerate(source.clips)}
    windows = []
    for number, line in enumerate(lines, 1):
        whole = isinstance(line, list) and len(line) == 4 and all(type(each) is int for each in line[1:])
        if not whole or line[1] < 0 or min(line[2:]) < 1:
            raise ValueError(f"{where}: line {number} is not [file, offset, stride, frames]")
        if line[0] not in places:
            raise ValueError(f"{where}: '{line[0]}' is not in '{source.root}'")
        windows.append(Window(places[line[0]], *line[1:]))
    return windows


def format_manifest(read: Mapping[tuple[str, SideRules], FeatureSet], sources: Mapping[str, Source]) -> str:
    """Formats the manifest of all windows that were read."""
    entries = []
    for (side, rules), features in read.items():
        windows = [json.dumps(window_to_json(window, sources[side])) for window in features.windows]
        head = json.dumps({"side": side, "rules": asdict(rules)})
        entries.append(head[:-1] + ', "windows": [\n  ' + ",\n  ".join(windows) + "\n ]}")
    roots = json.dumps({side: source.root for side, source in sources.items()})
    return f'{{"kind": "{KIND}", "roots": {roots}, "entries": [\n ' + ",\n ".join(entries) + "\n]}\n"


class Manifest:
    """A manifest read from a file. Raises: FileNotFoundError; ValueError if the file is not a manifest."""

    def __init__(self, path: str, sources: Mapping[str, Source]) -> None:
        self.path, self.sources = path, sources
        try:
            content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["kind"] != KIND:
                raise ValueError(content["kind"])
            self.entries = [(entry["side"], entry["rules"], entry["windows"]) for entry in content["entries"]]
        except FileNotFoundError:
            raise FileNotFoundError(f"--manifest: there is no file '{path}'") from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"--manifest: '{path}' is not a manifest that this tool wrote") from error

    def find(self, side: str, rules: SideRules) -> tuple[SideRules, list[Window]]:
        """Returns rules and windows of the entry for `rules.whole` or `rules`. Raises: ValueError if there is none."""
        for each in (rules.whole, rules):
            for of_side, of_rules, lines in self.entries:
                if (of_side, of_rules) == (side, asdict(each)):
                    windows = windows_from_json(lines, self.sources[side], f"--manifest: '{self.path}'")
                    if rules.allows(windows):
                        return each, windows
        raise ValueError(
            f"--manifest: '{self.path}' holds no {side} clips for these settings: use the metrics, protocol "
            "and seeds that it was written with"
        )
