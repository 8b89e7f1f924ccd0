"""The demo set and its tracker: real clips are recognised, anything else is not."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from datasets.readers import open_video
from demo import data, drawn
from tests.conftest import refuses

WINDOW = 16
STEPS = np.arange(WINDOW)
RED = (230, 20, 20)


def windows(count: int, size: int, seed: int = 0, frames: int = 20) -> tuple[list[np.ndarray], list[int]]:
    """`count` random windows of 16 frames, the classes in turn."""
    rng = np.random.default_rng(seed)
    labels = [i % len(drawn.CLASSES) for i in range(count)]
    starts = rng.integers(0, frames - WINDOW + 1, count)
    clips = [drawn.draw_clip(label, rng, size=size, frames=frames) for label in labels]
    return [clip[start : start + WINDOW] for clip, start in zip(clips, starts)], labels


def names(video: np.ndarray) -> tuple[str | None, str | None]:
    return drawn.track(video)[:2]


def moving_patch(colour: tuple[int, int, int], place: np.ndarray, side: int = 7) -> np.ndarray:
    """A square of that colour on grey with its corner at `place` (T, 2), drawn without the module's own code."""
    video = np.full((len(place), 3, 32, 32), 60, np.uint8)
    for frame, (x, y) in zip(video, place):
        frame[:, y : y + side, x : x + side] = np.array(colour)[:, None, None]
    return video


def test_eight_classes_each_with_colour_shape_and_motion() -> None:
    assert [kind.name for kind in drawn.CLASSES] == sorted({kind.name for kind in drawn.CLASSES})
    assert len(drawn.CLASSES) == 8 and drawn.CLASSES[6].name == "RedDiscRight"
    assert {kind.colour for kind in drawn.CLASSES} == set(drawn.COLOURS)
    assert {kind.motion for kind in drawn.CLASSES} == set(drawn.MOTIONS)
    assert {kind.shape for kind in drawn.CLASSES} <= set(drawn.SHAPES)


@pytest.mark.parametrize("label", range(8))
def test_body_stays_in_view_and_moves_in_every_window(label: int) -> None:
    """On a canvas three times as wide, the frame in its middle holds all of the body."""
    rng, kind = np.random.default_rng(label), drawn.CLASSES[label]
    for frames in (16, 20, 32):
        for _ in range(5):
            x, y, radius = drawn.draw_path(kind.motion, rng, frames)
            wide = drawn.cover_pixels(kind.shape, ((x + 1) / 3, (y + 1) / 3, radius / 3), 96)
            assert wide.sum(axis=(1, 2)).min() > 20
            np.testing.assert_allclose(wide[:, 32:64, 32:64].sum(axis=(1, 2)), wide.sum(axis=(1, 2)))
            clip = drawn.draw_clip(label, rng, frames=frames).astype(int)
            for start in range(frames - WINDOW + 1):
                changed = np.abs(clip[start : start + WINDOW] - clip[start]).max(axis=1) > 60
                assert changed.mean(axis=(1, 2)).max() > 0.03


@pytest.mark.parametrize(("size", "count", "frames"), [(32, 160, 20), (64, 40, 20), (32, 40, 32), (48, 40, 16)])
def test_tracker_names_real_clips(size: int, count: int, frames: int) -> None:
    assert min(drawn.accuracy(*windows(count, size, seed=size + frames, frames=frames)).values()) >= 0.99


ANGLES = 2 * np.pi * STEPS / 16
PLACES = {
    "right": 12 + np.outer(STEPS - 7, (1, 0)),
    "left": 12 + np.outer(STEPS - 7, (-1, 0)),
    "down": 12 + np.outer(STEPS - 7, (0, 1)),
    "up": 12 + np.outer(STEPS - 7, (0, -1)),
    "circle": np.round(12 + 7 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)).astype(int),
    "there and back": np.stack([2 + 2 * np.minimum(STEPS, 15 - STEPS), np.full(16, 12)], axis=1),
    "diagonal": np.stack([STEPS + 4, STEPS + 4], axis=1),
}


@pytest.mark.parametrize("motion", PLACES)
def test_motions_as_an_independent_drawing_has_them(motion: str) -> None:
    assert names(moving_patch(RED, PLACES[motion])) == ("red", motion if motion in drawn.MOTIONS else None)


def test_scaling_as_an_independent_drawing_has_it() -> None:
    sides = np.linspace(4, 16, 16).astype(int)
    growing = np.concatenate([moving_patch((20, 230, 230), np.array([[16 - s // 2] * 2]), side=s) for s in sides])
    assert names(growing) == ("cyan", "grow") and names(growing[::-1]) == ("cyan", "shrink")


def test_noise_grey_or_two_bodies_and_empty_grounds_have_no_name() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        white = rng.integers(0, 256, (16, 3, 32, 32), dtype=np.uint8)
        blobs = rng.uniform(0, 1, (16, 3, 4, 4)).repeat(8, axis=2).repeat(8, axis=3)
        for video in (white, (255 * blobs).astype(np.uint8)):
            assert names(video) == (None, None)
    for level in (10, 60, 200, 250):  # 60 is the ground
        assert names(moving_patch((level, level, level), PLACES["right"])) == (None, None)
    one, other = moving_patch(RED, PLACES["down"] - [8, 0]), moving_patch((20, 20, 230), PLACES["down"] + [8, 0])
    assert names(np.where(other != 60, other, one)) == (None, None)


@pytest.mark.parametrize("label", range(8))
def test_a_body_without_its_motion_has_a_colour_and_no_motion(label: int) -> None:
    """Standing still, or the frames in a random order."""
    rng = np.random.default_rng(label)
    for _ in range(10):
        clip = drawn.draw_clip(label, rng)[:WINDOW]
        assert names(np.repeat(clip[:1], WINDOW, axis=0)) == (drawn.CLASSES[label].colour, None)
        assert drawn.track(clip[rng.permutation(WINDOW)]).motion is None


def test_accuracy_counts() -> None:
    clips, labels = windows(8, 32)
    wrong = [labels[0] + 1, *labels[1:]]
    assert drawn.accuracy(clips, wrong) == {"appearance_accuracy": 0.875, "motion_accuracy": 0.875}
    refuses("uint8", drawn.track, np.zeros((16, 3, 32, 32)))


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("set") / "demo"
    data.main(["--out", str(out), "--clips-per-class", "26", "--workers", "1"])
    return out


@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_files_hold_the_drawn_clips_in_the_layout_of_ucf101(small_set: Path, reader: str) -> None:
    if reader == "decord":
        pytest.importorskip("decord", reason="decord is not installed on this platform")
    assert sorted(path.name for path in small_set.iterdir() if path.is_dir()) == [kind.name for kind in drawn.CLASSES]
    files = sorted(path.name for path in (small_set / "RedDiscRight").iterdir())
    assert len(files) == 26 and files[1] == "v_RedDiscRight_g01_c02.mp4" and files[-1] == "v_RedDiscRight_g25_c01.mp4"
    captions = (small_set / "captions.csv").read_text().splitlines()
    assert len(captions) == 1 + 8 * 26
    assert captions[2].startswith("AmberSquareLeft/v_AmberSquareLeft_g02_c01.mp4,an amb")
    for label, index in np.ndindex(8, 4):
        video = open_video(data.clip_path(small_set, drawn.CLASSES[label].name, index), reader)
        pixels = video.read(range(len(video))).numpy()
        expected = drawn.draw_clip(label, np.random.default_rng([0, label, index]))
        assert 10 * np.log10(255**2 / np.square(pixels.astype(float) - expected).mean()) > 45
        assert names(pixels[:WINDOW]) == (drawn.CLASSES[label].colour, drawn.CLASSES[label].motion)


def test_the_bytes_of_a_set_are_those_of_its_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "ProcessPoolExecutor", lambda workers, mp_context: ThreadPoolExecutor(workers))

    def make(seed: str) -> bytes:
        out = tmp_path / "demo"
        data.main(["--out", str(out), "--clips-per-class", "1", "--workers", "1", "--seed", seed])
        return (out / "RedDiscRight" / "v_RedDiscRight_g01_c01.mp4").read_bytes()

    first, other, again = make("0"), make("1"), make("0")
    assert first == again != other


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    for flag, value in (("--frames", "40"), ("--size", "33"), ("--clips_per_class", "0")):
        refuses(flag, data.main, ["--out", str(tmp_path / "demo"), flag, value])
