"""Moving MNIST against a step-by-step simulation, on digits drawn here."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets import DataConfig, build_dataset
from tests.conftest import refuses
from tools.make_moving_mnist import bounce, draw_clip, main, read_idx


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """Thirty 'digits' of 28 x 28: digit d is a bar as bright as 25 (d + 1)."""
    images = np.zeros((30, 28, 28), np.uint8)
    labels = np.arange(30, dtype=np.uint8) % 10
    images[:, 4:24, 10:18] = (25 * (labels + 1))[:, None, None]
    (tmp_path / "my-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (tmp_path / "my-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return tmp_path / "my-images-idx3-ubyte.gz"


def make(mnist: Path, out: Path, *flags: str) -> Path:
    main([str(out), "--mnist", str(mnist), "--clips", "12", *flags])
    return out


@given(st.floats(0, 36), st.floats(-30, 30))
def test_bouncing_is_reflection_step_by_step(start: float, velocity: float) -> None:
    """In steps of a hundredth of a frame: at an edge the point turns round."""
    steps, limit, place, speed = 100, 36.0, start, velocity / 100
    places = [place]
    for step in range(1, 19 * steps + 1):
        place += speed
        if place < 0 or place > limit:
            place, speed = (-place if place < 0 else 2 * limit - place), -speed
        if step % steps == 0:
            places.append(place)
    assert np.allclose(bounce(np.array([start]), np.array([velocity]), limit, 20)[:, 0], places, atol=1e-6)


def test_digits_stay_whole_and_overlap_by_the_brighter_pixel() -> None:
    bright, dark = np.full((28, 28), 200, np.uint8), np.full((28, 28), 90, np.uint8)
    overlaps = 0
    for seed in range(20):
        video = draw_clip(np.stack([bright, dark]), np.random.default_rng(seed), 64, 20, None)
        assert video.shape == (20, 64, 64) and set(np.unique(video)) == {0, 90, 200}
        assert ((video == 200).sum((1, 2)) == 28 * 28).all()  # whole, and never covered
        overlaps += int(((video == 90).sum((1, 2)) < 28 * 28).any())
    assert overlaps > 0


@pytest.mark.parametrize(("direction", "moves"), [("horizontal", (0, 1)), ("vertical", (1, 0)), ("diagonal", (1, 1))])
def test_directions_are_what_they_say(direction: str, moves: tuple[int, int]) -> None:
    for seed in range(10):
        video = draw_clip(np.full((1, 28, 28), 255, np.uint8), np.random.default_rng(seed), 64, 20, direction)
        corners = [np.argwhere(frame)[0] for frame in video]
        ways = np.abs(np.diff(corners, axis=0)).sum(0)
        assert tuple((ways > 20).astype(int)) == moves and (ways[np.array(moves) == 0] == 0).all()


def test_a_clip_depends_on_seed_and_index_alone(mnist: Path, tmp_path: Path) -> None:
    few, many = make(mnist, tmp_path / "few"), make(mnist, tmp_path / "many", "--clips", "15")
    for index in range(12):
        assert (few / f"{index:06d}.mp4").read_bytes() == (many / f"{index:06d}.mp4").read_bytes()
    other = make(mnist, tmp_path / "other", "--seed", "1")
    assert (few / "000000.mp4").read_bytes() != (other / "000000.mp4").read_bytes()


@pytest.mark.parametrize("kind", ["video", "png"])
def test_training_reads_it_and_digits_are_the_labels(mnist: Path, tmp_path: Path, kind: str) -> None:
    out = make(mnist, tmp_path / "out", "--labels", "digit", "--format", kind, "--frames", "18")
    data = build_dataset(DataConfig(path=str(out), frame_interval=1, image_size=64, num_workers=0), seed=0)
    assert data.class_names == [str(digit) for digit in range(10)] and len(data) == 12
    for index in range(12):
        sample = data[0, index]
        brightest = (sample["video"].max() + 1) * 127.5
        assert abs(float(brightest) - 25 * (int(sample["labels"][0]) + 1)) < 4


def test_wrong_files_and_values_are_sentences(mnist: Path, tmp_path: Path) -> None:
    whole = mnist.read_bytes()
    for content, sentence in (
        (whole[:-50], "damaged gzip"),
        (gzip.compress(gzip.decompress(whole)[:-1]), "not a complete MNIST file"),
        (b"text", "not a complete MNIST file"),
        (b"", "not a complete MNIST file"),
    ):
        (tmp_path / "bad").write_bytes(content)
        refuses(sentence, read_idx, tmp_path / "bad")
    refuses("there is no file", make, tmp_path / "gone", tmp_path / "out")
    refuses("--size must be at least 32", make, mnist, tmp_path / "out", "--size", "16")
    refuses("do not match labels", make, mnist, tmp_path / "out", "--labels", "digit", "--mnist_labels", str(mnist))
    make(mnist, tmp_path / "out")
    refuses(r"other settings \(seed: 0 -> 1\)", make, mnist, tmp_path / "out", "--seed", "1")
