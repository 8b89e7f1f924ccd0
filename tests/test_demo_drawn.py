"""The demo set and its tracker: real clips are named right, and nothing else is given a name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from datasets.readers import open_video
from demo import data, drawn

WINDOW = 16


def windows(count: int, size: int, seed: int = 0, frames: int = 20) -> tuple[list[np.ndarray], list[int]]:
    """`count` random windows of 16 frames, the classes in turn."""
    rng = np.random.default_rng(seed)
    labels = [i % len(drawn.CLASSES) for i in range(count)]
    starts = rng.integers(0, frames - WINDOW + 1, count)
    clips = [drawn.draw_clip(label, rng, size=size, frames=frames) for label in labels]
    return [clip[start : start + WINDOW] for clip, start in zip(clips, starts)], labels


def names(track: drawn.Track) -> tuple[str | None, str | None]:
    return track.colour, track.motion


def moving_patch(colour: tuple[int, int, int], place: np.ndarray, side: int = 7) -> np.ndarray:
    """A square of that colour on grey with its corner at `place` (T, 2), drawn without the module's own code."""
    video = np.full((len(place), 3, 32, 32), 60, np.uint8)
    for frame, (x, y) in zip(video, place):
        frame[:, y : y + side, x : x + side] = np.array(colour)[:, None, None]
    return video


# ------------------------------------------------------------------------------------------- classes


def test_eight_classes_each_with_colour_shape_and_motion() -> None:
    assert [kind.name for kind in drawn.CLASSES] == sorted(kind.name for kind in drawn.CLASSES)
    assert len({kind.name for kind in drawn.CLASSES}) == 8
    assert {kind.colour for kind in drawn.CLASSES} == set(drawn.COLOURS)
    assert {kind.motion for kind in drawn.CLASSES} == set(drawn.MOTIONS) == set(drawn.TRAJECTORIES)
    assert {kind.shape for kind in drawn.CLASSES} <= set(drawn.SHAPES)


@pytest.mark.parametrize("kind", drawn.CLASSES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("frames", [16, 32])
def test_body_stays_in_view(kind: drawn.DemoClass, frames: int) -> None:
    """On a canvas three times as wide, the frame in its middle holds all of the body."""
    rng = np.random.default_rng(frames)
    for _ in range(10):
        x, y, radius = drawn.TRAJECTORIES[kind.motion](rng, frames)
        wide = drawn._coverage(kind.shape, ((x + 1) / 3, (y + 1) / 3, radius / 3), 96)
        assert wide.sum(axis=(1, 2)).min() > 20
        np.testing.assert_allclose(wide[:, 32:64, 32:64].sum(axis=(1, 2)), wide.sum(axis=(1, 2)))


@pytest.mark.parametrize("label", range(8))
def test_motion_is_visible_in_every_window(label: int) -> None:
    rng = np.random.default_rng(label)
    for _ in range(10):
        clip = drawn.draw_clip(label, rng).astype(int)
        for start in range(len(clip) - WINDOW + 1):
            window = clip[start : start + WINDOW]
            changed = np.abs(window - window[0]).max(axis=1) > 60
            assert changed.mean(axis=(1, 2)).max() > 0.03


def test_clips_vary_and_the_seed_decides() -> None:
    def draw(seed: int) -> np.ndarray:
        return drawn.draw_clip(0, np.random.default_rng(seed))

    assert np.array_equal(draw(1), draw(1))
    assert len({draw(seed)[0, 0, 0, 0] for seed in range(20)}) > 8  # grounds


@pytest.mark.parametrize(("shape", "area"), [("disc", np.pi), ("square", 1.76**2), ("diamond", 2 * 1.25**2)])
def test_coverage_is_the_area_of_the_shape(shape: str, area: float) -> None:
    """Anti-aliasing: the coverage adds up to the analytic area, on average over places between the pixels."""
    x, y = 0.5 + np.random.default_rng(0).uniform(-0.03, 0.03, (2, 64))
    cover = drawn._coverage(shape, (x, y, np.full(64, 0.25)), 32)
    assert cover.mean() == pytest.approx(area * 0.25**2, rel=0.005)
    assert ((cover > 0) & (cover < 1)).any()


@pytest.mark.parametrize(("frames", "size"), [(15, 32), (33, 32), (20, 8)])
def test_a_clip_that_would_not_show_its_motion_is_refused(frames: int, size: int) -> None:
    with pytest.raises(ValueError, match="a demo clip"):
        drawn.draw_clip(0, np.random.default_rng(0), size=size, frames=frames)


# ------------------------------------------------------------------------------------------- tracker


@pytest.mark.parametrize(("size", "count", "frames"), [(32, 160, 20), (64, 40, 20), (32, 40, 32), (48, 40, 16)])
def test_tracker_names_real_clips(size: int, count: int, frames: int) -> None:
    figures = drawn.accuracy(*windows(count, size, seed=size + frames, frames=frames))
    assert figures["appearance_accuracy"] >= 0.99
    assert figures["motion_accuracy"] >= 0.99


@pytest.mark.parametrize(("step", "motion"), [((1, 0), "right"), ((-1, 0), "left"), ((0, 1), "down"), ((0, -1), "up")])
def test_directions_as_an_independent_drawing_has_them(step: tuple[int, int], motion: str) -> None:
    place = 12 + np.outer(np.arange(16) - 7, step)
    assert names(drawn.track(moving_patch((230, 20, 20), place))) == ("red", motion)


def test_scaling_as_an_independent_drawing_has_it() -> None:
    sides = np.linspace(4, 16, 16).astype(int)
    frames = [moving_patch((20, 230, 230), np.array([[16 - s // 2] * 2]), side=s) for s in sides]
    growing = np.concatenate(frames)
    assert names(drawn.track(growing)) == ("cyan", "grow")
    assert drawn.track(growing[::-1]).motion == "shrink"


def test_the_track_is_in_units_of_the_side() -> None:
    place = np.stack([np.arange(16) + 2, np.full(16, 9)], axis=1)
    track = drawn.track(moving_patch((230, 20, 20), place, side=8))
    np.testing.assert_allclose(track.x, (place[:, 0] + 4) / 32, atol=1e-6)
    np.testing.assert_allclose(track.y, 13 / 32, atol=1e-6)
    np.testing.assert_allclose(track.radius, np.sqrt(64 / np.pi) / 32, rtol=1e-6)


def test_a_few_broken_frames_do_not_matter() -> None:
    clips, labels = windows(40, 32, seed=3)
    for clip in clips:
        clip[5] = clip[0, :, 0, 0][:, None, None]  # the body gone from one frame
    figures = drawn.accuracy(clips, labels)
    assert min(figures.values()) >= 0.95


def test_noise_has_no_name() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        white = rng.integers(0, 256, (16, 3, 32, 32), dtype=np.uint8)
        blobs = rng.uniform(0, 1, (16, 3, 4, 4)).repeat(8, axis=2).repeat(8, axis=3)
        for video in (white, (255 * blobs).astype(np.uint8)):
            assert names(drawn.track(video)) == (None, None)


@pytest.mark.parametrize("level", [10, 200, 250])
def test_a_grey_body_has_no_name(level: int) -> None:
    place = 12 + np.outer(np.arange(16) - 7, (1, 0))
    assert names(drawn.track(moving_patch((level, level, level), place))) == (None, None)


def test_an_empty_ground_has_no_name() -> None:
    assert names(drawn.track(np.full((16, 3, 32, 32), 90, np.uint8))) == (None, None)


def test_two_bodies_have_no_name() -> None:
    place = 12 + np.outer(np.arange(16) - 7, (0, 1))
    aside = np.array([[8, 0]])
    one, other = moving_patch((230, 20, 20), place - aside), moving_patch((20, 20, 230), place + aside)
    assert names(drawn.track(np.where(other != 60, other, one))) == (None, None)
    same = moving_patch((230, 20, 20), place + aside)
    assert drawn.track(np.where(same != 60, same, one)).motion is None


@pytest.mark.parametrize("label", range(8))
def test_a_body_without_its_motion_has_a_colour_and_no_motion(label: int) -> None:
    """Standing still, or the frames in a random order."""
    rng = np.random.default_rng(label)
    for _ in range(10):
        clip = drawn.draw_clip(label, rng)[:WINDOW]
        still = np.repeat(clip[:1], WINDOW, axis=0)
        assert names(drawn.track(still)) == (drawn.CLASSES[label].colour, None)
        assert drawn.track(clip[rng.permutation(WINDOW)]).motion is None


def test_a_diagonal_a_there_and_back_and_a_circle_are_no_known_motion() -> None:
    steps = np.arange(16)
    angle = 2 * np.pi * steps / 16
    circle = np.round(12 + 7 * np.stack([np.cos(angle), np.sin(angle)], axis=1)).astype(int)
    assert drawn.track(moving_patch((230, 20, 20), circle)).motion is None
    there_and_back = np.stack([2 + 2 * np.minimum(steps, 15 - steps), np.full(16, 12)], axis=1)
    assert drawn.track(moving_patch((230, 20, 20), np.stack([steps + 4, steps + 4], axis=1))).motion is None
    assert drawn.track(moving_patch((230, 20, 20), there_and_back)).motion is None


def test_accuracy_counts() -> None:
    clips, labels = windows(8, 32)
    wrong = [labels[0] + 1, *labels[1:]]
    assert drawn.accuracy(clips, wrong) == {"appearance_accuracy": 0.875, "motion_accuracy": 0.875}
    with pytest.raises(ValueError, match="at least one clip"):
        drawn.accuracy([], [])
    with pytest.raises(ValueError, match="label 8 is not"):
        drawn.accuracy(clips[:1], [8])
    with pytest.raises(ValueError, match="uint8"):
        drawn.track(np.zeros((16, 3, 32, 32)))


# ---------------------------------------------------------------------------------------- files on disk


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("set") / "demo"
    data.main(["--out", str(out), "--clips-per-class", "26", "--workers", "1"])
    return out


def test_the_layout_is_that_of_ucf101(small_set: Path) -> None:
    folders = sorted(path.name for path in small_set.iterdir() if path.is_dir())
    assert folders == [kind.name for kind in drawn.CLASSES]
    files = sorted(path.name for path in (small_set / "RedDiscRight").iterdir())
    assert len(files) == 26
    assert files[:2] == ["v_RedDiscRight_g01_c01.mp4", "v_RedDiscRight_g01_c02.mp4"]
    assert files[-1] == "v_RedDiscRight_g25_c01.mp4"


@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_files_hold_the_drawn_clips(small_set: Path, reader: str) -> None:
    if reader == "decord":
        pytest.importorskip("decord", reason="decord is not installed on this platform")
    videos, labels = [], []
    for label, kind in enumerate(drawn.CLASSES):
        for index in range(4):
            video = open_video(data.clip_path(small_set, kind.name, index), reader)
            pixels = video.read(range(len(video))).numpy()
            expected = drawn.draw_clip(label, np.random.default_rng([0, label, index]))
            error = np.square(pixels.astype(float) - expected).mean()
            assert 10 * np.log10(255**2 / error) > 45
            videos.append(pixels[:WINDOW])
            labels.append(label)
    assert drawn.accuracy(videos, labels) == {"appearance_accuracy": 1.0, "motion_accuracy": 1.0}


def test_a_complete_set_is_left_alone_and_another_replaces_it(tmp_path: Path) -> None:
    def make(*extra: str) -> None:
        data.main(["--out", str(tmp_path / "demo"), "--clips-per-class", "1", "--workers", "1", *extra])

    make()
    clip = tmp_path / "demo" / "RedDiscRight" / "v_RedDiscRight_g01_c01.mp4"
    first, inode = clip.read_bytes(), clip.stat().st_ino
    make()
    assert clip.stat().st_ino == inode
    make("--seed", "1")
    assert clip.read_bytes() != first
    make("--seed", "0")
    assert clip.read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]  # no scratch left behind


def test_a_failed_run_leaves_no_half_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(root: Path, parameters: dict[str, int], workers: int) -> None:
        (root / "RedDiscRight").mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(data, "draw_set", fail)
    with pytest.raises(OSError, match="disk full"):
        data.main(["--out", str(tmp_path / "demo")])
    assert list(tmp_path.iterdir()) == []


def test_what_the_tool_did_not_make_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a demo set"):
        data.main(["--out", str(tmp_path)])
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("flag", [["--frames", "40"], ["--size", "33"], ["--clips-per-class", "0"]])
def test_bad_arguments_are_named(tmp_path: Path, flag: list[str]) -> None:
    with pytest.raises(ValueError, match=flag[0]):
        data.main(["--out", str(tmp_path / "demo"), *flag])


def test_the_marker_tells_the_parameters(small_set: Path) -> None:
    marker = json.loads((small_set / data.MARKER).read_text())
    assert (marker["size"], marker["frames"], marker["clips_per_class"], marker["seed"]) == (32, 20, 26, 0)
