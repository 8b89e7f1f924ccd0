"""Converts one clip to a link, a video or a folder of frames, with training's transforms. Not a command.

Letters: T frames, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, count
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from common.checks import at_least, check_limits, optional, require, within
from common.storage import file_sha256
from datasets.catalog import Clip
from datasets.readers import VIDEO_SUFFIXES, Reader, VideoError, list_frames, load_package, open_video
from datasets.transforms import TRANSFORMS
from datasets.writer import write_video

FORMATS = ("link", "video", "png", "jpeg")
SUFFIXES = {"link": "", "video": ".mp4", "png": ".png", "jpeg": ".jpg"}
LANCZOS = "center_crop_then_lanczos"
JPEG_QUALITY = 95
PNG_LEVEL = 2  # of 9: three times as fast as Pillow's 6 for files a tenth larger
UNKNOWN_FPS = 25  # for videos made from folders of frames, which have no rate

Record = dict[str, Any]  # result of a task: a journal entry, or {"name", "skipped": reason}


@dataclass
class Form:
    """Settings of written clips. If `size` is set, `transform` turns each frame into a square of that side.

    transform: a key of datasets.transforms.TRANSFORMS, or LANCZOS. fps: frame rate, by picking frames. min_frames:
    shorter clips are skipped.
    """

    format: str = "png"
    quality: int | None = None
    size: int | None = None
    transform: str = "resize_then_center_crop"
    fps: int | None = None
    min_frames: int = 1

    def __post_init__(self) -> None:
        limits = {"quality": within(1, 100), "size": within(1, 8192), "fps": within(1, 1000), "min_frames": at_least(1)}
        check_limits(self, "", {key: optional(limit) for key, limit in limits.items()})
        jpeg = self.format == "jpeg"
        require(jpeg or self.quality is None, f"quality needs the format jpeg, not {self.format}.")
        self.quality = self.quality or JPEG_QUALITY if jpeg else None
        linked = self.format == "link" and self.size
        require(not linked, "links cannot be resized: size needs the format video, png or jpeg.")


class Task(NamedTuple):
    """One clip: its `name` below SOURCE, its `path`, its destination `out` below OUT.

    identity: size (for a folder, its number of frames) and modification time in ns, to detect changes.
    """

    name: str
    path: str
    out: str
    identity: tuple[int, int]

    @property
    def staged(self) -> str:
        """Its name while it is written, short even if the clip's is long."""
        return hashlib.sha256(self.out.encode(errors="surrogateescape")).hexdigest()[:24] + Path(self.out).suffix[:5]


def plan_tasks(clips: Sequence[Clip], names: Sequence[str], form: Form) -> list[Task]:
    """Returns the tasks for `clips`, whose paths below OUT are `names` with the source's extensions."""
    return [
        Task(clip.name, clip.path, out, (clip.size, Path(clip.path).stat().st_mtime_ns))
        for clip, out in zip(clips, output_names(names, form), strict=True)
    ]


def output_names(names: Sequence[str], form: Form) -> list[str]:
    """Returns distinct output names for `names` ('/' between folders), in the same folders; links keep theirs.

    The extension is dropped: `a/x.avi` -> `a/x` (frames) or `a/x.mp4`. If the result is the name of another clip or
    of a folder that holds one, the extension is kept and `_` are appended until the name is free.
    """
    suffix = SUFFIXES["video"] if form.format == "video" else ""
    paths = [PurePosixPath(name) for name in names]
    has_stem = [form.format != "link" and path.suffix.lower() in VIDEO_SUFFIXES for path in paths]
    stems = [str(path.with_suffix("")) if has else name for path, has, name in zip(paths, has_stem, names)]
    often, full = Counter(stems), set(names)
    taken = {str(folder) for path in paths for folder in path.parents}
    chosen = [""] * len(names)
    for index in sorted(range(len(names)), key=names.__getitem__):
        name, stem = names[index], stems[index]
        plain = often[stem] == 1 and (stem == name or stem not in full)
        candidates = chain([stem] if plain else [], [name], (name + "_" * more for more in count(1)))
        chosen[index] = next(each for each in (c + suffix for c in candidates) if each not in taken)
        taken.add(chosen[index])
    return chosen


def convert(task: Task, staged: Path, form: Form) -> Record:
    """Writes one clip to `staged`; returns its record, or the reason if it cannot be read. Raises OSError."""
    av = load_package("av")
    try:
        return _convert(task, staged, form)
    except VideoError as error:
        remove(staged)
        where = f"{Path(error.path).name}: " if error.path != task.path else ""  # one frame of a folder
        return {"name": task.name, "skipped": where + error.reason}
    except (OSError, av.FFmpegError) as error:
        remove(staged)
        raise OSError(
            f"{staged.parents[2] / task.out} cannot be written ({getattr(error, 'strerror', None) or error}): make "
            "room there, then repeat the command to continue where it stopped"
        ) from error


def _convert(task: Task, staged: Path, form: Form) -> Record:
    reader = open_video(task.path)
    frames, found = len(reader), len(reader)
    if found < form.min_frames:
        raise VideoError(task.path, f"has {found} frames, fewer than min_frames={form.min_frames}")
    height, width = reader.read([0]).shape[-2:]  # (1, C, H, W)
    if form.format == "link":
        staged.symlink_to(Path(task.path).absolute())
    else:
        frames = _write(reader, task.path, staged, form)
    if reader.damage:
        raise VideoError(task.path, reader.damage)
    size, sha256 = measure_content(task.path)
    return {
        "name": task.name,
        "out": task.out,
        "identity": list(task.identity),
        "frames": frames,
        "height": form.size or height,
        "width": form.size or width,
        "fps": float(form.fps or reader.fps) or None,
        "source_frames": found,
        "source_height": height,
        "source_width": width,
        "source_fps": reader.fps or None,
        "bytes": size,
        "sha256": sha256,
        "note": reader.cut_off,
    }


def _write(reader: Reader, path: str, staged: Path, form: Form) -> int:
    """Writes the frames of an opened clip; returns their number."""
    rate, total = Fraction(reader.fps).limit_denominator(1001), len(reader)
    frames = require_one_size(reader.frames(), path)
    if form.fps:
        if not rate:
            raise VideoError(path, "its frame rate is unknown, so frames cannot be picked by time")
        frames = pick_frames(frames, rate, Fraction(form.fps))
        total = -(-total * form.fps // rate)  # rounded up
    frames = (resize_frame(frame, form) for frame in frames)
    if form.format == "video":
        write_video(staged, frames, Fraction(form.fps or rate or UNKNOWN_FPS))
    else:
        write_frames(staged, frames, form, total)
    return total


def require_one_size(frames: Iterator[np.ndarray], path: str) -> Iterator[np.ndarray]:
    """Yields the frames (H, W, 3) of a clip. Raises VideoError if they differ in size."""
    first = None
    for frame in frames:
        first = first or frame.shape
        if frame.shape != first:
            sizes = f"{first[1]}x{first[0]}, {frame.shape[1]}x{frame.shape[0]}"
            raise VideoError(path, f"its frames differ in size ({sizes})")
        yield frame


def pick_frames(frames: Iterator[np.ndarray], source: Fraction, wanted: Fraction) -> Iterator[np.ndarray]:
    """Yields frames at another frame rate: those displayed at times 0, 1/wanted, 2/wanted, ..."""
    shown = 0
    for number, frame in enumerate(frames):
        while shown * source < (number + 1) * wanted:
            yield frame
            shown += 1


def resize_frame(frame: np.ndarray, form: Form) -> np.ndarray:
    """Returns (H, W, 3) uint8 as (size, size, 3), rounded to whole grey levels; unchanged without `form.size`."""
    if form.size is None:
        return frame
    if form.transform == LANCZOS:  # Pillow's filter on the largest centred square, as in the official converter
        side = min(frame.shape[:2])
        top, left = (round((length - side) / 2) for length in frame.shape[:2])
        square = Image.fromarray(frame[top : top + side, left : left + side])
        return np.asarray(square.resize((form.size, form.size), Image.Resampling.LANCZOS))
    clip = torch.from_numpy(frame).permute(2, 0, 1)[None]  # (1, C, H, W)
    pixels = TRANSFORMS[form.transform](clip, form.size)[0]  # (C, size, size) in [0, 1]
    return (pixels * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def write_frames(folder: Path, frames: Iterable[np.ndarray], form: Form, total: int) -> None:
    """Writes `total` frames (H, W, 3) into the new `folder`, as 000000.png, 000001.png, ...; JPEG in 4:4:4."""
    jpeg = form.format == "jpeg"
    options = {"quality": form.quality, "subsampling": 0} if jpeg else {"compress_level": PNG_LEVEL}
    folder.mkdir()
    for name, frame in zip(frame_names(total, form), frames, strict=True):
        Image.fromarray(frame).save(folder / name, **options)


def frame_names(total: int, form: Form) -> list[str]:
    """Returns the file names of a clip of `total` frames: zero-padded to sort in order."""
    digits = max(6, len(str(total - 1)))
    return [f"{number:0{digits}d}{SUFFIXES[form.format]}" for number in range(total)]


def measure_content(path: str) -> tuple[int, str]:
    """Returns size and SHA-256 of a video file, or of the names and contents of the images in a folder."""
    source = Path(path)
    try:
        if not source.is_dir():
            return source.stat().st_size, file_sha256(source)
        digest, size = hashlib.sha256(), 0
        for file in list_frames(source):
            content = file.read_bytes()
            digest.update(f"{file.name}\0{len(content)}\0".encode(errors="surrogateescape") + content)
            size += len(content)
        return size, digest.hexdigest()
    except OSError as error:
        raise VideoError(path, f"cannot be read to its end ({error.__class__.__name__})") from error


def remove(path: Path) -> None:
    """Deletes a file, a link or a folder with everything in it, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
