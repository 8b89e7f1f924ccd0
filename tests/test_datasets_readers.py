"""Readers against an independent decoder (the FFmpeg program), decord, and 64 real clips; transforms."""

import json
import os
import random
import re
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from datasets.readers import VideoError, open_video, pyav
from datasets.transforms import TRANSFORMS, center_crop, horizontal_flip, to_signed_range, to_unit_range
from tests.conftest import refuses

MEDIA = Path(__file__).resolve().parents[2] / "shared" / "media"
LISTED = json.loads((MEDIA / "clips.json").read_text()) if MEDIA.is_dir() else []
FRAMES = {entry["file"]: entry["ff_frames"] for entry in LISTED}
needs_media = pytest.mark.skipif(not LISTED, reason="the sample clips of ../shared/media are not here")

# Errors of the clips that hold no readable video; clips that are damaged but readable.
UNREADABLE = {
    "odd/torchcodec__nasa_13013.mp4.audio.mp3": "is an audio file (mp3), not a video",
    "odd/ExoPlayer__invalid-bitstream.webm": "none of its frames can be decoded",
    "odd/moviepy__result.webm": "the file is empty",
    "odd/derived_truncated_bikes.mp4": "cannot be read as mov: incomplete or damaged",
}
DAMAGED = {"odd/decord__corrupted.mp4"}
CUT_OFF = {"odd/derived_truncated_again.mkv", "open/nestegg__dancer1.webm"}
# Two test patterns (10 bit; odd height and width) take slower paths of the colour converter, where each
# generation of FFmpeg interpolates chroma in its own way: colours differ at sharp edges, brightness does not.
LOOSE = {"odd/torchcodec__h264_10bits.mp4", "odd/torchcodec__testsrc2_odd_height_and_width_mpeg2.mp4"}
# decord is no default: it counts a frame too many on three clips, and these others are refused.
DECORD_COUNTS_ONE_MORE = {
    "action/vision__RATRACE_wave_f_nm_np1_fr_goo_37.avi",
    "action/vision__SchoolRulesHowTheyHelpUs_wave_f_nm_np1_ba_med_0.avi",
    "odd/decord__corrupted.mp4",
}
DECORD_IS_REFUSED = {
    "odd/imageio-binaries__newtonscradle.gif": "gif in gif",
    "odd/torchcodec__av1_video.mkv": "av1 in matroska",
    "odd/moviepy__no_duration.webm": "vp9 in matroska",
    "open/ExoPlayer__bear-vp9.webm": "vp9 in matroska",
    "odd/ExoPlayer__sample_h263.ts": "mpeg4 in mpegts",
    "odd/torchcodec__testsrc2_odd_height_and_width_mpeg2.mp4": "mpeg2video in mov",
}
READABLE = sorted(set(FRAMES) - set(UNREADABLE))
assert not LISTED or {name for name, frames in FRAMES.items() if not frames} == set(UNREADABLE)


def ffmpeg_frames(path: Path, indices: list[int], height: int, width: int) -> torch.Tensor:
    """Frames (T, C, H, W) that the FFmpeg program decodes, one after the other, from the start."""
    select = "+".join(f"eq(n\\,{index})" for index in indices)
    before = ["-v", "quiet", "-threads", "1", "-i", str(path), "-map", "0:v:0", "-vf", f"select={select}"]
    after = ["-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    out = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *before, *after], capture_output=True, timeout=60).stdout
    frames = np.frombuffer(out, np.uint8).reshape(-1, height, width, 3)
    return torch.from_numpy(frames.copy()).permute(0, 3, 1, 2)


def telling_indices(reader: pyav.PyAVReader) -> list[int]:
    """First, last, around key frames, and two between: where random access goes wrong if it does."""
    last = len(reader) - 1
    keys = np.searchsorted(reader.index.pts, reader.index.keys).tolist()
    around = [key + step for key in keys[1:3] for step in (-1, 0, 1)]
    return sorted({min(max(index, 0), last) for index in [0, 1, last // 3, 2 * last // 3, last - 1, last, *around]})


def brightness_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean absolute difference of luma (BT.601), which 4:2:0 video stores at full resolution."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return float(((a.float() - b.float()) * weights).sum(1).abs().mean())


@needs_media
@pytest.mark.parametrize("name", READABLE)
def test_sample_clip_has_the_true_frames(name: str) -> None:
    path = MEDIA / "clips" / name
    reader = open_video(path)
    assert isinstance(reader, pyav.PyAVReader)
    assert len(reader) == FRAMES[name]
    assert bool(reader.damage) == (name in DAMAGED)
    assert bool(reader.cut_off) == (name in CUT_OFF)
    indices = telling_indices(reader)
    ours = torch.cat([reader.read([index]) for index in indices])
    assert bool(reader.damage) == (name in DAMAGED)  # nor does starting at a key frame look like damage
    theirs = ffmpeg_frames(path, indices, *ours.shape[-2:])
    assert theirs.shape == ours.shape
    assert brightness_difference(ours, theirs) < 1 if name in LOOSE else torch.equal(ours, theirs)


@needs_media
@pytest.mark.parametrize("name", sorted({*READABLE[::4], *DECORD_COUNTS_ONE_MORE, *DECORD_IS_REFUSED, *LOOSE}))
def test_sample_clip_reads_the_same_with_decord(name: str) -> None:
    """It converts colours with an FFmpeg of 2018: up to 2 grey levels of rounding."""
    path = MEDIA / "clips" / name
    if name in DECORD_IS_REFUSED:
        with pytest.raises(VideoError, match=f"{DECORD_IS_REFUSED[name]}: set data.reader=auto"):
            open_video(path, "decord")
        return
    theirs = open_video(path, "decord")
    assert len(theirs) == FRAMES[name] + (name in DECORD_COUNTS_ONE_MORE)
    indices = [0, min(3, FRAMES[name] - 1)]
    ours, decords = open_video(path).read(indices), theirs.read(indices)
    assert ours.shape == decords.shape
    near = (ours.int() - decords.int()).abs().max() <= 2
    assert brightness_difference(ours, decords) < 1 if name in LOOSE else near


@needs_media
@pytest.mark.parametrize("name", sorted(UNREADABLE))
def test_unreadable_sample_clip_is_named_with_the_reason(name: str) -> None:
    path = MEDIA / "clips" / name
    for reader in ("decord", "auto"):
        with pytest.raises(VideoError) as caught:
            open_video(path, reader)
        assert caught.value.path == str(path)
    assert caught.value.reason == UNREADABLE[name]


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts the packets that are read and the frames that are decoded."""
    counts = {"_read_packets": 0, "_decode_packets": 0}
    for name in counts:
        original = getattr(pyav, name)

        def counting(*arguments: Any, name: str = name, inner: Any = original) -> Iterator[Any]:
            for item in inner(*arguments):
                counts[name] += 1 if name == "_read_packets" else len(item[1] or [])
                yield item

        monkeypatch.setattr(pyav, name, counting)
    return counts


@needs_media
def test_false_key_frames_are_not_trusted(work: dict[str, int]) -> None:
    """This 3gp marks frame 50 as a key frame although it is none: it must be decoded from the start."""
    open_video(MEDIA / "clips/odd/mp4parser__MOV00006.3gp").read([60])
    assert work["_decode_packets"] > 60


# ---- without the sample clips ------------------------------------------------------------------------


def write_video(path: Path, levels: range, movflags: str = "", **options: str) -> Path:
    """An h264 file with B-frames, 10 frames a second, whose frame i is of grey level `levels[i]`."""
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.options = {"g": "10", "bf": "2", **options}
        for level in levels:
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 frames, frame i of grey level 20 + 2 i."""
    return write_video(tmp_path_factory.mktemp("video") / "ramp.mp4", range(20, 180, 2))


@pytest.mark.parametrize("reader", ["auto", "pyav", "decord"])
def test_frames_come_in_the_order_asked(video: Path, reader: str) -> None:
    opened = open_video(video, reader)
    wanted = [79, 0, 41, 41, 10, 9]
    frames = opened.read(wanted)
    assert len(opened) == 80
    assert opened.fps == pytest.approx(10)
    assert frames.dtype == torch.uint8 and frames.shape == (6, 3, 16, 32)
    levels = frames.float().mean((1, 2, 3))
    assert torch.allclose(levels, torch.tensor([20.0 + 2 * index for index in wanted]), atol=1)
    for outside in ([], [-1], [80], [0, 80]):
        with pytest.raises(IndexError):
            opened.read(outside)


def test_only_what_is_needed_is_decoded(video: Path, work: dict[str, int]) -> None:
    """A key frame every 10: the frames of a window and at most one group before it."""
    pyav._index_frames.cache_clear()
    reader = open_video(video)
    assert work["_decode_packets"] <= pyav.PROBE_FRAMES + 2
    work.update(_read_packets=0, _decode_packets=0)
    reader.read(range(55, 59))
    assert 4 <= work["_decode_packets"] <= 14
    assert 4 <= work["_read_packets"] <= 16  # it seeks: packets before are not even read


def test_a_replaced_file_is_read_anew(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", range(20, 60))
    assert len(open_video(path)) == 40
    write_video(path, range(20, 50))
    assert len(open_video(path)) == 30


# (settings of x264, change of each packet): key frames, of which most are no place where decoding may start.
REFRESH = "intra-refresh=1:bframes=0"
UNCLEAN: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "open_gop": ("open-gop=1:bframes=3:b-pyramid=normal:ref=4", bytes),
    "gradual_refresh": (REFRESH, bytes),
    # recovery points that claim that the frame itself is complete
    "claimed_refresh": (REFRESH, lambda data: re.sub(rb"(?s)\x06\x06[\1\2].{1,2}?\x80", b"\x06\x06\x01\xc4\x80", data)),
    "sets_once": ("bframes=0:cabac=0:8x8dct=0", bytes),
}


def write_unclean(path: Path, kind: str, count: int = 90) -> Path:
    """A moving picture with a key frame every 12 frames; `sets_once` joins two encodings, the second's sets once."""
    settings, change = UNCLEAN[kind]
    picture = np.random.default_rng(0).integers(0, 256, (32, 48 + count, 3), dtype=np.uint8)
    frames = [av.VideoFrame.from_ndarray(picture[:, n : n + 48].copy(), format="rgb24") for n in range(count)]
    cut = count // 2 if kind == "sets_once" else count
    with av.open(str(path), "w") as container:
        stream, other = container.add_stream("libx264", rate=25), av.CodecContext.create("libx264", "w")
        for encoder in (stream, other):
            encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 48, 32, "yuv420p", Fraction(1, 25)
            encoder.options = {"x264-params": f"keyint=12:scenecut=0:{settings}"}
        other.options = {"x264-params": "keyint=12:scenecut=0:bframes=0:cabac=1:8x8dct=1"}
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = number, Fraction(1, 25)
        packets = [packet for frame in [*frames[:cut], None] for packet in stream.encode(frame)]
        if cut < count:
            first, *rest = (packet for frame in [*frames[cut:], None] for packet in other.encode(frame))
            packets += [first, *(replace_content(packet, without_sets(bytes(packet))) for packet in rest)]
        for packet in packets:
            packet = replace_content(packet, change(bytes(packet)))
            packet.stream = stream
            container.mux(packet)
    return path


def replace_content(packet: av.Packet, content: bytes) -> av.Packet:
    other = av.Packet(content)
    for name in ("pts", "dts", "time_base", "is_keyframe"):
        setattr(other, name, getattr(packet, name))
    return other


def without_sets(data: bytes) -> bytes:
    units = [unit for unit in re.split(b"\0\0\0?\1", data) if unit]
    return b"".join(b"\0\0\0\1" + unit for unit in units if unit[0] & 31 not in (7, 8))


@pytest.mark.parametrize("kind", UNCLEAN)
def test_key_frames_that_are_no_clean_start_are_found_out(tmp_path: Path, kind: str) -> None:
    path = write_unclean(tmp_path / "a.mp4", kind)
    with av.open(str(path)) as container:
        linear = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    reader = open_video(path)
    assert len(reader) == len(linear) == 90 and len(reader.index.keys) > 5  # type: ignore[attr-defined]
    draw = random.Random(0)
    windows = [range(start, start + 5) for start in range(0, 90, 5)]
    for wanted in [*draw.sample(windows, 18), draw.sample(range(90), 10)]:
        assert np.array_equal(reader.read(wanted).permute(0, 2, 3, 1).numpy(), [linear[index] for index in wanted])
    assert reader.damage is None
    data = path.read_bytes()
    middle = data.index(b"mdat") + (len(data) - data.index(b"mdat")) * 2 // 3
    path.write_bytes(data[:middle] + bytes(300) + data[middle + 300 :])
    broken = open_video(path)
    with suppress(VideoError):
        broken.read(range(90))
        assert broken.damage


@pytest.mark.parametrize(
    ("kind", "sentence"), [("mp4", "of 200 frames"), ("avi", r"\d of \d+ bytes"), ("flv", "of at least")]
)
def test_missing_tail_is_told(tmp_path: Path, kind: str, sentence: str) -> None:
    """An mp4 with its index in front opens although its end is gone; what is there is counted, and is undamaged."""
    flags = "faststart" if kind == "mp4" else ""
    whole = write_video(tmp_path / f"whole.{kind}", range(20, 220), flags, crf="0").read_bytes()
    told = []
    for share in (0.75, 0.76, 0.77, 0.78):
        cut = tmp_path / f"cut{share}.{kind}"
        cut.write_bytes(whole[: int(len(whole) * share)])
        reader = open_video(cut)
        assert 0 < len(reader) < 200
        told.append(bool(re.search(sentence, reader.cut_off or "")))
        levels = reader.read(range(len(reader))).float().mean((1, 2, 3))
        assert torch.allclose(levels, 20.0 + torch.arange(len(reader)), atol=3)  # none stands in for a missing one
        assert reader.damage is None
    assert all(told) or (kind == "flv" and any(told))  # FLV states no length: a cut between two frames is not seen


@pytest.mark.parametrize("end", ["start", "end"])
def test_frames_hidden_by_an_edit_list_are_not_missing(tmp_path: Path, end: str) -> None:
    """Cuts that FFmpeg makes without re-encoding, and a list that ends early: the frames that FFmpeg shows are all."""
    whole, path = write_video(tmp_path / "whole.mp4", range(20, 50), g="30"), tmp_path / "edited.mp4"
    if end == "start":
        words = ["-v", "error", "-ss", "0.5", "-i", str(whole), "-c", "copy", str(path)]
        subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *words], check=True)
    else:
        data = whole.read_bytes()
        place = data.index(b"elst") + 12  # the duration of the first edit, in thousandths of a second
        path.write_bytes(data[:place] + struct.pack(">I", 2000) + data[place + 4 :])
    reader = open_video(path)
    shown = ffmpeg_frames(path, list(range(30)), 16, 32)
    assert 15 < len(shown) < 30 and torch.equal(reader.read(range(len(reader))), shown)
    assert (reader.cut_off, reader.damage) == (None, None)


@pytest.mark.parametrize("kind", ["plain", *UNCLEAN])
def test_each_frame_of_a_damaged_file_is_as_if_read_alone(tmp_path: Path, kind: str, work: dict[str, int]) -> None:
    """Whichever part is wiped; all of them for the price of three decodes of the file."""
    whole, path = tmp_path / "whole.mp4", tmp_path / "wiped.mp4"
    write_video(whole, range(20, 220), g="50", crf="0", bf="3") if kind == "plain" else write_unclean(whole, kind)
    data = whole.read_bytes()
    first, size = data.index(b"mdat"), len(data) - data.index(b"mdat")
    for share in (0.2, 0.5, 0.55, 0.8):
        place = first + int(size * share)
        path.write_bytes(data[:place] + bytes(20) + data[place + 20 :])
        os.utime(path, ns=(0, int(share * 100)))
        work.update(_decode_packets=0)
        count = len(open_video(path))
        found = open_video(path).read_each(list(range(count)))
        assert work["_decode_packets"] <= 3 * count
        for index in range(count):
            alone = open_video(path)
            with suppress(VideoError):
                frame = alone.read_images([index])[index]
                if not alone.damage:
                    assert np.array_equal(found.pop(index), frame)
        assert all(isinstance(left, VideoError) for left in found.values()) and len(found) < count


@pytest.mark.parametrize("length", [40, 200])
@pytest.mark.parametrize("wiped", [10, 200])
def test_wiped_bytes_are_noticed(tmp_path: Path, length: int, wiped: int) -> None:
    """A frame is what it should be, or the reader says that it is not: `damage` or VideoError."""
    clip = write_video(tmp_path / "clip.mp4", range(20, 20 + length), crf="0", sc_threshold="0")
    data = bytearray(clip.read_bytes())
    middle = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2
    data[middle : middle + wiped] = bytes(wiped)
    (tmp_path / "broken.mp4").write_bytes(bytes(data))
    short = length <= pyav.VERIFIED_UP_TO
    outcomes = []
    for index in range(len(open_video(tmp_path / "broken.mp4"))):
        reader = open_video(tmp_path / "broken.mp4")
        assert bool(reader.damage) == short  # short clips are proven when they are opened
        try:
            level = float(reader.read([index]).float().mean())
            assert reader.damage or level == pytest.approx(20 + index, abs=2)
            outcomes.append("damaged" if reader.damage else "good")
        except VideoError:
            outcomes.append("refused")
    assert outcomes.count("good") > 0.9 * len(outcomes) or short
    assert "damaged" in outcomes


@pytest.mark.parametrize("reader", ["auto", "decord"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"just some text, long enough to hold any magic bytes there might be", "is not a video"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isomiso2mdat nothing follows", "cannot"),
        (b"\x1a\x45\xdf\xa3" + b"\xff" * 300, "cannot"),
        (b"GIF89a" + b"\0" * 40, "cannot|no video|no frames|none"),
    ],
)
def test_what_is_no_video_is_refused(tmp_path: Path, content: bytes, reason: str, reader: str) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=reason) as caught:
        open_video(path, reader)
    assert str(path) in str(caught.value)


def test_missing_file_and_empty_folder_are_video_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.mp4", tmp_path / "gone.png", tmp_path):
        with pytest.raises(VideoError, match=str(path)):
            open_video(path).read([0])
    refuses("reader 'cv2' is unknown", open_video, tmp_path, "cv2")


def test_folders_of_frames_and_single_images(tmp_path: Path) -> None:
    for number in (1, 2, 10, 11, 100):
        Image.new("RGB", (6, 4), (number, 0, 0)).save(tmp_path / f"clip_frames_{number}.png")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("stray")
    reader = open_video(tmp_path)
    assert len(reader) == 5
    assert reader.read(range(5))[:, 0, 0, 0].tolist() == [1, 2, 10, 11, 100]  # in numerical order
    Image.new("L", (6, 4), 7).save(tmp_path / "clip_frames_0.png")
    single = open_video(tmp_path / "clip_frames_0.png")
    assert len(single) == 1
    assert torch.equal(single.read([0, 0]), torch.full((2, 3, 4, 6), 7, dtype=torch.uint8))
    Image.new("RGB", (8, 4)).save(tmp_path / "clip_frames_2.png")
    (tmp_path / "clip_frames_3.png").write_bytes(b"no image")
    with pytest.raises(VideoError, match=r"differ in size \(6x4, 8x4\)"):
        open_video(tmp_path).read([0, 2])
    with pytest.raises(VideoError, match=r"frames_3\.png: is not a readable image"):
        open_video(tmp_path).read([3])


# ---- arrays ----------------------------------------------------------------------------------------


def test_an_array_gives_its_frames_and_is_not_read_whole(tmp_path: Path) -> None:
    video = np.random.default_rng(1).integers(0, 256, (9, 16, 24, 3), dtype=np.uint8)
    np.save(tmp_path / "000000.npy", video)
    reader = open_video(tmp_path / "000000.npy")
    assert (len(reader), reader.fps, reader.damage, reader.cut_off) == (9, 0.0, None, None)
    frames = reader.read([8, 0, 0])
    assert frames.dtype == torch.uint8
    assert np.array_equal(frames.permute(0, 2, 3, 1).numpy(), video[[8, 0, 0]])
    assert isinstance(reader.array, np.memmap)  # type: ignore[attr-defined]
    np.save(tmp_path / "000001.npy", np.asfortranarray(video))
    assert torch.equal(open_video(tmp_path / "000001.npy").read([8, 0, 0]), frames)


class Payload:
    """Makes the folder /tmp/ran-by-pickle if it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("/tmp/ran-by-pickle",)


WHOLE = np.zeros((6, 16, 24, 3), np.uint8)
CLAIM = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 4000, 4000, 3), }".ljust(117) + b"\n"
NO_ARRAY = r"is cut off, or not a readable \.npy array"


@pytest.mark.parametrize(
    ("array", "change", "reason"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), bytes, "holds values of type float32; a clip is uint8"),
        (np.zeros((4, 4, 3), np.uint8), bytes, r"holds an array of shape \(4, 4, 3\); a clip is \(frames, height"),
        (np.zeros((0, 4, 4, 3), np.uint8), bytes, r"shape \(0, 4, 4, 3\)"),
        (np.zeros((1, 8193, 4321, 3), np.uint8), bytes, "frames of 4321x8193 are larger than data.max_pixels"),
        (np.array([Payload()], dtype=object), bytes, NO_ARRAY),  # never unpickled
        (WHOLE, lambda data: data[:-1], NO_ARRAY),
        (WHOLE, lambda data: data + b"x", "is too long: 7041 bytes instead of 7040"),
        (WHOLE, lambda data: b"not an array", NO_ARRAY),
        (WHOLE, lambda data: b"\x93NUMPY\3\0" + data[8:], NO_ARRAY),
        (WHOLE, lambda data: b"\x93NUMPY\1\0" + struct.pack("<H", 118) + CLAIM, NO_ARRAY),
    ],
)
def test_arrays_that_are_no_clips(tmp_path: Path, array: np.ndarray, change: Callable, reason: str) -> None:
    path = tmp_path / "000000.npy"
    np.save(path, array)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(VideoError, match=reason):
        open_video(path)
    assert not Path("/tmp/ran-by-pickle").exists()


# ---- transforms --------------------------------------------------------------------------------------


def test_every_short_side_gives_the_asked_size() -> None:
    """size / side * side may fall below size in floating point: 49 * (1 / 49) is 0.9999999999999999."""
    for side in [49, *range(1, 700, 3)]:
        clip = torch.zeros(1, 3, side, side + 5, dtype=torch.uint8)
        for size in (1, 7, 56):
            assert TRANSFORMS["resize_then_center_crop"](clip, size).shape == (1, 3, size, size)


def test_transforms_of_known_pixels() -> None:
    clip = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert all(torch.equal(transform(clip, 16), clip.float() / 255) for transform in TRANSFORMS.values())
    levels = to_unit_range(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert torch.allclose(levels, torch.tensor([0.0, 0.2, 1.0]))
    assert torch.allclose(to_signed_range(levels), torch.tensor([-1.0, -0.6, 1.0]))
    columns = torch.arange(6).expand(1, 1, 4, 6)
    assert horizontal_flip(columns)[0, 0, 0].tolist() == [5, 4, 3, 2, 1, 0]
    assert center_crop(columns, 4)[0, 0, 0].tolist() == [1, 2, 3, 4]
