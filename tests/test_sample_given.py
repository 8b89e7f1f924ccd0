"""Given frames and windows from files to videos: a tiny network end to end, and every wrong file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.transforms import TRANSFORMS, to_signed_range
from engine.build import build_model
from engine.conditions import class_conditions
from engine.config import load_config
from engine.distributed import init_world
from engine.objective import sample_generator
from engine.trainer import Trainer
from models.autoencoder import LatentCodec
from sample.generate import Generator, Settings, plan_sampling, sampler_settings
from sample.given import hash_given, read_given
from sample.sample import main
from tests.conftest import TINY, random_weights, refuses, save_weights

TRAINED = [*TINY, "diffusion.prediction=x_start", "model.learn_sigma=false", "sample.steps=4", "sample.method=ddim"]
GIVEN = ["condition.frames=random", "condition.max_frames=3"]
LONG = ["data.num_frames=11", "sample.window=4", "sample.overlap=2"]
PER_FRAME = "diffusion.frame_timesteps=independent"


def generator_of(*overrides: str) -> Generator:
    config = load_config(None, [*TRAINED, *GIVEN, *overrides])
    trained = load_config(None, [*TRAINED, *GIVEN])
    model = build_model(trained)
    model.load_state_dict(random_weights(trained, 0))
    conditions = class_conditions(config.model, torch.device("cpu"))
    return Generator(model, LatentCodec.from_config(config.codec), config, conditions)


def videos_of(generator: Generator, num: int = 5, **changes: object) -> np.ndarray:
    settings = sampler_settings(generator.config) | changes
    return np.concatenate([videos for _, videos in generator.batches(num=num, **settings)])


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 8x8 and 13x9 pixels, and a video of six frames whose values count."""
    root = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    for name, size in (("a", (8, 8, 3)), ("b", (8, 8, 3)), ("wide", (9, 13, 3))):
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(root / f"{name}.png")
    levels = np.arange(0, 60, 10, dtype=np.uint8)
    np.save(root / "clip.npy", np.broadcast_to(levels[:, None, None, None], (6, 8, 8, 3)).copy())
    return root


def test_the_given_frames_are_the_codecs_own_in_every_bit(media: Path) -> None:
    """Pixel space: the codec changes nothing, so given pixels come back; videos take the images in turn."""
    generator = generator_of(f"sample.first_frame=[{media}/a.png,{media}/b.png]")
    videos = videos_of(generator)
    a, b = (np.asarray(Image.open(media / f"{name}.png")) for name in "ab")
    np.testing.assert_array_equal(videos[:, 0], [a, b, a, b, a])
    others = videos_of(generator_of())
    assert (videos[:, 1:] != others[:, 1:]).any(axis=(1, 2, 3, 4)).all()  # the others follow from them
    np.testing.assert_array_equal(videos_of(generator, method="ddpm")[:, 0], videos[:, 0])


def test_first_and_last_frame_and_the_end_of_a_video(media: Path) -> None:
    video = videos_of(generator_of(f"sample.given=[{media}/clip.npy]", "sample.given_frames=2"), num=1)[0]
    assert [int(frame.mean()) for frame in video[:2]] == [40, 50]
    spread = generator_of(f"sample.given=[{media}/clip.npy]", "sample.given_frames=2", "data.frame_interval=3")
    assert [int(frame.mean()) for frame in videos_of(spread, num=1)[0, :2]] == [20, 50]
    both = generator_of(f"sample.first_frame=[{media}/a.png]", f"sample.last_frame=[{media}/b.png]")
    ends = [np.asarray(Image.open(media / f"{name}.png")) for name in "ab"]
    np.testing.assert_array_equal(videos_of(both, num=1)[0, [0, -1]], ends)


def test_images_of_any_size_are_cut_as_training_clips_are(media: Path) -> None:
    config = load_config(None, [*TRAINED, *GIVEN, f"sample.first_frame=[{media}/wide.png]"])
    pixels = torch.from_numpy(np.asarray(Image.open(media / "wide.png"))).permute(2, 0, 1)[None]
    given = read_given(config.sample, config.data)
    assert given is not None and given.places == (0,)
    assert torch.equal(given.pixels[0], to_signed_range(TRANSFORMS["resize_then_center_crop"](pixels, 8)))


@pytest.mark.parametrize("method", ["autoregressive", "fused", "rolling"])
def test_a_long_video_is_a_function_of_seed_and_index(method: str, media: Path) -> None:
    images = f"sample.first_frame=[{media}/a.png,{media}/b.png]"
    generator = generator_of(*LONG, f"sample.window_method={method}", images, PER_FRAME)
    videos = videos_of(generator, batch_size=5)
    assert videos.shape == (5, 11, 8, 8, 3)
    for changes, expected in (({"batch_size": 2}, videos), ({"indices": [3, 1]}, videos[[3, 1]])):
        assert np.abs(videos_of(generator, **changes).astype(int) - expected).max() <= 1
    assert np.abs(videos[0].astype(int) - videos[2]).max() > 1  # the same image and label, other noise


def test_one_window_is_plain_sampling() -> None:
    plain = videos_of(generator_of("data.num_frames=4"))
    for method in ("autoregressive", "fused"):
        wide = generator_of("data.num_frames=4", "sample.window=4", f"sample.window_method={method}")
        np.testing.assert_array_equal(videos_of(wide), plain)


def test_progress_counts_the_passes_of_all_windows() -> None:
    seen: list[tuple[int, int]] = []
    videos_of(generator_of(*LONG), num=3, batch_size=2, callback=lambda done, total: seen.append((done, total)))
    assert seen == [(step, 2 * 5 * 4) for step in range(1, 41)]


def test_draws_for_given_frames_come_after_all_others(tiny: list[str]) -> None:
    """So that a run with given frames sees the noise, timesteps and labels of one without."""
    configs = [load_config(None, [*tiny, *extra]) for extra in ([], GIVEN)]
    objectives = [Trainer(config, init_world("cpu")).objective for config in configs]
    shape = torch.Size((3, 4, 3, 8, 8))
    plain, with_given = (each.draw([5, 6, 900], shape, 1) for each in objectives)
    assert plain.given is None and with_given.given is not None and with_given.given.shape == (3, 4)
    for name in ("uniform", "label_uniform", "noise"):
        assert torch.equal(getattr(plain, name), getattr(with_given, name))
    generator = sample_generator(0, 900, torch.device("cpu"))
    torch.rand(2, generator=generator), torch.randn(shape[1:], generator=generator)
    uniform = torch.rand(1, 3 + 4, generator=generator)
    assert torch.equal(objectives[1].given.draw(uniform, 1)[0], with_given.given[2])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["sample.first_frame=[M/none.png]"], "sample.first_frame: M/none.png: is not a readable image"),
        (["sample.first_frame=[M/clip.npy]"], "sample.first_frame: the 6 frames of M/clip.npy must be one image"),
        (["sample.given=[M/clip.npy]", "sample.given_frames=7"], "the 6 frames of M/clip.npy are too few"),
        (["sample.given=[M/none.mp4]"], "sample.given: M/none.mp4: cannot be opened"),
        (["sample.given=[M/clip.npy]", "sample.given_frames=4"], "leave nothing to sample"),
        (["sample.first_frame=[M/a.png]", "sample.last_frame=[M/a.png,M/b.png]"], "names 2 files, but first_frame"),
        (["sample.first_frame=[M/a.png]", "condition.frames=none", "condition.max_frames=1"], "without given frames"),
        (["sample.last_frame=[M/a.png]", "condition.frames=prefix"], "condition.frames=prefix"),
        (["data.num_frames=11", "sample.window=8", "sample.overlap=4"], "4 given frames are more than the 3"),
        ([*LONG, "sample.window_method=rolling"], "rolling windows need a network trained with a timestep per frame"),
        ([*LONG, PER_FRAME, "sample.method=unipc"], "need sample.method=ddpm | ddim | euler, not unipc"),
        ([*LONG, PER_FRAME, "sample.last_frame=[M/a.png]"], "can be given first frames only"),
    ],
)
def test_wrong_frames_are_one_sentence(overrides: list[str], sentence: str, media: Path) -> None:
    def plan() -> None:
        config = load_config(None, [*TRAINED, *GIVEN, *(each.replace("M/", f"{media}/") for each in overrides)])
        plan_sampling(config, Settings(**sampler_settings(config)))

    refuses(sentence.replace("M/", f"{media}/"), plan)


def test_wrong_keys_are_one_sentence() -> None:
    for overrides, sentence in (
        ("sample.window_method=fused", "read only with sample.window"),
        ("sample.window=4 sample.overlap=4", "from 1 to sample.window - 1 = 3"),
        ("sample.window=4 sample.window_method=both", "autoregressive, fused"),
        ("sample.first_frame=[a.png] sample.given=[b.mp4]", "set one of them"),
        ("condition.frames=prefix condition.max_frames=4", "condition.max_frames=4 leaves no frame to predict"),
    ):
        refuses(sentence, load_config, None, [*TRAINED, *overrides.split()])


def test_the_command_line(tmp_path: Path, media: Path) -> None:
    run, out = save_weights(load_config(None, [*TRAINED, *GIVEN]), tmp_path / "run" / "checkpoints"), tmp_path / "out"
    flags = ["--first_frame", f"{media}/a.png", "--first_frame", f"{media}/b.png", "--last_frame", f"{media}/b.png"]
    flags += ["--last_frame", f"{media}/a.png", "--window", "4", "--overlap", "2", "data.num_frames=9"]
    assert main(["--ckpt", str(run), "--save_video_path", str(out), "--num_videos", "2", *flags]) == 0
    written = json.loads((out / "samples.json").read_text())
    assert written["num_frames"] == 9 and written["sample"]["first_frame"] == [f"{media}/a.png", f"{media}/b.png"]
    assert written["sample"]["window"] == 4


def test_a_job_over_many_processes_knows_its_frames_by_their_pixels(tmp_path: Path, media: Path) -> None:
    (tmp_path / "copy.png").write_bytes((media / "a.png").read_bytes())
    names = (f"{media}/a.png", f"{tmp_path}/copy.png", f"{media}/b.png")
    configs = [load_config(None, [*TRAINED, *GIVEN, f"sample.first_frame=[{name}]"]) for name in names]
    first, copy, other = (hash_given(read_given(config.sample, config.data)) for config in configs)
    assert first == copy != other
