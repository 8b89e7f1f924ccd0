"""Reads caption lists (CSV, JSON lines, Parquet) as clips or images with captions.

A line names a file or a folder of frames below `data.path`; WebVid's lists use `videoid` and `page_dir`. A path out of
that folder ends the run; a line whose file or caption is missing is skipped like an unusable clip.
"""

from __future__ import annotations

import csv
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.checks import require

from .catalog import Catalog, Clip, compute_digest, resolve_below
from .config import DataConfig
from .readers import IMAGE_SUFFIXES, VIDEO_SUFFIXES, list_frames

log = logging.getLogger(__name__)

LISTS = ("captions.csv", "captions.jsonl", "captions.parquet")  # default names in data.path
FILE_COLUMNS = ("file", "path", "video", "video_path", "image", "image_path", "filename", "file_name")
CAPTION_COLUMNS = ("caption", "text", "prompt", "name")
WEBVID = ("videoid", "page_dir")  # the file is page_dir/videoid.mp4, its caption is `name`

Line = tuple[str, Mapping[str, Any]]  # (file and line number, for errors; values by column)


class Unusable(ValueError):
    """A line that cannot be used; lines are counted by `reason`."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


def _read_csv(path: Path) -> Iterator[Line]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.DictReader(stream, strict=True)
        try:
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                if None in row or None in row.values():
                    raise ValueError(f"{where}: values and columns differ in number: put captions in quotes")
                yield where, row
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.line_num + 1}: {error}") from None


def _read_jsonl(path: Path) -> Iterator[Line]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, text in enumerate(stream, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: this is not one JSON object")
            yield f"{path}, line {number}", row


def _read_parquet(path: Path) -> Iterator[Line]:
    from pyarrow import ArrowException, parquet  # slow to import: only this kind of list needs it

    try:
        batches = parquet.ParquetFile(path).iter_batches()
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield f"{path}, row {number}", row
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from None


LIST_READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def read_lines(path: Path, key: str) -> Iterator[Line]:
    """Yields the lines of a list; `key` names the setting in errors. Raises: FileNotFoundError, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{key}: there is no file '{path}'")
    suffix = path.suffix.lower()
    require(suffix in LIST_READERS, f"{key}: '{path}' is none of {', '.join(LIST_READERS)}")
    try:
        yield from LIST_READERS[suffix](path)
    except UnicodeDecodeError:
        raise ValueError(f"{key}: '{path}' is not text in UTF-8") from None


def find_columns(config: DataConfig, where: str, names: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """Returns the file column (or WebVid's two) and the caption column: as configured, or by well-known names."""

    def find(key: str, configured: str | None, known: Sequence[str]) -> tuple[str, ...]:
        wanted = (configured,) if configured else known
        found = [(name,) for name in wanted if name in names]
        if not found and wanted is FILE_COLUMNS and set(WEBVID) <= set(names):
            return WEBVID
        held = f"among {', '.join(map(str, names))}: name it with data.{key}"
        require(bool(found), f"{where}: there is no column {' or '.join(wanted)} {held}")
        return found[0]

    files = find("file_column", config.file_column, FILE_COLUMNS)
    return files, find("caption_column", config.caption_column, CAPTION_COLUMNS)[0]


def read_list(
    path: Path, key: str, config: DataConfig, root: Path, *, images: bool = False
) -> tuple[list[Clip], Counter[str]]:
    """Returns the clips or images of a list, in list order, and the number of skipped lines by reason."""
    clips: list[Clip] = []
    unusable: list[Unusable] = []
    columns = None
    root = root.resolve()
    known: dict[str, str] = {}  # equal captions share one string
    for where, values in read_lines(path, key):
        columns = columns or find_columns(config, where, list(values))
        files, caption_column = columns
        absent = [name for name in (*files, caption_column) if name not in values]
        if absent:
            raise ValueError(f"{where}: there is no {absent[0]!r}")
        parts, caption = [str(values[name]).strip() for name in files], values[caption_column]
        name = f"{parts[1]}/{parts[0]}.mp4" if files == WEBVID else parts[0]
        try:
            if not isinstance(caption, str) or not caption.strip():
                raise Unusable("an empty caption", f"{where}: the caption is empty")
            target = resolve_below(root, name, where)
            if target is None:
                raise Unusable("not there", f"{where}: there is no {name!r} in data.path")
            clips.append(replace(_make_clip(target, name, where, images), caption=known.setdefault(caption, caption)))
        except Unusable as error:
            unusable.append(error)
    _check_share(path, key, config, len(clips), unusable)
    return clips, Counter(f"listed, but {error.reason}" for error in unusable)


def _check_share(path: Path, key: str, config: DataConfig, usable: int, unusable: Sequence[Unusable]) -> None:
    """Raises ValueError for an empty list or too many unusable lines; warns about fewer."""
    total = usable + len(unusable)
    require(total > 0, f"{key}: '{path}' is empty")
    if unusable:
        require(not config.strict, str(unusable[0]))
        count = f"{len(unusable)} of {total} lines cannot be used"
        few = usable > 0 and len(unusable) <= config.max_unusable * total
        require(few, f"{unusable[0]}; {count}, more than data.max_unusable={config.max_unusable} allows")
        log.warning("%s; %s and are skipped", unusable[0], count)


def _make_clip(target: Path, name: str, where: str, image: bool) -> Clip:
    """Returns the clip for a video file, a folder of frames or an image. Raises: Unusable."""
    if image or not target.is_dir():
        kind, suffixes = ("an image", IMAGE_SUFFIXES) if image else ("a video", VIDEO_SUFFIXES)
        if target.suffix.lower() not in suffixes:
            raise Unusable(f"not {kind}", f"{where}: {name!r} is not {kind} ({' '.join(sorted(suffixes))})")
        return Clip(str(target), name, target.stat().st_size, 1 if image else None)
    count = len(list_frames(target))
    if not count:
        raise Unusable("a folder without frames", f"{where}: {name!r} is a folder without frames")
    return Clip(str(target), name, count, num_frames=count)


def read_captioned_clips(config: DataConfig, root: Path) -> tuple[list[Clip], Counter[str]]:
    """Returns the captioned clips of `data.captions`, sorted by name, and the number of skipped lines by reason."""
    path = Path(config.captions or "").expanduser()
    if config.captions is None:
        found = [root / name for name in LISTS if (root / name).is_file()]
        if len(found) != 1:
            held = f"both {found[0].name} and {found[1].name}" if found else f"neither of {', '.join(LISTS)}"
            raise FileNotFoundError(f"data.captions is not set, and '{root}' holds {held}: name the list of captions")
        path = found[0]
    clips, skipped = read_list(path, "data.captions", config, root)
    return sorted(clips, key=lambda clip: (clip.name, clip.caption or "")), skipped


def read_captioned_images(config: DataConfig, catalog: Catalog) -> tuple[Catalog, list[Clip]]:
    """Returns the catalog with the captions of `data.frame_list` added, and that list's images with captions."""
    path = Path(config.frame_list or "").expanduser()
    found, _ = read_list(path, "data.frame_list", config, Path(catalog.root), images=True)
    images, captions = number_captions(found, catalog.captions, [str(image.caption) for image in found])
    return replace(catalog, captions=captions), images


def number_captions(
    clips: Sequence[Clip], captions: Sequence[str], others: Iterable[str]
) -> tuple[list[Clip], list[str]]:
    """Returns the clips labelled by caption number, and `captions` with the new ones of `others` appended."""
    extended = [*captions, *sorted({*others} - {*captions})]
    numbers = {caption: number for number, caption in enumerate(extended)}
    return [replace(clip, label=numbers[str(clip.caption)]) for clip in clips], extended


def renumber_captions(catalog: Catalog, captions: Sequence[str]) -> Catalog:
    """Returns `catalog` with labels numbered as in `captions`, to which its new captions are appended."""
    clips, extended = number_captions(catalog.clips, captions, catalog.captions)
    return replace(catalog, captions=extended, clips=clips, digest=compute_digest(clips, extended))
