"""Content-addressed cache of real features, as safetensors and JSON without pickle.

An entry's key covers the protocol's rules, the names and sizes of all clips, the detector's SHA-256, and all that
affects the last bits (device, threads, versions). An entry is valid only while the SHA-256 of every clip is unchanged.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from common.storage import write_atomically
from datasets.readers import VideoError

from .distances import Moments
from .extract import FeatureSet
from .manifest import window_to_json, windows_from_json
from .protocols import SideRules
from .sources import NOTES, Source, Window, digest_content

log = logging.getLogger(__name__)

VERSION = 2  # of entries; those of other versions are ignored


def build_cache_key(rules: SideRules, source: Source, sha256: str, **more: Any) -> str:
    """Returns the key of an entry, a hash of its rules, clips, detector and `more`."""
    clips = [(clip.name, clip.size) for clip in source.clips]
    asked = {"version": VERSION, "rules": asdict(rules), "clips": clips, "detector": sha256, **more}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]


class FeatureCache:
    """A folder of entries, each of two files: `<key>.safetensors` and, written last, `<key>.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, key: str, source: Source, rules: SideRules) -> FeatureSet | None:
        """Returns the entry, or None if it is missing, exceeds the count of `rules`, or its clips have changed."""
        try:
            record = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
            content = (self.folder / f"{key}.safetensors").read_bytes()
            if record["version"] != VERSION or record["sha256"] != hashlib.sha256(content).hexdigest():
                return None
            parts: dict[str, dict[str, Tensor]] = {}  # "rows", "moments/0", "moments/1" -> name -> tensor
            for name, tensor in (tensors := load(content)).items():
                part, _, own = name.rpartition("/")
                parts.setdefault(part, {})[own] = tensor
            features = FeatureSet(
                parts.get("rows", {}),
                [Moments.from_state(parts[part]) for part in sorted(parts) if part.startswith("moments/")],
                kept=tensors.get("kept"),
                windows=windows_from_json(record["windows"], source, "cache"),
                size=(record["size"][0], record["size"][1]),
                whole=bool(record["whole"]),
                notes={note: dict(record[note]) for note in NOTES},
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        fits = rules.allows(features.windows) and _digests(source, features) == record["contents"]
        return features if fits else None

    def store(self, key: str, source: Source, features: FeatureSet, about: Mapping[str, Any]) -> None:
        """Writes an entry, or warns if that fails; `about` describes it for readers of the JSON."""
        tensors = {f"rows/{name}": rows.contiguous() for name, rows in features.rows.items()}
        for place, moments in enumerate(features.moments):
            tensors |= {f"moments/{place}/{name}": tensor.cpu() for name, tensor in moments.state.items()}
        if features.kept is not None:
            tensors["kept"] = features.kept
        content = save(tensors)
        record = {
            "version": VERSION,
            "about": dict(about),
            "sha256": hashlib.sha256(content).hexdigest(),
            "size": features.size,
            "whole": features.whole,
            "windows": [window_to_json(window, source) for window in features.windows],
            **features.notes,
            "contents": _digests(source, features),
        }
        text = json.dumps(record, indent=1) + "\n"
        try:
            write_atomically(self.folder / f"{key}.safetensors", lambda path: path.write_bytes(content))
            write_atomically(self.folder / f"{key}.json", lambda path: path.write_text(text, encoding="utf-8"))
        except OSError as error:
            log.warning("the cache %s cannot be written (%s): see --cache_dir", self.folder, error.strerror or error)


def _digests(source: Source, features: FeatureSet) -> dict[str, str]:
    """Returns clip name -> SHA-256 of the content, for every clip that was used or left out."""
    windows: dict[str, list[Window] | None] = {name: None for notes in features.notes.values() for name in notes}
    for window in features.windows:
        known = windows.setdefault(source.clips[window.clip].name, [])
        if known is not None:
            known.append(window)
    clips = {clip.name: clip for clip in source.clips}

    def digest(name: str) -> str:
        try:
            return digest_content(clips[name], windows[name])
        except (OSError, VideoError) as error:  # on loading, the clip must fail the same way
            return f"unreadable: {type(error).__name__}"

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(windows, pool.map(digest, windows)))
