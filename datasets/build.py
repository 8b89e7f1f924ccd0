"""Configuration -> catalog and data set, for training and for held-out clips."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .captions import read_captioned_clips, renumber_captions
from .catalog import Catalog, Clip, compute_digest, find_clips, find_root
from .clips import ClipDataset, window_span
from .config import DataConfig
from .labels import find_class_names, relabel
from .latents import LatentCache
from .readers import check_installed
from .recipes import CAPTIONED, FRAMES, RECIPES, VIDEOS


def build_dataset(config: DataConfig, *, seed: int) -> ClipDataset:
    """Returns the data set of a configuration.

    With `data.latents` frames come from that cache, which must have been made from this data; it lists its clips, so
    `data.path` may be empty.

    Raises: ValueError, FileNotFoundError where the folder or cache is unusable.
    """
    return _build(config, seed, held_out=False)


def build_held_out(config: DataConfig, clips: ClipDataset, *, seed: int) -> ClipDataset:
    """Returns the held-out data set: `data.val_path`, or the clips of `data.path` selected by `data.val_share`.

    Labels are numbered as in `clips`; nothing is mirrored; the images of joint training are frames of these videos.

    Raises: ValueError, FileNotFoundError where the folder is unusable or nothing is held out.
    """
    key = "data.path" if config.val_path is None else "data.val_path"
    path = config.path if config.val_path is None else config.val_path
    fixed = replace(config, path=path, val_path=None, frame_list=None, horizontal_flip=False, max_clips=None)
    if config.val_path is not None:  # a folder of its own has a list of its own
        fixed = replace(fixed, captions=None)
    try:
        found = _build(fixed, seed, held_out=config.val_path is None)
        same_numbers = (
            renumber_captions(found.catalog, clips.captions)
            if config.name in CAPTIONED
            else relabel(found.catalog, clips.class_names)
        )
        return ClipDataset(fixed, same_numbers, seed, found.source)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(str(error).replace("data.path", key)) from None


def _build(config: DataConfig, seed: int, *, held_out: bool) -> ClipDataset:
    if config.latents is None:
        check_installed(config.reader)
        return ClipDataset(config, build_catalog(config, held_out=held_out), seed)
    cache = LatentCache(Path(config.latents))
    if not config.path and (config.frame_list or config.name in CAPTIONED):
        key = "data.frame_list" if config.frame_list else "data.captions"
        raise ValueError(f"{key} names files below data.path: set that too")
    catalog = (
        build_catalog(config, held_out=held_out)
        if config.path
        else make_catalog(str(cache.path), cache.list_clips(), config, held_out=held_out)
    )
    dataset = ClipDataset(config, catalog, seed, cache)
    cache.check(dataset.latent_settings, [*catalog.clips, *(dataset.images or [])])
    return dataset


def build_catalog(config: DataConfig, *, held_out: bool = False) -> Catalog:
    """Returns the catalog of `config.path`: of the clips that `data.val_share` holds out, or of the others.

    Raises: FileNotFoundError where there is no such folder; ValueError where it holds no clips, or a clip has no class
    although classes are required.
    """
    root = _find_data_root(config.path)
    recipe = RECIPES[config.name]
    if config.name in CAPTIONED:
        clips, skipped = read_captioned_clips(config, root)
        return make_catalog(str(root), clips, config, skipped, held_out=held_out)
    found, skipped = _find_sorted(root, recipe.clips)
    if not found:
        found, skipped = _find_sorted(root, (VIDEOS, FRAMES))
    if not found:
        raise ValueError(_describe_empty_folder(config, skipped))
    return make_catalog(str(root), found, config, skipped, held_out=held_out)


def make_catalog(
    root: str, found: list[Clip], config: DataConfig, skipped: Counter[str] | None = None, *, held_out: bool = False
) -> Catalog:
    """Returns the catalog of `found`: long enough, (not) held out, labelled, at most `max_clips` of them."""
    recipe, skipped = RECIPES[config.name], Counter() if skipped is None else skipped
    found = _drop_short(found, config, skipped)
    captioned = config.name in CAPTIONED
    rule = recipe.labels if config.labels == "auto" else config.labels
    names = [clip.caption for clip in found] if captioned else find_class_names(found, rule)
    classes = sorted({name for name in names if name is not None})
    numbers = {name: label for label, name in enumerate(classes)}
    labelled = [
        replace(clip, label=numbers[name] if name is not None else 0) for clip, name in zip(found, names, strict=True)
    ]
    chosen = [clip for clip in labelled if is_held_out(clip.name, config.val_share) == held_out]
    if not chosen:
        raise ValueError(_describe_empty_choice(config, len(labelled), held_out))
    if config.val_share:
        skipped["for training" if held_out else "held out"] = len(labelled) - len(chosen)
    clips = chosen[: config.max_clips]
    digest, left_out = compute_digest(clips, classes), dict(sorted(skipped.items()))
    if captioned:
        return Catalog(root, clips, [], digest, left_out, captions=classes)
    return Catalog(root, clips, classes, digest, left_out)


def is_held_out(name: str, share: float) -> bool:
    """Whether the clip of that name belongs to `share` (0 to 1) of all clips; independent of the other clips."""
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _describe_empty_choice(config: DataConfig, total: int, held_out: bool) -> str:
    what, remedy = ("none", "raise") if held_out else ("all", "lower")
    return (
        f"data.val_share={config.val_share} holds out {what} of the {total} clips of '{config.path}': {remedy} it, or "
        "set data.val_path instead"
    )


def _find_data_root(path: str) -> Path:
    if not path:
        raise ValueError("data.path is empty: set the folder of the data set")
    return find_root(path, "data.path")


def _find_sorted(root: Path, kinds: Sequence[str]) -> tuple[list[Clip], Counter[str]]:
    """Returns the clips of these kinds in the order of their names, and the number of other files by reason."""
    skipped: Counter[str] = Counter()
    clips = find_clips(root, kinds, lambda reason, path: skipped.update([reason]))
    return sorted(clips, key=lambda clip: clip.name), skipped


def _drop_short(clips: list[Clip], config: DataConfig, skipped: Counter[str]) -> list[Clip]:
    """Drops folders of frames that are shorter than a window; the length of a video is not known yet."""
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


def _describe_empty_folder(config: DataConfig, skipped: Counter[str]) -> str:
    wanted = f"{VIDEOS} or {FRAMES}"
    seen = ", ".join(f"{count} {what}" for what, count in sorted(skipped.items())) or "nothing at all"
    return f"data.path: data.name={config.name} needs {wanted}, but '{config.path}' holds none (found: {seen})"
