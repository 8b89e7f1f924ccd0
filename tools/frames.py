"""One clip -> a link, a video or a folder of frames, its pixels treated as in training. No command line.

Letters: H height, W width.
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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from datasets.readers import Reader

FORMATS = ("link", "video", "png", "jpeg")
SUFFIXES = {"link": "", "video": ".mp4", "png": ".png", "jpeg": ".jpg"}
LANCZOS = "center_crop_then_lanczos"
JPEG_QUALITY = 95
PNG_LEVEL = 2  # of 9: three times as fast as Pillow's 6 for files a tenth larger
UNKNOWN_FPS = 25  # of videos made from folders of frames, which have no rate


@dataclass(frozen=True)
class Form:
    """Settings of written clips: `format`, the JPEG `quality` (1 to 100; None: 95), and how their pixels are treated.

    With `size` each frame becomes a square of that side by `transform`: a key of datasets.transforms.TRANSFORMS,
    or LANCZOS. `fps` picks frames by time, to that frame rate. `min_frames`: shorter clips are skipped.
    """

    format: str = "png"
    quality: int | None = None
    size: int | None = None
    transform: str = "resize_then_center_crop"
    fps: int | None = None
    min_frames: int = 1

    def __post_init__(self) -> None:
        for key, value, least, most in (
            ("quality", self.quality, 1, 100),
            ("size", self.size, 1, 8192),
            ("fps", self.fps, 1, 1000),
            ("min_frames", self.min_frames, 1, 2**22),
        ):
            if value is not None and not least <= value <= most:
                raise ValueError(f"{key} is {value}, but must be from {least} to {most}")
        if self.quality is not None and self.format != "jpeg":
            raise ValueError(f"quality is of JPEG files: it needs the format jpeg, not {self.format}")
        if self.format == "jpeg":
            object.__setattr__(self, "quality", self.quality or JPEG_QUALITY)
        if self.format == "link" and self.size:
            raise ValueError("links leave the pixels as they are: size needs the format video, png or jpeg")


@dataclass(frozen=True)
class Task:
    """One clip: its `name` below SOURCE, its `path`, where it goes below OUT, and what tells that it changed."""

    name: str
    path: str
    out: str
    identity: tuple[int, int]

    @property
    def staged(self) -> str:
        """Its name while it is written: short, whatever the clip's is."""
        return hashlib.sha256(self.out.encode(errors="surrogateescape")).hexdigest()[:24] + Path(self.out).suffix[:5]


Record = dict[str, Any]  # what became of a task: an entry of the journal, or {"name", "skipped": reason}


def identity_of(path: str, size: int) -> tuple[int, int]:
    """(size, time of change in ns) of a video file or a folder of frames, whose size is their number."""
    return size, Path(path).stat().st_mtime_ns


def output_names(names: Sequence[str], form: Form) -> list[str]:
    """For clips called `names` ('/' between folders), distinct names that keep their folders.

    The extension goes: `a/x.avi` -> `a/x` (frames) or `a/x.mp4`. Where that is another clip's name, or a folder on
    the way to one, the extension stays, and as often as needed a `_` is added. Links keep the full name.
    """
    suffix = SUFFIXES["video"] if form.format == "video" else ""
    stems = [name if form.format == "link" else _stem(name) for name in names]
    often, full = Counter(stems), set(names)
    taken = {str(folder) for name in names for folder in PurePosixPath(name).parents}
    chosen = [""] * len(names)
    for index in sorted(range(len(names)), key=names.__getitem__):
        name, stem = names[index], stems[index]
        plain = often[stem] == 1 and (stem == name or stem not in full)
        candidates = chain([stem] if plain else [], [name], (name + "_" * more for more in count(1)))
        chosen[index] = next(each for each in (c + suffix for c in candidates) if each not in taken)
        taken.add(chosen[index])
    return chosen


def _stem(name: str) -> str:
    from datasets.readers import VIDEO_SUFFIXES

    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in VIDEO_SUFFIXES else name


def unusable_name(name: str) -> str | None:
    """Why a clip of this name cannot be listed in a text file; None if it can."""
    return "its name holds a line break or another control character" if any(ord(c) < 32 for c in name) else None


# ------------------------------------------------------------------------------------------ one clip


def convert(task: Task, staged: Path, form: Form) -> Record:
    """Write one clip at `staged`; returns its record.

    A clip that cannot be read gives a record that says why. Raises: OSError where it cannot be written.
    """
    from datasets.readers import VideoError, load_package

    av = load_package("av")

    try:
        return _convert(task, staged, form)
    except VideoError as error:
        remove(staged)
        where = f"{Path(error.path).name}: " if error.path != task.path else ""  # one frame of a folder
        return {"name": task.name, "skipped": where + error.reason}
    except (OSError, av.FFmpegError) as error:
        remove(staged)
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"{staged.parent.parent.parent / task.out} cannot be written ({reason}): make room there, "
            "then repeat the command, which goes on where it stopped"
        ) from error


def _convert(task: Task, staged: Path, form: Form) -> Record:
    from datasets.readers import VideoError, open_video

    reader = open_video(task.path)
    if len(reader) < form.min_frames:
        raise VideoError(task.path, f"has {len(reader)} frames, fewer than min_frames={form.min_frames}")
    remove(staged)
    first = reader.read([0])  # (1, C, H, W)
    height, width = first.shape[-2:]
    if form.format == "link":
        staged.symlink_to(Path(task.path).absolute())
        frames, size = len(reader), (height, width)
    else:
        frames, size = _write(reader, task, staged, form)
    if reader.damage:
        raise VideoError(task.path, reader.damage)
    bytes_, sha256 = content_of(task.path)
    return {
        "name": task.name,
        "out": task.out,
        "identity": list(task.identity),
        "frames": frames,
        "height": size[0],
        "width": size[1],
        "fps": float(form.fps or reader.fps) or None,
        "source_frames": len(reader),
        "source_height": height,
        "source_width": width,
        "source_fps": reader.fps or None,
        "bytes": bytes_,
        "sha256": sha256,
        "note": reader.cut_off,
    }


def _write(reader: Reader, task: Task, staged: Path, form: Form) -> tuple[int, tuple[int, int]]:
    """Write the frames of an opened clip; returns how many, and their (H, W)."""
    from datasets.readers import VideoError, read_all_frames

    rate = Fraction(reader.fps).limit_denominator(1001)
    if form.fps and not rate:
        raise VideoError(task.path, "its frame rate is unknown, so frames cannot be picked by time")
    shapes: list[tuple[int, int]] = []
    total = -(-len(reader) * form.fps // rate) if form.fps else len(reader)
    frames = _of_one_size(read_all_frames(reader), task.path)
    frames = at_rate(frames, rate, Fraction(form.fps)) if form.fps else frames
    frames = _noting_shape((resized(frame, form) for frame in frames), shapes)
    if form.format == "video":
        write_video(staged, frames, Fraction(form.fps or rate or UNKNOWN_FPS))
    else:
        write_frames(staged, frames, form, total)
    return len(shapes), shapes[0]


def _of_one_size(frames: Iterator[np.ndarray], path: str) -> Iterator[np.ndarray]:
    from datasets.readers import VideoError

    first = None
    for frame in frames:
        first = frame.shape if first is None else first
        if frame.shape != first:
            sizes = f"{first[1]}x{first[0]}, {frame.shape[1]}x{frame.shape[0]}"
            raise VideoError(path, f"its frames differ in size ({sizes})")
        yield frame


def _noting_shape(frames: Iterable[np.ndarray], shapes: list[tuple[int, int]]) -> Iterator[np.ndarray]:
    for frame in frames:
        shapes.append(frame.shape[:2])
        yield frame


def at_rate(frames: Iterator[np.ndarray], source: Fraction, wanted: Fraction) -> Iterator[np.ndarray]:
    """Picks frames for another frame rate: the one on show at each time 0, 1/wanted, 2/wanted, ..."""
    shown = 0
    for number, frame in enumerate(frames):
        while shown * source < (number + 1) * wanted:
            yield frame
            shown += 1


def resized(frame: np.ndarray, form: Form) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3) uint8, rounded to the nearest grey level; unchanged without `form.size`."""
    if form.size is None:
        return frame
    if form.transform == LANCZOS:
        return _lanczos(frame, form.size)
    import torch

    from datasets.transforms import TRANSFORMS

    clip = torch.from_numpy(frame).permute(2, 0, 1)[None]  # (1, C, H, W)
    square = TRANSFORMS[form.transform](clip, form.size)[0]  # (C, size, size) in [0, 1]
    return (square * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def _lanczos(frame: np.ndarray, size: int) -> np.ndarray:
    """The largest centred square, then Pillow's Lanczos filter, as the official converter does."""
    import numpy as np
    from PIL import Image

    height, width = frame.shape[:2]
    side = min(height, width)
    top, left = round((height - side) / 2), round((width - side) / 2)
    square = Image.fromarray(frame[top : top + side, left : left + side])
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))


def write_frames(folder: Path, frames: Iterable[np.ndarray], form: Form, total: int) -> None:
    """Write `total` frames (H, W, 3) into the new `folder`, as 000000.png and on.

    JPEG keeps colour at full resolution (4:4:4), and its quantisation tables are those of `form.quality`.
    """
    from PIL import Image

    options: dict[str, Any] = {"compress_level": PNG_LEVEL}
    if form.format == "jpeg":
        options = {"quality": form.quality, "subsampling": 0}
    folder.mkdir()
    for name, frame in zip(frame_names(total, form), frames, strict=True):
        Image.fromarray(frame).save(folder / name, **options)


def frame_names(total: int, form: Form) -> Iterator[str]:
    """The file names of a clip of `total` frames: zero-padded, to at least six digits, so text order is theirs."""
    digits = max(6, len(str(total - 1)))
    yield from (f"{number:0{digits}d}{SUFFIXES[form.format]}" for number in range(total))


def write_video(path: Path, frames: Iterable[np.ndarray], fps: Fraction | int, crf: int = 6) -> None:
    """Write frames (H, W, 3) as H.264 at a constant rate factor, on one thread: the bytes are the same every time.

    Colour is kept at full resolution (yuv444p), so odd sizes need no padding. A key frame every eight frames, so
    that a clip from the middle costs no more than that to reach.
    """
    import av

    with av.open(str(path), "w") as container:
        stream = None
        for frame in frames:
            if stream is None:
                stream = container.add_stream("libx264", rate=fps)
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = "yuv444p"
                stream.codec_context.thread_count = 1
                # x264's macroblock tree reads past the edge of tiny frames: the bytes would differ from run to run
                stream.options = {"crf": str(crf), "preset": "medium", "g": "8", "mbtree": "0"}
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        if stream is not None:
            container.mux(stream.encode())


def content_of(path: str) -> tuple[int, str]:
    """(bytes, SHA-256) of a video file; of a folder of frames, over the names and contents of its images."""
    from datasets.readers import VideoError, list_frames

    digest, size = hashlib.sha256(), 0
    try:
        folder = Path(path).is_dir()
        for file in list_frames(Path(path)) if folder else [Path(path)]:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode(errors="surrogateescape") if folder else b"")
            with file.open("rb") as stream:
                while block := stream.read(2**20):
                    digest.update(block)
                    size += len(block)
    except OSError as error:
        raise VideoError(path, f"cannot be read to its end ({error.__class__.__name__})") from error
    return size, digest.hexdigest()


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with all in it; nothing there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
