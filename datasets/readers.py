"""Video file, frame folder or array -> frames. One interface, several backends.

A reader has `len()`, `fps`, `damage` and `read(indices) -> uint8 (T, C, H, W)` RGB. Frames are named by
their place in presentation order, whatever the container's timestamps, B-frames or rotation.

Letters: T frames, C channels, H height, W width.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from itertools import chain, dropwhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from .errors import VideoError

if TYPE_CHECKING:
    import av

_VIDEOS = ".3gp .asf .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv"
_IMAGES = ".bmp .jpeg .jpg .png .ppm .tif .tiff .webp"
VIDEO_SUFFIXES = frozenset(_VIDEOS.split())
IMAGE_SUFFIXES = frozenset(_IMAGES.split())
ARRAY_SUFFIX = ".npy"
HIDDEN = (".", "__MACOSX")  # names that begin so are left out

# First bytes -> the one demuxer that may open the file: (offset, bytes, FFmpeg's format name).
CONTAINERS: tuple[tuple[int, bytes, str], ...] = (
    *((4, box, "mov") for box in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")),
    (0, b"\x1a\x45\xdf\xa3", "matroska"),
    (8, b"AVI ", "avi"),
    (0, b"FLV\x01", "flv"),
    (0, b"GIF8", "gif"),
    (0, b"OggS", "ogg"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
    (0, b"\x00\x00\x01\xba", "mpeg"),
    (0, b"\x00\x00\x01\xb3", "mpegvideo"),
    (188, b"G", "mpegts"),  # a sync byte opens every packet of 188 bytes, or of 4 + 188
    (196, b"G", "mpegts"),
)
# First bytes that deserve their own sentence. A playlist would make FFmpeg open other files or addresses.
REFUSED: tuple[tuple[bytes, str], ...] = (
    (b"#EXTM3U", "an HLS playlist, not a video"),
    (b"ffconcat", "an ffconcat playlist, not a video"),
    (b"ID3", "an audio file (mp3), not a video"),
)

# Larger frames are refused before they are decoded: 8192x4320 is the largest that cameras have a standard for.
MAX_PIXELS = 8192 * 4320
MAX_FRAMES = 2**22  # 38 hours at 30 frames a second; a file that claims more is broken, or meant to exhaust memory
PROBE_FRAMES = 6  # frames decoded to see whether the timestamps of packets name frames
PROVEN_UP_TO = 64  # clips with no more packets are decoded whole once: about one training window
NO_STAMP = -(2**63)  # stands for a frame without a timestamp


class Reader(Protocol):
    """What every backend offers.

    `fps` is 0.0 where it is unknown. `damage` is None or says, in words, that frames inside the clip are
    missing or doubtful (it may be set by `read`); `cut_off` is None or says that the end of the file is
    missing. In both cases `len()` counts only frames that are there.
    """

    fps: float
    damage: str | None
    cut_off: str | None

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Tensor:
        """Frames in the order asked, repeats allowed, as uint8 (T, C, H, W) RGB. VideoError, IndexError."""
        ...


def open_video(path: str | Path, reader: str = "auto", max_pixels: int = MAX_PIXELS) -> Reader:
    """Open a video file, a folder of frames, a single image or an array with the backend named `reader`.

    Frames of more than `max_pixels` pixels are refused from their header, before memory is taken for them.

    `auto` is PyAV: the one backend exact, in count and pixels, on every sample clip (docs/datasets.md).
    A folder or an image is read with PIL, an array with numpy, whatever the backend. Raises VideoError where
    there is no video.
    """
    if reader not in READERS:
        raise ValueError(f"reader '{reader}' is unknown: use one of {', '.join(READERS)}")
    path = Path(path)
    try:
        pictures = path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES
    except OSError as error:  # a stale network file, a folder above it that is closed to us
        raise VideoError(path, f"cannot be opened ({error.__class__.__name__})") from error
    if path.suffix.lower() == ARRAY_SUFFIX and not pictures:
        return ArrayReader(path, max_pixels)
    return FrameReader(path, max_pixels) if pictures else READERS[reader](path, max_pixels)


def every_frame(reader: Reader) -> Iterator[np.ndarray]:
    """All frames of an opened clip in order, each (H, W, C) uint8, whatever its length; VideoError where one fails."""
    if isinstance(reader, PyAVReader):
        yield from reader.frames()
    else:
        for index in range(len(reader)):
            yield reader.read([index])[0].permute(1, 2, 0).numpy()


def frame_number(name: str) -> tuple[list[int], str]:
    """Sorting key of a frame's file name: by the numbers in it (frame_9 < frame_10), then by the name."""
    return [int(digits) for digits in re.findall(r"\d+", name)], name


def list_frames(folder: Path) -> list[Path]:
    """The images that lie directly in `folder`, in numerical order; hidden files are left out."""
    names = (entry.name for entry in folder.iterdir())
    names = (n for n in names if Path(n).suffix.lower() in IMAGE_SUFFIXES and not n.startswith(HIDDEN))
    return [folder / name for name in sorted(names, key=frame_number)]


def container_format(path: str | Path) -> str:
    """FFmpeg's name of the container, from the first bytes; VideoError for anything that is not a video.

    The file name plays no part: a playlist called clip.mp4 is refused before any library sees it.
    """
    try:
        with Path(path).open("rb") as file:
            head = file.read(256)
    except VideoError:
        raise
    except (OSError, ValueError) as error:
        raise VideoError(path, f"cannot be opened ({error.__class__.__name__})") from error
    if not head:
        raise VideoError(path, "the file is empty")
    for magic, kind in REFUSED:
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(magic):
            raise VideoError(path, f"is {kind}")
    for offset, magic, name in CONTAINERS:
        if head[offset : offset + len(magic)] == magic and (name != "mpegts" or b"G" in (head[:1], head[4:5])):
            return name
    raise VideoError(path, "is not a video: its first bytes belong to no video container")


def _check_indices(indices: Sequence[int], length: int) -> list[int]:
    wanted = [int(index) for index in indices]
    if not wanted:
        raise IndexError("read() needs at least one frame index")
    if min(wanted) < 0 or max(wanted) >= length:
        raise IndexError(f"frame indices {min(wanted)} to {max(wanted)} do not fit a clip of {length} frames")
    return wanted


def _stack(path: str | Path, frames: Sequence[np.ndarray]) -> Tensor:
    """Arrays (H, W, C) -> uint8 (T, C, H, W)."""
    shapes = sorted({frame.shape for frame in frames})
    if len(shapes) > 1:
        sizes = ", ".join(f"{shape[1]}x{shape[0]}" for shape in shapes)
        raise VideoError(path, f"its frames differ in size ({sizes})")
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()  # (T, C, H, W)


# ---------------------------------------------------------------------------------------------- PyAV


@dataclass(frozen=True)
class FrameIndex:
    """Where the frames of one file are; made once per process and file.

    `pts (T,)`: presentation timestamps, ascending; `keys (K,)`: those at which decoding may begin.
    Where timestamps do not name frames (AVI with B-frames), `timed` is False: `pts` just counts, frames are
    found by counting from the start.
    """

    pts: np.ndarray
    keys: np.ndarray
    timed: bool
    fps: float
    damage: str | None
    cut_off: str | None


@dataclass(frozen=True)
class Source:
    """A video file, the one demuxer that may open it, and the largest frames that may be decoded."""

    path: str
    format: str
    max_pixels: int


class PyAVReader:
    """PyAV (FFmpeg): seeks to the key frame before the first wanted frame and decodes to the last wanted one.

    The file is opened by us and its container is forced, so no playlist or address inside it is followed.
    """

    def __init__(self, path: str | Path, max_pixels: int = MAX_PIXELS) -> None:
        self.path = str(path)
        self.source = Source(self.path, container_format(path), max_pixels)
        self.index = _frame_index(self.source, *file_identity(path))
        self.fps = self.index.fps
        self.damage = self.index.damage
        self.cut_off = self.index.cut_off

    def __len__(self) -> int:
        return len(self.index.pts)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Frames in the order asked, uint8 (T, C, H, W) RGB, rotation applied."""
        wanted = _check_indices(indices, len(self))
        images: dict[int, np.ndarray] = {}
        for targets in self._segments(sorted(set(wanted))):
            images.update(self._decode(targets, self._key(targets[0])))
        missing = [index for index in wanted if index not in images]
        if missing:
            raise self._undecodable(missing[0])
        return _stack(self.path, [images[index] for index in wanted])

    def frames(self) -> Iterator[np.ndarray]:
        """Every frame from first to last, (H, W, C) uint8: the file is decoded once, one frame held at a time."""
        expected = 0
        for index, image in self._decode(list(range(len(self))), None):
            if index != expected:
                break
            yield image
            expected += 1
        if expected < len(self):
            raise self._undecodable(expected)

    def _undecodable(self, index: int) -> VideoError:
        return VideoError(self.path, f"frame {index} of {len(self)} cannot be decoded")

    def _segments(self, wanted: list[int]) -> Iterator[list[int]]:
        """Group frame numbers by the key frame that their decoding starts from."""
        starts = np.searchsorted(self.index.keys, self.index.pts[wanted], side="right")
        for start in np.unique(starts):
            yield [index for index, own in zip(wanted, starts) if own == start]

    def _decode(self, targets: list[int], key: int | None) -> Iterator[tuple[int, np.ndarray]]:
        """(index, image) of the `targets` as they come out, from the key frame `key` (None: the first packet) on."""
        from av.video.reformatter import VideoReformatter

        reformatter = VideoReformatter()
        numbers = {int(self.index.pts[index]): index for index in targets}
        with _opened(self.source) as (container, stream):
            packets = _packets_from(container, stream, key)
            if stream.codec_context.name == "h264" and self.index.timed and not self.damage:
                packets = _sparing(packets, stream.codec_context, min(numbers))
            frames = self._frames(packets)
            first = next((frame for frame in frames if key is None or _stamp(frame) >= key), None)
            if key is not None and not (first and first.pts == key and first.key_frame):
                yield from self._decode(targets, None)  # the seek missed, or the key frame is marked falsely
                return
            for ordinal, frame in enumerate(chain([first] if first else [], frames)):
                index = numbers.pop(_stamp(frame) if self.index.timed else ordinal, None)
                if index is not None:
                    yield index, _to_rgb(frame, reformatter)
                if not numbers:
                    return

    def _key(self, index: int) -> int | None:
        """Timestamp of the last key frame at or before frame `index`; None = the start of the file."""
        place = int(np.searchsorted(self.index.keys, self.index.pts[index], side="right")) - 1
        return int(self.index.keys[place]) if place > 0 else None

    def _frames(self, packets: Iterator[av.Packet]) -> Iterator[av.VideoFrame]:
        for frames in _decoded(packets):
            if _is_broken(frames):
                self.damage = self.damage or "a part of it cannot be decoded"
            yield from frames or []


def _is_broken(frames: list[av.VideoFrame] | None) -> bool:
    """Whether a packet could not be decoded, or only with invented pixels."""
    return frames is None or any(frame.is_corrupt for frame in frames)


def _stamp(frame: av.VideoFrame) -> int:
    return NO_STAMP if frame.pts is None else frame.pts


def _to_rgb(frame: av.VideoFrame, reformatter: Any) -> np.ndarray:
    """One decoded frame -> (H, W, C) uint8, turned upright."""
    image = reformatter.reformat(frame, format="rgb24", interpolation="BICUBIC", threads=1).to_ndarray()
    return np.ascontiguousarray(np.rot90(image, k=round(frame.rotation / 90) % 4))


def file_identity(path: str | Path) -> tuple[int, int]:
    """Size and time of change: a replaced file is another file."""
    try:
        stat = Path(path).stat()
    except OSError as error:
        raise VideoError(path, f"cannot be opened ({error.__class__.__name__})") from error
    return stat.st_size, stat.st_mtime_ns


@contextmanager
def _opened(source: Source) -> Iterator[tuple[Any, Any]]:
    """(container, first video stream) of a file; VideoError where it, or a read in the block, fails."""
    av = load_package("av")
    path = source.path
    limit = {"max_pixels": str(4 * source.max_pixels + 2**16)}  # with the borders that decoders add
    with ExitStack() as stack:
        try:
            file = stack.enter_context(Path(path).open("rb"))
            container = stack.enter_context(
                av.open(file, mode="r", format=source.format, options=limit, metadata_errors="replace")
            )
        except (OSError, av.FFmpegError) as error:
            raise VideoError(path, f"cannot be read as {source.format}: incomplete or damaged") from error
        if not container.streams.video:
            raise VideoError(path, "holds no video stream")
        stream = container.streams.video[0]
        decoder = stream.codec_context
        if decoder is None:
            raise VideoError(path, "its video codec is unknown")
        if decoder.width * decoder.height > source.max_pixels:
            raise VideoError(path, _too_large(decoder.width, decoder.height, source.max_pixels))
        decoder.options = limit
        decoder.thread_count = 1  # loader workers are the parallelism
        try:
            yield container, stream
        except OSError as error:  # the disk or network, not the file's content
            raise VideoError(path, f"cannot be read to its end ({error.__class__.__name__})") from error


def _too_large(width: int, height: int, max_pixels: int) -> str:
    return f"its frames of {width}x{height} are larger than data.max_pixels={max_pixels} allows"


def _packets(container: Any, stream: Any) -> Iterator[av.Packet]:
    """Packets in file order; a read error ends them. The last, empty one (it drains the decoder) included."""
    import av

    try:
        yield from container.demux(stream)
    except av.FFmpegError:
        return


def _packets_from(container: Any, stream: Any, key: int | None) -> Iterator[av.Packet]:
    """Packets of a freshly opened file, from the key frame with timestamp `key` on (None: all).

    Containers seek loosely: what comes before the key frame is dropped undecoded, and the caller checks
    what comes first.
    """
    import av

    packets = _packets(container, stream)
    if key is None:
        return packets
    with suppress(av.FFmpegError):  # a file without an index: its packets are read from the start
        container.seek(key, stream=stream, backward=True)
    return dropwhile(lambda packet: packet.pts is None or packet.pts < key, packets)


def _sparing(packets: Iterator[av.Packet], decoder: Any, first: int) -> Iterator[av.Packet]:
    """The same packets; of those before timestamp `first`, the decoder leaves out what no other frame refers to."""
    for packet in packets:
        before = packet.pts is not None and packet.pts < first
        decoder.skip_frame = "NONREF" if before else "DEFAULT"
        yield packet


def _decoded(packets: Iterator[av.Packet]) -> Iterator[list[av.VideoFrame] | None]:
    """Frames of each packet, in presentation order; None for a packet that cannot be decoded."""
    import av

    for packet in packets:
        try:
            yield packet.decode()
        except av.FFmpegError:
            yield None


@lru_cache(maxsize=16384)
def _frame_index(source: Source, size: int, modified_ns: int) -> FrameIndex:
    """Index of one file. `size` and `modified_ns` make a replaced file a new entry of the cache."""
    stamps = array("q")  # a list of Python's integers takes five times the memory
    keys: list[int] = []
    with _opened(source) as (container, stream):
        if source.format == "mov":  # a table; in others a remark, often wrong
            _check_count(source, stream.frames)
        for packet in _packets(container, stream):
            if packet.size and not packet.is_discard:
                stamps.append(NO_STAMP if packet.pts is None else packet.pts)
                keys += [packet.pts] if packet.is_keyframe and packet.pts is not None else []
                _check_count(source, len(stamps))
        declared, rate = stream.frames, float(stream.average_rate or stream.guessed_rate or 0)
        time_base = float(stream.time_base or 0)
    if not stamps:
        raise VideoError(source.path, "its video stream holds no frames")
    times = np.unique(np.frombuffer(stamps, dtype=np.int64))
    timed = len(times) == len(stamps) and times[0] != NO_STAMP
    index = FrameIndex(
        pts=times if timed else np.arange(len(stamps), dtype=np.int64),
        keys=np.array(sorted(keys), dtype=np.int64),
        timed=timed,
        fps=_frame_rate(rate, times, time_base) if timed else rate,
        damage=None,
        cut_off=_missing_tail(source, size, declared, len(stamps)),
    )
    return _proven(source, index)


def _check_count(source: Source, frames: int) -> None:
    if frames > MAX_FRAMES:
        raise VideoError(source.path, f"states more frames ({frames}) than a clip may have ({MAX_FRAMES})")


def _frame_rate(stated: float, times: np.ndarray, time_base: float) -> float:
    """The stated rate, unless the timestamps contradict it by more than 5 % (FLV states 1000, TS nothing)."""
    seconds = float(times[-1] - times[0]) * time_base
    if seconds <= 0:
        return stated
    measured = (len(times) - 1) / seconds
    return stated if abs(stated - measured) <= 0.05 * measured else measured


def _proven(source: Source, index: FrameIndex) -> FrameIndex:
    """Compare the index with what the decoder says: on the first frames, or on all of them where needed.

    All are decoded where the clip is short, its end is missing, or its timestamps do not name frames.
    """
    if index.timed and not index.cut_off and len(index.pts) > PROVEN_UP_TO:
        seen, _ = _decode_stamps(source, PROBE_FRAMES)
        if seen == index.pts[:PROBE_FRAMES].tolist():
            return index
    seen, damage = _decode_stamps(source, None)
    if not seen:
        raise VideoError(source.path, "none of its frames can be decoded")
    if index.timed and seen == sorted(set(seen)) and set(seen) <= set(index.pts.tolist()):
        return replace(index, pts=np.array(seen, dtype=np.int64), damage=damage)
    counted = np.arange(len(seen), dtype=np.int64)
    return replace(index, pts=counted, keys=counted[:1], timed=False, damage=damage)


def _decode_stamps(source: Source, limit: int | None) -> tuple[list[int], str | None]:
    """Timestamps of the first `limit` frames (None: all) as they leave the decoder; and the damage met."""
    stamps: list[int] = []
    broken = 0
    with _opened(source) as (container, stream):
        for frames in _decoded(_packets(container, stream)):
            broken += _is_broken(frames)
            stamps += [_stamp(frame) for frame in frames or []]
            if limit and len(stamps) >= limit:
                break
    return stamps[:limit], f"{broken} of its packets cannot be decoded" if broken else None


def _missing_tail(source: Source, size: int, declared: int, found: int) -> str | None:
    """Tell a file whose end is missing, by what its container promises; None where nothing is promised."""
    if source.format == "mov" and found < declared:
        return f"the file is cut off: {found} of {declared} frames are there"
    try:
        promised = _promised_bytes(source.path, source.format)
    except OSError as error:
        raise VideoError(source.path, f"cannot be read to its end ({error.__class__.__name__})") from error
    if promised > size:
        return f"the file is cut off: {size} of {promised} bytes are there"
    return None


def _promised_bytes(path: str, format_name: str) -> int:
    """File size that the outermost header of an AVI or Matroska file states; 0 where it states none."""
    with Path(path).open("rb") as file:
        if format_name == "avi":
            return 8 + int.from_bytes(file.read(8)[4:], "little")
        if format_name == "matroska":
            file.seek(4)  # past the identifier of the header
            file.seek(_ebml_size(file), 1)  # past the header, to the segment
            known = file.read(4) == b"\x18\x53\x80\x67"
            length = _ebml_size(file) if known else 0
            return file.tell() + length if length else 0
    return 0


def _ebml_size(file: BinaryIO) -> int:
    """One variable-length integer: leading zero bits of the first byte count its bytes; all ones: 0."""
    first = file.read(1)
    if not first or not first[0]:
        return 0
    length = 9 - first[0].bit_length()
    bits = 7 * length
    value = int.from_bytes(first + file.read(length - 1), "big") & ((1 << bits) - 1)
    return 0 if value == (1 << bits) - 1 else value


# -------------------------------------------------------------------------------------------- decord


class DecordReader:
    """decord 0.6: kept for its users. It counts a frame too many on some files and lacks newer codecs."""

    def __init__(self, path: str | Path, max_pixels: int = MAX_PIXELS) -> None:
        decord = load_package("decord")
        self.path = str(path)
        self.damage: str | None = None
        self.cut_off: str | None = None
        self.failures = (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, UnicodeError)
        with _opened(Source(self.path, container_format(path), max_pixels)):  # decord has no limits of its own
            pass
        try:
            self.video = decord.VideoReader(
                str(Path(path).absolute()),
                ctx=decord.cpu(0),
                num_threads=1,
                fault_tol=1e-9,  # else it fills what it cannot decode with copies of the nearest frame
            )
            self.fps = float(self.video.get_avg_fps())
        except self.failures as error:
            raise VideoError(path, "decord cannot open it") from error

    def __len__(self) -> int:
        return len(self.video)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Frames in the order asked, uint8 (T, C, H, W) RGB, rotation applied (by decord)."""
        wanted = _check_indices(indices, len(self))
        try:
            frames = self.video.get_batch(wanted).asnumpy()  # (T, H, W, C)
        except self.failures as error:
            raise VideoError(self.path, f"decord cannot read frames {wanted[0]} to {wanted[-1]}") from error
        return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()  # (T, C, H, W)


# ------------------------------------------------------------------------------------ frames as images


class FrameReader:
    """A folder of images, in numerical order, or one image: a clip of one frame. No frame rate is known."""

    def __init__(self, path: str | Path, max_pixels: int = MAX_PIXELS) -> None:
        self.path = str(path)
        self.max_pixels = max_pixels
        self.fps = 0.0
        self.damage: str | None = None
        self.cut_off: str | None = None
        try:
            self.frames = list_frames(Path(path)) if Path(path).is_dir() else [Path(path)]
        except OSError as error:
            raise VideoError(path, f"cannot be opened ({error.__class__.__name__})") from error
        if not self.frames:
            raise VideoError(path, "the folder holds no images")

    def __len__(self) -> int:
        return len(self.frames)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Frames in the order asked, uint8 (T, C, H, W) RGB."""
        wanted = _check_indices(indices, len(self))
        images = {index: read_image(self.frames[index], self.max_pixels) for index in sorted(set(wanted))}
        return _stack(self.path, [images[index] for index in wanted])


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """One image file -> (H, W, C) uint8 RGB, upright (EXIF). VideoError where PIL cannot read it."""
    from PIL import Image, ImageOps

    try:
        with Path(path).open("rb") as file, Image.open(file) as image:  # reads the header only
            if image.width * image.height > max_pixels:
                raise VideoError(path, _too_large(image.width, image.height, max_pixels))
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except VideoError:
        raise
    except Exception as error:  # a damaged image makes PIL's readers fail in any way
        raise VideoError(path, f"is not a readable image ({error.__class__.__name__})") from error


# ------------------------------------------------------------------------------------------------ arrays


class ArrayReader:
    """A `.npy` file with one uint8 array (T, H, W, C), C = 3: the lossless form of samples. No frame rate is known.

    It is memory-mapped, so only the frames asked for are read.
    """

    def __init__(self, path: str | Path, max_pixels: int = MAX_PIXELS) -> None:
        self.path = str(path)
        self.fps = 0.0
        self.damage: str | None = None
        self.cut_off: str | None = None
        try:
            with Path(path).open("rb") as file:
                shape, order, offset = _array_header(self.path, file)
                _check_array(self.path, shape, file.seek(0, 2) - offset, max_pixels)
            self.array: np.ndarray = np.memmap(path, np.uint8, "r", offset, shape, order)
        except OSError as error:
            raise VideoError(path, f"cannot be opened ({error.__class__.__name__})") from error

    def __len__(self) -> int:
        return len(self.array)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Frames in the order asked, uint8 (T, C, H, W) RGB."""
        wanted = _check_indices(indices, len(self))
        return _stack(self.path, [np.asarray(self.array[index]) for index in wanted])


def _array_header(path: str, file: BinaryIO) -> tuple[tuple[int, ...], Literal["C", "F"], int]:
    """(shape, memory order, where the values begin) of a .npy file of bytes; nothing is ever unpickled."""
    try:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"version {version}")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except (ValueError, EOFError, MemoryError, RecursionError) as error:
        raise VideoError(path, "is not a readable .npy array") from error
    if dtype != np.uint8:
        raise VideoError(path, f"holds values of type {dtype}; a clip is uint8, 0 to 255")
    return shape, "F" if fortran else "C", file.tell()


def _check_array(path: str, shape: tuple[int, ...], size: int, max_pixels: int) -> None:
    """VideoError unless the shape is that of a clip, and the values are there."""
    if len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
        raise VideoError(path, f"holds an array of shape {shape}; a clip is (frames, height, width, 3)")
    if shape[1] * shape[2] > max_pixels:
        raise VideoError(path, _too_large(shape[2], shape[1], max_pixels))
    if size != math.prod(shape):
        raise VideoError(path, f"is cut off or too long: {size} of {math.prod(shape)} bytes are there")


READERS: dict[str, type[PyAVReader] | type[DecordReader]] = {
    "auto": PyAVReader,
    "pyav": PyAVReader,
    "decord": DecordReader,
}
PACKAGES = {PyAVReader: "av", DecordReader: "decord"}


def load_package(name: str) -> Any:
    """Import a package; ValueError, a sentence, where it is there and cannot be loaded."""
    try:
        return import_module(name)
    except ImportError as error:
        if error.name == name and isinstance(error, ModuleNotFoundError):  # not installed, which engine.cli explains
            raise
        raise ValueError(
            f"the Python package {name!r} cannot be loaded ({error}): install it anew, "
            f"pip install --force-reinstall {name}."
        ) from error


def check_installed(reader: str) -> None:
    """ValueError if the package behind the backend named `reader` is not installed or cannot be loaded."""
    package = PACKAGES[READERS[reader]]
    if find_spec(package) is None:
        raise ValueError(
            f"data.reader={reader} needs the Python package {package!r}, which is not installed: "
            f"pip install {package}, or choose another reader"
        )
    load_package(package)
