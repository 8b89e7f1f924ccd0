"""Class labels of clips and of listed images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from common.checks import require

from .catalog import Catalog, Clip, compute_digest, resolve_below
from .config import DataConfig
from .readers import IMAGE_SUFFIXES


def _class_of_folder(clip: Clip) -> str:
    """Returns the first folder below the root."""
    first, *rest = clip.name.split("/")
    require(bool(rest), f"data.labels=class_folders: {clip.path!r} is not in a class folder")
    return first


def _class_of_file_name(clip: Clip) -> str:
    """Returns the part of the file name after the last '__', without its extension."""
    path = Path(clip.name)
    before, _, after = (path.stem if clip.num_frames is None else path.name).rpartition("__")
    named = bool(before and after)
    require(named, f"data.labels=file_name: the name of {clip.path!r} has no '__' before its class")
    return after


LABEL_RULES: dict[str, Callable[[Clip], str | None]] = {
    "class_folders": _class_of_folder,
    "file_name": _class_of_file_name,
    "none": lambda clip: None,
}


def find_class_names(clips: Sequence[Clip], rule: str) -> list[str | None]:
    """Returns the class of each clip; `auto` uses the first rule that fits all clips and finds two or more classes."""
    if rule != "auto":
        return [LABEL_RULES[rule](clip) for clip in clips]
    for name in ("class_folders", "file_name"):
        with suppress(ValueError):
            names = find_class_names(clips, name)
            if len(set(names)) > 1:
                return names
    return [None] * len(clips)


def relabel(catalog: Catalog, class_names: Sequence[str]) -> Catalog:
    """Returns `catalog` with labels numbered as in `class_names`. Raises ValueError for a clip of another class."""
    numbers = {name: label for label, name in enumerate(class_names)}
    clips = []
    for clip in catalog.clips:
        name = catalog.class_names[clip.label] if catalog.class_names else None
        if numbers and name not in numbers:
            held = "no class" if name is None else f"class {name!r}"
            raise ValueError(f"data.path: {clip.path!r} is of {held}, which the training clips lack")
        clips.append(replace(clip, label=numbers[name] if numbers and name is not None else 0))
    return replace(catalog, clips=clips, class_names=list(class_names), digest=compute_digest(clips, class_names))


def read_frame_list(config: DataConfig, catalog: Catalog) -> list[Clip]:
    """Returns the images of `data.frame_list`, one per line: `path` or `path class`, relative to `data.path`.

    The class may be a name or a number. If absent, it is the first folder in the path, or else the `v_<Class>_` in the
    file name, that is a class of the catalog. A path out of the folder is refused with its line number.
    """
    path = Path(config.frame_list or "").expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"data.frame_list: there is no file '{config.frame_list}'")
    root = Path(catalog.root).resolve()
    images, known = [], " ".join(sorted(IMAGE_SUFFIXES))
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where, name, given = f"{path}, line {number}", line.strip(), None
            if Path(name).suffix.lower() not in IMAGE_SUFFIXES and " " in name:
                name, given = name.rsplit(maxsplit=1)
            target = resolve_below(root, name, where)
            require(Path(name).suffix.lower() in IMAGE_SUFFIXES, f"{where}: {name!r} is not an image ({known})")
            if target is None:
                raise FileNotFoundError(f"{where}: there is no file {name!r} in data.path")
            label = _label_image(name, given, where, catalog.class_names)
            images.append(Clip(str(target), name, target.stat().st_size, 1, label))
    require(bool(images), f"data.frame_list: '{path}' is empty")
    return images


def _label_image(name: str, given: str | None, where: str, classes: list[str]) -> int:
    """Returns the label of a listed image. Raises: ValueError if its class is unknown."""
    if not classes:
        return 0
    if given is not None and given.isdecimal() and given not in classes and int(given) < len(classes):
        return int(given)
    file_class = Path(name).name.removeprefix("v_").split("_")[0]
    for candidate in [given] if given is not None else [*Path(name).parts[:-1], file_class]:
        if candidate in classes:
            return classes.index(candidate)
    raise ValueError(f"{where}: {given or name!r} names none of the {len(classes)} classes of the data set")
