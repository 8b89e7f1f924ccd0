"""Reads video files with PyAV (FFmpeg)."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, dropwhile, filterfalse
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from .base import MAX_PIXELS, Reader, VideoError, check_size, identify_file, load_package, name_file
from .containers import detect_container

if TYPE_CHECKING:
    import av

MAX_FRAMES = 2**22  # 38 hours at 30 frames per second; a larger count is an error or an attack on memory
PROBE_FRAMES = 6  # frames decoded to check that packet timestamps identify frames
VERIFIED_UP_TO = 64  # frames; clips up to this, about one training window, are decoded completely once
NO_STAMP = -(2**63)  # marks a frame without a timestamp
PART = "a part of it cannot be decoded"


@dataclass(frozen=True)
class FrameIndex:
    """Frame index of one file, made once per process.

    `pts (T,)`: presentation timestamps, ascending; `keys (K,)`: timestamps at which decoding may start. If timestamps
    do not identify frames (AVI with B-frames), `timed` is False, `pts` are ordinals, and frames are counted instead.
    `skips`: whether the decoder can skip frames that no other frame references (h264).
    """

    pts: np.ndarray
    keys: np.ndarray
    timed: bool
    skips: bool
    fps: float
    damage: str | None
    cut_off: str | None


@dataclass(frozen=True)
class VideoFile:
    """A video file, the only demuxer that may open it, and its limit on frame size."""

    path: str
    format: str
    max_pixels: int


class PyAVReader(Reader):
    """Reads with PyAV: seeks to the key frame before the first wanted frame and decodes up to the last one.

    The file is opened here and its container format is forced, so FFmpeg follows no playlist or URL inside it.
    """

    def __init__(self, path: str | Path, max_pixels: int = MAX_PIXELS) -> None:
        super().__init__(path)
        self.source = VideoFile(self.path, detect_container(path), max_pixels)
        self.index = _index_frames(self.source, *identify_file(path))
        self.fps, self.damage, self.cut_off = self.index.fps, self.index.damage, self.index.cut_off

    def __len__(self) -> int:
        return len(self.index.pts)

    def read_images(self, indices: list[int]) -> dict[int, np.ndarray]:
        images: dict[int, np.ndarray] = {}
        for place, targets in self._group(indices):
            images |= self._read_group(targets, place)
        return images

    def read_each(self, indices: list[int]) -> dict[int, np.ndarray | VideoError]:
        """As in `Reader`, but decodes each group of frames once for each place where decoding may start."""
        images: dict[int, np.ndarray] = {}
        left: list[int] = []
        for place, targets in self._group(indices):
            stops = [self._collect(targets, key, images) for key in self._starts(place)]
            damaged = len(stops) == 2 and stops[0] == stops[1] != NO_STAMP  # wherever decoding starts
            left += [] if damaged else targets
        self._collect(left, None, images)
        lost = VideoError(self.path, self.damage or PART)
        return {index: images.get(index, lost) for index in indices}

    def _collect(self, targets: list[int], key: int | None, images: dict[int, np.ndarray]) -> int:
        """Adds those `targets` to `images` that come out undamaged when decoding starts at `key` (see `_decode`).

        Frames after a damaged one that no other frame references are decoded by a second attempt, which skips that one.
        Returns the timestamp of the damage at which it gave up, if it is known, else NO_STAMP.
        """
        left = [index for index in targets if index not in images]
        while left:
            try:
                for index, image in self._decode(left, key):
                    images[index] = image
                break
            except _UncleanStart as unclean:
                if not (self.index.skips and self.index.timed) or self.index.pts[left[0]] > unclean.time:
                    return unclean.time
                left = [index for index in left if index not in images and self.index.pts[index] > unclean.time]
        return NO_STAMP

    def _group(self, indices: list[int]) -> Iterator[tuple[int, list[int]]]:
        """Yields (number of the key frame, those of `indices` that follow it) in order."""
        places = np.searchsorted(self.index.keys, self.index.pts[indices], side="right") - 1
        for place in np.unique(places):
            yield int(place), np.array(indices)[places == place].tolist()

    def _starts(self, place: int) -> list[int]:
        """Returns the timestamps of key frame number `place` and of the one before, except the file's first."""
        return [int(self.index.keys[at]) for at in (place, place - 1) if at > 0]

    def frames(self) -> Iterator[np.ndarray]:
        """Yields every frame, (H, W, C) uint8, decoding the file once and holding one frame at a time."""
        expected = 0
        for index, image in self._decode(range(len(self)), None, tolerant=True):
            if index != expected:
                break
            yield image
            expected += 1
        if expected < len(self):
            raise VideoError(self.path, f"frame {expected} of {len(self)} cannot be decoded")

    def _read_group(self, targets: list[int], place: int) -> dict[int, np.ndarray]:
        """Returns the images of frames `targets`, which are decoded from key frame number `place`.

        Decoding from a key frame can fail (open GOP, gradual refresh): if frames are damaged or missing, it restarts
        one key frame earlier, and then from the first packet, whose result is final.
        """
        for key in self._starts(place):
            with suppress(_UncleanStart):
                images = dict(self._decode(targets, key))
                if len(images) == len(targets):
                    return images
        images = dict(self._decode(targets, None, tolerant=True))
        for index in targets:
            if index not in images:
                raise VideoError(self.path, f"frame {index} of {len(self)} cannot be decoded")
        return images

    def _decode(
        self, targets: Sequence[int], key: int | None, *, tolerant: bool = False
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (index, image) of the `targets`, decoding from the key frame `key` (None: from the first packet).

        Raises: _UncleanStart where no intact key frame precedes the first target, and at damage, unless `tolerant`.
        """
        av = load_package("av")
        reformatter = load_package("av.video.reformatter").VideoReformatter()
        numbers = {int(self.index.pts[index]): index for index in targets}
        with open_container(self.source) as (container, stream):
            packets = _read_packets(container, stream, key)
            if self.index.skips and self.index.timed and not self.damage:
                packets = _skip_unreferenced(packets, stream.codec_context, min(numbers))
            frames = self._frames(packets, tolerant)
            if key is not None:
                first = next((frame for frame in frames if _timestamp(frame) >= key), None)
                intra = first and first.key_frame and first.pict_type == av.video.frame.PictureType.I
                if not (first and intra and _timestamp(first) <= min(numbers)):
                    raise _UncleanStart  # the seek missed, or the key-frame flag is wrong
                frames = chain([first], frames)
            for ordinal, frame in enumerate(frames):
                index = numbers.pop(_timestamp(frame) if self.index.timed else ordinal, None)
                if index is not None:
                    yield index, _to_rgb(frame, reformatter)
                if not numbers:
                    return

    def _frames(self, packets: Iterator[av.Packet], tolerant: bool) -> Iterator[av.VideoFrame]:
        for packet, frames in _decode_packets(packets):
            if _is_broken(frames):
                if not tolerant:
                    broken = [_timestamp(frame) for frame in frames or () if frame.is_corrupt]
                    raise _UncleanStart(max(broken, default=_timestamp(packet)))
                self.damage = self.damage or PART
            yield from frames or []


class _UncleanStart(Exception):
    """The wanted frames cannot be decoded from this key frame: the frame at `time`, if known, is damaged."""

    def __init__(self, time: int = NO_STAMP) -> None:
        super().__init__(time)
        self.time = time


def _is_broken(frames: list[av.VideoFrame] | None) -> bool:
    """Returns whether a packet could not be decoded, or only with concealed errors."""
    return frames is None or any(frame.is_corrupt for frame in frames)


def _timestamp(frame: av.VideoFrame | av.Packet) -> int:
    return NO_STAMP if frame.pts is None else frame.pts


def _is_incomplete(packet: av.Packet) -> bool:
    """Returns whether the file ends within this packet (MPEG-TS marks any damage in this way)."""
    return packet.is_corrupt and packet.stream.container.format.name != "mpegts"


def _to_rgb(frame: av.VideoFrame, reformatter: Any) -> np.ndarray:
    """Converts a decoded frame to (H, W, C) uint8, upright."""
    image = reformatter.reformat(frame, format="rgb24", interpolation="BICUBIC", threads=1).to_ndarray()
    return np.ascontiguousarray(np.rot90(image, k=round(frame.rotation / 90) % 4))


@contextmanager
def open_container(source: VideoFile) -> Iterator[tuple[Any, Any]]:
    """Opens a file as (container, first video stream). Raises: VideoError if that, or a read in the block, fails."""
    av = load_package("av")
    path = source.path
    limit = {"max_pixels": str(4 * source.max_pixels + 2**16)}  # decoders add borders
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
        check_size(path, decoder.width, decoder.height, source.max_pixels)
        decoder.options = limit
        decoder.thread_count = 1  # loader workers provide the parallelism
        with name_file(path, "cannot be read to its end"):  # disk or network failure, not bad content
            yield container, stream


def _read_packets(container: Any, stream: Any, key: int | None = None) -> Iterator[av.Packet]:
    """Yields a newly opened file's packets in file order, up to a read error or the final empty one (included).

    With `key`, starts at the key frame of that timestamp; seeking is inexact, so packets before it are dropped.
    """
    av = load_package("av")
    if key is not None:
        with suppress(av.FFmpegError):  # a file without an index is read from the start
            container.seek(key, stream=stream, backward=True)
    with suppress(av.FFmpegError):
        packets = container.demux(stream)
        yield from packets if key is None else dropwhile(lambda each: each.pts is None or each.pts < key, packets)


def _skip_unreferenced(packets: Iterator[av.Packet], decoder: Any, first: int) -> Iterator[av.Packet]:
    """Yields the same packets; before timestamp `first` the decoder skips frames that no other frame references."""
    for packet in packets:
        before = packet.pts is not None and packet.pts < first
        decoder.skip_frame = "NONREF" if before else "DEFAULT"
        yield packet


def _decode_packets(packets: Iterator[av.Packet]) -> Iterator[tuple[av.Packet, list[av.VideoFrame] | None]]:
    """Yields each complete packet and its frames, in presentation order; None if it cannot be decoded."""
    av = load_package("av")
    for packet in filterfalse(_is_incomplete, packets):
        try:
            yield packet, packet.decode()
        except av.FFmpegError:
            yield packet, None


@lru_cache(maxsize=16384)
def _index_frames(source: VideoFile, size: int, modified_ns: int) -> FrameIndex:
    """Returns the index of one file. `size` and `modified_ns` give a replaced file a new cache entry."""
    stamps = array("q")  # a list of integers takes five times the memory
    keys: list[int] = []
    incomplete = 0
    with open_container(source) as (container, stream):
        if source.format == "mov":  # its table is reliable; other formats' counts often are not
            _check_count(source, stream.frames)
        for packet in _read_packets(container, stream):
            if _is_incomplete(packet):
                incomplete += 1
            elif packet.size and not packet.is_discard:
                stamps.append(NO_STAMP if packet.pts is None else packet.pts)
                keys += [packet.pts] if packet.is_keyframe and packet.pts is not None else []
                _check_count(source, len(stamps))
        rate, time_base = float(stream.average_rate or stream.guessed_rate or 0), float(stream.time_base or 0)
        codec = stream.codec_context.name
        if source.format == "mov":  # its table lists all frames
            incomplete = sum(entry.pos + entry.size > size for entry in stream.index_entries)
    if not stamps:
        raise VideoError(source.path, "its video stream holds no frames")
    times = np.unique(np.frombuffer(stamps, dtype=np.int64))
    timed = len(times) == len(stamps) and times[0] != NO_STAMP
    index = FrameIndex(
        pts=times if timed else np.arange(len(stamps), dtype=np.int64),
        keys=np.array(sorted(keys), dtype=np.int64),
        timed=timed,
        skips=codec == "h264",
        fps=_measure_frame_rate(rate, times, time_base) if timed else rate,
        damage=None,
        cut_off=_describe_missing_tail(source, size, len(stamps), incomplete),
    )
    return _verify_index(source, index)


def _check_count(source: VideoFile, frames: int) -> None:
    if frames > MAX_FRAMES:
        raise VideoError(source.path, f"states more frames ({frames}) than a clip may have ({MAX_FRAMES})")


def _measure_frame_rate(stated: float, times: np.ndarray, time_base: float) -> float:
    """Returns the stated frame rate, or the measured one if they differ by over 5 % (FLV states 1000, TS nothing)."""
    seconds = float(times[-1] - times[0]) * time_base
    measured = (len(times) - 1) / seconds if seconds > 0 else stated
    return stated if abs(stated - measured) <= 0.05 * measured else measured


def _verify_index(source: VideoFile, index: FrameIndex) -> FrameIndex:
    """Returns the index, checked and corrected by decoding the first frames, or all of them.

    All frames are decoded if the clip is short, its end is missing, or its timestamps do not identify frames.
    """
    if index.timed and not index.cut_off and len(index.pts) > VERIFIED_UP_TO:
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


def _decode_stamps(source: VideoFile, limit: int | None) -> tuple[list[int], str | None]:
    """Returns the timestamps of the first `limit` decoded frames (None: all), and a sentence on damage, if any."""
    stamps: list[int] = []
    broken = 0
    with open_container(source) as (container, stream):
        for _, frames in _decode_packets(_read_packets(container, stream)):
            broken += _is_broken(frames)
            stamps += [_timestamp(frame) for frame in frames or []]
            if limit and len(stamps) >= limit:
                break
    return stamps[:limit], f"{broken} of its packets cannot be decoded" if broken else None


def _describe_missing_tail(source: VideoFile, size: int, found: int, missing: int) -> str | None:
    """Returns a sentence if the container states more bytes than the file has, or frames are `missing`; else None."""
    with name_file(source.path, "cannot be read to its end"), Path(source.path).open("rb") as file:
        stated = _read_stated_size(file, source.format)
    if stated > size:
        return f"the file is cut off: {size} of {stated} bytes are there"
    least = "" if source.format == "mov" else "at least "
    return f"the file is cut off: {found} of {least}{found + missing} frames are there" if missing else None


def _read_stated_size(file: BinaryIO, format_name: str) -> int:
    """Returns the file size that the header of an AVI or Matroska file states; 0 if it states none."""
    if format_name == "avi":
        return 8 + int.from_bytes(file.read(8)[4:], "little")
    if format_name != "matroska":
        return 0
    file.seek(4)  # past the identifier of the header
    file.seek(_read_ebml_size(file), 1)  # past the header, to the segment
    known = file.read(4) == b"\x18\x53\x80\x67"
    length = _read_ebml_size(file) if known else 0
    return file.tell() + length if length else 0


def _read_ebml_size(file: BinaryIO) -> int:
    """Reads an EBML integer: the first byte's leading zero bits give its length; all ones mean unknown, read as 0."""
    first = file.read(1)
    if not first or not first[0]:
        return 0
    length = 9 - first[0].bit_length()
    bits = 7 * length
    value = int.from_bytes(first + file.read(length - 1), "big") & ((1 << bits) - 1)
    return 0 if value == (1 << bits) - 1 else value
