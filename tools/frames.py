"""Converts one clip to a link, a video or a folder of frames, its pixels treated as in training. No command line.

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
UNKNOWN_FPS = 25  # of videos made from folders of frames, which have no rate

Record = dict[str, Any]  # result of a task: an entry of the journal, or {"name", "skipped": reason}


@dataclass
class Form:
    """Settings of written clips. With `size` each frame becomes a square of that side by `transform`.

    transform: a key of datasets.transforms.TRANSFORMS, or LANCZOS. fps: picks frames by time. min_frames: shorter clips
    are skipped.
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
        require(jpeg or self.quality is None, f"quality is of JPEG files: it needs the format jpeg, not {self.format}.")
        self.quality = self.quality or JPEG_QUALITY if jpeg else None
        linked = self.format == "link" and self.size
        require(not linked, "links leave the pixels as they are: size needs the format video, png or jpeg.")


class Task(NamedTuple):
    """One clip: its `name` below SOURCE, its `path`, its place `out` below OUT.

    identity: size (of a folder of frames: their number) and time of change in ns, which show a change of it.
    """

    name: str
    path: str
    out: str
    identity: tuple[int, int]

    @property
    def staged(self) -> str:
        """Its name while it is written: short, however long the clip's is."""
        return hashlib.sha256(self.out.encode(errors="surrogateescape")).hexdigest()[:24] + Path(self.out).suffix[:5]


def plan_tasks(clips: Sequence[Clip], names: Sequence[str], form: Form) -> list[Task]:
    """Returns the tasks that make `clips`, called `names` below OUT before their extensions change."""
    return [
        Task(clip.name, clip.path, out, (clip.size, Path(clip.path).stat().st_mtime_ns))
        for clip, out in zip(clips, output_names(names, form), strict=True)
    ]


def output_names(names: Sequence[str], form: Form) -> list[str]:
    """Returns distinct names for clips called `names` ('/' between folders), in the same folders; links keep theirs.

    The extension goes: `a/x.avi` -> `a/x` (frames) or `a/x.mp4`. Where that is another clip's name, or a folder on
    the way to one, the extension stays, and as often as needed a `_` is added.
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
    """Writes one clip at `staged`; returns its record, with the reason if it cannot be read. Raises: OSError."""
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
            "room there, then repeat the command, which goes on where it stopped"
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
    """Picks frames for another frame rate: those on show at the times 0, 1/wanted, 2/wanted, ..."""
    shown = 0
    for number, frame in enumerate(frames):
        while shown * source < (number + 1) * wanted:
            yield frame
            shown += 1


def resize_frame(frame: np.ndarray, form: Form) -> np.ndarray:
    """Returns (H, W, 3) uint8 as (size, size, 3), rounded to whole grey levels; unchanged without `form.size`."""
    if form.size is None:
        return frame
    if form.transform == LANCZOS:  # of the largest centred square, by Pillow's filter, as the official converter does
        side = min(frame.shape[:2])
        top, left = (round((length - side) / 2) for length in frame.shape[:2])
        square = Image.fromarray(frame[top : top + side, left : left + side])
        return np.asarray(square.resize((form.size, form.size), Image.Resampling.LANCZOS))
    clip = torch.from_numpy(frame).permute(2, 0, 1)[None]  # (1, C, H, W)
    pixels = TRANSFORMS[form.transform](clip, form.size)[0]  # (C, size, size) in [0, 1]
    return (pixels * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def write_frames(folder: Path, frames: Iterable[np.ndarray], form: Form, total: int) -> None:
    """Writes `total` frames (H, W, 3) into the new `folder`, as 000000.png and on; JPEG with full colour (4:4:4)."""
    jpeg = form.format == "jpeg"
    options = {"quality": form.quality, "subsampling": 0} if jpeg else {"compress_level": PNG_LEVEL}
    folder.mkdir()
    for name, frame in zip(frame_names(total, form), frames, strict=True):
        Image.fromarray(frame).save(folder / name, **options)


def frame_names(total: int, form: Form) -> list[str]:
    """Returns the file names of a clip of `total` frames: zero-padded, so that text order is theirs."""
    digits = max(6, len(str(total - 1)))
    return [f"{number:0{digits}d}{SUFFIXES[form.format]}" for number in range(total)]


def measure_content(path: str) -> tuple[int, str]:
    """Returns bytes and SHA-256 of a video file; of a folder of frames, over the names and contents of its images."""
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
