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
from typing import Any, NamedTuple

from .catalog import Catalog, Clip, compute_digest
from .config import DataConfig
from .readers import HIDDEN, IMAGE_SUFFIXES, VIDEO_SUFFIXES
from .safe_paths import resolve_below

log = logging.getLogger(__name__)

LISTS = ("captions.csv", "captions.jsonl", "captions.parquet")  # default names in data.path
FILE_COLUMNS = ("file", "path", "video", "video_path", "image", "image_path", "filename", "file_name")
CAPTION_COLUMNS = ("caption", "text", "prompt", "name")
WEBVID = ("videoid", "page_dir")  # the file is page_dir/videoid.mp4, its caption is `name`


class Unusable(ValueError):
    """A line that cannot be used; `reason` groups such lines."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


class Line(NamedTuple):
    """One line of a list; `where` is its file and number, for errors."""

    where: str
    values: Mapping[str, Any]


# ------------------------------------------------------------------------------------------- the list


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


def _read_csv(path: Path) -> Iterator[Line]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.DictReader(stream, strict=True)
        try:
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                if None in row or None in row.values():
                    raise ValueError(f"{where}: values and columns differ in number: put captions in quotes")
                yield Line(where, row)
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
            yield Line(f"{path}, line {number}", row)


def _read_parquet(path: Path) -> Iterator[Line]:
    from pyarrow import ArrowException, parquet  # slow to import: only this kind of list needs it

    try:
        batches = parquet.ParquetFile(path).iter_batches()
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield Line(f"{path}, row {number}", row)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from None


LIST_READERS: dict[str, Callable[[Path], Iterator[Line]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


# ------------------------------------------------------------------------------------------ its clips


class Columns(NamedTuple):
    """The columns of the file (one, or WebVid's two) and of the caption."""

    file: tuple[str, ...]
    caption: str

    @classmethod
    def find(cls, config: DataConfig, line: Line) -> Columns:
        """Finds the configured or the well-known columns. Raises: ValueError where there are none."""
        have = list(line.values)
        files = [config.file_column] if config.file_column else list(FILE_COLUMNS)
        captions = [config.caption_column] if config.caption_column else list(CAPTION_COLUMNS)
        file: tuple[str, ...] | None = next(((name,) for name in files if name in have), None)
        if file is None and not config.file_column and set(WEBVID) <= set(have):
            file = WEBVID
        caption = next((name for name in captions if name in have), None)
        for found, key, wanted in ((file, "file_column", files), (caption, "caption_column", captions)):
            if found is None:
                raise ValueError(
                    f"{line.where}: there is no column {' or '.join(wanted)} among {', '.join(map(str, have))}: "
                    f"name it with data.{key}"
                )
        assert file is not None and caption is not None
        return cls(file, caption)

    def read(self, line: Line) -> tuple[str, str]:
        """Returns the file name below the root and the caption. Raises: ValueError without one, Unusable if empty."""
        wanted = (*self.file, self.caption)
        lacking = [name for name in wanted if name not in line.values]
        if lacking:
            raise ValueError(f"{line.where}: there is no {lacking[0]!r}")
        *file, caption = (line.values[name] for name in wanted)
        parts = [str(part).strip() for part in file]
        if not isinstance(caption, str) or not caption.strip():
            raise Unusable("an empty caption", f"{line.where}: the caption is empty")
        if self.file == WEBVID:
            return f"{parts[1]}/{parts[0]}.mp4", caption
        return parts[0], caption


def read_list(
    path: Path, key: str, config: DataConfig, root: Path, make_clip: Callable[[Path, str, str], Clip]
) -> Listed:
    """Returns the clips of a list, in its order.

    Args:
        key: names the setting in errors.
        make_clip: (file, its name, file and line) -> the clip; raises Unusable.

    Raises: FileNotFoundError, ValueError with the line number.
    """
    clips: list[Clip] = []
    unusable: list[Unusable] = []
    columns: Columns | None = None
    resolved = root.resolve()
    known: dict[str, str] = {}  # equal captions are kept once
    for line in read_lines(path, key):
        columns = columns or Columns.find(config, line)
        try:
            name, caption = columns.read(line)
            target = resolve_below(resolved, name, line.where)
            if target is None:
                raise Unusable("not there", f"{line.where}: there is no {name!r} in data.path")
            clips.append(replace(make_clip(target, name, line.where), caption=known.setdefault(caption, caption)))
        except Unusable as error:
            unusable.append(error)
    _check_share(path, key, config, clips, unusable)
    return Listed(clips, Counter(f"listed, but {error.reason}" for error in unusable))


class Listed(NamedTuple):
    """The clips of a list, and the number of skipped lines by reason."""

    clips: list[Clip]
    skipped: Counter[str]


def _check_share(path: Path, key: str, config: DataConfig, clips: Sequence[Clip], unusable: Sequence[Unusable]) -> None:
    total = len(clips) + len(unusable)
    if not total:
        raise ValueError(f"{key}: '{path}' is empty")
    if not unusable:
        return
    count = f"{len(unusable)} of {total} lines cannot be used"
    if config.strict:
        raise ValueError(str(unusable[0]))
    if not clips or len(unusable) > config.max_unusable * total:
        raise ValueError(f"{unusable[0]}; {count}, more than data.max_unusable={config.max_unusable} allows")
    log.warning("%s; %s and are skipped", unusable[0], count)


def _make_video(target: Path, name: str, where: str) -> Clip:
    """Returns the clip of a video file or of a folder of frames."""
    if target.is_dir():
        frames = [each for each in target.iterdir() if each.suffix.lower() in IMAGE_SUFFIXES]
        count = sum(not each.name.startswith(HIDDEN) for each in frames)
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


def read_captioned_clips(config: DataConfig, root: Path) -> Listed:
    """Returns the clips of `data.captions`, sorted by name, each with its caption.

    Raises: FileNotFoundError, ValueError.
    """
    found = read_list(_find_list(config, root), "data.captions", config, root, _make_video)
    return found._replace(clips=sorted(found.clips, key=lambda clip: (clip.name, clip.caption or "")))


def read_captioned_images(config: DataConfig, catalog: Catalog) -> tuple[Catalog, list[Clip]]:
    """Returns the catalog, extended by the captions of `data.frame_list`, and the image-text pairs of that list."""
    images = read_list(
        Path(config.frame_list or "").expanduser(), "data.frame_list", config, Path(catalog.root), _make_image
    ).clips
    extended = add_captions(catalog, [str(image.caption) for image in images])
    numbers = extended.numbers
    return extended, [replace(image, label=numbers[str(image.caption)]) for image in images]


def add_captions(catalog: Catalog, captions: Iterable[str]) -> Catalog:
    """Returns `catalog` with new captions appended, so that existing numbers stay."""
    known = catalog.numbers
    new = sorted({caption for caption in captions if caption not in known})
    return replace(catalog, captions=[*catalog.captions, *new])


def renumber_captions(catalog: Catalog, captions: Sequence[str]) -> Catalog:
    """Returns `catalog` with labels numbered as in `captions`, and its other captions appended."""
    extended = add_captions(replace(catalog, captions=list(captions)), catalog.captions)
    numbers = extended.numbers
    clips = [replace(clip, label=numbers[str(clip.caption)]) for clip in catalog.clips]
    return replace(extended, clips=clips, digest=compute_digest(clips, extended.captions))


def _find_list(config: DataConfig, root: Path) -> Path:
    if config.captions is not None:
        return Path(config.captions).expanduser()
    found = [root / name for name in LISTS if (root / name).is_file()]
    if len(found) != 1:
        held = f"both {found[0].name} and {found[1].name}" if found else f"neither of {', '.join(LISTS)}"
        raise FileNotFoundError(f"data.captions is not set, and '{root}' holds {held}: name the list of captions")
    return found[0]
