"""Builds the catalog and data set of a configuration, for training or held-out clips."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

from common.checks import require

from .captions import read_captioned_clips, renumber_captions
from .catalog import Catalog, Clip, compute_digest, find_clips, find_root
from .clips import ClipDataset, window_span
from .config import DataConfig
from .labels import find_class_names, relabel
from .latents import LatentCache
from .readers import check_installed
from .recipes import CAPTIONED, FRAMES, RECIPES, SPLIT_FOLDERS, VIDEOS


def build_dataset(config: DataConfig, *, seed: int, held_out: bool = False) -> ClipDataset:
    """Returns the data set of a configuration: the training clips, or those that `data.val_share` holds out.

    With `data.latents`, frames come from that cache, which must have been made from this data; it lists its clips, so
    `data.path` may be empty. Raises: ValueError, FileNotFoundError if the folder or cache is unusable.
    """
    if config.latents is None:
        check_installed(config.reader)
        return ClipDataset(config, build_catalog(config, held_out=held_out), seed)
    cache = LatentCache(Path(config.latents))
    if not config.path and (config.frame_list or config.name == CAPTIONED):
        key = "data.frame_list" if config.frame_list else "data.captions"
        raise ValueError(f"{key} names files below data.path: set that too")
    if config.path:
        catalog = build_catalog(config, held_out=held_out)
    else:
        catalog = _make_catalog(str(cache.path), cache.list_clips(), Counter(), config, held_out)
    dataset = ClipDataset(config, catalog, seed, cache)
    cache.check(dataset.latent_settings, [*catalog.clips, *(dataset.images or [])])
    return dataset


def build_held_out(config: DataConfig, clips: ClipDataset, *, seed: int) -> ClipDataset:
    """Returns the held-out data set: `data.val_path`, or the clips of `data.path` selected by `data.val_share`.

    Labels are numbered as in `clips`; nothing is mirrored; joint-training images are frames of these videos.
    Raises: ValueError, FileNotFoundError if the folder is unusable or nothing is held out.
    """
    shared = config.val_path is None
    fixed = replace(config, val_path=None, frame_list=None, horizontal_flip=False, max_clips=None)
    if config.val_path is not None:  # a separate folder has its own list
        fixed = replace(fixed, path=config.val_path, captions=None)
    try:
        found = build_dataset(fixed, seed=seed, held_out=shared)
        if config.name == CAPTIONED:
            catalog = renumber_captions(found.catalog, clips.captions)
        else:
            catalog = relabel(found.catalog, clips.class_names)
        return ClipDataset(fixed, catalog, seed, found.source)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(str(error).replace("data.path", "data.path" if shared else "data.val_path")) from None


def build_catalog(config: DataConfig, *, held_out: bool = False) -> Catalog:
    """Returns the catalog of `config.path`: the training clips, or those that `data.val_share` holds out.

    Raises: FileNotFoundError, ValueError if there is no such folder, no clips, or a clip lacks a required class.
    """
    require(bool(config.path), "data.path is empty: set the folder of the data set")
    root = find_root(config.path, "data.path")
    if config.name == CAPTIONED:
        return _make_catalog(str(root), *read_captioned_clips(config, root), config, held_out)
    splits = sorted(path for path in root.iterdir() if path.name in SPLIT_FOLDERS and path.is_dir())
    require(
        len({SPLIT_FOLDERS[path.name] for path in splits}) < 2,
        f"data.path: '{config.path}' holds the splits of a data set: name one, {' or '.join(map(str, splits))}",
    )
    for kinds in (RECIPES[config.name].clips, (VIDEOS, FRAMES)):  # second: the data set in another form
        skipped: Counter[str] = Counter()
        clips = list(find_clips(root, kinds, lambda reason, path, into=skipped: into.update([reason])))  # type: ignore[misc]
        if clips:
            return _make_catalog(str(root), sorted(clips, key=lambda clip: clip.name), skipped, config, held_out)
    seen = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items())) or "nothing at all"
    raise ValueError(
        f"data.path: data.name={config.name} needs {VIDEOS} or {FRAMES}, but '{config.path}' holds none (found: {seen})"
    )


def _make_catalog(root: str, found: list[Clip], skipped: Counter[str], config: DataConfig, held_out: bool) -> Catalog:
    """Labels `found` and returns the catalog of clips that are long enough and (not) held out, at most `max_clips`."""
    found = _drop_short(found, config, skipped)
    rule = RECIPES[config.name].labels if config.labels == "auto" else config.labels
    names = [clip.caption for clip in found] if rule == CAPTIONED else find_class_names(found, rule)
    classes = sorted({name for name in names if name is not None})
    numbers = {name: label for label, name in enumerate(classes)}
    named = zip(found, names, strict=True)
    labelled = [replace(clip, label=0 if name is None else numbers[name]) for clip, name in named]
    chosen = [clip for clip in labelled if is_held_out(clip.name, config.val_share) == held_out]
    amount, remedy = ("none", "raise") if held_out else ("all", "lower")
    require(
        bool(chosen),
        f"data.val_share={config.val_share} holds out {amount} of the {len(labelled)} clips of '{config.path}': "
        f"{remedy} it, or set data.val_path instead",
    )
    if config.val_share:
        skipped["for training" if held_out else "held out"] = len(labelled) - len(chosen)
    clips = chosen[: config.max_clips]
    class_names, captions = ([], classes) if rule == CAPTIONED else (classes, [])
    left_out = dict(sorted(skipped.items()))
    return Catalog(root, clips, class_names, compute_digest(clips, classes), left_out, captions)


def is_held_out(name: str, share: float) -> bool:
    """Returns whether the clip `name` is in the held-out `share` (0 to 1), whatever other clips there are."""
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _drop_short(clips: list[Clip], config: DataConfig, skipped: Counter[str]) -> list[Clip]:
    """Drops folders of frames that are shorter than a window; video lengths are not known yet."""
    if config.short_clips == "loop":
        return clips
    span = window_span(config.num_frames, config.frame_interval)
    kept = [clip for clip in clips if clip.num_frames is None or clip.num_frames >= span]
    if len(kept) < len(clips):
        skipped[f"fewer than {span} frames"] = len(clips) - len(kept)
    if not kept:
        raise ValueError(
            f"data.path: none of the {len(clips)} clips in '{config.path}' has the {span} frames that "
            f"data.num_frames={config.num_frames} and data.frame_interval={config.frame_interval} need "
            f"(the longest has {max(clip.num_frames or 0 for clip in clips)})"
        )
    return kept
