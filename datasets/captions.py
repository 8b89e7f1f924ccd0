"""Lists of captions (CSV, JSON lines, Parquet) -> clips or images with captions.

A line names a file or a folder of frames below `data.path`; WebVid's lists name it by `videoid` and `page_dir`. A path
that leaves the folder ends the run. A line whose file is missing or whose caption is empty is skipped by the same rules
as an unusable clip (`data.strict`, `data.max_unusable`).
"""

from __future__ import annotations

import csv
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .catalog import Catalog, Clip, compute_digest, resolve_below
from .config import DataConfig
from .readers import IMAGE_SUFFIXES, VIDEO_SUFFIXES, list_frames

log = logging.getLogger(__name__)

LISTS = ("captions.csv", "captions.jsonl", "captions.parquet")  # default names in data.path
FILE_COLUMNS = ("file", "path", "video", "video_path", "image", "image_path", "filename", "file_name")
CAPTION_COLUMNS = ("caption", "text", "prompt", "name")
WEBVID = ("videoid", "page_dir")  # the file is page_dir/videoid.mp4, its caption is `name`

Line = tuple[str, Mapping[str, Any]]  # file and number of a line, for errors; its values by column


class Unusable(ValueError):
    """A line that cannot be used; `reason` groups such lines."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


# ---- lines -----------------------------------------------------------------------------------------


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


LIST_READERS: dict[str, Callable[[Path], Iterator[Line]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def read_lines(path: Path, key: str) -> Iterator[Line]:
    """Yields the lines of a list; `key` names the setting in errors.

    Raises: FileNotFoundError, ValueError where there is no such list or a line cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{key}: there is no file '{path}'")
    reader = LIST_READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{key}: '{path}' is none of {', '.join(LIST_READERS)}")
    try:
        yield from reader(path)
    except UnicodeDecodeError:
        raise ValueError(f"{key}: '{path}' is not text in UTF-8") from None


# ---- clips -----------------------------------------------------------------------------------------


def find_columns(config: DataConfig, where: str, names: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """Returns the columns of the file (one, or WebVid's two) and of the caption: the configured or well-known ones."""
    found = []
    columns = {
        "file_column": (config.file_column, FILE_COLUMNS),
        "caption_column": (config.caption_column, CAPTION_COLUMNS),
    }
    for key, (configured, known) in columns.items():
        wanted = (configured,) if configured else known
        column: tuple[str, ...] | None = next(((name,) for name in wanted if name in names), None)
        if column is None and wanted is FILE_COLUMNS and set(WEBVID) <= set(names):
            column = WEBVID
        if column is None:
            raise ValueError(
                f"{where}: there is no column {' or '.join(wanted)} among {', '.join(map(str, names))}: "
                f"name it with data.{key}"
            )
        found.append(column)
    return found[0], found[1][0]


def read_list(
    path: Path, key: str, config: DataConfig, root: Path, make_clip: Callable[[Path, str, str], Clip]
) -> tuple[list[Clip], Counter[str]]:
    """Returns the clips of a list, in its order, and the number of skipped lines by reason.

    Args:
        key: names the setting in errors.
        make_clip: (file, its name, file and line) -> the clip; raises Unusable.

    Raises: FileNotFoundError, ValueError with the line number.
    """
    clips: list[Clip] = []
    unusable: list[Unusable] = []
    columns = None
    root = root.resolve()
    known: dict[str, str] = {}  # equal captions are kept once
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
            clips.append(replace(make_clip(target, name, where), caption=known.setdefault(caption, caption)))
        except Unusable as error:
            unusable.append(error)
    _check_share(path, key, config, len(clips), unusable)
    return clips, Counter(f"listed, but {error.reason}" for error in unusable)


def _check_share(path: Path, key: str, config: DataConfig, usable: int, unusable: Sequence[Unusable]) -> None:
    """Raises ValueError for an empty list or too many unusable lines; warns of fewer."""
    total = usable + len(unusable)
    if not total:
        raise ValueError(f"{key}: '{path}' is empty")
    if not unusable:
        return
    count = f"{len(unusable)} of {total} lines cannot be used"
    if config.strict:
        raise ValueError(str(unusable[0]))
    if not usable or len(unusable) > config.max_unusable * total:
        raise ValueError(f"{unusable[0]}; {count}, more than data.max_unusable={config.max_unusable} allows")
    log.warning("%s; %s and are skipped", unusable[0], count)


def _make_video(target: Path, name: str, where: str) -> Clip:
    """Returns the clip of a video file or of a folder of frames."""
    if target.is_dir():
        count = len(list_frames(target))
        if not count:
            raise Unusable("a folder without frames", f"{where}: {name!r} is a folder without frames")
        return Clip(str(target), name, count, num_frames=count)
    if target.suffix.lower() not in VIDEO_SUFFIXES:
        raise Unusable("not a video", f"{where}: {name!r} is not a video ({' '.join(sorted(VIDEO_SUFFIXES))})")
    return Clip(str(target), name, target.stat().st_size)


def _make_image(target: Path, name: str, where: str) -> Clip:
    if target.suffix.lower() not in IMAGE_SUFFIXES:
        raise Unusable("not an image", f"{where}: {name!r} is not an image ({' '.join(sorted(IMAGE_SUFFIXES))})")
    return Clip(str(target), name, target.stat().st_size, 1)


def read_captioned_clips(config: DataConfig, root: Path) -> tuple[list[Clip], Counter[str]]:
    """Returns the clips of `data.captions`, sorted by name, each with its caption; and the skipped lines by reason.

    Raises: FileNotFoundError, ValueError.
    """
    path = Path(config.captions or "").expanduser()
    if config.captions is None:
        found = [root / name for name in LISTS if (root / name).is_file()]
        if len(found) != 1:
            held = f"both {found[0].name} and {found[1].name}" if found else f"neither of {', '.join(LISTS)}"
            raise FileNotFoundError(f"data.captions is not set, and '{root}' holds {held}: name the list of captions")
        path = found[0]
    clips, skipped = read_list(path, "data.captions", config, root, _make_video)
    return sorted(clips, key=lambda clip: (clip.name, clip.caption or "")), skipped


def read_captioned_images(config: DataConfig, catalog: Catalog) -> tuple[Catalog, list[Clip]]:
    """Returns the catalog, extended by the captions of `data.frame_list`, and the image-text pairs of that list."""
    path = Path(config.frame_list or "").expanduser()
    images, _ = read_list(path, "data.frame_list", config, Path(catalog.root), _make_image)
    captions = extend_captions(catalog.captions, [str(image.caption) for image in images])
    return replace(catalog, captions=captions), number_captions(images, captions)


def extend_captions(captions: Sequence[str], others: Iterable[str]) -> list[str]:
    """Returns `captions` with those of `others` that are new appended, so that existing numbers stay."""
    return [*captions, *sorted({*others} - {*captions})]


def number_captions(clips: Sequence[Clip], captions: Sequence[str]) -> list[Clip]:
    """Returns the clips with the number of their caption as label."""
    numbers = {caption: number for number, caption in enumerate(captions)}
    return [replace(clip, label=numbers[str(clip.caption)]) for clip in clips]


def renumber_captions(catalog: Catalog, captions: Sequence[str]) -> Catalog:
    """Returns `catalog` with labels numbered as in `captions`, and its other captions appended."""
    extended = extend_captions(captions, catalog.captions)
    clips = number_captions(catalog.clips, extended)
    return replace(catalog, captions=extended, clips=clips, digest=compute_digest(clips, extended))
