"""Recognises video containers by their first bytes."""

from __future__ import annotations

from pathlib import Path

from .base import VideoError, name_file

# (offset, bytes, FFmpeg's format name): the only demuxer that may open a file with these bytes.
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
    (188, b"G", "mpegts"),  # every packet of 188 bytes, or of 4 + 188, starts with a sync byte
    (196, b"G", "mpegts"),
)
# First bytes that get their own error. A playlist would make FFmpeg open other files or addresses.
REFUSED: tuple[tuple[bytes, str], ...] = (
    (b"#EXTM3U", "an HLS playlist, not a video"),
    (b"ffconcat", "an ffconcat playlist, not a video"),
    (b"ID3", "an audio file (mp3), not a video"),
)


def detect_container(path: str | Path) -> str:
    """Returns FFmpeg's container name from the first bytes, so a playlist named clip.mp4 is refused."""
    with name_file(path), Path(path).open("rb") as file:
        head = file.read(256)
    if not head:
        raise VideoError(path, "the file is empty")
    for magic, kind in REFUSED:
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(magic):
            raise VideoError(path, f"is {kind}")
    for offset, magic, name in CONTAINERS:
        if head[offset : offset + len(magic)] == magic and (name != "mpegts" or b"G" in (head[:1], head[4:5])):
            return name
    raise VideoError(path, "is not a video: its first bytes belong to no video container")
