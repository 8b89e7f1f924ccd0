"""Videos to folders of frames: names, pixels, JPEG tables, skipped files, kills at every system call, full disks."""

import fcntl
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets.readers import open_video
from datasets.writer import write_video
from tests.conftest import CLIPS, needs_media, refuses, tree
from tests.fault_support import Job, all_gone
from tools import convert_videos_to_frames, prepare_dataset
from tools.frames import LANCZOS, Form, output_names, pick_frames, resize_frame
from tools.output_folder import WORK

RNG = np.random.default_rng(0)


def noise(frames: int = 3, height: int = 12, width: int = 10) -> np.ndarray:
    return RNG.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def make_video(path: Path, frames: int = 3, fps: int = 8, size: tuple[int, int] = (12, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name("aside.mp4")  # the extension would choose the container
    write_video(aside, noise(frames, *size), fps)
    return aside.rename(path)


def convert(source: Path, target: Path, *flags: str) -> dict:
    convert_videos_to_frames.main(["-s", str(source), "-t", str(target), "--num_workers", "1", *flags])
    return dict(json.loads((target / "report.json").read_text()))


def clips_of(target: Path) -> dict[str, int]:
    frames = (path for path in target.rglob("*") if path.suffix in (".png", ".jpg"))
    found = [path.parent.relative_to(target).as_posix() for path in frames]
    return {name: found.count(name) for name in sorted(set(found))}


NAMES = ["a.avi", "a.mp4", "a", "a_", "a.avi_", "a/b.avi", "a.avi.mkv", "a#1.mp4", "a_1.mp4", "a 1.mp4", "b/a.AVI"]


@given(st.lists(st.sampled_from(NAMES), unique=True), st.sampled_from(["png", "video", "link"]))
def test_no_two_clips_ever_share_a_place(names: list[str], kind: str) -> None:
    outs = output_names(names, Form(kind))
    assert len(set(outs)) == len(names)
    folders = {str(above) for out in outs for above in Path(out).parents}
    assert not folders & set(outs)
    assert [Path(out).parent for out in outs] == [Path(name).parent for name in names]
    assert sorted(output_names(names[::-1], Form(kind))) == sorted(outs)
    if kind == "video":
        assert all(out.endswith(".mp4") for out in outs)


def test_frames_are_named_for_text_order_and_clips_keep_their_names(tmp_path: Path) -> None:
    source, target = tmp_path / "videos", tmp_path / "frames"
    names = ["a#1.mp4", "a_1.mp4", "a 1.mp4", "x.mp4", "x.avi", "Class/v_Class_g01_c01.avi", "-dash.MP4", "é.mkv"]
    names.append(f"{'n' * 251}.mp4")
    for name in names:
        make_video(source / name, frames=12)
    report = convert(source, target)
    assert report["clips_made"] == len(names) and not report["skipped"]
    made = set(clips_of(target))
    assert made == {"a#1", "a_1", "a 1", "x.mp4", "x.avi", "Class/v_Class_g01_c01", "-dash", "é", "n" * 251}
    frames = sorted(path.name for path in (target / "é").iterdir())
    assert frames == [f"{number:06d}.png" for number in range(12)]
    own = open_video(source / "é.mkv").read(range(12)).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(own, [np.asarray(Image.open(target / "é" / name)) for name in frames])


def test_only_the_extension_that_is_asked_for_and_plain_names(tmp_path: Path) -> None:
    for name in ("a.avi", "b.mp4", "c.clip", "d\ne.clip"):
        make_video(tmp_path / "in" / name)
    for extension in ("clip", ".clip"):
        report = convert(tmp_path / "in", tmp_path / extension, "--video_ext", extension)
        assert set(clips_of(tmp_path / extension)) == {"c.clip"}
        assert [entry["file"] for entry in report["left_out"]] == ["a.avi", "b.mp4"]
        assert report["skipped"][0]["file"] == "d\ne.clip" and "control character" in report["skipped"][0]["reason"]
    refuses(r"holds no video files \(\.wmv\)", convert, tmp_path / "in", tmp_path / "out", "--video_ext", "wmv")


def test_jpeg_quality_is_the_one_asked_for(tmp_path: Path) -> None:
    """The quantisation tables are those that Pillow writes by itself; the official tool's flag had no effect."""
    make_video(tmp_path / "in" / "a.mp4")
    for quality in (10, 100):
        out, stream = tmp_path / str(quality), io.BytesIO()
        convert(tmp_path / "in", out, "--format", "jpeg", "--quality", str(quality))
        Image.new("RGB", (8, 8)).save(stream, "JPEG", quality=quality)
        with Image.open(out / "a" / "000000.jpg") as written, Image.open(stream) as plain:
            assert written.quantization == plain.quantization  # type: ignore[attr-defined]
            assert written.layer == [(1, 1, 1, 0), (2, 1, 1, 1), (3, 1, 1, 1)]  # type: ignore[attr-defined]  # 4:4:4


@pytest.mark.parametrize("shape", [(30, 52), (53, 30), (16, 16)])
def test_the_official_resizing_is_centre_crop_then_lanczos(shape: tuple[int, int]) -> None:
    from torchvision.transforms import InterpolationMode, functional

    frame = noise(1, *shape)[0]
    square = functional.center_crop(Image.fromarray(frame), min(shape))
    small = functional.resize(square, 16, InterpolationMode.LANCZOS)
    assert np.array_equal(resize_frame(frame, Form(size=16, transform=LANCZOS)), np.asarray(small))


@settings(deadline=None)
@given(st.integers(1, 9), st.fractions(min_value=2, max_value=60, max_denominator=1001), st.integers(1, 60))
def test_forced_rate_shows_the_frame_of_each_moment(frames: int, source: Fraction, wanted: int) -> None:
    chosen = list(pick_frames(iter(range(frames)), source, Fraction(wanted)))  # type: ignore[arg-type]
    moments = [index for index in range(frames * wanted + 1) if Fraction(index, wanted) < frames / source]
    assert chosen == [int(Fraction(index, wanted) * source) for index in moments]


def test_force_fps_writes_a_clip_of_that_rate(tmp_path: Path) -> None:
    make_video(tmp_path / "in" / "a.mp4", frames=10, fps=30)
    convert(tmp_path / "in", tmp_path / "out", "--force_fps", "8")
    shown = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "out" / "a").iterdir())]
    source = open_video(tmp_path / "in" / "a.mp4").read([0, 3, 7]).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(source, shown)  # at 0, 1/8 and 2/8 s


def test_frame_rates_are_counted_without_a_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, fps in (("a", 8), ("b", 8), ("c", 30)):
        make_video(tmp_path / f"{name}.mp4", fps=fps)
    (tmp_path / "d.mp4").write_bytes(b"")
    convert_videos_to_frames.main(["--source_path", str(tmp_path), "--compute_fps_only"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["d.mp4: the file is empty", "8 frames a second: 2 videos", "30 frames a second: 1 videos"]


ODD = {  # name: (frames, height, width), or the reason why there are none
    "torchcodec__nasa_13013_rotated.mp4": (17, 480, 270),
    "decord__video_90.mov": (3, 568, 320),
    "torchcodec__testsrc2_odd_height_and_width_mpeg2.mp4": (10, 81, 121),
    "torchcodec__testsrc2_mpeg4.mp4": (1, 64, 64),
    "derived_gray_bikes.mp4": (50, 272, 640),
    "imageio-binaries__newtonscradle.gif": (36, 150, 200),
    "derived_truncated_again.mkv": (31, 480, 640),
    "decord__corrupted.mp4": "2 of its packets cannot be decoded",
    "derived_truncated_bikes.mp4": "cannot be read as mov: incomplete or damaged",
    "moviepy__result.webm": "the file is empty",
    "ExoPlayer__invalid-bitstream.webm": "none of its frames can be decoded",
}


@needs_media
def test_odd_clips_are_made_or_named(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in [*ODD, "torchcodec__nasa_13013.mp4.audio.mp3"]:
        (source / name).symlink_to(CLIPS / "odd" / name)
    report = convert(source, target, "--format", "jpeg")
    good = {Path(name).stem: shape for name, shape in ODD.items() if isinstance(shape, tuple)}
    assert clips_of(target) == {name: shape[0] for name, shape in sorted(good.items())}
    for name, (_, height, width) in good.items():
        assert Image.open(target / name / "000000.jpg").size == (width, height)
    reasons = {name: reason for name, reason in ODD.items() if isinstance(reason, str)}
    assert {entry["file"]: entry["reason"] for entry in report["skipped"]} == reasons
    assert [entry["file"] for entry in report["left_out"]] == ["torchcodec__nasa_13013.mp4.audio.mp3"]
    note = {"file": "derived_truncated_again.mkv", "reason": "the file is cut off: 102688 of 205376 bytes are there"}
    assert report["notes"] == [note]


def in_a_child(work: Callable[[], object]) -> int:
    """Do `work` in a forked process; returns its exit code, 0 if it came to its end."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


CALLS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "shutil.rmtree", "os.truncate"}


def killed_at(call: int, below: Path) -> None:
    """From now on, end this process without a trace at the n-th file operation below `below`."""
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in CALLS and str(arguments[0]).startswith(str(below)):
            seen += 1
            if seen > call:
                os._exit(9)

    sys.addaudithook(hook)


def test_a_run_killed_at_any_file_operation_goes_on(tmp_path: Path) -> None:
    """Each kill leaves no half clip; the same command then gives the files of an undisturbed run."""
    source, target = tmp_path / "in", tmp_path / "out"
    for name in ("a.mp4", "deep/b.mp4"):
        make_video(source / name, frames=2)
    (source / "c.mp4").write_bytes(b"")
    convert(source, target)
    whole = tree(target)
    kills = 0
    while True:
        shutil.rmtree(target)

        def work(call: int = kills) -> None:
            killed_at(call, target)
            convert(source, target)

        if not (code := in_a_child(work)):
            break
        assert code == 9
        in_place = {name: frames for name, frames in clips_of(target).items() if not name.startswith(WORK)}
        assert set(in_place) <= {"a", "deep/b"} and set(in_place.values()) <= {2}
        convert(source, target)
        assert tree(target) == whole
        kills += 1
    assert kills > 25


def test_changed_and_vanished_sources_are_followed_and_the_others_kept(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    for name in ("a.mp4", "deep/b.mp4", "kept.mp4"):
        make_video(source / name)
    (source / "c.mp4").write_bytes(b"still being copied")
    convert(source, target)
    inode = (target / "kept" / "000000.png").stat().st_ino
    make_video(source / "a.mp4", 5)
    make_video(source / "c.mp4", 2)
    shutil.rmtree(source / "deep")
    (target / WORK / "staged" / "half a clip").mkdir()
    assert convert(source, target)["clips_made"] == 3
    assert (target / "kept" / "000000.png").stat().st_ino == inode
    assert not list((target / WORK / "staged").iterdir()) and not (target / "deep").exists()
    shutil.rmtree(target / "a")
    convert(source, target)
    assert clips_of(target) == {"a": 5, "c": 2, "kept": 3}


def test_folders_that_overlap_are_refused(tmp_path: Path) -> None:
    source = make_video(tmp_path / "in" / "a.mp4").parent
    before = tree(tmp_path)
    (tmp_path / "link").symlink_to(source)
    for target in (source, source / "deep" / "out", tmp_path, tmp_path / "link", tmp_path / "link" / "x"):
        refuses("must not contain each other", convert, source, target)
    (tmp_path / "link").unlink()
    assert tree(tmp_path) == before


def test_files_of_others_are_never_touched(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    make_video(source / "a.mp4")
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    refuses("holds files that this tool did not make", convert, source, target)
    (target / "thesis.txt").unlink()
    convert(source, target)
    make_video(source / "b.mp4")
    (target / "b").write_text("mine too")
    refuses(r"out/b was not made by this tool: move it away", convert, source, target)
    assert (target / "b").read_text() == "mine too"
    (tmp_path / "file").write_text("")
    refuses("file cannot be written", convert, source, tmp_path / "file")


def test_other_settings_and_a_folder_in_use_are_refused(tmp_path: Path) -> None:
    source, target = make_video(tmp_path / "in" / "a.mp4").parent, tmp_path / "out"
    convert(source, target, "--target_size", "8")
    before = tree(target)
    changes = re.escape("with other settings (format: png -> jpeg, quality: None -> 95, size: 8 -> 9)")
    refuses(changes, convert, source, target, "--target_size", "9", "--format", "jpeg")
    assert tree(target) == before
    with (target / WORK / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refuses("is being written by another process", convert, source, target, "--target_size", "8")


def test_bad_values_are_sentences(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(b"")
    for flags, sentence in (
        (["--force_fps", "-1"], "fps must be in"),
        (["--num_workers", "0"], "--num_workers must be at least 1"),
        (["--target_size", "8"], r"none of the 1 clips in .* can be used \(a\.mp4: the file is empty\)"),
    ):
        refuses(sentence, convert, tmp_path / "in", tmp_path / "out", *flags)
    refuses("there is no folder", convert, tmp_path / "gone", tmp_path / "out")


def test_a_full_disk_is_a_sentence_and_nothing_is_lost(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk; the small clip is made before the large one fails."""
    source, target = tmp_path / "in", tmp_path / "out"
    make_video(source / "a.mp4", 2)
    make_video(source / "b.mp4", 4, size=(300, 300))
    command = ["folder", str(source), str(target), "--format", "png", "--workers", "1", "--test_share", "0"]

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        sentence = r"out/train/b cannot be written \(.+\): make room there, then repeat the command"
        refuses(sentence, prepare_dataset.main, command)

    assert in_a_child(work) == 0
    assert clips_of(target) == {"train/a": 2} and list((target / WORK / "staged").iterdir()) == []
    prepare_dataset.main(command)
    assert clips_of(target) == {"train/a": 2, "train/b": 4}


@pytest.mark.dist
def test_workers_change_nothing_and_kill_9_loses_nothing(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    for number in range(24):
        make_video(source / f"{number % 3}" / f"{number}.mp4", 6 if number else 60, size=(80, 100))  # the first is long
    convert(source, tmp_path / "one")
    command = [sys.executable, "-m", "tools.convert_videos_to_frames"]
    command += ["-s", str(source), "-t", str(target), "--num_workers", "2"]

    def finished() -> int:
        journal = target / WORK / "journal.jsonl"
        return len(journal.read_bytes().splitlines()) if journal.is_file() else 0

    with Job(command) as job:
        job.wait_until(lambda: finished() > 1)
        workers = job.family()[1:]
        job.process.kill()
        assert all_gone(workers, 60)  # none is orphaned
    assert len(workers) >= 2 and finished() < 24
    convert(source, target, "--num_workers", "2")
    assert tree(target) == tree(tmp_path / "one")


@needs_media
@pytest.mark.parametrize(
    "name",
    [
        "action/vision__SchoolRulesHowTheyHelpUs_wave_f_nm_np1_ba_med_0.avi",  # its timestamps name no frames
        "odd/torchcodec__nasa_13013_rotated.mp4",
        "odd/torchcodec__test_non_zero_start.mp4",
    ],
)
def test_every_frame_is_what_read_gives(name: str) -> None:
    reader = open_video(CLIPS / name)
    one_by_one = np.stack(list(reader.frames()))
    assert np.array_equal(one_by_one, reader.read(range(len(reader))).permute(0, 2, 3, 1).numpy())
